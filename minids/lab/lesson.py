"""Helpers of the notebooks: tables displayed as tables, and exercises that check themselves.

    review(square, [((3,), 9, "multiply the number by itself")])

An exercise is a function that the learner writes. `review` prints what is wrong with it; `grade`
raises the same sentences in a graded cell. `minids.lab.checker` runs the function, apart, and
`minids.lab.compare` finds the words.
"""

import copy
import random
from collections.abc import Callable, Iterable

import torch

from minids.lab.checker import LARGE, Late, Tell, borrowed, peeping, run
from minids.lab.compare import altered, difference, known, mark, shown

MOST = 6  # sentences of one check: the first cases that fail


def table(header: Iterable[str], rows: Iterable[Iterable]):
    """Return a table for the end of a cell; columns of numbers are aligned to the right.

    header: titles of the columns; rows: cells, shown by `str`, integers as 1,234,567
    """
    from IPython.display import Markdown

    def is_number(entry: str) -> bool:  # with or without a unit, or empty
        return not entry or entry.lstrip("-")[:1].isdigit() and len(entry.split()) <= 2

    rows = [[f"{value:,}" if type(value) is int else str(value) for value in row] for row in rows]
    numeric = [all(map(is_number, column)) for column in zip(*rows, strict=True)]
    lines = [list(header), ["--:" if right else ":--" for right in numeric], *rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def review(function: Callable, cases: Iterable[tuple]) -> None:
    """Print what is wrong with a learner's function, or that nothing is."""
    cases = list(cases)
    found = problems(function, cases)
    print("\n".join(found) or f"{function.__name__} is right in {len(cases)} of {len(cases)} cases")


def grade(function: Callable, cases: Iterable[tuple]) -> None:
    """Raise what is wrong with a learner's function as an `AssertionError`."""
    if found := problems(function, cases):
        raise AssertionError("\n".join(found))


def drawn(solve: Callable, draw: Callable, hint: str, count: int = 30, seed: int = 0) -> list:
    """Return cases that a generator made: arguments, what `solve` makes of them, and a hint.

    draw: called with a `random.Random`, returns a tuple of arguments; count, seed: of the cases
    """
    dice = random.Random(seed)
    given = [draw(dice) for _ in range(count)]
    return [(arguments, solve(*copy.deepcopy(arguments)), hint) for arguments in given]


def watched(tensor: torch.Tensor, most: int, words: str) -> torch.Tensor:
    """Return a tensor of which an answer must not make another with more than `most` numbers.

    words: of the error that is raised where it does
    """
    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            made = super().__torch_function__(function, types, args, kwargs or {})
            if isinstance(made, torch.Tensor) and made.numel() > most:
                raise ValueError(words)
            return made

        def __deepcopy__(self, memo):  # each case gets its own copy of the arguments
            return self.as_subclass(torch.Tensor).clone().as_subclass(Watched)

    return tensor.as_subclass(Watched)


def problems(function: Callable, cases: Iterable[tuple]) -> list[str]:
    """Return what is wrong with a learner's function, one sentence per case that fails.

    cases: (arguments, expected result, hint); floats must agree to six digits, the rest exactly.
        Every case gets its own copy of the arguments, which the function must leave as they are;
        all cases together may take PATIENCE seconds
    """
    if not callable(function) or not hasattr(function, "__name__"):
        return [f"{shown(function)} is not a function"]
    name, cases = function.__name__, list(cases)
    if order := getattr(function, "order", ()):  # a variant of the exercise: lab.variants
        cases = [(tuple(case[0][i] for i in order), *case[1:]) for case in cases]
    if taken := borrowed(function):
        return [f"{name} takes {taken} from minids, which knows the answer: write it yourself"]
    if taken := peeping(function):
        return [f"{name} looks at its caller by {taken}: it may use its arguments alone"]
    calls = [f"{name}({', '.join(map(shown, arguments))})" for arguments, *_ in cases]
    told, fate = run(lambda tell: judge(function, cases, tell))
    print("".join(text for kind, text in told if kind == "printed"), end="")
    verdicts = [value for kind, value in told if kind == "verdict"]
    if any(words == "is not written yet" for words, *_ in verdicts):
        return [f"{name} is not written yet"]
    mistake = known(name, [each for *_, each in verdicts]) if len(verdicts) == len(cases) else ""
    found = [sentence(call, words, what, case, mistake) for call, case, (words, what, _)
             in zip(calls, cases, verdicts, strict=False) if words]
    found += [f"{calls[len(verdicts)]} {fate}"] if fate and len(verdicts) < len(cases) else []
    more = len(found) - MOST
    found = found if more <= 0 else [*found[:MOST], f"and {more} more of {len(cases)} cases"]
    return found + ([f"This is a known mistake: {mistake}"] if found and mistake else [])


def judge(function: Callable, cases: list[tuple], tell: Tell) -> None:
    """Tell a verdict for each case: words, in what the answer is wrong, and the mark of it."""
    for arguments, expected, _ in cases:
        words, what, each = verdict(function, arguments, expected)
        tell("verdict", (words[:2000], what, each))
        if words in ("is not written yet", LARGE):
            return


def verdict(function: Callable, arguments: tuple, expected) -> tuple[str, str, str]:
    """Return what one call gives: words, "" if it is right; in what it is wrong; its mark."""
    given = copy.deepcopy(arguments)
    try:
        answer = function(*given)
        words, what = difference(answer, expected)
        changed = [one for one, other in zip(arguments, given, strict=True) if altered(one, other)]
        if not words and changed:
            words, what = (f"gives the right result, but changes its argument {shown(changed[0])}: "
                           "work on a copy"), "argument"
        return words, what, mark(answer)
    except Late:
        raise
    except BaseException as error:  # whatever a learner's code may raise is reported
        if type(error) is NotImplementedError and not error.args:
            return "is not written yet", "error", ""
        if isinstance(error, MemoryError) or "can't allocate memory" in reason(error):
            return LARGE, "error", ""
        words = f"stops with {reason(error)}{line_of(error, function)}"
        return words, "error", type(error).__name__


def line_of(error: BaseException, function: Callable) -> str:
    """Return at which line of the learner's function an error arose; "" if in none."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code is getattr(function, "__code__", None):
            lines.append(trace.tb_lineno - trace.tb_frame.f_code.co_firstlineno + 1)
        trace = trace.tb_next
    return f" (line {lines[-1]} of the function)" if lines and lines[-1] else ""


def reason(error: BaseException) -> str:
    """Return an error in words, even one whose `str` fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def sentence(call: str, words: str, what: str, case: tuple, mistake: str) -> str:
    """Return one case's sentence: the call, what it gives, and what the case is about.

    A hint belongs to its case and not to the mistake; where the mistake is known, or only a type
    is wrong, it is left out. A case that tries a property on a version of the part says which of
    the two was misjudged.
    """
    arguments, expected, hint = case
    about = f" ({hint})" if hint else ""
    if type(expected) is bool and any(map(callable, arguments)):
        version = shown(next(filter(callable, arguments))).replace("<lambda>", "this version")
        if what == "error":
            right = "right" if expected else "wrong"
            return f"{call} {words}: {version} is {right}, so return {expected}{about}"
        if what == "value" and words == f"gives {not expected} instead of {expected}":
            judged = ("is right, and the property refuses it" if expected
                      else "is wrong, and the property lets it pass")
            return f"{call} {words}: {version} {judged}{about}"
    if not hint or what != "value" or mistake:
        return f"{call} {words}"
    return f"{call} {words}{'' if words.endswith('?') else '.'} This case is about: {hint}"
