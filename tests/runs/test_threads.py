"""The number of threads of a run, while other programs use the machine."""

import os
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import training_runs
from training_runs import run_train

from minids.runs import threads as module
from minids.runs.device import prepare_cpu
from minids.runs.threads import REST, STEPS, TRIAL, Threads, quota, waited

ROOT = Path(__file__).resolve().parents[2]
home, flags = training_runs.home, training_runs.flags
ONCE = {2: 1.0, 1: 0.4}  # seconds of a step by threads, where one thread is faster


class Machine:
    """A machine whose waiting and whose steps are given, not measured."""

    def __init__(self, monkeypatch, cores: int, share: float, seconds: dict[int, float],
                 kind: type[Threads] = Threads):
        self.number, self.said, self.share, self.seconds = cores, [], share, seconds
        self.ran = self.waits = 0
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.number)
        monkeypatch.setattr(torch, "set_num_threads", partial(setattr, self, "number"))
        monkeypatch.setattr(module, "waited", lambda: (self.ran, self.waits))
        self.threads = kind(False, self.said.append)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.ran += round(1e9 * (1 - self.share))
            self.waits += round(1e9 * self.share)
            self.threads.took(self.seconds[self.number])


def test_a_quiet_machine_keeps_its_threads_and_says_nothing(monkeypatch):
    machine = Machine(monkeypatch, 2, 0.1, ONCE)
    machine.run(100 * STEPS)
    assert machine.number == 2 and machine.said == []


@pytest.mark.parametrize("cores, seconds, best", [
    (2, ONCE, 1), (2, {2: 1.0, 1: 1.9}, 2),
    (8, {8: 2.0, 6: 1.1, 4: 1.4, 2: 1.0, 1: 3.0}, 6),  # stops where a step is longer again
    (8, {8: 2.0, 6: 1.9, 4: 1.4, 2: 1.1, 1: 1.2}, 2)])
def test_a_busy_machine_gets_what_is_fastest_there_and_one_line(monkeypatch, cores, seconds, best):
    machine = Machine(monkeypatch, cores, 0.5, seconds)
    machine.run(5 * REST * STEPS)
    assert machine.threads.told == best and len(machine.said) == 1
    assert machine.said[0].startswith(
        "the machine is busy: 50% of the time this run's threads have no core; going on with "
        f"{best} of {cores} ")


@pytest.mark.parametrize("middle, best", [(statistics.median, 1), (statistics.mean, 2)])
def test_one_slow_step_does_not_decide(monkeypatch, middle, best):
    """The first one with a new number makes the threads anew. The mean is the wrong variant."""
    machine = Machine(monkeypatch, 2, 0.5, {2: 1.0})
    machine.run(STEPS + TRIAL)  # which has tried both threads
    monkeypatch.setattr(module.statistics, "median", middle)
    for seconds in (5.0, 0.5, 0.5):
        machine.threads.took(seconds)
    assert machine.number == best


def test_all_threads_come_back_when_the_machine_is_quiet_and_after_the_run(monkeypatch):
    machine = Machine(monkeypatch, 2, 0.5, ONCE)
    machine.run(STEPS + 2 * TRIAL)
    assert machine.number == 1
    machine.share = 0.01
    machine.run(2 * STEPS)
    assert machine.number == 2 and "quiet again" in machine.said[-1]
    machine.share = 0.5
    machine.run(2 * REST * STEPS)
    assert machine.number == 1 and len(machine.said) == 3
    machine.threads.end()
    assert machine.number == 2


def test_a_number_that_was_asked_for_stays(monkeypatch):
    machine = Machine(monkeypatch, 2, 0.9, ONCE)
    machine.threads = Threads(fixed=True, say=machine.said.append)
    machine.run(4 * REST * STEPS)
    machine.threads.end()
    assert machine.number == 2 and machine.said == []


def test_waiting_is_what_the_system_counts():
    if not os.path.exists("/proc/self/schedstat"):
        assert waited() == (0, 0)
        return
    before, start = waited(), time.thread_time_ns()
    while time.thread_time_ns() - start < 2e8:
        pass
    assert waited()[0] - before[0] >= 1.5e8


def test_threads_that_have_ended_and_other_kernels_are_no_error(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1/schedstat").write_text("strange\n")
    assert waited(tmp_path) == (0, 0)


@pytest.mark.parametrize("files, cores", [
    ({}, 0), ({"cpu.max": "max 100000\n"}, 0), ({"cpu.max": "200000 100000\n"}, 2),
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
    ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1)])
def test_a_containers_cores(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == cores


def test_a_container_gets_as_many_threads_as_cores(monkeypatch):
    numbers = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    for limit in (2, 0, 128):
        monkeypatch.setattr("minids.runs.device.quota", lambda limit=limit: limit)
        prepare_cpu(0)
    prepare_cpu(3)
    assert numbers == [2, 64, 64, 3]


def test_a_run_watches_its_steps_unless_its_number_is_given(home, flags, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Threads, "took", lambda self, seconds: seen.append(seconds))
    run_train(*flags, "--out", str(tmp_path / "a"), "--steps", "3")
    assert len(seen) == 3 and min(seen) > 0
