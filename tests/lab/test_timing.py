"""Pairs take turns, ratios are medians of pairs, and memory is what a block adds."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from minids.lab import timing
from minids.lab.timing import in_turn, speed_cells, watch_memory


def test_sides_take_turns():
    calls = []
    works = [lambda: calls.append("a"), lambda: calls.append("b")]
    taken = in_turn(works, 3, "cpu")
    assert calls == list("abbaab")
    assert [len(side) for side in taken] == [3, 3]


def test_a_timing_may_be_the_mean_of_several_calls(monkeypatch):
    calls, clock = [], SimpleNamespace(perf_counter=itertools.count(step=10).__next__)
    monkeypatch.setattr(timing, "time", clock)
    assert in_turn([lambda: calls.append("a")], 2, "cpu", times=5) == [[2.0, 2.0]]
    assert calls == ["a"] * 10


def test_ratio_is_the_median_of_pairs():
    # The ratio of medians would be 4: one slow moment of the machine hits both of a pair.
    taken = [1.0, 1.0, 10.0], [2.0, 4.0, 30.0]
    assert speed_cells(taken, 100) == ["100", "25", "3.00", "2.00", "4.00"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("libc, given", [("glibc", [0]), ("musl", [])])
def test_what_was_freed_before_is_given_back_before_memory_is_read(monkeypatch, libc, given):
    told = []
    monkeypatch.setattr(timing.platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=told.append))
    before, peak = watch_memory(lambda: told.append("work"), "cpu")
    assert told == [*given, "work"] and 0 < before <= peak


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_block_is_seen():
    def added(work) -> float:
        before, peak = watch_memory(work, "cpu")
        return (peak - before) / 2**20

    held = torch.ones(2**25)  # 128 MiB, held before and so not counted
    assert 60 < added(lambda: torch.ones(2**24)) < 80  # 64 MiB, freed again
    assert added(lambda: None) < 16
    del held
