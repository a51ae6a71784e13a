"""Ranks that share a model and do not train it compute what one process computes."""

import re
from pathlib import Path

import pytest
from launching import launch

HERE = Path(__file__).parent
CHECKS, MORE = (re.findall(r"^def (check_\w+)", (HERE / name).read_text(), re.M)
                for name in ("two_ranks_serving.py", "four_ranks_serving.py"))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two ranks said, in one launch."""
    return launch("two_ranks_serving.py", 2, tmp_path_factory.mktemp("ranks"), limit=120)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks_equal_one_process(said, check):
    faults = said.get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)


@pytest.fixture(scope="module")
def four_said(tmp_path_factory):
    """What four ranks said, in one launch."""
    return launch("four_ranks_serving.py", 4, tmp_path_factory.mktemp("ranks"), limit=170)


@pytest.mark.slow
@pytest.mark.parametrize("check", MORE)
def test_four_ranks_equal_one_process(four_said, check):
    faults = four_said.get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)
