"""Pairs take turns, ratios are medians of pairs, and memory is what a block adds."""

import sys

import pytest
import torch

from minids.lab.timing import Timing, in_turn, watch_memory


def test_sides_take_turns():
    calls = []
    timing = in_turn(lambda: calls.append("a"), lambda: calls.append("b"), 3, "cpu")
    assert calls == list("abbaab")
    assert [len(side) for side in timing] == [3, 3]


def test_ratio_is_the_median_of_pairs():
    # The ratio of medians would be 4: one slow moment of the machine hits both of a pair.
    timing = Timing([1.0, 1.0, 10.0], [2.0, 4.0, 30.0])
    assert timing.ratios == [2.0, 4.0, 3.0]
    assert timing.cells(100) == ["100", "25", "3.00", "2.00", "4.00"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_block_is_seen():
    def added(work) -> float:
        memory = watch_memory(work, "cpu")
        return (memory.peak - memory.before) / 2**20

    held = torch.ones(2**25)  # 128 MiB, held before and so not counted
    assert 60 < added(lambda: torch.ones(2**24)) < 80  # 64 MiB, freed again
    assert added(lambda: None) < 16
    del held
