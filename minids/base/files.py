"""Files that are written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path


def write_flushed(file: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def flush(path: Path) -> None:
    """Wait until the disk has what was written to a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, obj) -> None:
    """Write `obj` as JSON, whole or not at all; `OSError` naming the file when the disk refuses."""
    path = Path(path)
    temp = path.with_name(f".tmp_{path.name}")
    try:
        write_flushed(temp, (json.dumps(obj, indent=2) + "\n").encode())
        os.replace(temp, path)
        flush(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from error
    finally:
        temp.unlink(missing_ok=True)
