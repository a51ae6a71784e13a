"""Count the mistakes that the tests notice: draw random mutants of each file, run what covers them.

    python tests/mutants.py cover --pytest tests/model   which of these tests runs which line
    python tests/mutants.py try --per-file 15 --seed 1

A mutant is the file with one small change of its code: an operator swapped, a comparison turned,
a constant changed, a statement dropped, two arguments of a call exchanged, a condition negated.
Each kind is drawn equally often. The tests that run one of its lines are tried, up to --seconds of
them, file by file, those of its own folder and the fastest first. A mutant is killed if one fails,
computes far longer than without the mutant, or waits for ever. Seconds are a processor's time.
The control: a test that kills for the first time is run again in the same way without the mutant,
behind the tests that came before it. If it fails again, it is left out, and the mutant tried anew.

`cover` adds to what earlier calls found. `try` collects all tests once; a fork of that process gets
the changed functions and runs the tests. Where a change acts when the package is imported, a fork
from before imports it anew. --out gets a line for each, so that a second call goes on where the
first stopped; survivors are tried again where more tests are known to run them, and all of them
with --again. Prints a table and the survivors as diffs; `show` does nothing else. Exhaustive: it
takes an hour and more.
"""

import argparse
import collections
import contextlib
import difflib
import functools
import gc
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest
from covered_lines import Covers, computed, record
from equivalent_mutants import EQUIVALENT
from mutations import draw, swaps

HERE = Path(__file__).resolve()
FORK = multiprocessing.get_context("fork")
QUIET = 180  # seconds without any computing until tests count as waiting for ever
MEMORY = 12 * 2 ** 30  # bytes of a mutant that allocates without end
FILES_ANEW = 24  # of tests, for a mutant that needs them imported

# Kernels: tests/kernels tries them on a GPU, and the plain ones by Triton's interpreter.
ON_A_GPU = "minids/kernels/triton_", "minids/kernels/few_tokens_gpu"


class Task(NamedTuple):
    """A mutant, the tests to try, and the seconds that they compute without it."""

    file: str
    key: str
    kind: str
    new: str
    pairs: list | None  # functions before and after; None: the package is imported anew
    tests: list[str]
    seconds: float


def key_of(source: str) -> str:
    """Return the name of a mutant in --out."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def task_of(covers: Covers, file: str, kind: str, new: str, lines: range,
            limit: float) -> Task | None:
    """Return what to do with a mutant; None if it is the same code in other words."""
    code = compile(new, covers.root / file, "exec", dont_inherit=True)
    pairs = swaps(covers.read(file)[1], code)
    if pairs == []:
        return None
    if pairs and any(covers.ran_on_import(file, before) for before, _ in pairs):
        pairs = None  # what it returned then, stays
    tests, seconds = covers.choose(file, lines, limit)
    if pairs is None and not tests:
        tests, seconds = covers.choose(file, None, limit)
    if pairs is None:
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))[:FILES_ANEW]
        tests = [test for test in tests if test.partition("::")[0] in files]
    return Task(file, key_of(new), kind, new, pairs, tests, seconds)


# A fork runs the tests of one mutant, in a copy of the checkout.


def clone(root: Path) -> Path:
    """Return a copy of the checkout in which the package and the tests can be changed."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-")).resolve()
    for entry in root.iterdir():
        if entry.name in ("minids", "tests", "notebooks"):
            shutil.copytree(entry, folder / entry.name)
        elif entry.name[0] != ".":  # a test asks whether a file lies in it
            (shutil.copy if entry.is_file() else os.symlink)(entry.resolve(), folder / entry.name)
    return folder


def processes(session: int) -> dict[int, float]:
    """Return the living processes of a session, and the seconds that each has computed."""
    found, tick = {}, os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            values = stat.read_text().rpartition(")")[2].split()
            if int(values[3]) == session and values[0] != "Z":
                found[int(stat.parent.name)] = sum(map(int, values[11:15])) / tick
    return found


def watched(run, arguments: tuple, limit: float) -> tuple[int | str, float]:
    """Run a function in a fork; return its status, or why it was ended, and seconds computed."""
    begin, used, still, status = computed(), 0.0, 0.0, None
    child = FORK.Process(target=run, args=arguments)
    child.start()
    while status is None:
        child.join(0.5)
        if not child.is_alive():
            break
        now = sum(processes(child.pid).values())
        still = 0.0 if now > used + 0.02 else still + 0.5  # no clock: this process may be stopped
        used = max(used, now)
        if used > limit or still > QUIET:
            status = "computes" if used > limit else "waits"
    while left := processes(child.pid):  # what the tests have started ends with them
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.join(0.1)
    child.join()
    return child.exitcode if status is None else status, max(used, computed() - begin)


