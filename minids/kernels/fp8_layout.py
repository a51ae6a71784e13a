"""How FP8 factors lie in memory: in whole tiles, and an expert's rows in tiles of their own."""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # channels in a tile, rows and columns in a block
HOPPER = 9, 0  # compute capability
# Floors on the largest absolute value of a tile or a block, so that zeros get a finite scale.
LEAST = 1e-4  # of activations and weights, as in DeepSeek's code
# Gradients of a mean over many tokens are far smaller. Quotients and what is left of them, 2^-24 of
# the smallest value that E4M3 keeps, are still normal FP32 numbers here.
LEAST_GRADIENT = 1e-20


def whole(size: int) -> int:
    """Return the size of as many whole tiles."""
    return -(-size // BLOCK) * BLOCK


def in_fours(size: int) -> int:
    """Return the length of a row of blocks' scales."""
    return -(-size // BLOCK // 4) * 4


def on_hopper(x: Tensor) -> bool:
    """Return whether a tensor lies on a Hopper, where torch multiplies with such scales."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) == HOPPER


def in_gluon(x: Tensor) -> bool:
    """Return whether kernels in Gluon take a tensor: those for Hopper, if Triton has Gluon yet."""
    return on_hopper(x) and find_spec("triton.experimental.gluon") is not None


class Groups(NamedTuple):
    """The row tiles of sorted rows, none of which holds rows of two experts; int32, on the device.

    There are as many as the rows could need, T; those that are not needed have first >= end.
    """

    expert: Tensor  # (T,)
    first: Tensor  # (T,), a tile's first row
    end: Tensor  # (T,), the row after its expert's last
    starts: Tensor  # (E + 1,), the number of each expert's first tile, and of all


class Slots(NamedTuple):
    """Where the pairs of tokens and experts stand, as `minids.model.moe.sort_by_expert` says."""

    source: Tensor  # (M,), the token in each slot
    slot: Tensor  # (N, K), the slot of each pair


def group_tiles(counts: Tensor, rows: int) -> Groups:
    """Cut the rows of each expert into tiles, without asking the device how many there are.

    counts: (E,) int64, rows of each expert; rows: of all, or more
    """
    tiles = (counts + BLOCK - 1) // BLOCK
    ends, last = counts.cumsum(0), tiles.cumsum(0)  # (E,)
    number = torch.arange(-(-rows // BLOCK) + len(counts), device=counts.device)  # (T,)
    expert = torch.searchsorted(last, number, right=True).clamp(max=len(counts) - 1)
    first = (ends - counts)[expert] + (number - (last - tiles)[expert]) * BLOCK
    starts = torch.cat([last.new_zeros(1), last])
    return Groups(*(t.to(torch.int32) for t in (expert, first, ends[expert], starts)))
