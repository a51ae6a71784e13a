"""A model cut into stages, and the schedules that keep its ranks busy.

A stage is the model without the parts of the others, under the same names. What it hands on are
the hidden states and the balance loss so far, so that the last stage has the whole loss. The last
one has the MTP modules (V3 section 3.2.3), and an embedding of its own for them: equal at first,
and equal ever after, since both add up their gradients before a step.

The schedules are torch's (`torch.distributed.pipelining`). 1F1B takes one forward and one backward
pass in turn (arXiv 1806.03377), Interleaved1F1B gives each rank two stages (arXiv 2104.04473);
ZBVZeroBubble (arXiv 2401.10241) and DualPipeV, V3's own in V form, place the first and the last
stage on one rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from minids.model.moe import BALANCE_LOSSES, update_bias
from minids.model.objective import Losses, Packed
from minids.model.transformer import Hidden, Transformer
from minids.parallel.ranks import Ranks
from minids.parallel.shards import local


class LaterEmbedding(nn.Embedding):
    """The embedding of a stage after the first: the MTP modules embed tokens, states pass."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S) int64 -> (B, S, D), or (B, S, D) as it is"""
        return x if x.is_floating_point() else super().forward(x)


class Weights(NamedTuple):
    """The settings of the loss, as in `minids.model.objective`."""

    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    balance_loss: str = "sequence"
    dsa: str = ""
    indexer_weight: float = 1.0


class Stage(Transformer):
    """One stage: layers, before them the embedding if it is the first, norm, head and MTP modules
    after them if it is the last.

    device: of its inputs; dtype, wide: types of hidden states and of losses
    weights: of the loss's parts; share: what a micro-batch's loss counts in the step's
    parts: sums of the parts of the loss over micro-batches, in the last stage
    loads: (n MoE layers of the whole model, E) int64, sums over micro-batches; others' rows are 0
    """

    device: torch.device
    dtype: torch.dtype
    wide: torch.dtype
    weights: Weights
    share: float
    parts: Tensor
    loads: Tensor

    def forward(self, x: Tensor, balance: Tensor | None = None, *, targets: Tensor | None = None,
                samples: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor] | Hidden:
        """Run the stage on a micro-batch.

        x: (B, S) int64, the tokens, in the first stage; else (B, S, D)
        balance: the balance losses of the stages before; targets, samples: (B, S) int64
        Returns x and balance for the next stage, or the loss, weighed by `share`; without targets
        what `hidden` finds, for validation.
        """
        if targets is None:
            return self.hidden(x, samples=samples)
        if balance is None:
            balance = torch.zeros((), dtype=self.wide, device=x.device)
        if isinstance(self.head, nn.Identity):
            hidden = self.hidden(x, samples=samples)
            for routing, row in zip(hidden.routings, self.rows(), strict=True):
                balance = balance + BALANCE_LOSSES[self.weights.balance_loss](routing, self.args)
                self.loads[row] += routing.load()
            return hidden.states, balance
        packed = None
        if samples is not None:
            packed = Packed(samples, torch.ones_like(samples, dtype=torch.bool))
        losses = self.loss(x, targets, *self.weights, packed=packed)
        losses = losses._replace(balance=losses.balance + balance,
                                 total=losses.total + self.weights.balance_weight * balance)
        for row, load in zip(self.rows(), losses.loads, strict=False):  # without idle MTP modules
            self.loads[row] += load
        self.parts += self.share * torch.stack([part.detach() for part in losses[:5]])
        return losses.total * self.share

    def begin(self, weights: Weights, share: float) -> None:
        """Prepare a step: forget what the last one counted."""
        device, args = self.device, self.args
        count = sum(map(args.is_moe_layer, range(args.n_layers + args.n_mtp_layers)))
        self.weights, self.share = weights, share
        self.parts = torch.zeros(5, dtype=self.wide, device=device)
        self.loads = torch.zeros(count, args.n_routed_experts, dtype=torch.int64, device=device)

    def rows(self) -> list[int]:
        """Return which rows of the model's loads are those of this stage's layers."""
        return [b.layer - self.args.n_dense_layers for b in self.blocks() if b.is_moe]

    def update_gate_bias(self, loads: Tensor, speed: float) -> None:
        """Move this stage's gate biases; loads: those of the whole model, summed over ranks."""
        for bias, row in zip(self.gate_biases(), self.rows(), strict=True):
            if row < len(loads):
                update_bias(bias, loads[row], speed)


