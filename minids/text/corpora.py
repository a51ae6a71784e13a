"""Open the corpus that a word names, split into training and validation text.

    pystdlib                             Python's own library, read where it is installed
    text:PATH                            your files: a file, a folder or a glob pattern
    task:NAME                            worked examples of a task (`minids.text.tasks`)
    hf:NAME[@REVISION][:CONFIG[:COLUMN]] a data set of the Hugging Face hub, streamed

    corpus = open_corpus("pystdlib")
    for text in corpus.train: ...

A hash of its path or text decides whether a document is validation, so that it stays on the same
side when other documents come or go.
"""

import codecs
import glob
import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minids.base.fields import nearest
from minids.base.files import read_jsonl
from minids.text.hub import open_hub, text_column
from minids.text.tasks import held_out, open_task, plain_text

HOLD_OUT = 20      # one document in this many is validation
EXAMPLES = 60_000  # training documents of a task
UNPACKED = 100       # times its size that a compressed file may unpack to
BATCH_BYTES = 2**24  # of a row group that are unpacked at a time
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "tkinter", "lib2to3", "distutils", "ensurepip",
                   "turtledemo", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Corpus:
    """A named body of text, split into training and validation.

    name: the word the user gave; train, valid: the documents, iterable any number of times
    fingerprint: hash of the content; for the hub, name and revision of the data set
    note: which files were left out, in words; empty if none
    """

    name: str
    train: Iterable[str]
    valid: Iterable[str]
    fingerprint: str
    note: str = ""


def open_corpus(spec: str) -> Corpus:
    """Return the corpus that `spec` names (see above); raises `ValueError` for any other."""
    kind, _, rest = spec.partition(":")
    try:
        if spec == "pystdlib":
            return open_pystdlib()
        if kind == "hf" and rest:
            return Corpus(spec, *open_hub(rest))
        if kind in ("text", "task") and rest:
            return (open_text if kind == "text" else open_examples)(spec, rest)
        hint = nearest(kind, ["pystdlib", "text:PATH", "hf:NAME", "task:NAME"])
        if Path(spec).expanduser().exists():
            hint = f"did you mean 'text:{spec}'? "
        raise ValueError(f"{hint}valid are pystdlib, text:PATH, hf:NAME[:CONFIG[:COLUMN]] and "
                         "task:NAME")
    except ValueError as error:
        raise ValueError(f"data = {spec!r} is not valid: {error}") from None


def library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield POSIX path and text of each file of the Python library under `root`, sorted by path.

    Skipped are tests, generated tables, files under 256 bytes, duplicates, and what is not UTF-8.
    """
    seen, found = set(), []
    for folder, inner, names in os.walk(root):
        inner[:] = set(inner) - SKIPPED_FOLDERS  # not entered: there may be many packages
        found += [Path(folder, n).relative_to(root).as_posix() for n in names if n.endswith(".py")]
    for path in sorted(found):
        *folders, name = path.split("/")
        if (name.startswith("_sysconfigdata") or path == "pydoc_data/topics.py"
                or folders[:1] == ["encodings"] and name not in ("__init__.py", "aliases.py")):
            continue
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
    """Return Python's library, split by path: a file is on the same side in every version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, valid, content = [], [], hashlib.sha256()
    for path, text in library_files(root):
        (valid if held_out(path, HOLD_OUT) else train).append(text)
        content.update(f"{path}\0{text}\0".encode())
    if not train or not valid:
        raise ValueError(f"{root} holds no Python library; use text:PATH")
    return Corpus("pystdlib", train, valid, content.hexdigest())


def open_examples(spec: str, name: str) -> Corpus:
    """Return problems of a task as plain text, some worked out, some with the answer only."""
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
    """The documents of one side of local files, read anew at each iteration."""

    paths: list[Path]
    valid: bool

    def __iter__(self) -> Iterator[str]:
        readers = {".jsonl": read_rows, ".parquet": read_parquet}
        for path in self.paths:
            for text in readers.get(path.suffix, read_plain)(path):
                if text.strip() and held_out(text, HOLD_OUT) == self.valid:
                    yield text