class Teller:
    """Leave the name of the first test that fails in a file."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)


def enter(folder: Path) -> list[str]:
    """Make a copy of the checkout this process's own, and return pytest's flags there."""
    os.chdir(folder)
    sys.path[0] = str(folder)
    for stream in (1, 2):
        os.dup2(os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    return ["-xq", "-p", "no:cacheprovider", "-o", "addopts=", f"--basetemp={folder}/temporary"]


def alone() -> None:
    """Make this fork a session of its own, with bounded memory."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def import_anew(folder: Path, tests: list[str], pairs: list | None) -> None:
    """Collect and run tests in this fork, which has not imported the package yet."""
    assert not pairs, "the source is changed, and no function of a loaded module"
    alone()
    os._exit(pytest.main([*enter(folder), *tests], [Teller(folder / "by.txt")]))


def run_swapped(folder: Path, session, items: list, pairs: list, loaded: dict) -> None:
    """Run collected tests in this fork, in which some functions are others."""
    alone()
    session.config.pluginmanager.register(Teller(folder / "by.txt"))
    # What tests share there, as a finished run, a mutant may have made.
    session.config._tmp_path_factory._basetemp = Path(tempfile.mkdtemp(dir=folder / "temporary"))
    for before, after in pairs:
        for function in loaded.get(position(before), ()):
            function.__code__ = after
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            os._exit(1)
    os._exit(0)


def position(code: CodeType) -> tuple[str, str, int]:
    """Return what names a function among all that are loaded."""
    return code.co_filename, code.co_qualname, code.co_firstlineno


class Trial:
    """Try mutants in a copy of the checkout, and the tests that kill without them.

    run: runs the named tests in a fork, some functions (before, after) changed
    """

    def __init__(self, folder: Path, args, run):
        self.folder, self.out, self.run = folder, args.out, run
        rows = read(args.out).values()
        self.passed = {row["by"] for row in rows if row["killed"]}
        self.failed = {test for row in rows for test in row["fail"]}

    def tests(self, task: Task, tests: list[str], pairs: list) -> tuple[int | str, float, str]:
        """Run tests; return their status, seconds computed, and the name of the one that failed."""
        (by := self.folder / "by.txt").unlink(missing_ok=True)
        (room := self.folder / "temporary").mkdir(exist_ok=True)
        status, used = watched(self.run, (tests, pairs), 20 + 5 * task.seconds)
        shutil.rmtree(room, ignore_errors=True)
        return status, used, by.read_text() if by.exists() else ""

    def mutant(self, task: Task) -> None:
        """Try one mutant, and add a line about it to --out."""
        path = self.folder / task.file
        source, times = path.read_text(encoding="utf-8"), path.stat()
        while True:
            tests = [test for test in task.tests if test not in self.failed]
            status, used, by = "unreached", 0.0, ""
            if tests:
                path.write_text(task.new, encoding="utf-8")
                os.utime(path, (int(task.key[:7], 16),) * 2)  # no compiled file of another fits
                status, used, by = self.tests(task, tests, task.pairs)
                path.write_text(source, encoding="utf-8")
                os.utime(path, (times.st_atime, times.st_mtime))
            if status in (0, "unreached") or by in self.passed:
                break
            upto = tests[:tests.index(by) + 1] if by in tests else tests
            without, _, guilty = self.tests(task, upto, [])
            if without == 0:
                self.passed |= {by} - {""}
                break
            self.failed.update([guilty] if guilty else upto)
        diff = [*difflib.unified_diff(source.splitlines(), task.new.splitlines(), n=0, lineterm="")]
        row = dict(file=task.file, key=task.key, kind=task.kind, status=status,
                   killed=status not in (0, "unreached"), by=by, tests=len(tests),
                   seconds=round(used, 2), anew=task.pairs is None, diff=diff[2:],
                   fail=sorted(self.failed.intersection(task.tests)))
        with self.out.open("a") as out:
            print(json.dumps(row), file=out)


class Collected:
    """Try mutants in forks of a pytest that has collected all tests, in place of the tests."""

    def __init__(self, folder: Path, tasks: list[Task], args):
        self.folder, self.tasks, self.args = folder, tasks, args

    def pytest_runtestloop(self, session):
        gc.unfreeze()  # what conftest.py has frozen is not found
        loaded = collections.defaultdict(list)
        for thing in gc.get_objects():
            if isinstance(thing, FunctionType):
                loaded[position(thing.__code__)].append(thing)
        gc.freeze()
        items = {item.nodeid: item for item in session.items}
        trial = Trial(self.folder, self.args, lambda tests, pairs: run_swapped(
            self.folder, session, [items[test] for test in tests if test in items], pairs, loaded))
        for task in self.tasks:
            trial.mutant(task)
        return True


def collect(folder: Path, files: list[str], tasks: list[Task], args) -> None:
    """Collect the tests of a copy in this fork, and try mutants in forks of it."""
    os._exit(pytest.main([*enter(folder), *files], [Collected(folder, tasks, args)]))


def work(folder: Path, todo: list[tuple], args) -> None:
    """Try mutants in a copy of the checkout.

    todo: (file, kind, new source, lines), and how many tests it has survived; -1 if none was tried
    """
    covers = Covers(args.covers, folder)
    tasks = [task for mutant, tried in todo if (task := task_of(covers, *mutant, args.seconds))
             and (args.again or len(task.tests) > tried)]
    swapped = [task for task in tasks if task.pairs]
    files = sorted({test.partition("::")[0] for task in swapped for test in task.tests})
    if swapped:
        collector = FORK.Process(target=collect, args=(folder, files, swapped, args))
        collector.start()
        collector.join()
    trial = Trial(folder, args, functools.partial(import_anew, folder))
    for task in tasks:
        if task.pairs is None:
            trial.mutant(task)
    shutil.rmtree(folder)


