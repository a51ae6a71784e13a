"""Whatever a learner's function does, its check answers in time and the notebook survives."""

import contextlib
import ctypes
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minids.model.moe
from minids import ModelArgs
from minids.lab import checker, lesson
from minids.lab.checker import PATIENCE
from minids.lab.lesson import problems, table
from minids.model.mla import MLA
from minids.model.moe import max_violation

ROOT = Path(__file__).resolve().parents[2]
CASES = [((3,), 9, "multiply the number by itself"), ((0.1,), 0.01, "decimals count too")]


def square(x):
    """Right."""
    return x * x


def test_a_thread_that_is_stopped_says_nothing(capfd):
    def fills(x):
        time.sleep(1.6)
        return [len(bytes(10 ** 7)) for _ in itertools.count()]

    [told] = problems(fills, CASES[:1])
    assert checker.LATE in told or "MemoryError" in told
    time.sleep(0.5)
    assert capfd.readouterr().err == ""


def test_only_the_end_of_a_stopped_thread_is_kept_quiet():
    told = []
    for kind in (checker.Unfinished, ValueError):
        checker.quiet(SimpleNamespace(exc_type=kind),
                      tell=lambda ended: told.append(ended.exc_type))
    assert told == [ValueError]


def imports_inside(x):
    from minids.model.moe import max_violation
    return max_violation(x)


def uses_a_module(x):
    return lesson.same(x, 9) or minids.model.moe.max_violation(x)


def uses_a_name(x):
    return [max_violation(y) for y in [x]][0]


def uses_a_class(x):
    def inside():
        return MLA(x)
    return inside()


@pytest.mark.parametrize("answer, taken", [
    (imports_inside, "minids.model.moe"), (uses_a_module, "minids"), (uses_a_name, "max_violation"),
    (uses_a_class, "MLA")])
def test_an_answer_from_the_package_is_not_taken(answer, taken):
    assert problems(answer, CASES) == [f"{answer.__name__} takes {taken} from minids, which knows "
                                       "the answer: write it yourself"]


def test_settings_and_what_a_notebook_wrote_may_be_used():
    def answer(x):
        return square(x) if ModelArgs.preset("tiny").dim else table

    assert problems(answer, CASES) == problems(abs, [((-3,), 3, "")]) == []


def loops(x):
    """Never ends."""
    while True:
        x += 1


def sleeps(x):
    """Waits outside of Python's loop."""
    time.sleep(60)


def counts(x):
    """Never ends, and makes more and more."""
    return [number for number in itertools.count() if number < 0]


def clings(x):
    """Never ends, and catches what it can."""
    while True:
        try:
            x += 1
        except:  # noqa: E722
            x = 0


@pytest.fixture(params=[True, False], ids=["rehearsed", "alone"])
def rehearsed(request, monkeypatch):
    """With the copy that Linux can make, and as it is elsewhere."""
    if not request.param:
        monkeypatch.setattr(lesson, "rehearse", lambda check, cases: (0, ""))


