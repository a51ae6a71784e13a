"""Measure the default run alone, and beside programs that use the machine's cores.

    python tests/busy.py                       tokens per second beside 0, 1, 2 and 4 busy processes
    python tests/busy.py --beside OTHER_CLONE  the same of another commit, in turn

Each run is `python -m minids.train` with its defaults in a process of its own, ended after some
steps; its first steps do not count. A fair share of C cores for T threads beside B busy processes
is min(1, C / (T + B)); the last column is the speed alone as a multiple of the speed there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
WARM = 4  # steps that do not count


def speed(clone: Path, steps: int, seconds: float) -> float:
    """Return tokens per second of a training run of this clone."""
    env = {key: value for key, value in os.environ.items() if key not in (
        "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")} | {"PYTHONPATH": str(clone)}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-m", "minids.train", "--out", "run"],
                                   cwd=folder, env=env, stdout=subprocess.DEVNULL)
        metrics, end = Path(folder, "run/metrics.jsonl"), time.monotonic() + 10 * seconds
        lines = []
        while len(lines) <= steps and (time.monotonic() < end or len(lines) < WARM + 2):
            time.sleep(0.2)
            assert process.poll() is None, "the run ended by itself"
            lines = metrics.read_text("utf-8").splitlines()[:steps + 1] if metrics.exists() else []
            if len(lines) == WARM + 1 and end > time.monotonic() + seconds:
                end = time.monotonic() + seconds  # of those that count
        process.kill()
        process.wait()
    first, *_, last = map(json.loads, lines[WARM:])
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="clone of another commit, measured in turn")
    parser.add_argument("--busy", default="0,1,2,4", help="busy processes [0,1,2,4]")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run [40]")
    parser.add_argument("--seconds", type=float, default=60, help="at most so long each [60]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each [3]")
    args = parser.parse_args()
    from minids.base.tables import format_table
    clones = {"here": ROOT} | ({"there": args.beside.resolve()} if args.beside else {})
    numbers = [int(word) for word in args.busy.split(",")]
    found = {(name, number): [] for name in clones for number in numbers}
    for _ in range(args.rounds):
        for number in numbers:
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                      for _ in range(number)]
            try:
                for name, clone in clones.items():
                    found[name, number].append(speed(clone, args.steps, args.seconds))
                    print(number, name, *map(round, found[name, number]), file=sys.stderr)
            finally:
                for process in others:
                    process.kill()
                    process.wait()
    rows = [["busy processes", *(f"{name}, {what}" for name in clones for what in (
        "tokens/s", "min to max", "alone / here"))]]
    for number in numbers:
        row = [str(number)]
        for name in clones:
            speeds = found[name, number]
            times = [alone / one for alone, one in
                     zip(found[name, numbers[0]], speeds, strict=True)]
            row += [f"{statistics.median(speeds):,.0f}",
                    f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                    f"{statistics.median(times):.2f}"]
        rows.append(row)
    print(f"{os.cpu_count()} cores, {args.rounds} rounds of {args.steps} steps\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
