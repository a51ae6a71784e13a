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


class Starvation:
    """Measures the share of CPU time in which this process's threads had no core."""

    def __init__(self):
        self.seen = waited()

    def share(self) -> float:
        """Return it since the last call; 0 if nothing ran."""
        (ran, waits), before = waited(), self.seen
        self.seen = ran, waits
        ran, waits = ran - before[0], waits - before[1]
        return waits / (ran + waits) if ran + waits > 0 else 0.0


class Threads:
    """Watches the steps of one run, and sets torch's number of threads.

    A trial takes steps on fewer and fewer threads, for as long as fewer make them shorter.

    fixed: leave the number as it is; say: prints a line
    """

    def __init__(self, fixed: bool, say: Callable[[str], object] = print):
        self.most = torch.get_num_threads()
        self.say, self.watching = say, not fixed and self.most > 1
        self.times: dict[int, list[float]] = {}  # of a trial: seconds of its steps, by the number
        self.left: list[int] = []  # numbers that it has not tried yet
        self.steps, self.rest, self.starvation, self.share = 0, 0, Starvation(), 0.0
        self.told = 0  # the number that the last line named

    def took(self, seconds: float) -> None:
        """Take note of a step; seconds: of it, or of one of its tokens where steps differ."""
        if not self.watching:
            return
        if self.times:
            return self.tried(seconds)
        self.steps += 1
        if self.steps % STEPS:
            return
        self.share, self.rest = self.starvation.share(), self.rest - 1
        if self.share > BUSY and self.rest <= 0:
            most = self.most
            self.left = sorted({most, most * 3 // 4, most // 2, most // 4, 1} - {0})
            self.try_fewer()
        elif self.share < QUIET and torch.get_num_threads() < self.most:
            self.say(f"the machine is quiet again: going on with {self.most} threads")
            self.told = self.most
            torch.set_num_threads(self.most)

    def end(self) -> None:
        """Put the number back, for what comes after the run in this process."""
        if self.watching:
            torch.set_num_threads(self.most)

    def try_fewer(self) -> None:
        """Compute on the largest number that was not tried yet."""
        number = self.left.pop()
        torch.set_num_threads(number)
        self.times[number] = []

    def tried(self, seconds: float) -> None:
        """Take note of a step of a trial; after the last one, go on with the fastest number, and
        say so if it is another one."""
        newest = [*self.times.values()][-1]
        newest.append(seconds)
        if len(newest) < TRIAL:
            return
        taken = {number: statistics.median(times) for number, times in self.times.items()}
        medians = [*taken.values()]
        if self.left and (len(medians) == 1 or medians[-1] < medians[-2]):
            return self.try_fewer()
        best = min(taken, key=taken.get)
        torch.set_num_threads(best)
        if best != self.told:
            times = ", ".join(f"{taken[number] / taken[best]:.2f} with {number}"
                              for number in taken)
            self.say(f"the machine is busy: {self.share:.0%} of the time this run's threads have "
                     f"no core; going on with {best} of {self.most} (time of a step, relative: "
                     f"{times}; --threads fixes the number)")
        self.told, self.times, self.rest = best, {}, REST
        self.starvation.share()
