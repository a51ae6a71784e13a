"""Lay out the notebooks as a course: without answers to learn alone, or for nbgrader to hand out.

    python -m minids.lab.course --blank
    python -m minids.lab.course --out course
    cd course && nbgrader generate_assignment 05_moe --create

The folder must lie inside the clone, where the notebooks find the package. A notebook that was
changed there is not overwritten.
"""

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from minids.base.command_line import parse, run_program
from minids.base.fields import option

ROOT = Path(__file__).resolve().parents[2]
STUB = "# Write your answer here.\nraise NotImplementedError()"
CONFIG = """c = get_config()
c.CourseDirectory.course_id = "minids"
c.CourseDirectory.root = {root!r}
c.ExecutePreprocessor.timeout = 600
c.ClearSolutions.code_stub = {{"python": {stub!r}}}
"""


@dataclass(frozen=True)
class CourseArgs:
    """Settings of a course."""

    out: str = option("runs/course", "folder of the course, inside the clone")
    blank: bool = option(False, "notebooks without answers in the folder's blank/, and no more: to "
                                "work alone, without nbgrader")
    force: bool = option(False, "overwrite notebooks that were changed in source/ or blank/")


def points(path: Path) -> dict[str, int]:
    """The points of each exercise of a notebook, by the name of its graded cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    marks = [cell["metadata"].get("nbgrader", {}) for cell in cells]
    return {mark["grade_id"]: mark["points"] for mark in marks if mark.get("grade")}


def checked_folder(out: str) -> Path:
    """The course's folder; `ValueError` if notebooks could not find the package from there."""
    folder = Path(out).resolve()
    if ROOT not in folder.parents:
        raise ValueError(f"out = {out!r} lies outside of the clone: valid is a folder inside "
                         f"{ROOT}, where the notebooks find minids")
    if folder.is_relative_to(ROOT / "notebooks") or folder.is_relative_to(ROOT / "minids"):
        raise ValueError(f"out = {out!r} lies among the sources: valid is a folder of its own")
    return folder


def without_answers(notebook: bytes) -> bytes:
    """A notebook with stubs for solutions, and no hidden tests or outputs: nbgrader's release."""
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
    """Write all of the files, each whole, or none if one of them was changed since."""
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content and not force:
            raise ValueError(f"{path} was changed: --force overwrites it, another --out keeps it")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(content)
        os.replace(part, path)


def lay_out(args: CourseArgs) -> dict[str, dict[str, int]]:
    """Write the course, or the notebooks without answers; the points of each notebook."""
    folder, notebooks = checked_folder(args.out), sorted((ROOT / "notebooks").glob("*.ipynb"))
    if args.blank:
        write({folder / "blank" / path.name: without_answers(path.read_bytes())
               for path in notebooks}, args.force)
    else:
        write({folder / "source" / path.stem / path.name: path.read_bytes()
               for path in notebooks}, args.force)
        config = CONFIG.format(root=str(folder), stub=STUB)
        (folder / "nbgrader_config.py").write_text(config, encoding="utf-8")
    return {path.stem: points(path) for path in notebooks}


def main() -> None:
    """`python -m minids.lab.course`."""
    [given] = parse("minids.lab.course", __doc__, CourseArgs)
    args = CourseArgs(**given)
    marks = lay_out(args)
    for name, exercises in marks.items():
        print(f"{name:24} {len(exercises)} exercises {sum(exercises.values()):3} points")
    every = [count for exercises in marks.values() for count in exercises.values()]
    print(f"{'all':24} {len(every)} exercises {sum(every)} points")
    if args.blank:
        print(f"next: jupyter lab {args.out}/blank")
        return
    print(f"next: cd {args.out} && nbgrader generate_assignment {[*marks][5]} --create")
    if importlib.util.find_spec("nbgrader") is None:
        print("nbgrader is not installed: pip install nbgrader")


if __name__ == "__main__":
    run_program("minids.lab.course", main)
