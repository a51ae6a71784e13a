"""Expert parallelism: each rank holds some experts of a layer, and the tokens travel to them.

A token leaves for a rank once, however many of its experts are there, with the numbers of all its
experts and their weights. That rank does what a layer with only those experts would do, and sends
back one row per token, already weighed and summed:

    rank 0   a visits experts 0 1      its own   a stays
             b visits experts 0 3      both      b stays, and leaves for rank 1
    rank 1   c visits experts 2 3      its own   c stays
             d visits experts 0 1      rank 0    d leaves for rank 0

DeepEP (V3 section 3.2.2) sends tokens this way too. No token is dropped, whatever the gate chooses.
While tokens are under way, the shared experts' first products are computed, and the last one while
results come back; in the backward pass so are their gradients. The program waits for the device
once in each layer, for the numbers of tokens, when it has given it the first of that work.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from minids.kernels.experts import Dispatch, SumSlots, sum_slots, weighed
from minids.kernels.precision import compute_dtype
from minids.model.moe import ALIGN, Experts, MoE, Routing, sort_by_expert
from minids.model.transformer import Transformer
from minids.parallel.shards import local


@functools.cache
def beside(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream in which a GPU's exchanges begin; None on a CPU.

    They wait for their rows, and not for what the program has begun since.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    """Return a context in which a GPU's work goes to a stream."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Trip:
    """One exchange of rows, and of their gradients the other way.

    sent, received: numbers of rows to and from each rank of `group`; own: this rank's place in it
    Behind the rows of all ranks stands one more: it is not sent, and arrives as zeros. A slot that
    stands for no row points there.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int] = (), received: list[int] = ()):
        self.group, self.sent, self.received = group, sent, received
        self.own = dist.get_rank(group)

    def start(self, rows: Tensor, sent: list[int], received: list[int], ready=None) -> Tensor:
        """Start to send rows, sum(sent) or more; return where others' will be after `finish`, and
        the row of zeros. This rank's own rows stand last, and are copied.

        ready: of a GPU, the event after which the rows are there; None: now
        """
        away, back = ([n * (rank != self.own) for rank, n in enumerate(counts)]
                      for counts in (sent, received))
        gone, come, rows, stream = sum(away), sum(back), rows.contiguous(), beside(rows.device)
        if stream is not None:
            stream.wait_event(ready or torch.cuda.current_stream().record_event())
        with on(stream):
            arriving = rows.new_empty(sum(received) + 1, rows.size(1))
            self.work = dist.all_to_all_single(arriving[:come], rows[:gone], back, away,
                                               self.group, async_op=True)
            arriving[come:-1] = rows[gone:sum(sent)]
            arriving[-1] = 0
            self.copied = stream and stream.record_event()
        if stream is not None:
            arriving.record_stream(torch.cuda.current_stream())
        self.leaving = rows  # kept until they have left
        return arriving

    def finish(self) -> None:
        """Wait until all rows have arrived; on a GPU its stream waits, and not the program."""
        self.work.wait()
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        self.work = self.leaving = self.copied = None

    def gradient_back(self) -> Tensor:
        """Wait for the gradients of rows that were sent, and return them."""
        self.finish()
        gradient, self.gradient = self.gradient, None  # no longer in memory than needed
        return gradient


@dataclass
class Journey:
    """Tokens under way, and the exchanges of one layer.

    A compiler that sees it go from one uncompiled function to the next asks for none of its sizes,
    which are others in every layer and step.

    tokens, numbered, results: the trips of tokens, of the numbers and weights of their experts, and
        of what comes back
    leaving: tokens and numbers, those that leave and then some without meaning
    numbers: of `leaving`, of this rank and then of others, on their way to the program
    ready, counted: on a GPU the events after which `leaving` and `numbers` are there
    slot, source: of the tokens that left, as in `leaving`
    coming: what comes back
    """

    tokens: Trip
    numbered: Trip
    leaving: tuple[Tensor, Tensor]
    numbers: Tensor
    ready: torch.cuda.Event | None
    counted: torch.cuda.Event | None
    slot: Tensor
    source: Tensor
    results: Trip | None = None
    coming: Tensor | None = None


class Depart(torch.autograd.Function):
    """Copy tokens to the places in which they leave. In the backward pass: wait for the gradients
    that others' `Arrive` has sent, and add up each token's. What comes through the graph is none.
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, slot: Tensor, trip: Trip) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.trip = trip
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_slots(ctx.trip.gradient_back(), ctx.saved_tensors[0]), None, None, None


