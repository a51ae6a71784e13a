"""Muon's two passes over its numbers, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def look_ahead_kernel(grad, mean, out, momentum, size, BLOCK: tl.constexpr):
    """Update BLOCK numbers of the mean, and write where it leads, in FP32 inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    m = tl.load(mean + at, mask=inside).to(tl.float32)
    m += (g - m) * (1 - momentum)
    tl.store(mean + at, m.to(mean.dtype.element_ty), mask=inside)
    tl.store(out + at, (g + (m - g) * momentum).to(out.dtype.element_ty), mask=inside)


@triton.jit
def move_kernel(weight, step, decay, length, size, BLOCK: tl.constexpr):
    """Shrink BLOCK numbers of a weight and move them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    w = tl.load(weight + at, mask=inside).to(tl.float32)
    s = tl.load(step + at, mask=inside).to(tl.float32)
    tl.store(weight + at, (w * decay - length * s).to(weight.dtype.element_ty), mask=inside)


def look_ahead(grad: Tensor, mean: Tensor, momentum: float, out: Tensor) -> None:
    """Run `minids.kernels.muon.look_ahead`."""
    assert mean.is_contiguous() and out.is_contiguous()
    size = grad.numel()
    look_ahead_kernel[triton.cdiv(size, BLOCK),](grad.contiguous(), mean, out, momentum, size,
                                                 BLOCK=BLOCK)


def move(weight: Tensor, step: Tensor, decay: float, length: float) -> None:
    """Run `minids.kernels.muon.move`."""
    assert weight.is_contiguous()
    size = weight.numel()
    move_kernel[triton.cdiv(size, BLOCK),](weight, step.contiguous(), decay, length, size,
                                           BLOCK=BLOCK)
    torch.autograd.graph.increment_version(weight)  # as an operation of torch does
