"""The parts that every block shares: the linear layer, RMSNorm and the SwiGLU feed-forward layer.

`Linear` is the one place that knows how a weight matrix meets its input, so that another precision
is a change here and nowhere else. No linear layer of the family has a bias (V3, section 4.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T.

    weight: (out_features, in_features)
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    product = staticmethod(F.linear)  # of input and weight; `minids.fp8` has another

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., in_features) -> (.., out_features)"""
        return self.product(x, self.weight)

    def extra_repr(self) -> str:
        return "{1} -> {0}".format(*self.weight.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a learned weight, computed in FP32 or wider."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., dim) -> (.., dim), in the precision that a product would take it in"""
        return NormRows.apply(x, self.weight, self.eps, compute_dtype(x))


class NormRows(torch.autograd.Function):
    """RMSNorm with its gradient written out, in half the passes over memory of the plain form.

    With s = 1 / rms(x) and y = x s w:
        dw = sum of dy x s over the rows,    dx = dy w s - x s^3 mean(dy x w)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.size(-1)).add_(eps).rsqrt_()  # (.., 1), 1 / rms
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.to(wide.dtype)).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        dy, w = grad.to(scale.dtype), weight.to(scale.dtype)
        products = (dy * x).flatten(0, -2)  # (rows, dim)
        mean = (products @ w / w.numel()).view(scale.shape)
        dx = (dy * w).mul_(scale).addcmul_(x.to(scale.dtype), scale ** 3 * mean, value=-1)
        return dx.to(x.dtype), (scale.view(1, -1) @ products)[0].to(weight.dtype), None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which a product with x runs: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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
