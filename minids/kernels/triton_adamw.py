"""AdamW with moments in BF16, in one pass over memory, in Triton.

Torch's own step has moments in FP32: widening and rounding them around it moves three times the
bytes, and holds them in both precisions for a while.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def adamw_kernel(weight, grad, mean, square, step, lr, decay, beta1, beta2, log_beta1, log_beta2,
                 eps, size, BLOCK: tl.constexpr):
    """Move BLOCK numbers of a weight and of its moments, in FP32 inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    taken = tl.load(step).to(tl.float64)  # 1 - beta^n loses digits in FP32 where beta is near 1
    start1 = (1 - tl.exp(taken * log_beta1)).to(tl.float32)
    start2 = (1 - tl.exp(taken * log_beta2)).to(tl.float32)
    w = tl.load(weight + at, mask=inside).to(tl.float32)
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    m = tl.load(mean + at, mask=inside).to(tl.float32)
    v = tl.load(square + at, mask=inside).to(tl.float32)
    m += (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    w = w * decay - lr / start1 * m / (tl.sqrt(v) / tl.sqrt(start2) + eps)
    tl.store(mean + at, m.to(mean.dtype.element_ty), mask=inside)
    tl.store(square + at, v.to(square.dtype.element_ty), mask=inside)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)


def move(weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
    """Move a weight and its moments, state "exp_avg" and "exp_avg_sq"; "step" counts this one.

    group: lr, betas, eps and weight_decay, as `torch.optim.AdamW` has them
    """
    mean, square, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
    assert weight.is_contiguous() and mean.is_contiguous() and square.is_contiguous()
    size, lr = weight.numel(), group["lr"]
    adamw_kernel[triton.cdiv(size, BLOCK),](
        weight, grad.contiguous(), mean, square, state["step"], lr,
        1 - lr * group["weight_decay"], beta1, beta2,
        *(math.log(max(beta, 1e-30)) for beta in (beta1, beta2)), group["eps"], size, BLOCK=BLOCK)
    torch.autograd.graph.increment_version(weight)  # as an operation of torch does
