"""The engine's thread: who may wait, who leaves, and what happens when it stops."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small_models import LITTLE, scrambled
from test_batch import LONG, PROMPTS

from minids.generate import generate
from minids.infer import engine as module
from minids.infer.batch import Request
from minids.infer.engine import Engine, Full, Stopped


@pytest.fixture
def engine():
    made = Engine(scrambled(LONG, dtype=torch.float32), rows=2, queue=2)
    yield made
    made.stop()
    assert not made.thread.is_alive()


def test_many_threads_ask_at_once():
    model = scrambled(LITTLE)
    engine, found = Engine(model, rows=3, queue=20), {}

    def ask(i: int) -> None:
        found[i] = [token.id for token in engine.stream(Request(PROMPTS[i % 4], 12))]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.stop()
    expected = generate(model, PROMPTS, 12).tokens
    assert [found[i] for i in range(12)] == [expected[i % 4] for i in range(12)]


def test_a_full_queue_refuses_all_or_none(engine):
    begun = threading.Event()
    held = threading.Event()
    slow = Request([1], 500, take=lambda token: begun.set() or not held.wait())
    engine.submit(slow)
    begun.wait()
    engine.batch.seconds = 10.0
    engine.submit(*[Request([1], 5)] * 2)
    with pytest.raises(Full) as refused:
        engine.submit(*[Request([1], 5)] * 2)
    assert refused.value.seconds == 25  # five replies, of which two go at a time
    engine.submit(Request([1], 5))
    state = engine.state()
    assert state["running"] + state["waiting"] == 4
    each = LONG.n_layers * (LONG.kv_lora_rank + LONG.qk_rope_head_dim) * 4
    assert state["cache_bytes"] == each * 600 * 2
    held.set()


def test_a_closed_stream_frees_its_row(engine):
    goes_on = threading.Event()  # until then the worker stands, having written a token
    stream = engine.stream(Request([1, 2], 590, take=lambda token: not goes_on.wait()))
    next(stream)
    stream.close()
    goes_on.set()
    assert len(list(engine.stream(Request([3], 5)))) == 5
    while engine.state()["running"]:  # the step under way ends first
        pass
    assert len(engine.batch.log) < 590


@pytest.mark.parametrize("request_, named", [
    (Request([], 5), "prompts"), (Request([99], 5), "99"), (Request([1], 0), "max_new_tokens"),
    (Request([1], 5, temperature=float("nan")), "temperature"), (Request([1], 5, top_p=0), "top_p"),
    (Request([1] * 590, 20), "600")])
def test_requests_that_are_not_valid_are_refused(engine, request_, named):
    with pytest.raises(ValueError, match=named):
        engine.submit(request_)


def test_a_stopped_engine_ends_all(engine):
    goes_on, ended = threading.Event(), []
    stream = engine.stream(Request([1, 2], 590, take=lambda token: not goes_on.wait()))
    next(stream)
    engine.submit(*[Request([3], 590, end=lambda *how: ended.append(how))] * 3)
    engine.close()
    goes_on.set()
    engine.stop()
    with pytest.raises(Stopped):
        list(stream)
    assert [reason for reason, _ in ended] == ["error"] * 3
    with pytest.raises(Stopped):
        engine.submit(Request([1], 5))


def test_closing_while_the_worker_falls_asleep_ends_it(engine, monkeypatch):
    """A signal's handler finds the lock taken: by the worker, which has just looked."""
    def close_beside() -> None:
        if threading.current_thread() is engine.thread:
            handler = threading.Thread(target=engine.close)
            handler.start()
            handler.join()

    monkeypatch.setattr(module, "end_team", close_beside)
    assert len(list(engine.stream(Request([1], 1)))) == 1
    engine.thread.join(60)
    assert not engine.thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_leaves_nobody_waiting(engine, monkeypatch):
    monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
    with pytest.raises(Stopped):
        list(engine.stream(Request([1], 5)))
    with pytest.raises(Stopped) as refused:
        engine.submit(Request([1], 5))
    assert isinstance(refused.value.__cause__, ZeroDivisionError)


TEAMS = """
import os, time
import torch
from minids.infer.batch import Request
from minids.infer.engine import Engine
from small_models import LITTLE, scrambled

def compute(expected):
    torch.ones(2**17).add_(1)  # on two threads
    return count(expected)

def count(expected):  # threads that have ended are listed for another moment
    while (found := len(os.listdir("/proc/self/task")) - before) != expected:
        if time.monotonic() > end:
            break
        time.sleep(0.001)
    return found

torch.set_num_threads(2)
model, inside, end = scrambled(LITTLE), [], time.monotonic() + 120
before = len(os.listdir("/proc/self/task"))
print(compute(1))
engine = Engine(model, rows=1)
print(count(1), compute(2))
for _ in engine.stream(Request([1], 3, take=lambda token: inside.append(compute(2)))):
    pass
print(*inside, count(1))
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is Linux's")


FORK = """
import os, signal, threading
import torch
from minids.base.openmp import end_team

def compute():
    torch.ones(2**17).add_(1)  # on two threads

torch.set_num_threads(2)
compute()
if (child := os.fork()) == 0:
    signal.alarm(60)
    end_team()
    thread = threading.Thread(target=lambda: (compute(), end_team()))
    thread.start()
    thread.join()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Run both in one process of their own, since importing torch takes seconds; its lines."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run([sys.executable, "-c", TEAMS + FORK], text=True, capture_output=True,
                          env=os.environ | dict(PYTHONPATH=paths))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@linux
def test_only_the_thread_that_computes_has_a_team(said):
    """Of two teams each sleeps at every product: the server would take twice as long."""
    assert said[:-1] == ["1", "1 2", "2 2 2 1"]


@linux
def test_a_fork_has_no_team_to_wait_for(said):
    """The team's threads were not copied: ending them would take for ever."""
    assert said[-1] == "0"
