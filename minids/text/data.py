"""From text to batches: corpora, their split, packing, and loaders that resume exactly.

    data = open_data("pystdlib", tokenizer, seq_len=256)
    tokens, targets = data.loader.next_batch(8)      # (8, 256) each, targets one token ahead

A corpus is named by a word: `pystdlib` (Python's own library, read where it is installed),
`text:PATH` (your files) or `hf:NAME[@REVISION][:CONFIG[:COLUMN]]` (a data set of the Hugging Face
hub, streamed). Local text is tokenised once into memory-mapped files under `data/cache`, in a
folder named by a hash of everything that decides its bytes; it appears there whole or not at all.

Each document becomes BOS text EOS, and the documents are joined into one row of tokens that is cut
into sequences, without cross-document attention masking: DeepSeek-V3 (arXiv 2412.19437) section
4.1. Fill-in-the-middle, from the same section, turns a share of the documents into
prefix, suffix, middle (PSM).

A loader's position is a few numbers, so that a checkpoint can hold it: an epoch's order is
computed from (seed, epoch), never stored.

Simplified: V3 splits some tokens that join punctuation and line break at random, we do not; one
file of plain text is held in memory; of a stream, every rank reads and tokenises all of it.
"""

import codecs
import glob
import hashlib
import json
import os
import random
import re
import shutil
import socket
import sys
import sysconfig
import threading
import urllib.request
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from minids.base.fields import nearest
from minids.text.tasks import open_task, plain_text

CACHE = Path(__file__).resolve().parents[2] / "data" / "cache"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
HOLD_OUT = 20              # one document in so many is validation
HUB_VALID_DOCUMENTS = 1000
SHUFFLE_BLOCK = 2048       # documents of a stream that are shuffled together
STREAM_DOCUMENTS = 32      # documents of a stream that are tokenised at once
SHARD_TOKENS = 2**25       # tokens in one file of the cache
MAX_VALID_TOKENS = 2**24   # validation reads no more than this
BATCH_CHARACTERS = 2**22   # text that is tokenised at once
PIECE_CHARACTERS = 2**17   # longest text given to the tokenizer in one call
CACHE_FORMAT = 1
EXAMPLES = 60_000          # documents of a task


@dataclass(frozen=True)
class Corpus:
    """A named body of text, split into training and validation.

    name: what the user asked for
    train, valid: the documents, each a str; iterable any number of times
    fingerprint: hash of the content, or name and revision of a data set on the hub
    note: what was left out, in words; empty if nothing
    """

    name: str
    train: Iterable[str]
    valid: Iterable[str]
    fingerprint: str
    note: str = ""

    @property
    def streams(self) -> bool:
        """Whether the training text is too large to tokenise beforehand."""
        return isinstance(self.train, HubDocuments)


def open_corpus(spec: str) -> Corpus:
    """The corpus that `spec` names.

    spec: `pystdlib`, `text:PATH` or `hf:NAME[@REVISION][:CONFIG[:COLUMN]]`

    Raises `ValueError` naming `data`, its value and what would work.
    """
    kind, _, rest = spec.partition(":")
    if spec == "pystdlib":
        return open_pystdlib()
    if kind == "text" and rest:
        return open_text(spec, rest)
    if kind == "hf" and rest:
        return open_hub(spec, rest)
    if kind == "task" and rest:
        return open_examples(spec, rest)
    hint = nearest(kind, ["pystdlib", "text:PATH", "hf:NAME", "task:NAME"])
    if Path(spec).expanduser().exists():
        hint = f"did you mean 'text:{spec}'? "
    raise wrong(spec, f"{hint}valid are pystdlib, text:PATH, hf:NAME[:CONFIG[:COLUMN]] "
                      "and task:NAME")


def wrong(spec: str, reason: str) -> ValueError:
    """The one-line error about the setting `data`."""
    return ValueError(f"data = {spec!r} is not valid: {reason}")


def held_out(key: bytes) -> bool:
    """Whether the document with this path or text is validation: 1 in HOLD_OUT, by hash."""
    return int(hashlib.sha256(key).hexdigest()[:8], 16) % HOLD_OUT == 0


