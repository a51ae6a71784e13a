"""What the notebooks share: tables that are shown as tables, and exercises that check themselves.

    review(square, [((3,), 9, "multiply the number by itself")])

An exercise is a function that the learner writes. `review` calls it and says in words what is
wrong; `problems` gives the same words as a list, for the graded cell that must raise.
"""

import contextlib
import copy
import ctypes
import dis
import faulthandler
import logging
import math
import mmap
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import torch

PATIENCE = 4.0  # seconds that a check waits for a learner's function
MEMORY = 2 * 2 ** 30  # bytes that it may take
DIGITS = 1e-6  # relative; a right answer in FP32 keeps six digits, and a wrong one is further off
LATE = f"has not finished after {PATIENCE:.0f} seconds: does one of its loops never end?"
LARGE = f"takes more than {MEMORY >> 30} GiB of memory: does something grow without end?"
GONE = "ends Python itself: does it exit, or crash?"


def table(header: Iterable[str], rows: Iterable[Iterable]):
    """A table for the end of a cell: columns of numbers to the right, the others to the left.

    header: the columns' titles; rows: a cell each, shown by `str`, whole numbers as 1,234,567
    """
    from IPython.display import Markdown
    rows = [[f"{value:,}" if type(value) is int else str(value) for value in row] for row in rows]
    numeric = [all(map(is_number, column)) for column in zip(*rows, strict=True)]
    lines = [list(header), ["--:" if right else ":--" for right in numeric], *rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def is_number(entry: str) -> bool:
    """Whether an entry is a number, with a unit or not; an empty one may pass for a number."""
    return not entry or entry[0].isdigit() and len(entry.split()) <= 2


def problems(function: Callable, cases: Iterable[tuple]) -> list[str]:
    """What is wrong with a learner's function, a sentence for each case that fails.

    cases: (arguments, expected result, hint); floats are expected to six digits, the rest
    exactly. Every case gets arguments of its own, so a function that changes them spoils
    nothing; all together may take PATIENCE seconds.
    """
    if not callable(function) or not hasattr(function, "__name__"):
        return [f"{brief(function)} stands where a function was asked for"]
    if taken := borrowed(function):
        return [f"{function.__name__} takes {taken} from minids, which knows the answer: "
                "write it yourself"]
    found, cases, start = [], list(cases), time.monotonic()
    ended, fate = rehearse(function, cases)
    if fate:
        return [f"{written(function, cases[ended][0])} {fate}"]
    end = PATIENCE + (time.monotonic() if ended == len(cases) else start)
    for arguments, expected, hint in cases:
        call = written(function, arguments)
        try:
            wrong = attempt(compare, (function, arguments, expected), end - time.monotonic())
        except Unfinished:
            return [*found, f"{call} {LATE}"]
        except BaseException as error:  # whatever a learner's code may raise is told in words
            if type(error) is NotImplementedError and not error.args:
                return [f"{function.__name__} is not written yet"]
            found.append(f"{call} stops with {reason(error)}")
            continue
        if wrong:
            found.append(f"{call} gives {wrong}: {hint}")
    return found


def reason(error: BaseException) -> str:
    """An error in words, even one that cannot say what it is."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def compare(function: Callable, arguments: tuple, expected) -> str:
    """How a function's answer differs from the expected one, in words; nothing if it does not."""
    return difference(function(*copy.deepcopy(arguments)), expected)


def review(function: Callable, cases: list[tuple]) -> None:
    """Print what is wrong with a learner's function, or that nothing is."""
    with contextlib.redirect_stdout(sys.stdout):  # which puts it back if the function takes it
        found = problems(function, cases)
    print("\n".join(found) or f"{function.__name__} is right in {len(cases)} of {len(cases)} cases")


def borrowed(function: Callable) -> str:
    """What of minids a learner's function uses or imports; nothing if it does neither.

    Settings may be used. What it calls is not looked through: this stops a short cut, not a cheat.
    """
    own = "minids.config", "minids.lab.lesson"
    codes = [function.__code__] if hasattr(function, "__code__") else []
    for code in codes:  # grows on the way, by the functions inside
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        for step in dis.get_instructions(code):
            value = function.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
            made = isinstance(value, FunctionType | type) and value.__module__ or ""
            module = step.argval if step.opname == "IMPORT_NAME" else made
            module = value.__name__ if isinstance(value, ModuleType) else module
            if module.split(".")[0] == "minids" and module not in own:
                return step.argval
    return ""


def written(function: Callable, arguments: tuple) -> str:
    """A call as one would write it, long arguments by their type."""
    return f"{function.__name__}({', '.join(map(brief, arguments))})"


def rehearse(function: Callable, cases: list[tuple]) -> tuple[int, str]:
    """How many cases a copy of this process gets through, and what the next one does to it.

    Some answers cannot be stopped from within: an endless loop inside of one built-in, such as
    `sum(iter(int, 1))`, memory without end, a crash. The copy meets them, and the notebook lives
    on. Outside of Linux there is no copy.

    A fork can leave a lock behind that nobody opens. So nothing is said of a copy that only
    waits, which `attempt` can stop; and one that is late is given a second chance, a short one.
    """
    ended, fate = 0, ""
    for seconds in (PATIENCE - 0.5, 0.5) if sys.platform == "linux" else ():
        shared = mmap.mmap(-1, len(cases) + 1)  # bytes that both processes see
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads may run
            child = os.fork()
        if child == 0:
            try:
                play(function, cases, shared)
            finally:
                os._exit(PLAYED)
        fate = watch(child, seconds)
        ended = shared[:].count(1)
        if fate != LATE:
            break
    return ended, fate


def play(function: Callable, cases: list[tuple], ended: mmap.mmap) -> None:
    """In the copy: call the function on every case, unheard; ended: a byte for each case."""
    import resource
    os.setsid()  # signals to the whole group stay here
    faulthandler.disable()
    logging.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    for stream in (sys.stdout, sys.stderr):  # a notebook's, if someone has kept it
        with contextlib.suppress(AttributeError):
            stream.write = len
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)  # OpenMP's other threads were not copied
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for i, (arguments, expected, _) in enumerate(cases):
        try:
            compare(function, arguments, expected)
        except BaseException as error:  # `attempt` meets it again, and tells
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                os._exit(TOO_LARGE)
        ended[i] = 1


