"""Whatever a learner's function does, its check answers in time and the notebook survives."""

import contextlib
import ctypes
import itertools
import os
import re
import resource
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import minids.model.moe
from minids import ModelArgs
from minids.lab import checker, lesson
from minids.lab.lesson import problems, table
from minids.model.mla import MLA
from minids.model.moe import max_violation

ROOT = Path(__file__).resolve().parents[2]
CASES = [((3,), 9, "multiply the number by itself"), ((0.1,), 0.01, "decimals count too")]


def square(x):
    """Right."""
    return x * x


def imports_inside(x):
    from minids.model.moe import max_violation
    return max_violation(x)


def uses_a_module(x):
    return lesson.shown(x) or minids.model.moe.max_violation(x)


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


linux = pytest.mark.skipif(not checker.forks(), reason="no copy of the process can be made here")


@pytest.fixture(params=[pytest.param(True, marks=linux), False], ids=["apart", "here"])
def apart(request, monkeypatch):
    """In a copy, as on Linux, and under an alarm, as elsewhere."""
    monkeypatch.setattr(checker, "forks", lambda: request.param)


SOON = 0.5  # seconds, after which an answer that never ends is late


@contextlib.contextmanager
def patience(seconds: float):
    """Wait less than a learner's check does: a loop computes all the while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checker, "PATIENCE", seconds)
        patch.setattr(checker, "waited", lambda process: 0.0)
        yield patch


@linux
def test_an_endless_answer_is_told_within_five_seconds(monkeypatch):
    """Not twice the time, nor once a case. What a copy is given is added up, because a busy machine
    takes longer; a quarter of the real patience is enough to see it."""
    assert checker.PATIENCE == 4.0
    monkeypatch.setattr(checker, "PATIENCE", 1.0)
    given, start = [], checker.Copy.__init__
    monkeypatch.setattr(checker.Copy, "__init__", lambda copy, work, seconds: (
        given.append(seconds), start(copy, work, seconds))[1])
    found = problems(loops, CASES)
    assert found == ["loops(3) has not finished after 4 seconds: does one of its loops never end?"]
    assert sum(given) == checker.PATIENCE
    assert problems(square, CASES) == []


@pytest.mark.parametrize("endless", [
    loops, sleeps, pytest.param(counts, marks=pytest.mark.slow)])
def test_an_answer_that_never_ends_is_told(endless, apart):
    with patience(SOON):
        assert problems(endless, CASES) == [f"{endless.__name__}(3) {checker.LATE}"]
    assert problems(square, CASES) == []


def sums(x):
    """Never ends, inside of a built-in that lets no other thread run."""
    return sum(iter(int, 1))


def backtracks(x):
    """Ends after some centuries."""
    return re.match(r"(a+)+$", "a" * 60 + "b")


def crashes(x):
    """Reads memory that is not there."""
    ctypes.string_at(0)


def fills(x):
    """Takes more and more memory, which is bounded when it is asked for: none is written to."""
    return [torch.empty(10 ** 8) for _ in itertools.count()]


def spreads(x):
    """The same in Python, whose error is another one."""
    return [x] * 2 ** 29  # 4 GiB


@linux
@pytest.mark.parametrize("answer, fate", [
    (sums, checker.LATE), (backtracks, checker.LATE), (clings, checker.LATE),
    (fills, checker.LARGE), (spreads, checker.LARGE), (crashes, checker.GONE),
    *((lambda x, status=status: os._exit(status), checker.GONE) for status in (0, 1, 77, 78)),
    (lambda x: os.kill(os.getpid(), 9), checker.GONE)])
def test_what_ends_or_fills_a_process_is_told(answer, fate):
    with patience(SOON if fate == checker.LATE else 60.0):
        first = problems(answer, [(([],), [], ""), *CASES])
    assert first == [f"{answer.__name__}([]) {fate}"]
    assert problems(square, CASES) == []


@linux
def test_the_case_that_ends_the_process_is_named():
    def answer(x):
        return x * x if x != 0.1 else os.abort()

    assert problems(answer, CASES) == [f"answer(0.1) {checker.GONE}"]
    many = [((i,), i * i, "") for i in range(300)]
    assert problems(answer, [*many, CASES[1]]) == [f"answer(0.1) {checker.GONE}"]
    wrong = [((1,), 2, "two"), *CASES]
    assert problems(answer, wrong) == ["answer(1) gives 1 instead of 2. This case is about: two",
                                       f"answer(0.1) {checker.GONE}"]


CHANGED = [0]


@linux
def test_nothing_of_this_process_is_changed(capsys):
    """Variables, seeds, streams, the folder, the number of threads and what torch defaults to."""
    def changes(x):
        CHANGED.append(x)
        torch.manual_seed(7)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        os.chdir("/")
        os.environ["CHANGED"] = "yes"
        sys.stdout = None
        return x * x

    def state():
        return (list(CHANGED), torch.initial_seed(), torch.get_default_dtype(), os.getcwd(),
                torch.get_num_threads(), os.environ.get("CHANGED"), sys.stdout)

    torch.manual_seed(0)
    before = state()
    assert problems(changes, CASES) == [] and state() == before


@linux
def test_threads_and_processes_end_with_the_copy():
    """They would compute on for ever; a process writes its number before it begins."""
    read, write = os.pipe()

    def starts(x):
        threading.Thread(target=loops, args=(x,)).start()
        if os.fork() == 0:
            os.write(write, f"{os.getpid()}\n".encode())
            loops(x)
        select.select([read], [], [])
        return x * x

    before = threading.active_count()
    assert problems(starts, CASES) == [] and threading.active_count() == before
    os.close(write)
    with open(read) as told:
        numbers = [int(number) for number in told]  # ends when nobody holds the other end
    end = time.monotonic() + 120  # a process that was killed takes a moment
    while any(map(alive, numbers)) and time.monotonic() < end:
        time.sleep(0.01)
    assert numbers and not any(map(alive, numbers))


def alive(process: int) -> bool:
    """Return whether a process runs; one that ended and that nobody asked for does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return False


