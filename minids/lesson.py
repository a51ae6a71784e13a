"""What the notebooks share: tables that are shown as tables, and exercises that check themselves.

    review(square, [((3,), 9, "multiply the number by itself")])

An exercise is a function that the learner writes. `review` calls it and says in words what is
wrong; `problems` gives the same words as a list, for the graded cell that must raise.
"""

import math
from collections.abc import Callable, Iterable


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

    cases: (arguments, expected result, hint); a float is expected to nine digits, the rest exactly
    """
    found = []
    for arguments, expected, hint in cases:
        call = f"{function.__name__}({', '.join(map(brief, arguments))})"
        try:
            answer = function(*arguments)
        except NotImplementedError:
            return [f"{function.__name__} is not written yet"]
        except Exception as error:  # whatever a learner's code may raise is told in words
            found.append(f"{call} stops with {type(error).__name__}: {error}")
            continue
        if not same(answer, expected):
            found.append(f"{call} gives {brief(answer)} instead of {brief(expected)}: {hint}")
    return found


def review(function: Callable, cases: list[tuple]) -> None:
    """Print what is wrong with a learner's function, or that nothing is."""
    found = problems(function, cases)
    print("\n".join(found) or f"{function.__name__} is right in {len(cases)} of {len(cases)} cases")


def same(answer, expected) -> bool:
    """Whether an answer is the expected one; a list may come as an array or a tensor."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(expected, float) and isinstance(answer, int | float):
        return math.isclose(answer, expected, rel_tol=1e-9)
    return type(answer) is type(expected) and answer == expected


def brief(value) -> str:
    """A value as Python writes it, or its type where that is long."""
    text = f"{value:,}" if type(value) is int else repr(value)
    return text if len(text) <= 60 else type(value).__name__
