"""Find, check and read the documents of local files: text, Markdown, Python, JSONL and Parquet."""

import codecs
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path

from minids.base.fields import nearest
from minids.base.files import read_jsonl

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")


def find_files(path: str) -> list[Path]:
    """Return the readable files that a file, folder or glob pattern names, sorted.

    Raises `ValueError` if there are none; hidden files of a folder do not count.
    """
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


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file: the text of each row, or the whole of a plain file."""
    if path.suffix == ".jsonl":
        yield from read_rows(path)
    elif path.suffix == ".parquet":
        yield from read_parquet(path)
    else:
        yield path.read_text(encoding="utf-8-sig")  # line ends become line feeds


def read_rows(path: Path) -> Iterator[str]:
    """Yield the text column of a JSONL file; the first row decides which column that is."""
    column = None
    for number, row in read_jsonl(path, skip_blank=True):
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} must be a JSON object")
        column = column or text_column({k: isinstance(v, str) for k, v in row.items()}, path)
        if column not in row:
            raise ValueError(f"{path} line {number} has no {column!r}, only {list(row)}")
        yield str(row[column] or "")


def read_parquet(path: Path) -> Iterator[str]:
    """Yield the text column of a Parquet file, reading 1,024 rows at a time."""
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
    """Return the column to read: `asked`, `text`, `content`, or the only one that holds strings.

    is_text: for each column, whether it holds strings
    where: the file or data set, for the error

    Raises `ValueError` listing the columns if none qualifies.
    """
    strings = [name for name, holds in is_text.items() if holds]
    wanted = [asked] if asked else ["text", "content", *(strings if len(strings) == 1 else [])]
    for name in wanted:
        if name in strings:
            return name
    listed = ", ".join(name if is_text[name] else f"{name} (not text)" for name in is_text)
    need = f"column {asked!r}" if asked else "column text or content, nor a single one of strings"
    raise ValueError(f"{where} has no {need}: {nearest(asked, strings)}its columns are {listed}")
