"""The dry run: equal to the arithmetic where both count, and made by the sharding that trains."""

from dataclasses import replace
from functools import cache

import pytest

from minids import ModelArgs
from minids.costs import count_parameters
from minids.costs.bill import Rental, training_bill
from minids.costs.flops import flops_per_token
from minids.costs.memory import pipeline_pieces
from minids.dryrun import DryRunArgs, dry_run, main
from minids.parallel import sharding
from minids.parallel.layout import SCHEDULES, Layout
from minids.parallel.schedules import bubble, most_stored, orders

NANO = replace(ModelArgs.preset("nano"), n_layers=3, n_routed_experts=8, n_mtp_layers=1)


@cache
def report(layout: Layout, gpus: int, args: ModelArgs = NANO, **given):
    run = DryRunArgs(gpus=gpus, seq_len=64, **given)
    return dry_run(args, run, layout)


@pytest.mark.parametrize("layout", [
    Layout(expert_parallel=2), Layout(pipeline=2, expert_parallel=2),
    pytest.param(Layout(), marks=pytest.mark.slow),
    pytest.param(Layout(pipeline=2, replicate=2, micro_batches=4), marks=pytest.mark.slow)])
def test_stages_have_the_parameters_that_costs_counts(layout):
    found, count = report(layout, 4), count_parameters(NANO)
    again = NANO.vocab_size * NANO.dim if layout.pipeline > 1 else 0  # the MTP module's embedding
    biases = NANO.n_routed_experts * 3  # of two layers and the MTP module: not trained
    assert sum(s.whole for s in found.stages) == count.total + count.mtp + again - biases
    pieces = pipeline_pieces(NANO)
    own = sum(p.own + p.experts for p in pieces) + again
    if layout == Layout():  # every matrix divides by four; norms do as well
        assert found.ranks[0].parameters * 4 == own
        assert found.ranks[0].weights * 4 == 4 * own and found.ranks[0].state * 4 == 8 * own


def test_the_bill_is_that_of_costs(capsys):
    main(["--preset", "nano", "--gpus", "1", "--tokens", "1e15", "--seq-len", "64"])
    due = training_bill(flops_per_token(ModelArgs.preset("nano"), 64), 1e15, 1, Rental())
    assert f"{due.gpu_hours:,.0f} GPU-hours, {due.dollars:,.0f} USD" in capsys.readouterr().out


def test_messages_are_those_of_the_exchange_and_of_fsdp():
    found = report(Layout(expert_parallel=2), 2, recompute="none").stages[0]
    layers = 3  # two and the MTP module: each sends rows and their results, and gradients of both
    rows = 63 * NANO.n_activated_experts // 2  # the MTP module has a token less
    assert found.exchange == layers * 4 * rows * NANO.dim * 2
    dense = found.whole - sum(p.experts for p in pipeline_pieces(NANO))
    assert found.reduce_first == found.reduce_last == dense * 4 // 2


def test_a_changed_placement_changes_the_numbers(monkeypatch):
    before = report(Layout(expert_parallel=2), 4)
    monkeypatch.setattr(sharding, "share_experts", lambda model, mesh: None)
    after = report.__wrapped__(Layout(expert_parallel=2), 4)
    assert after.ranks[0].parameters > before.ranks[0].parameters
    assert after.stages[0].exchange == 0 < before.stages[0].exchange


def test_recomputation_stores_less_and_sends_more():
    layout = Layout(expert_parallel=2)
    stored, again = (report(layout, 2, recompute=how).stages[0] for how in ("none", "blocks"))
    assert again.kept < stored.kept and again.exchange == stored.exchange * 6 // 4


@pytest.mark.slow
@pytest.mark.parametrize("layout, gpus", [
    (Layout(), 2), (Layout(pipeline=3, expert_parallel=2, micro_batches=4), 6)])
def test_deep_stages_are_those_of_every_layer(layout, gpus, monkeypatch):
    from minids.parallel import measuring
    deep = replace(NANO, n_layers=12, n_dense_layers=2)
    added = report(layout, gpus, deep).stages
    monkeypatch.setattr(measuring, "FEW", 20)
    for short, long in zip(added, report.__wrapped__(layout, gpus, deep).stages, strict=True):
        assert short._replace(peak=0, kept=0) == long._replace(peak=0, kept=0)
        assert short.kept == pytest.approx(long.kept, rel=1e-3)  # counts of the loads of all layers
        assert short.peak == pytest.approx(long.peak, rel=0.01)  # rotations of more layers


def test_schedules():
    count = dict(pipeline=4, micro_batches=16)
    rows = {name: orders(Layout(schedule=name, **count).fitted(4)) for name in SCHEDULES[:3]}
    rows["DualPipeV"] = orders(Layout(schedule="DualPipeV", **count))
    assert bubble(rows["1F1B"]) == pytest.approx(3 / 19) == bubble(rows["GPipe"])
    assert bubble(rows["DualPipeV"]) < bubble(rows["Interleaved1F1B"]) < 3 / 19
    assert [most_stored(row, {n: 1}) for n, row in enumerate(rows["1F1B"])] == [4, 3, 2, 1]
    assert most_stored(rows["GPipe"][0], {0: 1}) == 16
    for rank, row in enumerate(rows["DualPipeV"]):  # V3 table 2: PP + 1, of whole ranks
        assert most_stored(row, {rank: 1, 7 - rank: 1}) == 2 * 4 + 1


@pytest.mark.parametrize("argv, words", [
    (["--gpus", "2048", "--pipeline", "3"], "pipeline = 3 "),
    (["--gpus", "8", "--expert-parallel", "3"], "expert_parallel = 3 "),
    (["--gpus", "256", "--pipeline", "64"], "n_layers = 61"),
    (["--gpus", "64", "--batch-size", "65"], "batch_size = 65 ")])
def test_layouts_that_do_not_fit_are_refused(argv, words):
    with pytest.raises(ValueError) as error:
        main(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_v3_on_2048_gpus(capsys):
    main(["--preset", "v3", "--gpus", "2048", "--pipeline", "16", "--expert-parallel", "64"])
    text = capsys.readouterr().out
    for words in ("110,830,080", "bubble: 11.1%", "2,668,230 GPU-hours", "nothing of this was run"):
        assert words in text
