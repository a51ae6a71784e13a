"""Check that no wrong answer gets points: not an empty one, not a memorised one, and none of
those that real projects have shipped (tests/wrong_answers/); and that right ones in other styles
do (tests/right_answers/).

An exercise is graded as in the notebook, with the cells that it needs, and no others. Solutions and
stubs are graded at each run, all other answers with `-m slow`.
"""

import ast
import contextlib
import io
import json
import os
import re
from functools import cache
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from minids.lab import lesson
from minids.lab.exercises import HIDDEN, SOLUTION, Exercise, exercises, needed

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALL = [exercise for path in PATHS for exercise in exercises(path)]
# What these need takes half a second and more; their notebooks grade them in every run.
HEAVY = {"attention_numbers", "mtp_numbers", "nothing_idle", "own_group", "rotary_attention",
         "same_alone", "learns_the_reply", "same_on_any_ranks"}
NAMED = [(f"{e.notebook[:2]}-{e.name}", e) for e in ALL]
each_exercise = pytest.mark.parametrize("exercise", ALL, ids=[name for name, _ in NAMED])
quick_exercises = pytest.mark.parametrize("exercise", [
    pytest.param(e, id=name, marks=pytest.mark.slow if e.name in HEAVY else ())
    for name, e in NAMED])


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


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Wait longer than a check does: how busy the machine is must not decide."""
    monkeypatch.setattr("minids.lab.checker.PATIENCE", 60.0)


@pytest.fixture
def alone(monkeypatch):
    """Grade without the forked copy, as elsewhere than on Linux.

    A fork takes longer than all of these answers. What it meets: tests/lab/test_checker.py, and the
    notebooks themselves, which grade their solutions with it.
    """
    monkeypatch.setattr("minids.lab.checker.forks", lambda: False)


def grade(exercise: Exercise, answer: str) -> tuple[bool, str]:
    """Return whether an answer gets its points, and what check and grade tell the learner."""
    space, told = dict(stage(exercise)), io.StringIO()
    exec(answer, space)
    with contextlib.redirect_stdout(told):
        exec(exercise.check, space)
    try:
        exec(exercise.test, space)
    except AssertionError as error:
        assert str(error), "what only the grade knows says nothing"
        said = told.getvalue()
        return False, said if "is right in" not in said else f"{said}{error}"
    return True, told.getvalue()


def wrong_answers(exercise: Exercise, kind: str = "wrong_answers") -> dict[str, str]:
    """Return the wrong answers to one exercise: what is wrong -> the function's source."""
    path = ROOT / "tests" / kind / f"{exercise.notebook}.py"
    source = path.read_text() if path.is_file() else ""
    return {ast.get_docstring(node): ast.get_source_segment(source, node)
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name == exercise.name}


@quick_exercises
def test_the_solution_gets_the_points(exercise, alone):
    right, told = grade(exercise, exercise.solution)
    assert right and re.fullmatch(rf"{exercise.name} is right in (\d) of \1 cases\n", told), told


@quick_exercises
def test_the_untouched_stub_gets_none(exercise, alone):
    stub = SOLUTION.sub(r"\1raise NotImplementedError()", exercise.solution)
    assert stub != exercise.solution
    assert grade(exercise, stub) == (False, f"{exercise.name} is not written yet\n")


@pytest.mark.slow
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
            exec(HIDDEN.search(exercise.test)[1], space)


@pytest.mark.slow
@each_exercise
def test_what_is_no_answer_is_told(exercise, alone):
    """None, NaN, a string, an error: named in words. (Endless loops: tests/lab/test_checker.py.)"""
    head = exercise.solution[:exercise.solution.index(":\n") + 1]
    for body, word in [("return None", "None"), ("return float('nan')", "nan"),
                       ("return 'x'", "'x'"), ("raise ValueError('no')", "ValueError: no")]:
        right, told = grade(exercise, f"{head}\n    {body}")
        assert not right and word in told and "Traceback" not in told


@pytest.mark.slow
@each_exercise
def test_an_answer_from_the_package_gets_none(exercise, alone):
    """Even the right one."""
    head, line, rest = exercise.solution.partition("    ### BEGIN SOLUTION\n")
    right, told = grade(exercise, f"{head}{line}    import minids.model.transformer\n{rest}")
    assert not right and told == (f"{exercise.name} takes minids.model.transformer from minids, "
                                  "which knows the answer: write it yourself\n")


@pytest.mark.slow
@each_exercise
def test_right_answers_in_other_styles_get_the_points(exercise, alone):
    for what, source in wrong_answers(exercise, "right_answers").items():
        right, told = grade(exercise, source)
        assert right, f"{exercise.name}: {what} is refused: {told}"


@pytest.mark.slow
@each_exercise
def test_a_second_way_comes_to_the_same(exercise):
    """What judges is judged: cases that hypothesis draws, and two independent solutions."""
    space = dict(stage(exercise))
    with contextlib.redirect_stdout(io.StringIO()):
        for source in (exercise.solution, exercise.check, exercise.test):
            exec(source, space)
    solved = space[exercise.name]
    if "def case_of(" not in exercise.test:
        hidden = HIDDEN.search(exercise.test)[1]
        assert re.search(r"\bTrue, ", hidden) and "False, " in hidden
        return

    @hypothesis.settings(derandomize=True, max_examples=60, database=None, deadline=None)
    @hypothesis.given(strategies.randoms(use_true_random=True))
    def agree(dice):
        case = space["case_of"](dice)
        wanted = space["second_way"](*case)
        assert lesson.verdict(solved, case, wanted)[0] == ""

    agree()


@pytest.mark.slow
@each_exercise
def test_wrong_answers_get_none(exercise, alone):
    """A wrong answer is refused for what it says, not because it breaks off."""
    wrong = wrong_answers(exercise)
    assert len(wrong) >= 3 and None not in wrong
    for what, source in wrong.items():
        right, told = grade(exercise, source)
        assert not right, f"{exercise.name}: {what} is taken for right"
        visible = told.split(" is right in ")[0]
        assert "stops with" not in visible, f"{exercise.name}: {what}: {told}"


@pytest.mark.slow
def test_the_check_names_the_right_mistake(alone):
    """`python tests/known_mistakes.py` writes the names; a new mistake only lacks its own."""
    import known_mistakes
    written, made = json.loads(known_mistakes.FILE.read_text("utf-8")), known_mistakes.table()
    both = written.keys() & made.keys()
    assert len(both) > 250 and {key: written[key] for key in both} == {
        key: made[key] for key in both}


def test_every_wrong_answer_has_its_exercise():
    known = {(e.notebook, e.name) for e in ALL}
    for path in (ROOT / "tests").glob("*_answers/*.py"):
        for node in ast.parse(path.read_text()).body[1:]:
            assert (path.stem, node.name) in known


def test_only_what_is_needed_is_run():
    cells = ["import math", "a = 1", "b = a + 1", "c = 5", "def f(x):\n    a = x\n    return b + a"]
    assert needed(cells, ["f(math.pi)"]) == ("import math", "a = 1", "b = a + 1", cells[-1])
    assert needed(["a = 1", "a = 2"], ["a"]) == ("a = 2",)
