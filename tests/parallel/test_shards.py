"""A rank's part of a parameter, and of a gradient's norm, without ranks."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minids.parallel.gradients import scale
from minids.parallel.ranks import Ranks
from minids.parallel.shards import own_part

GRID = torch.arange(7 * 5).view(7, 5)


def part_of(cuts: list[int | None], sizes: tuple[int, ...], at: tuple[int, ...]) -> torch.Tensor:
    """What the rank `at` holds of GRID; cuts: what each dimension of the mesh cuts, or none."""
    mesh = SimpleNamespace(size=lambda dim: sizes[dim], get_local_rank=lambda dim: at[dim])
    placements = [SimpleNamespace(dim=cut) if cut is not None else object() for cut in cuts]
    return GRID[own_part(SimpleNamespace(shape=GRID.shape, placements=placements,
                                         device_mesh=mesh))]


@pytest.mark.parametrize("cuts", [[0, 0], [1, 0], [None, 0], [None, 1], [0, None]])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (1, 4), (4, 3)])
def test_ranks_hold_what_chunks_of_chunks_hold(cuts, sizes):
    """The mesh's last dimension cuts first, into parts of one size but for the last."""
    for at in product(*map(range, sizes)):
        wanted = GRID
        for cut, size, rank in reversed([*zip(cuts, sizes, at, strict=True)]):
            if cut is not None:
                parts = wanted.split(-(-wanted.size(cut) // size), cut) if wanted.numel() else []
                wanted = parts[rank] if rank < len(parts) else wanted.narrow(cut, 0, 0)
        found = part_of(cuts, sizes, at)
        assert found.numel() == wanted.numel() and torch.equal(found.flatten(), wanted.flatten())
    assert own_part(GRID) == (slice(0, 7), slice(0, 5))


@pytest.mark.parametrize("longest", [1e-7, 1e-6, 0.5, 4.999999, 5.0, 5.000002, 7.0])
def test_a_gradient_is_scaled_as_torch_clips_it(longest):
    mine, torchs = ([nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
                    for _ in range(2))
    for p, other, values in zip(mine, torchs, ([3.0, 0.0], [0.0, 4.0]), strict=False):
        p.grad, other.grad = (torch.tensor(values, dtype=torch.float64) for _ in range(2))
    nn.utils.clip_grad_norm_(torchs, longest)
    scale(mine, longest, 5.0)
    for p, other in zip(mine, torchs, strict=True):
        assert other.grad is None or torch.equal(p.grad, other.grad)


def test_a_ranks_memory_is_its_whole_gpu_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 7))
    memory = [Ranks(None, torch.device(kind), None, None).memory for kind in ("cuda", "cpu")]
    assert memory == [7, 0]
