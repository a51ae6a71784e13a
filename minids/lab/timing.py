"""Time and memory: two sides measured in pairs, several works in turn, the peak memory of one."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

RATIOS = ["ratio", "min", "max"]  # column titles of the last three of `Timing.cells`


def seconds(work: Callable[[], object], device: str, times: int = 1) -> float:
    """Return the mean time in seconds of `times` calls of `work`, the device's work included."""
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    settle()
    start = time.perf_counter()
    for _ in range(times):
        work()
    settle()
    return (time.perf_counter() - start) / times


class Timing(NamedTuple):
    """Seconds that each side took, one entry per pair."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """Our speed as a multiple of theirs, pair by pair."""
        return [b / a for a, b in zip(self.ours, self.theirs, strict=True)]

    def cells(self, tokens: int) -> list[str]:
        """Return table cells: tokens per second of both, then median, min and max ratio.

        tokens: how many tokens one timing processes
        """
        speeds = [tokens / statistics.median(side) for side in self]
        ratios = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        return [f"{speed:,.0f}" for speed in speeds] + [f"{ratio:.2f}" for ratio in ratios]


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], pairs: int,
            device: str) -> Timing:
    """Time two works in turn, A B then B A, `pairs` times each."""
    timing = Timing([], [])
    for pair in range(pairs):
        sides = [(ours, timing.ours), (theirs, timing.theirs)]
        for work, times in sides if pair % 2 == 0 else reversed(sides):
            times.append(seconds(work, device))
    return timing


def round_robin(works: list[Callable[[], object]], rounds: int, times: int,
                device: str) -> list[float]:
    """Return the median seconds per call of each work over `rounds` timings of `times` calls."""
    taken = [[seconds(work, device, times) for work in works] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


class Memory(NamedTuple):
    """Bytes in use before some work, and the most during it."""

    before: int
    peak: int


def process_memory(field: str) -> int:
    """Return a field of this process's status in bytes: VmRSS, in use now; VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def watch_memory(work: Callable[[], object], device: str) -> Memory:
    """Run `work` and return its memory: the GPU's, or on a CPU the process's (Linux only)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return Memory(before, torch.cuda.max_memory_allocated())
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # or memory freed by building the model would be reused
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = process_memory("VmRSS")
    work()
    return Memory(before, process_memory("VmHWM"))
