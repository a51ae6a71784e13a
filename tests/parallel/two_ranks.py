"""What two ranks go through; started by test_two_ranks.py."""

from pathlib import Path
from types import SimpleNamespace

import learning
import torch
from comparing import (
    ARGS,
    DEVICE,
    WEIGHTS,
    batch,
    compare_step,
    compare_validation,
    difference,
    hand_over,
    largest,
    one_process,
    ranks_of,
    share,
    spread,
    train_in_parallel,
    worst_gradient,
)
from launching import run_checks
from torch.distributed.fsdp import FSDPModule

from minids import Transformer
from minids.apply.recompute import recompute_blocks
from minids.kernels.experts import trains_on_gpu
from minids.parallel.model import ParallelModel


def check_initial_weights_are_one_process_to_the_bit():
    for fields in ({}, dict(replicate=2), dict(expert_parallel=2), dict(pipeline=2),
                   dict(pipeline=2, schedule="Interleaved1F1B")):
        torch.manual_seed(3)
        wanted = Transformer(ARGS)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        parallel = ParallelModel(ARGS, ranks_of(**fields))
        assert torch.equal(torch.get_rng_state(), after)
        for part in parallel.parts:
            for name, tensor in part.state_dict().items():
                assert difference(tensor, wanted.state_dict()[name]) == 0.0, (name, fields)


def check_fsdp():
    compare_step(ranks_of())


def check_fsdp_in_micro_batches():
    compare_step(ranks_of(), parts=2)


def check_replicas():
    compare_step(ranks_of(replicate=2))


def check_experts():
    compare_step(ranks_of(expert_parallel=2))


def check_experts_and_recompute():
    compare_step(ranks_of(expert_parallel=2), parts=2, prepare=recompute_blocks)


def check_no_body_reads_past_the_experts():
    """On a GPU a body of `MoE.routed` takes whole weights, which no rank has."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    for fields in ({}, dict(expert_parallel=2)):
        [part] = spread(ranks_of(**fields), one_process()[0]).parts
        for block in part.blocks():
            assert not block.is_moe or not trains_on_gpu(block.ffn, on_gpu, None, None)


def check_all_tokens_to_one_rank():
    """The other rank's experts get nothing: gradients of zero, and nobody waits for ever."""
    model = Transformer(ARGS).double().to(DEVICE)
    model.load_state_dict(one_process()[0].state_dict())
    for bias in model.gate_biases():
        bias[4:] -= 100.0
    model.loss(*batch(), *WEIGHTS).total.backward()
    ranks = ranks_of(expert_parallel=2)
    parallel = spread(ranks, model)
    losses = parallel.step(share(ranks, batch()), WEIGHTS)
    assert losses.loads[:, 4:].sum() == 0 and losses.loads.sum() > 0
    error, name = worst_gradient(parallel, model)
    assert error < 1e-12, (error, name)


def check_pipeline():
    compare_step(ranks_of(pipeline=2))


def check_pipeline_of_two_stages_each():
    compare_step(ranks_of(pipeline=2, schedule="Interleaved1F1B"))


def check_validation():
    for fields in (dict(expert_parallel=2), dict(pipeline=2, schedule="Interleaved1F1B")):
        compare_validation(ranks_of(**fields))


def check_parts_that_another_layout_reads():
    hand_over(ranks_of(expert_parallel=2), [ranks_of(pipeline=2), ranks_of()], Path.cwd())


def check_adamw():
    train_in_parallel(ranks_of(expert_parallel=2), "adamw")


def check_muon():
    train_in_parallel(ranks_of(), "muon")


def check_averages_are_wrong():
    """FSDP's own divisors: by its group's ranks, which are fewer where experts are shared."""
    model, _ = one_process()
    ranks = ranks_of(expert_parallel=2)
    parallel = spread(ranks, model)
    for unit in parallel.parts[0].modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(None)
            unit.set_force_sum_reduction_for_comms(False)
    parallel.step(share(ranks, batch()), WEIGHTS)
    assert largest(worst_gradient(parallel, model)[0]) > 0.1


def check_one_ranks_loads_are_wrong():
    """Biases that follow one rank's tokens part from those of one process."""
    _, wanted = one_process()
    ranks = ranks_of()
    [(tokens, targets)] = share(ranks, batch())
    own = one_process()[0].loss(tokens, targets, *WEIGHTS).loads
    moves = [torch.sign(loads.double().mean(-1, keepdim=True) - loads)
             for loads in (own * 2, wanted.loads)]
    assert largest((moves[0] - moves[1]).abs().max().item()) > 0


def check_the_batchs_balance_loss_is_wrong():
    """V2's balance loss is no mean over ranks, which is why it is refused."""
    model, _ = one_process()
    weights = WEIGHTS._replace(balance_loss="expert")
    ranks = ranks_of()
    parallel = spread(ranks, model)
    found = parallel.step(share(ranks, batch()), weights).balance
    assert abs(found / model.loss(*batch(), *weights).balance - 1) > 1e-3


if __name__ == "__main__":
    run_checks(dict(globals()) | (vars(learning) if DEVICE.type == "cpu" else {}))
