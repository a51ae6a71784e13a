"""Let the threads of a product wait for each other spinning, or asleep while the machine is busy.

A CPU product ends with its slowest thread; the others wait for it. Spinning makes the default run
a fifth faster on two idle cores than sleep. Beside other programs it burns the very core that the
slowest thread needs, and a run takes up to ten times as long.

GNU's OpenMP, which torch has on Linux, spins only while it manages at most one thread per core
(GOMP_SPINCOUNT in its manual). One more thread that does nothing therefore sends all others to
sleep. A watcher lets such a guest in while this process's threads find no core. The number of
threads that compute, and with it every result, stays the same. `minids.runs.threads` decides that
number.
"""

import atexit
import os
import threading

import torch

from minids.runs.threads import Starvation

EVERY = 0.5  # seconds between looks
BUSY, QUIET = 0.15, 0.04  # shares of the threads' time without a core: sleep above, spin below
CALM = 4  # looks in a row that must be quiet before threads spin again
SHARED = 2 ** 17  # numbers that torch adds up on more than one thread


class Guest:
    """A thread with a team of OpenMP's threads, which does nothing."""

    def __init__(self):
        self.leave = threading.Event()
        self.thread = threading.Thread(target=self.stay, name="guest", daemon=True)
        self.thread.start()

    def stay(self) -> None:
        """Let OpenMP make this thread a team, and keep it."""
        torch.ones(SHARED).add_(1)
        self.leave.wait()

    def end(self) -> None:
        """Give the team up."""
        self.leave.set()
        self.thread.join()


class Watcher:
    """Looks at how long this process's threads find no core, and decides how they wait."""

    def __init__(self):
        self.starvation, self.guest, self.calm = Starvation(), None, 0
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run, name="waiting", daemon=True)

    def look(self) -> None:
        """Let the threads sleep, or spin again, by what happened since the last look."""
        share = self.starvation.share()
        self.calm = self.calm + 1 if share < QUIET else 0
        if self.guest is None and share > BUSY:
            self.guest = Guest()
        elif self.guest is not None and self.calm >= CALM:
            self.guest.end()
            self.guest = None

    def run(self) -> None:
        """Look until the process ends."""
        while not self.ending.wait(EVERY):
            self.look()

    def end(self) -> None:
        """Look no more: Python aborts if it ends while a guest's thread is inside torch."""
        self.ending.set()
        self.thread.join()
        if self.guest:
            self.guest.end()


def watch_waiting() -> None:
    """Start this process's watcher, unless it has one or the environment says how to wait."""
    chosen = os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    if not chosen and all(thread.name != "waiting" for thread in threading.enumerate()):
        (watcher := Watcher()).thread.start()
        atexit.register(watcher.end)
