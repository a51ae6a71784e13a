"""Run a learner's function where it can do no harm: in a forked copy of this process.

What this promises, whatever the function does; `tests/lab/test_checker.py` holds each line:

1. The answer comes within five seconds: endless loops, also inside one built-in, are ended. On a
   busy machine, seconds in which the function waits for a core do not count: at most twenty more.
2. Memory is bounded: more than 2 GiB on top of this process's is refused.
3. Crashes, exits with any status, and signals end the copy alone.
4. Threads and processes that it starts end with the copy.
5. Variables, seeds, files' positions and streams of this process stay as they were. What the
   function prints is shown, up to 2,000 characters.

Only Linux forks a process that uses torch safely, and only without a GPU. Elsewhere the function
runs in this process under an alarm, which ends most loops and nothing else.
"""

import contextlib
import dis
import faulthandler
import io
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import torch

from minids.runs import threads

PATIENCE = 4.0  # seconds that a check waits for a learner's function, all cases together
WAITING = 20.0  # seconds more, at most, on a machine whose cores are busy
MEMORY = 2 * 2 ** 30  # bytes that it may allocate
PRINTED = 2000  # characters of its output that are shown
LATE = f"has not finished after {PATIENCE:.0f} seconds: does one of its loops never end?"
LARGE = f"takes more than {MEMORY >> 30} GiB of memory: does something grow without end?"
GONE = "ends Python itself: does it exit, or crash?"
PEEPING = {"_getframe", "currentframe", "f_back", "f_locals", "tb_frame", "gc", "inspect"}

Tell = Callable[[str, object], None]  # (kind, a value that JSON knows)


def borrowed(function: Callable) -> str:
    """Return what of minids, settings apart, a learner's function uses or imports; "" if nothing.

    Functions that it calls are not inspected: this stops a short cut, not cheating.
    """
    own = "minids.config", "minids.lab.lesson"
    for code in codes_of(function):
        for step in dis.get_instructions(code):
            value = function.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
            made = isinstance(value, FunctionType | type) and value.__module__ or ""
            module = step.argval if step.opname == "IMPORT_NAME" else made
            module = value.__name__ if isinstance(value, ModuleType) else module
            if module.split(".")[0] == "minids" and module not in own:
                return step.argval
    return ""


def peeping(function: Callable) -> str:
    """Return by what a function looks at its caller, who knows the answer; "" if by nothing.

    This, too, stops a short cut, not cheating: the answer lies in the memory of the same process.
    """
    return next((name for code in codes_of(function)
                 for name in sorted(PEEPING.intersection(code.co_names))), "")


def codes_of(function: Callable) -> Iterator[CodeType]:
    """Yield the code of a function written in Python, and of those nested in it."""
    codes = [function.__code__] if hasattr(function, "__code__") else []
    for code in codes:  # grows during the loop
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        yield code


def forks() -> bool:
    """Return whether a copy of this process can be made: torch survives it on Linux, on the CPU."""
    return sys.platform == "linux" and not torch.cuda.is_available()


def run(work: Callable[[Tell], None]) -> tuple[list[tuple[str, object]], str]:
    """Run `work` apart; return what it told, in order, and its fate: "" if it came to its end.

    A fork can leave a lock that nobody releases, so a late copy gets a second, short chance.

    work: called with `tell`; whatever it tells survives its end
    """
    if not forks():
        return run_here(work)
    for seconds in (PATIENCE - 0.5, 0.5):
        copy = Copy(work, seconds)
        try:
            while copy.running():
                time.sleep(0.002)
        finally:
            told, fate = copy.close()
        if fate != LATE:
            break
    return told, fate


def waited(process: int) -> float:
    """Return the seconds in which a process's threads had no core, as other programs had them."""
    return threads.waited(Path(f"/proc/{process}/task"))[1] / 1e9


class Copy:
    """A forked copy of this process that runs `work(tell)` and ends.

    seconds: how long it may run; memory: bytes that it may allocate
    """

    def __init__(self, work: Callable[[Tell], None], seconds: float, memory: int = MEMORY):
        self.end = time.monotonic() + seconds
        self.told = os.memfd_create("told")  # a file without a name, which both processes see
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads may run
            self.process = os.fork()
        if self.process:
            return
        try:
            confine(seconds, memory)
            sys.stdout = sys.stderr = Printed(self.tell)
            self.process = os.getpid()
            work(self.tell)
            self.tell("end", None)
        finally:
            os._exit(0)  # whatever happened: "end" was told, or not

    def tell(self, kind: str, value) -> None:
        """Keep one value for the parent; a process that the copy starts tells nothing."""
        if os.getpid() == self.process:
            os.write(self.told, json.dumps([kind, value]).encode() + b"\n")

    def running(self) -> bool:
        """Return whether the copy has neither ended nor used up its time."""
        now = time.monotonic()
        late = now > self.end and now > self.end + min(WAITING, waited(self.process))
        return not late and not self.ended()

    def ended(self) -> bool:
        """Return whether the copy has ended; `close` still reads what it told."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close(self) -> tuple[list[tuple[str, object]], str]:
        """End the copy with all that it started; return what it told, and its fate."""
        late = not self.ended()
        for kill in (os.killpg, os.kill):  # its group, once it has one
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        with open(self.told, "rb") as file:
            file.seek(0)
            told = [tuple(json.loads(line)) for line in file if line.endswith(b"\n")]
        if told and told[-1][0] == "end":
            return told[:-1], ""
        return told, LATE if late else GONE


class Printed(io.TextIOBase):
    """A stream that passes what the function prints to the parent, up to `PRINTED` characters."""

    def __init__(self, tell: Tell):
        self.tell, self.left = tell, PRINTED

    def write(self, text: str) -> int:
        """Tell the part of a text that can still be shown."""
        if self.left > 0:
            self.tell("printed", text[:self.left] + (" ..\n" if len(text) > self.left else ""))
        self.left -= len(text)
        return len(text)


def confine(seconds: float, memory: int) -> None:
    """Give the copy a group and streams of its own, one thread, and bounds.

    The bound on its CPU time is for a copy whose parent is killed: nobody else would end it.
    """
    import resource

    def bound(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]  # a copy of a copy may not raise it
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))

    os.setpgid(0, 0)  # signals to its group stay there
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)  # OpenMP's other threads were not copied
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    bound(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + memory)
    bound(resource.RLIMIT_CPU, 60 + int(10 * seconds))


class Late(BaseException):
    """The alarm rang. Not an Exception: a function's own `except` must not catch it."""


def run_here(work: Callable[[Tell], None]) -> tuple[list[tuple[str, object]], str]:
    """Run `work` in this process, under an alarm where the system and this thread have one."""
    def ring(*_) -> None:
        raise Late

    told: list[tuple[str, object]] = []
    if not hasattr(signal, "setitimer") or threading.current_thread() != threading.main_thread():
        return work(lambda *value: told.append(value)) or (told, "")
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE, 0.1)  # again, should it be caught
        work(lambda *value: told.append(value))
        return told, ""
    except Late:
        return told, LATE
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
