"""Expert parallelism: each rank holds some experts of a layer, and the tokens travel to them.

A token leaves for a rank once, however many of its experts are there. That rank does what a layer
with only those experts would do, and sends back one row per token, already weighed and summed:

    rank 0   a visits experts 0 1      its own   a stays
             b visits experts 0 3      both      b stays, and leaves for rank 1
    rank 1   c visits experts 2 3      its own   c stays
             d visits experts 0 1      rank 0    d leaves for rank 0

DeepEP (V3 section 3.2.2) sends tokens this way too. No token is dropped, whatever the gate chooses.
Before tokens travel, each rank tells all others which experts its tokens visit, and with which
weights. From that, every rank plans the whole journey, including the order of rows within its
experts. The plan's tensors have sizes known in advance, so it can be compiled. The program waits
for the device only once per layer, to read the numbers of rows; after that only copies, exchanges
and products remain. The shared experts run while tokens are under way, and so does their backward
pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from minids.kernels.experts import Dispatch, SumSlots, weighed
from minids.kernels.precision import compute_dtype
from minids.model.moe import ALIGN, Experts, MoE, Routing, sort_by_expert
from minids.model.transformer import Transformer
from minids.parallel.shards import local


class Trip:
    """One exchange of rows, and of their gradients the other way.

    sent, received: numbers of rows to and from each rank of `group`
    Behind the rows of all ranks stands one more: it is not sent, and arrives as zeros. A slot that
    stands for no row points there.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]):
        self.group, self.sent, self.received = group, sent, received

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Start to send rows (sum(sent) + 1, D); return where others' will be after `finish`."""
        arriving = rows.new_empty(sum(received) + 1, rows.size(1))
        arriving[-1] = 0
        self.leaving = rows[:-1].contiguous()  # kept until it has left
        self.work = dist.all_to_all_single(arriving[:-1], self.leaving, received, sent, self.group,
                                           async_op=True)
        return arriving

    def finish(self) -> None:
        """Wait until all rows have arrived; on a GPU its stream waits, and not the program."""
        self.work.wait()
        self.work = self.leaving = None


