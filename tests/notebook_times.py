"""Time each notebook: a clean kernel, all cells, one notebook after the other.

    python tests/notebook_times.py
    python tests/notebook_times.py --threads 2 --only 02

A table of seconds, the kernel's start included, and of the slowest cell. Nothing is written
but what the notebooks themselves write, their figures.
"""

import argparse
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def seconds(cell) -> float:
    """Return how long a cell took, by the kernel's own clock."""
    clock = cell.metadata["execution"]
    busy, idle = (datetime.fromisoformat(clock[f"iopub.status.{state}"].replace("Z", "+00:00"))
                  for state in ("busy", "idle"))
    return (idle - busy).total_seconds()


def run(path: Path) -> tuple[float, float, str]:
    """Return the seconds of a notebook and of its slowest cell, and that cell's first line."""
    nb, start = nbformat.read(path, 4), time.monotonic()
    NotebookClient(nb, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(FOLDER)}}).execute(
                       stderr=subprocess.DEVNULL)  # of the kernel's process, not of the cells
    whole = time.monotonic() - start
    slowest = max((cell for cell in nb.cells if cell.cell_type == "code"), key=seconds)
    line = next(line for line in slowest.source.splitlines() if not line.startswith("#"))
    return whole, seconds(slowest), line


def main() -> None:
    """Run the notebooks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[""], help="numbers of notebooks, as 02 11")
    parser.add_argument("--threads", type=int, default=1, help="threads of a kernel (default 1)")
    args = parser.parse_args()
    paths = [path for path in sorted(FOLDER.glob("*.ipynb"))
             if path.name.startswith(tuple(args.only))]
    if not paths:
        sys.exit(f"notebook_times: only = {args.only}: valid are the numbers of the notebooks")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    print(f"{'notebook':24} {'seconds':>7} {'slowest cell':>12}")
    total = 0.0
    for path in paths:
        whole, slowest, line = run(path)
        total += whole
        print(f"{path.stem:24} {whole:7.0f} {slowest:12.0f}  {line[:50]}", flush=True)
    print(f"{'all':24} {total:7.0f}")


if __name__ == "__main__":
    main()
