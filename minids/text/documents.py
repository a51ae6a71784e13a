"""Documents of local files: finding, checking and reading them."""

import codecs
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path

from minids.base.fields import nearest
from minids.base.files import read_jsonl

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")


def find_files(path: str) -> list[Path]:
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
        raise ValueError(f"there is no file or folder {root}; {nearest(root.name, siblings)}"
                         "give an existing file, folder or pattern")
    paths = sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(missing)
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
    readers = {".jsonl": read_rows, ".parquet": read_parquet}
    return readers.get(path.suffix, read_plain)(path)


def read_plain(path: Path) -> Iterator[str]:
    """The whole file as one document, its line ends as line feeds."""
    yield path.read_text(encoding="utf-8-sig")


def read_rows(path: Path) -> Iterator[str]:
    """The text column of a file with one JSON object a line."""
    column = None
    for number, row in read_jsonl(path):
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