SKIPPED_FOLDERS = {"test", "tests", "idlelib", "tkinter", "lib2to3", "distutils", "ensurepip",
                   "turtledemo", "site-packages", "dist-packages"}


def is_library_text(path: Path) -> bool:
    """Whether `path`, relative to the library, is code or prose worth reading.

    Tests, tables of character encodings and other generated files are not.
    """
    if SKIPPED_FOLDERS & set(path.parts[:-1]) or path.name.startswith("_sysconfigdata"):
        return False
    if path.parts[0] == "encodings":
        return path.name in ("__init__.py", "aliases.py")
    return path.as_posix() != "pydoc_data/topics.py"


def library_files(root: Path) -> Iterator[tuple[str, str]]:
    """(POSIX path, text) of each file of the Python library under `root`, sorted by path.

    Short files, duplicates and files that are not UTF-8 are left out.
    """
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    seen = set()
    for path in filter(lambda p: is_library_text(Path(p)), paths):
        raw = (root / path).read_bytes().replace(b"\r\n", b"\n")
        digest = hashlib.sha256(raw).digest()
        if len(raw) < 256 or digest in seen:
            continue
        seen.add(digest)
        try:
            yield path, raw.decode()
        except UnicodeDecodeError:
            continue


def open_pystdlib() -> Corpus:
    """Python's library, split by path, so that a file is on the same side in every version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, valid, content = [], [], hashlib.sha256()
    for path, text in library_files(root):
        (valid if held_out(path.encode()) else train).append(text)
        content.update(f"{path}\0{text}\0".encode())
    if not train or not valid:
        raise wrong("pystdlib", f"{root} holds no Python library; use text:PATH")
    return Corpus("pystdlib", train, valid, content.hexdigest())


def open_examples(spec: str, name: str) -> Corpus:
    """Problems of a task in plain text, some worked out and some with the answer only."""
    task = open_task(name)
    sides, content = {}, hashlib.sha256()
    for split, count in (("train", EXAMPLES), ("held-out", EXAMPLES // 20)):
        rng = random.Random(f"{spec} {split}")
        sides[split] = [plain_text(p.question, p.thought if rng.random() < task.worked else None,
                                   p.answer) for p in task.some(count, split, seed=0)]
        content.update("\n".join(sides[split]).encode())
    return Corpus(spec, sides["train"], sides["held-out"], content.hexdigest())


@dataclass(frozen=True)
class Documents:
    """The documents of local files, read anew at each iteration.

    paths: the files
    valid: which side of the split to read; both if None
    """

    paths: list[Path]
    valid: bool | None = None

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            for text in read_documents(path):
                if text.strip() and self.valid in (None, held_out(text.encode())):
                    yield text


def open_text(spec: str, path: str) -> Corpus:
    """The text of a file, a folder or a glob; validation is 1 document in 20, by hash.

    Where that leaves one side without a document, as it does with a single one, the last 5 % of
    the text are validation.
    """
    paths = find_files(spec, path)
    checked = {p: check_file(p) for p in paths}
    bad = {p: reason for p, (_, reason) in checked.items() if reason}
    good = [p for p in paths if p not in bad]
    if not good:
        raise wrong(spec, f"{paths[0]} {bad[paths[0]]}; give a file of UTF-8 text")
    train, valid = Documents(good, valid=False), Documents(good, valid=True)
    if not any(True for _ in train) or not any(True for _ in valid):
        train, valid = split_tail(list(Documents(good)))
    if not train or not valid:
        raise wrong(spec, "the text is too short to hold out a part for validation")
    content = hashlib.sha256("".join(p.suffix + checked[p][0] for p in good).encode())
    first = next(iter(bad), None)
    note = f"left out {len(bad)} of {len(paths)} files ({first} {bad[first]})" if bad else ""
    return Corpus(spec, train, valid, content.hexdigest(), note)


def find_files(spec: str, path: str) -> list[Path]:
    """The readable files that a path or glob names, sorted."""
    root = Path(path).expanduser()
    wanted = f"valid are {' '.join(SUFFIXES)}"
    if root.is_dir():
        found = [p for p in root.rglob("*")
                 if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        missing = f"the folder holds no text; {wanted}"
    elif root.is_file():
        found, missing = [root], f"a file {root.suffix or 'without suffix'} is not read; {wanted}"
    elif glob.has_magic(path):
        found = [Path(p) for p in glob.glob(str(root), recursive=True)]
        missing = f"the pattern matches no text; {wanted}"
    else:
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise wrong(spec, f"there is no file or folder {root}; {nearest(root.name, siblings)}"
                          "give an existing file, folder or pattern")
    paths = sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())
    if not paths:
        raise wrong(spec, missing)
    return paths


def check_file(path: Path) -> tuple[str, str]:
    """(hash of the content, why it cannot be read as text: empty if it can)."""
    digest, blank = hashlib.sha256(), True
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_text = path.suffix != ".parquet"
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            blank = blank and not chunk.strip()
            try:
                if is_text and "\0" in decoder.decode(chunk):
                    return "", "is binary"
            except UnicodeDecodeError:
                return "", "is binary or not UTF-8"
    if is_text and decoder.getstate()[0]:
        return "", "is cut short in the middle of a character"
    return digest.hexdigest(), "is empty" if blank else ""


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file: itself, or the text of each of its rows."""
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
    return readers.get(path.suffix, read_plain)(path)


