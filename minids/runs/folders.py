"""Find and lock the folder of a run, so that no other process works in it.

The system releases the lock of a process that is killed, so none is ever stuck.
"""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from filelock import Timeout

from minids.base.fields import demand
from minids.base.files import holding, new_folder

LOCK = ".lock"


def free_folders(wanted: Path) -> Iterator[Path]:
    """Yield those of NAME, NAME-2, NAME-3, .. that are free: absent, or holding only a lock."""
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if not folder.exists() or [path.name for path in folder.glob("*")] == [LOCK]:
            yield folder


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[Path]:
    """Hold the lock of the first of these folders in which no other process works; yield it.

    A folder that was made for the lock and holds nothing else is removed at the end.
    Raises `ValueError` if other processes work in all of them, or one cannot be written.
    """
    with contextlib.ExitStack() as held:
        for folder in folders:
            try:
                held.enter_context(new_folder(folder))
                held.enter_context(holding(folder / LOCK, timeout=0))
                break
            except Timeout:
                continue
            except OSError as error:
                demand("out", str(folder), False, f"a path that can be written; {error.strerror}")
        else:
            raise ValueError(f"out = {str(folder)!r} is not valid: another process works in that "
                             "folder; wait for its end, or name another one")
        yield folder
