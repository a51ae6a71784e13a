"""Print every program's flags as Markdown, from the settings classes, in the words of `--help`.

    python -m minids.lab.flags --page minids/README.md    # write them between the page's marks
"""

import contextlib
import importlib
import io
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from unittest import mock

from minids.__main__ import programs
from minids.base import command_line
from minids.base.fields import Settings, check_writable, demand, option
from minids.base.files import write_whole

BEGIN, END = "<!-- flags: begin -->\n", "<!-- flags: end -->"


@dataclass(frozen=True)
class FlagsArgs(Settings):
    """Settings of the page of flags."""

    page: str = option("", "Markdown page to write the flags into, between its marks; none prints")


def classes_of(program: str) -> list[type]:
    """Return the settings classes whose fields a program's `--help` lists."""
    module, found = importlib.import_module(f"minids.{program}"), []
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"minids.{program}.__main__")
    with (mock.patch.object(command_line, "add_flags", lambda _, cls, __: found.append(cls)),
          mock.patch.object(sys, "argv", [program, "--help"]),
          contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit)):
        module.main()
    return found


def described(cls: type) -> list[str]:
    """Return a line for each flag of a class."""
    parser, lines = command_line.OneLineParser(add_help=False), []
    command_line.add_flags(parser, cls, "")
    for action in parser._actions:
        meaning, default = action.help.replace("%%", "%").rstrip("]").rsplit(" [", 1)
        if valid := ", ".join(str(choice) for choice in action.choices or () if choice != ""):
            meaning += f" ({valid})"
        line = f"| `{action.option_strings[0]}` | {meaning} | {default} |"
        lines.append(line.replace("*", r"\*"))
    return lines


def rows(cls: type) -> list[str]:
    """Return a table's lines: the flags that `cls` adds, or describes as none of its bases does."""
    known = {line for base in cls.__mro__[1:] if is_dataclass(base) for line in described(base)}
    lines = [line for line in described(cls) if line not in known]
    return lines and ["| flag | meaning | default |", "|---|---|---|", *lines]


def markdown() -> str:
    """Return one section per program; a class that several programs share is printed once."""
    lines, shown = [], set()
    for name, summary in programs():
        lines += [f"### {name}", "", summary, ""]
        for cls in (c for top in classes_of(name) for c in reversed(top.__mro__)):
            if cls in shown:
                lines += [f"And the flags of `{cls.__name__}`, above.", ""]
            elif is_dataclass(cls) and (found := rows(cls)):
                shown.add(cls)
                lines += [f"`{cls.__name__}`:", "", *found, ""]
    return "\n".join(lines)


def main() -> None:
    [given] = command_line.parse("minids.lab.flags", __doc__, FlagsArgs)
    if not (page := FlagsArgs(**given).page):
        return print(markdown())
    demand("page", page, Path(page).is_file(), "a file that is there")
    check_writable("page", page)
    before, _, rest = Path(page).read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    demand("page", page, bool(end), f"a page that has {BEGIN.strip()} .. {END}")
    write_whole(page, f"{before}{BEGIN}\n{markdown()}\n{end}{after}")


if __name__ == "__main__":
    command_line.run_program("minids.lab.flags", main)
