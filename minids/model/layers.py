"""The parts that every block shares: the linear layer, RMSNorm and the SwiGLU feed-forward layer.

No linear layer of the family has a bias (V3, arXiv 2412.19437, section 4.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.kernels import few_tokens, norm
from minids.kernels.registry import bodies


@bodies(few_tokens.linear)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T. x: (.., in_features); weight: (out_features, in_features)"""
    return F.linear(x, weight)


@bodies(norm.fused, norm.traced, norm.fused_on_gpu, norm.written_out)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) times the weight (dim,), computed in FP32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()  # (.., 1), 1 / rms
    return (wide * scale * weight).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T."""

    product = staticmethod(linear)  # of input and weight; `minids.apply.fp8` puts another here

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., in_features) -> (.., out_features)"""
        return self.product(x, self.weight)

    def extra_repr(self) -> str:
        return "{1} -> {0}".format(*self.weight.shape)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight, (dim,)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., dim) -> (.., dim)"""
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). The dense layers and the shared experts use it."""

    def __init__(self, dim: int, inter_dim: int):
        super().__init__()
        self.w1 = Linear(dim, inter_dim)
        self.w2 = Linear(inter_dim, dim)
        self.w3 = Linear(dim, inter_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., D) -> (.., D)"""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (.., inter_dim) inside
