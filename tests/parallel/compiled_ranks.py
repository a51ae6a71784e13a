"""What two ranks with compiled blocks go through; started by test_compiled_ranks.py.

Blocks are traced, and cut at the exchange. The compiler's back end, which takes minutes, is left
out here; a slow test of `train` over ranks has it.
"""

from dataclasses import replace
from functools import partial

import torch
from comparing import ARGS, WEIGHTS, batch, compare_step, one_process, ranks_of, share, spread
from launching import run_checks

from minids.apply.compile import compile_blocks
from minids.apply.recompute import recompute_blocks

SHORT = replace(ARGS, n_layers=2)
GRAPHS = []  # all that were made


def backend(graph, inputs):
    """Keep the graph, and run it as it is."""
    GRAPHS.append(graph)
    return graph


def compiled(part, recompute: str = "none"):
    """Compile a part's blocks; fail where the compiler does."""
    recompute_blocks(part, recompute)
    compile_blocks(part, torch.float64)
    for unit in [*part.layers, *part.mtp]:
        unit.forward.__func__.failure = ()  # which no error is


def check_fsdp():
    compare_step(ranks_of(), args=SHORT, prepare=compiled)
    assert len(GRAPHS) >= 3, "a dense block, one with experts, one of an MTP module"


def check_experts_and_recompute():
    compare_step(ranks_of(expert_parallel=2), args=SHORT, parts=2,
                 prepare=lambda part: compiled(part, "blocks"))


def check_other_numbers_of_tokens_under_way_make_no_graph_anew():
    parallel, made = spread(ranks_of(expert_parallel=2), one_process(SHORT)[0],
                            prepare=compiled), []
    for step in range(4):
        parallel.step(share(parallel.ranks, batch(step)), WEIGHTS)
        made.append(len(GRAPHS))
    assert made[1] == made[3] > 0, made


if __name__ == "__main__":
    torch.compile = partial(torch.compile, backend=backend)
    run_checks(dict(globals()))