@contextlib.contextmanager
def patience(seconds: float):
    """Wait less than a learner's check does: a loop computes all the while."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (checker, lesson):
            patch.setattr(module, "PATIENCE", seconds)
        yield


def test_an_endless_answer_is_told_after_four_seconds():
    """Here, and nowhere else in this file, with the real patience; not twice, nor once a case."""
    start, before = time.monotonic(), threading.active_count()
    found = problems(loops, CASES)
    assert PATIENCE <= time.monotonic() - start < 2 * PATIENCE
    assert found == ["loops(3) has not finished after 4 seconds: does one of its loops never end?"]
    assert problems(square, CASES) == []
    assert threading.active_count() == before


# A copy that only waits is told from one that computes after a second: so long it must last.
@pytest.mark.parametrize("endless, seconds", [(loops, 1.0), (sleeps, 2.0), (counts, 1.0),
                                              (clings, 1.0)])
def test_an_answer_that_never_ends_is_told_in_time(endless, seconds, rehearsed):
    start, before = time.monotonic(), threading.active_count()
    with patience(seconds):
        found = problems(endless, CASES)
    assert time.monotonic() - start < 5.0
    assert found == [f"{endless.__name__}(3) {checker.LATE}"]
    assert problems(square, CASES) == []
    assert endless is sleeps or threading.active_count() == before


def sums(x):
    """Never ends, inside of a built-in that lets no other thread run."""
    return sum(iter(int, 1))


def backtracks(x):
    """Ends after some centuries."""
    return re.match(r"(a+)+$", "a" * 60 + "b")


def crashes(x):
    """Reads memory that is not there."""
    ctypes.string_at(0)


def doubles(x):
    """Takes more and more memory."""
    numbers = [x]
    while True:
        numbers += numbers


def fills(x):
    """The same in torch, whose error is another one."""
    return [torch.ones(10 ** 8) for _ in itertools.count()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes a copy of the process")
@pytest.mark.parametrize("answer, fate", [
    (sums, checker.LATE), (backtracks, checker.LATE), (doubles, checker.LARGE),
    (fills, checker.LARGE), (crashes, checker.GONE), (lambda x: os._exit(0), checker.GONE)])
def test_what_no_thread_survives_is_told_in_time(answer, fate):
    start, threads = time.monotonic(), threading.active_count()
    with patience(1.0 if fate == checker.LATE else 60.0):  # a busy machine fills memory slowly
        assert problems(answer, [(([],), [], ""), *CASES]) == [f"{answer.__name__}([]) {fate}"]
    assert fate != checker.LATE or time.monotonic() - start < 5.0
    assert threading.active_count() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes a copy of the process")
def test_the_case_that_no_thread_survives_is_named():
    def answer(x):
        return x * x if x != 0.1 else os.abort()

    assert problems(answer, CASES) == [f"answer(0.1) {checker.GONE}"]
    many = [((i,), i * i, "") for i in range(300)]
    assert problems(answer, [*many, CASES[1]]) == [f"answer(0.1) {checker.GONE}"]


def test_the_rehearsal_leaves_no_trace(capfd):
    """What an answer prints, counts or draws is done once, in this process."""
    calls = []

    def answer(x):
        print("here")
        calls.append(torch.rand(()).item())
        return x * x

    torch.manual_seed(0)
    assert problems(answer, CASES) == []
    torch.manual_seed(0)
    assert calls == [torch.rand(()).item() for _ in CASES]
    assert capfd.readouterr().out == "here\n" * len(CASES)


def test_large_products_survive_the_fork():
    """OpenMP's threads are not copied: an answer that wants them must not wait for ever."""
    torch.set_num_threads(2)
    large = torch.ones(700, 700)
    assert (large @ large)[0, 0] == 700
    assert problems(lambda x: (x @ x)[0, 0].item(), [((large,), 700.0, "")]) == []


RIGHT_ANSWERS = """
import torch

from minids.lab.lesson import problems

torch.set_num_threads(2)
x = torch.ones(14, 24, dtype=torch.float64)
assert (torch.ones(800, 800) @ torch.ones(800, 800))[0, 0] == 800
torch.set_num_threads(1)
for _ in range(200):
    assert problems(lambda x: (x @ x.T)[0, 0].item(), [((x,), 24.0, "")] * 3) == []
"""


def test_no_right_answer_is_called_late():
    """A fork beside a thread that is just ending: one in a few hundred copies hung in MKL.

    In a process of its own, because a copy of a small one is made four times as fast.
    """
    subprocess.run([sys.executable, "-c", RIGHT_ANSWERS], cwd=ROOT, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes a copy of the process")
def test_a_copy_that_is_late_once_gets_another_chance(monkeypatch):
    watch, fates = checker.watch, iter([checker.LATE, None])
    monkeypatch.setattr(checker, "watch", lambda *given: watch(*given) or next(fates) or "")
    assert problems(square, CASES) == [] and next(fates, "none left") == "none left"


def test_all_cases_share_the_time():
    """Ten cases of a second each must not take ten seconds."""
    start = time.monotonic()
    with patience(2.0):
        found = problems(lambda x: time.sleep(1) or x, [((i,), i, "") for i in range(10)])
    assert 2.0 <= time.monotonic() - start < 5.0 and "not finished" in found[-1]


class Endless:
    """Shows itself for ever."""

    def __repr__(self):
        while True:
            pass


class Broken:
    """Cannot be shown, measured or compared."""

    def __repr__(self):
        raise ValueError("no")

    __len__ = __eq__ = __hash__ = tolist = __repr__


@pytest.mark.parametrize("expected", [3, [3], torch.ones(2, 3)])
def test_an_answer_that_cannot_be_shown_is_told(expected, rehearsed):
    start = time.monotonic()
    with patience(1.0):
        [told] = problems(lambda: Endless(), [((), expected, "")])
    assert told == f"<lambda>() {checker.LATE}" and time.monotonic() - start < 5.0
    [told] = problems(lambda: Broken(), [((), expected, "")])
    assert told == "<lambda>() stops with ValueError: no"
