"""Every bound of every settings class: just outside is refused in one line, just inside is not."""

import importlib
import math
import pkgutil
import sys
from dataclasses import MISSING, dataclass, fields

import pytest

import minids
from minids.base.command_line import flag_of, parse, run_program
from minids.base.fields import Settings, bounds, check_types, option
from minids.config import ModelArgs
from minids.runs.settings import TrainArgs


def all_settings() -> list[type]:
    """Every settings class of the package, found by importing all of its modules."""
    for module in pkgutil.walk_packages(minids.__path__, "minids."):
        if not module.name.endswith("__main__") and ".triton_" not in module.name:
            importlib.import_module(module.name)
    for package in ("costs", "hf"):
        importlib.import_module(f"minids.{package}.__main__")
    found, left = {}, [Settings]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        found[cls] = None
    return [cls for cls in found if cls.__module__.startswith("minids.") and fields(cls)]


CLASSES = all_settings()


def valid_settings(cls: type):
    """Settings that pass every field's own check, without the rules that cross fields."""
    made = object.__new__(cls)
    for f in fields(cls):
        value = f.default if f.default is not MISSING else f.type()
        object.__setattr__(made, f.name, value)
    return made


def edges(f) -> list[tuple[float, bool]]:
    """(value, whether it is valid) on both sides of each of a field's bounds."""
    def beside(value: float, way: int):
        return value + way if f.type is int else math.nextafter(value, way * math.inf)

    low, high, above = (f.metadata.get(key) for key in ("low", "high", "above"))
    found = []
    if low is not None:
        found += [(f.type(low), True), (beside(low, -1), False)]
    if high is not None:
        found += [(f.type(high), True), (beside(high, 1), False)]
    if above is not None:
        found += [(beside(above, 1), True), (f.type(above), False)]
    return found


def refusal(cls: type, f, value, capsys) -> str:
    """What a program of these settings writes to stderr when it is given the value; '' if nothing.

    The program parses its command line and checks its fields; it must end with status 2, or 0.
    """
    def main():
        [given] = parse("minids.x", "A program.", cls, argv=[f"{flag_of(f)}={value}"])
        made = valid_settings(cls)
        for name, found in given.items():
            object.__setattr__(made, name, found)
        check_types(made)

    with pytest.raises(SystemExit) as end:
        run_program("minids.x", main)
    out, err = capsys.readouterr()
    assert out == "" and end.value.code == (2 if err else 0)
    return err


def faults(cls: type, stated: type, capsys) -> list[str]:
    """Edges of the bounds that `stated` declares at which `cls` does something else."""
    found = []
    for f in fields(stated):
        for value, valid in edges(f):
            told = f"{f.name} = {value!r} is not valid: it must be {bounds(f)}"
            expected = "" if valid else f"python -m minids.x: {told}\n"
            if refusal(cls, f, value, capsys) != expected:
                found.append(f"{f.name} = {value!r}")
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_bound_is_kept_and_told_in_one_line(cls, capsys):
    assert faults(cls, cls, capsys) == []


def test_every_program_has_settings_with_bounds():
    bounded = {cls.__name__ for cls in CLASSES if any(edges(f) for f in fields(cls))}
    assert bounded >= {"ModelArgs", "LearnArgs", "TrainArgs", "SftArgs", "GrpoArgs"}


@dataclass(frozen=True)
class Oven(Settings):
    """An oven."""

    minutes: int = option(40, "time, minutes", low=1, high=90)
    heat: float = option(180.0, "temperature, degrees", above=0)


@dataclass(frozen=True)
class Capped(Settings):
    """An oven with a lid on its heat."""

    heat: float = option(180.0, "temperature, degrees", above=0, high=250)


@dataclass(frozen=True)
class CarelessOven(Settings):
    """The wrong variant: two bounds are gone."""

    minutes: int = option(40, "time, minutes", low=1)
    heat: float = option(180.0, "temperature, degrees", low=0)


def test_a_bound_that_is_dropped_is_noticed(capsys):
    assert faults(Oven, Oven, capsys) == []
    assert faults(CarelessOven, Oven, capsys) == ["minutes = 0", "minutes = 91", "heat = 0.0"]


