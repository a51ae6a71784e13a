"""Corpora: named bodies of text, split into training and validation."""

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

HOLD_OUT = 20              # one document in so many is validation
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
    openers = {"text": open_text, "hf": open_stream, "task": open_examples}
    try:
        if spec == "pystdlib":
            return open_pystdlib()
        if kind in openers and rest:
            return openers[kind](spec, rest)
    except ValueError as error:
        raise ValueError(f"data = {spec!r} is not valid: {error}") from None
    hint = nearest(kind, ["pystdlib", "text:PATH", "hf:NAME", "task:NAME"])
    if Path(spec).expanduser().exists():
        hint = f"did you mean 'text:{spec}'? "
    raise ValueError(f"data = {spec!r} is not valid: {hint}valid are pystdlib, text:PATH, "
                     "hf:NAME[:CONFIG[:COLUMN]] and task:NAME")


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
        (valid if held_out(path.encode(), HOLD_OUT) else train).append(text)
        content.update(f"{path}\0{text}\0".encode())
    if not train or not valid:
        raise ValueError(f"{root} holds no Python library; use text:PATH")
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


def open_stream(spec: str, rest: str) -> Corpus:
    """A data set of the hub, streamed."""
    return Corpus(spec, *open_hub(rest))


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
                if text.strip() and self.valid in (None, held_out(text.encode(), HOLD_OUT)):
                    yield text


def open_text(spec: str, path: str) -> Corpus:
    """The text of a file, a folder or a glob; validation is 1 document in 20, by hash.

    Where that leaves one side without a document, as it does with a single one, the last 5 % of
    the text are validation.
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
