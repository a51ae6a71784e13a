"""Check that every notebook has the promised anatomy; nbval executes them in the same run.

A check takes a notebook and returns what is wrong, in words.
"""

import base64
import copy
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minids.lab import opening
from minids.lab.course import points_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
GRADE_FIELDS = {"schema_version", "grade_id", "solution", "grade", "locked", "task"}
SOLUTION, HIDDEN = "SOLUTION", "HIDDEN TESTS"
STAGES = "what to look at", "the idea", "the shape of the line"
HINT = r"<details><summary>Hint {}: {}</summary>\n\n.+\n\n</details>"
COMPARED = "nbval-check-output"  # the tag of a cell whose output must be the stored one


@dataclass(frozen=True)
class Notebook:
    """name: the file's, without suffix; root: the folder that has figures/; nb: the content"""

    name: str
    root: Path
    nb: nbformat.NotebookNode

    @property
    def code(self) -> list:
        """Return the code cells, in order."""
        return [cell for cell in self.nb.cells if cell.cell_type == "code"]

    @property
    def markdown(self) -> list[str]:
        """Return the text of each markdown cell, in order."""
        return [cell.source for cell in self.nb.cells if cell.cell_type == "markdown"]


def read(path: Path) -> Notebook:
    """Read a notebook of the repository."""
    return Notebook(path.stem, path.parent.parent, nbformat.read(path, as_version=4))


def code_lines(cell) -> int:
    """Count the lines of code that are not blank."""
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def words(text: str) -> int:
    """Count the words of a text, without tags and lone punctuation."""
    return sum(any(map(str.isalnum, word)) for word in re.sub(r"<[^>]*>", " ", text).split())


def kernel(book: Notebook) -> list[str]:
    """Require the kernel name that every installation has."""
    name = book.nb.metadata.get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"the kernel is {name}"]


def execution(book: Notebook) -> list[str]:
    """Require that all cells ran once, from top to bottom, and that output is stored and compared.

    A cell tag, which a reader does not see, makes nbval compare; a comment would do the same.
    """
    counts = [cell.execution_count for cell in book.code]
    found = [] if counts == [*range(1, len(counts) + 1)] else [f"execution counts {counts}"]
    if not any(COMPARED in cell.metadata.get("tags", []) for cell in book.code):
        found.append("no cell's output is compared")
    found += [f"a comment for nbval in cell {cell.execution_count}" for cell in book.code
              if "NBVAL_" in cell.source]
    return found + [f"cell {cell.execution_count} prints and has no output" for cell in book.code
                    if (re.search(r"^print\(", cell.source, re.M)
                        or COMPARED in cell.metadata.get("tags", [])) and not cell.outputs]


def noise(book: Notebook) -> list[str]:
    """Refuse errors, output on stderr, paths of one machine, and controls without a kernel."""
    found = ["the state of widgets is stored"] if "widgets" in book.nb.metadata else []
    for number, output in [(c.execution_count, output) for c in book.code for output in c.outputs]:
        if any("widget" in kind for kind in output.get("data", {})):
            found.append(f"cell {number} has controls in its output: run it by nbclient")
        texts = [text for kind, text in output.get("data", {}).items() if "text" in kind]
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(f"cell {number} has an error or something on stderr")
        if re.search(r"/(home|root|tmp|work|Users|usr)/", output.get("text", "".join(texts))):
            found.append(f"cell {number} shows a path of one machine")
    return found


def length(book: Notebook) -> list[str]:
    """Require short code cells: a median of at most 8 lines, none over 40."""
    lines = [code_lines(cell) for cell in book.code]
    found = [f"a cell has {n} lines" for n in lines if n > 40]
    median = statistics.median(lines)
    return found + ([f"the median cell has {median} lines"] if median > 8 else [])


def prose(book: Notebook) -> list[str]:
    """Allow at most 80 words per cell."""
    return [f"{words(text)} words in the cell that begins {text[:40]!r}"
            for text in book.markdown if words(text) > 80]


def proportion(book: Notebook) -> list[str]:
    """Require between one and two text cells per code cell."""
    ratio = len(book.markdown) / len(book.code)
    return [] if 1 <= ratio <= 2 else [f"{ratio:.2f} cells of text to one of code"]


def figure(book: Notebook) -> list[str]:
    """Require a picture, made by a cell that saves it under the notebook's number."""
    for cell in book.code:
        name = re.search(rf'"({book.name[:2]}_\w+\.png)"', cell.source)
        if name and any("image/png" in output.get("data", {}) for output in cell.outputs):
            there = (book.root / "figures" / name[1]).is_file()
            return [] if there else [f"figures/{name[1]} is missing"]
    return [f"no cell saves and shows a figure {book.name[:2]}_NAME.png"]


def local(book: Notebook) -> list[str]:
    """Refuse linked pictures: cells draw them. Only Colab's badge is one."""
    return [f"a linked picture in the cell that begins {text[:40]!r}"
            for text in book.markdown if re.search(r"!\[|<img", opening.LINE.sub("", text))]


