"""Lay out the notebooks as a course for nbgrader: hand out, grade, adapt.

    python -m minids.course --out course
    cd course && nbgrader generate_assignment 05_moe --create

The folder must lie inside the clone, where the notebooks find the package. A notebook that was
adapted there is not overwritten.
"""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from minids.config import option, parse, run_program

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """c = get_config()
c.CourseDirectory.course_id = "minids"
c.CourseDirectory.root = {root!r}
c.ExecutePreprocessor.timeout = 600
c.ClearSolutions.code_stub = {{"python": "# Write your answer here.\\nraise NotImplementedError()"}}
"""


@dataclass(frozen=True)
class CourseArgs:
    """Settings of a course."""

    out: str = option("runs/course", "folder of the course, inside the clone")
    force: bool = option(False, "overwrite notebooks that were changed in the folder's source/")


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


def lay_out(args: CourseArgs) -> list[tuple[str, dict[str, int]]]:
    """Write source/NAME/NAME.ipynb and the configuration; each notebook's name and points."""
    folder, notebooks = checked_folder(args.out), sorted((ROOT / "notebooks").glob("*.ipynb"))
    sources = {path: folder / "source" / path.stem / path.name for path in notebooks}
    for path, source in sources.items():
        if source.exists() and source.read_bytes() != path.read_bytes() and not args.force:
            raise ValueError(f"{source} was changed: --force overwrites it, another --out keeps it")
    for path, source in sources.items():
        source.parent.mkdir(parents=True, exist_ok=True)
        part = source.with_suffix(".part")
        part.write_bytes(path.read_bytes())
        os.replace(part, source)
    (folder / "nbgrader_config.py").write_text(CONFIG.format(root=str(folder)), encoding="utf-8")
    return [(path.stem, points(source)) for path, source in sources.items()]


def main() -> None:
    """`python -m minids.course`."""
    [given] = parse("minids.course", __doc__, CourseArgs)
    args = CourseArgs(**given)
    marks = lay_out(args)
    for name, exercises in marks:
        print(f"{name:24} {len(exercises)} exercises {sum(exercises.values()):3} points")
    print(f"{'all':24} {sum(len(e) for _, e in marks)} exercises "
          f"{sum(sum(e.values()) for _, e in marks)} points")
    print(f"next: cd {args.out} && nbgrader generate_assignment {marks[5][0]} --create")
    if importlib.util.find_spec("nbgrader") is None:
        print("nbgrader is not installed: pip install nbgrader")


if __name__ == "__main__":
    run_program("minids.course", main)
