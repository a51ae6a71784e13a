"""Count the mistakes that the tests notice: draw random mutants of a file and run its tests.

    python tests/mutants.py --files minids/model/*.py --per-file 15 --seed 1 --jobs 2

A mutant is the file with one small change of its code: an operator swapped, a comparison turned,
a constant changed, a statement dropped, two arguments of a call exchanged, a condition negated.
Each kind is drawn equally often. It is killed if a test fails or takes far longer than without the
mutant. --out gets a line for each, so that a second call goes on where the first stopped. Prints a
table, and the survivors as diffs. Exhaustive: it takes many minutes.
"""

import argparse
import ast
import collections
import contextlib
import difflib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch  # once: the forks inherit it

# Beside the file's own tests (tests/model/test_mla.py): those that hold it from further away.
ALSO = {name: tests.split() for name, tests in {
    "base": "config train", "cache": "mla transformer", "chat": "sft", "config": "transformer",
    "checkpoints": "train generate", "distill": "r1", "fields": "config train",
    "folded": "generate speculative", "fp8": "fp8_recipe bodies",
    "kernels": "moe mla attention transformer",
    "layers": "transformer", "learner": "train", "mla": "transformer parity_hf",
    "generation": "generate speculative", "moe": "gate balance transformer parity_hf",
    "objective": "transformer mtp sft", "optimizers": "train",
    "recompute": "transformer train", "rl": "grpo", "grpo": "r1", "rope": "mla", "sft": "r1",
    "solve": "r1", "sparse_attention": "indexer_loss",
    "sampling": "speculative generate rollout", "text": "train",
    "tokenizer": "tokenizer", "transformer": "parity_hf mtp sft"}.items()}

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


def draw(source: str, count: int, seed: str) -> list[tuple[str, str]]:
    """Return up to `count` mutants of a source, (kind, new source), each kind equally often."""
    rng, whole, kinds = random.Random(seed), source.encode(), collections.defaultdict(list)
    starts = [0, *itertools.accumulate(map(len, whole.splitlines(keepends=True)))]
    for kind, old, new in walk(ast.parse(source), collections.Counter()):
        begin = starts[old.lineno - 1] + old.col_offset
        end = starts[old.end_lineno - 1] + old.end_col_offset
        text = f"({ast.unparse(new)})" if isinstance(old, ast.expr) else ast.unparse(new)
        kinds[kind].append((whole[:begin] + text.encode() + whole[end:]).decode())
    order, drawn = sorted(kinds), {}
    for pool in (order, *map(kinds.get, order)):
        rng.shuffle(pool)
    while any(kinds.values()):
        for kind in filter(kinds.get, order):
            drawn.setdefault(kinds[kind].pop(), kind)
    return [(kind, mutant) for mutant, kind in itertools.islice(drawn.items(), count)]


def tests_of(root: Path, file: str) -> list[str]:
    """Return the test files that hold a file: its own, else its folder's, and those of ALSO."""
    path = Path(file)
    here = root / "tests" / path.relative_to("minids").parent
    also = ALSO.get(path.stem, ALSO.get(path.parent.name, []))
    own = sorted(here.glob(f"test_*{path.stem}.py"))
    own = own if own or path.stem in ALSO else sorted(here.glob("test_*"))
    found = [*own, *(p for name in also for p in root.rglob(f"tests/**/test_{name}.py"))]
    return [str(p.relative_to(root)) for p in dict.fromkeys(found)]


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


def pytest_here(folder: Path, tests: list[str], mark: str) -> None:
    """Run the tests of a copy in this process and end it with pytest's status."""
    os.setsid()
    os.chdir(folder)
    sys.path[0] = str(folder)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os._exit(pytest.main(["-xqp", "no:cacheprovider", "-o", "addopts=", "-m", mark, *tests]))


def run_tests(folder: Path, tests: list[str], mark: str, limit: float) -> tuple[int | str, float]:
    """Return pytest's status, or "timeout", and seconds, from a fork that has imported torch."""
    start = time.monotonic()
    child = FORK.Process(target=pytest_here, args=(folder, tests, mark))
    child.start()
    child.join(limit)
    status = "timeout" if child.is_alive() else child.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what the tests have started ends with them
    child.join()
    return status, time.monotonic() - start


def judge(root: Path, file: str, args, done: dict, out) -> list[dict]:
    """Try the mutants of one file, append what became of each, and return all."""
    source, tests = (root / file).read_text(encoding="utf-8"), tests_of(root, file)
    mutants = [(kind, mutant, hashlib.sha256(mutant.encode()).hexdigest()[:16])
               for kind, mutant in draw(source, args.per_file, f"{args.seed} {file}")]
    missing = [entry for entry in mutants if (file, entry[2]) not in done]
    folder = clone(root)
    try:
        if missing:
            status, seconds = run_tests(folder, tests, args.mark, 3600)
            print(f"{file}: {len(missing)} mutants, {seconds:.0f} s: {' '.join(tests)}", flush=True)
            if status != 0:
                print(f"{file}: not tried, its tests fail without a mutant: {status}", flush=True)
                return []
        for kind, mutant, key in missing:
            (folder / file).write_text(mutant, encoding="utf-8")
            status, took = run_tests(folder, tests, args.mark, 60 + 4 * seconds)
            diff = difflib.unified_diff(source.splitlines(), mutant.splitlines(), n=0, lineterm="")
            done[file, key] = row = dict(file=file, key=key, kind=kind, status=status,
                                         seconds=round(took), killed=status != 0,
                                         diff=[*diff][2:])
            print(json.dumps(row), file=out, flush=True)
    finally:
        shutil.rmtree(folder)
    return [done[file, key] for _, _, key in mutants if (file, key) in done]


def survives(row: dict) -> bool:
    """Return whether a mutant with an effect was not noticed."""
    lines = [[line[1:].strip() for line in row["diff"] if line[0] == sign] for sign in "-+"]
    return not row["killed"] and (row["file"], *map(" ".join, lines)) not in EQUIVALENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="+", required=True, help="files, as minids/model/mla.py")
    parser.add_argument("--per-file", type=int, default=15, help="mutants a file (default 15)")
    parser.add_argument("--seed", type=int, default=1, help="which mutants are drawn (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time (default 1)")
    parser.add_argument("--out", default="runs/mutants.jsonl", help="where the results are kept")
    parser.add_argument("--mark", default="not slow and not exhaustive", help="-m")
    parser.add_argument("--root", default=Path(__file__).resolve().parent.parent, help="a checkout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a+") as out, ThreadPoolExecutor(args.jobs) as pool:
        out.seek(0)
        done = {(row["file"], row["key"]): row for row in map(json.loads, out)}
        found = [*pool.map(lambda file: judge(Path(args.root), file, args, done, out), args.files)]
    print(f"\n{'file':36} mutants killed equivalent survived")
    for file, rows in zip([*args.files, "all"], [*found, sum(found, [])], strict=True):
        killed, lived = sum(r["killed"] for r in rows), [r for r in rows if survives(r)]
        print(f"{file:36}{len(rows):8} {killed:6} {len(rows) - killed - len(lived):9} {len(lived)}")
    for row in lived:
        print(f"\n{row['file']} ({row['kind']})", *row["diff"], sep="\n")


if __name__ == "__main__":
    main()
