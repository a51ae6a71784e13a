"""A class of thirty hands in every notebook: solved, blank, mistaken and broken ones are graded.

    pytest -m exhaustive tests/lab/test_whole_class.py -s

prints the seconds per submission. tests/lab/test_grading.py has what else may be odd about one.
"""

import csv
import re
import sys
import time
from pathlib import Path

import nbformat
import pytest
from test_graders import wrong_answers

from minids.lab import checker, grading
from minids.lab.course import without_answers
from minids.lab.exercises import exercises

PATHS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
pytestmark = [pytest.mark.exhaustive,
              pytest.mark.skipif(not checker.forks(), reason="grading forks this process")]


def changed(path: Path, answers: dict[str, str], gone: str = "") -> nbformat.NotebookNode:
    """Return the solved notebook with other answers, and without one of them."""
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = answers.get(name, cell.source)
    nb.cells = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id", "-") != gone]
    return nb


def class_of(path: Path) -> dict[str, tuple]:
    """Return thirty students: name -> (what is handed in, names that get no points)."""
    found = exercises(path)
    names = [exercise.name for exercise in found]
    blank = nbformat.reads(without_answers(path.read_bytes()).decode(), 4)
    made = {f"solved_{i}": (changed(path, {}), []) for i in range(10)}
    made |= {f"blank_{i}": (blank, names) for i in range(4)}
    for i in range(10):  # one wrong answer each, to another exercise
        exercise = found[i % len(found)]
        wrong = [*wrong_answers(exercise).values()][i // len(found)]
        made[f"mistaken_{i}"] = (changed(path, {exercise.name: wrong}), [exercise.name])
    last = found[-1]
    head = last.solution[:last.solution.index(":\n") + 2]
    for name, answer in {"loops": f"{head}    while True:\n        pass\n",
                         "exits": f"{head}    import os\n    os._exit(0)\n",
                         "no_python": head, "grows": f"{head}    x = [0]\n    while True:\n"
                         "        x = x + x\n"}.items():
        made[name] = (changed(path, {last.name: answer}), [last.name])
    return made | {"deleted": (changed(path, {}, last.name), [last.name]),
                   "no_json": ("not JSON {", names)}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_thirty_are_graded_and_the_tables_agree(path, tmp_path, monkeypatch):
    class_ = class_of(path)
    assert len(class_) == 30
    for student, (made, _) in class_.items():
        place = tmp_path / "in" / student / path.name
        place.parent.mkdir(parents=True)
        if isinstance(made, str):
            place.write_text(made)
        else:
            nbformat.write(made, place)
    monkeypatch.setattr(sys, "argv", ["grading", "--submitted", str(tmp_path / "in"),
                                      "--out", str(tmp_path / "out"), "--jobs", "2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    grading.main()
    print(f"{path.stem}: {(time.monotonic() - start) / len(class_):.2f} s per submission")

    points = {exercise.name: exercise.points for exercise in exercises(path)}
    wanted = {student: sum(points.values()) - sum(points[name] for name in lost)
              for student, (_, lost) in class_.items()}
    rows = {name: list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open()))
            for name in ("grades", "canvas", "exercises")}
    told = {(row["student"], row["exercise"]): row for row in rows["exercises"]}
    lost = {student: [name for name in points if told[student, name]["points"] == "0"]
            for student in class_}
    assert lost == {student: names for student, (_, names) in class_.items()}
    assert all(row["told"] for row in rows["exercises"] if row["points"] == "0")
    assert {row["student_id"]: float(row["score"]) for row in rows["grades"]} == wanted
    assert {row["SIS Login ID"]: int(row[path.stem]) for row in rows["canvas"][1:]} == wanted
    for student, most in wanted.items():
        page = (tmp_path / "out" / "feedback" / f"{student}.html").read_text()
        assert re.search(rf"<h1>{student}: {most} of {sum(points.values())} points</h1>", page)
