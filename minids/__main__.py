"""`python -m minids` lists the programs."""

import ast
from pathlib import Path


def programs() -> list[tuple[str, str]]:
    """Name and first sentence of each module that has a `main`, read without importing it."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found.append((path.stem, ast.get_docstring(tree).splitlines()[0]))
    return found


if __name__ == "__main__":
    for name, summary in programs():
        print(f"python -m minids.{name:<11} {summary}")
