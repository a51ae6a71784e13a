"""Two ranks on gloo with compiled blocks compute what one process computes without."""

import re
from pathlib import Path

import pytest
from launching import launch

CHECKS = re.findall(r"^def (check_\w+)",
                    (Path(__file__).parent / "compiled_ranks.py").read_text(), re.M)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two ranks said, in one launch."""
    return launch("compiled_ranks.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks_compiled_equal_one_process(said, check):
    faults = said.get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)
