"""Count the mistakes that the tests notice: draw random mutants of each file, run what covers them.

    python tests/mutants.py cover --jobs 2          which test runs which line, for every test
    python tests/mutants.py try --per-file 15 --seed 1 --jobs 2

A mutant is the file with one small change of its code: an operator swapped, a comparison turned,
a constant changed, a statement dropped, two arguments of a call exchanged, a condition negated.
Each kind is drawn equally often. The tests that run one of its lines are tried, the fastest first,
up to --seconds of them; it is killed if one fails or takes far longer than without the mutant.
--out gets a line for each, so that a second call goes on where the first stopped. Prints a table,
and the survivors as diffs. Exhaustive: it takes many minutes.
"""

import argparse
import ast
import atexit
import collections
import contextlib
import difflib
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve()

# (file, line before, line after) -> why no test can see the difference.
EQUIVALENT: dict[tuple[str, str, str], str] = {}

OPERATORS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add],
             ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult],
             ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd]}
COMPARISONS = {ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.Lt],
               ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq],
               ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In]}
FORK = multiprocessing.get_context("fork")
SILENT = {"print", "option", "ArgumentParser", "add_argument", "field"}  # texts and defaults
TEXTS = {"annotation", "returns", "decorator_list", "exc"}


def changed(node: ast.AST, **parts) -> ast.AST:
    """Return a copy of a node with some of its fields replaced."""
    return type(node)(**dict(ast.iter_fields(node)) | parts)


def name_of(call: ast.Call) -> str:
    """Return the last name of what is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def mutations(node: ast.AST):
    """Yield (kind, node to replace, replacement) for each mutation of this one node."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            for other in OPERATORS.get(type(op), []):
                yield "operator", node, changed(node, op=other())
        case ast.Compare(ops=[op, *rest]):
            for other in COMPARISONS.get(type(op), []):
                yield "comparison", node, changed(node, ops=[other(), *rest])
        case ast.BoolOp(op=op):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "operator", node, changed(node, op=other)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "operator", node, operand
        case ast.Constant(value=bool() as value):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            others = [value + 1, value - 1] if isinstance(value, int) else [value * 2, value / 2]
            for other in others:
                yield "constant", node, ast.Constant(other)
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.Call) and name_of(node) not in ("min", "max", "minimum", "maximum"):
        for i, (a, b) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if ast.dump(a) != ast.dump(b) and not isinstance(a, ast.Starred):
                args = [*node.args[:i], b, a, *node.args[i + 2:]]
                yield "arguments", node, changed(node, args=args)


def droppable(node: ast.AST, stores: collections.Counter) -> bool:
    """Return whether the code still has all its names when a statement is dropped."""
    if isinstance(node, ast.Assign):
        return all(stores[n.id] > 1 for n in ast.walk(node)
                   if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    text = isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or (
        isinstance(node.value, ast.Call) and name_of(node.value) in SILENT))
    return isinstance(node, ast.Expr | ast.AugAssign | ast.Raise) and not text


def walk(node: ast.AST, stores: collections.Counter):
    """Yield all mutations of the code below a node; annotations and texts are left out."""
    yield from mutations(node)
    if droppable(node, stores):
        yield "statement", node, ast.Pass()
    if isinstance(node, ast.FunctionDef):
        stores = collections.Counter(n.id if isinstance(n, ast.Name) else n.arg
                                     for n in ast.walk(node) if isinstance(n, ast.arg)
                                     or isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    for name, value in ast.iter_fields(node):
        if name in TEXTS or isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Call) and name == "args" and name_of(node) in SILENT):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from walk(child, stores)


def draw(source: str, count: int, seed: str) -> list[tuple[str, str, range]]:
    """Return up to `count` mutants of a source, each kind equally often.

    A mutant is (kind, new source, lines of the old source that it changes).
    """
    rng, whole, kinds = random.Random(seed), source.encode(), collections.defaultdict(list)
    starts = [0, *itertools.accumulate(map(len, whole.splitlines(keepends=True)))]
    for kind, old, new in walk(ast.parse(source), collections.Counter()):
        begin = starts[old.lineno - 1] + old.col_offset
        end = starts[old.end_lineno - 1] + old.end_col_offset
        text = f"({ast.unparse(new)})" if isinstance(old, ast.expr) else ast.unparse(new)
        mutant = (whole[:begin] + text.encode() + whole[end:]).decode()
        kinds[kind].append((mutant, range(old.lineno, old.end_lineno + 1)))
    order, drawn = sorted(kinds), {}
    for pool in (order, *map(kinds.get, order)):
        rng.shuffle(pool)
    while any(kinds.values()):
        for kind in filter(kinds.get, order):
            drawn.setdefault(kinds[kind].pop(), kind)
    return [(kind, *mutant) for mutant, kind in itertools.islice(drawn.items(), count)]


# Which test runs which line: this file is pytest's plugin, and a child process's, meanwhile.


