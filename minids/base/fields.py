"""Settings: dataclass fields that are command-line flags, and what is valid in them.

A settings class is a flat frozen dataclass that inherits `Settings`. Its bounds stand in its
fields: the error message, `--help` and the one test of all bounds read them from there.
"""

import contextlib
import difflib
import math
import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path

MOST = 10**6  # problems, replies or sequences at once; far more than that fills the memory


def option(default, help: str, choices: tuple = (), flag: str = "", low: float | None = None,
           high: float | None = None, above: float | None = None, folder: bool = False,
           utf8: bool = False, switch: tuple[str, str] | None = None):
    """Declare a dataclass field that is also a command-line flag.

    default: the value when the flag is absent; help: one line, with the unit
    choices: the only valid values; empty allows any value of the field's type
    flag: the flag's name if no field can have it, such as "from"
    low, high: smallest and largest valid value; above: a lower bound that is not itself valid
    folder: whether it names a folder to write, so that an existing file is not valid
    utf8: whether it is text for a model; whatever the locale, its bytes are read as UTF-8
    switch: the choices that false and true mean, of a flag that was once one of the two; a bare
        flag is true
    """
    return field(default=default, metadata=dict(help=help, choices=choices, flag=flag, low=low,
                                                high=high, above=above, folder=folder,
                                                utf8=utf8, switch=switch))


def nearest(name: str, valid) -> str:
    """Return 'did you mean X? ' when one of `valid` is close to `name`, else ''."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def demand(name: str, value, holds: bool, valid: str) -> None:
    """Raise the one-line `ValueError` that names a value and what is valid, unless it `holds`."""
    if not holds:
        raise ValueError(f"{name} = {value!r} is not valid: it must be {valid}")


def require(args, name: str, holds: bool, valid: str) -> None:
    """Demand a rule of a field of settings."""
    demand(name, getattr(args, name), holds, valid)


def check_folder(name: str, value: str) -> None:
    """Raise `ValueError` if a path is not a folder, or leads through something that is not."""
    for path in (Path(value), *Path(value).parents):
        demand(name, value, not os.path.lexists(path) or path.is_dir(),
               f"a folder, and {path} is not one")


def check_writable(name: str, value: str) -> None:
    """Raise `ValueError` if a file or folder cannot be made, before the work that would fill it.

    Permissions do not tell: root has them all, also where the system has no files to make.
    """
    path = Path(value).absolute()
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name may be too long
        replaced = place == path and not path.is_dir()
        tempfile.TemporaryFile(dir=place.parent if replaced else place).close()
    except OSError as error:
        demand(name, value, False, f"a path that can be written; {place}: {error.strerror}")


def bounds(f) -> str:
    """Return what a field's bounds allow, in words; '' if it has none."""
    low, high, above = map(f.metadata.get, ("low", "high", "above"))
    if above is not None:
        return f"above {above}" + (f" and at most {high}" if high is not None else "")
    if low is not None and high is not None:
        return f"between {low} and {high}"
    if low is not None:
        return "0 or more" if low == 0 else f"at least {low}"
    return f"at most {high}" if high is not None else ""


def check_types(args) -> None:
    """Raise `ValueError` for the first field whose value is not of its type, choices or bounds."""
    for f in fields(args):
        value = getattr(args, f.name)
        if f.type is float and type(value) is int and abs(value) < 2 ** 1023:
            value = float(value)
            object.__setattr__(args, f.name, value)
        if f.metadata.get("switch") and type(value) is bool:
            value = f.metadata["switch"][value]
            object.__setattr__(args, f.name, value)
        require(args, f.name, type(value) is f.type, f"of type {f.type.__name__}")
        require(args, f.name, f.type is not float or math.isfinite(value), "a finite number")
        require(args, f.name, f.type is not int or abs(value) < 2 ** 63, "a number of 64 bits")
        require(args, f.name, f.type is not str or "\0" not in value, "text without a zero byte")
        if f.metadata.get("utf8"):
            try:
                value = value.encode("utf-8", "surrogateescape").decode()
            except UnicodeError:
                require(args, f.name, False, "UTF-8 text")
            object.__setattr__(args, f.name, value)
        if f.metadata.get("folder") and value:
            check_folder(f.name, value)
        if choices := f.metadata.get("choices"):
            require(args, f.name, value in choices, f"one of {', '.join(map(str, choices))}")
        low, high, above = map(f.metadata.get, ("low", "high", "above"))
        require(args, f.name, (low is None or value >= low) and (high is None or value <= high)
                and (above is None or value > above), bounds(f))


@dataclass(frozen=True)
class Settings:
    """A program's settings, checked on construction.

    A subclass checks rules that cross fields in its own `__post_init__`, after calling this one.
    """

    def __post_init__(self):
        check_types(self)