def anatomy(book: Notebook) -> list[str]:
    """Require title, question, paper, time, two folded answers, summary and the table of names."""
    first, *_, last = book.markdown
    wanted = {"a title with the notebook's number": first.startswith(f"# {book.name[:2]} · "),
              "the question": "**The question.**" in first, "the paper": "**Paper.**" in first,
              "the run time": "**Run time.**" in first,
              "two folded answers": sum(text.count("<details><summary>Answer</summary>")
                                        for text in book.markdown) == 2,
              "a figure whose heading is a message": any(
                  re.match(r"## The figure: \S", text) for text in book.markdown),
              "what breaks": any("What breaks" in text for text in book.markdown),
              "a comparison with the package": any(
                  re.search(r"^(assert|torch\.testing\.assert_close)\b.*package", cell.source, re.M)
                  for cell in book.code),
              "a summary of five lines": any(
                  text.startswith("## Summary") and "\n5. " in text and "\n6. " not in text
                  for text in book.markdown),
              "the table of names": last.startswith(
                  "| paper symbol | minids name | official name")}
    return [f"{part} is missing" for part, there in wanted.items() if not there]


def hints(book: Notebook) -> list[str]:
    """Require three folded hints between each task and its solution, all in one form."""
    found = []
    for task, hint, cell in zip(book.nb.cells, book.nb.cells[1:], book.nb.cells[2:], strict=False):
        if cell.metadata.get("nbgrader", {}).get("solution"):
            name = cell.metadata["nbgrader"]["grade_id"]
            if not re.fullmatch("\n\n".join(HINT.format(i, stage) for i, stage in
                                            enumerate(STAGES, 1)), hint.source):
                found.append(f"{name} has no three hints above it")
            points = [c.metadata["nbgrader"]["points"] for c in book.code
                      if c.metadata.get("nbgrader", {}).get("grade_id") == f"{name}_test"]
            asked = re.search(r"\*\*Exercise \d[a-c]?\*\* \((\d) points?\)", task.source)
            if not asked or [int(asked[1])] != points:
                found.append(f"{name}: the task does not say the points, {points}")
    return found


def grading(book: Notebook) -> list[str]:
    """Require three or four exercises, and parts of one that is built: marked solution, talking
    check, test with points."""
    graded = [(cell, cell.metadata["nbgrader"]) for cell in book.code
              if "nbgrader" in cell.metadata]
    found = [f"{kind} markers without their metadata" for cell in book.code for kind in
             (SOLUTION, HIDDEN) if f"### BEGIN {kind}" in cell.source
             and "nbgrader" not in cell.metadata]
    ids = [meta.get("grade_id") for _, meta in graded]
    if len(set(ids)) != len(ids):
        found.append(f"grade_ids are not unique: {ids}")
    for cell, meta in graded:
        found += graded_cell(cell, meta)
    solutions = sum(bool(meta.get("solution")) for _, meta in graded)
    tests = sum(bool(meta.get("grade")) for _, meta in graded)
    checks = sum(re.search(r"^review\(", cell.source, re.M) is not None for cell, _ in graded)
    built = sum("**Exercise 5" in text for text in book.markdown)
    if not (3 <= solutions - built <= 4 and built in (0, 2, 3, 4) and solutions == tests == checks):
        found.append(f"{solutions} solutions, {checks} checks and {tests} tests with points")
    return found


def bug(book: Notebook) -> list[str]:
    """Require one section with a plausible bug, whose exercise is a property that is tried on
    right and wrong variants."""
    heads = [i for i, cell in enumerate(book.nb.cells)
             if cell.cell_type == "markdown" and cell.source.startswith("## ")]
    starts = [i for i in heads if book.nb.cells[i].source.startswith("## Find the bug")]
    if len(starts) != 1:
        return [f"{len(starts)} sections to find a bug in"]
    end = min((i for i in heads if i > starts[0]), default=None)
    roles = [(cell.metadata.get("nbgrader", {}), cell.source)
             for cell in book.nb.cells[starts[0]:end]]
    cases = [source for meta, source in roles if meta.get("locked")]
    found = [] if sum(bool(meta.get("solution")) for meta, _ in roles) == 1 else ["no property"]
    return found + [f"the property is never {verdict} in {source[:30]!r}" for source in cases
                    for verdict in (True, False) if f", {verdict}, " not in source]


def graded_cell(cell, meta: dict) -> list[str]:
    """Check the nbgrader metadata of one cell, and the markers that go with it."""
    name = meta.get("grade_id")
    is_test = meta.get("grade", False)
    fields = GRADE_FIELDS | ({"points"} if is_test else set())
    expected = {
        "fields": set(meta) == fields and meta["schema_version"] == 3 and meta["task"] is False,
        "function": not meta.get("solution") or f"def {name}(" in cell.source,
        "role": (meta.get("solution"), meta.get("locked")) in [(True, False), (False, True)],
        "points": not is_test or meta.get("points", 0) > 0,
        "solution markers": markers(cell.source, SOLUTION) == bool(meta.get("solution")),
        "hidden tests": markers(cell.source, HIDDEN) == is_test,
        # It raises sentences, and returns none: a number at the cell's end would be its points.
        "sentence": not is_test or cell.source.startswith("grade(")}
    return [f"{name}: wrong {part}" for part, right in expected.items() if not right]


