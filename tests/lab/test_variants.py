"""A variant of the exercises: its own solutions pass, last year's answers do not fit."""

import ast
import json
import os
from pathlib import Path

import pytest
import test_graders
from test_graders import PATHS, alone, patient  # noqa: F401  (fixtures)

from minids.lab import grading, variants
from minids.lab.exercises import exercises

SEED = 2027
FAST = [path for path in PATHS if path.stem[:2] in ("00", "07", "13")]  # need no trained model


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Return the varied copy of a notebook."""
    folder, made = tmp_path_factory.mktemp("varied"), {}

    def vary(path: Path) -> Path:
        if path not in made:
            here = Path.cwd()
            os.chdir(path.parent)
            try:
                made[path] = folder / path.name
                made[path].write_bytes(variants.vary(path, SEED))
            finally:
                os.chdir(here)
        return made[path]

    return vary


def which(path: Path):
    """Return a notebook as a case; 00's exercises take seconds, and its variant is read below."""
    return pytest.param(path, id=path.stem,
                        marks=() if path in FAST[1:] else pytest.mark.slow)


@pytest.mark.parametrize("path", [*map(which, PATHS)])
def test_new_solutions_pass_and_old_answers_do_not_fit(path, varied, alone):  # noqa: F811
    old, new = exercises(path), exercises(varied(path))
    assert [e.points for e in old] == [e.points for e in new]
    for before, after in zip(old, new, strict=True):
        assert after.name == f"{before.name}_{SEED}"
        right, told = test_graders.grade(after, after.solution)
        assert right, told
        with pytest.raises(NameError, match=after.name):  # the old answer defines another name
            test_graders.grade(after, before.solution.replace(after.name, before.name))


def test_a_renamed_old_answer_fails_where_the_order_counts(varied, alone):  # noqa: F811
    """Not everywhere: the factors of a product may change places."""
    turned, refused = 0, 0
    for path in FAST:
        for before, after in zip(exercises(path), exercises(varied(path)), strict=True):
            if f"{after.name}.order = " in after.check:
                renamed = before.solution.replace(f"def {before.name}(", f"def {after.name}(")
                turned, refused = turned + 1, refused + (not test_graders.grade(after, renamed)[0])
    assert refused >= 0.75 * turned > 0


def test_most_exercises_get_another_order_and_new_numbers(varied):
    cells = [exercise.check for path in FAST for exercise in exercises(varied(path))]
    assert sum(".order = " in cell for cell in cells) >= 6
    assert sum(f"numbers of {SEED}" in cell for cell in cells) >= 6
    tests = [exercise.test for path in FAST for exercise in exercises(varied(path))]
    assert sum(f"seed={SEED}" in cell for cell in tests) >= 6


def test_a_seed_gives_the_same_variant_and_another_one_another(varied):
    path = FAST[-1]
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        assert variants.vary(path, SEED) == varied(path).read_bytes()
        assert variants.vary(path, SEED + 1) != varied(path).read_bytes()
    finally:
        os.chdir(here)


def test_the_notebook_around_the_exercises_stays(varied):
    before, after = (json.loads(path.read_bytes()) for path in (FAST[0], varied(FAST[0])))
    pairs = list(zip(before["cells"], after["cells"], strict=True))
    changed = [a for a, b in pairs if "".join(a["source"]) != "".join(b["source"])]
    assert changed and all("nbgrader" in a["metadata"] for a in changed
                           if a["cell_type"] == "code")
    for _, cell in pairs:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))


def test_prose_asks_for_the_new_names(varied):
    old, new = ("".join("".join(cell["source"]) for cell in json.loads(path.read_bytes())["cells"]
                        if cell["cell_type"] == "markdown") for path in (FAST[1], varied(FAST[1])))
    assert "`replacement(" in old and "`replacement(" not in new
    assert f"`replacement_{SEED}(" in new


def test_an_answer_of_another_year_is_named():
    told = grading.judge(exercises(FAST[0])[0], "def attention_numbers_2026(a):\n    return 1\n",
                         [], {})
    assert told == ("no cell defines attention_numbers; its cell defines "
                    "attention_numbers_2026, of another variant")
