"""Validation over ranks: each takes its share of the windows, and all go through equally many.

Ranks wait for each other in every forward pass, so one that has no window left takes part with
another's and counts nothing. The sums are those of one process.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from minids.infer.validation import Evaluation, windows
from minids.parallel.gradients import sum_over_ranks
from minids.parallel.model import ParallelModel


@torch.no_grad()
def evaluate(parallel: ParallelModel, tokens: Tensor, n_bytes: Tensor, seq_len: int,
             batch_size: int, max_tokens: int | None = None,
             begin_id: int | None = None) -> Evaluation:
    """Run the model over validation text; all ranks call this, and return the same.

    The arguments are those of `minids.infer.validation.evaluate`; batch_size: of each rank
    """
    layout, args = parallel.ranks.layout, parallel.args
    text = windows(tokens, seq_len, max_tokens)
    own = text[parallel.ranks.data_rank::layout.data_ranks]
    layers = sum(map(args.is_moe_layer, range(args.n_layers)))
    loads = torch.zeros(layers, args.n_routed_experts, dtype=torch.int64,
                        device=parallel.ranks.device)
    nats, size = 0.0, 0
    for start in range(0, -(-len(text) // layout.data_ranks), batch_size):
        batch = own[start:start + batch_size]
        counts = len(batch) > 0
        batch = (batch if counts else text[:1]).to(parallel.ranks.device)
        inputs, targets = batch[:, :-1], batch[:, 1:]
        samples = None if begin_id is None else (inputs == begin_id).cumsum(1)
        logits, found = forward(parallel, inputs, samples)
        if counts:
            for row, load in found:
                loads[row] += load
            if logits is not None:
                nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                        reduction="sum").item()
                size += int(n_bytes[targets.cpu()].sum())
    for part in parallel.parts:  # what the last passes have gathered
        for unit in part.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
    nats, size = sum_over_ranks(torch.tensor([nats, size], dtype=torch.float64)).tolist()
    return Evaluation(nats / math.log(2) / size, sum_over_ranks(loads).cpu())


def forward(parallel: ParallelModel, inputs: Tensor,
            samples: Tensor | None) -> tuple[Tensor | None, list[tuple[int, Tensor]]]:
    """Run a batch through all stages, each on its rank.

    inputs, samples: (B, S) int64
    Returns the logits on the rank that has the head, None elsewhere; and for each MoE layer of this
    rank its row among all layers' loads, and its load.
    """
    layout, logits, found = parallel.ranks.layout, None, []
    held = layout.stages_of(parallel.ranks.pipeline_rank)
    holder = {stage: rank for rank in range(layout.pipeline) for stage in layout.stages_of(rank)}
    group, states = parallel.ranks.dense.get_group("pipeline"), None
    for stage, part in zip(held, parallel.parts, strict=True):
        x = inputs
        if stage > 0:
            x = states
            if holder[stage - 1] != parallel.ranks.pipeline_rank:
                x = torch.empty(*inputs.shape, parallel.args.dim, dtype=parallel.dtype,
                                device=inputs.device)
                dist.recv(x, group=group, group_src=holder[stage - 1])
        run = part.hidden if layout.pipeline == 1 else part
        states, routings, _ = run(x, samples=samples)
        layers = [block.layer for block in part.layers if block.is_moe]
        rows = [layer - parallel.args.n_dense_layers for layer in layers]
        found += [(row, routing.load()) for row, routing in zip(rows, routings, strict=True)]
        if not isinstance(part.head, nn.Identity):
            logits = part.head(states).float()
        elif holder[stage + 1] != parallel.ranks.pipeline_rank:
            dist.send(states.contiguous(), group=group, group_dst=holder[stage + 1])
    return logits, found
