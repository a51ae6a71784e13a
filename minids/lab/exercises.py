"""Find the exercises of a notebook, and the cells that each of them needs.

An exercise is three cells with nbgrader's metadata behind its task: solution, check, graded test.
One that is built has parts, 5a and 5b, each with cells and points of its own.
`needed` reads which names a cell binds and which it uses, so that an exercise can be judged without
training the models of the cells around it.
"""

import ast
import contextlib
import io
import json
import re
import symtable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION$", re.M | re.S)
HIDDEN = re.compile(r"^### BEGIN HIDDEN TESTS\n(.*?)^### END HIDDEN TESTS$\n?", re.M | re.S)
TASK = re.compile(r"\*\*Exercise (\d+[a-z]?)\*\* \(\d+ points?\)\.? *")


@dataclass(frozen=True)
class Exercise:
    """number: as the task has it, 5a for a part; needs: the cells before it that it stands on;
    solution, check, test: its own cells; task: what the learner is asked"""

    notebook: str
    needs: tuple[str, ...]
    solution: str
    check: str
    test: str
    points: int
    number: str = ""
    task: str = ""

    @property
    def name(self) -> str:
        """Return the name of the function that the learner writes."""
        return ast.parse(self.solution).body[-1].name


@cache
def names(source: str) -> tuple[set[str], set[str]]:
    """Return the global names that a cell binds, and the others that it or its functions read."""
    def read(scope) -> set[str]:
        own = {s.get_name() for s in scope.get_symbols() if s.is_referenced()
               and (scope.get_type() == "module" or s.is_global())}
        return own.union(*map(read, scope.get_children()))

    top = symtable.symtable(source, "cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()
             or s.is_namespace()}
    return bound, read(top) - bound


def needed(before: list[str], cells: list[str]) -> tuple[str, ...]:
    """Return the earlier cells whose names the given cells need, in order."""
    wanted, kept = set().union(*(names(cell)[1] for cell in cells)), []
    for source in reversed(before):
        bound, read = names(source)
        if bound & wanted:
            wanted = wanted - bound | read
            kept.append(source)
    return tuple(reversed(kept))


def code_cells(notebook: dict) -> list[tuple[dict, str]]:
    """Return each code cell's nbgrader metadata, {} if it has none, and its source."""
    return [(cell.get("metadata", {}).get("nbgrader", {}), "".join(cell.get("source", "")))
            for cell in notebook["cells"] if cell.get("cell_type") == "code"]


def exercises(path: Path) -> list[Exercise]:
    """Return the exercises of one notebook, in order."""
    nb = json.loads(path.read_bytes())
    code, tasks, task = code_cells(nb), [], ""
    for cell in nb["cells"]:  # of each code cell: the last task above it
        text = "".join(cell["source"])
        task = text if cell["cell_type"] == "markdown" and TASK.search(text) else task
        tasks += [task] if cell["cell_type"] == "code" else []
    sources = [source for _, source in code]
    found = []
    for i, (meta, _) in enumerate(code):
        if meta.get("solution"):
            own, asked = sources[i:i + 3], TASK.search(tasks[i])
            found.append(Exercise(path.stem, needed(sources[:i], own), *own,
                                  code[i + 2][0]["points"], asked[1] if asked else "",
                                  tasks[i][asked.end():] if asked else ""))
    return found


def staged(path: Path) -> Iterator[tuple[Exercise, dict]]:
    """Yield each exercise of a notebook with the names that its cells need, as they stand there."""
    found, space, run = exercises(path), {}, set()
    wanted = {cell for exercise in found for cell in exercise.needs}
    cells = [text for _, text in code_cells(json.loads(path.read_bytes()))]
    for text in cells:
        here = next((exercise for exercise in found if exercise.solution == text), None)
        if here:
            yield here, space
        if text in wanted and text not in run:
            run.add(text)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, path.stem, "exec"), space)
