"""`python -m minids` lists the programs."""

import ast
from pathlib import Path


def programs() -> list[tuple[str, str]]:
    """Return the name after `minids.` and the first sentence of each module that has a `main`.

    The files are parsed, not imported, so that the list is quick.
    """
    here, found = Path(__file__).parent, []
    for path in [*sorted(here.glob("*.py")), *sorted(here.glob("lab/*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            name = ".".join(path.relative_to(here).with_suffix("").parts)
            found.append((name, ast.get_docstring(tree).splitlines()[0]))
    return found


if __name__ == "__main__":
    for name, summary in programs():
        print(f"python -m minids.{name:<11} {summary}")
