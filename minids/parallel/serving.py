"""A model that several ranks use together: layers and routed experts spread over them.

    pipeline          a rank has some of the layers; hidden states go from each rank to the next,
                      and from the last one back to all
    expert_parallel   a rank has some of each layer's routed experts; all of these ranks read all
                      tokens, each adds up what its own experts say, and one sum over the ranks
                      (an all-reduce) gives every rank the whole

Every rank has embedding, norm and head, so it is the hidden states that travel, 14 KB per token in
V3, and never the logits, of which V3 has 517 KB. All ranks run the same program on the same tokens,
and draw what rank 0 draws (`FirstRanksSampler`): they cannot part. Each has a cache for its own
layers only.

Simplified: attention and shared experts are computed by each rank that shares a layer's experts,
and one stage of a pipeline works at a time. For the few tokens of a decoding step that costs
nothing, since reading weights is what takes the time; long prompts would gain from the exchange of
tokens and from the schedules that training has (`minids.parallel.experts`, `pipeline`).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist

from minids.infer.sampling import Sampler
from minids.infer.validation import Evaluation, counted, windows
from minids.kernels.precision import compute_dtype, wide
from minids.model.cache import LatentCache
from minids.model.moe import MoE, combine
from minids.model.mtp import MTPModule
from minids.model.transformer import Block, Hidden, Transformer
from minids.parallel.gradients import sum_over_ranks
from minids.parallel.ranks import Ranks
from minids.parallel.validation import dealt


def from_rank(tensor: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return what one rank of a group has as `tensor`, on all of them; rank: within the group."""
    tensor = tensor.contiguous()
    dist.broadcast(tensor, group=group, group_src=rank)
    return tensor


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the rows that all ranks of a group have, those of the first one first."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


