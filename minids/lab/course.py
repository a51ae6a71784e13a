"""Lay out the notebooks as a course: to work alone, for students, or as nbgrader assignments.

    python -m minids.lab.course --blank
    python -m minids.lab.course --students ../minids-course
    python -m minids.lab.course --students ../minids-course --variant 2027
    python -m minids.lab.course --diff 2026,2027
    python -m minids.lab.course --handouts runs/course/handouts
    python -m minids.lab.course --out course
    cd course && nbgrader generate_assignment 05_moe --create

`--students` makes a repository to hand out: the package and the notebooks without answers, and
neither hidden tests nor wrong answers. Without it, the folder must be inside the clone, where the
notebooks find the package. `--variant` gives the exercises other names, orders of arguments and
numbers, so that earlier answers do not fit; grade with the same seed. `--diff` prints in what two
variants differ for a student, as a diff: what an answer made from the older one still has of it.
`--handouts` writes a page to print for each notebook.
"""

import contextlib
import difflib
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from textwrap import indent

from tqdm import tqdm

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option, require
from minids.base.files import read_json, write_whole
from minids.lab.exercises import HIDDEN, SOLUTION

ROOT = Path(__file__).resolve().parents[2]
STUB = "# Write your answer here.\nraise NotImplementedError()"
SHIPPED = ("minids data figures README.md CHANGELOG.md CITATION.cff LICENSE pyproject.toml "
           "requirements.txt .gitignore").split()  # to students; not tests, nor solved notebooks
CONFIG = """c = get_config()
c.CourseDirectory.course_id = "minids"
c.CourseDirectory.root = {root!r}
c.ExecutePreprocessor.timeout = 600
c.ClearSolutions.code_stub = {{"python": {stub!r}}}
"""


@dataclass(frozen=True)
class CourseArgs(Settings):
    """Settings of a course."""

    out: str = option("runs/course", "folder of the course, inside the clone", folder=True)
    blank: bool = option(False, "write only blank/, the notebooks without answers, to work alone")
    students: str = option("", "new folder outside the clone: a repository for students",
                           folder=True)
    variant: int = option(0, "seed of other names, orders and numbers in the exercises; 0: none",
                          low=0, high=9999)
    diff: str = option("", "two seeds, as 2026,2027: print only how the exercises of these "
                       "variants differ; 0: as they stand here")
    handouts: str = option("", "write only a page to print for each notebook, to this folder",
                           folder=True)
    force: bool = option(False, "overwrite notebooks that you changed in source/ or blank/")

    def __post_init__(self):
        super().__post_init__()
        folder = Path(self.out).resolve()
        require(self, "out", ROOT in folder.parents,
                f"a folder inside {ROOT}, where the notebooks find minids")
        own = folder.is_relative_to(ROOT / "notebooks") or folder.is_relative_to(ROOT / "minids")
        require(self, "out", not own, "outside notebooks and minids")
        place = Path(self.students).resolve()
        require(self, "students", not self.students or ROOT not in (place, *place.parents)
                and not (place.is_dir() and any(place.iterdir())),
                f"an empty folder outside {ROOT}")
        require(self, "diff", not self.diff or all(
            re.fullmatch(r"\d{1,4}", seed) for seed in self.seeds) and len(self.seeds) == 2,
            "two seeds between 0 and 9999 with a comma between them")

    @property
    def seeds(self) -> list[str]:
        """Return the seeds of the two variants to compare."""
        return self.diff.split(",")


def without_answers(notebook: bytes) -> bytes:
    """Return a notebook as nbgrader releases it: stubs as solutions, no hidden tests or outputs."""
    nb = json.loads(notebook)
    for cell in nb["cells"]:
        source = SOLUTION.sub(lambda found: indent(STUB, found[1]), "".join(cell["source"]))
        source = HIDDEN.sub("", source)
        cell["source"] = source.rstrip("\n").splitlines(keepends=True)
        if cell.get("metadata", {}).get("nbgrader", {}).get("grade"):
            tags = cell["metadata"].get("tags", [])  # Run All goes on behind an unsolved exercise
            cell["metadata"]["tags"] = [*tags, "raises-exception"]
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(nb, ensure_ascii=False, indent=1).encode() + b"\n"


