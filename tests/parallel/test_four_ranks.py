"""Four ranks on gloo, in every mixture of layouts, compute what one process computes."""

import re
from pathlib import Path

import pytest
from launching import launch

CHECKS = re.findall(r"^def (check_\w+)", (Path(__file__).parent / "four_ranks.py").read_text(),
                    re.M)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What four ranks said, in one launch."""
    return launch("four_ranks.py", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks_equal_one_process(said, check):
    faults = said.get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)
