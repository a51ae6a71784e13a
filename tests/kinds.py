"""Try instances of every kind of fault that daily life found, and print how many end right.

    python tests/kinds.py                        the package of this clone
    python tests/kinds.py --root OLD --wrong     another clone's; name what ends wrong, and how
    python tests/kinds.py --only seal lock       some kinds

Each instance is a command as a user would type it, in a folder of its own; they are listed in
`kinds_table.py` and made by `kinds_cases.py`. One process imports torch and forks the programs.
"""

import argparse
import contextlib
import importlib
import json
import os
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LIMIT = 60  # seconds; what takes longer hangs


class Ended(NamedTuple):
    """The end of a program: its status, what it printed, its folder."""

    status: int
    out: str
    err: str
    folder: Path

    def __str__(self) -> str:
        return f"status {self.status}: {(self.err or self.out).strip()[-300:]!r}"


class Case(NamedTuple):
    """An instance of a kind.

    words: the command after `python -m minids.`; before: what is done to the folder first
    right: the words that one line on stderr has to hold, with status 2; or a function of the end
    hook: what is done in the program's process before it starts
    """

    kind: str
    words: str
    right: tuple[str, ...] | Callable[[Ended], bool]
    before: tuple[Callable[[], None], ...] = ()
    listed: bool = False
    hook: Callable[[], None] | None = None


def is_one_line(end: Ended, words: tuple[str, ...]) -> bool:
    """Return whether a program refused, in one line that has these words."""
    return (end.status == 2 and len(end.err.strip().splitlines()) == 1
            and all(word in end.err for word in words))


def works(*words: str) -> Callable[[Ended], bool]:
    """Return the check of a program that does its work and says these words."""
    return lambda end: end.status == 0 and all(word in end.out + end.err for word in words)


def wait(child: int) -> int:
    """Wait for a process; return its status, as that of a signal if it hung and was killed."""
    for _ in range(LIMIT * 20):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -99


def start(words: str, folder: Path, hook: Callable[[], None] | None = None) -> int:
    """Fork a program in a folder; return the process. What it prints goes to out.txt, err.txt."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    name, *flags = shlex.split(words)
    if not Path(os.environ["PYTHONPATH"], "minids/lab").exists():  # of an earlier version
        name = name.removeprefix("lab.")
    sys.argv = [name, *flags]
    status = 1
    try:
        if hook:
            hook()
        warnings.filterwarnings("ignore", "'minids", RuntimeWarning)  # of runpy: it was imported
        runpy.run_module(f"minids.{name}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status or 0)


def run(words: str, folder: Path, hook: Callable[[], None] | None = None) -> Ended:
    """Run a program to its end in a folder."""
    status = wait(start(words, folder, hook))
    out, err = ((folder / n).read_text("utf-8", "replace") for n in ("out.txt", "err.txt"))
    return Ended(status, out, err, folder)


def metrics_of(run: Path) -> list[dict]:
    """Return the lines of a run's metrics without what no two runs have alike."""
    times = {"seconds", "tokens_per_s", "mfu", "memory_mib", "sampling_s"}
    return [{k: v for k, v in json.loads(line).items() if k not in times}
            for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def make_home(folder: Path) -> None:
    """Make what the instances begin with: texts, a tokenizer, a run of two programs, an export."""
    import kinds_cases
    (folder / "texts").mkdir(parents=True)
    for i, text in enumerate(kinds_cases.texts()):
        (folder / f"texts/{i:02d}.txt").write_text(text, "utf-8")
    kinds_cases.write_inputs(folder)
    for words in kinds_cases.HOME:
        end = run(words, folder)
        if end.status:
            sys.exit(f"{words}: {end}")
    for name in ("out.txt", "err.txt"):
        (folder / name).unlink()


def try_case(case: Case, home: Path, folder: Path) -> str:
    """Return what is wrong at the end of an instance; "" if it is right."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home, folder, symlinks=True)
    os.chdir(folder)
    try:
        for change in case.before:
            change()
        end = run(case.words, folder, case.hook)
        good = is_one_line(end, case.right) if isinstance(case.right, tuple) else case.right(end)
        return "" if good and end.status != -99 else str(end)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def show(table: dict[str, list[bool]], cases: list[Case]) -> None:
    """Print the kinds: how many instances FIELD.md lists, how many others, how many are right."""
    counts = {}
    for kind, right in table.items():
        tried = [case for case in cases if case.kind == kind][:len(right)]
        listed = sum(case.listed for case in tried)
        counts[kind] = listed, len(right) - listed, sum(right)
    counts["together"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    print(f"\n{'kind':<28}{'of FIELD':>10}{'others':>8}{'right':>8}")
    for kind, (listed, others, good) in counts.items():
        print(f"{kind:<28}{listed:>10}{others:>8}{good:>8}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=str(Path(__file__).resolve().parents[1]))
    parser.add_argument("--only", nargs="*", default=[], help="names of kinds")
    parser.add_argument("--wrong", action="store_true", help="name what ends wrong")
    args = parser.parse_args()
    sys.path[:0] = [args.root, str(Path(__file__).resolve().parent)]
    os.environ |= {"PYTHONPATH": args.root, "OMP_NUM_THREADS": "1"}
    for name in ("train", "sft", "grpo", "generate", "evaluate", "solve", "distill", "hf", "r1"):
        importlib.import_module(f"minids.{name}")
    import kinds_table
    cases = [case for case in kinds_table.cases() if case.kind in args.only or not args.only]
    table: dict[str, list[bool]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was tried so far is printed
    try:
        with tempfile.TemporaryDirectory() as scratch:
            home = Path(scratch) / "home"
            make_home(home)
            for number, case in enumerate(cases):
                wrong = try_case(case, home, Path(scratch) / "case")
                table.setdefault(case.kind, []).append(not wrong)
                if wrong and args.wrong:
                    print(f"{case.kind} {number}: {case.words}\n    {wrong}", flush=True)
            os.chdir("/")
    finally:
        show(table, cases)


if __name__ == "__main__":
    main()
