"""Compare a learner's answer with the expected one, in words; show values as one would type them.

`difference` names the first difference, or says that only the type is wrong. `known` recognises an
answer that equals one of the course's known wrong ones: the table beside this file holds what is
wrong with each, and a digest of its results, not the answer itself.
"""

import dataclasses
import hashlib
import json
import math
from functools import cache
from pathlib import Path

import torch

from minids.config import ModelArgs

DIGITS = 1e-6  # relative; a right answer in FP32 keeps six digits, and a wrong one is further off
DOUBLE = 1e-10  # the same for a tensor in FP64, of which an answer in FP32 keeps seven digits
ROOM = 76  # characters of a value that is written out
MISTAKES = Path(__file__).with_name("mistakes.json")


def difference(answer, expected) -> tuple[str, str]:
    """Return how an answer differs, and in what: "value", "type", or twice "" if it does not."""
    if answer is None:
        return f"gives None instead of {shown(expected)} (does it return its result?)", "value"
    if isinstance(expected, torch.Tensor):
        return tensor_difference(answer, expected)
    if same(answer, expected):
        return "", ""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    where, one, other = first(answer, expected)
    if alike(answer, expected) and kind(one) != kind(other):  # large whole numbers may look alike
        return (f"gives {shown(answer)}: only the type is wrong, {kind(one)} instead of "
                f"{kind(other)}{where}", "type")
    one, other = shown(answer), shown(expected)
    if one == other or " of length " in one or " of length " in other:
        where, one_part, other_part = first(answer, expected)
        if where and (one_part is not answer):
            return (f"gives {one}{where} it has {shown(one_part, exact=True)} instead of "
                    f"{shown(other_part, exact=True)}", "value")
        one, other = shown(answer, exact=True), shown(expected, exact=True)
    if isinstance(expected, list) and hasattr(answer, "__len__") and len(answer) != len(expected):
        return f"gives {one}, {len(answer)} entries instead of the {len(expected)} of {other}", \
            "value"
    return f"gives {one} instead of {other}", "value"


def tensor_difference(answer, expected: torch.Tensor) -> tuple[str, str]:
    """Return the same for an expected tensor."""
    if not isinstance(answer, torch.Tensor):
        if alike(answer, expected.tolist()):
            return (f"gives {shown(answer)}: only the type is wrong, {kind(answer)} instead of a "
                    "tensor", "type")
        return f"gives {shown(answer)} instead of {shown(expected)}", "value"
    if answer.shape != expected.shape:
        return f"gives shape {tuple(answer.shape)} instead of {tuple(expected.shape)}", "value"
    if answer.dtype != expected.dtype:
        return f"gives {answer.dtype} instead of {expected.dtype}", "type"
    if answer.isnan().any():
        return "gives a tensor that contains NaN", "value"
    digits = DOUBLE if expected.dtype == torch.float64 else 10 * DIGITS
    largest = expected.detach().abs().max().item() if expected.numel() else 0.0
    close = torch.isclose(answer, expected, rtol=digits, atol=digits * min(largest, 1.0))
    if not close.all():
        place = (~close).nonzero()[0].tolist()
        one, other = (x.detach()[tuple(place)].item() for x in (answer, expected))
        at = f" at {place}" if place else ""
        if type(one) is float and math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9):
            at += ": is something rounded to FP32 on the way?"
        return f"gives {shown(one, other)} instead of {shown(other, one)}{at}", "value"
    if expected.requires_grad and not answer.requires_grad:
        return "gives the right numbers in a tensor without a gradient", "type"
    return "", ""


def same(answer, expected) -> bool:
    """Return whether an answer equals the expected one; an array or tensor may stand for a list."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(expected, float) and type(answer) in (int, float) and abs(answer) < 2 ** 1023:
        return math.isclose(answer, expected, rel_tol=DIGITS, abs_tol=1e-9)
    if type(answer) is not type(expected):
        return False
    if isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(
            same(answer[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(answer) == len(expected) and all(map(same, answer, expected))
    return answer == expected


def alike(answer, expected) -> bool:
    """Return whether two values are equal apart from their types."""
    sizes = [len(x) if hasattr(x, "__len__") else -1 for x in (answer, expected)]
    return sizes[0] == sizes[1] and same(plain(answer), plain(expected))


def plain(value):
    """Return a value without its types: every number a float, every row a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {key: plain(value[k]) for k in value if isinstance(key := plain(k), float | str)}
    if isinstance(value, list | tuple | range):
        return [plain(each) for each in value]
    if isinstance(value, int | float) and abs(value) < 2 ** 1023:
        return float(value)
    return value


def first(answer, expected, path: str = "") -> tuple[str, object, object]:
    """Return where two values differ first, as `; at [1]`, and the parts that stand there."""
    if type(answer) is type(expected) is dict and answer.keys() == expected.keys():
        pairs = [(repr(key), answer[key], expected[key]) for key in expected]
    elif type(answer) is type(expected) and isinstance(expected, list | tuple) and (
            len(answer) == len(expected)):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(answer, expected, strict=True))]
    else:
        pairs = []
    for place, one, other in pairs:
        if not same(one, other):
            return first(one, other, f"{path}[{place}]")
    return f"; at {path}" if path else "", answer, expected


