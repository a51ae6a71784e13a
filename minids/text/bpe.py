"""Byte-pair encoding: our pattern and special tokens, and the `tokenizers` library.

The library learns the merges (training only) and runs the `tokenizer.json` of released models. It
spells bytes as printable characters, GPT-2's alphabet. This file translates between its vocabulary
and ours: bytes -> id.
"""

import json
from collections.abc import Iterable
from itertools import pairwise

RELEASED = TOKENIZER, TOKENIZER_CONFIG, CONFIG, GENERATION = (
    "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")

SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", *(f"<｜place▁holder▁no▁{i}｜>" for i in range(10)))

# DeepSeek-V3's pattern, plus a last alternative for what it does not match (control characters,
# for example): tiktoken silently drops such characters. The bounds of 256 keep the backtracking
# matcher from overflowing its stack on a megabyte of spaces.
PATTERN = "|".join((
    r"\p{N}{1,3}",                                # up to three digits
    r"[!-/:-@\[-`{-~][A-Za-z]+",                  # a word with the ASCII punctuation before it
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",     # a word with a space before it
    r" ?[\p{P}\p{S}]+[\r\n]*",                   # punctuation, to the end of the line
    r"\s{0,256}[\r\n]+",                         # blank lines
    r"\s{1,256}(?!\S)",                          # spaces, except the one before a word
    r"\s",
    r"[^\s\p{L}\p{M}\p{N}\p{P}\p{S}]+"))         # the rest


def printable_bytes() -> dict[str, int]:
    """Return GPT-2's alphabet, which the library works in: a printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_ranks(vocab: dict[str, int], special: Iterable[str] = ()) -> dict[bytes, int]:
    """Return bytes -> id for each token that is not special, from its printable characters."""
    byte_of = printable_bytes()
    try:
        return {bytes([byte_of[c] for c in token]): i for token, i in vocab.items()
                if token not in special}
    except KeyError as error:
        raise ValueError(f"{TOKENIZER} is not byte-level: it has a token with {error}, which "
                         "stands for no byte") from error


def byte_level_bpe(model, pattern: str):
    """Return the library's tokenizer, which splits text by `pattern` and merges its bytes."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return engine


def learn_merges(texts: Iterable[str], n_merges: int) -> list[bytes]:
    """Return at most `n_merges` merged tokens, in the order in which BPE finds them.

    Of two equally frequent pairs, the one whose parts have the lower numbers in the trainer goes
    first: bytes in the order of their printable characters, then merges. Neither the order of the
    texts nor the number of threads matters.
    """
    from tokenizers import models, trainers

    bpe = byte_level_bpe(models.BPE(), PATTERN)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=256 + n_merges, min_frequency=2, show_progress=False,
        initial_alphabet=list(printable_bytes())))
    ranks = byte_ranks(bpe.get_vocab())
    return sorted((piece for piece in ranks if len(piece) > 1), key=ranks.get)


def to_library(ranks: dict[bytes, int], special: dict[str, int], pattern: str, shown=()):
    """Return the same tokenizer in the `tokenizers` library, with its special tokens.

    shown: those that decoding keeps when it skips special tokens, as with DeepSeek's <think>
    """
    from tokenizers import AddedToken, decoders, models, processors

    char_of = {byte: c for c, byte in printable_bytes().items()}
    spelled = {piece: "".join(char_of[b] for b in piece) for piece in ranks}
    vocab = special | {spelled[piece]: token for piece, token in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in merge_pairs(ranks)]
    engine = byte_level_bpe(models.BPE(vocab=vocab, merges=merges), pattern)
    for text in special:  # in the order of their ids
        add = engine.add_tokens if text in shown else engine.add_special_tokens
        add([AddedToken(text, normalized=False)])
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    return engine


def merge_pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that each merged token consists of, in the order of the ids.

    tiktoken stores no merges: it joins any two neighbours whose bytes together are a token, lowest
    id first. The library joins listed pairs only. Both agree, because what happens inside a token
    before it is complete never depends on the bytes around it. Here the merges before a token are
    applied to its bytes; `ValueError` if that leaves more than two parts.
    """
    pairs = []
    for piece in sorted((piece for piece in ranks if len(piece) > 1), key=ranks.get):
        parts, own = [bytes([b]) for b in piece], ranks[piece]
        while len(parts) > 2:  # b"the" -> b"t", b"h", b"e" -> b"t", b"he"
            joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
            i = joined.index(min(joined))
            if joined[i] >= own:
                raise ValueError(f"token {piece!r} is not the merge of two earlier ones")
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def read_engine(spec: dict):
    """Return the library's tokenizer for the content of a tokenizer.json."""
    from tokenizers import Tokenizer as Engine

    model = spec.get("model")
    if isinstance(model, dict) and "merges" in model and model.get("continuing_subword_prefix"):
        raise ValueError(f"{TOKENIZER} has a continuing_subword_prefix, which no byte-level BPE "
                         "has")  # with one, the library may abort the whole process
    try:
        return Engine.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{TOKENIZER} cannot be read: {error}") from error


def check_byte_level(spec: dict, model: str) -> None:
    """Raise `ValueError` unless a tokenizer.json is a byte-level BPE."""
    splitter = spec.get("pre_tokenizer") or {}
    kinds = [part["type"] for part in splitter.get("pretokenizers", [splitter]) if part]
    if model != "BPE" or "ByteLevel" not in kinds:
        raise ValueError(f"{TOKENIZER} has the model {model} and the pre_tokenizer "
                         f"{', '.join(kinds) or 'null'}: only BPE with ByteLevel is read")


def without_added(spec: dict, special: dict[str, int]) -> dict:
    """Return a tokenizer.json without its added tokens (`special`): no text becomes one of them."""
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in special}
    off = dict.fromkeys(("truncation", "padding", "post_processor"))
    model = spec["model"] | {"vocab": vocab, "unk_token": None, "dropout": None}
    return spec | off | {"added_tokens": [], "model": model}


def end_ids(end: str, ids: dict[str, int], tokenizer_config: dict, *configs: dict) -> list[int]:
    """Return the ids of "bos" or "eos" in a released tokenizer; ids: id of each token.

    The first is the one to write: the token that tokenizer_config.json names, else the id in
    config.json or generation_config.json, else DeepSeek's own token. The others also end a text.
    """
    name, numbers = tokenizer_config.get(f"{end}_token"), []
    if isinstance(name, dict):
        name = name.get("content")
    for file, config in zip((CONFIG, GENERATION), configs, strict=True):
        if end == "bos" and name is not None:
            break
        given = config.get(f"{end}_token_id")
        own = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(number) is int and number in ids.values() for number in own):
            raise ValueError(f"{file}: {end}_token_id = {given!r} is not in {TOKENIZER}")
        numbers += own
    if name is not None:
        what = f"{TOKENIZER_CONFIG}: {end}_token = {name!r}"
        found = ids.get(name) if isinstance(name, str) else None
    elif numbers:
        found = numbers[0]
    else:
        name = SPECIAL[end == "eos"]
        what = f"{TOKENIZER_CONFIG} has no {end}_token, {CONFIG} no {end}_token_id, and {name}"
        found = ids.get(name)
    if found is None:
        raise ValueError(f"{what} is not in {TOKENIZER}")
    return list(dict.fromkeys([found, *numbers]))
