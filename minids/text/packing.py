"""Documents to one row of tokens."""

from collections.abc import Iterator

import numpy as np

PIECE_CHARACTERS = 2**17   # longest text given to the tokenizer in one call


def fim_cut(text: str, index: int, rate: float, seed: int) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) of document number `index`, or None if it stays whole.

    rate: share of the documents that are cut
    """
    rng = np.random.default_rng([seed, index])
    if rng.random() >= rate:
        return None
    a, b = sorted(rng.integers(0, len(text) + 1, size=2))
    return text[:a], text[a:b], text[b:]


def pieces(text: str, longest: int | None = None) -> Iterator[str]:
    """`text` in parts of at most `longest` characters, cut after a line where one ends.

    Keeps the tokenizer's threads busy on a long document; a token never spans a cut.
    """
    longest, start = longest or PIECE_CHARACTERS, 0
    while start < len(text):
        stop = start + longest
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def document_parts(text: str, index: int, tokenizer, fim_rate: float, seed: int) -> list:
    """One document as a list of special token ids (int) and of text yet to encode (str)."""
    t = tokenizer
    cut = fim_cut(text, index, fim_rate, seed) if fim_rate else None
    if cut is None:
        return [t.bos_id, *pieces(text), t.eos_id]
    prefix, middle, suffix = cut
    return [t.bos_id, t.fim_begin_id, *pieces(prefix), t.fim_hole_id, *pieces(suffix),
            t.fim_end_id, *pieces(middle), t.eos_id]


def encode_documents(texts: list[str], tokenizer, first: int = 0, fim_rate: float = 0.0,
                     seed: int = 0, workers: int = 1) -> np.ndarray:
    """The documents, each BOS text EOS or in PSM order, joined: (N,) int64.

    first: number of the first document in its corpus; decides with `seed` where FIM cuts
    """
    parts = [part for i, text in enumerate(texts, first)
             for part in document_parts(text, i, tokenizer, fim_rate, seed)]
    encoded = iter(tokenizer.encode_batch([p for p in parts if isinstance(p, str)], workers))
    ids = [np.asarray([p] if isinstance(p, int) else next(encoded), np.int64) for p in parts]
    return np.concatenate(ids)