def open_text(spec: str, path: str) -> Corpus:
    """Return the text of a file, a folder or a glob pattern, split by the hash of each document.

    If that leaves a side empty, as with a single document, the last 5 % of the text validate.
    """
    paths = find_files(path)
    checked = {p: check_file(p) for p in paths}
    bad = {p: reason for p, (_, reason) in checked.items() if reason}
    good = [p for p in paths if p not in bad]
    if not good:
        raise ValueError(f"{paths[0]} {bad[paths[0]]}; give a file of UTF-8 text")
    train, valid = Documents(good, valid=False), Documents(good, valid=True)
    if not any(True for _ in train) or not any(True for _ in valid):
        train, valid = split_tail([*train, *valid])
    if not train or not valid:
        raise ValueError("the text is too short to hold out a part for validation")
    content = hashlib.sha256("".join(p.suffix + checked[p][0] for p in good).encode())
    first = next(iter(bad), None)
    note = f"left out {len(bad)} of {len(paths)} files ({first} {bad[first]})" if bad else ""
    return Corpus(spec, train, valid, content.hexdigest(), note)


def split_tail(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return the first 95 % and the last 5 % of the characters, cut after a line if one is near."""
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


def find_files(path: str) -> list[Path]:
    """Return the readable files of a file, folder (without hidden ones) or glob pattern, sorted."""
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*")
                 if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        missing = "the folder holds no text"
    elif root.is_file():
        found, missing = [root], f"a file {root.suffix or 'without suffix'} is not read"
    elif glob.has_magic(path):
        found = [Path(p) for p in glob.glob(str(root), recursive=True)]
        missing = "the pattern matches no text"
    else:
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise ValueError(f"there is no file or folder {root}; {nearest(root.name, siblings)}"
                         "give an existing file, folder or pattern")
    paths = sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{missing}; valid are {' '.join(SUFFIXES)}")
    return paths


def check_file(path: Path) -> tuple[str, str]:
    """Return the SHA-256 of a file's content, and why it is not readable text ("" if it is)."""
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


def read_plain(path: Path) -> Iterator[str]:
    """Yield the whole of a plain file, its line ends as line feeds."""
    yield path.read_text(encoding="utf-8-sig")


def read_rows(path: Path) -> Iterator[str]:
    """Yield the text column of a JSONL file; the first row decides which column that is."""
    column = None
    for number, row in read_jsonl(path, skip_blank=True):
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} must be a JSON object")
        column = column or text_column({k: isinstance(v, str) for k, v in row.items()}, path)
        if column not in row:
            raise ValueError(f"{path} line {number} has no {column!r}, only {list(row)}")
        if not isinstance(text := row[column], str | None):
            raise ValueError(f"{path} line {number}: {column} = {text!r:.60} is not text")
        yield text or ""


def is_text(kind) -> bool:
    """Return whether an Arrow type holds text, as itself or as the values of a dictionary."""
    import pyarrow.types as types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def check_unpacked(path: Path, size: int) -> None:
    """Raise `ValueError` if what a file unpacks to is too large to be believed; size: bytes."""
    if size > 2**28 and size > UNPACKED * path.stat().st_size:
        raise ValueError(f"{path} unpacks to more than {UNPACKED} times its size, which no text "
                         "does: it is damaged, or repeats itself")


def read_parquet(path: Path) -> Iterator[str]:
    """Yield the text column of a Parquet file, a bounded part of a row group at a time.

    A column is kept as a dictionary, in which a repeated text takes room once; what unpacks to many
    times its file is refused (`check_unpacked`).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        column = text_column({f.name: is_text(f.type) for f in pq.read_schema(path)}, path)
        with pq.ParquetFile(path, read_dictionary=[column]) as file:
            unpacked = 0
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                size = meta.total_byte_size  # unpacked; of all columns: a damaged file may lack one
                check_unpacked(path, size)
                rows = max(1, min(1024, BATCH_BYTES * meta.num_rows // max(size, 1)))
                for batch in file.iter_batches(rows, [group], [column]):
                    for i in range(len(batch)):  # one by one: `to_pylist` would copy repeated text
                        text = batch.column(0)[i].as_py() or ""
                        unpacked += len(text)
                        check_unpacked(path, unpacked)
                        yield text
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or not a parquet file: {reason}") from None
