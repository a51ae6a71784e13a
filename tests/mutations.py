"""Draw random mutants of a source: the same code with one small mistake."""

import ast
import collections
import inspect
import itertools
import random
from types import CodeType

from covered_lines import functions

OPERATORS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add],
             ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult],
             ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd]}
COMPARISONS = {ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.Lt],
               ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq],
               ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In]}
SILENT = {"print", "tqdm", "option", "ArgumentParser", "add_argument", "field"}  # texts, defaults
SYMMETRIC = {"min", "max", "minimum", "maximum", "promote_types", "equal"}
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
    if isinstance(node, ast.Call) and name_of(node) not in SYMMETRIC:
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
                isinstance(node, ast.Call) and name_of(node) in SILENT and (
                    name == "args" or name_of(node) in ("print", "tqdm"))):
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


def shape(code: CodeType, whole: bool) -> tuple:
    """Return what code does, without its lines; the functions in it count if `whole`."""
    consts = [(type(const), repr(const)) if not isinstance(const, CodeType)
              else const.co_qualname if not whole and const.co_flags & inspect.CO_OPTIMIZED
              else shape(const, whole) for const in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, consts


def swaps(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """Return the functions that differ, before and after; None if more than functions differ."""
    if shape(old, whole=False) != shape(new, whole=False):
        return None
    pairs = [pair for pair in zip(functions(old), functions(new), strict=True)
             if shape(pair[0], whole=True) != shape(pair[1], whole=True)]
    return pairs if all(a.co_freevars == b.co_freevars for a, b in pairs) else None
