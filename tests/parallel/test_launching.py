"""A check that fails on ranks does not keep the others from being reached, unless a rank waits."""

import pytest
from launching import launch


@pytest.mark.slow
def test_checks_after_one_that_fails_are_reached(tmp_path):
    said = launch("failing_ranks.py", 2, tmp_path)
    first, on_all, on_one, between, left = said.values()
    assert first == between == ["", ""]
    assert all(fault.endswith("AssertionError: on all\n") for fault in on_all)
    assert on_one[0] == "" and on_one[1].endswith("AssertionError: on one\n")
    assert "Error: " in left[0] and left[1].endswith("AssertionError: left\n")
    assert "check_last" not in said