def read_plain(path: Path) -> Iterator[str]:
    """The whole file as one document, its line ends as line feeds."""
    yield path.read_text(encoding="utf-8-sig")


def read_jsonl(path: Path) -> Iterator[str]:
    """The text column of a file with one JSON object a line."""
    column = None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} must be a JSON object")
            column = column or text_column({k: isinstance(v, str) for k, v in row.items()}, path)
            if column not in row:
                raise ValueError(f"{path} line {number} has no {column!r}, only {list(row)}")
            yield str(row[column] or "")


def read_parquet(path: Path) -> Iterator[str]:
    """The text column of a parquet file, a few rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is damaged or not a parquet file") from None
    with file:
        is_text = {f.name: pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
                   for f in file.schema_arrow}
        column = text_column(is_text, path)
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def text_column(is_text: dict[str, bool], where: Path | str, asked: str = "") -> str:
    """The column to read: the one asked for, `text`, `content`, or the only one with strings.

    is_text: for each column, whether it holds strings
    """
    strings = [name for name, holds in is_text.items() if holds]
    wanted = [asked] if asked else ["text", "content", *(strings if len(strings) == 1 else [])]
    for name in wanted:
        if name in strings:
            return name
    listed = ", ".join(name if is_text[name] else f"{name} (not text)" for name in is_text)
    need = f"column {asked!r}" if asked else "column text or content, nor a single one of strings"
    raise ValueError(f"{where} has no {need}: {nearest(asked, strings)}its columns are {listed}")


def split_tail(documents: list[str]) -> tuple[list[str], list[str]]:
    """(the first 95 %, the last 5 %) of the characters, cut after a line where one ends nearby."""
    left = int(sum(map(len, documents)) * (1 - 1 / HOLD_OUT))
    train, valid = [], []
    for text in documents:
        stop = len(text)
        if left < stop:
            stop = text.rfind("\n", left * 9 // 10, left) + 1 or left
        left = max(0, left - len(text))
        train.append(text[:stop])
        valid.append(text[stop:])
    return [t for t in train if t.strip()], [t for t in valid if t.strip()]


class HubDocuments:
    """Documents of a streamed data set, from the start or from where a state was taken."""

    def __init__(self, dataset, column: str):
        self.dataset, self.column = dataset, column
        self.running = []
        # A stream that is still open when Python takes its modules down complains on stderr.
        weakref.finalize(self, close_all, self.running)

    def __iter__(self) -> Iterator[str]:
        return self.read_from(None)

    def read_from(self, state: dict | None) -> Iterator[str]:
        """Iterate from the document after those read when `state` was taken."""
        self.dataset.load_state_dict(state)
        rows = iter(self.dataset)
        self.running[:] = [rows]
        for row in rows:
            yield row[self.column] or ""

    def state_dict(self) -> dict:
        """The place of the running iteration: as many documents on as it has yielded."""
        return self.dataset.state_dict()


def close_all(iterators: list) -> None:
    """Close generators, so that they let go of their files."""
    for iterator in iterators:
        iterator.close()


def open_hub(spec: str, rest: str) -> Corpus:
    """A data set of the hub; validation is its own split, else its first documents.

    Only the first HUB_VALID_DOCUMENTS of validation are read.
    """
    path, config, column = (*rest.split(":", 2), "", "")[:3]
    name, _, revision = path.partition("@")
    check_hub(spec)
    import datasets
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
        splits = builder.as_streaming_dataset()
    except (ValueError, OSError) as error:
        raise wrong(spec, hub_reason(error, name, config)) from None
    if "train" not in splits:
        raise wrong(spec, f"the data set has no split train, only {', '.join(splits)}")
    columns = {k: isinstance(v, str) for k, v in next(iter(splits["train"].take(1))).items()}
    try:
        column = text_column(columns, name, column)
    except ValueError as error:
        raise wrong(spec, f"{error}; choose with hf:NAME:CONFIG:COLUMN") from None
    train = splits["train"]
    own = next((splits[s] for s in ("validation", "test") if s in splits), None)
    if own is None:
        own, train = train, train.skip(HUB_VALID_DOCUMENTS)
    valid = HubDocuments(own.take(HUB_VALID_DOCUMENTS), column)
    fingerprint = f"{name}@{builder.hash}:{builder.config.name}:{column}"
    return Corpus(spec, HubDocuments(train, column), valid, fingerprint)


def hub_reason(error: Exception, name: str, config: str) -> str:
    """What to tell the user about an error of the `datasets` library."""
    from datasets.exceptions import DatasetNotFoundError
    text = " ".join(str(error).split())
    if isinstance(error, DatasetNotFoundError):
        return (f"{text} A data set that works is hf:roneneldan/TinyStories; a private or gated "
                "one needs `hf auth login`")
    if "BuilderConfig" in text or "Config name is missing" in text:
        hint = nearest(config, re.findall(r"'([^']+)'", text.split("Available:")[-1]))
        return f"{text}; {hint}choose with hf:{name}:CONFIG"
    return text


def check_hub(spec: str) -> None:
    """Fail at once without network: the library itself retries for most of a minute."""
    offline = os.environ.get("HF_HUB_OFFLINE", os.environ.get("HF_DATASETS_OFFLINE", ""))
    if offline.upper() in ("1", "ON", "YES", "TRUE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not reachable(endpoint, seconds=1.5):
        raise wrong(spec, f"no network: {endpoint} does not answer; use pystdlib or text:PATH, or "
                          "HF_HUB_OFFLINE=1 for a data set that was downloaded before")


def reachable(url: str, seconds: float) -> bool:
    """Whether the host of `url`, or the proxy on the way to it, takes a connection in time."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    answers = []

    def connect():
        try:
            socket.create_connection((parts.hostname, port), timeout=seconds).close()
            answers.append(True)
        except OSError:
            pass

    # A thread, because the look-up of a name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


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


