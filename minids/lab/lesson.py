"""Helpers of the notebooks: tables displayed as tables, and exercises that check themselves.

    review(square, [((3,), 9, "multiply the number by itself")])

An exercise is a function that the learner writes. `review` prints what is wrong with it; `problems`
returns the same messages, which a graded cell raises. `minids.lab.checker` runs the function.
"""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable

import torch

from minids.lab.checker import LATE, PATIENCE, Unfinished, attempt, borrowed, rehearse

DIGITS = 1e-6  # relative; a right answer in FP32 keeps six digits, and a wrong one is further off


def table(header: Iterable[str], rows: Iterable[Iterable]):
    """Return a table for the end of a cell; columns of numbers are aligned to the right.

    header: titles of the columns; rows: cells, shown by `str`, integers as 1,234,567
    """
    from IPython.display import Markdown

    def is_number(entry: str) -> bool:  # with or without a unit, or empty
        return not entry or entry[0].isdigit() and len(entry.split()) <= 2

    rows = [[f"{value:,}" if type(value) is int else str(value) for value in row] for row in rows]
    numeric = [all(map(is_number, column)) for column in zip(*rows, strict=True)]
    lines = [list(header), ["--:" if right else ":--" for right in numeric], *rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def problems(function: Callable, cases: Iterable[tuple]) -> list[str]:
    """Return what is wrong with a learner's function, one sentence per case that fails.

    cases: (arguments, expected result, hint); floats must agree to six digits, the rest exactly.
        Every case gets its own copy of the arguments; all together may take PATIENCE seconds
    """
    if not callable(function) or not hasattr(function, "__name__"):
        return [f"{brief(function)} is not a function"]
    name = function.__name__
    if taken := borrowed(function):
        return [f"{name} takes {taken} from minids, which knows the answer: write it yourself"]

    def check(arguments: tuple, expected) -> str:
        return difference(function(*copy.deepcopy(arguments)), expected)

    found, cases, start = [], list(cases), time.monotonic()
    calls = [f"{name}({', '.join(map(brief, arguments))})" for arguments, *_ in cases]
    ended, fate = rehearse(check, cases)
    if fate:
        return [f"{calls[ended]} {fate}"]
    end = PATIENCE + (time.monotonic() if ended == len(cases) else start)
    for call, (arguments, expected, hint) in zip(calls, cases, strict=True):
        try:
            wrong = attempt(check, (arguments, expected), end - time.monotonic())
        except Unfinished:
            return [*found, f"{call} {LATE}"]
        except BaseException as error:  # whatever a learner's code may raise is reported
            if type(error) is NotImplementedError and not error.args:
                return [f"{name} is not written yet"]
            found.append(f"{call} stops with {reason(error)}")
        else:
            found += [f"{call} gives {wrong}: {hint}"] if wrong else []
    return found


def reason(error: BaseException) -> str:
    """Return an error in words, even one whose `str` fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def review(function: Callable, cases: list[tuple]) -> None:
    """Print what is wrong with a learner's function, or that nothing is."""
    with contextlib.redirect_stdout(sys.stdout):  # restores it if the function replaces it
        found = problems(function, cases)
    print("\n".join(found) or f"{function.__name__} is right in {len(cases)} of {len(cases)} cases")


def difference(answer, expected) -> str:
    """Return how an answer differs from the expected one, in words; "" if it does not."""
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
    """Return the same for an expected tensor."""
    if not isinstance(answer, torch.Tensor):
        return f"{brief(answer)} instead of {brief(expected)}"
    if answer.shape != expected.shape:
        return f"shape {tuple(answer.shape)} instead of {tuple(expected.shape)}"
    if answer.dtype != expected.dtype:
        return f"{answer.dtype} instead of {expected.dtype}"
    if expected.requires_grad and not answer.requires_grad:
        return "a tensor without a gradient"
    if answer.isnan().any():
        return "a tensor that contains NaN"
    if torch.allclose(answer, expected, rtol=10 * DIGITS, atol=DIGITS):
        return ""
    largest = (answer.double() - expected.double()).abs().max().item()
    return f"values that differ by up to {largest:.2g}"


def same(answer, expected) -> bool:
    """Return whether an answer equals the expected one; an array or tensor may stand for a list."""
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
    """Return a value's `repr`, or its name, shape or length where that is too long."""
    if isinstance(value, torch.Tensor) and value.numel() > 4:
        return f"a tensor of shape {tuple(value.shape)}"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    kind = type(value).__name__
    sized = isinstance(value, str | bytes | list | tuple | dict | set)
    text = f"{value:,}" if type(value) is int else "" if sized and len(value) > 60 else repr(value)
    if text and len(text) <= 60:
        return text
    if sized:
        return f"a {kind} of length {len(value)}" if len(value) > 4 else f"{text[:57]}..."
    return kind
