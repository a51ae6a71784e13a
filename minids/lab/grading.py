"""Grade a class: points, feedback pages, and grades for nbgrader and Canvas.

    python -m minids.lab.grading --submitted runs/course/submitted --out runs/course/grades

Submissions are NAME/NOTEBOOK.ipynb or nbgrader's NAME/NOTEBOOK/NOTEBOOK.ipynb. Only the exercises
are judged, with the tests of notebooks/ and never those of the submission: the cells that they need
run once, and every submission is a forked copy of that. Needs Linux.
"""

import ast
import builtins
import contextlib
import csv
import html
import io
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, demand, option
from minids.base.files import write_whole
from minids.lab import lesson
from minids.lab.checker import LATE, Copy
from minids.lab.exercises import Exercise, code_cells, exercises, names, needed, staged
from minids.lab.variants import vary

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 20.0  # seconds that one exercise of one submission may take; most take a tenth of one
NBGRADER = ("assignment duedate timestamp student_id last_name first_name email raw_score "
            "late_submission_penalty score max_score").split()
CANVAS = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"]
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em }}
pre {{ white-space: pre-wrap; background: #f4f4f4; padding: .5em }}</style>
<h1>{name}: {points} of {most} points</h1>
{body}
</html>
"""


@dataclass(frozen=True)
class GradingArgs(Settings):
    """Settings of grading."""

    submitted: str = option("runs/course/submitted", "folder that has a folder for each student")
    out: str = option("runs/course/grades", "folder for the grades and the feedback", folder=True)
    jobs: int = option(0, "submissions at a time; 0: one for each core", low=0)
    variant: int = option(0, "seed of the variant that was handed out; 0: none", low=0, high=9999)

    def __post_init__(self):
        super().__post_init__()
        demand("submitted", self.submitted, Path(self.submitted).is_dir(), "a folder that is there")


@dataclass(frozen=True)
class Submission:
    """A student's notebook: code cells as (grade_id, source), and what was odd about it."""

    student: str
    cells: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """A student's points for an exercise or a part of one, the most they could get, and why.

    number: as the task has it, 5a for a part
    """

    student: str
    notebook: str
    number: str
    exercise: str
    points: int
    most: int
    told: str


def read_submission(student: str, folder: Path, source: Path) -> Submission:
    """Read what a student handed in of one notebook; whatever is odd becomes a remark."""
    places = [folder / source.stem / source.name, folder / source.name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return Submission(student, (), (f"{source.name} was not handed in",))
    try:
        nb = json.loads(path.read_bytes())
        cells = [(str(meta.get("grade_id", "")), text) for meta, text in code_cells(nb)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Submission(student, (), (f"{source.name} is not a notebook: {error}"[:300],))
    kernel = "python3"
    with contextlib.suppress(AttributeError, TypeError):
        kernel = nb["metadata"].get("kernelspec", {}).get("name", kernel)
    remarks = [] if kernel == "python3" else [f"its kernel is {kernel!r}: graded as Python"]
    ids = [grade_id for grade_id, _ in cells if grade_id]
    locked = {meta["grade_id"]: text for meta, text in code_cells(json.loads(source.read_bytes()))
              if meta.get("locked")}
    sent = dict(cells)
    for name, text in locked.items():
        visible = text.split("### BEGIN HIDDEN TESTS")[0].strip()
        if name not in sent:
            remarks.append(f"the cell {name} is missing: graded with the original")
        elif sent[name].strip() not in (visible, text.strip()):
            remarks.append(f"the cell {name} was changed: graded with the original")
    remarks += [f"the cell {name} is there {ids.count(name)} times"
                for name in dict.fromkeys(ids) if ids.count(name) > 1]
    return Submission(student, tuple(cells), tuple(remarks))


def defines(source: str, name: str) -> bool:
    """Return whether a cell defines a function or variable of this name, at its top."""
    with contextlib.suppress(SyntaxError, ValueError):
        return any(getattr(node, "name", "") == name or isinstance(node, ast.Assign)
                   and any(getattr(target, "id", "") == name for target in node.targets)
                   for node in ast.parse(source).body)
    return False


def answer_to(exercise: Exercise, sent: Submission) -> str:
    """Return the cell that answers an exercise, "" if there is none.

    It is known by nbgrader's metadata, and where these are lost by the function that it defines;
    of several that were written the last counts.
    """
    cells = [text for _, text in sent.cells]
    own = [text for grade_id, text in sent.cells if grade_id == exercise.name]
    if not any(defines(text, exercise.name) for text in own):
        own = [text for text in cells if defines(text, exercise.name)] or own
    written = [text for text in own if "raise NotImplementedError()" not in text]
    return (written or own or [""])[-1]


def lent(text: str) -> str:
    """Return what an answer may use of a given cell: imports, and functions that stand alone."""
    body, imports = ast.parse(text).body, ast.Import | ast.ImportFrom
    alone = all(isinstance(node, imports) or isinstance(node, ast.FunctionDef)
                and not (node.args.defaults or node.decorator_list) for node in body)
    return text if alone else "\n".join(ast.unparse(n) for n in body if isinstance(n, imports))


def helpers(answer: str, sent: Submission, given: set[str]) -> list[str]:
    """Return the cells that the answer needs, in order: the student's own, and imports."""
    own = []
    for grade_id, text in sent.cells:
        text = "\n".join(line for line in text.splitlines() if line.lstrip()[:1] not in ("%", "!"))
        with contextlib.suppress(SyntaxError, ValueError):
            ast.parse(text)
            if text != answer and not grade_id:
                own.append(lent(text) if text in given else text)
    with contextlib.suppress(SyntaxError, ValueError):
        return list(needed(own, [answer]))
    return []


def other_variant(name: str, answer: str) -> str:
    """Return which other variant of an exercise an answer defines, in words."""
    base = re.sub(r"_\d{1,4}$", "", name)
    found = re.search(rf"^def ({base}(?:_\d+)?)\(", answer, re.M)
    return f"; its cell defines {found[1]}, of another variant" if found else ""


def lend(earlier: list[str], cells: list[str], space: dict) -> None:
    """Add what an answer uses of the notebook and the exercise does not, such as an import.

    earlier: the notebook's cells before the exercise; names that are there stay as they are
    """
    used = set()
    for cell in cells:
        with contextlib.suppress(SyntaxError, ValueError):
            used |= names(cell)[1]
    missing = sorted(used - space.keys() - set(dir(builtins)))
    found = dict(space)
    for text in needed(earlier, ["\n".join(missing)]):
        with contextlib.suppress(Exception):  # the answer will say what it lacks
            exec(compile(text, "notebook", "exec"), found)
    space |= {name: found[name] for name in missing if name in found}


def judge(exercise: Exercise, answer: str, before: list[str], space: dict,
          earlier: Sequence[str] = ()) -> str:
    """Return what is wrong with an answer, "" if it gets its points; in a copy of the process."""
    if not answer.strip():
        return f"no cell defines {exercise.name}{other_variant(exercise.name, answer)}"
    with contextlib.redirect_stdout(io.StringIO()):
        lend(list(earlier), [*before, answer], space)
    for text in [*before, answer]:
        try:
            exec(compile(text, "answer", "exec"), space)
        except BaseException as error:
            return f"the cell stops with {type(error).__name__}: {error}"
    if exercise.name not in space:
        return f"no cell defines {exercise.name}{other_variant(exercise.name, answer)}"
    space |= {name: getattr(lesson, name) for name in ("drawn", "grade", "review")}
    try:
        for text in (exercise.check, exercise.test):
            exec(compile(text, "test", "exec"), space)
    except AssertionError as error:
        return str(error) or "a case of the grade is wrong"
    except BaseException as error:
        return f"the test stops with {type(error).__name__}: {error}"
    return ""


def grade_notebook(path: Path, class_: list[Submission], jobs: int, bar: tqdm) -> list[Mark]:
    """Grade all submissions of one notebook, `jobs` copies at a time; bar: moves by one each."""
    cells = code_cells(json.loads(path.read_bytes()))
    given, marks = {text for _, text in cells}, []

    def finish(copy: Copy, sent: Submission) -> None:
        values, fate = copy.close()
        found = [value for kind, value in values if kind == "judged"]
        told = found[0] if found else "takes too long" if fate == LATE else f"the cell {fate}"
        points = exercise.points if told == "" else 0
        marks.append(Mark(sent.student, path.stem, exercise.number, exercise.name, points,
                          exercise.points, told))
        bar.update()

    for exercise, space in staged(path):
        place = [text for _, text in cells].index(exercise.solution)
        earlier = [text for meta, text in cells[:place] if not meta.get("grade")]
        running: list[tuple[Copy, Submission]] = []
        for sent in class_:
            while len(running) >= jobs:
                time.sleep(0.002)
                for one in [one for one in running if not one[0].running()]:
                    running.remove(one)
                    finish(*one)
            answer = answer_to(exercise, sent)
            what = exercise, answer, helpers(answer, sent, given), space, earlier
            copy = Copy(lambda tell, what=what: tell("judged", judge(*what)), LONGEST)
            running.append((copy, sent))
        for copy, sent in running:
            while copy.running():
                time.sleep(0.002)
            finish(copy, sent)
    return marks


def varied(path: Path, seed: int, out: Path) -> Path:
    """Write a notebook of a variant, with its answers, and return its path."""
    place = out / f"variant_{seed}" / path.name
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, vary(path, seed))
    return place


def table(rows: list[list]) -> bytes:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def for_nbgrader(marks: list[Mark]) -> bytes:
    """Return the grades as `nbgrader export` writes them, a row for each student and notebook."""
    rows = [NBGRADER]
    for student, notebook in sorted({(mark.student, mark.notebook) for mark in marks}):
        own = [m for m in marks if (m.student, m.notebook) == (student, notebook)]
        points, most = (sum(float(getattr(m, what)) for m in own) for what in ("points", "most"))
        rows.append([notebook, "", "", student, "", "", "", points, 0.0, points, most])
    return table(rows)


def by_exercise(marks: list[Mark]) -> bytes:
    """Return the points of each exercise and each part of one, and what was wrong."""
    head = "student notebook number exercise points most told".split()
    return table([head, *([getattr(mark, name) for name in head] for mark in marks)])


def for_canvas(marks: list[Mark]) -> bytes:
    """Return the grades as Canvas imports them: a row for each student, a column a notebook.

    Canvas knows a student by the SIS Login ID, for which the folder's name stands.
    """
    notebooks = sorted({mark.notebook for mark in marks})
    most = {n: sum(m.most for m in marks if m.notebook == n) for n in notebooks}
    students = sorted({mark.student for mark in marks})
    points = {(s, n): sum(m.points for m in marks if (m.student, m.notebook) == (s, n))
              for s in students for n in notebooks}
    return table([[*CANVAS, *notebooks],
                  ["    Points Possible", *[""] * 4,
                   *(most[n] // max(len(students), 1) for n in notebooks)],
                  *([s, "", "", s, "", *(points[s, n] for n in notebooks)] for s in students)])


def feedback(student: str, marks: list[Mark], remarks: dict[str, tuple[str, ...]]) -> bytes:
    """Return a student's page: points of each exercise, and why they are missing."""
    lines = []
    for notebook in sorted(remarks):
        own = [mark for mark in marks if mark.notebook == notebook]
        lines.append(f"<h2>{notebook}: {sum(m.points for m in own)} of "
                     f"{sum(m.most for m in own)}</h2>")
        lines += [f"<p>{html.escape(remark)}</p>" for remark in remarks[notebook]]
        for mark in own if any(mark.points for mark in own) or not remarks[notebook] or any(
                mark.told != f"no cell defines {mark.exercise}" for mark in own) else []:
            lines.append(f"<h3>{mark.number}, {mark.exercise}: {mark.points} of {mark.most}</h3>")
            lines += [f"<pre>{html.escape(mark.told)}</pre>"] if mark.told else []
    return PAGE.format(name=html.escape(student), body="\n".join(lines),
                       points=sum(mark.points for mark in marks),
                       most=sum(mark.most for mark in marks)).encode("utf-8", "replace")


def main() -> None:
    """Grade; write the points of notebooks and exercises, and each student's feedback."""
    [given] = parse("minids.lab.grading", __doc__, GradingArgs)
    args = GradingArgs(**given)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a copy of a process that uses a GPU cannot
    folders = [p for p in sorted(Path(args.submitted).resolve().iterdir())
               if p.is_dir() and not p.name.startswith(".")]
    demand("submitted", args.submitted, bool(folders), "a folder that has one for each student")
    paths = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
             if any((f / path.name).is_file() or (f / path.stem).is_dir() for f in folders)]
    demand("submitted", args.submitted, bool(paths), "a folder with notebooks of the course")
    marks, remarks, out = [], {}, Path(args.out).resolve()
    start, answers = time.monotonic(), len(folders) * sum(len(exercises(path)) for path in paths)
    os.chdir(ROOT / "notebooks")  # where the cells expect to be
    if args.variant:
        paths = [varied(path, args.variant, out) for path in paths]
    with tqdm(total=answers, unit="answer", disable=None) as bar:
        for path in paths:
            bar.set_description(path.stem)
            class_ = [read_submission(folder.name, folder, path) for folder in folders]
            remarks |= {(sent.student, path.stem): sent.remarks for sent in class_}
            marks += grade_notebook(path, class_, args.jobs or os.cpu_count() or 1, bar)
    (out / "feedback").mkdir(parents=True, exist_ok=True)
    write_whole(out / "grades.csv", for_nbgrader(marks))
    write_whole(out / "exercises.csv", by_exercise(marks))
    write_whole(out / "canvas.csv", for_canvas(marks))
    for student in (folder.name for folder in folders):
        page = feedback(student, [mark for mark in marks if mark.student == student],
                        {path.stem: remarks[student, path.stem] for path in paths})
        write_whole(out / "feedback" / f"{student}.html", page)
    seconds = (time.monotonic() - start) / (len(folders) * len(paths))
    print(f"{len(folders)} students, {len(paths)} notebooks, {seconds:.1f} s per submission")
    print(f"next: {args.out}/grades.csv (nbgrader), canvas.csv, exercises.csv, feedback/")


if __name__ == "__main__":
    run_program("minids.lab.grading", main, lasting=True)
