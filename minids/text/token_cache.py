"""Tokenise a corpus once, into memory-mapped files that later runs share.

A corpus lies in a folder named by a hash of everything that decides its bytes: the text, the
tokenizer and the fill-in-the-middle settings. The folder appears whole or not at all; a damaged
one is made again.

    cache/<hash>/train_00000.bin   tokens, two or four bytes each, little-endian
    cache/<hash>/valid_00000.bin
    cache/<hash>/index.json        files, sizes, checksums

The cache is `data/cache` in a clone of the repository, and `minids` in the user's cache folder
(`$XDG_CACHE_HOME`, or `~/.cache`) where minids was installed from a wheel.
"""

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

from minids.base.files import flush, write_flushed
from minids.text.corpora import Corpus
from minids.text.packing import encode_documents
from minids.text.tokenizer import CLONE

CACHE = (CLONE / "data" / "cache" if CLONE else
         Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minids")
CACHE_FORMAT = 1
SHARD_TOKENS = 2**25      # tokens in one file
BATCH_CHARACTERS = 2**22  # text tokenised at once


class Tokens:
    """One long sequence of tokens, stored in several arrays, memory-mapped or not."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(a) for a in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from position `start`, wrapping round: (count,) int64."""
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


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type of a stored token: two bytes if the vocabulary fits, else four."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield the documents in lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def append_tokens(folder: Path, split: str, shards: list[dict], tokens: np.ndarray, dtype) -> None:
    """Write tokens after those of a split's last file, starting a new file when one is full.

    shards: the entries of the split's files in index.json, extended in place
    """
    while len(tokens):
        if not shards or shards[-1]["tokens"] == SHARD_TOKENS:
            shards.append({"file": f"{split}_{len(shards):05d}.bin", "tokens": 0, "crc32": 0})
        shard = shards[-1]
        part, tokens = np.split(tokens, [SHARD_TOKENS - shard["tokens"]])
        raw = part.astype(dtype).tobytes()
        with (folder / shard["file"]).open("ab") as file:
            file.write(raw)
        shard["tokens"] += len(part)
        shard["crc32"] = zlib.crc32(raw, shard["crc32"])


def write_split(folder: Path, split: str, documents: Iterable[str], encode, dtype) -> dict:
    """Tokenise the documents of a split into files; return the split's entry of index.json."""
    shards, count = [], 0
    total = len(documents) if isinstance(documents, list) else None
    # disable=None: no bar unless stderr is a terminal
    with tqdm(desc=f"tokenise {split}", total=total, unit="doc", disable=None) as bar:
        for batch in batches(documents):
            append_tokens(folder, split, shards, encode(batch, first=count), dtype)
            count += len(batch)
            bar.update(len(batch))
    for shard in shards:
        flush(folder / shard["file"])
    return {"documents": count, "shards": shards}


def write_cache(folder: Path, corpus: Corpus, splits: dict, dtype: np.dtype) -> dict:
    """Tokenise into a temporary folder and rename it, so that a kill leaves no half-made cache.

    splits: by name, the documents and the function that encodes a list of them

    Returns the content of index.json.
    """
    making = folder.with_suffix(".tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        index = {"corpus": corpus.name, "fingerprint": corpus.fingerprint, "dtype": dtype.str,
                 "splits": {name: write_split(making, name, documents, encode, dtype)
                            for name, (documents, encode) in splits.items()}}
        write_flushed(making / "index.json", json.dumps(index, indent=1).encode())
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return index


def read_index(folder: Path) -> dict | None:
    """Return the index of a cache folder if its files have the right size and checksum."""
    try:
        index = json.loads((folder / "index.json").read_text())
        width = np.dtype(index["dtype"]).itemsize
        for split in index["splits"].values():
            for shard in split["shards"]:
                raw = np.memmap(folder / shard["file"], np.uint8, "r")
                if len(raw) != shard["tokens"] * width or zlib.crc32(raw) != shard["crc32"]:
                    return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return index


def cached_tokens(corpus: Corpus, tokenizer, cache: Path, fim_rate: float = 0.0, seed: int = 0,
                  workers: int = 1) -> dict[str, Tokens]:
    """Return the tokens of each split, from the cache or tokenised into it.

    Validation text is never cut for fill-in-the-middle. Of a stream only validation is cached.
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
    # With the lock, one rank tokenises for all ranks of a machine; a killed owner releases it.
    with FileLock(cache / f"{folder.name}.lock"):
        index = read_index(folder) or write_cache(folder, corpus, splits, dtype)
    return {name: Tokens([np.memmap(folder / s["file"], dtype, "r") for s in split["shards"]])
            for name, split in index["splits"].items()}
