"""A model over many ranks: what this rank holds of it, and what a step of training does with it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist

from minids.config import ModelArgs
from minids.model.objective import Losses, Packed
from minids.model.transformer import Hidden, Transformer
from minids.parallel.gradients import norm, sum_gradients, sum_over_ranks
from minids.parallel.pipeline import LaterEmbedding, Pipeline, Weights, cut
from minids.parallel.ranks import Ranks
from minids.parallel.sharding import (
    empty_model,
    expect,
    held_whole,
    initialise_parts,
    keeps_gathered,
    shard,
)
from minids.parallel.shards import is_sharded, local

SECOND_EMBEDDING = "embed.of_mtp.weight"


class ParallelModel:
    """One model, spread over the ranks of a run.

    parts: what this rank has shards of: a whole model, or one or two stages of a pipeline, all
        under the whole model's names
    """

    def __init__(self, args: ModelArgs, ranks: Ranks, dtype: torch.dtype = torch.float32,
                 prepare: Callable[[Transformer], None] = lambda part: None,
                 products: torch.dtype | None = None, keep: bool | None = None):
        """Build it with the weights that `Transformer(args)` would draw now.

        prepare: does to each part, before it is sharded, what is done to a model from outside
        products, keep: as in `shard`; keep None: as the GPU's memory allows
        """
        ranks.layout.check(args)
        self.args, self.ranks, self.dtype, self.parts = args, ranks, dtype, []
        if keep is None:
            keep = keeps_gathered(args, ranks.layout, ranks.memory)
        self.keep, self.held_whole = keep, []
        for stage in ranks.layout.stages_of(ranks.pipeline_rank):
            part = empty_model(args, dtype)
            if ranks.layout.pipeline > 1:
                cut(part, stage, ranks)
            prepare(part)
            shard(part, ranks, products, keep)
            self.held_whole += held_whole(part)
            self.parts.append(part)
        initialise_parts(self.parts, args)
        self.pipeline = Pipeline(self.parts, ranks) if ranks.layout.pipeline > 1 else None

    @property
    def loss(self) -> Callable[..., Losses]:
        """`Transformer.loss` of this rank's tokens; all ranks call it, and go backward. Of a model
        without a pipeline, as the two below."""
        return self.parts[0].loss

    @property
    def hidden(self) -> Callable[..., Hidden]:
        """`Transformer.hidden` of this rank's tokens; all ranks call it."""
        return self.parts[0].hidden

    @property
    def head(self) -> nn.Module:
        """The head, for what `hidden` has just found."""
        return self.parts[0].head

    @torch.no_grad()
    def whole(self) -> Transformer:
        """Return the model with all weights on this rank, gathered; all ranks call this."""
        model = empty_model(self.args, self.dtype).to_empty(device=self.ranks.device)
        weights = model.state_dict()
        for name, tensor in self.state_dict().items():
            weights[name].copy_(tensor.full_tensor() if is_sharded(tensor) else tensor)
        return model.requires_grad_(False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters by the whole model's names.

        The embedding that a pipeline's last stage has for its MTP modules is `SECOND_EMBEDDING`.
        """
        second = self.pipeline.second_embedding() if self.pipeline else []
        for part in self.parts:
            for name, p in part.named_parameters():
                yield SECOND_EMBEDDING if any(p is other for other in second) else name, p

    def step(self, batches: list[tuple[Tensor, Tensor]], weights: Weights,
             separate: bool = False, begin_id: int = 0) -> Losses:
        """Add up the gradients of this rank's batches; return the losses and loads of all ranks.

        batches: tokens and targets, (B, S) int64 each, of one size on all ranks; a pipeline takes
            one batch, and cuts it into its own micro-batches
        separate: whether documents, which start with begin_id, do not see each other
        Returns the means over all micro-batches and ranks, and the sum of the loads.
        """
        total = 0
        if self.keep:  # a GPU still takes its last step: it gathers then, and nothing waits for it
            for unit in self.parts[0].layers:
                unit.unshard(async_op=True)
        for number, (tokens, targets) in enumerate(batches, start=1):
            samples = (tokens == begin_id).cumsum(1) if separate else None
            if self.pipeline:
                losses = self.pipeline.step(tokens, targets, weights, samples)
            else:
                if self.keep:
                    expect(self.parts[0], last=number == len(batches))
                losses = self.backward(tokens, targets, weights, samples, len(batches))
            flat = torch.cat([torch.stack(losses[:5]).double(), losses.loads.flatten().double()])
            total = total + flat  # counts are exact up to 2^53
        self.join_gradients()
        total = sum_over_ranks(total)
        return Losses(*total[:5], total[5:].to(torch.int64).view_as(losses.loads))

    def backward(self, tokens: Tensor, targets: Tensor, weights: Weights, samples: Tensor | None,
                 parts: int) -> Losses:
        """Add up the gradients of one of `parts` micro-batches; return its share of the losses."""
        packed = None
        if samples is not None:
            packed = Packed(samples, torch.ones_like(samples, dtype=torch.bool))
        losses = self.parts[0].loss(tokens, targets, *weights, packed=packed)
        share = 1 / (self.ranks.layout.data_ranks * parts)
        (losses.total * share).backward()
        return Losses(*(part.detach() * share for part in losses[:5]), losses.loads)

    def join_gradients(self) -> None:
        """Add up over ranks the gradients of what each holds whole, after a step's last backward
        pass; all ranks call this, where they have not called `step`."""
        sum_gradients(self.held_whole, self.ranks)

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return the norm of these parameters' gradient over all ranks, a scalar."""
        twice = self.pipeline.second_embedding() if self.pipeline else []
        if self.ranks.dense.get_local_rank("fsdp"):
            twice = twice + self.held_whole
        return norm(parameters, self.ranks, counted_elsewhere=twice)

    def update_gate_bias(self, loads: Tensor, speed: float) -> None:
        """Move the selection biases; loads: those of the whole model, summed over ranks."""
        for part in self.parts:
            part.update_gate_bias(loads, speed)

    def gate_biases(self) -> list[Tensor]:
        """Return the selection biases of all layers, on every rank; all ranks call this."""
        args = self.args
        layers = sum(map(args.is_moe_layer, range(args.n_layers + args.n_mtp_layers)))
        found = torch.zeros(layers, args.n_routed_experts, device=self.ranks.device)
        for part in self.parts:
            for block in part.blocks():
                if block.is_moe and block.ffn.gate.bias is not None:
                    found[block.layer - args.n_dense_layers] = block.ffn.gate.bias
        dist.all_reduce(found, group=self.ranks.dense.get_group("pipeline"))
        return list(found) if args.gate_bias else []

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of another model that is laid out alike, as `state_dict` returns them.
        """
        for name, tensor in self.state_dict().items():
            local(tensor).copy_(local(tensors[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's weights and gate biases, sharded, by the whole model's names."""
        return {name: tensor for part in self.parts for name, tensor in part.state_dict().items()
                if not (name == "embed.weight" and isinstance(part.embed, LaterEmbedding))}
