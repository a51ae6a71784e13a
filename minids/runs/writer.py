"""Write a checkpoint while training goes on: in a thread, from copies in the host's memory.

One is under way at a time. The next one waits for it, and so does the end of training. What goes
wrong in the thread is raised where training asks, at each step.

Simplified: the copy waits for the device; memory is not pinned, and nothing overlaps with it.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from minids.runs.checkpoints import newest_checkpoint


class Writer:
    """At most one write that goes on beside training; `with` waits for it at the end."""

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def run(self, write: Callable[[], Path], beside: bool) -> Path | None:
        """Wait for the write before; then return write(), or let it go on beside what follows."""
        self.wait()
        if not beside:
            return write()
        # A daemon: a second Ctrl-C ends the program, and what was being written is left out.
        self.thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self.thread.start()
        return None

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            write()
        except BaseException as error:  # SystemExit too: another rank tells of its error
            self.error = error

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def check(self) -> None:
        """Raise what went wrong, if that is known by now."""
        error, self.error = self.error, None
        if error:
            raise error

    def wait(self) -> None:
        """Wait until nothing is being written; raise what went wrong."""
        self.join()
        self.check()

    def newest(self, run: Path) -> Path | None:
        """Return the newest whole checkpoint of a run, once nothing is being written."""
        self.join()
        return newest_checkpoint(run)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.join()
        if error is None:
            self.check()


def on_host(value):
    """Return tensors, in nested dicts, lists and tuples, as copies in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, on_host(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(on_host, value))
    return value