def preload(modules: list[str]) -> None:
    """Import what the tests import, except the package and themselves: the forks inherit it."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in modules:
        if not any(part in name for part in ("_inductor", "xdist", "coverage", "__main__")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would miss a thread"


def fate(row: dict) -> str:
    """Return what became of a mutant: a column of the table."""
    lines = [[line[1:].strip() for line in row["diff"] if line[0] == sign] for sign in "-+"]
    if row["killed"]:
        return "killed"
    if any((row["file"], *map(" ".join, lines)) in same for same in EQUIVALENT.values()):
        return "equivalent"
    return "survived" if row["tests"] else "not reached"


def read(out: Path) -> dict[tuple[str, str], dict]:
    """Return what last became of each mutant, by file and key."""
    lines = out.read_text().splitlines() if out.exists() else ()
    return {(row["file"], row["key"]): row for row in map(json.loads, lines)}


def table(rows: list[dict], kernels: list[str]) -> None:
    """Print what became of the mutants of each folder, and those that were not killed."""
    folders = collections.defaultdict(collections.Counter)
    for row in rows:
        for name in (f"`{Path(row['file']).parent}/`", "together"):
            folders[name].update(["mutants", fate(row)])
    columns = "mutants", "killed", "survived", "equivalent", "not reached"
    print(f"\n| folder | {' | '.join(columns)} |\n" + "|---" * 6 + "|")
    for name, counts in sorted(folders.items(), key=lambda pair: (pair[0] == "together", pair[0])):
        print("|", name, "|", " | ".join(str(counts[column]) for column in columns), "|")
    print(f"\nNot drawn from: {len(kernels)} files of kernels, which run on a GPU or by Triton's "
          "interpreter.")
    killers = {row["by"] for row in rows if row["killed"]} - {""}
    print(f"Control: {len(killers)} tests killed, and each passed without the mutant; left out, "
          "because they fail without one:", *sorted({t for row in rows for t in row["fail"]}))
    for row in rows:
        if (found := fate(row)) in ("survived", "not reached"):
            print(f"\n{row['file']} ({row['kind']}, {found}, {row['tests']} tests)", *row["diff"],
                  sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["cover", "try", "show"])
    parser.add_argument("--files", nargs="+", help="files, as minids/model/mla.py (default: all)")
    parser.add_argument("--per-file", type=int, default=15, help="mutants a file (default 15)")
    parser.add_argument("--seed", type=int, default=1, help="which mutants are drawn (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--seconds", type=float, default=25, help="of tests a mutant (default 25)")
    parser.add_argument("--again", action="store_true", help="try the survivors again")
    parser.add_argument("--covers", type=Path, default="runs/covers.json",
                        help="which test runs which line")
    parser.add_argument("--out", type=Path, default="runs/mutants.jsonl",
                        help="what became of the mutants")
    parser.add_argument("--most", type=float, default=math.inf,
                        help="seconds of a file's tests that cover runs (default: all)")
    parser.add_argument("--cases", type=int, default=10 ** 6,
                        help="cases of a parametrised test that cover runs (default: all)")
    parser.add_argument("--missing", action="store_true",
                        help="cover runs only the tests that no earlier call has recorded")
    parser.add_argument("--mark", default="not slow and not exhaustive", help="-m, of cover")
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help="a checkout")
    parser.add_argument("--pytest", nargs="*", default=[], help="more arguments of cover's pytest")
    args = parser.parse_args()
    root, args.covers, args.out = args.root.resolve(), args.covers.resolve(), args.out.resolve()
    for path in (args.covers, args.out):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.what == "cover":
        record(root, args.covers, args)
        return
    found = args.files or sorted(str(p.relative_to(root)) for p in root.glob("minids/**/*.py"))
    files = [file for file in found if not file.startswith(ON_A_GPU)]
    mutants = [(file, *mutant) for file in files for mutant in draw(
        (root / file).read_text(encoding="utf-8"), args.per_file, f"{args.seed} {file}")]
    done = read(args.out)
    if args.what == "try":
        rows = [done.get((m[0], key_of(m[2]))) for m in mutants]
        todo = [(mutant, row["tests"] if row else -1)
                for mutant, row in zip(mutants, rows, strict=True)
                if not row or fate(row) in ("survived", "not reached")]
        random.Random(args.seed).shuffle(todo)  # an interrupted run has tried some of each file
        preload(json.loads(args.covers.read_text())[""]["modules"])
        jobs = [FORK.Process(target=work, args=(clone(root), todo[i::args.jobs], args))
                for i in range(args.jobs)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        done = read(args.out)
    table([done[name] for m in mutants if (name := (m[0], key_of(m[2]))) in done],
          [file for file in found if file not in files])


if __name__ == "__main__":
    main()
