"""Text to tokens: a byte-level BPE, trained once and run through tiktoken.

    python -m minids.tokenizer                                    # rebuilds data/tokenizer
    python -m minids.tokenizer --vocab-size 8192 --out tok8192    # a larger one beside it
    python -m minids.tokenizer --data text:my_texts --out my_tok  # from your own text

A model reads integers. Byte-pair encoding (Sennrich et al., arXiv 1508.07909) starts with the 256
bytes, so that every text has an encoding, and then gives the most frequent neighbouring pair of
tokens an id of its own, again and again, until the vocabulary is full. A split pattern first cuts
the text into words, numbers, punctuation and space, and no token crosses a cut.

The order of the ids is fixed: the special tokens (DeepSeek's strings; begin of sentence is 0 and
end of sentence 1), the bytes 0 to 255, then the merges, the earliest first. A special token is
only ever placed by its id: `encode` takes text that spells one as ordinary text, so a user's
message can neither end the conversation nor speak for the assistant. The rows up to the next
multiple of 64 exist in the model and stay unused.

A folder holds `ranks.tiktoken` (one `base64(token) id` a line, tiktoken's own format) and
`meta.json` (pattern, special tokens, fingerprint, and how it was made). `save_hf` writes the same
tokenizer as transformers reads it; a released model's folder (`tokenizer.json`) is used as it is.

Different from DeepSeek-V3 (arXiv 2412.19437, section 4.1): thousands of tokens in place of 128K;
runs of Chinese characters and kana are not cut apart from other letters; tokens that join
punctuation with a line break are never split at random.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, option, require
from minids.text.corpora import open_corpus
from minids.text.tokenizer import Tokenizer, check_target


@dataclass(frozen=True)
class TokenizerArgs:
    """The training of a tokenizer"""

    vocab_size: int = option(4096, "ids in all, the special tokens and the bytes among them")
    data: str = option("pystdlib", "corpus: pystdlib, text:PATH or hf:NAME[:CONFIG[:COLUMN]]")
    out: str = option("data/tokenizer", "folder to write")
    max_bytes: int = option(200_000_000, "text to learn from at most, bytes; a stream has no end")

    def __post_init__(self):
        check_types(self)
        require(self, "max_bytes", self.max_bytes >= 1, "at least 1")


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """How many bytes of `texts` one token holds on average: the compression."""
    n_bytes, size, count = tokenizer.n_bytes, 0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        size, count = size + n_bytes[ids].sum().item(), count + len(ids)
    return size / count


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first documents, up to and including the one with which they exceed `limit` bytes."""
    for text in texts:
        yield text
        limit -= len(text.encode("utf-8", "replace"))
        if limit < 0:
            return


def build(args: TokenizerArgs) -> Tokenizer:
    """Train a tokenizer on the corpus's training part, save it, and print what it is worth."""
    check_target(Path(args.out))
    corpus = open_corpus(args.data)
    texts = first_bytes(corpus.train, args.max_bytes)
    tokenizer = Tokenizer.train(texts, args.vocab_size, corpus=args.data)
    tokenizer.save(args.out)
    made = tokenizer.made
    print(f"{args.out}: {tokenizer.n_tokens} tokens, {tokenizer.vocab_size} rows, fingerprint "
          f"{tokenizer.fingerprint}, from {made['documents']} documents, {made['bytes']:,} bytes")
    held_out = first_bytes(corpus.valid, args.max_bytes)
    print(f"held-out text: {bytes_per_token(tokenizer, held_out):.3f} bytes per token")
    return tokenizer


def main() -> None:
    """`python -m minids.tokenizer`."""
    (given,) = parse("minids.tokenizer", __doc__, TokenizerArgs)
    build(TokenizerArgs(**given))


if __name__ == "__main__":
    run_program("minids.tokenizer", main)
