"""Marks and pass@k."""

from itertools import combinations

import pytest

from minids.rl.examination import pass_at


def test_pass_at_k_against_all_subsets():
    for right in range(6):
        replies = [True] * right + [False] * (5 - right)
        for k in range(1, 6):
            subsets = list(combinations(replies, k))
            assert pass_at(k, right, 5) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    # Wrong variant: as if replies were drawn with replacement.
    assert 1 - (1 - 2 / 5) ** 2 != pytest.approx(pass_at(2, 2, 5))
