"""Tokens of a corpus in memory-mapped files, made once."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from minids.text.corpora import Corpus
from minids.text.packing import encode_documents

CACHE = Path(__file__).resolve().parents[2] / "data" / "cache"
SHARD_TOKENS = 2**25       # tokens in one file of the cache
BATCH_CHARACTERS = 2**22   # text that is tokenised at once
CACHE_FORMAT = 1


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Tokens:
    """One long row of tokens that lies in several arrays, memory-mapped or not."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(a) for a in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, going on at the front after the last: (count,) int64."""
        out, done = np.empty(count, np.int64), 0
        while done < count:
            i = int(np.searchsorted(self.ends, start, side="right"))
            array = self.arrays[i]
            offset = start - (int(self.ends[i]) - len(array))
            part = array[offset:offset + count - done]
            out[done:done + len(part)] = part
            done += len(part)
            start = (start + len(part)) % len(self)
        return out


class ShardWriter:
    """Writes tokens to files of at most SHARD_TOKENS, with a checksum of each."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shards, self.file = [], None

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, opening a new file where one is full."""
        while len(tokens):
            if self.file is None:
                name = f"{self.split}_{len(self.shards):05d}.bin"
                self.file = (self.folder / name).open("wb")
                self.shards.append({"file": name, "tokens": 0, "crc32": 0})
            shard = self.shards[-1]
            part, tokens = np.split(tokens, [SHARD_TOKENS - shard["tokens"]])
            raw = part.astype(self.dtype).tobytes()
            self.file.write(raw)
            shard["tokens"] += len(part)
            shard["crc32"] = zlib.crc32(raw, shard["crc32"])
            if shard["tokens"] == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        """Flush the open file to the disk."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


def token_dtype(vocab_size: int) -> np.dtype:
    """Two bytes a token where the vocabulary fits, else four; little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_split(folder: Path, split: str, documents: Iterable[str], encode, dtype) -> dict:
    """Tokenise documents into shards; the split's entry of index.json."""
    writer, count = ShardWriter(folder, split, dtype), 0
    total = len(documents) if isinstance(documents, list) else None
    # disable=None: no bar unless stderr is a terminal
    with tqdm(desc=f"tokenise {split}", total=total, unit="doc", disable=None) as bar:
        for batch in batches(documents):
            writer.write(encode(batch, first=count))
            count += len(batch)
            bar.update(len(batch))
    writer.close()
    return {"documents": count, "shards": writer.shards}


def read_index(folder: Path) -> dict | None:
    """The index of a cache folder whose every file is whole; None if there is none such."""
    try:
        index = json.loads((folder / "index.json").read_text())
        width = np.dtype(index["dtype"]).itemsize
        shards = [s for split in index["splits"].values() for s in split["shards"]]
        whole = all((folder / s["file"]).stat().st_size == s["tokens"] * width
                    and checksum(folder / s["file"]) == s["crc32"] for s in shards)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return index if whole else None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_cache(folder: Path, corpus: Corpus, splits: dict, dtype: np.dtype) -> dict:
    """Tokenise into a temporary folder, then rename it: a kill leaves no half-made cache.

    splits: name -> (documents, function that encodes a list of them)
    """
    making = folder.with_suffix(".tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        index = {"corpus": corpus.name, "fingerprint": corpus.fingerprint, "dtype": dtype.str,
                 "splits": {name: write_split(making, name, documents, encode, dtype)
                            for name, (documents, encode) in splits.items()}}
        with (making / "index.json").open("w") as file:
            file.write(json.dumps(index, indent=1))
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return index


def cached_tokens(corpus: Corpus, tokenizer, cache: Path, fim_rate: float = 0.0, seed: int = 0,
                  workers: int = 1) -> dict[str, Tokens]:
    """The tokens of each split, from the cache if they are there and whole; of a stream only
    those of validation, which is never cut for fill-in-the-middle.
    """
    fim = f"{fim_rate}:{seed}" if fim_rate else "none"
    key = "\n".join([str(CACHE_FORMAT), corpus.fingerprint, tokenizer.fingerprint, fim])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    dtype = token_dtype(tokenizer.vocab_size)
    encode = partial(encode_documents, tokenizer=tokenizer, seed=seed, workers=workers)
    splits = {"valid": (corpus.valid, encode)}
    if not corpus.streams:
        splits["train"] = (corpus.train, partial(encode, fim_rate=fim_rate))
    cache.mkdir(parents=True, exist_ok=True)
    # The lock lets the ranks of one machine share the work of one; a killed owner frees it.
    with FileLock(cache / f"{folder.name}.lock"):
        index = read_index(folder) or write_cache(folder, corpus, splits, dtype)
    return {name: Tokens([np.memmap(folder / s["file"], dtype, "r") for s in split["shards"]])
            for name, split in index["splits"].items()}
