"""Helpers of the tests of text: a byte tokenizer, reading documents back, checking checks."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

SPECIAL = 8


class ByteTokenizer:
    """Each UTF-8 byte is a token, after eight reserved ids."""

    bos_id, eos_id, fim_begin_id, fim_hole_id, fim_end_id = range(5)

    def __init__(self, fingerprint: str = "bytes", vocab_size: int = 264):
        self.fingerprint, self.vocab_size = fingerprint, vocab_size
        self.n_bytes = torch.tensor([0] * SPECIAL + [1] * 256)
        self.encoded = 0

    def encode(self, text: str) -> list[int]:
        return [SPECIAL + b for b in text.encode()]

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        self.encoded += len(texts)
        return [self.encode(t) for t in texts]


TOKENIZER = ByteTokenizer()


def decode(ids) -> str:
    return bytes(int(i) - SPECIAL for i in ids).decode()


def split_documents(ids) -> list[list[int]]:
    """Return the documents in a sequence of tokens; assert that BOS and EOS enclose each one."""
    documents, current = [], None
    for token in map(int, ids):
        if token == TOKENIZER.bos_id:
            assert current is None, "a document begins inside another"
            current = []
        elif token == TOKENIZER.eos_id:
            documents.append(current)
            current = None
        else:
            current.append(token)  # fails on None: a token outside every document
    assert current is None, "the last document has no end"
    return documents


def reassemble(document: list[int]) -> str:
    """Return the text of a document in PSM order: begin prefix hole suffix end middle."""
    t = TOKENIZER
    if t.fim_begin_id not in document:
        return decode(document)
    assert document[0] == t.fim_begin_id
    hole, end = document.index(t.fim_hole_id), document.index(t.fim_end_id)
    assert hole < end
    return decode(document[1:hole]) + decode(document[end + 1:]) + decode(document[hole + 1:end])


def fails(check, *args) -> bool:
    """Return whether a check fails, as it must for its wrong variant."""
    try:
        check(*args)
    except (AssertionError, AttributeError):
        return True
    return False


def write_rows(path: Path, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)


def take(loader, sizes) -> list[torch.Tensor]:
    return [torch.stack(loader.next_batch(size)) for size in sizes]


def equal(one, two) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


RAMP = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]  # 231 sequences: seven epochs packed, one streamed
