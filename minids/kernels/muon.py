"""Muon's work: on a GPU its elementwise part in two passes, and half of each symmetric product."""

import torch
from torch import Tensor

from minids.kernels.precision import in_fp32, on_hopper


def look_ahead(grad: Tensor, mean: Tensor, momentum: float, out: Tensor) -> None:
    """Move the mean gradient towards `grad`; write Nesterov's step, momentum further on, to `out`.

    grad, mean: of one shape; out: as many numbers, of the type in which the step is orthogonalised
    """
    if in_fp32(grad, out):
        from minids.kernels import triton_muon
        return triton_muon.look_ahead(grad, mean, momentum, out)
    mean.lerp_(grad, 1 - momentum)
    out.copy_(grad.lerp(mean, momentum).view_as(out))


def gram(x: Tensor) -> Tensor:
    """Return x x^T of a stack: (n, r, c) -> (n, r, r)"""
    if is_mirrored(x):
        from minids.kernels import triton_muon
        return triton_muon.mirrored(x, 1.0, 0.0)
    return torch.bmm(x, x.mT)


def polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    """Return b G + c G^2 of symmetric matrices, (n, r, r)"""
    if is_mirrored(gram):
        from minids.kernels import triton_muon
        return triton_muon.mirrored(gram, c, b)
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def is_mirrored(x: Tensor) -> bool:
    """Return whether a kernel computes half of x x^T, of x (n, r, c) as it is or transposed.

    On Hopper, for numbers of 2 bytes whose rows in memory are whole multiples of 16 bytes.
    """
    stored = x if x.is_contiguous() else x.mT
    return (on_hopper(x) and x.element_size() == 2 and stored.is_contiguous()
            and stored.size(-1) % 8 == 0)


def times_and_more(x: Tensor, poly: Tensor, a: float) -> Tensor:
    """Return a x + P x of stacks, (n, r, c) and symmetric P (n, r, r), which may be written over.

    On a GPU as (a 1 + P) x: the sum would first copy x, a fifth of the time of the iteration.
    There the result lies in memory as x does.
    """
    if not x.is_cuda:
        return torch.baddbmm(x, poly, x, beta=a)
    poly.diagonal(dim1=-2, dim2=-1).add_(a)
    return torch.bmm(poly, x) if x.is_contiguous() else torch.bmm(x.mT, poly).mT


def move(weight: Tensor, step: Tensor, decay: float, length: float) -> None:
    """Multiply a weight by `decay` and subtract `length` times the step."""
    if in_fp32(weight):
        from minids.kernels import triton_muon
        return triton_muon.move(weight, step, decay, length)
    weight.mul_(decay)
    weight.add_(step.reshape(weight.shape), alpha=-length)
