"""Functions of whole matrices whose rows lie on several ranks: Muon's orthogonalisation.

Orthogonalising each rank's rows for themselves would be another optimizer. So every rank of the
group takes some of the matrices, gets their rows from the others, and sends the result back: two
exchanges, and no product is computed twice. A stack of experts that are whole needs no exchange.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist


def sharing_rows(parameter: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks that share the rows of a parameter's matrices; None if they are whole.

    parameter: (r, c), or a stack (E, r, c), sharded or not
    """
    for dim, placement in enumerate(getattr(parameter, "placements", ())):
        if getattr(placement, "dim", None) == parameter.ndim - 2:
            return parameter.device_mesh.get_group(dim)
    return None


def of_whole(function: Callable[[Tensor], Tensor], shards: Tensor, rows: int,
             group: dist.ProcessGroup | None) -> Tensor:
    """Apply a function of matrices to those whose rows are spread over a group.

    function: (n, r, c) -> (n, r, c); it maps zeros to zeros
    shards: (N, own, c), this rank's rows of N matrices, the first ceil(r / ranks) in rank 0
    rows: r, those of a whole matrix
    Returns this rank's rows of the results, (N, own, c).
    """
    if group is None:
        return function(shards)
    ranks, (count, own, width) = dist.get_world_size(group), shards.shape
    most, each = -(-rows // ranks), -(-count // ranks)  # rows per rank, matrices per rank
    sent = F.pad(shards, (0, 0, 0, most - own, 0, each * ranks - count))  # (ranks * each, most, c)
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent, group=group)
    whole = parts.view(ranks, each, most, width).movedim(0, 1).flatten(1, 2)  # (each, .., c)
    result = function(whole[:, :rows])
    result = F.pad(result, (0, 0, 0, most * ranks - rows)).unflatten(1, (ranks, most))
    sent = result.movedim(1, 0).contiguous()  # (ranks, each, most, c)
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent, group=group)
    return parts.flatten(0, 1)[:count, :own]
