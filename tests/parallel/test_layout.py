"""Layouts: what is chosen, what is refused, who holds which layers."""

from dataclasses import replace

import pytest
import torch

from minids import ModelArgs
from minids.costs import count_parameters
from minids.parallel import layout as layouts
from minids.parallel import sharding
from minids.parallel.layout import SCHEDULES, Layout, Spread, check_batch
from minids.parallel.measuring import fake_ranks
from minids.parallel.sharding import empty_model, keeps_gathered, shard

TINY = ModelArgs.preset("tiny")


@pytest.mark.parametrize("world", [1, 2, 8, 2048])
def test_all_ranks_are_fsdps_if_nothing_is_said(world):
    chosen = Layout().fitted(world)
    assert (chosen.fsdp, chosen.micro_batches, chosen.data_ranks) == (world, 1, world)
    if world <= 8:
        chosen.check(TINY)


def test_what_is_left_open_is_chosen():
    chosen = Layout(pipeline=4, replicate=2).fitted(64)
    assert (chosen.fsdp, chosen.micro_batches, chosen.data_ranks) == (8, 8, 16)
    assert Layout(pipeline=2, schedule="Interleaved1F1B").fitted(2).micro_batches == 8
    assert chosen.fitted(64) == chosen


@pytest.mark.parametrize("fields, world, words", [
    (dict(pipeline=3), 4, ["pipeline = 3 ", "4"]), (dict(replicate=8), 4, ["replicate = 8 ", "4"]),
    (dict(fsdp=4), 2, ["fsdp = 4 ", "2: pipeline x replicate x fsdp"]),
    (dict(fsdp=1), 2, ["fsdp = 1 ", "2: "]), (dict(expert_parallel=4), 2, ["expert_parallel = 4 "]),
    (dict(expert_parallel=4, replicate=2), 4, ["expert_parallel = 4 ", "fsdp = 2"]),
    (dict(micro_batches=4), 2, ["micro_batches = 4 ", "--grad-accum"]),
    (dict(pipeline=4, micro_batches=2), 4, ["micro_batches = 2 ", "at least 4"]),
    (dict(pipeline=2, schedule="DualPipeV", micro_batches=3), 2, ["micro_batches = 3 "]),
    (dict(pipeline=2, schedule="Interleaved1F1B", micro_batches=3), 2, ["a multiple of "])])
def test_ranks_that_do_not_fit_are_refused(fields, world, words):
    with pytest.raises(ValueError) as error:
        Layout(**fields).fitted(world)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_ranks_that_use_a_model_share_its_experts_if_nothing_is_said():
    for fields, world, wanted in ((dict(), 1, (1, 1)), (dict(), 8, (1, 8)),
                                  (dict(pipeline=2), 16, (2, 8)),
                                  (dict(pipeline=4, expert_parallel=2), 8, (4, 2))):
        layout = Spread(**fields).layout(world)
        assert (layout.pipeline, layout.expert_parallel) == wanted and layout.expert_fsdp == 1


@pytest.mark.parametrize("fields, world, words", [
    (dict(pipeline=3), 4, ["pipeline = 3 ", "a divisor of the number of ranks, 4"]),
    (dict(pipeline=2), 1, ["pipeline = 2 ", "ranks, 1"]),
    (dict(expert_parallel=4), 2, ["expert_parallel = 4 ", "must be 2: pipeline x expert_parallel"]),
    (dict(expert_parallel=2, pipeline=2), 2, ["expert_parallel = 2 ", "must be 1: "])])
def test_ranks_that_cannot_share_a_model_are_refused(fields, world, words):
    with pytest.raises(ValueError) as error:
        Spread(**fields).layout(world)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("fields, world, model, word", [
    (dict(pipeline=8), 8, {}, "n_layers = 4"), (dict(expert_parallel=3), 3, {}, "n_routed_experts"),
    (dict(expert_parallel=2), 2, dict(n_routed_experts=0), "no layer has experts"),
    (dict(fsdp=12), 12, dict(moe_inter_dim=30), "width 30")])
def test_models_that_do_not_divide_are_refused(fields, world, model, word):
    chosen = Layout(**fields).fitted(world)
    with pytest.raises(ValueError, match=word):
        chosen.check(replace(TINY, **model))


def test_schedules_that_lose_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    assert layouts.torch_version() == (2, 11)
    Layout(pipeline=2).fitted(2)
    with pytest.raises(ValueError, match="schedule = 'DualPipeV' is not valid.*1F1B.*2.11"):
        Layout(pipeline=2, schedule="DualPipeV").fitted(2)


