"""What the notebooks share: tables that are shown as tables, and exercises that check themselves.

    review(square, [((3,), 9, "multiply the number by itself")])

An exercise is a function that the learner writes. `review` calls it and says in words what is
wrong; `problems` gives the same words as a list, for the graded cell that must raise.
"""

import copy
import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterable

import torch

PATIENCE = 4.0  # seconds that a check waits for a learner's function


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

    cases: (arguments, expected result, hint); floats are expected to nine digits (a tensor's to
    five, if it is FP32), the rest exactly. Every case gets arguments of its own, so a function
    that changes them spoils nothing; all together may take PATIENCE seconds.
    """
    found, end = [], time.monotonic() + PATIENCE
    for arguments, expected, hint in cases:
        call = f"{function.__name__}({', '.join(map(brief, arguments))})"
        try:
            answer = attempt(function, copy.deepcopy(arguments), end - time.monotonic())
        except NotImplementedError:
            return [f"{function.__name__} is not written yet"]
        except Unfinished:
            return [*found, f"{call} has not finished after {PATIENCE:.0f} seconds: "
                            "does one of its loops never end?"]
        except BaseException as error:  # whatever a learner's code may raise is told in words
            found.append(f"{call} stops with {type(error).__name__}: {error}")
            continue
        wrong = difference(answer, expected)
        if wrong:
            found.append(f"{call} gives {wrong}: {hint}")
    return found


def review(function: Callable, cases: list[tuple]) -> None:
    """Print what is wrong with a learner's function, or that nothing is."""
    found = problems(function, cases)
    print("\n".join(found) or f"{function.__name__} is right in {len(cases)} of {len(cases)} cases")


class Unfinished(BaseException):
    """A learner's function took too long. Not an Exception: its own `except` must not catch it."""


def attempt(function: Callable, arguments: tuple, seconds: float):
    """What a function returns or raises, or Unfinished after so many seconds.

    It runs in a thread, so that the notebook goes on whatever it does. A thread that is late is
    asked to stop; one that waits for something outside of Python is left behind.
    """
    outcome = {}

    def work() -> None:
        try:
            outcome["answer"] = function(*arguments)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.01))
    if thread.is_alive():
        stop(thread)
        raise Unfinished
    if "error" in outcome:
        raise outcome["error"]
    return outcome["answer"]


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
    plain = answer.tolist() if hasattr(answer, "tolist") else answer
    return f"{brief(plain)} instead of {brief(expected)}"


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
    digits = 1e-9 if expected.dtype == torch.float64 else 1e-5
    if torch.allclose(answer, expected, rtol=digits, atol=digits):
        return ""
    largest = (answer.double() - expected.double()).abs().max().item()
    return f"values that differ by up to {largest:.2g}"


def same(answer, expected) -> bool:
    """Whether an answer is the expected one; a list may come as an array or a tensor."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(expected, float) and type(answer) in (int, float):
        return math.isclose(answer, expected, rel_tol=1e-9, abs_tol=1e-12)
    if type(answer) is not type(expected):
        return False
    if isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(
            same(answer[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(answer) == len(expected) and all(map(same, answer, expected))
    return answer == expected


def brief(value) -> str:
    """A value as Python writes it, or its name, shape or type where that is long."""
    if isinstance(value, torch.Tensor) and value.numel() > 4:
        return f"a tensor of shape {tuple(value.shape)}"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = f"{value:,}" if type(value) is int else repr(value)
    return text if len(text) <= 60 else type(value).__name__
