"""`python -m minids` lists the programs."""

import ast
from pathlib import Path

from minids.base.command_line import run_program


def programs() -> list[tuple[str, str]]:
    """Return the name after `minids.` and the first sentence of each module that has a `main`.

    A package's program is its `__main__.py`; the programs of `lab` come last. The files are
    parsed, not imported, so that the list is quick.
    """
    here, found = Path(__file__).parent, []
    for path in [*here.glob("*.py"), *here.glob("*/__main__.py"), *here.glob("lab/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            name = ".".join(path.relative_to(here).with_suffix("").parts)
            summary = ast.get_docstring(tree).splitlines()[0]
            found.append((name.removesuffix(".__main__"), summary))
    return sorted(found, key=lambda program: ("." in program[0], program[0]))


def show() -> None:
    """Print the list."""
    for name, summary in programs():
        print(f"python -m minids.{name:<11} {summary}")


if __name__ == "__main__":
    run_program("minids", show)
