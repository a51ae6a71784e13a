"""Weights that stay in FP8 as released files store them, and are multiplied out at each use.

A matrix in E4M3 with a scale for each block of 128 x 128 takes one byte per number; V3 has 671
billion of them. Here a linear layer or an expert keeps these two tensors and dequantizes them when
it runs, one matrix at a time, into the precision that a model loaded in the ordinary way would
have: so the results are that model's, to the bit. Embedding, head, gates, norms and whatever else
the files do not store in FP8 stay as they are.

Simplified: the products run on the dequantized matrix. A kernel that reads FP8 itself would save
the way through memory.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.fp8 import BLOCK, dequantize_into
from minids.kernels.precision import compute_dtype
from minids.model.layers import Linear
from minids.model.moe import Experts
from minids.model.transformer import Transformer

SCALE = "_scale_inv"  # after a matrix's name: its scales, as in released files
FP8 = torch.float8_e4m3fn


class StoredLinear(Linear):
    """A linear layer whose weight is in FP8.

    dtype: of the dequantized weight
    buffers: weight, (out_features, in_features) E4M3, and weight_scale_inv, a scale per block
    """

    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """Dequantize the weight: (out_features, in_features)"""
        return dequantized(self._buffers["weight"], self.weight_scale_inv, self.dtype)


class StoredExperts(Experts):
    """Routed experts whose matrices are in FP8; each is dequantized when it has tokens.

    buffers: w1, w2, w3, stacks in E4M3, and their scales, such as w1_scale_inv
    """

    dtype: torch.dtype

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (M, D), rows sorted by expert; counts: (E,) rows of each -> (M, D)"""
        out, start = torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device), 0
        for e, size in enumerate(counts.tolist()):
            if size:
                rows = x[start:start + size]
                hidden = F.silu(F.linear(rows, self.matrix("w1", e)))
                hidden = hidden * F.linear(rows, self.matrix("w3", e))  # (size, moe_inter_dim)
                out[start:start + size] = F.linear(hidden, self.matrix("w2", e))
                start += size
        return out

    def matrix(self, name: str, e: int) -> Tensor:
        """Dequantize one matrix of expert e."""
        return dequantized(getattr(self, name)[e], getattr(self, name + SCALE)[e], self.dtype)


def dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix in FP8, with its scales, in another precision."""
    wide = torch.empty(q.shape, dtype=dtype, device=q.device)
    dequantize_into(wide, q, scale)
    return wide


def keep_blocks(model: Transformer, dtype: torch.dtype,
                is_fp8: Callable[[str, Tensor], bool]) -> None:
    """Make room for matrices that stay in FP8, in a model on the meta device.

    dtype: of the dequantized matrices; is_fp8: whether a parameter of this name and shape is FP8
    """
    for prefix, module in list(model.named_modules()):
        if not isinstance(module, Linear | Experts) or module is model.head:
            continue
        own = list(module.named_parameters(recurse=False))
        if not all(is_fp8(f"{prefix}.{name}", weight) for name, weight in own):
            continue
        for name, weight in own:
            delattr(module, name)
            blocks = [-(-size // BLOCK) for size in weight.shape[-2:]]
            module.register_buffer(name, torch.empty_like(weight, dtype=FP8))
            module.register_buffer(name + SCALE, weight.new_empty(*weight.shape[:-2], *blocks,
                                                                  dtype=torch.float32))
        module.dtype, model.eager = dtype, True
        if isinstance(module, Experts):
            module.__class__ = StoredExperts
            # Bodies that read whole experts leave those with products of their own alone.
            module.product = module.product
        else:
            module.__class__ = StoredLinear