class Recorder:
    """Note the package's lines that this process runs, under the name of the test that runs."""

    def __init__(self, package: Path):
        self.package = f"{package}{os.sep}"
        self.lines = collections.defaultdict(set)  # test -> {(file, line)}
        self.seconds = collections.Counter()
        self.failed = set()
        if watch := getattr(sys, "monitoring", None):  # Python 3.12: no other code is slowed
            watch.use_tool_id(watch.COVERAGE_ID, "mutants")
            watch.register_callback(watch.COVERAGE_ID, watch.events.PY_START, self.begin)
            watch.register_callback(watch.COVERAGE_ID, watch.events.LINE, self.note)
            watch.set_events(watch.COVERAGE_ID, watch.events.PY_START)
        self.pytest_runtest_logstart()

    def pytest_runtest_logstart(self):
        self.test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        if not hasattr(sys, "monitoring"):
            sys.settrace(self.enter)
            threading.settrace(self.enter)

    def pytest_runtest_setup(self, item):
        self.test = item.nodeid

    def begin(self, code, offset):
        if self.counts(code):
            sys.monitoring.set_local_events(
                sys.monitoring.COVERAGE_ID, code, sys.monitoring.events.LINE)
        return sys.monitoring.DISABLE

    def note(self, code, line):
        self.lines[self.test].add((code.co_filename, line))

    def counts(self, code) -> bool:
        """Return whether code is a function of the package; what runs on import is no test's."""
        return code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(self.package)

    def enter(self, frame, event, arg):
        return self.line if self.counts(frame.f_code) else None

    def line(self, frame, event, arg):
        self.note(frame.f_code, frame.f_lineno)
        return self.line

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self):
        self.write()  # a suite that is cut short has noted what it ran

    def write(self) -> None:
        """Append what was seen, a line for each test, in the folder that MUTANTS_COVER names."""
        root = Path(self.package).parent
        with open(Path(os.environ["MUTANTS_COVER"], f"{os.getpid()}.jsonl"), "a") as out:
            for test, lines in self.lines.items():
                files = collections.defaultdict(list)
                for file, line in sorted(lines):
                    files[os.path.relpath(file, root)].append(line)
                print(json.dumps(dict(test=test, seconds=self.seconds[test], lines=files,
                                      failed=test in self.failed)), file=out)
        self.lines.clear()


def pytest_configure(config) -> None:
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(Recorder(Path(config.rootpath, "minids")))