PLAYED, TOO_LARGE = 77, 78  # exit statuses of the copy; any other one is not its own


def watch(child: int, seconds: float) -> str:
    """What becomes of the copy in so many seconds; nothing if it ends well or only waits."""
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
    """Whether a process waits and has hardly computed. One that lacks a processor does not."""
    state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    computed = sum(map(int, fields[10:12])) / os.sysconf("SC_CLK_TCK")
    return state != "R" and computed < seconds / 50


class Unfinished(BaseException):
    """A learner's function took too long. Not an Exception: its own `except` must not catch it."""


def quiet(ended, tell=threading.excepthook) -> None:
    """Say nothing of a thread that `stop` has ended; of any other what is always said."""
    if ended.exc_type is not Unfinished:
        tell(ended)


threading.excepthook = quiet


def attempt(function: Callable, arguments: tuple, seconds: float):
    """What a function returns or raises, or Unfinished after so many seconds.

    It runs in a thread, so that the notebook goes on whatever it does. A thread that is late is
    asked to stop; one that waits for something outside of Python is left behind.
    """
    outcome = {}

    def work() -> None:
        try:
            outcome["answer"] = function(*arguments)
        except BaseException as error:  # another Unfinished may come meanwhile: see `quiet`
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
    """Wait until Linux, too, has seen the end of a thread that has ended for Python.

    On its way out it may hold a lock of MKL's, which a fork at that moment would keep shut.
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


def difference(answer, expected) -> str:
    """How an answer differs from the expected one, in words; nothing where it does not."""
    if answer is None:
        return f"None instead of {brief(expected)} (does it return its result?)"
    if isinstance(expected, torch.Tensor):
        return tensor_difference(answer, expected)
    if same(answer, expected):
        return ""
    if isinstance(expected, list) and hasattr(answer, "__len__") and len(answer) != len(expected):
        return f"{brief(answer)}, {len(answer)} entries instead of {len(expected)}"
    short = hasattr(answer, "tolist") and hasattr(answer, "shape") and math.prod(answer.shape) <= 16
    return f"{brief(answer.tolist() if short else answer)} instead of {brief(expected)}"


def tensor_difference(answer, expected: torch.Tensor) -> str:
    """The same where a tensor is expected: its shape, its type and its values."""
    if not isinstance(answer, torch.Tensor):
        return f"{brief(answer)} instead of {brief(expected)}"
    if answer.shape != expected.shape:
        return f"shape {tuple(answer.shape)} instead of {tuple(expected.shape)}"
    if answer.dtype != expected.dtype:
        return f"{answer.dtype} instead of {expected.dtype}"
    if expected.requires_grad and not answer.requires_grad:
        return "a tensor without a gradient"
    if answer.isnan().any():
        return "nan in places"
    if torch.allclose(answer, expected, rtol=10 * DIGITS, atol=DIGITS):
        return ""
    largest = (answer.double() - expected.double()).abs().max().item()
    return f"values that differ by up to {largest:.2g}"


def same(answer, expected) -> bool:
    """Whether an answer is the expected one; a list may come as an array or a tensor."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(expected, float) and type(answer) in (int, float):
        return math.isclose(answer, expected, rel_tol=DIGITS, abs_tol=1e-9)
    if type(answer) is not type(expected):
        return False
    if isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(
            same(answer[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(answer) == len(expected) and all(map(same, answer, expected))
    return answer == expected


def brief(value) -> str:
    """A value as Python writes it, or its name, shape or length where that is long."""
    if isinstance(value, torch.Tensor) and value.numel() > 4:
        return f"a tensor of shape {tuple(value.shape)}"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    kind = type(value).__name__
    long = isinstance(value, str | bytes | list | tuple | dict | set) and len(value) > 60
    text = f"{value:,}" if type(value) is int else "" if long else repr(value)
    if text and len(text) <= 60:
        return text
    if isinstance(value, str | bytes | list | tuple | dict | set):
        return f"a {kind} of length {len(value)}" if len(value) > 4 else f"{text[:57]}..."
    return kind
