"""Time and memory: works timed in turn, the peak memory of one."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RATIOS = ["ratio", "min", "max"]  # column titles of the last three of `speed_cells`


def in_turn(works: list[Callable[[], object]], rounds: int, device: str,
            times: int = 1) -> list[list[float]]:
    """Time works in turn, A B then B A; return each one's seconds per call, by round.

    times: calls in one timing, which includes the device's work
    """
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = [[] for _ in works]
    sides = list(zip(works, taken, strict=True))
    for _ in range(rounds):
        for work, found in sides:
            settle()
            start = time.perf_counter()
            for _ in range(times):
                work()
            settle()
            found.append((time.perf_counter() - start) / times)
        sides.reverse()
    return taken


def speed_cells(taken: list[list[float]], tokens: int) -> list[str]:
    """Return table cells: tokens per second of both sides, then median, min and max ratio.

    taken: seconds of two works as `in_turn` returns them; tokens: how many one timing processes
    A ratio is the first one's speed as a multiple of the other's within a round.
    """
    ratios = [b / a for a, b in zip(*taken, strict=True)]
    speeds = [f"{tokens / statistics.median(side):,.0f}" for side in taken]
    return speeds + [f"{of(ratios):.2f}" for of in (statistics.median, min, max)]


def process_memory(field: str) -> int:
    """Return a field of this process's status in bytes: VmRSS, in use now; VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def watch_memory(work: Callable[[], object], device: str) -> tuple[int, int]:
    """Run `work`; return bytes in use before and at most: the GPU's, or (Linux) the process's."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return before, torch.cuda.max_memory_allocated()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # or memory freed by building the model would be reused
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # reset VmHWM
    before = process_memory("VmRSS")
    work()
    return before, process_memory("VmHWM")
