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

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minids.base.fields import nearest
from minids.text.documents import check_file, find_files, read_documents
from minids.text.hub import HubDocuments, open_hub
from minids.text.splits import held_out
from minids.text.tasks import open_task, plain_text

HOLD_OUT = 20      # one document in this many is validation
EXAMPLES = 60_000  # training documents of a task


@dataclass(frozen=True)
class Corpus:
    """A named body of text, split into training and validation.

    name: the word the user gave
    train, valid: the documents, iterable any number of times
    fingerprint: hash of the content; for the hub, name and revision of the data set
    note: which files were left out, in words; empty if none
    """

    name: str
    train: Iterable[str]
    valid: Iterable[str]
    fingerprint: str
    note: str = ""

    @property
    def streams(self) -> bool:
        """Return whether the training text is streamed: it is too large to tokenise first."""
        return isinstance(self.train, HubDocuments)


def open_corpus(spec: str) -> Corpus:
    """Return the corpus that `spec` names.

    spec: pystdlib, text:PATH, task:NAME or hf:NAME[@REVISION][:CONFIG[:COLUMN]]

    Raises `ValueError` naming the setting `data`, its value and what is valid.
    """
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


SKIPPED_FOLDERS = {"test", "tests", "idlelib", "tkinter", "lib2to3", "distutils", "ensurepip",
                   "turtledemo", "site-packages", "dist-packages"}


def library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield POSIX path and text of each file of the Python library under `root`, sorted by path.

    Skipped are tests, generated tables, files under 256 bytes, duplicates, and what is not UTF-8.
    """
    seen = set()
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        *folders, name = path.split("/")
        if (SKIPPED_FOLDERS & set(folders) or name.startswith("_sysconfigdata")
                or path == "pydoc_data/topics.py"
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
        (valid if held_out(path.encode(), HOLD_OUT) else train).append(text)
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
    """The documents of local files, read anew at each iteration.

    paths: the files
    valid: which side of the split to read; None reads both
    """

    paths: list[Path]
    valid: bool | None = None

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            for text in read_documents(path):
                if text.strip() and self.valid in (None, held_out(text.encode(), HOLD_OUT)):
                    yield text


def open_text(spec: str, path: str) -> Corpus:
    """Return the text of a file, a folder or a glob pattern, split by the hash of each document.

    If that leaves one side empty, as with a single document, the last 5 % of the text are
    validation.
    """
    paths = find_files(path)
    checked = {p: check_file(p) for p in paths}
    bad = {p: reason for p, (_, reason) in checked.items() if reason}
    good = [p for p in paths if p not in bad]
    if not good:
        raise ValueError(f"{paths[0]} {bad[paths[0]]}; give a file of UTF-8 text")
    train, valid = Documents(good, valid=False), Documents(good, valid=True)
    if not any(True for _ in train) or not any(True for _ in valid):
        train, valid = split_tail(list(Documents(good)))
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