@linux
def test_an_answer_that_forks_answers_once():
    assert problems(lambda x: os.fork() * 0 + x * x, CASES) == []


def test_what_an_answer_prints_is_shown_up_to_a_bound(capfd, apart):
    def talks(x):
        print("here", x)
        return x * x

    assert problems(talks, CASES) == []
    assert capfd.readouterr().out == "here 3\nhere 0.1\n"


@linux
def test_a_copy_may_compute_and_allocate_so_much():
    """A minute, and ten times as long as it is waited for; beside what was copied, its memory."""
    found = {}
    for seconds, memory in ((3.0, 2 ** 30), (2.5, 2 ** 31)):
        bounds = resource.RLIMIT_CPU, resource.RLIMIT_AS
        copy = checker.Copy(lambda tell, bounds=bounds: tell(
            "bounds", [resource.getrlimit(what)[0] for what in bounds]), seconds, memory)
        while copy.running():
            time.sleep(0.002)
        [(_, found[seconds])], fate = copy.close()
        assert fate == ""
    assert (found[3.0][0], found[2.5][0]) == (90, 85)
    assert found[2.5][1] - found[3.0][1] == pytest.approx(2 ** 30, abs=2 ** 24)


@linux
def test_an_answer_that_never_stops_printing_is_cut(capfd):
    def chatters(x):
        while True:
            print("again", file=sys.stderr)

    with patience(SOON):
        assert problems(chatters, CASES) == [f"chatters(3) {checker.LATE}"]
    assert len(capfd.readouterr().out) <= checker.PRINTED + len(" ..\n")


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


@pytest.mark.slow
def test_no_right_answer_is_called_late():
    """A fork beside a thread that is just ending: one in a few hundred copies hung in MKL.

    In a process of its own, because a copy of a small one is made four times as fast.
    """
    subprocess.run([sys.executable, "-c", RIGHT_ANSWERS], cwd=ROOT, check=True)


@linux
def test_time_in_which_other_programs_have_the_cores_does_not_count(monkeypatch):
    """An answer that comes when its time is up, however long that takes on this machine."""
    read, write = os.pipe()

    def naps(x):
        os.read(read, 1)
        return x * x

    work = [((3,), 9, "")]
    monkeypatch.setattr(checker, "WAITING", 120.0)
    with patience(SOON) as patch:
        assert problems(naps, work) == [f"naps(3) {checker.LATE}"]
        patch.setattr(checker, "waited", lambda process: 120.0 * os.write(write, b"!"))
        assert problems(naps, work) == []


@linux
def test_the_time_that_a_process_waits_for_a_core_is_known():
    """Two loops that share a core until each has had it for a tenth of a second."""
    loop = ("import os, time\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "print(flush=True)\ninput()\nwhile True: pass")
    both = [subprocess.Popen([sys.executable, "-c", loop], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in both:
            process.stdout.readline()
        before = checker.waited(both[0].pid)
        for process in both:
            process.stdin.write(b"\n")
            process.stdin.flush()
        end = time.monotonic() + 120
        while checker.waited(both[0].pid) < before + 0.1:
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert checker.waited(both[0].pid) == 0.0  # it is gone


@linux
def test_a_copy_that_is_late_once_gets_another_chance(monkeypatch):
    close, fates = checker.Copy.close, iter([([], checker.LATE), None])
    monkeypatch.setattr(checker.Copy, "close", lambda copy: (close(copy), next(fates) or (
        [("verdict", ("", "", ""))] * 2, ""))[1])
    assert problems(square, CASES) == [] and next(fates, "none left") == "none left"


def test_all_cases_share_the_time(apart):
    """Ten cases of half a second each must not take five seconds."""
    with patience(1.0):
        found = problems(lambda x: time.sleep(0.5) or x, [((i,), i, "") for i in range(10)])
    assert len(found) == 1 and "not finished" in found[-1]


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


@pytest.mark.parametrize("expected", [
    3, pytest.param([3], marks=pytest.mark.slow), torch.ones(2, 3)])
def test_an_answer_that_cannot_be_shown_is_told(expected, apart):
    with patience(SOON):
        [told] = problems(lambda: Endless(), [((), expected, "")])
    assert told == f"<lambda>() {checker.LATE}"
    [told] = problems(lambda: Broken(), [((), expected, "")])
    assert told == "<lambda>() stops with ValueError: no"
