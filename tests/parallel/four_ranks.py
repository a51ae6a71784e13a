"""What four ranks go through; started by test_four_ranks.py."""

from dataclasses import replace
from pathlib import Path

from comparing import (
    ARGS,
    WEIGHTS,
    compare_step,
    compare_validation,
    hand_over,
    ranks_of,
    train_in_parallel,
)
from launching import run_checks

from minids.apply.recompute import recompute_blocks
from minids.parallel.layout import V_SHAPED, torch_version

FEW_EXPERTS = replace(ARGS, n_routed_experts=2, n_activated_experts=1, n_expert_groups=1,
                      n_limited_groups=1)  # fewer than ranks: each has rows of their matrices
INDEXED = replace(ARGS, index_n_heads=4, index_head_dim=16, index_topk=4)


def check_fsdp():
    compare_step(ranks_of())


def check_replicas():
    compare_step(ranks_of(replicate=2))


def check_experts():
    for experts in (2, 4):
        compare_step(ranks_of(expert_parallel=experts))


def check_replicas_of_experts():
    compare_step(ranks_of(replicate=2, expert_parallel=2))


def check_more_ranks_than_experts():
    for experts in (1, 2):
        compare_step(ranks_of(expert_parallel=experts), args=FEW_EXPERTS)


def check_pipeline_fsdp_and_experts():
    compare_step(ranks_of(pipeline=2, expert_parallel=2))


def check_pipeline_fsdp_experts_and_recompute():
    for schedule in ("Interleaved1F1B", *V_SHAPED):
        if schedule not in V_SHAPED or torch_version() >= (2, 13):
            compare_step(ranks_of(pipeline=2, expert_parallel=2, schedule=schedule,
                                  micro_batches=4), prepare=recompute_blocks)


def check_longer_pipeline():
    for schedule in ("1F1B", "GPipe"):
        compare_step(ranks_of(pipeline=4, schedule=schedule))


def check_documents_that_do_not_see_each_other():
    for fields in (dict(expert_parallel=4), dict(pipeline=2)):
        compare_step(ranks_of(**fields), separate=True)


def check_indexers():
    compare_step(ranks_of(expert_parallel=2), args=INDEXED, weights=WEIGHTS._replace(dsa="sparse"))


def check_no_mtp():
    weights = WEIGHTS._replace(mtp_weight=0.0)
    bare = replace(ARGS, n_mtp_layers=0)
    for fields in (dict(expert_parallel=2), dict(pipeline=2)):
        compare_step(ranks_of(**fields), args=bare, weights=weights)


def check_validation():
    for fields in (dict(replicate=2), dict(pipeline=2, expert_parallel=2), dict(pipeline=4)):
        compare_validation(ranks_of(**fields))
    if torch_version() >= (2, 13):
        compare_validation(ranks_of(pipeline=2, schedule="DualPipeV", micro_batches=4))


def check_parts_that_another_layout_reads():
    for number, fields in enumerate([dict(pipeline=2, expert_parallel=2),
                                     dict(replicate=2, expert_parallel=2)]):
        (folder := Path(f"parts-{number}")).mkdir(exist_ok=True)
        hand_over(ranks_of(**fields), [ranks_of(), ranks_of(expert_parallel=4),
                                       ranks_of(pipeline=4)], folder)


def check_adamw():
    for fields in (dict(replicate=2, expert_parallel=2), dict(pipeline=2, expert_parallel=2)):
        train_in_parallel(ranks_of(**fields), "adamw")


def check_muon():
    for fields in (dict(expert_parallel=2), dict(pipeline=2, expert_parallel=2),
                   dict(pipeline=2, schedule="Interleaved1F1B", micro_batches=4)):
        train_in_parallel(ranks_of(**fields), "muon")


def check_muon_of_more_ranks_than_experts():
    train_in_parallel(ranks_of(expert_parallel=2), "muon", model_args=FEW_EXPERTS)


if __name__ == "__main__":
    run_checks(dict(globals()))