class Await(torch.autograd.Function):
    """In the backward pass, wait for the gradients that others' `Arrive` has sent."""

    @staticmethod
    def forward(ctx, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.gradient_back(), None


class Leave(torch.autograd.Function):
    """Start a trip. In the backward pass gradients are waited for elsewhere: this gives a stand-in.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, trip: Trip, ready=None) -> Tensor:
        ctx.shape = rows.shape
        return trip.start(rows, trip.sent, trip.received, ready)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.new_empty(1, 1).expand(ctx.shape), None, None


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
        if "product" in vars(self):  # in FP8
            x1, x3 = (self.product(x, w, counts) for w in (w1, w3))
        else:  # as one product
            w13 = torch.cat([w.to(compute_dtype(x)) for w in (w1, w3)], dim=1)
            x1, x3 = self.product(x, w13, counts).chunk(2, dim=-1)
        hidden = self.weighed(x1, x3, share)
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
        journey = self.plan(x.flatten(0, 1), numbered, *leaving(
            indices, self.held, self.first // self.held, self.ranks))
        shared = self.shared_experts
        hidden = None if shared is None else F.silu(shared.w1(x)) * shared.w3(x)
        self.work(journey)
        own = None if shared is None else shared.w2(hidden)
        y = self.bring_back(journey).view_as(x)
        return y if shared is None else y + own, routing

    @torch.compiler.disable
    def plan(self, x: Tensor, numbered: Tensor, slot: Tensor, source: Tensor,
             numbers: Tensor) -> Journey:
        """Ask others for their numbers, and copy tokens to the places in which they will leave.

        x: (N, D); numbered: (N, 2 K); slot, source, numbers: of `leaving`
        """
        stream, counted = beside(x.device), None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            numbers.record_stream(stream)
        with on(stream):
            theirs = torch.empty_like(numbers)
            dist.all_to_all_single(theirs, numbers, group=self.group)
            both = torch.stack([numbers, theirs])
            if stream is not None:
                both, counted = both.to("cpu", non_blocking=True), stream.record_event()
        trips = Trip(self.group), Trip(self.group)
        rows = tuple(Depart.apply(some, source, slot, trip) for some, trip
                     in zip((x.to(compute_dtype(x)), numbered), trips, strict=True))
        ready = None if stream is None else torch.cuda.current_stream().record_event()
        return Journey(*trips, rows, both, ready, counted, slot, source)

    @torch.compiler.disable
    def work(self, journey: Journey) -> None:
        """Let tokens leave, run those that arrive through this rank's experts, and let the results
        leave, one row for each token."""
        if journey.counted is not None:
            journey.counted.synchronize()
        sent, received = journey.numbers.tolist()
        pairs = sum(n for _, n in received)
        there = [n for n, _ in sent], [n for n, _ in received]
        arriving = []
        for rows, trip in zip(journey.leaving, (journey.tokens, journey.numbered), strict=True):
            trip.sent, trip.received = there
            arriving.append(Leave.apply(rows, trip, journey.ready))
        journey.leaving, journey.source = None, journey.source[:sum(there[0]) + 1]
        journey.results = Trip(self.group, *there[::-1])
        tokens = Arrive.apply(arriving[0], journey.tokens)  # (N' + 1, D)
        numbers, weights = Arrive.apply(arriving[1], journey.numbered).chunk(2, dim=1)  # (.., K)
        own = numbers.detach().long() - 1 - self.first
        here = (own >= 0) & (own < self.held)
        source, slot, counts = sort_by_expert(own.where(here, self.held), self.held + 1)
        # Slots of other ranks' pairs come last. A few are left, whose rows get the weight 0 and
        # whose results are zeros; the last one stands for all the rest.
        last = min(pairs + self.held * (ALIGN - 1), len(source) - 1)
        source, slot, counts = source[:last + 1], slot.clamp(max=last), counts[:-1].clone()
        counts[-1] += last + 1 - counts.sum()
        share = weights.new_zeros(last + 1).scatter(
            0, slot.flatten(), weights.where(here, 0).flatten())
        rows = self.experts(Dispatch.apply(tokens, source, slot), counts, share)
        results = Await.apply(SumSlots.apply(rows, source, slot), journey.results)
        journey.coming = Leave.apply(results, journey.results)

    @torch.compiler.disable
    def bring_back(self, journey: Journey) -> Tensor:
        """Wait for the results of this rank's tokens and add up each token's: (N, D)"""
        results = Arrive.apply(journey.coming, journey.results)
        return SumSlots.apply(results, journey.source, journey.slot)


def leaving(indices: Tensor, held: int, own: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plan which tokens leave for which rank.

    indices: (N, K), the experts of each token; held: experts on each rank; own: this rank
    Returns
        slot: (N, min(K, ranks)), the places of a token among those that leave, which stand by rank,
            then by token, those for this rank last; the number of all where it visits fewer ranks
        source: (N min(K, ranks) + 1,), the token in each place; those past the last have no meaning
        numbers: (ranks, 2), tokens that leave for each rank, and pairs of token and expert

    On rank 1 of two, with two experts on each, and the experts [[0, 1], [0, 3], [2, 3]]:
        slot [[0, 4], [1, 2], [3, 4]]   source [0, 1, 1, 2, ..]   numbers [[2, 3], [2, 3]]
    """
    n, k = indices.shape
    to = indices // held
    to = (to - (to > own).long()).where(to != own, ranks - 1).sort(dim=1).values  # (N, K)
    goes = indices.new_zeros(ranks, n).scatter_(0, to.T, 1)
    pairs = indices.new_zeros(ranks).scatter_add_(0, to.flatten(), torch.ones_like(to).flatten())
    at = (goes.flatten().cumsum(0) - 1).view_as(goes).gather(0, to.T).T  # (N, K)
    again = F.pad(to[:, 1:] == to[:, :-1], (1, 0))  # leaves for this rank already
    slot = at.where(~again, goes.sum()).sort(dim=1).values[:, :min(k, ranks)]
    token = torch.arange(n, device=slot.device).unsqueeze(1).expand_as(slot)
    source = indices.new_zeros(slot.numel() + 1).scatter_(0, slot.flatten(), token.flatten())
    numbers = torch.stack([goes.sum(1), pairs], dim=1)
    return slot, source, torch.cat([numbers[:own], numbers[-1:], numbers[own:-1]])


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
