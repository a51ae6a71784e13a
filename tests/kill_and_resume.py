"""Kill a training run at random moments, resume it each time, compare it with an unbroken one.

    python tests/kill_and_resume.py                                  twenty kills, preset nano
    python tests/kill_and_resume.py --kills 5 --preset tiny --steps 40 --save-every 4

Flags that are not listed by --help go to `minids.train`. Every start is `python -m minids.train`
in a process of its own, and every kill a SIGKILL, which no process can answer. The moments are
drawn uniformly from the part of the run that is left for each kill, counted from the moment when
the run begins to write into its folder, so that they fall into steps, validations and saves alike.
A run that ends before its kill is compared too, and another one is begun.

Equal means: weights and state byte for byte, the sample, and every line of metrics.jsonl, except
for what a clock or the memory's size decides.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--preset", "nano", "--steps", "60", "--save-every", "3", "--eval-every", "10"]
MEASURED = {"seconds", "tokens_per_s", "mfu", "memory_mib"}  # never twice the same


def start(flags: list[str], run: Path) -> subprocess.Popen:
    """Begin a run, or go on with it if its folder is complete."""
    resume = ["--resume"] if (run / "config.json").exists() else flags
    return subprocess.Popen([sys.executable, "-m", "minids.train", *resume, "--out", str(run)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_it_works(process: subprocess.Popen) -> None:
    """Return when the run is about to write into its folder: it has said what it will do."""
    for line in process.stdout:
        if line.startswith("run "):
            return
    raise AssertionError(f"the run did not start: {process.stderr.read()}")


def finish(process: subprocess.Popen) -> str:
    """Wait for a run that must end well; what it said."""
    out, err = process.communicate()
    assert process.returncode == 0, f"exit status {process.returncode}: {err}"
    return out


def run_unbroken(flags: list[str], run: Path) -> float:
    """Seconds that an unbroken run works."""
    process = start(flags, run)
    wait_until_it_works(process)
    begin = time.monotonic()
    finish(process)
    return time.monotonic() - begin


def newest_step(run: Path) -> int:
    """The newest checkpoint's step, 0 before the first."""
    found = (run / "checkpoints").glob("step_*")
    return max((int(path.name[5:].split(".")[0]) for path in found), default=0)


def kill_once(flags: list[str], run: Path, wait: float | None) -> bool:
    """Start the run, kill it `wait` seconds into its work; False if it ended before.

    wait: None lets it end
    """
    process = start(flags, run)
    wait_until_it_works(process)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.kill()
    finish(process) if process.wait() == 0 else process.communicate()
    return process.returncode == -signal.SIGKILL


def kill_and_resume(flags: list[str], unbroken: Path, seconds: float, run: Path, kills: int,
                    seed: int = 0, say=lambda text: None) -> None:
    """Kill and resume a run `kills` times; raises `AssertionError` if it ends differently.

    flags: what both runs are started with, but --out
    unbroken: folder of the finished run to compare with
    seconds: that it worked
    run: folder for the other; nothing may be there
    say: told of every kill
    """
    moments, last, done = random.Random(seed), newest_step(unbroken), 0
    while done < kills:
        left = seconds * (1 - newest_step(run) / last)
        wait = moments.uniform(0, left * 2 / (kills - done + 1)) if left else None
        if kill_once(flags, run, wait):
            done += 1
            saving = any((run / "checkpoints").glob(".tmp_*"))
            say(f"kill {done}: {wait:.2f} s into its work, newest checkpoint step "
                f"{newest_step(run)}{', in the middle of a save' if saving else ''}")
        else:
            assert_same_end(unbroken, run)
            shutil.rmtree(run)
    finish(start(flags, run))
    assert_same_end(unbroken, run)


def assert_same_end(a: Path, b: Path) -> None:
    """Raise `AssertionError` naming the first differences between two finished runs."""
    found = differences(a, b)
    assert not found, f"{a} and {b} differ in {len(found)} places: {'; '.join(found[:8])}"


def differences(a: Path, b: Path) -> list[str]:
    """What differs between the ends of two runs, in words; empty if nothing."""
    last = f"checkpoints/step_{newest_step(a):06d}"
    if newest_step(b) != newest_step(a):
        return [f"{a} ends at step {newest_step(a)}, {b} at {newest_step(b)}"]
    found = [name for name in (f"{last}/model.safetensors", "sample.txt")
             if (a / name).read_bytes() != (b / name).read_bytes()]
    for name, read in ((f"{last}/state.pt", read_state), ("metrics.jsonl", read_metrics)):
        left, right = read(a / name), read(b / name)
        found += [f"{name}: {key}" for key in {**left, **right}
                  if left.get(key) != right.get(key)]
    return found


def read_state(file: Path) -> dict[str, object]:
    """Every entry of state.pt by its place, tensors as bytes."""
    return dict(leaves(torch.load(file, weights_only=True)))


def read_metrics(file: Path) -> dict[str, object]:
    """Every number of metrics.jsonl by its line and name."""
    return dict(leaves([json.loads(line) for line in file.read_text().splitlines()]))


def leaves(value, place: str = ""):
    """(place, value) of everything in nested dicts, lists and tuples but what was measured."""
    if isinstance(value, dict):
        for key in value.keys() - MEASURED:
            yield from leaves(value[key], f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{place} length", len(value)
        for i, entry in enumerate(value):
            yield from leaves(entry, f"{place}[{i}]")
    elif isinstance(value, torch.Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield place, (str(value.dtype), tuple(value.shape), data)
    else:
        yield place, repr(value)  # NaN is equal to itself then


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many kills [20]")
    parser.add_argument("--kill-seed", type=int, default=0, help="decides the moments [0]")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        unbroken, run = Path(folder) / "unbroken", Path(folder) / "killed"
        seconds = run_unbroken(FLAGS + more, unbroken)
        print(f"unbroken: {newest_step(unbroken)} steps in {seconds:.1f} s", flush=True)
        kill_and_resume(FLAGS + more, unbroken, seconds, run, args.kills, args.kill_seed,
                        lambda text: print(text, flush=True))
        size = os.path.getsize(next(run.glob("checkpoints/*/model.safetensors")))
        print(f"after {args.kills} kills all bytes of the weights ({size:,}) and of the state are "
              "those of the unbroken run")


if __name__ == "__main__":
    main()
