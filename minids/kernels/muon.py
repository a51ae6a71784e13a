"""Muon's elementwise work, beside its products: on a GPU in two passes over memory."""

import torch
from torch import Tensor

from minids.kernels.precision import in_fp32


def look_ahead(grad: Tensor, mean: Tensor, momentum: float, out: Tensor) -> None:
    """Move the mean gradient towards `grad`; write Nesterov's step, momentum further on, to `out`.

    grad, mean: of one shape; out: as many numbers, of the type in which the step is orthogonalised
    """
    if in_fp32(grad, out):
        from minids.kernels import triton_muon
        return triton_muon.look_ahead(grad, mean, momentum, out)
    mean.lerp_(grad, 1 - momentum)
    out.copy_(grad.lerp(mean, momentum).view_as(out))


def times_and_more(x: Tensor, poly: Tensor, a: float) -> Tensor:
    """Return a x + P x of stacks, (n, r, c) and P (n, r, r), which may be written over.

    On a GPU as (a 1 + P) x: the sum would first copy x, a fifth of the time of the iteration.
    """
    if not x.is_cuda:
        return torch.baddbmm(x, poly, x, beta=a)
    poly.diagonal(dim1=-2, dim2=-1).add_(a)
    return torch.bmm(poly, x)


def move(weight: Tensor, step: Tensor, decay: float, length: float) -> None:
    """Multiply a weight by `decay` and subtract `length` times the step."""
    if in_fp32(weight):
        from minids.kernels import triton_muon
        return triton_muon.move(weight, step, decay, length)
    weight.mul_(decay)
    weight.add_(step.reshape(weight.shape), alpha=-length)
