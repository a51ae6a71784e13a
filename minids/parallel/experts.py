"""Expert parallelism: each rank holds some experts of a layer, and the tokens travel to them.

`Experts.forward` takes rows sorted by expert and their counts. Expert parallelism is that call
between two exchanges; gate, dispatch, combine and loads stay as they are:

    rank 0 sends  [rows of experts 0 1 | rows of experts 2 3]
    rank 1 sends  [rows of experts 0 1 | rows of experts 2 3]
    rank 0 gets   its own rows of 0 1, then rank 1's; sorted: all rows of 0, all rows of 1

No token is dropped, whatever the gate chooses: the exchange has as many rows as there are.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from minids.kernels.precision import compute_dtype
from minids.model.moe import Experts
from minids.model.transformer import Transformer


class SharedExperts(Experts):
    """The routed experts of one layer, spread over the ranks of `group`."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (M, D), rows sorted by expert; counts: (E,) rows of each, here -> (M, D)"""
        ranks, mine = dist.get_world_size(self.group), counts  # (E,)
        theirs = torch.empty_like(mine)  # (ranks * own experts,), rows that each rank sends here
        dist.all_to_all_single(theirs, mine, group=self.group)
        by_rank = [n.view(ranks, -1) for n in (mine, theirs)]
        sent, received = torch.stack([n.sum(1) for n in by_rank]).tolist()  # waits for the device
        rows = x[:sum(sent)].to(compute_dtype(x))  # past the last expert's rows nothing has meaning
        rows = exchange(rows, received, sent, self.group)  # (M', D), by rank, then by expert
        order, back = by_expert(by_rank[1], sum(received))
        weights = {name: p.to_local() for name, p in self.named_parameters()}
        local = SimpleNamespace(product=self.product, **weights)
        rows = Experts.forward(local, rows[order], by_rank[1].sum(0))
        rows = exchange(rows[back], sent, received, self.group)  # (sum(sent), D), in x's order
        return F.pad(rows, (0, 0, 0, len(x) - len(rows)))


def exchange(rows: Tensor, received: list[int], sent: list[int],
             group: dist.ProcessGroup) -> Tensor:
    """Send rows to the ranks of a group and return those that they send here.

    rows: (sum(sent), D), those for rank 0 first; received, sent: numbers of rows, by rank
    Returns (sum(received), D), those of rank 0 first. Gradients travel the way back.
    """
    return all_to_all_single_autograd(rows.contiguous(), received, sent, group)


def by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the order that sorts rows by expert, and the order that puts them back.

    counts: (ranks, experts) rows that stand by rank, then by expert; total: their sum

    With counts [[1, 2], [1, 1]] the rows a bb | c d become a c | bb d:
        order [0, 3, 1, 2, 4]   back [0, 2, 3, 1, 4]
    """
    sizes = counts.flatten()
    starts = (sizes.cumsum(0) - sizes).view_as(counts).T.flatten()  # by expert, then by rank
    sizes = counts.T.flatten()
    shift = starts - (sizes.cumsum(0) - sizes)
    order = torch.arange(total, device=counts.device)
    order = order + shift.repeat_interleave(sizes, output_size=total)
    back = torch.empty_like(order)
    back[order] = torch.arange(total, device=counts.device)
    return order, back


def share_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Give each rank of a mesh its share of every layer's experts, of a model on "meta"."""
    for block in model.blocks():
        if block.is_moe and mesh.size() > 1:
            experts = block.ffn.experts
            for name, whole in list(experts.named_parameters()):
                share = whole.new_empty(len(whole) // mesh.size(), *whole.shape[1:])
                shared = DTensor.from_local(share, mesh, [Shard(0)], run_check=False)
                experts.register_parameter(name, nn.Parameter(shared, whole.requires_grad))
            experts.__class__, experts.group = SharedExperts, mesh.get_group()