class FirstRanksSampler(Sampler):
    """Draws on every rank what rank 0 draws: a rounding in a GPU's sums cannot part the ranks."""

    def sample(self, logits: Tensor) -> Tensor:
        drawn = super().sample(logits)
        return from_rank(drawn, 0) if self.greedy else drawn  # others come through `draw`

    def draw(self, probs: Tensor) -> Tensor:
        return from_rank(super().draw(probs), 0)

    def verify(self, drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(from_rank(torch.stack(super().verify(drafts, q, p)), 0).unbind())


class SpreadMoE(MoE):
    """A MoE layer of whose routed experts this rank has some.

    first, held: number of the first one, and how many; group: the ranks that share the experts
    apart: whether these ranks read different tokens, equally many
    """

    first: int
    held: int
    group: dist.ProcessGroup
    apart: bool = False

    def routed(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Send each token (N, D) to its experts (N, K), and add up what comes back: (N, D)"""
        ranks, tokens, indices = dist.get_world_size(self.group), len(x), indices.contiguous()
        if self.apart:
            x, weights, indices = (gathered(t, self.group) for t in (x, weights, indices))
        else:
            indices = from_rank(indices, 0, self.group)
        out = self.own_share(x, weights, indices)
        dist.all_reduce(out, group=self.group)
        if self.apart:
            out = out.view(ranks, tokens, -1)[dist.get_rank(self.group)]
        return out.to(compute_dtype(x))

    def own_share(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Add up what this rank's experts make of each token: (N, D) FP32 or wider"""
        k, own = indices.size(1), indices.flatten() - self.first  # (N*K,), numbers here
        own = torch.where((own >= 0) & (own < self.held), own, self.held)  # others' come last
        counts = torch.bincount(own, minlength=self.held + 1)[:self.held]
        total = int(counts.sum())
        if not total:
            return torch.zeros(x.shape, dtype=wide(x), device=x.device)
        order = own.argsort(stable=True)[:total]  # pairs of this rank's experts, by expert
        rows = self.experts(x[order // k], counts)  # (total, D)
        slot = torch.full_like(own, total)  # of a pair of other ranks: a row of zeros
        slot[order] = torch.arange(total, device=slot.device)
        rows = torch.cat([rows, rows.new_zeros(1, rows.size(1))])
        return combine(rows, slot.view(-1, k), weights.to(rows.dtype)).to(wide(x))


class LastRanksModule(MTPModule):
    """An MTP module that the pipeline's last rank has: it runs there, and all get its states.

    On the other ranks it has no parts. pipe: the ranks of the pipeline
    """

    pipe: dist.ProcessGroup

    def forward(self, hidden: Tensor, embedding: Tensor, context) -> tuple:
        """As `MTPModule.forward`; what the block found stays behind."""
        states = torch.empty(hidden.shape, dtype=compute_dtype(hidden), device=hidden.device)
        if hasattr(self, "block"):
            states = super().forward(hidden, embedding, context)[0]
        return from_rank(states, dist.get_world_size(self.pipe) - 1, self.pipe), None, None


class SpreadModel(Transformer):
    """This rank's part of a model; its methods are called by all ranks, on the same tokens.

    ranks: that share it; pipe: those among them that share the layers
    sampler: of its tokens; eager: no decoding step becomes a CUDA graph
    """

    sampler, eager = FirstRanksSampler, True
    ranks: Ranks
    pipe: dist.ProcessGroup

    def hidden(self, tokens: Tensor, cache: LatentCache | None = None, absorbed: bool = False,
               indexer_stage: str = "", samples: Tensor | None = None,
               routes: dict[int, Tensor] | None = None) -> Hidden:
        """As `Transformer.hidden`: the states on every rank, the routings of its own layers."""
        context = self.context(tokens, cache, absorbed, indexer_stage, samples, routes)
        rank, last = self.ranks.pipeline_rank, self.ranks.layout.pipeline - 1
        x, routings = self.embed(tokens), []  # (B, S, D)
        if rank > 0:
            dist.recv(x, group=self.pipe, group_src=rank - 1)
        for layer in self.layers:
            x, routing, _ = layer(x, context)
            routings += [routing] if routing is not None else []
        if rank < last:
            dist.send(x.contiguous(), group=self.pipe, group_dst=rank + 1)
        if cache is not None:
            cache.advance(tokens.size(1))
        x = from_rank(x, last, self.pipe) if last else x
        return Hidden(self.norm(x), routings, [])

    def blocks(self) -> list[Block]:
        """Return the blocks that this rank has, in the order of the whole model's."""
        return [*self.layers, *(m.block for m in self.mtp if hasattr(m, "block"))]


def part_of(model: Transformer, ranks: Ranks) -> int:
    """Make this rank's part of a whole model on the meta device, in place.

    Returns the number of its first expert.
    """
    layout, args = ranks.layout, model.args
    layout.check(args)
    model.__class__, model.ranks = SpreadModel, ranks
    model.pipe = ranks.dense.get_group("pipeline")
    keep = layout.layers_of(ranks.pipeline_rank, args)
    for layer in range(args.n_layers):
        if layer not in keep:
            del model.layers._modules[str(layer)]  # a list would give the others new numbers
    for module in model.mtp if layout.pipeline > 1 else ():
        module.__class__, module.pipe = LastRanksModule, model.pipe
        if ranks.pipeline_rank < layout.pipeline - 1:
            module._modules.clear()
    held = args.n_routed_experts // layout.expert_parallel
    first = held * ranks.sparse.get_local_rank("expert")
    for block in model.blocks() if layout.expert_parallel > 1 else ():
        if block.is_moe:
            moe, experts = block.ffn, block.ffn.experts
            for name, whole in list(experts.named_parameters()):
                setattr(experts, name, nn.Parameter(whole[:held].clone(), requires_grad=False))
            moe.__class__, moe.first, moe.held = SpreadMoE, first, held
            moe.group = ranks.sparse.get_group("expert")
    return first


@contextlib.contextmanager
def reading_apart(model: SpreadModel) -> Iterator[None]:
    """Let the ranks that share the experts read different tokens, in batches of one shape."""
    spread = [module for module in model.modules() if isinstance(module, SpreadMoE)]
    for moe in spread:
        moe.apart = True
    try:
        yield
    finally:
        for moe in spread:
            moe.apart = False


@torch.no_grad()
def evaluate(model: SpreadModel, tokens: Tensor, n_bytes: Tensor, seq_len: int, batch_size: int,
             max_tokens: int | None = None, begin_id: int | None = None) -> Evaluation:
    """Run the model over validation text; all ranks call this, and return the same.

    The arguments are those of `minids.infer.validation.evaluate`; batch_size: of each rank. Ranks
    that share the experts take turns at the windows; one that has no window left goes through
    another's and counts nothing. The pipeline's last rank counts.
    """
    args, ranks = model.args, model.ranks
    held = [block.layer - args.n_dense_layers for block in model.layers if block.is_moe]
    last = ranks.pipeline_rank == ranks.layout.pipeline - 1
    text = windows(tokens, seq_len, max_tokens)
    batches = dealt(text, batch_size, ranks.layout.expert_parallel,
                    ranks.sparse.get_local_rank("expert"), model.head.weight.device)

    def run(inputs: Tensor, samples: Tensor | None) -> tuple:
        with reading_apart(model):
            states, routings, _ = model.hidden(inputs, samples=samples)
        return model.head if last else None, states, zip(held, routings, strict=True)

    return counted(args, batches, run, n_bytes, begin_id, sum_over_ranks)
