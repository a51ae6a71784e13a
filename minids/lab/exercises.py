"""Find the exercises of a notebook, and the cells that each of them needs.

An exercise is four cells with nbgrader's metadata behind its task: solution, check and graded test.
`needed` reads which names a cell binds and which it uses, so that an exercise can be judged without
training the models of the cells around it.
"""

import ast
import json
import re
import symtable
from dataclasses import dataclass
from pathlib import Path

SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION$", re.M | re.S)
HIDDEN = re.compile(r"^### BEGIN HIDDEN TESTS\n(.*?)^### END HIDDEN TESTS$\n?", re.M | re.S)


@dataclass(frozen=True)
class Exercise:
    """needs: the cells before it that it stands on; solution, check, test: its own cells"""

    notebook: str
    needs: tuple[str, ...]
    solution: str
    check: str
    test: str
    points: int

    @property
    def name(self) -> str:
        """Return the name of the function that the learner writes."""
        return ast.parse(self.solution).body[-1].name

    @property
    def stub(self) -> str:
        """Return the cell that nbgrader hands out."""
        return SOLUTION.sub(r"\1raise NotImplementedError()", self.solution)

    @property
    def hidden(self) -> str:
        """Return the tests that the learner does not see."""
        return HIDDEN.search(self.test)[1]


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
    code = code_cells(json.loads(path.read_bytes()))
    sources = [source for _, source in code]
    found = []
    for i, (meta, _) in enumerate(code):
        if meta.get("solution"):
            own = sources[i:i + 3]
            found.append(Exercise(path.stem, needed(sources[:i], own), *own,
                                  code[i + 2][0]["points"]))
    return found
