"""A class is graded: solved, blank, mistaken and broken notebooks, and the grades read back."""

import csv
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from test_graders import wrong_answers

from minids.lab import checker, grading
from minids.lab.course import without_answers
from minids.lab.exercises import exercises

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "notebooks" / "09_all_together.ipynb"  # its answers are graded in no time
NAME = SOURCE.stem
EXERCISES, LEFT_OUT = (found := exercises(SOURCE))[:2], found[2:]  # two stand for four
MOST = sum(exercise.points for exercise in EXERCISES)

pytestmark = pytest.mark.skipif(not checker.forks(), reason="grading forks this process")


def notebook() -> nbformat.NotebookNode:
    """Return the solved notebook, of which two exercises are graded here."""
    nb = nbformat.read(SOURCE, 4)
    others = {f"{e.name}{what}" for e in LEFT_OUT for what in ("", "_check", "_test")}
    nb.cells = [c for c in nb.cells
                if c.metadata.get("nbgrader", {}).get("grade_id") not in others]
    return nb


def blank() -> nbformat.NotebookNode:
    return nbformat.reads(without_answers(nbformat.writes(notebook()).encode()).decode(), 4)


def cell_of(nb, name: str):
    """Return the cell of a grade_id."""
    return next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)


def answered(*sources: str) -> nbformat.NotebookNode:
    """Return the solved notebook with other answers to its first exercises."""
    nb = notebook()
    for exercise, source in zip(EXERCISES, sources, strict=False):
        cell_of(nb, exercise.name).source = source
    return nb


def without(*names: str) -> nbformat.NotebookNode:
    """Return the solved notebook without some cells."""
    nb = notebook()
    nb.cells = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") not in names]
    return nb


def other_kernel() -> nbformat.NotebookNode:
    nb = notebook()
    nb.metadata = {"kernelspec": {"name": "ir", "display_name": "R"}}
    return nb


def twice() -> nbformat.NotebookNode:
    """Each graded cell stands twice, the copies untouched."""
    nb = notebook()
    nb.cells += [c for c in blank().cells if "nbgrader" in c.metadata]
    for number, cell in enumerate(nb.cells):
        cell.id = f"{number:08}"
    return nb


def backward() -> nbformat.NotebookNode:
    nb = notebook()
    nb.cells.reverse()
    return nb


def softened() -> nbformat.NotebookNode:
    """A wrong answer, with a test that lets everything pass."""
    nb = answered(HEAD + "    return 0\n")
    cell_of(nb, f"{FIRST.name}_test").source = "pass"
    return nb


def with_a_helper() -> nbformat.NotebookNode:
    """A right answer that calls a function of a cell of its own, behind a magic line."""
    body = FIRST.solution.replace(f"def {FIRST.name}(", "def my_helper(")
    nb = answered(f"{HEAD}    return my_helper(step, warm, flat, end)\n")
    nb.cells.insert(40, new_code_cell("%time 1\n" + body))
    nb.cells.insert(3, new_code_cell("this is no Python"))
    return nb


def with_an_import() -> nbformat.NotebookNode:
    """A right answer with modules that the notebook imports and the exercise does not use."""
    line = "    ### BEGIN SOLUTION\n"
    return answered(FIRST.solution.replace(line, f"{line}    assert Path(str(torch.ones(1)))\n"))


def stripped() -> nbformat.NotebookNode:
    """All metadata is lost."""
    nb = notebook()
    for cell in nb.cells:
        cell.metadata = {}
    return nb


FIRST = EXERCISES[0]
HEAD = FIRST.solution[:FIRST.solution.index(":\n") + 2]
REST = MOST - FIRST.points
CLASS = {
    "solved": (notebook, MOST, ""),
    "blank": (blank, 0, "is not written yet"),
    "mistaken": (lambda: answered(next(iter(wrong_answers(FIRST).values()))), REST, "instead of"),
    "loops": (lambda: answered(HEAD + "    while True:\n        pass\n"), REST, "has not finished"),
    "loops_at_once": (lambda: answered(FIRST.solution + "\nimport os; os._exit(0)"), REST,
                      "ends Python itself"),
    "no_python": (lambda: answered(f"def {FIRST.name}(a:"), REST, "SyntaxError"),
    "renamed": (lambda: answered(FIRST.solution.replace(FIRST.name, "mine")), REST,
                f"no cell defines {FIRST.name}"),
    "no_tests": (lambda: without(*(f"{e.name}_{what}" for e in EXERCISES
                                   for what in ("check", "test"))), MOST,
                 f"the cell {FIRST.name}_test is missing: graded with the original"),
    "no_answer": (lambda: without(FIRST.name), REST, f"no cell defines {FIRST.name}"),
    "softened": (softened, REST, f"the cell {FIRST.name}_test was changed"),
    "twice": (twice, MOST, f"the cell {FIRST.name} is there 2 times"),
    "backward": (backward, MOST, ""), "stripped": (stripped, MOST, ""),
    "other_kernel": (other_kernel, MOST, "its kernel is &#x27;ir&#x27;"),
    "with_a_helper": (with_a_helper, MOST, ""),
    "no_json": ("not JSON {", 0, "is not a notebook"), "a_list": ("[1, 2]", 0, "is not a notebook"),
    "no_cells": ('{"worksheets": []}', 0, "is not a notebook"),
    "odd_cells": ('{"cells": [1, {"cell_type": "code", "source": 3}]}', 0, "is not a notebook"),
    "nothing": (None, 0, f"{NAME}.ipynb was not handed in"),
    "with_an_import": (with_an_import, MOST, ""),
    "solved_2": (notebook, MOST, "")}


