"""The whole way of an assignment, with nbgrader's own programs: laid out, handed out without
answers, handed in, graded. Solved it gets all points; of one that is begun, what is right has its
points, and neither what is wrong nor what is untouched has any.

The notebooks train models, and grading runs all cells. So all but the first are cut to the cells
that their exercises need; `pytest -m exhaustive tests/lab/test_course.py` grades them whole, in a
quarter of an hour.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from test_graders import wrong_answers
from training_runs import Said, run_main

from minids.lab import course as program
from minids.lab import handouts
from minids.lab.course import without_answers
from minids.lab.exercises import HIDDEN, SOLUTION, exercises

if not find_spec("nbgrader"):  # imported by what needs it: it takes seconds
    pytest.skip("nbgrader is not installed: pip install nbgrader", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
STEMS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


@pytest.fixture(scope="class")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository, so that nothing here writes into the real one."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("minids", "notebooks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "figures").mkdir()
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a Python module in a folder, one thread, with settings of its own."""
    own = {f"JUPYTER_{kind}_DIR": str(folder / ".jupyter" / kind) for kind in
           ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=1200)


def laid_out(folder: Path, *flags: str) -> Said:
    """Run `minids.lab.course` of the clone in a folder, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(program, "ROOT", folder)
        patch.setattr(sys, "path", [*sys.path])  # a first cell puts its clone on it
        return run_main(program, *flags)


def nbgrader(course: Path, *command: str) -> None:
    """Run one of nbgrader's programs; its log is shown where it fails."""
    done = run(course, "nbgrader", *command)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="class")
def course(clone) -> Path:
    """The folder that `minids.lab.course` lays out."""
    done = laid_out(clone, "--out", "course")
    assert (done.status, done.err) == (0, "")
    return clone / "course"


def cut(path: Path) -> None:
    """Leave of a notebook the first cell, the exercises, and what they need."""
    nb, needed = nbformat.read(path, 4), {"# The same first cell"}
    for exercise in exercises(path):
        needed |= set(exercise.needs)
    nb.cells = [cell for cell in nb.cells if cell.cell_type == "code" and
                ("nbgrader" in cell.metadata or cell.source in needed
                 or cell.source.startswith("# The same first cell"))]
    nbformat.write(nb, path)


def blank(path: Path) -> nbformat.NotebookNode:
    """A notebook as the package, without nbgrader, takes its answers out."""
    return nbformat.reads(without_answers(path.read_bytes()).decode(), 4)


def hand_in(course: Path, student: str, stem: str, nb) -> None:
    """Put a student's notebook where nbgrader looks for it."""
    place = course / "submitted" / student / stem / f"{stem}.ipynb"
    place.parent.mkdir(parents=True)
    nbformat.write(nb, place)


def begun(path: Path, release) -> nbformat.NotebookNode:
    """The released notebook with a right answer to the first exercise, a wrong one to the last."""
    nb, (first, *_, last) = copy.deepcopy(release), exercises(path)
    answers = {first.name: first.solution, last.name: next(iter(wrong_answers(last).values()))}
    for cell in nb.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = answers.get(name, cell.source)
    return nb