def test_a_class_that_skips_its_check_is_noticed(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "check_types", lambda args: None)
    assert faults(Oven, Oven, capsys) == ["minutes = 0", "minutes = 91", "heat = 0.0"]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_construction_checks_the_fields(cls):
    """A `__post_init__` of its own does not forget the inherited one."""
    valid = {f.name: f.default if f.default is not MISSING else f.type() for f in fields(cls)}
    for f in fields(cls):
        for value, _ in [edge for edge in edges(f) if not edge[1]][:1]:
            with pytest.raises(ValueError, match=f"{f.name} = .* is not valid: it must be"):
                cls(**valid | {f.name: value})


def test_other_types_and_numbers_that_are_none():
    for changes, valid in ((dict(minutes=4.0), "of type int"), (dict(minutes=True), "of type int"),
                           (dict(heat="hot"), "of type float"), (dict(heat=math.nan), "a finite"),
                           (dict(heat=math.inf), "a finite number")):
        with pytest.raises(ValueError, match=f"is not valid: it must be {valid}"):
            Oven(**changes)
    assert Oven(heat=200).heat == 200.0 and type(Oven(heat=200).heat) is float
    assert Oven(heat=10 ** 300).heat == 1e300
    for large in (10 ** 400, 2 ** 1024 - 1):  # no float is as large
        with pytest.raises(ValueError, match="it must be of type float"):
            Oven(heat=large)
    assert bounds(next(f for f in fields(Capped) if f.name == "heat")) == "above 0 and at most 250"


def test_a_zero_byte_is_no_part_of_a_text():
    @dataclass(frozen=True)
    class Named(Settings):
        name: str = option("bread", "what is baked")

    with pytest.raises(ValueError, match="it must be text without a zero byte"):
        Named("bre\0d")


def test_a_field_that_is_declared_again_keeps_its_bounds():
    for cls in CLASSES:
        for base in cls.__mro__[1:]:
            own = {f.name: f for f in fields(cls)}
            for f in fields(base) if base in CLASSES else ():
                assert edges(own[f.name]) == edges(f), f"{cls.__name__}.{f.name}"


def test_a_folder_to_write_is_no_file_and_lies_in_none(tmp_path, capsys):
    (file := tmp_path / "file").write_text("x", "utf-8")
    outs = [(cls, f) for cls in CLASSES for f in fields(cls) if f.metadata.get("folder")]
    assert len(outs) >= 8 and {f.name for _, f in outs} == {"out", "folder", "students",
                                                           "handouts"}
    assert all(f.metadata.get("folder") for cls in CLASSES for f in fields(cls) if f.name == "out")
    for cls, f in outs:
        for value in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "a" / "b"):
            told = f"{f.name} = '{value}' is not valid: it must be a folder, and {file} is not one"
            assert refusal(cls, f, str(value), capsys) == f"python -m minids.x: {told}\n"
        told = (f"{f.name} = '/proc/no/x' is not valid: it must be a path that can be written; "
                "/proc: ")
        assert refusal(cls, f, "/proc/no/x", capsys).startswith(f"python -m minids.x: {told}")
        for value in (tmp_path, tmp_path / "new" / "run", ""):
            assert refusal(cls, f, str(value), capsys) == ""


@pytest.mark.parametrize("changes", [
    dict(dim=2 ** 63), dict(qk_nope_head_dim=10 ** 30), dict(n_activated_experts=-10 ** 30)])
def test_numbers_fit_in_64_bits(changes):
    with pytest.raises(ValueError, match="is not valid: it must be a number of 64 bits"):
        ModelArgs(**changes)


@pytest.mark.parametrize("given, read", [
    ("h\udcc3\udca9", "h\u00e9"), ("\u65e5", "\u65e5"), ("", ""),  # the first in an ASCII locale
    ("h\udcc3", None), ("\udcff", None), ("\ud800", None)])
def test_text_of_the_command_line_is_utf_8_in_any_locale(given, read):
    @dataclass(frozen=True)
    class Asking(Settings):
        prompt: str = option("", "text to continue", utf8=True)

    if read is not None:
        assert Asking(given).prompt == read
    else:
        with pytest.raises(ValueError, match="^prompt = .* is not valid: it must be UTF-8 text$"):
            Asking(given)


def test_what_is_drawn_at_once_is_bounded():
    """A slip of the keyboard, 10**12 problems, would fill the memory for minutes."""
    drawn = {"questions", "group", "problems", "eval_problems", "examples"}
    found = [f for cls in CLASSES for f in fields(cls) if f.name in drawn and f.type is int]
    assert len(found) >= 8 and max(f.metadata["high"] for f in found) == 10**6
    assert all(f.metadata["high"] <= 10**6 for f in fields(TrainArgs) if f.name == "batch_size")
