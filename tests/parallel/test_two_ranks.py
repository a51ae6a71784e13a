"""Two ranks on gloo compute what one process computes."""

import re
from pathlib import Path

import pytest
from launching import launch

CHECKS, LEARNING = (
    re.findall(r"^def (check_\w+)", (Path(__file__).parent / name).read_text(), re.M)
    for name in ("two_ranks.py", "learning.py"))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two ranks said, in one launch."""
    return launch("two_ranks.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS + LEARNING)
def test_two_ranks_equal_one_process(said, check):
    faults = said.get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)
