"""Vary the exercises: other names, another order of arguments, other numbers, by a seed.

`vary` returns a notebook whose exercises last year's answers do not fit word for word: each
function's name ends with the seed, its arguments stand in another order, the check has two cases
more, and the hidden cases are drawn anew. Cases are computed by the exercise's second solution.
"""

import ast
import contextlib
import io
import json
import random
import re
from pathlib import Path
from unittest import mock

from minids.lab import lesson
from minids.lab.exercises import Exercise, staged

CASE = 90  # characters of a case that a check shows
DRAWS = 60  # tries to find two cases that are that short
HEAD = r"^def {}\(([\w, ]+)\):"


def calls(name: str) -> str:
    """Return a pattern of the function's name where it is called, or defined."""
    return rf"(?<![\w.]){name}(?=\()"


def order_of(exercise: Exercise, cells: list[str], dice: random.Random) -> list[int]:
    """Return another order of the arguments; [] if it has one, or others use it."""
    head = re.search(HEAD.format(exercise.name), exercise.solution, re.M)
    count = len(head[1].split(", ")) if head else 0
    name = exercise.name
    others = (re.sub(rf"\b(def|review|grade)[ (]{name}\b", "", text) for text in cells)
    if count < 2 or any(re.search(rf"(?<![\w.]){name}(?![\w.])(?!\s*=[^=])", t) for t in others):
        return []
    order = [*range(count)]
    while order == sorted(order):
        dice.shuffle(order)
    return order


def short(value):
    """Return a case's arguments with floats of three digits, so that one can read them."""
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, list | tuple):
        return type(value)(map(short, value))
    return value


def literal(case: tuple) -> str:
    """Return a case as it is typed, "" if it is too long or no literal."""
    text = repr(case)
    with contextlib.suppress(ValueError, SyntaxError):
        return text if len(text) <= CASE and ast.literal_eval(text) == case else ""
    return ""


def more_cases(exercise: Exercise, space: dict, seed: int) -> list[str]:
    """Return up to two new cases for an exercise whose hidden tests draw some."""
    space, found, dice = dict(space), {}, random.Random(f"{seed} {exercise.name}")
    if "def case_of(" not in exercise.test:
        return []
    with (mock.patch.object(lesson, "problems", lambda *_: []),  # only their names are wanted
          contextlib.redirect_stdout(io.StringIO())):
        for text in (exercise.solution, exercise.check, exercise.test):
            exec(compile(text, exercise.notebook, "exec"), space)
    for _ in range(DRAWS):
        given = short(space["case_of"](dice))
        with contextlib.suppress(ArithmeticError, ValueError):
            expected = space["second_way"](*given)
            if text := literal((given, expected, f"numbers of {seed}")):
                found.setdefault(repr(expected), text)
    return [*found.values()][:2]


def answered(text: str, name: str, new: str, order: list[int]) -> str:
    """Return the solution cell with the new name and order."""
    def head(found: re.Match) -> str:
        names = found[1].split(", ")
        return f"def {new}({', '.join(names[i] for i in order) if order else found[1]}):"

    text = re.sub(HEAD.format(name), head, text, flags=re.M)
    return re.sub(calls(name), new, text)


def judged(text: str, name: str, new: str, order: list[int], more: list[str], seed: int) -> str:
    """Return a check or a test for the new name and order, with more cases and other draws."""
    text = re.sub(rf"(?<![\w.]){name}(?![\w.])(?!\s*=[^=])", new, text)
    if more:
        added = "".join(f"    {case},\n" for case in more)
        text = re.sub(rf"^review\({new}, (\w+)\)",  # a function: a case may hold a backslash
                      lambda found: f"{found[1]} = [\n    *{found[1]},\n{added}]\n{found[0]}",
                      text, flags=re.M)
    text = text.replace("### BEGIN HIDDEN TESTS\n", "### BEGIN HIDDEN TESTS\nfrom functools import "
                        f"partial\n\ndrawn = partial(drawn, seed={seed})\n\n"
                        if "drawn(" in text else "### BEGIN HIDDEN TESTS\n")
    told = f"{new}.order = {', '.join(map(str, order))}  # in which it takes a case's arguments\n"
    first = re.search(r"^(review|grade)\(", text, re.M)
    return text[:first.start()] + (told if order else "") + text[first.start():]


def vary(path: Path, seed: int) -> bytes:
    """Return a notebook with varied exercises; its folder must be the current one.

    The cells that the exercises need are run, because new cases are computed by them.
    """
    nb = json.loads(path.read_bytes())
    dice = random.Random(f"{seed} {path.stem}")
    cells = {cell["id"]: "".join(cell["source"]) for cell in nb["cells"]}
    code = [text for cell in nb["cells"] if cell["cell_type"] == "code"
            and (text := cells[cell["id"]])]
    for exercise, space in staged(path):
        name, new = exercise.name, f"{exercise.name}_{seed}"
        order, more = order_of(exercise, code, dice), more_cases(exercise, space, seed)
        for cell in nb["cells"]:
            text, meta = cells[cell["id"]], cell["metadata"].get("nbgrader", {})
            if cell["cell_type"] == "markdown":
                text = re.sub(rf"`{name}(?=[`(])", f"`{new}", text)
            elif meta.get("grade_id") == name:
                meta["grade_id"], text = new, answered(text, name, new, order)
            elif meta.get("grade_id") in (f"{name}_check", f"{name}_test"):
                check = meta["grade_id"].endswith("_check")
                meta["grade_id"] = new + meta["grade_id"][len(name):]
                text = judged(text, name, new, order, more if check else [], seed)
            elif f"def {name}(" not in text:
                text = re.sub(calls(name), new, text)
            if cell["cell_type"] == "code" and text != cells[cell["id"]]:
                cell |= {"outputs": [], "execution_count": None}
            cells[cell["id"]] = text
    for cell in nb["cells"]:
        cell["source"] = cells[cell["id"]].splitlines(keepends=True)
    return json.dumps(nb, ensure_ascii=False, indent=1).encode() + b"\n"
