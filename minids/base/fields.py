"""Settings: dataclass fields that are command-line flags, and what is valid in them.

Errors name the field, its value and what is valid, on one line.
"""

import difflib
import math
from dataclasses import field, fields


def option(default, help: str, choices: tuple = (), flag: str = ""):
    """A dataclass field that is also a command-line flag.

    default: the value when the flag is absent
    help: one line, with the unit
    choices: the only valid values; empty means any value of the default's type
    flag: the flag's name where a field cannot have it, such as "from"
    """
    return field(default=default, metadata={"help": help, "choices": choices, "flag": flag})


def nearest(name: str, valid) -> str:
    """'did you mean X? ' when one of `valid` is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def require(args, name: str, holds: bool, valid: str) -> None:
    """Raise the one-line `ValueError` that names a field, its value and what is valid."""
    if not holds:
        raise ValueError(f"{name} = {getattr(args, name)!r} is not valid: it must be {valid}")


def check_types(args) -> None:
    """Each field of a settings dataclass holds its declared type and one of its choices."""
    for f in fields(args):
        value = getattr(args, f.name)
        if f.type is float and type(value) is int:
            object.__setattr__(args, f.name, float(value))
            continue
        require(args, f.name, type(value) is f.type, f"of type {f.type.__name__}")
        require(args, f.name, f.type is not float or math.isfinite(value), "a finite number")
        if choices := f.metadata["choices"]:
            require(args, f.name, value in choices, f"one of {', '.join(map(str, choices))}")