def kind(value) -> str:
    """Return a value's type with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(value, beside=None, exact: bool = False) -> str:
    """Return a value as one would type it, or its name, shape or length where that is too long.

    beside: a number that must not look the same; exact: show all digits
    """
    if type(value) is int:
        return f"{value:_}" if abs(value) < 10 ** 20 else "int"
    if type(value) is float:
        short = f"{value:.6g}"
        exact = exact or len(repr(value)) <= 8 or type(beside) is float and short == f"{beside:.6g}"
        return repr(value) if exact else short
    if isinstance(value, ModelArgs):
        return preset(value)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        few = value.numel() <= 16
        text = f"torch.tensor({shown(value.tolist(), exact=exact)})" if few else ""
        fits = text and len(text) <= ROOM and " of length " not in text
        return text if fits else f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, str | bytes | list | tuple | dict | set):
        return collection(value, exact) if len(value) <= ROOM else f"{text} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= ROOM else type(value).__name__


def collection(value, exact: bool) -> str:
    """Return a short collection as one would type it."""
    if isinstance(value, str | bytes):
        text = repr(value)
    elif isinstance(value, dict):
        text = ", ".join(f"{shown(k)}: {shown(v, exact=exact)}" for k, v in value.items())
        text = f"{{{text}}}"
    elif isinstance(value, set) and not value:
        text = "set()"
    else:
        text = ", ".join(shown(each, exact=exact) for each in value)
        text += "," if type(value) is tuple and len(value) == 1 else ""
        text = {list: "[{}]", tuple: "({})"}.get(type(value), "{{{}}}").format(text)
    return text if len(text) <= ROOM else f"a {type(value).__name__} of length {len(value)}"


def preset(args: ModelArgs) -> str:
    """Return settings by the preset that they are, or differ from in the fewest fields."""
    def others(name: str) -> list[str]:
        own = ModelArgs.preset(name)
        return [f.name for f in dataclasses.fields(args)
                if getattr(own, f.name) != getattr(args, f.name)]

    changed, name = min(((others(name), name) for name in ModelArgs.presets()),
                        key=lambda found: len(found[0]))
    text = f"ModelArgs.preset({name!r})"
    if not changed:
        return text
    if len(changed) <= 3:
        return f"replace({text}, {', '.join(f'{f}={getattr(args, f)!r}' for f in changed)})"
    return "ModelArgs(..)"


def altered(before, after) -> bool:
    """Return whether an argument's value or gradient changed; what cannot be compared did not."""
    if isinstance(before, torch.Tensor):
        grads = before.requires_grad != after.requires_grad or before.is_leaf and (
            before.grad is None) != (after.grad is None)
        return grads or before.shape != after.shape or before.dtype != after.dtype or not (
            torch.equal(before.detach().nan_to_num(0.5), after.detach().nan_to_num(0.5)))
    if type(before) is not type(after):
        return True
    if isinstance(before, list | tuple):
        return len(before) != len(after) or any(map(altered, before, after))
    if isinstance(before, dict):
        return list(before) != list(after) or any(
            altered(before[key], after[key]) for key in before)
    return isinstance(before, set | str | int | float | ModelArgs) and before != after


def mark(answer) -> str:
    """Return a result in a form that its digest is taken of: floats to five digits."""
    answer = answer.detach() if isinstance(answer, torch.Tensor) else answer
    if hasattr(answer, "tolist"):
        return f"{tuple(answer.shape)} {answer.dtype} {mark(answer.flatten()[:999].tolist())}"
    if isinstance(answer, float):
        return f"{answer + 0.0:.5g}"
    if isinstance(answer, list | tuple):
        return f"{type(answer).__name__}{len(answer)}[{' '.join(map(mark, answer[:999]))}]"
    if isinstance(answer, dict):
        return f"{{{' '.join(f'{mark(k)}:{mark(v)}' for k, v in answer.items())}}}"
    return repr(answer)[:1000] if isinstance(answer, str | int | bool | bytes) else kind(answer)


def digest(name: str, marks: list[str]) -> str:
    """Return the digest of a function's results in all cases of one check."""
    return hashlib.sha256("\n".join([name, *marks]).encode("utf-8", "replace")).hexdigest()[:16]


@cache
def mistakes() -> dict[str, str]:
    """Return the known mistakes: digest of the results -> what is wrong."""
    return json.loads(MISTAKES.read_text("utf-8")) if MISTAKES.is_file() else {}


def known(name: str, marks: list[str]) -> str:
    """Return what is wrong with an answer whose results equal those of a known wrong one, or ""."""
    return mistakes().get(digest(name, marks), "")
