"""Command lines: flags from fields, help that says everything, and mistakes in one line."""

import subprocess
import sys
from dataclasses import dataclass, fields

import pytest

from minids.base.command_line import flag_of, parse
from minids.base.fields import bounds, option
from minids.config import ModelArgs
from minids.runs.settings import TrainArgs


@dataclass
class Recipe:
    """How to bake."""

    minutes: int = option(40, "time in the oven, minutes")
    heat: float = option(180.0, "temperature, degrees; 100% is 250")
    tin: str = option("", "path of the tin")
    fan: bool = option(False, "whether the fan turns")
    grain: str = option("rye", "what the flour is made of", ("rye", "wheat"))


def test_parse_returns_only_the_flags_that_were_given():
    given = parse("x", "Bake.", Recipe, ModelArgs,
                  argv="--minutes 5 --fan --grain wheat --n-heads 2 --gate-bias off".split())
    assert given == [dict(minutes=5, fan=True, grain="wheat"), dict(n_heads=2, gate_bias=False)]
    assert parse("x", "Bake.", Recipe, argv=[]) == [{}]


@pytest.mark.parametrize("argv, words", [
    ("--minuts 5", ["unknown flag --minuts", "did you mean '--minutes'?"]),
    ("--n-head 2", ["unknown flag --n-head", "did you mean '--n-heads'?"]),
    ("--min 5", ["unknown flag --min"]),  # an abbreviation is a guess
    ("--zzzzz", ["unknown flag --zzzzz", "--help lists them all"]),
    ("--minutes soon", ["--minutes", "'soon'", "int"]),
    ("--minutes", ["--minutes", "expected one argument"]),
    ("--grain oats", ["--grain", "'oats'", "rye", "wheat"]),
    ("--fan perhaps", ["--fan", "'perhaps' is neither true nor false"]),
])
def test_a_wrong_flag_is_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("bakery", "Bake.", Recipe, ModelArgs, argv=argv.split())
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("python -m bakery: ") and err.count("\n") == 1
    assert all(word in err for word in words)


TINY = TrainArgs.for_preset("tiny")


def undocumented(text: str, cls) -> list[str]:
    """Fields whose meaning (with unit) or default a help text lacks."""
    entries, flag = {}, ""  # flag -> its words, which start on its own line or on the next
    for line in text.splitlines():
        words = line.split()
        flag = words[0] if words and words[0].startswith("--") else flag if words else ""
        entries[flag] = f"{entries.get(flag, '')} {' '.join(words)}"
    faults = []
    for f in fields(cls):
        told = entries.get(flag_of(f), "")
        default = f.default if f.default != "" else "none"
        if cls is TrainArgs and getattr(TINY, f.name) != f.default:
            default = f"{default}; tiny: {getattr(TINY, f.name)}"
        valid = f"; {bounds(f)}" if bounds(f) else ""
        if f"{f.metadata['help']}{valid} [{default}]" not in told:
            faults.append(f.name)
    return faults


def test_help_opens_with_the_docstring_and_shows_unit_and_default_of_every_flag(
        capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    with pytest.raises(SystemExit) as caught:
        parse("bakery", "Bake bread.\n\n    python -m bakery", Recipe, ModelArgs, TrainArgs,
              argv=["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Bake bread.\n\n    python -m bakery\n" in text and "How to bake:" in text
    assert [undocumented(text, cls) for cls in (Recipe, ModelArgs, TrainArgs)] == [[], [], []]
    assert undocumented(text.replace("[40]", ""), Recipe) == ["minutes"]
    assert undocumented(text.replace(", degrees", ""), Recipe) == ["heat"]


PROGRAM = """
from minids.config import ModelArgs
from minids.base.command_line import run_program
run_program("bakery", lambda: {body})
"""


@pytest.mark.parametrize("body, status, err", [
    ("ModelArgs(n_heads=0)", 2,
     "python -m bakery: n_heads = 0 is not valid: it must be at least 1\n"),
    ("ModelArgs.preset('v33')", 2, "python -m bakery: preset 'v33' is unknown: did you mean"),
    ("open('/no/such/file')", 2, "python -m bakery: [Errno 2] No such file or directory"),
    ("None", 0, ""),
    ("3", 3, ""),
])
def test_a_program_ends_with_one_line_and_a_status(body, status, err):
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True,
                         text=True)
    assert run.returncode == status and run.stdout == ""
    assert run.stderr.startswith(err) and run.stderr.count("\n") == bool(err)


def test_a_bug_of_ours_keeps_its_traceback():
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(body="1 / 0")], capture_output=True,
                         text=True)
    assert run.returncode == 1 and "ZeroDivisionError" in run.stderr


def test_a_stopped_program_says_how_to_continue_and_ends_with_the_signals_status():
    body = "exec('raise Stopped(15, [\"--out\", \"my runs/x\"])')"
    source = "from minids.base.command_line import Stopped\n" + PROGRAM.format(body=body)
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (143, "")
    assert run.stdout == "stopped; continue with: python -m bakery --out 'my runs/x'\n"
