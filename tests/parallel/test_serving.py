"""Ranks that share a model and do not train it compute what one process computes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import launch

from minids import ModelArgs
from minids.apply.stored import FP8, SCALE, keep_blocks
from minids.costs.serving import held
from minids.hf.names import goes_to_fp8, skeleton
from minids.parallel.layout import Spread
from minids.parallel.serving import part_of

HERE = Path(__file__).parent
CHECKS, MORE = (re.findall(r"^def (check_\w+)", (HERE / name).read_text(), re.M)
                for name in ("two_ranks_serving.py", "four_ranks_serving.py"))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two ranks said, in one launch."""
    return launch("two_ranks_serving.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks_equal_one_process(said, check):
    faults = said.get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)


@pytest.fixture(scope="module")
def four_said(tmp_path_factory):
    """What four ranks said, in one launch."""
    return launch("four_ranks_serving.py", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", MORE)
def test_four_ranks_equal_one_process(four_said, check):
    faults = four_said.get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)


def gigabytes(spread: Spread, world: int, pipeline_rank: int) -> float:
    """The weights of V3 that a rank holds, FP8 where the released files have it, else BF16."""
    mesh = SimpleNamespace(get_group=lambda _: None, get_local_rank=lambda _: 0)
    model = skeleton(ModelArgs.preset("v3"))
    part_of(model, SimpleNamespace(layout=spread.layout(world), pipeline_rank=pipeline_rank,
                                   dense=mesh, sparse=mesh))
    keep_blocks(model, torch.bfloat16, lambda name, weight: goes_to_fp8(
        name.replace("ffn.gate", "mlp.gate"), weight.shape[-2:]))
    return sum(tensor.numel() * (1 if tensor.dtype == FP8 else 4 if name.endswith(SCALE) else 2)
               for name, tensor in model.state_dict().items()) / 1e9


@pytest.mark.slow
def test_the_page_says_what_v3_takes_on_each_rank():
    page = (HERE.parent.parent / "minids" / "README.md").read_text().replace("\n", " ")
    on_8 = gigabytes(Spread(), 8, 0)
    on_16 = max(gigabytes(Spread(pipeline=2), 16, rank) for rank in range(2))
    assert f"about {on_8:.0f} GB on each of 8 ranks" in page, on_8
    assert f"{on_16:.0f} GB on each of 16 ranks in two stages" in page, on_16
    assert 640 < gigabytes(Spread(), 1, 0) < 700  # all of it, in one byte per parameter


@pytest.mark.slow
def test_the_dry_run_counts_what_the_parts_hold():
    v3, spread = ModelArgs.preset("v3"), Spread(pipeline=2)
    layout = spread.layout(16)
    for rank in range(2):
        counted = held(v3, layout.layers_of(rank, v3), 8, last=rank == 1).weights / 1e9
        held_here = gigabytes(spread, 16, rank)
        assert counted == pytest.approx(held_here, rel=1e-3)  # each MTP module's second copies
