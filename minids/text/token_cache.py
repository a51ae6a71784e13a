"""Tokenise a corpus once, into memory-mapped files that later runs share.

A corpus lies in a folder named by a hash of everything that decides its bytes: the text, the
tokenizer and the fill-in-the-middle settings. The folder appears whole or not at all; a damaged
one is made again.

    cache/<hash>/train.bin    tokens, two or four bytes each, little-endian
    cache/<hash>/valid.bin
    cache/<hash>/index.json   checksums

The cache is `data/cache` in a clone of the repository, and `minids` in the user's cache folder
(`$XDG_CACHE_HOME`, or `~/.cache`) where minids was installed from a wheel.
"""

import contextlib
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from filelock import Timeout
from tqdm import tqdm

from minids.base.files import flush, holding, naming, new_folder, read_json, write_json
from minids.text.corpora import Corpus
from minids.text.hub import HubDocuments
from minids.text.packing import encode_documents
from minids.text.tokenizer import CLONE

CACHE = (CLONE / "data" / "cache" if CLONE else
         Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minids")
CACHE_FORMAT = 2
BATCH_CHARACTERS = 2**22  # text tokenised at once


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


def write_split(file: Path, documents: Iterable[str], encode, dtype: np.dtype) -> dict:
    """Tokenise the documents of a split into a file; return the split's entry of index.json."""
    count = checksum = 0
    total = len(documents) if isinstance(documents, list) else None
    # disable=None: no bar unless stderr is a terminal
    with (file.open("wb") as out,
          tqdm(desc=f"tokenise {file.stem}", total=total, unit="doc", disable=None) as bar):
        for batch in batches(documents):
            raw = encode(batch, first=count).astype(dtype).tobytes()
            out.write(raw)
            checksum = zlib.crc32(raw, checksum)
            count += len(batch)
            bar.update(len(batch))
    if not count:
        raise ValueError(f"data has no document for {file.stem}")
    flush(file)
    return {"documents": count, "crc32": checksum}


def write_cache(folder: Path, corpus: Corpus, splits: dict, dtype: np.dtype) -> None:
    """Tokenise `splits` (documents, their encoder) into a temporary folder, and rename it."""
    making = folder.with_suffix(".tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        with naming(folder):
            index = {"corpus": corpus.name, "fingerprint": corpus.fingerprint, "dtype": dtype.str,
                     "splits": {name: write_split(making / f"{name}.bin", documents, encode, dtype)
                                for name, (documents, encode) in splits.items()}}
            write_json(making / "index.json", index)
            shutil.rmtree(folder, ignore_errors=True)
            making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def remove_unfinished(cache: Path) -> None:
    """Remove what killed processes have left, unless another one is making it anew."""
    for left in cache.glob("*.tmp"):
        with contextlib.suppress(Timeout), holding(left.with_suffix(".lock"), timeout=0):
            shutil.rmtree(left, ignore_errors=True)  # who made it may have just finished it


def is_whole(folder: Path) -> bool:
    """Return whether the files of a cache folder have the right checksums."""
    try:
        splits = read_json(folder / "index.json")["splits"]
        return all(zlib.crc32(np.memmap(folder / f"{name}.bin", np.uint8, "r")) == split["crc32"]
                   for name, split in splits.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def cached_tokens(corpus: Corpus, tokenizer, cache: Path, fim_rate: float = 0.0, seed: int = 0,
                  workers: int = 1) -> dict[str, np.ndarray]:
    """Return the tokens of each split, memory-mapped, from the cache or tokenised into it.

    Validation text is never cut for fill-in-the-middle. Of a stream only validation is cached.
    """
    fim = f"{fim_rate}:{seed}" if fim_rate else "none"
    key = "\n".join([str(CACHE_FORMAT), corpus.fingerprint, tokenizer.fingerprint, fim])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    encode = partial(encode_documents, tokenizer=tokenizer, seed=seed, workers=workers)
    splits = {"valid": (corpus.valid, encode)}
    if not isinstance(corpus.train, HubDocuments):
        splits["train"] = (corpus.train, partial(encode, fim_rate=fim_rate))
    remove_unfinished(cache)
    # With the lock, one rank tokenises for all ranks of a machine; a killed owner releases it.
    with new_folder(cache), holding(cache / f"{folder.name}.lock"):
        if not is_whole(folder):
            write_cache(folder, corpus, splits, dtype)
    return {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name in splits}
