"""Write what all notebooks open with: the first cell, and the badge that leads to Colab.

    python -m minids.lab.opening

Both hold the repository's address. It stands once, in pyproject.toml under `[project.urls]`, which
a notebook outside a clone cannot read, so this program copies it. While the address is a
placeholder (it contains `.invalid`), there is no badge and the cell says that there is no address.
"""

import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, demand, option
from minids.base.files import write_whole
from minids.base.memory import keep_freed_memory  # noqa: F401, for the first cell

ROOT = Path(__file__).resolve().parents[2]
CELL = '''
# The same first cell in every notebook: find minids; on Colab, clone and install it first.
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = "{address}"  # from pyproject.toml, by python -m minids.lab.opening
fetch = "google.colab" in sys.modules  # or True: clone and install on any empty machine

near = [Path.cwd(), *Path.cwd().parents, *Path.cwd().glob("*/")]
sys.path[:0] = [str(p) for p in near if (p / "minids" / "__init__.py").is_file()]
if fetch and REPOSITORY and not find_spec("minids"):
    cloned = subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, "minids"])
    assert cloned.returncode == 0, f"git cannot clone {{REPOSITORY}}: is this machine online?"
    sys.path.insert(0, str(Path("minids").resolve()))
assert find_spec("minids"), (
    "minids is not here: open the notebook inside a clone of its repository"
    + (REPOSITORY and ", or set fetch = True in this cell"))
import minids  # before torch: its threads then sleep where they wait for each other
from minids.lab import opening

opening.explain_interrupts()
opening.keep_freed_memory()  # for the next tensors: a step takes less time
ROOT = Path(minids.__file__).parents[1]
if fetch:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "-r"]
    subprocess.run([*install, str(ROOT / "requirements.txt")], check=True)

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
'''.strip()
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({})"
GO_ON = ("Interrupted. What ran keeps its values: run this cell again, then "
         "Run > Run Selected Cell and All Below.")
LINE = re.compile(r"\n\n\[!\[Open in Colab\]\(\S+\)\]\(\S+\)")


@dataclass(frozen=True)
class OpeningArgs(Settings):
    """Settings of the notebooks' opening."""

    folder: str = option("notebooks", "folder of the notebooks", folder=True)


def explain_interrupts() -> None:
    """Make the notebook answer an interrupted cell with how to go on, instead of a traceback."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        shell.set_custom_exc((KeyboardInterrupt,), lambda *_, tb_offset=None: print(GO_ON))


def address_of(pyproject: Path = ROOT / "pyproject.toml") -> str:
    """Return the repository's address, "" while it is a placeholder."""
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    address = urls.get("Repository", ".invalid").rstrip("/")
    return "" if ".invalid" in address else address


def badge(address: str, name: str) -> str:
    """Return a notebook's link to Colab, "" where Colab cannot open it: it reads only GitHub.

    name: of the file, with suffix
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(\.git)?", address)
    return found and BADGE.format(f"https://colab.research.google.com/github/{found[1]}/{found[2]}"
                                  f"/blob/main/notebooks/{name}") or ""


def open_with(nb, address: str, name: str) -> None:
    """Give a notebook its first cell, folded, and below its title the badge, or none."""
    title = next(cell for cell in nb.cells if cell.cell_type == "markdown")
    heading, rest = (LINE.sub("", title.source) + "\n\n").split("\n\n", 1)
    title.source = "\n\n".join(filter(None, [heading, badge(address, name), rest.strip()]))
    first = next(cell for cell in nb.cells if cell.cell_type == "code")
    first.source = CELL.format(address=address)
    first.metadata["jupyter"] = {"source_hidden": True}


def main(argv: list[str] | None = None) -> None:
    """Write the opening of every notebook of a folder."""
    import nbformat
    [given] = parse("minids.lab.opening", __doc__, OpeningArgs, argv=argv)
    args = OpeningArgs(**given)
    paths = sorted(Path(args.folder).glob("*.ipynb"))
    demand("folder", args.folder, bool(paths), "a folder that contains notebooks")
    for path in paths:
        nb = nbformat.read(path, as_version=4)
        open_with(nb, address_of(), path.name)
        write_whole(path, (nbformat.writes(nb).rstrip("\n") + "\n").encode())
    print(f"{len(paths)} notebooks open with {address_of() or 'no address: it is undecided'}")


if __name__ == "__main__":
    run_program("minids.lab.opening", main)
