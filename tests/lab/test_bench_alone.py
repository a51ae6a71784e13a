"""What is timed of minids alone is the program's own step; what it is compared with is counted."""

from dataclasses import replace

import pytest
import torch

from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.costs.flops import forward_flops_per_token
from minids.kernels.registry import using
from minids.lab import bench_alone, bench_fp8
from minids.lab.bench_alone import prompt_flops, seconds_per_step, trainer
from minids.lab.bench_decoding import count_flops
from minids.lab.bench_setup import Bench
from minids.lab.roofline import Peaks

NANO = replace(ModelArgs.preset("nano"), n_mtp_layers=0)
COMMAND = "--preset nano --n-layers 1 --batch-size 2 --seq-len 32 --bias-speed 0.02 --data {data}"


def rows(table, bench: Bench) -> list[dict[str, str]]:
    """A table's rows, by title."""
    head, *body = table(bench)
    return [dict(zip(head, row, strict=True)) for row in body]


@pytest.fixture
def peaks(monkeypatch):
    """A machine of a gigabyte and a gigaflop per second."""
    found = Peaks(dict.fromkeys((torch.float32, torch.bfloat16), 1e9), 1e9)
    monkeypatch.setattr(bench_alone, "measure_peaks", lambda device: found)


def test_the_command_is_the_program_s(settings):
    program = trainer(COMMAND.format(data=settings.data), "cpu")
    assert program.args.batch_size == 2 and program.args.bias_speed == 0.02
    assert program.model.args.n_layers == 1 and program.args.preset == "nano"
    before = [bias.clone() for bias in program.model.gate_biases()]
    program.train_step()
    moved = [(a - b).abs().max().item() for a, b in
             zip(program.model.gate_biases(), before, strict=True)]
    assert moved and all(m == pytest.approx(0.02) for m in moved)  # no harness moves biases


def test_a_wrong_flag_of_the_command_is_named():
    with pytest.raises(ValueError, match="preset 'nanu' is unknown"):
        trainer("--preset nanu", "cpu")
    with pytest.raises(SystemExit):
        trainer("--stepps 3", "cpu")