def check_state(state: dict, here: dict) -> None:
    """A saved position belongs to this loader: same kind, text, sequence length and seed."""
    for name, value in here.items():
        if state.get(name) != value:
            raise ValueError(f"{name} = {value!r} does not fit the saved position, which has "
                             f"{state.get(name)!r}: resume with that, or start a new run")


def split_rows(flat: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their targets, one to the right: (B, S + 1) -> (B, S), (B, S)."""
    rows = torch.from_numpy(flat)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class PackedLoader:
    """Batches of sequences cut from one long row of tokens, each once an epoch, for ever.

    An epoch starts its cuts at a random token, goes once round the row and takes the sequences in
    a random order; both come from (seed, epoch). At most seq_len - 1 tokens are left over.

    With world = 4 and batch_size = 8 the four ranks hold the 32 rows that a single one would get
    from next_batch(32), in rank order.

    tokens: the training text
    seq_len: tokens in a sequence
    rank, world: which of how many data-parallel processes this is
    identity: further settings that a saved position must share, by name

    Raises `ValueError` if the text is shorter than one sequence and its last target.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int = 0, rank: int = 0, world: int = 1,
                 identity: dict | None = None):
        if len(tokens) < seq_len + 1:
            raise ValueError(f"seq_len = {seq_len} is longer than the text, {len(tokens)} tokens: "
                             f"it must be at most {len(tokens) - 1}, or the text longer")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.rank, self.world = rank, world
        self.identity = dict(kind="packed", seq_len=seq_len, seed=seed, **(identity or {}))
        self.position = 0  # sequences that all ranks together have taken, over all epochs
        self._epoch = -1

    @property
    def sequences_per_epoch(self) -> int:
        """How many sequences one pass over the text has."""
        return len(self.tokens) // self.seq_len

    def sequence(self, position: int) -> np.ndarray:
        """Sequence number `position` since the start of training: (S + 1,)."""
        epoch, i = divmod(position, self.sequences_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._offset = epoch, int(rng.integers(len(self.tokens)))
            self._order = rng.permutation(self.sequences_per_epoch)
        start = (self._offset + int(self._order[i]) * self.seq_len) % len(self.tokens)
        return self.tokens.read(start, self.seq_len + 1)

    def next_batch(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens and targets of this rank, (batch_size, S) int64 each."""
        start = self.position + self.rank * batch_size
        rows = [self.sequence(start + i) for i in range(batch_size)]
        self.position += self.world * batch_size
        return split_rows(np.stack(rows))

    def state_dict(self) -> dict:
        """The position, as numbers and strings for JSON."""
        return {**self.identity, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken, with any number of ranks."""
        check_state(state, self.identity)
        self.position = state["position"]


class StreamLoader:
    """Batches from documents that arrive one after the other: tokenise, pack, keep the rest.

    Documents are shuffled in blocks of SHUFFLE_BLOCK. A block, unlike the rolling buffer of the
    `datasets` library, whose content is lost at a restart, can be read again from its start, so
    that the position is exact: the stream's state at the block, the documents taken from it, and
    the tokens left over. At the end of the stream the next epoch begins.

    documents: has `read_from(state)` and `state_dict()`, as HubDocuments
    workers: threads that tokenise
    The other arguments are those of PackedLoader and `open_data`.
    """

    def __init__(self, documents, tokenizer, seq_len: int, seed: int = 0, fim_rate: float = 0.0,
                 rank: int = 0, world: int = 1, workers: int = 1,
                 identity: dict | None = None):
        self.documents, self.seq_len, self.seed = documents, seq_len, seed
        self.encode = partial(encode_documents, tokenizer=tokenizer, fim_rate=fim_rate, seed=seed,
                              workers=workers)
        self.rank, self.world = rank, world
        self.identity = dict(kind="stream", seq_len=seq_len, seed=seed, **(identity or {}))
        self.rows = documents.read_from(None)
        self.block, self.block_state, self.seen, self.taken = [], None, 0, 0
        self.leftover = np.empty(0, np.int64)

    def _read_block(self, stream_state: dict | None, seen: int) -> None:
        """Read and shuffle the next block, which starts at `stream_state` after `seen` documents.

        Its order depends on the seed and `seen` alone.
        """
        block = list(islice(self.rows, SHUFFLE_BLOCK))
        order = np.random.default_rng([self.seed, seen]).permutation(len(block))
        self.block, self.taken = [block[i] for i in order], 0
        self.block_state, self.seen = stream_state, seen

    def _open(self, stream_state: dict | None, seen: int) -> None:
        """Read the block that starts at `stream_state`; None is the front of the stream."""
        self.rows = self.documents.read_from(stream_state)
        self._read_block(stream_state, seen)

    def _advance(self) -> None:
        """Leave a finished block for the next; at the end of the stream for its front."""
        seen = self.seen + len(self.block)
        self._read_block(self.documents.state_dict() if self.block else None, seen)
        if not self.block:
            self._open(None, seen)
        if not self.block:
            raise ValueError("data has no document left to train on: a small data set is better "
                             "downloaded and read with text:PATH")

    def _encode_some(self) -> np.ndarray:
        """The tokens of the next few documents."""
        if self.taken == len(self.block):
            self._advance()
        texts = self.block[self.taken:self.taken + STREAM_DOCUMENTS]
        tokens = self.encode(texts, first=self.seen + self.taken)
        self.taken += len(texts)
        return tokens

    def next_batch(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens and targets of this rank, (batch_size, S) int64 each."""
        count = batch_size * self.world * self.seq_len
        parts = [self.leftover]
        while sum(map(len, parts)) < count + 1:
            parts.append(self._encode_some())
        row = np.concatenate(parts)
        starts = np.arange(self.rank * batch_size, (self.rank + 1) * batch_size) * self.seq_len
        self.leftover = row[count:]  # begins with the last target, which is the next input
        return split_rows(row[starts[:, None] + np.arange(self.seq_len + 1)])

    def state_dict(self) -> dict:
        """The position, as numbers, strings, lists and dicts for JSON."""
        return {**self.identity, "stream": self.block_state, "seen": self.seen,
                "taken": self.taken, "leftover": self.leftover.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken, with any number of ranks."""
        check_state(state, self.identity)
        self._open(state["stream"], state["seen"])
        self.taken = state["taken"]
        self.leftover = np.asarray(state["leftover"], np.int64)


@dataclass(frozen=True)
class Data:
    """What a training run reads.

    name: the corpus as the user named it
    loader: gives the training batches; PackedLoader, or StreamLoader for a data set of the hub
    valid: (N,) int64, the validation tokens, always the same and never cut for fill-in-the-middle
    fingerprint: hash of the text; name and revision for a data set of the hub
    n_train_tokens: tokens of one epoch, None for a stream
    note: which files were left out
    """

    name: str
    loader: PackedLoader | StreamLoader
    valid: torch.Tensor
    fingerprint: str
    n_train_tokens: int | None
    note: str = ""

    def describe(self) -> str:
        """One line for the terminal."""
        train = f"{self.n_train_tokens:,}" if self.n_train_tokens else "a stream of"
        text = (f"{self.name}: {train} training tokens, {len(self.valid):,} validation tokens, "
                f"content {short(self.fingerprint)}")
        return f"{text}; {self.note}" if self.note else text


def short(fingerprint: str) -> str:
    """A hash cut to twelve digits, wherever it stands in a fingerprint."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", fingerprint)


def open_data(spec: str, tokenizer, seq_len: int, seed: int = 0, fim_rate: float = 0.0,
              cache: Path = CACHE, workers: int = 0, rank: int = 0, world: int = 1) -> Data:
    """Open a corpus, tokenise it unless the cache has it, and give a loader and validation text.

    spec: see `open_corpus`
    tokenizer: encodes, names its special ids and has a `fingerprint`
    seq_len: tokens in a sequence
    seed: decides the order and the cuts of fill-in-the-middle
    fim_rate: share of the training documents cut for fill-in-the-middle, 0 to 1; V3: 0.1
    workers: threads that tokenise; 0 is one for each core
    rank, world: which of how many data-parallel processes this is

    Raises `ValueError` naming the setting, its value and what is valid.
    """
    if not 0 <= fim_rate <= 1:
        raise ValueError(f"fim_rate = {fim_rate!r} is not valid: it must be between 0 and 1")
    if fim_rate and None in (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id):
        raise ValueError(f"fim_rate = {fim_rate!r} is not valid: it must be 0, since the tokenizer "
                         "has no tokens for fill-in-the-middle")
    if seq_len < 1:
        raise ValueError(f"seq_len = {seq_len!r} is not valid: it must be at least 1")
    workers = workers or os.cpu_count() or 1
    corpus = open_corpus(spec)
    tokens = cached_tokens(corpus, tokenizer, Path(cache), fim_rate, seed, workers)
    identity = dict(data=corpus.fingerprint, tokenizer=tokenizer.fingerprint, fim_rate=fim_rate)
    place = dict(seed=seed, rank=rank, world=world, identity=identity)
    if corpus.streams:
        loader = StreamLoader(corpus.train, tokenizer, seq_len, fim_rate=fim_rate,
                              workers=workers, **place)
    else:
        loader = PackedLoader(tokens["train"], seq_len, **place)
    valid = tokens["valid"].read(0, min(len(tokens["valid"]), MAX_VALID_TOKENS))
    size = None if corpus.streams else len(tokens["train"])
    return Data(corpus.name, loader, torch.from_numpy(valid), corpus.fingerprint, size,
                corpus.note)
