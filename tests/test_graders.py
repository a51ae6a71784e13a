"""Check that no wrong answer gets points: not an empty one, not a memorised one, and none of
those that real projects have shipped (tests/wrong_answers/).

An exercise is graded as in the notebook, with the cells that it needs, and no others.
"""

import ast
import contextlib
import io
import os
import re
import symtable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION$", re.M | re.S)
HIDDEN = re.compile(r"^### BEGIN HIDDEN TESTS\n(.*?)^### END HIDDEN TESTS$", re.M | re.S)


@dataclass(frozen=True)
class Exercise:
    """needs: the cells before it that it stands on; solution, check, test: its own cells"""

    notebook: str
    needs: tuple[str, ...]
    solution: str
    check: str
    test: str

    @property
    def name(self) -> str:
        """Return the name of the function that the learner writes."""
        return ast.parse(self.solution).body[-1].name

    @property
    def stub(self) -> str:
        """Return the cell that nbgrader hands out."""
        return SOLUTION.sub(r"\1raise NotImplementedError()", self.solution)

    @property
    def hidden(self) -> str:
        """Return the tests that the learner does not see."""
        return HIDDEN.search(self.test)[1]


def names(source: str) -> tuple[set[str], set[str]]:
    """Return the global names that a cell binds, and the others that it or its functions read."""
    def read(scope) -> set[str]:
        own = {s.get_name() for s in scope.get_symbols() if s.is_referenced()
               and (scope.get_type() == "module" or s.is_global())}
        return own.union(*map(read, scope.get_children()))

    top = symtable.symtable(source, "cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()
             or s.is_namespace()}
    return bound, read(top) - bound


def needed(before: list[str], cells: list[str]) -> tuple[str, ...]:
    """Return the earlier cells whose names the given cells need, in order."""
    wanted, kept = set().union(*(names(cell)[1] for cell in cells)), []
    for source in reversed(before):
        bound, read = names(source)
        if bound & wanted:
            wanted = wanted - bound | read
            kept.append(source)
    return tuple(reversed(kept))


def exercises(path: Path) -> list[Exercise]:
    """Return the exercises of one notebook, in order."""
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    found = []
    for i, cell in enumerate(code):
        if cell.metadata.get("nbgrader", {}).get("solution"):
            own = [c.source for c in code[i:i + 3]]
            found.append(Exercise(path.stem, needed([c.source for c in code[:i]], own), *own))
    return found


ALL = [exercise for path in PATHS for exercise in exercises(path)]
each_exercise = pytest.mark.parametrize("exercise", ALL,
                                        ids=[f"{e.notebook[:2]}-{e.name}" for e in ALL])


@cache
def stage(exercise: Exercise) -> dict:
    """Run the cells that an exercise needs, in the notebooks' folder; return their names."""
    space: dict = {}
    here = Path.cwd()
    os.chdir(ROOT / "notebooks")
    try:
        for source in exercise.needs:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, exercise.notebook, "exec"), space)
    finally:
        os.chdir(here)
    return space


@pytest.fixture
def alone(monkeypatch):
    """Grade without the forked copy, as elsewhere than on Linux.

    A fork takes longer than all of these answers. What it meets: tests/lab/test_checker.py.
    """
    monkeypatch.setattr("minids.lab.lesson.rehearse", lambda check, cases: (0, ""))


def grade(exercise: Exercise, answer: str) -> tuple[bool, str]:
    """Return whether an answer gets its points, and what the check tells the learner."""
    space, told = dict(stage(exercise)), io.StringIO()
    exec(answer, space)
    with contextlib.redirect_stdout(told):
        exec(exercise.check, space)
    try:
        exec(exercise.test, space)
    except AssertionError:
        return False, told.getvalue()
    return True, told.getvalue()


def wrong_answers(exercise: Exercise) -> dict[str, str]:
    """Return the wrong answers to one exercise: what is wrong -> the function's source."""
    path = ROOT / "tests" / "wrong_answers" / f"{exercise.notebook}.py"
    source = path.read_text() if path.is_file() else ""
    return {ast.get_docstring(node): ast.get_source_segment(source, node)
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name == exercise.name}


@each_exercise
def test_the_solution_gets_the_points(exercise):
    right, told = grade(exercise, exercise.solution)
    assert right and re.fullmatch(rf"{exercise.name} is right in (\d) of \1 cases\n", told), told


@each_exercise
def test_the_untouched_stub_gets_none(exercise):
    assert exercise.stub != exercise.solution
    assert grade(exercise, exercise.stub) == (False, f"{exercise.name} is not written yet\n")


@each_exercise
def test_memorised_answers_get_none(exercise, alone):
    """A function that memorised the visible cases and returns one of their answers otherwise."""
    space = dict(stage(exercise))
    exec(exercise.solution, space)
    solved, known = space[exercise.name], []
    space[exercise.name] = remember = lambda *given: known.append(solved(*given)) or known[-1]
    remember.__name__ = exercise.name
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(exercise.check, space)
    assert "is right in" in told.getvalue()
    for answer in list(known):
        space[exercise.name] = constant = lambda *given, answer=answer: answer
        constant.__name__ = exercise.name
        with pytest.raises(AssertionError):
            exec(exercise.hidden, space)


@pytest.mark.slow
@each_exercise
def test_what_is_no_answer_is_told(exercise):
    """None, NaN, a string, an error: named in words. (Endless loops: tests/lab/test_checker.py.)"""
    head = exercise.solution[:exercise.solution.index(":\n") + 1]
    for body, word in [("return None", "None"), ("return float('nan')", "nan"),
                       ("return 'x'", "'x'"), ("raise ValueError('no')", "ValueError: no")]:
        right, told = grade(exercise, f"{head}\n    {body}")
        assert not right and word in told and "Traceback" not in told


@pytest.mark.slow
@each_exercise
def test_an_answer_from_the_package_gets_none(exercise):
    """Even the right one."""
    head, line, rest = exercise.solution.partition("    ### BEGIN SOLUTION\n")
    right, told = grade(exercise, f"{head}{line}    import minids.model.transformer\n{rest}")
    assert not right and told == (f"{exercise.name} takes minids.model.transformer from minids, "
                                  "which knows the answer: write it yourself\n")


@each_exercise
def test_wrong_answers_get_none(exercise, alone):
    """A wrong answer is refused for what it says, not because it breaks off."""
    wrong = wrong_answers(exercise)
    assert len(wrong) >= 3 and None not in wrong
    for what, source in wrong.items():
        right, told = grade(exercise, source)
        assert not right, f"{exercise.name}: {what} is taken for right"
        assert "stops with" not in told, f"{exercise.name}: {what}: {told}"


def test_every_wrong_answer_has_its_exercise():
    known = {(e.notebook, e.name) for e in ALL}
    for path in (ROOT / "tests" / "wrong_answers").glob("*.py"):
        for node in ast.parse(path.read_text()).body[1:]:
            assert (path.stem, node.name) in known


def test_only_what_is_needed_is_run():
    cells = ["import math", "a = 1", "b = a + 1", "c = 5", "def f(x):\n    a = x\n    return b + a"]
    assert needed(cells, ["f(math.pi)"]) == ("import math", "a = 1", "b = a + 1", cells[-1])
    assert needed(["a = 1", "a = 2"], ["a"]) == ("a = 2",)