class Leave(torch.autograd.Function):
    """Start a trip. In the backward pass: wait for the gradients that others' `Arrive` has sent.
    The one that comes through the graph is that of the rows that arrived here: it was sent."""

    @staticmethod
    def forward(ctx, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.start(rows, trip.sent, trip.received)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.finish()
        gradient, ctx.trip.gradient = ctx.trip.gradient, None  # no longer in memory than needed
        return gradient, None


class Arrive(torch.autograd.Function):
    """Wait for the rows of a trip. In the backward pass: start to send their gradients back."""

    @staticmethod
    def forward(ctx, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.finish()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.gradient = ctx.trip.start(grad, ctx.trip.received, ctx.trip.sent)
        return grad, None


class Plan(NamedTuple):
    """The journey of one layer's tokens, as one rank sees it; N tokens on each of `ranks` ranks.

    numbers: (ranks, 3), tokens that leave for each rank, tokens that arrive from it, and the pairs
        of token and expert among the latter
    left, leaving: positions of this rank's tokens in what it sends, (N, min(K, ranks)), and the
        token at each position, see `leaving`
    slot, source, counts, share: the rows that its experts compute, see `arriving`
    """

    numbers: Tensor
    left: Tensor
    leaving: Tensor
    slot: Tensor
    source: Tensor
    counts: Tensor
    share: Tensor


@dataclass
class Journey:
    """Tokens under way.

    A compiler that sees it go from one uncompiled function to the next asks for none of its sizes,
    which are others in every layer and step.

    there, back: the trips of tokens and of what comes back
    arriving: where tokens arrive; pairs: of token and expert that come here
    """

    plan: Plan
    there: Trip
    back: Trip
    arriving: Tensor
    pairs: int


class Tell(torch.autograd.Function):
    """Send all rows to every rank of a group: (N, D) -> (ranks, N, D), the rows of all ranks. The
    backward pass sums the gradients that all ranks computed for this rank's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, numbers = group, [len(rows)] * group.size()
        told = rows.new_empty(group.size(), *rows.shape)
        dist.all_to_all_single(told.flatten(0, 1), rows.repeat(group.size(), 1), numbers, numbers,
                               group)
        return told

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        back, numbers = torch.empty_like(grad), [grad.size(1)] * len(grad)
        dist.all_to_all_single(back.flatten(0, 1), grad.contiguous().flatten(0, 1), numbers,
                               numbers, ctx.group)
        return back.sum(0), None


class SharedExperts(Experts):
    """The routed experts of one layer that this rank holds."""

    def forward(self, tokens: Tensor, source: Tensor, slot: Tensor, counts: Tensor,
                share: Tensor) -> Tensor:
        """Return each token's weighted sum over these experts: (N', D) -> (N', D)

        source, slot, counts, share: as in `Plan`, cut to the slots in use
        """
        w1, w2, w3 = map(local, (self.w1, self.w2, self.w3))
        return self.compute(tokens, source, slot, share, counts, w1, w2, w3, self.product,
                            self.weighed)

    weighed = staticmethod(weighed)  # `shard` replaces this, or `compute`, by a compiled version

    @staticmethod
    def compute(tokens: Tensor, source: Tensor, slot: Tensor, share: Tensor, counts: Tensor,
                w1: Tensor, w2: Tensor, w3: Tensor, product: Callable,
                weighed: Callable) -> Tensor:
        """Run `forward` with these matrices. The tensors whose length varies come first."""
        x = Dispatch.apply(tokens, source, slot)  # (M, D)
        hidden = weighed(product(x, w1, counts), product(x, w3, counts), share)
        return SumSlots.apply(product(hidden, w2, counts), source, slot)


class ExchangingMoE(MoE):
    """A layer whose routed experts are spread over the ranks of `group`.

    ranks: their number; first, held: number of this rank's first expert, and how many it holds
    """

    group: dist.ProcessGroup
    ranks: int
    first: int
    held: int

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x: (B, S, D), this rank's tokens; B and S are the same on all ranks. As `MoE.forward`."""
        weights, routing = self.gate(x) if routes is None else self.gate(x, routes)
        weights, indices = weights.flatten(0, 1), routing.indices.flatten(0, 1)
        told = self.tell(torch.cat([indices.to(weights.dtype), weights], dim=1))  # (ranks, N, 2 K)
        plan = plan_journey(told, indices, self.first, self.held)
        journey = self.send(x.flatten(0, 1), plan)
        shared = None if self.shared_experts is None else self.shared_experts(x)
        return self.work(journey, shared).view_as(x), routing

    @torch.compiler.disable
    def tell(self, numbered: Tensor) -> Tensor:
        """Tell all ranks which experts this rank's tokens visit, and with which weights."""
        return Tell.apply(numbered, self.group)

    @torch.compiler.disable
    def send(self, x: Tensor, plan: Plan) -> Journey:
        """Start sending tokens x (N, D) to the ranks of their experts."""
        sent, received, pairs = zip(*plan.numbers.tolist(), strict=True)  # waits for the device
        there, back = Trip(self.group, sent, received), Trip(self.group, received, sent)
        rows = Dispatch.apply(x.to(compute_dtype(x)), plan.leaving[:sum(sent) + 1], plan.left)
        return Journey(plan, there, back, Leave.apply(rows, there), sum(pairs))

    @torch.compiler.disable
    def work(self, journey: Journey, shared: Tensor | None) -> Tensor:
        """Wait for tokens, run them through this rank's experts, exchange results: (N, D)"""
        plan, back = journey.plan, journey.back
        tokens = Arrive.apply(journey.arriving, journey.there)  # (N' + 1, D)
        used = min(journey.pairs + self.held * (ALIGN - 1) + 1, len(plan.source))
        rows = self.experts(tokens, plan.source[:used], plan.slot[:len(tokens)], plan.counts,
                            plan.share[:used])
        results = Arrive.apply(Leave.apply(rows, back), back)
        y = SumSlots.apply(results, plan.leaving[:len(results)], plan.left)
        return y if shared is None else y + shared.view_as(y)


def plan_journey(told: Tensor, indices: Tensor, first: int, held: int) -> Plan:
    """Plan what one rank sends, receives and computes.

    told: (ranks, N, 2 K), the experts of all ranks' tokens, then their weights
    indices: (N, K), the experts of this rank's tokens
    first, held: this rank's first expert, and how many each rank holds
    """
    numbers, weights = told.chunk(2, dim=-1)  # (ranks, N, K)
    theirs = numbers.detach().long() - first
    left, source, sent = leaving(indices, held, len(told))
    coming, *rows = arriving(theirs, weights, held)
    return Plan(torch.cat([sent.unsqueeze(1), coming], dim=1), left, source, *rows)


def leaving(indices: Tensor, held: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plan which tokens leave for which rank.

    indices: (N, K), the experts of each token; held: experts on each rank
    Returns
        slot: (N, min(K, ranks)), the positions of a token among the tokens that leave, which are
            ordered by rank, then by token; their total number where it visits fewer ranks
        source: (N min(K, ranks) + 1,), the token at each position; arbitrary past the last
        numbers: (ranks,), tokens that leave for each rank

    With two experts on each of two ranks, and the experts [[0, 1], [0, 3], [2, 3]]:
        slot [[0, 4], [1, 2], [4, 3]]   source [0, 1, 1, 2, ..]   numbers [2, 2]
    """
    n, k = indices.shape
    goes = indices.new_zeros(ranks, n).scatter(0, (indices // held).T, 1)
    numbers = goes.sum(1)
    position = (goes.flatten().cumsum(0) - 1).view_as(goes)
    slot = position.where(goes > 0, numbers.sum()).T  # (N, ranks)
    if k < ranks:
        slot = slot.sort(dim=1).values[:, :k]
    token = torch.arange(n, device=slot.device).unsqueeze(1).expand_as(slot)
    source = indices.new_zeros(slot.numel() + 1).scatter(0, slot.flatten(), token.flatten())
    return slot.contiguous(), source, numbers


def arriving(own: Tensor, weights: Tensor, held: int) -> tuple[Tensor, ...]:
    """Plan which rows this rank's experts compute.

    own: (ranks, N, K), the experts of all ranks' tokens; 0 to held - 1 are on this rank
    weights: (ranks, N, K), their weights
    Returns
        numbers: (ranks, 2), tokens that arrive from each rank, and their pairs with experts here
        slot: (ranks N + 1, K), slots of the arriving tokens, ordered by rank, then by token
        source: (M,), the arriving token in each slot
        counts: (held,), slots of each expert
        share: (M,), the weight of each slot's pair

    Slots of pairs computed on other ranks come last. The host only knows an upper bound of the
    slots in use: the pairs, plus the alignment of each expert. Slots within the bound that hold no
    pair of this rank have weight 0 and so result 0, and count as the last expert's. The last slot
    in use also stands in for every slot after it, and for the row that is no token.
    """
    ranks, n, k = own.shape
    here = ((own >= 0) & (own < held)).flatten(0, 1)  # (ranks N, K)
    comes = here.any(1)
    source, slot, counts = sort_by_expert(own.flatten(0, 1).where(here, held), held + 1)
    share = weights.new_zeros(len(source)).scatter(
        0, slot.flatten(), weights.flatten(0, 1).where(here, 0).flatten())
    last = (here.sum() + held * (ALIGN - 1)).clamp(max=len(source) - 1)
    at = comes.cumsum(0) - 1  # (ranks N,), the position of a token among those that arrive
    tokens = torch.arange(ranks * n, device=own.device)
    arrived = torch.full_like(F.pad(tokens, (0, 1)), ranks * n)
    arrived = arrived.scatter(0, at.where(comes, ranks * n), tokens.where(comes, ranks * n))
    slot = torch.minimum(F.pad(slot, (0, 0, 0, 1), value=len(source))[arrived], last)
    counts = torch.cat([counts[:held - 1], (last + 1 - counts[:held - 1].sum()).view(1)])
    numbers = torch.stack([comes.view(ranks, n).sum(1), here.view(ranks, n * k).sum(1)], dim=1)
    return numbers, slot, at[source].clamp(min=0), counts, share


def share_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Give each rank of a mesh its share of every layer's experts, of a model on "meta"."""
    for block in model.blocks():
        if block.is_moe and mesh.size() > 1:
            moe, experts = block.ffn, block.ffn.experts
            moe.group, moe.ranks = mesh.get_group(), mesh.size()
            moe.held = len(experts.w1) // moe.ranks
            moe.first = moe.held * mesh.get_local_rank()
            for name, whole in list(experts.named_parameters()):
                share = whole.new_empty(moe.held, *whole.shape[1:])
                shared = DTensor.from_local(share, mesh, [Shard(0)], run_check=False)
                experts.register_parameter(name, nn.Parameter(shared, whole.requires_grad))
            moe.__class__, experts.__class__ = ExchangingMoE, SharedExperts
