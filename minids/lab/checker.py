"""Run a learner's function safely: time and memory limits, crashes, short cuts. Used by `lesson`.

Machinery, apart from everything else: a forked copy of the process meets endless loops inside
built-ins, unbounded memory and crashes first; then a thread that can be stopped runs the function.
"""

import contextlib
import ctypes
import dis
import faulthandler
import logging
import mmap
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import torch

PATIENCE = 4.0  # seconds that a check waits for a learner's function
MEMORY = 2 * 2 ** 30  # bytes that it may allocate
LATE = f"has not finished after {PATIENCE:.0f} seconds: does one of its loops never end?"
LARGE = f"takes more than {MEMORY >> 30} GiB of memory: does something grow without end?"
GONE = "ends Python itself: does it exit, or crash?"
PLAYED, TOO_LARGE = 77, 78  # exit statuses of the copy; with any other, the function ended it


def borrowed(function: Callable) -> str:
    """Return what of minids, settings apart, a learner's function uses or imports; "" if nothing.

    Functions that it calls are not inspected: this stops a short cut, not cheating.
    """
    own = "minids.config", "minids.lab.lesson"
    codes = [function.__code__] if hasattr(function, "__code__") else []
    for code in codes:  # grows during the loop, by nested functions
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        for step in dis.get_instructions(code):
            value = function.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
            made = isinstance(value, FunctionType | type) and value.__module__ or ""
            module = step.argval if step.opname == "IMPORT_NAME" else made
            module = value.__name__ if isinstance(value, ModuleType) else module
            if module.split(".")[0] == "minids" and module not in own:
                return step.argval
    return ""


def rehearse(check: Callable, cases: list[tuple]) -> tuple[int, str]:
    """Return how many cases a forked copy finishes, and what the next one does to it.

    Some answers cannot be stopped from within: an endless loop inside one built-in, such as
    `sum(iter(int, 1))`, unbounded memory, a crash. The copy meets them, and the notebook survives.
    Only Linux makes a copy.

    A fork can leave a lock that nobody releases. So a copy that only waits is not judged, because
    `attempt` can stop that; and a late copy gets a second, short chance.

    check: called with a case's arguments and expected result
    """
    ended, fate = 0, ""
    for seconds in (PATIENCE - 0.5, 0.5) if sys.platform == "linux" else ():
        shared = mmap.mmap(-1, len(cases) + 1)  # bytes that both processes see
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads may run
            child = os.fork()
        if child == 0:
            try:
                play(check, cases, shared)
            finally:
                os._exit(PLAYED)
        fate = watch(child, seconds)
        ended = shared[:].count(1)
        if fate != LATE:
            break
    return ended, fate


def play(check: Callable, cases: list[tuple], ended: mmap.mmap) -> None:
    """Check every case silently, inside the copy; ended: one byte per case."""
    import resource
    os.setsid()  # signals to the whole group stay here
    faulthandler.disable()
    logging.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    for stream in (sys.stdout, sys.stderr):  # a notebook's streams, if something else holds them
        with contextlib.suppress(AttributeError):
            stream.write = len
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    torch.set_num_threads(1)  # OpenMP's other threads were not copied
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    limit = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for i, (arguments, expected, _) in enumerate(cases):
        try:
            check(arguments, expected)
        except BaseException as error:  # `attempt` meets it again and reports it
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                os._exit(TOO_LARGE)
        ended[i] = 1


def watch(child: int, seconds: float) -> str:
    """Return what becomes of the copy within `seconds`; "" if it ends well or only waits."""
    start, status = time.monotonic(), None
    try:
        while (waited := time.monotonic() - start) < seconds:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            if waited > 1 and waits(child, waited):
                return ""
            time.sleep(0.002)
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if waited >= seconds:
        return LATE
    return {PLAYED: "", TOO_LARGE: LARGE}.get(status, GONE)


def waits(process: int, seconds: float) -> bool:
    """Return whether a process sleeps and has hardly computed; one short of CPU time does not."""
    state, *fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    computed = sum(map(int, fields[10:12])) / os.sysconf("SC_CLK_TCK")
    return state != "R" and computed < seconds / 50


class Unfinished(BaseException):
    """A learner's function took too long. Not an Exception: its own `except` must not catch it."""


def quiet(ended, tell=threading.excepthook) -> None:
    """Report the end of a thread as usual, unless `stop` ended it."""
    if ended.exc_type is not Unfinished:
        tell(ended)


threading.excepthook = quiet


def attempt(function: Callable, arguments: tuple, seconds: float):
    """Return or raise what the function does, in a thread; raise Unfinished after `seconds`.

    A late thread is asked to stop; one that waits for something outside Python is abandoned.
    """
    outcome = {}

    def work() -> None:
        try:
            outcome["answer"] = function(*arguments)
        except BaseException as error:  # another Unfinished may arrive meanwhile: see `quiet`
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.01))
    if thread.is_alive():
        stop(thread)
        raise Unfinished
    leave(thread)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["answer"]


def leave(thread: threading.Thread, tries: int = 100) -> None:
    """Wait until a thread that has ended for Python has also ended for Linux.

    On its way out it may hold a lock of MKL's, which a fork at that moment would leave locked.
    """
    for _ in range(tries):
        if not Path(f"/proc/self/task/{thread.native_id}").exists():
            return
        time.sleep(0.001)


def stop(thread: threading.Thread, tries: int = 20) -> None:
    """Raise Unfinished inside a thread, again if it is caught there, for half a second."""
    ident, kind = ctypes.c_ulong(thread.ident), ctypes.py_object(Unfinished)
    for _ in range(tries):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, kind)
        thread.join(0.5 / tries)
        if not thread.is_alive():
            return
