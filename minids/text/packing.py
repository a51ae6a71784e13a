"""Join documents into one sequence of tokens, some of them cut for fill-in-the-middle.

Each document becomes BOS text EOS. The documents are joined and later cut into training sequences
without masking attention between documents: DeepSeek-V3 (arXiv 2412.19437), section 4.1. From the
same section, fill-in-the-middle (FIM) turns a share of the documents, a tenth in V3, into prefix,
suffix, middle (PSM):

    BOS <fim_begin> prefix <fim_hole> suffix <fim_end> middle EOS
"""

from collections.abc import Iterator

import numpy as np

PIECE_CHARACTERS = 2**17  # longest text given to the tokenizer in one call


def pieces(text: str, longest: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield `text` in parts of at most `longest` characters, cut after a line if one ends there.

    The parts of a long document keep all tokenizer threads busy. No token spans a cut.
    """
    start = 0
    while start < len(text):
        stop = start + longest
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def document_parts(text: str, index: int, tokenizer, fim_rate: float, seed: int) -> list:
    """Return document number `index` as special token ids (int) and text to encode (str)."""
    t = tokenizer
    if fim_rate and (rng := np.random.default_rng([seed, index])).random() < fim_rate:
        a, b = sorted(rng.integers(0, len(text) + 1, size=2))
        return [t.bos_id, t.fim_begin_id, *pieces(text[:a]), t.fim_hole_id, *pieces(text[b:]),
                t.fim_end_id, *pieces(text[a:b]), t.eos_id]
    return [t.bos_id, *pieces(text), t.eos_id]


def encode_documents(texts: list[str], tokenizer, first: int = 0, fim_rate: float = 0.0,
                     seed: int = 0, workers: int = 1) -> np.ndarray:
    """Return the tokens of the documents, joined: (N,) int64.

    first: number of the first document in its corpus; with `seed` it decides the FIM cuts
    fim_rate: share of the documents that are cut, 0 to 1; workers: threads that tokenise
    """
    parts = [part for i, text in enumerate(texts, first)
             for part in document_parts(text, i, tokenizer, fim_rate, seed)]
    encoded = iter(tokenizer.encode_batch([p for p in parts if isinstance(p, str)], workers))
    ids = [np.asarray([p] if isinstance(p, int) else next(encoded), np.int64) for p in parts]
    return np.concatenate(ids)
