"""Expert parallelism: each rank holds some experts of a layer, and the tokens travel to them.

A token leaves for a rank once, however many of its experts are there, with the numbers of all its
experts and their weights. That rank does what a layer with only those experts would do, and sends
back one row per token, already weighed and summed:

    rank 0   a visits experts 0 1      its own   a stays
             b visits experts 0 3      both      b stays, and leaves for rank 1
    rank 1   c visits experts 2 3      its own   c stays
             d visits experts 0 1      rank 0    d leaves for rank 0

DeepEP (V3 section 3.2.2) sends tokens this way too. No token is dropped, whatever the gate chooses.
While tokens are under way, the shared experts are computed; in the backward pass, so is their
gradient. The only wait for the device is for the numbers of tokens, once in each layer.
"""

from dataclasses import dataclass

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


@dataclass
class Journey:
    """Tokens under way, and the exchanges of one layer.

    A compiler that sees it go from one uncompiled function to the next asks for none of its sizes,
    which are others in every layer and step.

    tokens, numbered, results: the trips of tokens, of the numbers and weights of their experts, and
        of what comes back
    arriving: where tokens and numbers arrive; pairs: of token and expert that come here
    slot, source: of the tokens that left, as in `leaving`
    """

    tokens: Trip
    numbered: Trip
    results: Trip
    arriving: tuple[Tensor, Tensor]
    pairs: int
    slot: Tensor
    source: Tensor


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


class SharedExperts(Experts):
    """The routed experts of one layer that this rank holds."""

    weighed = staticmethod(weighed)  # `share_experts` may put a compiled one here

    def forward(self, x: Tensor, counts: Tensor, share: Tensor) -> Tensor:
        """x: (M, D), rows sorted by expert; counts: (held,) rows of each; share: (M,) weight of
        each row -> (M, D)"""
        w1, w2, w3 = map(local, (self.w1, self.w2, self.w3))
        hidden = self.weighed(self.product(x, w1, counts), self.product(x, w3, counts), share)
        return self.product(hidden, w2, counts)


class ExchangingMoE(MoE):
    """A layer whose routed experts are spread over the ranks of `group`.

    ranks: their number; first, held: number of this rank's first expert, and how many it holds
    """

    group: dist.ProcessGroup
    ranks: int
    first: int
    held: int

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x: (B, S, D), this rank's tokens; as `MoE.forward`."""
        weights, routing = self.gate(x) if routes is None else self.gate(x, routes)
        weights, indices = weights.flatten(0, 1), routing.indices.flatten(0, 1)
        numbered = torch.cat([(indices + 1).to(weights.dtype), weights], dim=1)  # (N, 2 K); 0: none
        journey = self.send(x.flatten(0, 1), numbered, *leaving(indices, self.held, self.ranks))
        shared = None if self.shared_experts is None else self.shared_experts(x)
        y = self.work(journey).view_as(x)
        return y if shared is None else y + shared, routing

    @torch.compiler.disable
    def send(self, x: Tensor, numbered: Tensor, slot: Tensor, source: Tensor,
             numbers: Tensor) -> Journey:
        """Let tokens leave, x (N, D) and numbered (N, 2 K); slot, source, numbers: of `leaving`."""
        theirs = torch.empty_like(numbers)
        dist.all_to_all_single(theirs, numbers, group=self.group)
        sent, received = torch.stack([numbers, theirs]).tolist()  # waits for the device
        there = [n for n, _ in sent], [n for n, _ in received]
        trips = [Trip(self.group, *there), Trip(self.group, *there)]
        source = source[:sum(there[0]) + 1]
        arriving = tuple(Leave.apply(Dispatch.apply(rows, source, slot), trip) for rows, trip
                         in zip((x.to(compute_dtype(x)), numbered), trips, strict=True))
        return Journey(*trips, Trip(self.group, *there[::-1]), arriving,
                       sum(n for _, n in received), slot, source)

    @torch.compiler.disable
    def work(self, journey: Journey) -> Tensor:
        """Wait for tokens, run them through this rank's experts, exchange results: (N, D)"""
        tokens = Arrive.apply(journey.arriving[0], journey.tokens)  # (N' + 1, D)
        numbered = Arrive.apply(journey.arriving[1], journey.numbered)
        numbers, weights = numbered.chunk(2, dim=1)  # (N' + 1, K)
        own = numbers.detach().long() - 1 - self.first
        here = (own >= 0) & (own < self.held)
        source, slot, counts = sort_by_expert(own.where(here, self.held), self.held + 1)
        # Slots of other ranks' pairs come last. A few are left, whose rows get the weight 0 and
        # whose results are zeros; the last one stands for all the rest.
        last = min(journey.pairs + self.held * (ALIGN - 1), len(source) - 1)
        source, slot, counts = source[:last + 1], slot.clamp(max=last), counts[:-1].clone()
        counts[-1] += last + 1 - counts.sum()
        share = weights.new_zeros(last + 1).scatter(
            0, slot.flatten(), weights.where(here, 0).flatten())
        rows = self.experts(Dispatch.apply(tokens, source, slot), counts, share)
        results = Leave.apply(SumSlots.apply(rows, source, slot), journey.results)
        return SumSlots.apply(Arrive.apply(results, journey.results), journey.source, journey.slot)


def leaving(indices: Tensor, held: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plan which tokens leave for which rank.

    indices: (N, K), the experts of each token; held: experts on each rank
    Returns
        slot: (N, min(K, ranks)), the places of a token among those that leave, which stand by rank,
            then by token; the number of all where it visits fewer ranks
        source: (N min(K, ranks) + 1,), the token in each place; those past the last have no meaning
        numbers: (ranks, 2), tokens that leave for each rank, and pairs of token and expert

    With two experts on each of two ranks, and the experts [[0, 1], [0, 3], [2, 3]]:
        slot [[0, 4], [1, 2], [3, 4]]   source [0, 1, 1, 2, ..]   numbers [[2, 3], [2, 3]]
    """
    n, k = indices.shape
    to = (indices // held).sort(dim=1).values  # (N, K), ranks
    goes = indices.new_zeros(ranks, n).scatter_(0, to.T, 1)
    pairs = indices.new_zeros(ranks).scatter_add_(0, to.flatten(), torch.ones_like(to).flatten())
    at = (goes.flatten().cumsum(0) - 1).view_as(goes).gather(0, to.T).T  # (N, K)
    again = F.pad(to[:, 1:] == to[:, :-1], (1, 0))  # leaves for this rank already
    slot = at.where(~again, goes.sum()).sort(dim=1).values[:, :min(k, ranks)]
    token = torch.arange(n, device=slot.device).unsqueeze(1).expand_as(slot)
    source = indices.new_zeros(slot.numel() + 1).scatter_(0, slot.flatten(), token.flatten())
    return slot, source, torch.stack([goes.sum(1), pairs], dim=1)


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