def markers(source: str, kind: str) -> bool:
    """Return whether a cell has one pair of markers, in order."""
    found = re.findall(rf"^ *### (BEGIN|END) {kind}$", source, re.M)
    return found == ["BEGIN", "END"]


def begins(book: Notebook) -> list[str]:
    """Require the opening that `python -m minids.lab.opening` writes: first cell, fold, badge."""
    nb = copy.deepcopy(book.nb)
    opening.open_with(nb, opening.address_of(), f"{book.name}.ipynb")
    return [] if nb == book.nb else ["another opening than minids.lab.opening writes"]


CHECKS = [kernel, begins, execution, noise, length, prose, proportion, figure, local, anatomy,
          hints, grading, bug]
PATHS = sorted(FOLDER.glob("*.ipynb"))
BOOKS = [read(path) for path in PATHS]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_notebook(book, check):
    assert check(book) == []


def drawn(notebook: bytes) -> dict[str, bytes]:
    """Return the pictures in a notebook's outputs, by the name under which the cell saves them."""
    found = {}
    for cell in json.loads(notebook)["cells"]:
        name = re.search(r'"(\d\d_\w+\.png)"', "".join(cell["source"]))
        for output in cell.get("outputs", []) if name else []:
            if picture := output.get("data", {}).get("image/png"):
                found[name[1]] = base64.b64decode("".join(picture))
    return found


def digest(data: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def committed(path: str) -> bytes:
    """Return a file as it was committed, because running the notebooks redraws the figures."""
    try:
        return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True,
                              check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_figures_are_the_notebooks_own(book):
    pictures = drawn(committed(f"notebooks/{book.name}.ipynb"))
    assert pictures
    for name, picture in pictures.items():  # by sums: pytest would compare the bytes for minutes
        assert digest(picture) == digest(committed(f"figures/{name}")), name
        assert digest(picture) != digest(committed("figures/default_run.png"))


# Found again in each notebook. Everything else is about its own part, and is called after it.
LANDMARKS = {"Two questions", "Exercises", "Build it", "Find the bug", "Try it", "Summary"}


def alike(books: list[Notebook]) -> list[str]:
    """Return the headings that stand more than once, in one notebook or in several."""
    heads = Counter(head for book in books for text in book.markdown
                    for head in re.findall(r"^#+ (.+)", text, re.M))
    return [head for head, times in heads.items() if times > 1 and head not in LANDMARKS]


def test_headings_do_not_sound_alike():
    assert alike(BOOKS) == []
    assert "The idea" in alike([*BOOKS, *(
        Notebook(name, ROOT, new_notebook(cells=[new_markdown_cell("## The idea\n\nIt is.")]))
        for name in ("98_a", "99_b"))])


def test_names_are_numbered():
    numbers = [re.fullmatch(r"(\d\d)_[a-z0-9_]+", book.name)[1] for book in BOOKS]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("check", CHECKS)
def test_a_notebook_that_is_wrong_in_all_ways_is_refused(check):
    meta = dict(schema_version=2, grade_id="two", solution=True, locked=True)
    cells = [new_code_cell("print(1)\n" * 41), new_markdown_cell("![far](http://a/b.png) " * 81),
             new_code_cell("def one(): ...", metadata={"nbgrader": meta}), new_code_cell("1 / 0"),
             new_markdown_cell("The end.")]
    cells[0].outputs = [new_output("stream", name="stderr", text="/home/me")]
    assert check(Notebook("07_test", ROOT, new_notebook(cells=cells))) != []


@pytest.mark.slow
@pytest.mark.parametrize("tags, failed", [([COMPARED], 1), ([], 0)])
def test_a_wrong_stored_output_fails(tags, failed, tmp_path):
    """nbval compares the cells that have the tag, and only those."""
    cell = new_code_cell("print(1)", metadata={"tags": tags}, execution_count=1)
    cell.outputs = [new_output("stream", name="stdout", text="2\n")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": kernel}),
                   tmp_path / "wrong.ipynb")
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider",
               "--nbval-lax", "--nbval-current-env", "wrong.ipynb"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == failed


def listed(page: str) -> list[str]:
    """Return what is wrong with the list of notebooks on a page: titles, exercises, points."""
    rows = {row[0]: row[1:] for row in re.findall(
        r"\[\d\d\]\((\w+)\.ipynb\) (.*?) \|.*\| (\d+), (\d+) \|$", page, re.M)}
    found = []
    for book in BOOKS:
        points = points_of(FOLDER / f"{book.name}.ipynb")
        right = (book.markdown[0].splitlines()[0][7:], str(len(points)), str(sum(points)))
        if rows.get(book.name) != right:
            found.append(f"{book.name}: {rows.get(book.name)} instead of {right}")
    return found


def test_the_list_of_notebooks_is_right():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert listed(page) == []
    assert len(listed(page.replace("| 4, 7 |", "| 4, 9 |"))) == page.count("| 4, 7 |") > 0
