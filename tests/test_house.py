"""The house keeps its shape: what imports what, how long a file and the package may be."""

import ast
import collections
import graphlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "minids").rglob("*.py"))

# A part imports only from the parts before it. A folder's `__main__` is a program, too.
PARTS = (
    "base config kernels fp8 model apply plots costs text hf infer parallel runs rl "
    "tokenizer generate evaluate solve train sft grpo distill r1 dryrun serve __main__ lab").split()
IMPORTS_NOTHING = {"base", "kernels"}

# module -> why it reaches for a part that stands after its own
REACHES: dict[str, str] = {}
# file -> why it is longer than 400 lines
LONG: dict[str, str] = {}

LINES = 30_587

# Flags of calls that have one value in the house; the other one would show on a bad day only: when
# a folder is there already, a write is stopped, a second Ctrl-C comes, a single panel is drawn.
FLAGS = {
    "daemon": True, "exist_ok": True, "parents": True, "missing_ok": True, "ignore_errors": True,
    "frozen": True, "lasting": True, "weights_only": True, "follow_symlinks": False,
    "ensure_ascii": False, "keepends": True, "sharex": True, "squeeze": False, "stable": True}
# module -> how many of its zips end with the shortest of what they join
SHORTEST = {
    "minids.infer.generation": 1, "minids.lab.bench_serving": 1, "minids.lab.lesson": 1,
    "minids.model.moe": 1, "minids.model.transformer": 1, "minids.parallel.pipeline": 1,
    "minids.plots.decoding": 1, "minids.plots.model": 1, "minids.plots.runs": 2,
    "minids.plots.scenes": 1, "minids.plots.serving": 1, "minids.plots.style": 1,
    "minids.runs.checkpoints": 1, "minids.runs.over_ranks": 1, "minids.train": 1}


def module_name(path: Path) -> str:
    """Return a file's module, `minids.model` for `minids/model/__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def flags(tree: ast.AST) -> collections.Counter:
    """Count the flags of a source's calls, by the call's name, the flag's and its value."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return collections.Counter(
        (getattr(call.func, "attr", getattr(call.func, "id", "")), flag.arg, flag.value.value)
        for call in calls for flag in call.keywords
        if isinstance(flag.value, ast.Constant) and isinstance(flag.value.value, bool))


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """Return those of `modules` that a source imports, also inside of functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import is written with the whole name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules | ({node.module} if names - modules else set())
    return found & modules


@cache
def survey() -> dict[str, tuple[set[str], collections.Counter]]:
    """Return what every module imports, and its flags; reading them all is not collecting's."""
    trees = ((name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items())
    return {name: (imports(tree, set(MODULES)), flags(tree)) for name, tree in trees}


def part(module: str) -> str:
    """Return the folder or file at the top of the package in which a module stands."""
    return module.split(".")[1]


def reaches(module: str, imported: set[str]) -> list[str]:
    """Return what a module imports from parts that stand after its own."""
    if module.count(".") == 0 or module.endswith("__main__"):
        return []
    own = part(module)
    return sorted(other for other in imported if other != "minids" and part(other) != own and (
        own in IMPORTS_NOTHING or PARTS.index(part(other)) > PARTS.index(own)))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import circle; none if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def too_long(lines: dict[str, int]) -> list[str]:
    """Return the files of more than 400 lines."""
    return sorted(name for name, count in lines.items() if count > 400)


COUNTS = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
          for path in FILES}


def test_every_part_has_its_place():
    assert {part(name) for name in MODULES if "." in name} <= set(PARTS)


def test_a_part_imports_only_from_those_before_it():
    found = {module: wrong for module, (imported, _) in survey().items()
             if (wrong := reaches(module, imported))}
    assert {module: wrong for module, wrong in found.items() if module not in REACHES} == {}


def test_no_import_circles():
    assert circle({name: found - {"minids"} for name, (found, _) in survey().items()}) == []


def test_no_file_is_too_long():
    assert [name for name in too_long(COUNTS) if name not in LONG] == []


def test_the_package_is_small():
    assert sum(COUNTS.values()) <= LINES


def test_flags_that_show_on_a_bad_day_have_one_value():
    every = {flag[1:] for _, counts in survey().values() for flag in counts}
    assert [flag for flag in every if FLAGS.get(flag[0], flag[1]) != flag[1]] == []
    assert FLAGS.keys() <= dict(every).keys()
    shortest = {name: counts["zip", "strict", False] for name, (_, counts) in survey().items()}
    assert {name: count for name, count in shortest.items() if count} == SHORTEST
    wrong = ast.parse("zip(a, b, strict=False)\nt(daemon=False)")
    assert flags(wrong) == {("zip", "strict", False): 1, ("t", "daemon", False): 1}


@pytest.mark.parametrize("module, imported, wrong", [
    ("minids.model.mla", {"minids.kernels.norm", "minids.config", "minids.model.rope"}, []),
    ("minids.model.mla", {"minids.apply.fp8"}, ["minids.apply.fp8"]),
    ("minids.kernels.norm", {"minids.base.files"}, ["minids.base.files"]),
    ("minids.text.chat", {"minids.tokenizer"}, ["minids.tokenizer"]),
    ("minids.costs.__main__", {"minids.hf"}, []), ("minids.sft", {"minids.train"}, [])])
def test_a_wrong_import_is_noticed(module, imported, wrong):
    assert reaches(module, imported) == wrong


def test_wrong_houses_are_noticed():
    modules = {"minids.a", "minids.b", "minids.b.c"}
    source = "import minids.a\ndef f():\n    from minids.b import c, d\n    import torch\n"
    assert imports(ast.parse(source), modules) == {"minids.a", "minids.b", "minids.b.c"}
    assert imports(ast.parse("from minids.b import c"), modules) == {"minids.b.c"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle({"a": {"b"}, "b": set()})
    assert too_long({"a.py": 401, "b.py": 400}) == ["a.py"]
