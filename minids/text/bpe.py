"""Byte-level BPE in the `tokenizers` library: learning merges, writing and reading its files."""

import json
from collections.abc import Iterable
from itertools import pairwise

RELEASED = TOKENIZER, TOKENIZER_CONFIG, CONFIG = (
    "tokenizer.json", "tokenizer_config.json", "config.json")

SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", *(f"<｜place▁holder▁no▁{i}｜>" for i in range(10)))

# DeepSeek-V3's pattern, and a last alternative for what it leaves over (control characters, say):
# tiktoken silently drops a character that no alternative matches. The bounds of 256 keep the
# matcher, which goes back step by step, from running out of stack on a megabyte of spaces.
PATTERN = "|".join((
    r"\p{N}{1,3}",                                # up to three digits
    r"[!-/:-@\[-`{-~][A-Za-z]+",                  # a word with the ASCII punctuation before it
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",     # a word with a space before it
    r" ?[\p{P}\p{S}]+[\r\n]*",                   # punctuation, to the end of the line
    r"\s{0,256}[\r\n]+",                         # blank lines
    r"\s{1,256}(?!\S)",                          # space, but the one before a word
    r"\s",
    r"[^\s\p{L}\p{M}\p{N}\p{P}\p{S}]+"))         # the rest


def learn_merges(texts: Iterable[str], n_merges: int) -> list[bytes]:
    """The merged tokens in the order in which BPE finds them, `n_merges` at most.

    Of two pairs equally frequent, the one whose parts the trainer numbered lower goes first: the
    bytes in the order of their printable characters, then the merges. The texts' order and the
    threads play no part.
    """
    from tokenizers import models, trainers

    bpe = byte_level_bpe(models.BPE(), PATTERN)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=256 + n_merges, min_frequency=2, show_progress=False,
        initial_alphabet=list(printable_bytes())))
    pieces = byte_ranks(bpe.get_vocab())
    return sorted((piece for piece in pieces if len(piece) > 1), key=pieces.get)


def byte_level_bpe(model, pattern: str):
    """The library's tokenizer: cuts text by `pattern`, spells it in its alphabet and merges."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return engine


def to_library(ranks: dict[bytes, int], special: dict[str, int], pattern: str):
    """The same tokenizer in the `tokenizers` library, the special tokens as special there."""
    from tokenizers import AddedToken, decoders, models, processors

    char_of = {byte: c for c, byte in printable_bytes().items()}
    spelled = {piece: "".join(char_of[b] for b in piece) for piece in ranks}
    vocab = special | {spelled[piece]: token for piece, token in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in merge_pairs(ranks)]
    engine = byte_level_bpe(models.BPE(vocab=vocab, merges=merges), pattern)
    engine.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    return engine


def merge_pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each merged token is made of, the earliest merge first.

    tiktoken keeps no merges: it joins any two neighbours whose bytes together are a token, the
    lowest rank first. The library joins listed pairs only. Both agree, since what happens inside
    a token's bytes before it is whole never depends on the bytes around it.
    """
    merged = sorted((piece for piece in ranks if len(piece) > 1), key=ranks.get)
    return [split_below(piece, ranks) for piece in merged]


def split_below(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that BPE makes of a token by the ranks below its own: b"the" -> b"t", b"he".

    Raises `ValueError` if it makes more: no merge would ever give that token.
    """
    parts, own = [bytes([b]) for b in piece], ranks[piece]
    while len(parts) > 2:
        joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        if joined[i] >= own:
            raise ValueError(f"token {piece!r} is not the merge of two earlier ones")
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def read_engine(spec: dict):
    """The library's tokenizer from what a tokenizer.json holds."""
    from tokenizers import Tokenizer as Engine

    model = spec.get("model")
    if isinstance(model, dict) and "merges" in model and model.get("continuing_subword_prefix"):
        raise ValueError(f"{TOKENIZER} has a continuing_subword_prefix, which no byte-level BPE "
                         "has")  # with one, the library may end the whole process
    try:
        return Engine.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{TOKENIZER} cannot be read: {error}") from error


def check_byte_level(spec: dict, model: str) -> None:
    """Raise `ValueError` naming what a tokenizer.json is, if it is no byte-level BPE."""
    cutter = spec.get("pre_tokenizer") or {}
    kinds = [part["type"] for part in cutter.get("pretokenizers", [cutter]) if part]
    if model != "BPE" or "ByteLevel" not in kinds:
        raise ValueError(f"{TOKENIZER} has the model {model} and the pre_tokenizer "
                         f"{', '.join(kinds) or 'null'}: only BPE with ByteLevel is read")


def end_id(end: str, ids: dict[str, int], tokenizer_config: dict, config: dict) -> int:
    """The id of BOS or EOS (`end`: "bos" or "eos"): what tokenizer_config.json names, else what
    config.json numbers (of several, the first), else DeepSeek's."""
    name, number = tokenizer_config.get(f"{end}_token"), config.get(f"{end}_token_id")
    if isinstance(name, dict):
        name = name.get("content")
    if isinstance(number, list):
        number = number[0] if number else None
    if name is not None:
        what = f"{TOKENIZER_CONFIG}: {end}_token = {name!r}"
        found = ids.get(name) if isinstance(name, str) else None
    elif number is not None:
        what = f"{CONFIG}: {end}_token_id = {number!r}"
        found = number if type(number) is int and number in ids.values() else None
    else:
        name = SPECIAL[end == "eos"]
        what = f"{TOKENIZER_CONFIG} has no {end}_token, {CONFIG} no {end}_token_id, and {name}"
        found = ids.get(name)
    if found is None:
        raise ValueError(f"{what} is not in {TOKENIZER}")
    return found


def byte_ranks(vocab: dict[str, int], special: Iterable[str] = ()) -> dict[bytes, int]:
    """The bytes of each token that is not special, from their printable characters."""
    byte_of = printable_bytes()
    try:
        return {bytes([byte_of[c] for c in token]): i for token, i in vocab.items()
                if token not in special}
    except KeyError as error:
        raise ValueError(f"{TOKENIZER} is not byte-level: it has a token with {error}, which "
                         "stands for no byte") from error


def without_added(spec: dict, special: dict[str, int]) -> dict:
    """A tokenizer.json that knows no added token, not even as part of the vocabulary, and that
    neither cuts nor pads: it takes any text as text."""
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in special}
    off = dict.fromkeys(("truncation", "padding", "post_processor"))
    model = spec["model"] | {"vocab": vocab, "unk_token": None, "dropout": None}
    return spec | off | {"added_tokens": [], "model": model}


def printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet, in which the library works: each byte by a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
