"""Choose how many CPU threads a run computes on, also while other programs use the machine.

Every product of a step ends with its slowest thread. On an idle machine, one thread per core is
fastest. If another program holds some of the cores, a few threads wait for a core, and all others
wait for them. A run without --threads measures how long its threads wait, and if that is long, it
tries fewer threads on its next steps.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

BUSY, QUIET = 0.25, 0.08  # shares of a step's CPU time in which threads had no core
STEPS = 8  # steps from one look at the machine to the next, and
TRIAL = 3  # steps of each number that is tried, of which the median counts
REST = 12  # looks until numbers are tried again


def quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores a container may use, rounded up; 0 where nothing limits it.

    torch counts the machine's cores, of which a container often has few.
    """
    for name, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        if (root / name).exists():
            words = (root / name).read_text("utf-8").split()
            words += (root / period).read_text("utf-8").split() if period else []
            if words[0].isdigit():  # not "max" or -1
                return -(-int(words[0]) // int(words[1]))
    return 0


def waited(tasks: Path = Path("/proc/self/task")) -> tuple[int, int]:
    """Return nanoseconds in which this process's threads ran, and in which they had no core.

    Linux counts them; elsewhere both are 0.
    """
    found = [0, 0]
    for path in tasks.glob("*/schedstat"):
        try:
            ran, waits, _ = map(int, path.read_text("utf-8").split())
        except (OSError, ValueError):  # a thread that has ended, or a kernel without these numbers
            continue
        found[0] += ran
        found[1] += waits
    return found[0], found[1]


class Threads:
    """Watches the steps of one run, and sets torch's number of threads.

    fixed: leave the number as it is; say: prints a line
    """

    def __init__(self, fixed: bool, say: Callable[[str], object] = print):
        self.most = torch.get_num_threads()
        self.say, self.watching = say, not fixed and self.most > 1
        ladder = {self.most, self.most * 3 // 4, self.most // 2, self.most // 4, 1} - {0}
        self.ladder = sorted(ladder, reverse=True)
        self.times: dict[int, list[float]] = {}  # seconds of the steps of a trial, by number
        self.steps, self.rest, self.seen = 0, 0, waited()
        self.busy, self.told = 0.0, 0  # the share before the last trial, and its number

    def took(self, seconds: float) -> None:
        """Take note of a step; seconds: of it, or of one of its tokens where steps differ."""
        if not self.watching:
            return
        if self.times:
            return self.try_next(seconds)
        self.steps += 1
        if self.steps % STEPS:
            return
        share, self.rest = self.share(), self.rest - 1
        if share > BUSY and self.rest <= 0:
            self.busy = share
            self.begin(self.most)
        elif share < QUIET and torch.get_num_threads() < self.most:
            self.say(f"the machine is quiet again: going on with {self.most} threads")
            self.told = self.most
            torch.set_num_threads(self.most)

    def end(self) -> None:
        """Put the number back, for what comes after the run in this process."""
        if self.watching:
            torch.set_num_threads(self.most)

    def share(self) -> float:
        """Return the share of waiting since the last call."""
        (ran, waits), before = waited(), self.seen
        self.seen = ran, waits
        ran, waits = ran - before[0], waits - before[1]
        return waits / (ran + waits) if ran + waits > 0 else 0.0

    def begin(self, number: int) -> None:
        """Compute on this number of threads, to see what it takes."""
        torch.set_num_threads(number)
        self.times[number] = []

    def try_next(self, seconds: float) -> None:
        """Go on with a trial: down the ladder while that makes steps shorter."""
        tried = list(self.times)
        self.times[tried[-1]].append(seconds)
        if len(self.times[tried[-1]]) < TRIAL:
            return
        taken = {number: statistics.median(times) for number, times in self.times.items()}
        last = self.ladder[-1] == tried[-1]
        if not last and (len(tried) == 1 or taken[tried[-1]] < taken[tried[-2]]):
            return self.begin(self.ladder[len(tried)])
        best = min(taken, key=taken.get)
        torch.set_num_threads(best)
        if best != self.told:
            times = ", ".join(f"{taken[number] / taken[best]:.2f} with {number}"
                              for number in taken)
            self.say(f"the machine is busy: {self.busy:.0%} of the time this run's threads have "
                     f"no core; going on with {best} of {self.most} (time of a step, relative: "
                     f"{times}; --threads fixes the number)")
        self.told, self.times, self.rest = best, {}, REST
        self.share()
