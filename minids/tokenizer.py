"""Train a tokenizer: a byte-level BPE, from a corpus.

    python -m minids.tokenizer                                    # rebuilds data/tokenizer
    python -m minids.tokenizer --vocab-size 8192 --out tok8192    # a larger one beside it
    python -m minids.tokenizer --data text:my_texts --out my_tok  # from your own text

`minids.text.tokenizer` describes the encoding, the order of the ids and the files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option
from minids.text.corpora import open_corpus
from minids.text.tokenizer import LARGEST, SMALLEST, Tokenizer, check_target


@dataclass(frozen=True)
class TokenizerArgs(Settings):
    """Training of a tokenizer"""

    vocab_size: int = option(4096, "number of ids, special tokens and bytes included", low=SMALLEST,
                             high=LARGEST)
    data: str = option("pystdlib", "corpus: pystdlib, text:PATH, task:NAME or "
                                   "hf:NAME[:CONFIG[:COLUMN]]")
    out: str = option("data/tokenizer", "folder to write", folder=True)
    max_bytes: int = option(200_000_000, "longest text to learn from, bytes; a stream has no end",
                            low=1)


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield the first documents, up to and including the one that exceeds `limit` bytes."""
    for text in texts:
        yield text
        limit -= len(text.encode("utf-8", "replace"))
        if limit < 0:
            return


def build(args: TokenizerArgs) -> Tokenizer:
    """Train a tokenizer on a corpus, save it, and print its compression of validation text."""
    check_target(Path(args.out))
    corpus = open_corpus(args.data)
    texts = first_bytes(corpus.train, args.max_bytes)
    tokenizer = Tokenizer.train(texts, args.vocab_size, corpus=args.data)
    tokenizer.save(args.out)
    made = tokenizer.made
    print(f"{args.out}: {tokenizer.n_tokens} tokens, {tokenizer.vocab_size} rows, fingerprint "
          f"{tokenizer.fingerprint}, from {made['documents']} documents, {made['bytes']:,} bytes")
    n_bytes, size, count = tokenizer.n_bytes, 0, 0
    for text in first_bytes(corpus.valid, args.max_bytes):
        ids = tokenizer.encode(text)
        size, count = size + n_bytes[ids].sum().item(), count + len(ids)
    print(f"validation text: {size / count:.3f} bytes per token")
    return tokenizer


def main() -> None:
    (given,) = parse("minids.tokenizer", __doc__, TokenizerArgs)
    build(TokenizerArgs(**given))


if __name__ == "__main__":
    run_program("minids.tokenizer", main, lasting=True)