@pytest.mark.parametrize("preset", ModelArgs.presets())
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_hold_each_layer_once(preset, schedule):
    args = ModelArgs.preset(preset)
    for pipeline in (2, 4, 16):
        chosen = Layout(pipeline=pipeline, schedule=schedule)
        if chosen.n_stages > args.n_layers:
            continue
        held = [chosen.stages_of(rank) for rank in range(pipeline)]
        assert sorted(sum(held, [])) == list(range(chosen.n_stages))
        layers = [chosen.layers_of(stage, args) for stage in range(chosen.n_stages)]
        assert [layer for each in layers for layer in each] == list(range(args.n_layers))
        assert all(map(len, layers))
        if schedule == "DualPipeV":
            assert held[0] == [0, chosen.n_stages - 1], "both ends on one rank (V3 3.2.3)"


def test_a_layout_in_words():
    assert Layout(expert_parallel=2).fitted(4).describe() == (
        "4 = pipeline 1 x replicate 1 x fsdp 4, experts over 2")
    assert Layout(pipeline=2, replicate=2, micro_batches=6).fitted(4).describe() == (
        "4 = pipeline 2 x replicate 2 x fsdp 1, experts over 1; 1F1B with 6 micro-batches")


def test_v3_on_sixteen_ranks():
    """61 layers, an MTP module and the head: the last stage has the fewest layers."""
    chosen = Layout(pipeline=16)
    sizes = [len(chosen.layers_of(stage, ModelArgs.preset("v3"))) for stage in range(16)]
    assert sum(sizes) == 61 and set(sizes[:-1]) <= {3, 4} and sizes[-1] == 2


def test_batches_that_cannot_be_dealt_are_refused():
    check_batch(Layout(fsdp=2), 8, parts=4)
    with pytest.raises(ValueError, match="batch_size = 9 is not valid: it must be a multiple of 8"):
        check_batch(Layout(fsdp=2), 9, parts=4)


@pytest.mark.parametrize("experts, replicas, gathered", [(8, 1, 0), (4, 1, 2), (2, 1, 4),
                                                         (8, 2, 1), (1, 1, 8)])
def test_gathered_matrices_are_kept_where_they_fit(experts, replicas, gathered):
    """All but the experts, and this rank's experts where others have parts of them too; 2 bytes
    each and 4 of a gradient, in an eighth of the memory."""
    count, each = count_parameters(TINY), 3 * TINY.moe_inter_dim * TINY.dim
    moe = TINY.n_layers - TINY.n_dense_layers + TINY.n_mtp_layers
    rest = count.total + count.mtp - moe * TINY.n_routed_experts * each
    least = 8 * 6 * (rest + moe * each * gathered)
    layout = Layout(expert_parallel=experts, replicate=replicas).fitted(8 * replicas)
    assert keeps_gathered(TINY, layout, least) and not keeps_gathered(TINY, layout, least - 1)
    assert not keeps_gathered(TINY, replace(layout, pipeline=2), 100 * least)


def sharded(monkeypatch, layout: Layout, world: int, **how) -> tuple[dict, list[dict]]:
    """Shard a model for rank 0; return along which dimensions each parameter is cut, none if it is
    whole, and how each unit is sharded, the whole model's last."""
    units, fully_shard = [], sharding.fully_shard
    monkeypatch.setattr(sharding, "fully_shard", lambda unit, **named: (
        units.append(named), fully_shard(unit, **named)))
    with fake_ranks(layout.fitted(world), world) as ranks:
        shard(model := empty_model(TINY), ranks, **how)
        cuts = {name: {cut.dim for cut in getattr(p, "placements", ())}
                for name, p in model.named_parameters()}
    return cuts, units


@pytest.mark.parametrize("layout, world, experts", [
    (Layout(), 8, {0}), (Layout(), 16, {1}), (Layout(expert_parallel=8), 16, {0, 1}),
    (Layout(expert_parallel=8), 8, {0})])
def test_ranks_that_outnumber_experts_have_rows_of_their_matrices(layout, world, experts,
                                                                 monkeypatch):
    cuts, _ = sharded(monkeypatch, layout, world)
    kinds = {"norm": set(), "gate.weight": set(), "ffn.experts.w": experts}
    for name, dims in cuts.items():
        assert dims == next((due for part, due in kinds.items() if part in name), {0}), name


@pytest.mark.parametrize("pipeline, keep, gives_up", [
    (1, False, True), (1, True, False), (2, False, False)])
def test_a_block_s_matrices_are_gathered_anew_or_stay(pipeline, keep, gives_up, monkeypatch):
    """In BF16, if that is the products' type; sums of gradients are in FP32."""
    layout = Layout(pipeline=pipeline, expert_parallel=2)
    _, (*units, whole) = sharded(monkeypatch, layout, 4 * pipeline, products=torch.bfloat16,
                                 keep=keep)
    blocks = TINY.n_layers + TINY.n_mtp_layers
    assert len(units) == blocks + sum(map(TINY.is_moe_layer, range(blocks)))
    for unit in units:
        policy = unit["mp_policy"]
        assert unit["reshard_after_forward"] == gives_up and not policy.cast_forward_inputs
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert whole.keys() == {"mesh", "ignored_params"}
