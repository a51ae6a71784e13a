"""The dry run: equal to the arithmetic where both count, and made by the sharding that trains."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

from minids import ModelArgs, dryrun
from minids.costs import count_parameters
from minids.costs.bill import Rental, training_bill
from minids.costs.cards import named_card
from minids.costs.flops import flops_per_token
from minids.costs.memory import Sharding, pipeline_pieces, rank_memory
from minids.costs.parameters import stored_elements
from minids.costs.serving import block_bytes, held
from minids.dryrun import DryRunArgs, Rank, Report, dry_run, main, model_rows
from minids.parallel import sharding
from minids.parallel.layout import SCHEDULES, Layout
from minids.parallel.measuring import Footprint, Measured, for_each_rank
from minids.parallel.schedules import bubble, most_stored, orders

NANO = replace(ModelArgs.preset("nano"), n_layers=3, n_routed_experts=8, n_mtp_layers=1)


@cache
def report(layout: Layout, gpus: int, args: ModelArgs = NANO, **given):
    run = DryRunArgs(gpus=gpus, seq_len=64, **given)
    return dry_run(args, run, layout)


@pytest.mark.parametrize("layout", [
    Layout(expert_parallel=2), *(pytest.param(layout, marks=pytest.mark.slow) for layout in (
        Layout(), Layout(pipeline=2, expert_parallel=2),
        Layout(pipeline=2, replicate=2, micro_batches=4)))])
def test_stages_have_the_parameters_that_costs_counts(layout):
    found, count = report(layout, 4), count_parameters(NANO)
    again = NANO.vocab_size * NANO.dim if layout.pipeline > 1 else 0  # the MTP module's embedding
    biases = NANO.n_routed_experts * 3  # of two layers and the MTP module: not trained
    assert sum(s.whole for s in found.stages) == count.total + count.mtp + again - biases
    pieces = pipeline_pieces(NANO)
    own = sum(p.own + p.experts for p in pieces) + again
    # Every rank holds gates and norms whole.
    small = sum(p.numel() for p in sharding.held_whole(sharding.empty_model(NANO)))
    if layout.pipeline == 1:  # FSDP keeps FP32 weights; AdamW two moments of each
        costs = rank_memory(NANO, Sharding(
            gpus=4, pipeline=1, dualpipe=False, zero=3, expert_parallel=layout.expert_parallel,
            master_bytes=0, moment_bytes=4), 0)
        assert found.ranks[0].state == costs.optimizer + 8 * small * 3 // 4
    if layout == Layout():  # every matrix divides by four; norms do as well
        assert found.ranks[0].parameters * 4 == own + 3 * small
        assert found.ranks[0].weights == found.ranks[0].state // 2 == own + 3 * small


@pytest.mark.slow
def test_the_bill_is_that_of_costs(capsys):
    main(["--preset", "nano", "--gpus", "1", "--tokens", "1e15", "--seq-len", "64"])
    due = training_bill(flops_per_token(ModelArgs.preset("nano"), 64), 1e15, 1, Rental())
    assert f"{due.gpu_hours:,.0f} GPU-hours, {due.dollars:,.0f} USD" in capsys.readouterr().out


def test_messages_are_those_of_the_exchange_and_of_fsdp():
    found = report(Layout(expert_parallel=2), 2, recompute="none").stages[0]
    layers = 3  # two and the MTP module: each sends rows and their results, and gradients of both
    tokens, _ = for_each_rank(NANO, 63, 2)  # the MTP module has a token less
    told = 2 * NANO.n_activated_experts * 4  # numbers and weights of a token's experts, FP32
    assert found.exchange == layers * tokens * 4 * NANO.dim * 2 + 2 * (64 + 64 + 63) * told
    small = sum(p.numel() for p in sharding.held_whole(sharding.empty_model(NANO)))
    dense = found.whole - sum(p.experts for p in pipeline_pieces(NANO)) - small
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


def test_a_layout_is_told_in_full():
    """Two ranks of a pipeline, the first fullest and the second busiest, on slow cards of 80 GB."""
    first = Rank(0, 7, *(n * 10 ** 9 for n in (30, 20, 5, 4, 1)), 3, {"rows": 2 * 10 ** 9})
    second = first._replace(rank=1, weights=0, flights=1, messages={"rows": 8 * 10 ** 9, "none": 0})
    layout = Layout(pipeline=2, micro_batches=4, schedule="1F1B").fitted(4)
    found = Report(layout, [], [first, second], 0.25)
    other = found._replace(ranks=[first._replace(stored=30 * 10 ** 9), second])
    run, rental = DryRunArgs(gpus=4, seq_len=64, tokens=1e6), Rental(gpu_peak=1e-6, mfu=0.5)
    taken = 4 * 64 / 2 * flops_per_token(NANO, 64) / (1e6 * 0.5) / (1 - 0.25)
    due = training_bill(flops_per_token(NANO, 64), 1e6, 4, rental)
    assert [*model_rows("nano", NANO, run, found, other, rental)] == [
        "nano on 4 H800: pipeline 2 x replicate 1 x fsdp 2, experts over 1",
        "1F1B, 4 micro-batches of 1 x 64 tokens on each rank, 8 sequences a step; "
        "recompute blocks, bf16, adamw",
        "the package's own sharding on ranks that are not there; nothing of this was run on a GPU",
        "", ("rank", "parameters", "weights", "optimizer", "gathered, gradients", "activations",
             "at work", "all"),
        ("0", 7, "30.00 GB", "20.00 GB", "5.00 GB", "4.00 GB", "1.00 GB", "60.00 GB"),
        ("1", 7, "0.00 GB", "20.00 GB", "5.00 GB", "4.00 GB", "1.00 GB", "30.00 GB"),
        "", "fullest is rank 0: 60.00 GB, fits 90% of 80 GB",
        "with recompute none: 86.00 GB, does not fit; activations 30.00 GB",
        "messages that rank 1, the busiest, sends",
        "  rows: 8.00 GB a step, 2.00 GB a micro-batch",
        "  0.02 s a step: these bytes over an assumed 400 GB/s; computing takes "
        f"{taken:,.2f} s at the share of the peak below",
        "bubble: 25.0% of a step, if all stages take equally long; at most 3 micro-batches stored "
        "on a rank",
        f"1,000,000 tokens at 50% of 1e-06 TFLOPS, assumed: {due.days * 24:,.0f} hours, "
        f"{due.gpu_hours:,.0f} GPU-hours, {due.dollars:,.0f} USD at 2 USD each"]


@pytest.mark.parametrize("memory, optimizer, told", [
    (102.0, "adamw", "91.0 GB, 1.5 --expert-parallel 8"),  # a tenth is left for other things
    (100.0, "adamw", "89.0 GB, 1.5 --pipeline 2 --expert-parallel 4"),
    (98.0, "adamw", "no: 89 GB"), (71.0, "muon", "no: 89 GB"),
    (71.0, "adamw", "no: 64 GB of state")])
def test_the_first_layout_that_fits_is_told(memory, optimizer, told, monkeypatch):
    """The least is 16 bytes of each parameter; only Muon keeps fewer."""
    needs = iter([91, 89, 95])
    monkeypatch.setitem(dryrun.CHOICES, 8, [(1, 8, 1), (2, 4, 1), (8, 1, 1)])
    monkeypatch.setattr(dryrun, "count_parameters",
                        lambda args: SimpleNamespace(total=31 * 10 ** 9, mtp=10 ** 9))
    monkeypatch.setattr(dryrun, "dry_run", lambda args, run, layout, known, bytes: Report(
        layout, [], [Rank(0, 7, next(needs) * 10 ** 9, 0, 0, 0, 0, 1, {})], 0.0))
    monkeypatch.setattr(dryrun, "seconds", lambda *_: (2.0, 3.0))  # it computes, and sends
    run, rental = DryRunArgs(gpus=8, optimizer=optimizer), Rental(gpu_memory=memory)
    assert dryrun.first_fit(NANO, run, rental, {}) == told


@pytest.mark.parametrize("gpus, network, found", [
    (8, 0.0, 400e9), (9, 0.0, 50e9), (1, 0.0, 400e9), (16, 100.0, 100e9)])
def test_a_host_s_gpus_are_joined_by_nvlink(gpus, network, found):
    assert DryRunArgs(gpus=gpus, network=network).bandwidth == found


@pytest.mark.slow
def test_the_peak_is_that_of_a_gpu():
    """figures/README.md: an H100 took 55.5 GiB without recomputation, with no block compiled."""
    run = DryRunArgs(gpus=1, micro_batch=16, seq_len=2048, optimizer="muon", recompute="none")
    [rank] = dry_run(ModelArgs.preset("small"), run, Layout()).ranks
    assert rank.total == pytest.approx(55.5 * 2 ** 30, rel=0.03)  # bodies differ from a CPU's


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


@pytest.mark.parametrize("layers, ran", [(1, {1}), (2, {2}), (3, {2, 3}), (50, {2, 3})])
def test_of_many_equal_layers_two_and_three_are_run(layers, ran, monkeypatch):
    found = set()

    def run(self, ranks, kind) -> Footprint:
        found.add(kind.dense)
        return Footprint(*[10 * kind.dense + 1] * len(Footprint._fields))._replace(peak=1000)

    monkeypatch.setattr(Measured, "run", run)
    args = replace(NANO, n_layers=layers, n_dense_layers=layers)
    whole = Measured(args, None).stage(SimpleNamespace(layout=Layout().fitted(1)), 0)
    assert found == ran and set(whole._replace(peak=0)) == {10 * layers + 1, 0}
    assert whole.peak == 1000


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
    (["--gpus", "64", "--batch-size", "65"], "batch_size = 65 "),
    (["--what", "inference", "--gpus", "16", "--expert-parallel", "8"], "gpus = 16 ")])
def test_layouts_that_do_not_fit_are_refused(argv, words):
    with pytest.raises(ValueError) as error:
        main(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_released_weights_are_spread_whole():
    v3 = ModelArgs.preset("v3")
    elements, copies = stored_elements(v3)[0], 2 * v3.vocab_size * v3.dim
    whole = elements["F8_E4M3"] + 2 * (elements["BF16"] - copies) + 4 * elements["F32"]
    assert held(v3, range(v3.n_layers), 1, last=True).weights == whole
    assert block_bytes(v3, 5, 256) - block_bytes(v3, 5, 128) == 128 * (
        3 * 2048 * 7168 + 4 * 3 * 16 * 56)  # three matrices, and a scale per 128 x 128


def test_v3_is_held_by_eight_cards_of_141_gb_or_sixteen_of_80(capsys):
    main(["--what", "inference"])
    lines = capsys.readouterr().out.splitlines()
    eight, sixteen = (next(line for line in lines if line.startswith(gpus))
                      for gpus in ("8 ", "16"))
    assert eight.count("does not fit") == 1 and eight.split()[-1] == "338,949"
    assert "does not fit" not in sixteen


def test_cards_are_known_by_name():
    assert named_card({"gpu": "RTX 4090"}).gpu_memory == 24
    assert named_card({"gpu": "H200", "gpu_memory": 140.0}).gpu_memory == 140
    with pytest.raises(ValueError, match="gpu = 'H201' is not valid"):
        named_card({"gpu": "H201"})
    assert named_card({"gpu": "own", "gpu_memory": 10.0, "gpu_peak": 1.0}).gpu_memory == 10


@pytest.mark.slow
def test_v3_on_2048_gpus(capsys):
    main(["--preset", "v3", "--gpus", "2048", "--pipeline", "16", "--expert-parallel", "64"])
    text = capsys.readouterr().out
    for words in ("112,715,776", "bubble: 11.1%", "2,668,230 GPU-hours", "nothing of this was run"):
        assert words in text