def test_ranks_take_steps_of_the_program_only(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert replace(settings, what="program").tables == ["program"]
    with pytest.raises(ValueError, match="program,decode. is not valid: it must be program under"):
        replace(settings, what="program,decode")


def test_program_table(settings, monkeypatch):
    collected = []
    monkeypatch.setattr(bench_alone.gc, "collect", lambda: collected.append(True))
    command = COMMAND.format(data=settings.data)
    both = f"{command}; {command} --dim 32"
    bench = Bench(replace(settings, command=both, steps_per_timing=2), NANO)
    row, narrow = rows(bench_alone.program_table, bench)
    assert len(collected) == 2  # nothing of a command is left for the next
    assert narrow["train"] == f"{command} --dim 32" and narrow["first loss"] != row["first loss"]
    args = replace(ModelArgs.preset("nano"), n_layers=1)
    size = count_parameters(args).total + count_parameters(args).mtp
    assert row["train"] == command and row["parameters"] == f"{size:,}"
    assert row["ranks"] == "1" and row["MFU"] == "-"
    assert float(row["tokens/s"].replace(",", "")) > 0
    assert float(row["start to step 1 s"]) >= float(row["first step s"]) >= 0


def test_the_later_half_of_the_steps_is_timed(monkeypatch):
    """Tokens at 1, 2, 3, 13 and 33: the later half took 15 each; the prompt's 1 does not count."""
    now = iter([1.0, 2.0, 3.0, 13.0, 33.0])

    def tokens(model, prompts, new_tokens, on_token):
        for _ in range(new_tokens):
            for row in range(len(prompts)):
                on_token(row, 0)
    monkeypatch.setattr(bench_alone, "generate", tokens)
    monkeypatch.setattr(bench_alone.time, "perf_counter", lambda: next(now))
    assert seconds_per_step(None, [[1], [2]], 5) == 15.0


def test_step_table(settings, peaks, monkeypatch):
    monkeypatch.setattr(bench_alone, "seconds_per_step", lambda *_: 0.01)
    one, three = rows(bench_alone.step_table, Bench(settings, NANO))
    assert [one["decoding step"], three["decoding step"]] == ["batch 1", "batch 3"]
    assert (one["tokens/s"], three["tokens/s"]) == ("100", "300")
    read = 4 * count_parameters(replace(NANO, vocab_size=4096)).active_without_embedding
    assert float(one["weights read GB"]) == pytest.approx(read / 1e9, abs=1e-3)
    assert float(one["floor ms"]) == pytest.approx(read / 1e6, rel=0.05)  # norms are not counted
    assert float(three["floor ms"]) > float(one["floor ms"])  # more experts are visited


@pytest.mark.slow
def test_prompts_grow_up_to_the_context(settings, peaks, monkeypatch):
    monkeypatch.setattr(bench_alone, "SHORTEST", 16)
    found = rows(bench_alone.prompt_table, Bench(replace(settings, context=300), NANO))
    assert [row["prompt"] for row in found] == [f"{n} tokens" for n in (16, 64, 256, 300)]


def test_the_flops_of_a_prompt_are_those_that_are_counted(settings):
    """With bodies off, all pairs of queries and keys are computed."""
    model, tokens = Bench(settings, NANO).decoder(), torch.arange(40)[None]
    with using("off"):
        counted = count_flops(lambda: model.head(model.hidden(tokens).states[:, -1]))
    pairs = 40 * 40 - 40 * 41 / 2  # that the mask hides
    hidden = 2 * NANO.n_heads * (NANO.qk_head_dim + NANO.v_head_dim) * pairs * NANO.n_layers
    assert prompt_flops(model.args, 40) + hidden == pytest.approx(counted, rel=0.02)
    every = 40 * forward_flops_per_token(model.args, 40)  # the head on all tokens
    assert every + hidden != pytest.approx(counted, rel=0.02)


def test_fp8_table(settings, peaks, monkeypatch):
    monkeypatch.setattr(bench_fp8, "measure_peaks", bench_alone.measure_peaks)
    bench = Bench(replace(settings, what="fp8"), replace(NANO, dim=128, moe_inter_dim=128))
    rounding, *pairs = rows(bench_fp8.fp8_table, bench)
    assert rounding["FP8"] == "rounding 64 x 128" and rounding["results apart"] == "0"
    assert [pair["FP8"] for pair in pairs] == ["linear 64 x 128 x 128"] * 2 + ["experts, 64 tokens"]
    for pair in pairs:  # rounding errs by 2.6 % in each factor; a layer of experts has two in a row
        assert 0.02 < float(pair["results apart"].rstrip("%")) / 100 < 0.15
        assert float(pair["FP8 ms"]) > 0 and float(pair["times as fast"]) > 0


def test_the_fp8_tables_shares_are_of_the_machines_peaks(monkeypatch, peaks):
    """Rounding moves bytes, BF16 in, 1 and a scale out; a product computes."""
    monkeypatch.setattr(bench_fp8, "measure_peaks", bench_alone.measure_peaks)
    monkeypatch.setattr(bench_fp8, "seconds_per_call", lambda work, inputs, device: 1e-4)
    moved = 64 * 256 * (2 + 1 + 4 / 128)
    assert bench_fp8.rounding_row(64, 256, "cpu")[3:5] == ["0.100", f"{moved / 1e5:.0%}"]
    computed = 3 * 2 * 8 * 128 * 256  # the result and two gradients
    assert bench_fp8.linear_row(8, 128, 256, "cpu")[1:6] == [
        "0.100", share := f"{computed / 1e5:.0%}", "0.100", share, "1.00"]
    args = replace(NANO, dim=128, moe_inter_dim=128)
    layers, leaves = bench_fp8.expert_layers(args, "cpu")
    computed = 3 * 2 * 3 * 128 * 128 * 12 * (args.n_activated_experts + args.n_shared_experts)
    assert bench_fp8.experts_row(args, layers, leaves, 3, 4, "cpu")[:3] == [
        "experts, 12 tokens", "0.100", f"{computed / 1e5:.0%}"]


def test_the_two_layers_of_the_fp8_table_share_their_weights():
    """A layer of V3 would not fit twice."""
    args = replace(NANO, dim=128, moe_inter_dim=128)
    layers, leaves = bench_fp8.expert_layers(args, "cpu")
    plain, rounded = (dict(layer.named_parameters()) for layer in layers)
    assert all(p.data_ptr() == rounded[name].data_ptr() for name, p in plain.items())
    assert [len({id(p) for p in own}) for own in leaves] == [len(plain)] * 2
