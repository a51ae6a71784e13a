"""The norm of a gradient that lies on many ranks, and other sums over ranks."""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from minids.parallel.ranks import Ranks
from minids.parallel.shards import local


@torch.no_grad()
def clip(parameters: list[nn.Parameter], longest: float, ranks: Ranks,
         counted_elsewhere: list[nn.Parameter] = ()) -> float:
    """Scale a gradient down that is longer than `longest`; return its norm before.

    parameters: those of all ranks together, each rank with its own shards
    counted_elsewhere: those of them whose gradient another rank holds and counts as well

    Ranks of an `fsdp` group hold different shards of everything, experts included, and replicas
    hold the same: the sum of squares goes over the group, then over the pipeline.
    """
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    twice = {id(p) for p in counted_elsewhere}
    counted = [local(p.grad) for p in parameters if p.grad is not None and id(p) not in twice]
    squares = torch.zeros((), dtype=torch.float64, device=ranks.device)
    if counted:
        squares += nn.utils.get_total_norm(counted).double() ** 2
    for name in ("fsdp", "pipeline"):
        dist.all_reduce(squares, group=ranks.dense.get_group(name))
    norm = squares.sqrt()
    factor = (longest / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for grad in grads:
        grad.mul_(factor.to(grad.dtype))
    return norm.item()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks of the run, changed in place."""
    dist.all_reduce(tensor)
    return tensor
