"""Write files and folders whole or not at all, one process at a time; read JSON and JSONL."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the disk name the file: a full one does not say which it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_flushed(file: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with naming(file):
        file.write_bytes(data)
    flush(file)


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def holding(lock: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock that the system releases if the process is killed, and remove its file after.

    timeout: seconds to wait while another process holds it, then filelock's `Timeout`; -1: for ever
    """
    held = FileLock(lock, thread_local=False)
    held.acquire(timeout)
    while not lock.exists():  # its last owner removed it in between
        held.release()
        held.acquire(timeout)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all: under a temporary name beside it, then rename.

    data: the contents; text is written as UTF-8
    Raises `OSError` naming the file if that fails; an older file stays as it was.
    """
    path = Path(path)
    temp = path.with_name(f".tmp_{path.name}")
    try:
        write_flushed(temp, data.encode() if isinstance(data, str) else data)
        os.replace(temp, path)
        flush(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from error
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: str | Path, obj) -> None:
    """Write `obj` as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(obj, indent=2) + "\n")


def read_json(path: str | Path, data: bytes | None = None) -> dict:
    """Return the object in a JSON file; data: what it holds, if it was read already.

    Raises `ValueError` naming the file if it is missing, not JSON, or holds no object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        found = json.loads(path.read_bytes() if data is None else data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object of fields")
    return found


def sealed(body: dict) -> bytes:
    """Return `body` as JSON with its SHA-256 under "seal", so that any changed byte shows."""
    seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"seal": seal}, indent=2) + "\n").encode()


def is_sealed(data: bytes, found: dict) -> bool:
    """Return whether the bytes of a file are what `sealed` made of `found`, its own seal aside."""
    return data == sealed({key: value for key, value in found.items() if key != "seal"})


def inside(path: Path) -> Path:
    """Return a file's path; raise `ValueError` if it is a link that leaves its folder.

    A link may lead to the blobs of the hub's cache, which has all files of a snapshot as links.
    """
    folder, target = path.absolute().parent, path.resolve()
    hub = [folder.parents[1].resolve() / "blobs"] if folder.parent.name == "snapshots" else []
    if not any(target.is_relative_to(own) for own in (folder.resolve(), *hub)):
        raise ValueError(f"{path} is a link to {target}, outside its folder: it is not read")
    return path


def read_sealed(path: Path, known: Callable[[str], bool]) -> dict:
    """Return what `sealed` wrote to a file; raise `ValueError` naming the file if it was changed.

    known: whether a key may be there; a file of an earlier version has such keys and no seal
    """
    found = read_json(path, data := path.read_bytes() if path.is_file() else b"")
    if ("seal" in found or not all(map(known, found))) and not is_sealed(data, found):
        raise ValueError(f"{path} was changed: it does not match its seal; put it back")
    return {key: value for key, value in found.items() if key != "seal"}


def publish(temp: Path, final: Path) -> None:
    """Rename a complete folder to its final name, replacing an older folder of that name.

    No single step does that. The older one is set aside as NAME.replaced, a name that readers know
    too, so that one of the two always exists.
    """
    aside = final.with_name(final.name + ".replaced")
    if final.exists():
        os.rename(final, aside)
    os.rename(temp, final)
    flush(final.parent)
    if aside.exists():
        discard(aside)


def discard(path: Path) -> None:
    """Remove a folder; rename it first, so that no reader finds half of one."""
    doomed = path.with_name(f".tmp_removed_{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it and those it is in at the end where they are new and empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def read_jsonl(path: Path, skip_blank: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line of a JSONL file, as they are asked for.

    Only a line feed ends a line: U+2028 and U+0085 may stand inside a string. A byte order mark
    at the start is ignored.

    Raises `ValueError` naming file and line if a line is not UTF-8, not JSON, or blank, unless
    `skip_blank` skips it.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                if skip_blank:
                    continue
                raise ValueError(f"{path} line {number} is blank")
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8: {error}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            yield number, value