def cover(root: Path, out: Path, args) -> None:
    """Run the suite once, every process noting its lines, and write them together to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes")
        notes.mkdir()
        Path(folder, "sitecustomize.py").write_text(
            f"import sys; sys.path.append({str(HERE.parent)!r}); import mutants; "
            f"mutants.record_child({str(root)!r})")
        env = os.environ | dict(MUTANTS_COVER=str(notes), OMP_NUM_THREADS="1", PYTHONPATH=(
            f"{folder}:{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"))
        limit = [] if args.limit is None else ["timeout", "-s", "INT", str(args.limit)]
        subprocess.run([*limit, sys.executable, "-m", "pytest", "-q", "-p", "mutants",
                        "-p", "no:cacheprovider", "-o", "addopts=", "-n", str(args.jobs),
                        "--dist", "worksteal", "-m", args.mark, *args.pytest],
                       cwd=root, env=env, check=False)
        tests = collections.defaultdict(lambda: dict(seconds=0.0, lines={}, failed=False))
        for row in (json.loads(line) for note in notes.iterdir() for line in note.open()):
            test = tests[row["test"]]
            test["seconds"] += row["seconds"]
            test["failed"] |= row["failed"]
            for file, lines in row["lines"].items():
                test["lines"][file] = sorted({*test["lines"].get(file, []), *lines})
    out.write_text(json.dumps({test: what for test, what in tests.items() if not what["failed"]}))
    print(f"{len(tests)} tests, {sum(t['failed'] for t in tests.values())} failed: {out}")


def record_child(root: str) -> None:
    """Record a program that a test starts; a worker of pytest has its plugin."""
    if "MUTANTS_COVER" in os.environ and os.environ.get("PYTEST_CURRENT_TEST"):
        atexit.register(Recorder(Path(root, "minids")).write)


def tests_of(covers: dict, file: str, lines: range, limit: float) -> tuple[list[str], float]:
    """Return the fastest tests that run one of these lines, and their seconds together.

    Lines that run when the file is imported belong to every test that runs one of the file's.
    """
    ran = {test: set(what["lines"].get(file, ())) for test, what in covers.items() if test}
    found = [test for test, own in ran.items() if own.intersection(lines)]
    found = found or [test for test, own in ran.items() if own]
    seconds, chosen = 0.0, []
    for test in sorted(found, key=lambda test: covers[test]["seconds"]):
        seconds += covers[test]["seconds"]
        if chosen and seconds > limit:
            break
        chosen.append(test)
    return chosen, min(seconds, limit)


def clone(root: Path) -> Path:
    """Return a copy of the checkout in which the package and the tests can be changed."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    for entry in root.iterdir():
        if entry.name in ("minids", "tests", "notebooks"):
            shutil.copytree(entry, folder / entry.name,
                            ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.name[0] != ".":
            (folder / entry.name).symlink_to(entry.resolve())
    return folder


def in_fork(folder: Path, tests: list[str]) -> None:
    """Run tests of a copy in this process, in their order, and end it with pytest's status."""
    import pytest

    os.setsid()
    os.chdir(folder)
    sys.path[0] = str(folder)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os._exit(pytest.main(["-xq", "-p", "no:cacheprovider", "-o", "addopts=", *tests]))


def run_tests(folder: Path, tests: list[str], limit: float) -> tuple[int | str, float]:
    """Return pytest's status, or "timeout", and seconds, from a fork that has imported torch."""
    start = time.monotonic()
    child = FORK.Process(target=in_fork, args=(folder, tests))
    child.start()
    child.join(limit)
    status = "timeout" if child.is_alive() else child.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what the tests have started ends with them
    child.join()
    return status, time.monotonic() - start


def judge(root: Path, folders: queue.Queue, covers: dict, mutant: tuple, args) -> dict:
    """Return what became of one mutant, (file, key, kind, new source, lines)."""
    file, key, kind, new, lines = mutant
    source = (root / file).read_text(encoding="utf-8")
    tests, seconds = tests_of(covers, file, lines, args.seconds)
    folder = folders.get()
    try:
        (folder / file).write_text(new, encoding="utf-8")
        status, took = run_tests(folder, tests, 60 + 4 * seconds) if tests else (0, 0)
        (folder / file).write_text(source, encoding="utf-8")
    finally:
        folders.put(folder)
    diff = [*difflib.unified_diff(source.splitlines(), new.splitlines(), n=0, lineterm="")]
    return dict(file=file, key=key, kind=kind, status=status, tests=len(tests),
                seconds=round(took, 1), killed=status != 0, diff=diff[2:])


def survives(row: dict) -> bool:
    """Return whether a mutant with an effect was not noticed."""
    lines = [[line[1:].strip() for line in row["diff"] if line[0] == sign] for sign in "-+"]
    return not row["killed"] and (row["file"], *map(" ".join, lines)) not in EQUIVALENT


def table(rows: list[dict]) -> None:
    """Print how many mutants of each file were killed, and the survivors."""
    files = collections.defaultdict(list)
    for row in rows:
        files[row["file"]].append(row)
    print(f"\n{'file':36} mutants killed equivalent survived")
    for file, some in [*sorted(files.items()), ("all", rows)]:
        killed, lived = sum(r["killed"] for r in some), sum(map(survives, some))
        print(f"{file:36}{len(some):8} {killed:6} {len(some) - killed - lived:10} {lived:8}")
    for row in filter(survives, rows):
        print(f"\n{row['file']} ({row['kind']}, {row['tests']} tests)", *row["diff"], sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["cover", "try"])
    parser.add_argument("--files", nargs="+", help="files, as minids/model/mla.py (default: all)")
    parser.add_argument("--per-file", type=int, default=15, help="mutants a file (default 15)")
    parser.add_argument("--seed", type=int, default=1, help="which mutants are drawn (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--seconds", type=float, default=60, help="of tests a mutant (default 60)")
    parser.add_argument("--covers", default="runs/covers.json", help="which test runs which line")
    parser.add_argument("--out", default="runs/mutants.jsonl", help="what became of the mutants")
    parser.add_argument("--limit", type=int, help="seconds that cover takes at most")
    parser.add_argument("--mark", default="not slow and not exhaustive", help="-m, of cover")
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help="a checkout")
    parser.add_argument("--pytest", nargs="*", default=[], help="more arguments of cover's pytest")
    args = parser.parse_args()
    root, covers, out = args.root.resolve(), Path(args.covers).resolve(), Path(args.out).resolve()
    for path in (covers, out):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.what == "cover":
        cover(root, covers, args)
        return

    import torch  # once: the forks inherit it

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    found = json.loads(covers.read_text())
    files = args.files or sorted(str(p.relative_to(root)) for p in root.glob("minids/**/*.py"))
    mutants = [(file, hashlib.sha256(new.encode()).hexdigest()[:16], kind, new, lines)
               for file in files for kind, new, lines in draw(
                   (root / file).read_text(encoding="utf-8"), args.per_file, f"{args.seed} {file}")]
    folders = queue.Queue()
    for _ in range(args.jobs):
        folders.put(clone(root))
    with out.open("a+") as lines, ThreadPoolExecutor(args.jobs) as pool:
        lines.seek(0)
        done = {(row["file"], row["key"]): row for row in map(json.loads, lines)}
        rows = [done[m[:2]] for m in mutants if m[:2] in done]
        tasks = [m for m in mutants if m[:2] not in done]
        random.Random(args.seed).shuffle(tasks)  # an interrupted run has tried some of each file
        jobs = [pool.submit(judge, root, folders, found, m, args) for m in tasks]
        for job in as_completed(jobs):
            row = job.result()
            print(json.dumps(row), file=lines, flush=True)
            rows.append(row)
    while not folders.empty():
        shutil.rmtree(folders.get())
    table(rows)


if __name__ == "__main__":
    main()
