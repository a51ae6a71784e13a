"""The norm of a gradient that lies on many ranks, and other sums over ranks."""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from minids.parallel.ranks import Ranks
from minids.parallel.shards import local


def norm(parameters: list[nn.Parameter], ranks: Ranks,
         counted_elsewhere: list[nn.Parameter] = ()) -> Tensor:
    """Return the norm of a gradient, on all ranks, each with its own shards.

    counted_elsewhere: parameters whose gradient another rank holds and counts as well

    Ranks of an `fsdp` group hold different shards, experts included, and replicas hold the same:
    the sum of squares goes over the group, then over the pipeline.
    """
    twice = {id(p) for p in counted_elsewhere}
    grads = [local(p.grad) for p in parameters if p.grad is not None and id(p) not in twice]
    squares = torch.zeros((), dtype=torch.float64, device=ranks.device)
    if grads:
        squares += nn.utils.get_total_norm(grads).double() ** 2
    for name in ("fsdp", "pipeline"):
        dist.all_reduce(squares, group=ranks.dense.get_group(name))
    return squares.sqrt()


@torch.no_grad()
def scale(parameters: list[nn.Parameter], longest: float, length: float) -> None:
    """Scale a gradient of that length down to `longest`, as torch.nn.utils.clip_grad_norm_ does."""
    factor = longest / (length + 1e-6)
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if grads and factor < 1:
        torch._foreach_mul_(grads, factor)


@torch.no_grad()
def sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Add up the gradients that ranks with different tokens have of the same parameters."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    joined = torch.cat([grad.flatten() for grad in grads])  # one message
    for name in ("fsdp", "replicate"):
        dist.all_reduce(joined, group=ranks.dense.get_group(name))
    for grad, part in zip(grads, joined.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks of the run, changed in place."""
    dist.all_reduce(tensor)
    return tensor
