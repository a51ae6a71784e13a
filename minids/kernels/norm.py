"""RMSNorm: its gradient written out for training on a CPU, torch's fused one for inference and on a
GPU, and the plain formula for a compiler, which fuses it with its neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from minids.kernels.precision import compute_dtype, plain_inference, wide
from minids.kernels.registry import body

FEW = 2 ** 15  # numbers up to which one call is quicker than six passes


@body(lambda x, weight, eps: x.numel() <= FEW and plain_inference(x) and x.dtype == weight.dtype)
def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run torch's kernel, which computes in FP32 inside."""
    return torch.rms_norm(x, weight.shape, weight, eps)


@body(lambda x, weight, eps: is_compiling())
def traced(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the plain formula, rounded once to what a product takes."""
    x_wide = x.to(wide(x))
    scale = (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt()  # (.., 1), 1 / rms
    return (x_wide * scale * weight).to(compute_dtype(x))


@body(lambda x, weight, eps: x.device.type == "cuda")
def fused_on_gpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run torch's kernel, forward and backward, which computes in FP32 inside."""
    both = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(both), weight.shape, weight.to(both), eps).to(compute_dtype(x))


@body(lambda x, weight, eps: True)
def written_out(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run `NormRows` in the precision in which a product takes its result."""
    return NormRows.apply(x, weight, eps, compute_dtype(x))


class NormRows(torch.autograd.Function):
    """RMSNorm with its gradient written out, in half the passes over memory of the plain form.

    With s = 1 / rms(x) and y = x s w:
        dw = sum of dy x s over the rows,    dx = dy w s - x s^3 mean(dy x w)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x_wide = x.to(wide(x))
        scale = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.size(-1)).add_(eps).rsqrt_()  # (.., 1), 1 / rms
        ctx.save_for_backward(x, weight, scale)
        return (x_wide * scale).mul_(weight.to(x_wide.dtype)).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        dy, w = grad.to(scale.dtype), weight.to(scale.dtype)
        products = (dy * x).flatten(0, -2)  # (rows, dim)
        mean = (products @ w / w.numel()).view(scale.shape)
        dx = (dy * w).mul_(scale).addcmul_(x.to(scale.dtype), scale ** 3 * mean, value=-1)
        return dx.to(x.dtype), (scale.view(1, -1) @ products).flatten().to(weight.dtype), None, None