def scores(course: Path, stem: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Points and possible points of each exercise's test, by student."""
    from nbgrader.api import Gradebook
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        return {sent.student.id: {grade.cell.name: (grade.score, grade.max_score)
                                  for grade in sent.notebooks[0].grades}
                for sent in book.assignment_submissions(stem)}


def drive(course: Path, stem: str, whole: bool = False) -> None:
    """Hand out, hand in twice, grade, and look at the points."""
    source = course / "source" / stem / f"{stem}.ipynb"
    if not whole:
        cut(source)
    count = len(exercises(source))
    nbgrader(course, "generate_assignment", stem, "--create")
    release = nbformat.read(course / "release" / stem / f"{stem}.ipynb", 4)
    nbformat.validate(release)
    sources = [cell.source for cell in release.cells]
    assert sources == [cell.source for cell in blank(source).cells]
    text = "\n".join(sources)
    assert "BEGIN SOLUTION" not in text and "HIDDEN" not in text
    assert text.count("# Write your answer here.\n") == count
    assert not any(HIDDEN.search(exercise.test)[1] in text for exercise in exercises(source))

    hand_in(course, "solved", stem, nbformat.read(source, 4))
    hand_in(course, "begun", stem, begun(source, release))
    nbgrader(course, "autograde", stem, "--create")
    found = scores(course, stem)
    wanted = [cell.metadata.nbgrader.points for cell in nbformat.read(source, 4).cells
              if cell.metadata.get("nbgrader", {}).get("grade")]
    assert sorted(possible for _, possible in found["solved"].values()) == sorted(wanted)
    assert all(got == possible for got, possible in found["solved"].values())
    first = f"{exercises(source)[0].name}_test"
    assert found["begun"][first] == found["solved"][first]
    assert all(got == 0 for name, (got, _) in found["begun"].items() if name != first)


@pytest.mark.slow
class TestEvenNotebooks:
    """Two classes, so that two workers share the time. The first notebook is graded whole."""

    @pytest.mark.parametrize("stem", STEMS[::2])
    def test_the_whole_way(self, course, stem):
        drive(course, stem, whole=stem == STEMS[0])


@pytest.mark.slow
class TestOddNotebooks:
    """The others, and what they sum up to."""

    @pytest.mark.parametrize("stem", STEMS[1::2])
    def test_the_whole_way(self, course, stem):
        drive(course, stem)

    def test_grades_are_exported(self, course):
        nbgrader(course, "export")
        head, *lines = (course / "grades.csv").read_text().splitlines()
        assert head.startswith("assignment,") and len(lines) == 2 * len(STEMS[1::2])


@pytest.mark.exhaustive
class TestWholeNotebooks:
    """With all of their cells, as a course grades them."""

    @pytest.mark.parametrize("stem", STEMS)
    def test_the_whole_way(self, course, stem):
        drive(course, stem, whole=True)


class TestLayOut:
    """What `minids.lab.course` writes and says."""

    def test_points_are_told(self, clone):
        done = run(clone, "minids.lab.course", "--out", "laid")
        rows = [line.split() for line in done.stdout.splitlines()[:len(STEMS) + 1]]
        assert [row[0] for row in rows] == [*STEMS, "all"]
        assert sum(int(row[3]) for row in rows[:-1]) == int(rows[-1][3])
        same = [(clone / "laid" / "source" / stem / f"{stem}.ipynb").read_bytes()
                == (ROOT / "notebooks" / f"{stem}.ipynb").read_bytes() for stem in STEMS]
        assert all(same)

    def test_what_was_changed_is_kept(self, clone):
        assert laid_out(clone, "--out", "kept").status == 0
        assert laid_out(clone, "--out", "kept").status == 0
        changed = clone / "kept" / "source" / STEMS[3] / f"{STEMS[3]}.ipynb"
        changed.write_text("mine")
        done = laid_out(clone, "--out", "kept")
        assert done.status == 2 and done.err.count("\n") == 1 and "--force" in done.err
        assert changed.read_text() == "mine"
        assert laid_out(clone, "--out", "kept", "--force").status == 0
        assert changed.read_text() != "mine"

    def test_notebooks_without_answers(self, clone):
        done = laid_out(clone, "--out", "alone", "--blank")
        assert (done.status, done.err) == (0, "")
        assert done.out.splitlines()[-1] == "next: jupyter lab alone/blank"
        assert [path.name for path in (clone / "alone").iterdir()] == ["blank"]
        for stem in STEMS:
            path = clone / "alone" / "blank" / f"{stem}.ipynb"
            nb = nbformat.read(path, 4)
            nbformat.validate(nb)
            code = [cell for cell in nb.cells if cell.cell_type == "code"]
            assert not any(cell.outputs or cell.execution_count for cell in code)
            assert path.read_text().count("raise NotImplementedError()") >= 3
            assert not any(word in path.read_text() for word in ("SOLUTION", "HIDDEN"))

    def test_a_learners_work_is_kept(self, clone):
        assert laid_out(clone, "--out", "mine", "--blank").status == 0
        path = clone / "mine" / "blank" / f"{STEMS[0]}.ipynb"
        path.write_text("my work")
        done = laid_out(clone, "--out", "mine", "--blank")
        assert done.status == 2 and done.err.count("\n") == 1 and "--force" in done.err
        assert path.read_text() == "my work"
        assert laid_out(clone, "--out", "mine").status == 0
        assert path.read_text() == "my work"

    @pytest.mark.parametrize("out", ["/elsewhere", "..", ".", "notebooks/course", "minids"])
    def test_a_folder_where_it_cannot_be_is_refused(self, clone, out):
        done = laid_out(clone, "--out", out)
        assert done.status == 2 and done.out == ""
        assert done.err.startswith(f"python -m minids.lab.course: out = {out!r} is not valid")
        assert done.err.count("\n") == 1


class TestStudents:
    """The repository that `--students` makes."""

    def test_it_holds_no_answer(self, clone, tmp_path):
        """Neither a solution nor a hidden test nor a wrong answer, in any file of text."""
        done = laid_out(clone, "--students", str(tmp_path / "handed"))
        assert (done.status, done.err) == (0, "")
        files = [path for path in (tmp_path / "handed").rglob("*") if path.is_file()]
        no_text = {".ipynb", ".png", ".gif", ".safetensors"}  # cells are read below
        text = "\n".join(path.read_text("utf-8", "replace") for path in files
                         if path.suffix not in no_text and ".git" not in path.parts)
        cells = "\n\n".join(cell.source for path in files if path.suffix == ".ipynb"
                            for cell in nbformat.read(path, 4).cells)
        assert not re.search("### BEGIN (SOLUTION|HIDDEN)|def second_way", cells)
        secrets = []
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            for exercise in exercises(path):
                secrets += [SOLUTION.search(exercise.solution)[0], HIDDEN.search(exercise.test)[1],
                            *wrong_answers(exercise).values()]
        assert len(secrets) > 500
        lines = {*text.splitlines(), *cells.splitlines()}  # most have one that no file has
        assert not [secret for secret in secrets if lines.issuperset(secret.splitlines()[1:-1])
                    and (secret in text or secret in cells)]
        assert {path.relative_to(tmp_path / "handed").parts[0] for path in files} <= {
            "minids", "data", "notebooks", ".git", "figures"}
        names = [path.name for path in (tmp_path / "handed/notebooks").glob("*.ipynb")]
        assert sorted(names) == [f"{stem}.ipynb" for stem in STEMS]

    def test_handouts_alone_are_written(self, clone, tmp_path, monkeypatch):
        """test_handouts.py checks what they hold."""
        asked = []
        monkeypatch.setattr(handouts, "write_handouts", lambda *given: asked.append(given))
        done = laid_out(clone, "--handouts", str(tmp_path / "pages"))
        assert (done.status, done.err) == (0, "")
        assert done.out.splitlines()[-1].endswith(f"/{STEMS[5]}.html, and print it")
        [(folder, paths)] = asked
        assert folder == tmp_path / "pages" and [path.stem for path in paths] == STEMS

    def test_a_diff_tells_two_variants_apart(self, tmp_path):
        """Names, orders and numbers, and nothing that a student must not see."""
        shutil.copytree(ROOT / "minids", tmp_path / "clone" / "minids")
        (tmp_path / "clone" / "notebooks").mkdir()
        shutil.copy(ROOT / "notebooks" / f"{STEMS[13]}.ipynb", tmp_path / "clone" / "notebooks")
        done = laid_out(tmp_path / "clone", "--diff", "0,2027")
        assert done.status == 0, done.err
        lines = done.out.splitlines()
        assert lines[:2] == [f"--- {STEMS[13]} of variant 0", f"+++ {STEMS[13]} of variant 2027"]
        gone, come = ([line for line in lines[2:] if line[0] == sign] for sign in "-+")
        for exercise in exercises(ROOT / "notebooks" / f"{STEMS[13]}.ipynb"):
            assert any(line.startswith(f"-def {exercise.name}(") for line in gone)
            assert any(line.startswith(f"+def {exercise.name}_2027(") for line in come)
        assert any("numbers of 2027" in line for line in come)
        assert not re.search("SOLUTION|HIDDEN|second_way", done.out)
        same = laid_out(tmp_path / "clone", "--diff", "0,0")
        assert (same.status, same.out.strip()) == (0, "")

    @pytest.mark.parametrize("seeds", ["2027", "1,2,3", "1,-2", "1,two", "1,10000", ","])
    def test_what_are_no_two_seeds_is_refused(self, seeds):
        done = laid_out(ROOT, "--diff", seeds)
        assert done.status == 2 and done.err.count("\n") == 1
        assert "two seeds between 0 and 9999" in done.err

    @pytest.mark.slow
    def test_a_variant_holds_neither_answers_nor_last_years_names(self, clone, tmp_path):
        done = laid_out(clone, "--students", str(tmp_path / "handed"), "--variant", "2027")
        assert done.status == 0, done.err
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            cells = nbformat.read(tmp_path / "handed" / "notebooks" / path.name, 4).cells
            text = "\n".join(cell.source for cell in cells)
            assert "SOLUTION" not in text and "HIDDEN" not in text
            for exercise in exercises(path):
                assert f"def {exercise.name}_2027(" in text
                assert f"def {exercise.name}(" not in text

    def test_run_all_goes_on_behind_an_unsolved_exercise(self):
        nb = blank(ROOT / "notebooks" / f"{STEMS[0]}.ipynb")
        for cell in nb.cells:
            graded = cell.metadata.get("nbgrader", {}).get("grade", False)
            assert graded == ("raises-exception" in cell.metadata.get("tags", []))

    @pytest.mark.slow
    def test_a_blank_notebook_runs(self, clone, tmp_path):
        laid_out(clone, "--students", str(tmp_path / "handed"))
        done = run(tmp_path / "handed" / "notebooks", "jupyter", "nbconvert", "--to", "notebook",
                   "--execute", "--output", "ran", f"{STEMS[0]}.ipynb")
        assert done.returncode == 0, done.stderr
        assert "is not written yet" in (tmp_path / "handed/notebooks/ran.ipynb").read_text()

    @pytest.mark.parametrize("place", ["", "inside", "notebooks/x"])
    def test_a_place_where_it_cannot_be_is_refused(self, clone, place):
        done = laid_out(clone, "--students", str(clone / place))
        assert done.status == 2 and done.out == "" and done.err.count("\n") == 1
        assert "students = " in done.err
