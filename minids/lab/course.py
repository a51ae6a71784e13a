"""Lay out the notebooks as a course: without answers to work alone, or as nbgrader assignments.

    python -m minids.lab.course --blank
    python -m minids.lab.course --out course
    cd course && nbgrader generate_assignment 05_moe --create

The folder must be inside the clone, where the notebooks find the package. A notebook that you have
changed there is not overwritten unless you pass --force.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option
from minids.base.files import read_json, write_whole

ROOT = Path(__file__).resolve().parents[2]
STUB = "# Write your answer here.\nraise NotImplementedError()"
CONFIG = """c = get_config()
c.CourseDirectory.course_id = "minids"
c.CourseDirectory.root = {root!r}
c.ExecutePreprocessor.timeout = 600
c.ClearSolutions.code_stub = {{"python": {stub!r}}}
"""


@dataclass(frozen=True)
class CourseArgs(Settings):
    """Settings of a course."""

    out: str = option("runs/course", "folder of the course, inside the clone")
    blank: bool = option(False, "write only blank/, the notebooks without answers, to work alone")
    force: bool = option(False, "overwrite notebooks that you changed in source/ or blank/")


def points(path: Path) -> dict[str, int]:
    """Return the points of each exercise of a notebook, by the name of its graded cell."""
    graded = [cell["metadata"].get("nbgrader", {}) for cell in read_json(path)["cells"]]
    return {cell["grade_id"]: cell["points"] for cell in graded if cell.get("grade")}


def checked_folder(out: str) -> Path:
    """Return the course's folder; `ValueError` if notebooks would not find the package from it."""
    folder = Path(out).resolve()
    if ROOT not in folder.parents:
        raise ValueError(f"out = {out!r} is not valid: it must be a folder inside {ROOT}, where "
                         "the notebooks find minids")
    if folder.is_relative_to(ROOT / "notebooks") or folder.is_relative_to(ROOT / "minids"):
        raise ValueError(f"out = {out!r} is not valid: it must be outside notebooks and minids")
    return folder


def without_answers(notebook: bytes) -> bytes:
    """Return a notebook as nbgrader releases it: stubs as solutions, no hidden tests or outputs."""
    nb = json.loads(notebook)
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        source = re.sub(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION",
                        lambda found: re.sub("^", found[1], STUB, flags=re.M), source,
                        flags=re.M | re.S)
        source = re.sub(r"^### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS\n?", "", source,
                        flags=re.M | re.S)
        cell["source"] = source.rstrip("\n").splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(nb, ensure_ascii=False, indent=1).encode() + b"\n"


def write(files: dict[Path, bytes], force: bool) -> None:
    """Write all files, or none and raise `ValueError` if one was changed and `force` is not set."""
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content and not force:
            raise ValueError(f"{path} was changed: pass --force to overwrite it or another --out")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def lay_out(args: CourseArgs) -> dict[str, dict[str, int]]:
    """Write the course; return the points of each notebook's exercises."""
    folder, notebooks = checked_folder(args.out), sorted((ROOT / "notebooks").glob("*.ipynb"))
    if args.blank:
        write({folder / "blank" / path.name: without_answers(path.read_bytes())
               for path in notebooks}, args.force)
    else:
        write({folder / "source" / path.stem / path.name: path.read_bytes()
               for path in notebooks}, args.force)
        write_whole(folder / "nbgrader_config.py", CONFIG.format(root=str(folder), stub=STUB))
    return {path.stem: points(path) for path in notebooks}


def main() -> None:
    """Run the command line."""
    [given] = parse("minids.lab.course", __doc__, CourseArgs)
    args = CourseArgs(**given)
    course = lay_out(args)
    for name, exercises in course.items():
        print(f"{name:24} {len(exercises)} exercises {sum(exercises.values()):3} points")
    every = [count for exercises in course.values() for count in exercises.values()]
    print(f"{'all':24} {len(every)} exercises {sum(every)} points")
    if args.blank:
        print(f"next: jupyter lab {args.out}/blank")
        return
    print(f"next: cd {args.out} && nbgrader generate_assignment {[*course][5]} --create")
    if importlib.util.find_spec("nbgrader") is None:
        print("nbgrader is not installed: pip install nbgrader")


if __name__ == "__main__":
    run_program("minids.lab.course", main)
