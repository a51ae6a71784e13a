"""How threads wait for each other, while other programs use the machine."""

import atexit
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_models import LITTLE, scrambled

from minids.infer.engine import Engine
from minids.runs import threads, waiting
from minids.runs.waiting import BUSY, CALM, QUIET, Watcher
from minids.runs.writer import Writer

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS",
           "MKL_NUM_THREADS"}


class Guest:
    """Stands for the thread that sends the others to sleep."""

    here = 0

    def __init__(self):
        Guest.here += 1

    def end(self):
        Guest.here -= 1


@pytest.fixture
def look(monkeypatch):
    """A function that lets a watcher look at seconds with a share of waiting."""
    seen = [0, 0]
    monkeypatch.setattr(Guest, "here", 0)
    monkeypatch.setattr(waiting, "Guest", Guest)
    monkeypatch.setattr(threads, "waited", lambda: tuple(seen))
    watcher = Watcher()

    def at(share: float, looks: int = 1) -> int:
        for _ in range(looks):
            seen[0] += round(1e9 * (1 - share))
            seen[1] += round(1e9 * share)
            watcher.look()
        return Guest.here
    return at


def test_a_watcher_looks_until_its_process_ends(monkeypatch):
    watcher, seen = Watcher(), []
    monkeypatch.setattr(waiting, "EVERY", 0.0)
    monkeypatch.setattr(watcher, "look", lambda: seen.append(True) or 1 / (3 - len(seen)))
    with pytest.raises(ZeroDivisionError):
        watcher.run()
    assert len(seen) == 3


def test_threads_spin_on_a_quiet_machine(look):
    assert look(BUSY - 0.01, 50) == 0


def test_they_sleep_while_it_is_busy_and_spin_again_after(look):
    assert look(0.5, 20) == 1
    assert look(QUIET - 0.01, CALM - 1) == 1 and look(BUSY + 0.01) == 1  # not quiet for long
    assert look(QUIET - 0.01, CALM - 1) == 1 and look(QUIET - 0.01) == 0
    assert look(0.5) == 1


def test_no_thread_keeps_a_process_from_ending(monkeypatch):
    begun = {}
    monkeypatch.setattr(threading.Thread, "start",
                        lambda thread: begun.update({thread.name: thread.daemon}))
    monkeypatch.setattr(threading, "enumerate", list)  # a test before may have begun a watcher
    monkeypatch.setattr(atexit, "register", lambda end: None)  # no thread is there to be joined
    for name in WITHOUT:
        monkeypatch.delenv(name, raising=False)
    waiting.Guest()
    waiting.watch_waiting()
    Engine(scrambled(LITTLE))
    (writer := Writer()).run(Path, beside=True)
    assert begun == {"guest": True, "waiting": True, "engine": True, writer.thread.name: True}


def test_nothing_ran_is_quiet(look, monkeypatch):
    look(0.5)
    monkeypatch.setattr(threads, "waited", lambda: (0, 0))  # as where no kernel counts
    watcher = Watcher()
    for _ in range(10):
        watcher.look()
    assert Guest.here == 1  # of the first watcher


def run(code: str, *before: str, **environment) -> list[str]:
    """Run code in a process of its own, as `python -m` would if `before` says so."""
    env = {k: v for k, v in os.environ.items() if k not in WITHOUT} | environment
    return subprocess.check_output([sys.executable, "-c", "\n".join([*before, code])], text=True,
                                   env=env | {"PYTHONPATH": str(ROOT)}).split()


PROGRAM = "import sys; sys.argv[0] = '-m'"
SHOW = "import os, minids; print(*map(os.environ.get, ['GOMP_SPINCOUNT', 'KMP_BLOCKTIME']))"
NAMES = """
import threading
from minids.runs.device import prepare_cpu
prepare_cpu(1)
prepare_cpu(1)
print(*sorted(thread.name for thread in threading.enumerate()))
"""


def test_a_notebooks_threads_sleep_and_a_programs_are_watched():
    """Set before torch is imported, which reads it; a user's own value stays."""
    assert run(SHOW) == ["0", "0"]
    assert run(SHOW, PROGRAM) == ["None", "0"]
    assert run(SHOW, GOMP_SPINCOUNT="5", KMP_BLOCKTIME="7") == ["5", "7"]


@pytest.mark.slow  # who starts a watcher is tried in this process
def test_a_program_has_one_watcher_and_a_notebook_none():
    assert run(NAMES, PROGRAM) == ["MainThread", "waiting"]  # one, however often it is asked for
    assert run(NAMES) == run(NAMES, PROGRAM, OMP_WAIT_POLICY="passive") == ["MainThread"]


@pytest.mark.parametrize("there, chosen, begun", [
    (["MainThread", "engine"], {}, ["waiting"]), (["MainThread", "waiting"], {}, []),
    (["MainThread"], {"GOMP_SPINCOUNT": "5"}, []), (["MainThread"], {"OMP_WAIT_POLICY": ""}, [])])
def test_one_watcher_begins_unless_the_environment_decides(monkeypatch, there, chosen, begun):
    made, ends = [], []
    monkeypatch.setattr(waiting.os, "environ", {"OMP_NUM_THREADS": "1"} | chosen)
    monkeypatch.setattr(waiting, "threading", SimpleNamespace(
        enumerate=lambda: [SimpleNamespace(name=name) for name in there], Event=threading.Event,
        Thread=lambda target, name, daemon: SimpleNamespace(
            start=lambda: made.append(name) if daemon else None)))
    monkeypatch.setattr(atexit, "register", ends.append)
    waiting.watch_waiting()
    assert made == begun and [end.__func__ for end in ends] == [Watcher.end] * len(begun)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux lists a process's threads")
def test_a_guest_has_a_team_of_threads_and_gives_it_up():
    """Threads of the process: the guest and its team of two, of which it is one."""
    code = """
import os, time, torch
torch.ones(2 ** 20).add_(1)
from minids.runs.waiting import Guest
count = lambda: len(os.listdir("/proc/self/task"))
before, guest = count(), Guest()
for _ in range(6000):
    if count() == before + 2:
        break
    time.sleep(0.02)
during = count() - before
guest.end()
for _ in range(6000):
    if count() == before:
        break
    time.sleep(0.02)
print(during, count() - before)
"""
    assert run(code, OMP_NUM_THREADS="2") == ["2", "0"]