SOME = ("solved blank mistaken loops loops_at_once no_python no_answer softened twice stripped "
        "with_a_helper no_json nothing").split()
OTHERS = ["solved", "mistaken", *(name for name in CLASS if name not in SOME)]


@pytest.fixture(scope="module", params=[
    pytest.param(SOME, id="some"), pytest.param(OTHERS, id="others", marks=pytest.mark.slow)])
def graded(request, tmp_path_factory) -> tuple[Path, dict[str, tuple]]:
    """The grades of a class, half of it in nbgrader's folders, and what they should be.

    test_whole_class.py has thirty students.
    """
    folder, class_ = tmp_path_factory.mktemp("class"), {name: CLASS[name] for name in request.param}
    (folder / "notebooks").mkdir()
    nbformat.write(notebook(), folder / "notebooks" / SOURCE.name)
    for i, (student, (made, *_)) in enumerate(class_.items()):
        place = folder / "in" / student / (NAME if i % 2 else ".")
        place.mkdir(parents=True)
        if callable(made):
            nbformat.write(made(), place / SOURCE.name)
        elif made:
            (place / SOURCE.name).write_text(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grading", "--submitted", str(folder / "in"),
                                    "--out", str(folder / "out"), "--jobs", "2"])
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # which it sets, and this takes back
        patch.setattr(grading, "ROOT", folder)
        patch.setattr(checker, "PATIENCE", 1.5)  # with a loop that never ends
        patch.chdir(folder)
        grading.main()
    return folder / "out", class_


def test_a_class_has_its_points(graded):
    folder, class_ = graded
    with open(folder / "grades.csv") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert {name: float(row["score"]) for name, row in rows.items()} == {
        name: points for name, (_, points, _) in class_.items()}
    assert {float(row["max_score"]) for row in rows.values()} == {MOST}
    assert {row["assignment"] for row in rows.values()} == {NAME}


def test_canvas_reads_the_same(graded):
    folder, class_ = graded
    with open(folder / "canvas.csv") as file:
        possible, *rows = csv.DictReader(file)
    assert possible["Student"].strip() == "Points Possible" and int(possible[NAME]) == MOST
    assert {row["SIS Login ID"]: int(row[NAME]) for row in rows} == {
        name: points for name, (_, points, _) in class_.items()}


def test_each_exercise_and_part_has_its_row(graded):
    folder, class_ = graded
    with open(folder / "exercises.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["notebook"] == NAME]
    assert len(rows) == len(class_) * len(EXERCISES)
    mistaken = {row["number"]: row for row in rows if row["student"] == "mistaken"}
    assert [row["number"] for row in rows if row["student"] == "solved"] == [
        exercise.number for exercise in EXERCISES] == ["1", "2"]
    assert mistaken["1"]["points"] == "0" and "instead of" in mistaken["1"]["told"]
    assert mistaken["2"]["points"] == mistaken["2"]["most"] and not mistaken["2"]["told"]


def test_the_page_says_why(graded):
    folder, class_ = graded
    for student, (_, points, why) in class_.items():
        page = (folder / "feedback" / f"{student}.html").read_text()
        assert f"{points} of {MOST} points" in page and why in page, student
        assert "Traceback" not in page and not re.search(r"<pre></pre>", page), student


def test_nbgraders_columns_are_its_own():
    export = pytest.importorskip("nbgrader.plugins.export")
    source = Path(export.__file__).read_text()
    listed = re.findall(r"['\"](\w+)['\"],?\n", source[source.index("keys = ["):])[:11]
    assert listed == grading.NBGRADER


def test_a_remark_on_a_cell_that_was_only_run_is_not_made(tmp_path):
    original, sent = (tmp_path / name / SOURCE.name for name in ("original", "sent"))
    for path, made in ((original, notebook), (sent, blank)):
        path.parent.mkdir()
        nbformat.write(made(), path)
    assert grading.read_submission("she", sent.parent, original).remarks == ()


@pytest.mark.parametrize("points, told, remarks, shown", [
    (0, "no cell defines square", ("no such file",), False),  # the remark says it all
    (0, "no cell defines square", (), True), (0, "gives 6 instead of 9", ("late",), True),
    (3, "no cell defines square", ("late",), True)])
def test_a_page_names_exercises_unless_its_remark_says_why_none_is_there(
        points, told, remarks, shown):
    marks = [grading.Mark("anna", "nb", "1", "square", points, 3, told),
             grading.Mark("anna", "other", "1", "cube", 2, 2, "")]
    page = grading.feedback("anna", marks, {"nb": remarks, "other": ()}).decode()
    assert (f"1, square: {points} of 3</h3>\n<pre>{told}</pre>" in page) == shown
    assert f"<h2>nb: {points} of 3</h2>" in page and "1, cube: 2 of 2" in page
    assert page.count("<p>") == len(remarks) and f"{points + 2} of 5" in page
