"""Kill a run at random moments, resume it each time, compare it with an unbroken one.

    python tests/kill_and_resume.py                                  twenty kills, preset nano
    python tests/kill_and_resume.py --kills 5 --preset tiny --steps 40 --save-every 4
    python tests/kill_and_resume.py --program grpo                   or sft, or r1
    python tests/kill_and_resume.py --program r1 --default --folder kills/r1
                                     the program's default settings; stop it, start it, it goes on

Flags that are not listed by --help go to the program. Every start is `python -m minids.PROGRAM`
in a process of its own, and every kill a SIGKILL, which no process can answer. The moments are
drawn uniformly from the part of the run that is left and a quarter of the run more, counted from
the moment when the run begins to write into its folder, so that they fall into steps, validations
and saves alike. A run that ends before its kill is compared too, and another one is begun.

Without --default train is the nano preset with many checkpoints; sft, grpo and r1 have their own
numbers of steps and of steps between checkpoints, and only batches, groups and examinations are
smaller. GRPO saves at its last step alone: kills fall anywhere. All run on one thread, because the
number of threads decides the bytes.

Equal means: weights and state byte for byte, the sample, and every line of metrics.jsonl, except
for what a clock or the memory's size decides; of r1 those of every stage, its corpora and marks;
and no file more or less.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
R1 = ROOT / "data/r1"
DEFAULT = {
    "train": ["--threads", "1"],
    "sft": ["--from", str(R1 / "base"), "--threads", "1"],
    "grpo": ["--from", str(R1 / "sft"), "--threads", "1"],
    "r1": ["--threads", "1"],
}
SMALL = {
    "train": ["--preset", "nano", "--steps", "60", "--save-every", "3", "--eval-every", "10"],
    "sft": ["--batch-size", "1", "--examples", "64", "--eval-problems", "2"],
    "grpo": ["--questions", "2", "--group", "2", "--eval-problems", "2"],
    "r1": ["--problems", "4"],
}
R1_SMALL = DEFAULT["r1"] + SMALL["r1"]
MEASURED = {"seconds", "tokens_per_s", "mfu", "memory_mib", "sampling_s"}  # never twice the same


def start(flags: list[str], run: Path, program: str = "train") -> subprocess.Popen:
    """Begin a run, or go on with it if its folder is complete."""
    resume = ["--resume"] if (run / "config.json").exists() else flags
    module = ["-m", f"minids.{program}"]
    if program == "r1":
        module = ["-c", f"import kill_and_resume as k; k.run_r1({flags[:4] == R1_SMALL})"]
    return subprocess.Popen([sys.executable, *module, *resume, "--out", str(run)], cwd=ROOT,
                            env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_r1(small: bool) -> None:
    """Run `minids.r1` as it is, or `small`; a stage that is skipped says nothing, so this does."""
    from minids import r1
    from minids.base.command_line import run_program
    if small:
        make_r1_small(r1)
    print("run begins", flush=True)
    run_program("minids.r1", r1.main, lasting=True)


def make_r1_small(r1) -> None:
    """Keep the stages' steps and checkpoints, and make their batches smaller."""
    import pytest
    import test_r1
    steps = {name: {key: value for key, value in found.items() if key == "steps"}
             for name, found in r1.PRESETS["tiny"].items() if name in r1.STAGES}
    test_r1.shorten(pytest.MonkeyPatch())
    small = dict(train=dict(batch_size=2), sft=dict(batch_size=1, examples=64, eval_problems=2),
                 grpo=dict(questions=2, group=2, max_new_tokens=8, eval_problems=2))
    r1.PRESETS["tiny"] |= {name: small[stage.program.__name__] | steps[name]
                           for name, stage in r1.STAGES.items()}


def wait_until_it_works(process: subprocess.Popen) -> None:
    """Return when the run is about to write into its folder: it has said what it will do."""
    for line in process.stdout:
        if line.startswith("run ") or "; run " in line:
            return
    raise AssertionError(f"the run did not start: {process.stderr.read()}")


def finish(process: subprocess.Popen) -> str:
    """Wait for a run that must end well; what it said."""
    out, err = process.communicate()
    assert process.returncode == 0, f"exit status {process.returncode}: {err}"
    return out