def write(files: dict[Path, bytes], force: bool) -> None:
    """Write all files, or none: a changed one is a `ValueError` unless `force` is set."""
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content and not force:
            raise ValueError(f"{path} was changed: pass --force to overwrite it or another --out")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def contents(paths: list[Path], variant: int) -> dict[Path, bytes]:
    """Return the notebooks, varied if there is a seed: path -> content."""
    if not variant:
        return {path: path.read_bytes() for path in paths}
    from minids.lab.variants import vary  # it runs cells, with torch
    with contextlib.chdir(ROOT / "notebooks"):
        return {path: vary(path, variant) for path in tqdm(paths, unit="notebook", disable=None)}


def differences(old: bytes, new: bytes, names: tuple[str, str]) -> list[str]:
    """Return a unified diff of what students see of two notebooks' exercises, as lines.

    names: of the two, for its head
    """
    def seen(notebook: bytes) -> list[str]:
        cells = json.loads(without_answers(notebook))["cells"]
        texts = ["".join(cell["source"]) for cell in cells
                 if "nbgrader" in cell["metadata"] or cell["cell_type"] == "markdown"]
        return "\n\n".join(texts).split("\n")

    return [*difflib.unified_diff(seen(old), seen(new), *names, n=1, lineterm="")]


def repository(folder: Path, notebooks: dict[Path, bytes]) -> None:
    """Write the repository for students, and commit it where git is installed."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        elif (ROOT / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    write({folder / "notebooks" / path.name: without_answers(content)
           for path, content in notebooks.items()}, force=True)
    for page in (ROOT / "notebooks").glob("*.md"):
        shutil.copy(page, folder / "notebooks")
    author = ["-c", "user.name=minids", "-c", "user.email=course@localhost"]
    if shutil.which("git"):
        for command in (["init", "--quiet"], ["add", "--all"],
                        ["commit", "--quiet", "--message", "The course, without answers"]):
            subprocess.run(["git", "-C", str(folder), *author, *command], check=True)


def points_of(notebook: Path) -> list[int]:
    """Return the points of each of a notebook's exercises."""
    graded = [cell["metadata"].get("nbgrader", {}) for cell in read_json(notebook)["cells"]]
    return [cell["points"] for cell in graded if cell.get("grade")]


def main() -> None:
    """Write the course, and print the points of each notebook's exercises."""
    [given] = parse("minids.lab.course", __doc__, CourseArgs)
    args = CourseArgs(**given)
    folder, paths = Path(args.out).resolve(), sorted((ROOT / "notebooks").glob("*.ipynb"))
    points = {path.stem: points_of(path) for path in paths}  # before anything is written
    if args.handouts:
        from minids.lab.handouts import write_handouts  # it draws formulas
        write_handouts(Path(args.handouts), paths)
        return print(f"next: open {quote(args.handouts)}/{paths[5].stem}.html, and print it")
    if args.diff:
        old, new = (contents(paths, int(seed)) for seed in args.seeds)
        for path in paths:
            names = tuple(f"{path.stem} of variant {seed}" for seed in args.seeds)
            print("".join(f"{line}\n" for line in differences(old[path], new[path], names)), end="")
        return
    notebooks = contents(paths, args.variant)
    if args.students:
        repository(Path(args.students).resolve(), notebooks)
    elif args.blank:
        write({folder / "blank" / path.name: without_answers(content)
               for path, content in notebooks.items()}, args.force)
    else:
        write({folder / "source" / path.stem / path.name: content
               for path, content in notebooks.items()}, args.force)
        write_whole(folder / "nbgrader_config.py", CONFIG.format(root=str(folder), stub=STUB))
    for stem, found in points.items():
        print(f"{stem:24} {len(found)} exercises {sum(found):3} points")
    every = sum(points.values(), [])
    print(f"{'all':24} {len(every)} exercises {sum(every)} points")
    if args.students:
        return print(f"next: push {quote(args.students)} to where your students clone it from")
    if args.blank:
        return print(f"next: jupyter lab {quote(args.out + '/blank')}")
    print(f"next: cd {quote(args.out)} && nbgrader generate_assignment {paths[5].stem} "
          "--create")
    if importlib.util.find_spec("nbgrader") is None:
        print("nbgrader is not installed: pip install nbgrader")


if __name__ == "__main__":
    run_program("minids.lab.course", main, lasting=True)
