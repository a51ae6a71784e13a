"""Validation over ranks: each takes its share of the windows, and all go through equally many.

Ranks wait for each other in every forward pass, so one that has no window left takes part with
another's and counts nothing. The sums are those of one process.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from minids.infer.validation import Evaluation, counted, windows
from minids.parallel.gradients import sum_over_ranks
from minids.parallel.model import ParallelModel


@torch.no_grad()
def evaluate(parallel: ParallelModel, tokens: Tensor, n_bytes: Tensor, seq_len: int,
             batch_size: int, max_tokens: int | None = None,
             begin_id: int | None = None) -> Evaluation:
    """Run the model over validation text; all ranks call this, and return the same.

    The arguments are those of `minids.infer.validation.evaluate`; batch_size: of each rank
    """
    ranks = parallel.ranks
    text = windows(tokens, seq_len, max_tokens)
    batches = dealt(text, batch_size, ranks.layout.data_ranks, ranks.data_rank, ranks.device)
    found = counted(parallel.args, batches, lambda *inputs: forward(parallel, *inputs), n_bytes,
                    begin_id, sum_over_ranks)
    for part in parallel.parts:  # what the last passes have gathered
        for unit in part.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
    return found


def dealt(text: Tensor, batch_size: int, ranks: int, rank: int,
          device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Yield batches of a rank's share of windows (n, S + 1), and how many rows of each count.

    batch_size: per rank. A batch has the same number of rows on all ranks; rows beyond those that
        count are filler.
    """
    for part in text.split(batch_size * ranks):
        own = part[rank::ranks]
        yield torch.cat([own, part[:1]])[:-(-len(part) // ranks)].to(device), len(own)


def forward(parallel: ParallelModel, inputs: Tensor, samples: Tensor | None) -> tuple:
    """Run a batch through all stages, each on its rank.

    inputs, samples: (B, S) int64
    Returns what `counted` wants of its `run`.
    """
    layout, head, found = parallel.ranks.layout, None, []
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
        found += zip(rows, routings, strict=True)
        if not isinstance(part.head, nn.Identity):
            head = part.head
        elif holder[stage + 1] != parallel.ranks.pipeline_rank:
            dist.send(states.contiguous(), group=group, group_dst=holder[stage + 1])
    return head, states, found
