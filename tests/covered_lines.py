"""Which test runs which line of the package: recorded once, then asked for each mutant.

This file is pytest's plugin while it records. The package coverage, which nbval brings along,
measures pytest's process, its forks, and by a .pth file every Python that a test starts.
"""

import collections
import contextlib
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import CodeType

import coverage
import psutil
import pytest

HERE = Path(__file__).resolve()
CONFIGURATION = """[run]
parallel = true
data_file = {folder}/lines
source = {root}/minids
context = ${{PYTEST_CURRENT_TEST-}}
patch = fork, _exit
core = ctrace
disable_warnings = no-data-collected, module-not-imported, module-not-measured, couldnt-parse,
    trace-changed, no-ctracer, dynamic-conflict
"""


def computed() -> float:
    """Return the seconds that this process and those it has started have computed."""
    seconds, this = 0.0, psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:4])  # its own, and of those it has waited for
    return seconds


class Recorder:
    """Name the running test to coverage, and note what each test and each shared fixture costs."""

    def __init__(self):
        self.test = self.phase = ""
        self.tests = {}
        self.failed = set()
        self.shared = {}  # fixture of more than one test -> seconds, and the test that set it up
        self.spent = collections.Counter()  # file -> seconds
        self.most = float(os.environ["COVERED_SECONDS"])
        self.cases = int(os.environ["COVERED_CASES"])
        known = Path(os.environ["COVERED_BEFORE"] or os.devnull).read_text()
        self.known = set(json.loads(known or "[]"))
        self.seen = collections.Counter(test.partition("[")[0] for test in self.known)
        os.register_at_fork(after_in_child=self.name_test)

    def name_test(self):
        with contextlib.suppress(Exception):  # a fork that measures nothing
            coverage.Coverage.current().switch_context(self.test + self.phase)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        file, name = item.nodeid.partition("::")[0], item.nodeid.partition("[")[0]
        if (item.nodeid in self.known or self.seen[name] >= self.cases
                or self.spent[file] > self.most):
            item.add_marker(pytest.mark.skip("recorded before, or enough of its kind"))
            return (yield)
        self.seen[name] += 1
        self.end_server()
        self.test, begin, known = item.nodeid, computed(), set(self.shared)
        self.name_test()
        result = yield
        self.spent[file] += computed() - begin
        fixtures = {f for found in item._fixtureinfo.name2fixturedefs.values() for f in found}
        shared = [self.shared[f] for f in fixtures & set(self.shared)]
        new = max((self.shared[f][0] for f in set(self.shared) - known), default=0.0)
        self.tests[item.nodeid] = dict(
            seconds=max(computed() - begin - new, 0.001), lines={},
            shared=max((seconds for seconds, _ in shared), default=0.0),
            after=sorted({test for _, test in shared} - {item.nodeid}))
        self.test = ""
        self.name_test()
        return result

    def end_server(self):
        """End the process that forks ranks: what they run is noted for the test that started it."""
        forking = sys.modules.get("forking")
        if forking and forking.server.cache_info().currsize:
            forking.server().kill()
            forking.server.cache_clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        begin, phase = computed(), self.phase
        self.phase = " (setup)"
        self.name_test()
        try:
            return (yield)
        finally:
            self.phase = phase
            self.name_test()
            self.shared[fixturedef] = computed() - begin, self.test

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        self.tests[""] = dict(lines={}, modules=sorted(
            name for name, module in sys.modules.items() if "site-packages" in (
                getattr(module, "__file__", None) or "")))
        Path(os.environ["COVERED_LINES"], f"tests-{os.getpid()}").write_text(
            json.dumps([self.tests, sorted(self.failed)]))


def pytest_configure(config) -> None:
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(Recorder())


def read_notes(folder: Path, root: Path) -> tuple[dict, set]:
    """Return what each test ran and costs, "" for what ran on import, and the tests that failed."""
    tests, failed = {"": dict(lines={}, modules=[])}, set()
    begun = collections.defaultdict(set)  # test -> lines of the shared fixtures that it set up
    for note in folder.glob("tests-*"):
        found, red = json.loads(note.read_text())
        modules = {*tests[""]["modules"], *found[""]["modules"]}
        tests |= found
        tests[""]["modules"], failed = sorted(modules), failed.union(red)
    for note in folder.glob("lines.*"):
        data = coverage.CoverageData(str(note))
        data.read()
        for path in data.measured_files():
            file = os.path.relpath(path, root)
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in contexts:
                    test = re.sub(r" \((setup|call|teardown)\)(\|.*)?$", "", context)
                    if test in tests:
                        tests[test]["lines"].setdefault(file, set()).add(line)
                    if "(setup)" in context:
                        begun[test].add((file, line))
    for what in tests.values():
        for file, line in set().union(*(begun[test] for test in what.pop("after", ()))):
            what["lines"].setdefault(file, set()).add(line)
    return tests, failed


