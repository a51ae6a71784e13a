"""Two and four GPUs, one a rank, exchange by NCCL and compute what one GPU computes.

The checks are those of the CPU's ranks, in FP64 and to the same 1e-12.
"""

import pytest
import torch
from launching import launch
from test_four_ranks import CHECKS as OF_FOUR
from test_two_ranks import CHECKS as OF_TWO

GPUS = torch.cuda.device_count()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the GPUs said, in one launch for each number of them."""
    return {(n, check): faults for n in (2, 4) if n <= GPUS for check, faults in launch(
        f"{'two' if n == 2 else 'four'}_ranks.py", n, tmp_path_factory.mktemp("gpus"),
        limit=400, device="cuda").items()}


@pytest.mark.parametrize("gpus, check", [(2, c) for c in OF_TWO] + [(4, c) for c in OF_FOUR])
def test_gpus_equal_one_gpu(said, gpus, check):
    if GPUS < gpus:
        pytest.skip(f"needs {gpus} GPUs; here: {GPUS}")
    faults = said.get((gpus, check), ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)
