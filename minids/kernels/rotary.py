"""Rotary position in real numbers, for a compiler: torch's makes no kernels of complex ones."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from minids.kernels.precision import wide
from minids.kernels.registry import body


@body(lambda x, rotation: is_compiling())
def real_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply (x0 + i x1)(c + i s) by hand: one pass, fused with what comes before and after."""
    turn = torch.view_as_real(rotation).unsqueeze(-3)  # (B or 1, S, 1, rope / 2, 2)
    c, s = turn.unbind(-1)
    x0, x1 = x.to(wide(x)).unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, H, rope / 2)
    return torch.stack([x0 * c - x1 * s, x0 * s + x1 * c], dim=-1).flatten(-2).to(x.dtype)