def cut(model: Transformer, stage: int, ranks: Ranks) -> None:
    """Make a stage of a whole model, in place: drop the parts of the others."""
    layout, last = ranks.layout, stage == ranks.layout.n_stages - 1
    model.device, model.dtype = ranks.device, model.embed.weight.dtype
    model.wide = torch.promote_types(model.dtype, torch.float32)
    keep = layout.layers_of(stage, model.args)
    for layer in range(model.args.n_layers):
        if layer not in keep:
            del model.layers._modules[str(layer)]  # a list would give the others new numbers
    if not last:
        model.norm, model.head, model.mtp = nn.Identity(), nn.Identity(), nn.ModuleList()
    if stage > 0:
        if last and len(model.mtp):
            model.embed.__class__ = LaterEmbedding
        else:
            model.embed = nn.Identity()
    model.__class__ = Stage


class Pipeline:
    """The stages of one rank, and a step through all ranks' stages."""

    def __init__(self, stages: list[Stage], ranks: Ranks):
        self.stages, self.ranks = stages, ranks
        self.schedules = {}
        layout, mesh = ranks.layout, ranks.dense
        self.numbers = layout.stages_of(ranks.pipeline_rank)
        self.ends = None  # the group of the two ranks that hold embeddings, if this is one
        own = mesh.mesh.movedim(0, -1).flatten(0, 1)  # (data ranks, pipeline): ranks by number
        ends = 0, next(r for r in range(layout.pipeline)
                       if layout.n_stages - 1 in layout.stages_of(r))
        for column in own.tolist() if ends[0] != ends[1] else ():
            group = dist.new_group(sorted({column[end] for end in ends}))  # all ranks make each
            if dist.get_rank() in (column[end] for end in ends):
                self.ends = group

    def schedule(self, rows: int, seq_len: int):
        """Return the schedule for micro-batches of this shape; shapes are fixed when it is made."""
        if (rows, seq_len) not in self.schedules:
            layout, device = self.ranks.layout, self.ranks.device
            stages = []
            for number, module in zip(self.numbers, self.stages, strict=True):
                shaped = dict(device="meta", requires_grad=True)
                states = torch.empty(rows, seq_len, module.args.dim, dtype=module.dtype,
                                     **shaped)
                balance = torch.empty((), dtype=module.wide, **shaped)
                tokens = torch.empty(rows, seq_len, dtype=torch.int64, device="meta")
                last = number == layout.n_stages - 1
                stages.append(PipelineStage(
                    module, number, layout.n_stages, device,
                    input_args=(states, balance) if number else (tokens,),
                    output_args=(balance,) if last else (states, balance),
                    group=self.ranks.dense.get_group("pipeline")))
            kind = get_schedule_class(layout.schedule)
            single = issubclass(kind, PipelineScheduleSingle)
            self.schedules[rows, seq_len] = kind(
                stages[0] if single else stages, layout.micro_batches, scale_grads=False,
                loss_fn=lambda loss, target: loss)
        return self.schedules[rows, seq_len]

    def step(self, tokens: Tensor, targets: Tensor, weights: Weights,
             samples: Tensor | None = None) -> Losses:
        """Add up the gradients of a batch; return this rank's share of losses and loads.

        tokens, targets, samples: (B, S) int64, those of this data rank, B a multiple of the
            micro-batches; every stage gets all three
        """
        layout = self.ranks.layout
        for stage in self.stages:
            stage.begin(weights, 1 / (layout.micro_batches * layout.data_ranks))
        inputs = (tokens,) if 0 in self.numbers else ()
        named = dict(targets=targets) | ({} if samples is None else dict(samples=samples))
        schedule = self.schedule(len(tokens) // layout.micro_batches, tokens.size(1))
        schedule.step(*inputs, target=targets, return_outputs=False, **named)
        self.join_embeddings()
        parts = sum(stage.parts for stage in self.stages)
        return Losses(*parts, sum(stage.loads for stage in self.stages))

    def join_embeddings(self) -> None:
        """Add up the gradients of the two embeddings: the first stage's and the MTP modules'."""
        if not self.stages[0].args.n_mtp_layers:
            return
        held = [stage.embed.weight for stage in self.stages if hasattr(stage.embed, "weight")]
        for weight in held:
            if weight.grad is None:  # of MTP modules that were left out
                weight.grad = torch.zeros_like(weight)
        if self.ends is not None:
            [weight] = held
            dist.all_reduce(local(weight.grad), group=self.ends)
        elif held:
            first, second = (local(weight.grad) for weight in held)
            second += first
            first.copy_(second)

    def second_embedding(self) -> list[nn.Parameter]:
        """Return the MTP modules' embedding, if this rank has it: its gradient counts once."""
        return [stage.embed.weight for stage in self.stages
                if isinstance(stage.embed, LaterEmbedding)]
