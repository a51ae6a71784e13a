"""`minids.solve`: the table of a model that comes with minids, and mistakes in one line."""

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minids import solve as solve_module
from minids.base.command_line import run_program
from minids.rl.examination import Asking, examine
from minids.runs.open import open_model
from minids.solve import SolveArgs, report
from minids.text.chat import Reply
from minids.text.tasks import open_task

TRAINED = Path(__file__).parent.parent / "data/r1/rl"


def test_the_table_has_the_marks_of_each_mode(capsys):
    args = SolveArgs(run=str(TRAINED), problems=6, samples=2, temperature=1.0, max_new_tokens=40,
                     show=1, threads=1)
    args.prepare()
    run = open_model(TRAINED)
    rows = [line.split() for line in report(run, open_task("calculator"), args).splitlines()]
    for mode, *told in rows[1:]:
        marks = examine(run.model, run.tokenizer, open_task("calculator"), 6,
                        Asking(mode, max_new_tokens=40, temperature=1.0))
        assert told == [*(f"{share:.3f}" for share in marks[:3]), f"{marks.tokens:.1f}"]
    assert [row[0] for row in rows] == ["mode", "think", "direct", "free"]
    printed = capsys.readouterr().out
    assert printed.count("right is") == 3 and "think: pass@1 " in printed and "pass@2" in printed


@pytest.mark.parametrize("samples, show", [(1, 0), (2, 2)])
def test_of_one_reply_there_is_no_pass_at_k(samples, show, monkeypatch, capsys):
    replies = [Reply(None, "1", True, 3)] * 4
    monkeypatch.setattr(solve_module, "ask", lambda model, tokenizer, questions, how: replies)
    monkeypatch.setattr(solve_module, "pass_curve", lambda *given: {1: 0.25, 2: given[4] / 4})
    args = SolveArgs(problems=4, samples=samples, temperature=1.0, show=show, mode="direct")
    report(SimpleNamespace(model=None, tokenizer=None), open_task("calculator"), args)
    *shown, curve = [*capsys.readouterr().out.splitlines(), ""][:show + 1]
    assert len([line for line in shown if "answer '1', right is" in line]) == show
    assert curve == ("direct: pass@1 0.250  pass@2 0.500" if samples > 1 else "")


@pytest.mark.parametrize("flags, named", [
    (["--samples", "2"], "samples = 2 is not valid: it must be 1 at temperature 0"),
    (["--samples", "2", "--temperature", "1e-39"], "samples = 2 is not valid"),
    (["--problems", "0"], "problems = 0 is not valid"),
    (["--mode", "thinking"], "mode"), (["--task", "sudoku"], "task = 'sudoku' is not valid"),
    (["--run", "nowhere"], "nowhere")])
def test_mistakes_are_one_line(flags, named, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minids.solve", "--run", str(TRAINED), *flags])
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_program("minids.solve", solve_module.main)
    assert end.value.code == 2 and named in err.getvalue() and err.getvalue().count("\n") == 1
