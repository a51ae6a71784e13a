"""What two ranks go through; started by test_two_ranks.py."""

import math
from dataclasses import replace
from pathlib import Path

import learning
import torch
from comparing import (
    ARGS,
    CLOSE,
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
    worst_weight,
)
from launching import run_checks
from small_models import scrambled
from torch.distributed.fsdp import FSDPModule

from minids import Transformer
from minids.apply.fp8 import use_fp8
from minids.apply.recompute import recompute_blocks
from minids.model import initial
from minids.parallel import experts, sharding
from minids.parallel import model as parallel_model
from minids.parallel.model import ParallelModel
from minids.parallel.shards import local
from minids.runs.optimizers import build_optimizers
from minids.runs.settings import TrainArgs


def check_initial_weights_are_one_process_to_the_bit():
    """A small model's weights are drawn one after the other, a large one's in blocks."""
    usual, interleaved = initial.LARGE, dict(pipeline=2, schedule="Interleaved1F1B")
    for initial.LARGE, layouts in ((usual, ({}, dict(replicate=2), dict(pipeline=2))),
                                   (0, ({}, dict(expert_parallel=2), interleaved))):
        torch.manual_seed(3)
        wanted = Transformer(ARGS).state_dict()
        after = torch.get_rng_state()
        for fields in layouts:
            torch.manual_seed(3)
            parallel = ParallelModel(ARGS, ranks_of(**fields))
            assert torch.equal(torch.get_rng_state(), after)
            for part in parallel.parts:
                for name, tensor in part.state_dict().items():
                    assert difference(tensor, wanted[name]) == 0.0, (name, fields)
    initial.LARGE = usual


def check_fsdp():
    compare_step(ranks_of())


def check_fsdp_in_micro_batches():
    compare_step(ranks_of(), parts=2)


def check_gathered_once_a_step():
    for fields in (dict(replicate=2), dict(expert_parallel=2)):
        compare_step(ranks_of(**fields), parts=2, keep=True)


def check_gathered_anew_in_every_step():
    train_in_parallel(ranks_of(), "adamw", keep=True)
    compare_validation(ranks_of(), keep=True)


def in_bf16(products: torch.dtype | None) -> list[torch.Tensor]:
    """This rank's gradients where products are in BF16, and matrices travel in that precision."""
    parallel = spread(ranks_of(), scrambled(ARGS, dtype=torch.float32).to(DEVICE),
                      products=products)
    with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False):
        parallel.step(share(parallel.ranks, batch(), parts=2), WEIGHTS)
    return [local(p.grad) for _, p in parallel.named_parameters()]


def check_matrices_travel_in_bf16_and_change_no_bit():
    wanted = in_bf16(None)
    assert all(map(torch.equal, in_bf16(torch.bfloat16), wanted))


def check_gates_that_travel_in_bf16_are_wrong():
    wanted, usual = in_bf16(None), sharding.held_whole
    norms = lambda model: [p for p in usual(model) if p.ndim == 1]  # noqa: E731
    sharding.held_whole = parallel_model.held_whole = norms
    try:
        assert not all(map(torch.equal, in_bf16(torch.bfloat16), wanted))
    finally:
        sharding.held_whole = parallel_model.held_whole = usual


def check_replicas():
    compare_step(ranks_of(replicate=2))


def check_experts():
    compare_step(ranks_of(expert_parallel=2))


def check_experts_and_recompute():
    compare_step(ranks_of(expert_parallel=2), parts=2, prepare=recompute_blocks)


def gradients(trip: type, recompute: str = "none") -> list[torch.Tensor]:
    """This rank's gradients, with experts on both ranks and exchanges of this kind."""
    usual, experts.Trip = experts.Trip, trip
    try:
        parallel = spread(ranks_of(expert_parallel=2), one_process()[0],
                          prepare=lambda part: recompute_blocks(part, recompute))
        parallel.step(share(parallel.ranks, batch(), parts=2), WEIGHTS)
    finally:
        experts.Trip = usual
    return [local(p.grad) for _, p in parallel.named_parameters()]


class AtOnce(experts.Trip):
    """Nothing else is done while rows are under way."""

    def start(self, *rows):
        arrived = super().start(*rows)
        super().finish()
        return arrived

    def finish(self):
        pass


class AtTheLastMoment(experts.Trip):
    """Rows arrive when they are waited for, and nothing that is read before is a number."""

    def start(self, rows, sent, received, ready=None):
        self.message = rows, sent, received
        self.arriving = rows.new_full((sum(received) + 1, rows.size(1)), math.nan)
        return self.arriving

    def finish(self):
        arrived = super().start(*self.message)
        super().finish()
        self.arriving.copy_(arrived)


class Never(AtTheLastMoment):
    """Wrong: the rows are read before they have arrived."""

    def finish(self):
        pass


def check_what_is_done_meanwhile_changes_no_bit():
    """Nor does recomputation: one result stands for both."""
    wanted = gradients(AtOnce)
    for recompute, trip in (("none", AtTheLastMoment), ("blocks", AtTheLastMoment),
                            ("blocks", experts.Trip)):
        assert all(map(torch.equal, gradients(trip, recompute), wanted)), (trip, recompute)
    assert not all(grad.isfinite().all() for grad in gradients(Never))


def check_a_row_that_stands_for_none_and_is_not_zero_is_wrong():
    class Ones(experts.Trip):
        def start(self, *rows):
            arriving = super().start(*rows)
            arriving[-1] = 1
            return arriving

    wanted = gradients(AtOnce)
    assert largest(max((a - b).abs().max().item()
                       for a, b in zip(gradients(Ones), wanted, strict=True))) > 1e-3


def check_fp8():
    """One process that takes the ranks' rows in turn rounds the same numbers, and so do they.

    Where ranks share experts, other tokens have their gradients' scales in common: rounding moves
    what those three products give, and nothing else by more.
    """
    args = replace(ARGS, dim=128, inter_dim=128, moe_inter_dim=128, n_layers=2, kv_lora_rank=128)
    plain, model = scrambled(args).to(DEVICE), scrambled(args).to(DEVICE)
    use_fp8(model)
    options = TrainArgs(fp8=True, lr=0.02)
    own = build_optimizers(model, options, torch.float64)
    for one in (plain, model):
        for rows in (slice(0, 4), slice(4, 8)):
            (one.loss(*(t[rows] for t in batch()), *WEIGHTS).total / 2).backward()
    found = {}
    for fields in ({}, dict(expert_parallel=2)):
        parallel = spread(ranks_of(**fields), model, prepare=use_fp8)
        optimizers = build_optimizers(parallel, options, torch.float64)
        parallel.step(share(parallel.ranks, batch()), WEIGHTS)
        found[len(fields)] = largest(worst_gradient(parallel, model)[0])
        if not fields:
            rounding = largest(worst_gradient(parallel, plain)[0])
            optimizers[0].step()
            [moment] = {state["exp_avg"].dtype for state in optimizers[0].state.values()}
            assert moment == torch.bfloat16
            stepped = parallel
    own[0].step()
    error, name = worst_weight(stepped, model)
    assert found[0] < CLOSE and error < CLOSE, (found, error, name)
    assert found[1] < 0.5 * rounding, (found, rounding)


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