@contextlib.contextmanager
def working(flags: list[str], run: Path, program: str):
    """Start a run and wait until it works; what interrupts this process ends the run too."""
    process = start(flags, run, program)
    try:
        wait_until_it_works(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def run_unbroken(flags: list[str], run: Path, program: str = "train") -> float:
    """Return the seconds that an unbroken run works."""
    with working(flags, run, program) as process:
        begin = time.monotonic()
        finish(process)
        return time.monotonic() - begin


def newest_step(run: Path) -> int:
    """The newest checkpoint's step, 0 before the first; of a pipeline the sum of its stages'."""
    if stages := [path.parent for path in run.glob("*/checkpoints")]:
        return sum(map(newest_step, stages))
    found = (run / "checkpoints").glob("step_*")
    return max((int(path.name[5:].split(".")[0]) for path in found), default=0)


def kill_once(flags: list[str], run: Path, wait: float | None, program: str = "train") -> bool:
    """Start the run, kill it `wait` seconds into its work; False if it ended before.

    wait: None lets it end
    """
    with working(flags, run, program) as process:
        try:
            process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
        killed = process.wait() == -signal.SIGKILL and wait is not None
        if not killed:
            finish(process)
        return killed


def kill_and_resume(flags: list[str], unbroken: Path, seconds: float, run: Path, kills: int,
                    seed: int = 0, say=lambda done, text: None, program: str = "train",
                    done: int = 0) -> None:
    """Kill and resume a run `kills` times; raises `AssertionError` if it ends differently.

    flags: what both runs are started with, but --out
    unbroken: folder of the finished run to compare with
    seconds: that it worked
    run: folder for the other; an interrupted one goes on
    say: told of every kill, with their number, and of every comparison
    done: kills before this call
    """
    last, ends = newest_step(unbroken), 0
    while done < kills:
        left = seconds * (1.25 - newest_step(run) / last)  # 1: no run would come to its end
        wait = random.Random(f"{seed} {done} {ends}").uniform(0, left)
        if kill_once(flags, run, wait, program):
            done += 1
            saving = any(run.rglob("checkpoints/.tmp_*"))
            say(done, f"kill {done} of {kills}: {wait:.2f} s into its work, newest checkpoint step "
                      f"{newest_step(run)}{', in the middle of a save' if saving else ''}")
        else:
            ends += 1
            assert_same_end(unbroken, run)
            say(done, "it came to its end: equal; another run begins")
            shutil.rmtree(run)
    kill_once(flags, run, None, program)
    assert_same_end(unbroken, run)


def assert_same_end(a: Path, b: Path) -> None:
    """Raise `AssertionError` naming the first differences between two finished runs."""
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (a, b)]
    found = [f"{name} is in one alone" for name in names[0] ^ names[1]] + differences(a, b)
    assert not found, f"{a} and {b} differ in {len(found)} places: {'; '.join(found[:8])}"


def differences(a: Path, b: Path) -> list[str]:
    """What differs between the ends of two runs, in words; empty if nothing."""
    if stages := [path.parent.name for path in sorted(a.glob("*/checkpoints"))]:
        made = [path.name for path in a.glob("*") if path.name != "times.json" and path.is_file()]
        left, right = ({name: content(run, name) for name in made} for run in (a, b))
        return [f"{stage}: {text}" for stage in stages
                for text in differences(a / stage, b / stage)] + [
                    name for name in made if left[name] != right[name]]
    last = f"checkpoints/step_{newest_step(a):06d}"
    if newest_step(b) != newest_step(a):
        return [f"{a} ends at step {newest_step(a)}, {b} at {newest_step(b)}"]
    found = [name for name in (f"{last}/model.safetensors", "sample.txt")
             if (a / name).exists() and (a / name).read_bytes() != (b / name).read_bytes()]
    for name, read in ((f"{last}/state.pt", read_state), ("metrics.jsonl", read_metrics)):
        left, right = read(a / name), read(b / name)
        found += [f"{name}: {key}" for key in {**left, **right}
                  if left.get(key) != right.get(key)]
    return found


def content(run: Path, name: str) -> bytes | dict:
    """What a file of a pipeline holds, without the run's own path and the seal, which covers it."""
    data = (run / name).read_bytes().replace(bytes(run), b"")
    if name.endswith(".jsonl.json"):  # a corpus's settings
        return {key: value for key, value in json.loads(data).items() if key != "seal"}
    return data


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


def note(log: Path, found: dict) -> None:
    """Keep how far the kills have come, whole or not at all."""
    new = log.with_suffix(".new")
    new.write_text(json.dumps(found) + "\n")
    new.replace(log)


def kill_in(folder: Path, program: str, flags: list[str], kills: int, seed: int) -> None:
    """Kill a run in `folder`, where what an earlier start found goes on."""
    unbroken, run, log = (folder / name for name in ("unbroken", "killed", "kills.json"))
    if log.exists():
        found = json.loads(log.read_text())
        if found["flags"] != [program, *flags]:
            sys.exit(f"{folder} holds kills of {shlex.join(found['flags'])}: name another --folder")
    else:
        shutil.rmtree(unbroken, ignore_errors=True)  # it was broken
        found = dict(flags=[program, *flags], done=0,
                     seconds=run_unbroken(flags, unbroken, program))
        note(log, found)
    print(f"unbroken: {newest_step(unbroken)} steps in {found['seconds']:.1f} s; "
          f"{found['done']} of {kills} kills are done", flush=True)

    def say(done: int, text: str) -> None:
        note(log, found | dict(done=done))
        print(f"{time.strftime('%H:%M:%S')} {program}: {text}", flush=True)

    kill_and_resume(flags, unbroken, found["seconds"], run, kills, seed, say, program,
                    found["done"])
    size = sum(os.path.getsize(path) for path in run.rglob("checkpoints/*/model.safetensors"))
    print(f"after {kills} kills all bytes of the weights ({size:,}) and of the state are those of "
          "the unbroken run")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="train", choices=DEFAULT, help="what to kill [train]")
    parser.add_argument("--kills", type=int, default=20, help="how many kills [20]")
    parser.add_argument("--kill-seed", type=int, default=0, help="decides the moments [0]")
    parser.add_argument("--default", action="store_true", help="the program's default settings")
    parser.add_argument("--folder", type=Path,
                        help="keep the runs here; a stopped command goes on [a temporary one]")
    args, more = parser.parse_known_args()
    flags = DEFAULT[args.program] + ([] if args.default else SMALL[args.program]) + more
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        kill_in(folder.resolve(), args.program, flags, args.kills, args.kill_seed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
