"""Give a thread's team of OpenMP threads up, for another thread that computes."""

import contextlib
import ctypes
import functools
import os
import threading
from pathlib import Path

FORKED = threading.local()  # `here` in the thread that a fork copied, without its team's threads
SOFT = 1  # of <omp.h>, omp_pause_soft: settings stay, and the next product makes a new team


os.register_at_fork(after_in_child=lambda: setattr(FORKED, "here", True))


@functools.cache
def gnu_openmp() -> list[ctypes.CDLL]:
    """Return GNU's OpenMP as this process has loaded it; other kinds, and systems, have none."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
        files = {line.split(maxsplit=5)[-1] for line in maps if "/libgomp" in line}
        return [lib for lib in map(ctypes.CDLL, files) if hasattr(lib, "omp_pause_resource_all")]
    return []


def end_team() -> None:
    """End the OpenMP threads with which the calling thread has computed; its next product has new
    ones, after some 0.1 ms.

    Threads of a team wait for each other spinning only while OpenMP manages at most one thread per
    core. A second thread's team, which may do nothing, sends both to sleep at every product:
    tokens of a small model then take two to three times as long, measured on two cores.
    """
    for lib in () if hasattr(FORKED, "here") else gnu_openmp():  # it would wait for them for ever
        lib.omp_pause_resource_all(SOFT)