def record(root: Path, out: Path, args) -> None:
    """Run tests once, every process noting its lines, and add what they ran to `out`.

    args: the settings of `tests/mutants.py cover`
    """
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder, "coverage.ini")
        configuration.write_text(CONFIGURATION.format(folder=folder, root=root))
        env = os.environ | dict(
            COVERED_LINES=folder, COVERED_SECONDS=str(args.most), COVERED_CASES=str(args.cases),
            COVERED_BEFORE=str(out) if args.missing and out.exists() else "", OMP_NUM_THREADS="1",
            COVERAGE_PROCESS_START=str(configuration),
            PYTHONPATH=f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}")
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", HERE.stem,
                        "-p", "no:cacheprovider", "-o", "addopts=", "-n", str(args.jobs),
                        "--dist", "worksteal", "-m", args.mark, *(args.pytest or ["tests"])],
                       cwd=root, env=env, check=False)
        tests, failed = read_notes(Path(folder), root)
    covers = json.loads(out.read_text()) if out.exists() else {"": dict(lines={}, modules=[])}
    new, old = tests[""], covers[""]
    new["modules"] = sorted({*new["modules"], *old["modules"]})
    for file, lines in old["lines"].items():
        new["lines"].setdefault(file, set()).update(lines)
    covers |= {test: what for test, what in tests.items() if test not in failed}
    out.write_text(json.dumps(covers, default=sorted))
    print(f"{len(tests) - 1} tests, {len(failed)} failed; together {len(covers) - 1}: {out}")


def functions(code: CodeType):
    """Yield the functions and methods of a module's code; not those inside of functions."""
    for const in code.co_consts:
        if isinstance(const, CodeType) and const.co_flags & inspect.CO_OPTIMIZED:
            yield const
        elif isinstance(const, CodeType):
            yield from functions(const)


def lines_of(code: CodeType) -> set[int]:
    """Return the lines of a function's body and of what is defined in it."""
    lines = {line for *_, line in code.co_lines() if line}
    lines = lines - {code.co_firstlineno} or lines
    return lines.union(*(lines_of(c) for c in code.co_consts if isinstance(c, CodeType)))


class Covers:
    """Read what `record` has noted, for the sources of a checkout in `root`."""

    def __init__(self, path: Path, root: Path):
        self.tests = json.loads(path.read_text())
        self.imported = self.tests.pop("")
        self.root = root
        self.read = functools.lru_cache(maxsize=4)(self._read)

    def _read(self, file: str) -> tuple[str, CodeType, dict[str, set[int]]]:
        """Return a file's source, its code, and the lines of functions that each test runs."""
        source = (self.root / file).read_text(encoding="utf-8")
        code = compile(source, self.root / file, "exec", dont_inherit=True)
        inside = set().union(*map(lines_of, functions(code)))
        ran = {test: inside.intersection(what["lines"][file])
               for test, what in self.tests.items() if file in what["lines"]}
        return source, code, {test: lines for test, lines in ran.items() if lines}

    def ran_on_import(self, file: str, code: CodeType) -> bool:
        """Return whether a function ran when the package or the tests were imported."""
        return not lines_of(code).isdisjoint(self.imported["lines"].get(file, ()))

    def choose(self, file: str, lines: range | None, limit: float) -> tuple[list[str], float]:
        """Return tests that run one of these lines, or any of the file, and their seconds.

        Its own file of tests comes first, then those of its folder and the fastest, file by file:
        some fixtures of a file can be set up only once. `limit` bounds the seconds after the first.
        """
        ran = self.read(file)[2]
        folder, name = Path(file).parent.name, Path(file).stem
        home = f"tests/test_{name}" if folder == "minids" else f"tests/{folder}/"
        found = [test for test, own in ran.items() if lines is None or own.intersection(lines)]
        if lines is None:  # its constants
            own = f"/test_{name}.py::"
            found += [test for test in self.tests if own in test and test not in ran]

        def rank(test: str) -> tuple[float, str]:
            """Return how late a test is tried."""
            what = self.tests[test]
            return max(what["seconds"], what["shared"]) * (1 if test.startswith(home) else 4), test

        chosen, seconds = [], collections.Counter()  # of a file of tests
        weight = collections.Counter()
        for test in sorted(found, key=rank):
            module, what = test.partition("::")[0], self.tests[test]
            more = what["seconds"] + (0 if module in seconds else what["shared"])
            limit += 0 if chosen else more
            if seconds.total() + more <= limit:
                seconds[module] += more
                weight[module] += rank(test)[0]
                chosen.append(test)
        modules = {test: test.partition("::")[0] for test in chosen}
        chosen.sort(key=lambda test: (not modules[test].endswith(f"/test_{name}.py"),
                                      weight[modules[test]], modules[test]))
        return chosen, seconds.total()
