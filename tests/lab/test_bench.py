"""The benchmark times the same work on both sides, and its arithmetic is right.

Nothing here is timed: a benchmark is a program. What is tested is that it notices when the two
sides do different work, since a ratio of two different works would mean nothing.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from minids.config import ModelArgs
from minids.costs import count_parameters, pair_flops
from minids.lab import bench
from minids.lab.bench import BenchArgs, Stepper, Timing, equal_active_dense
from minids.model.transformer import Transformer
from minids.runs.checkpoints import save_checkpoint
from minids.tokenizer import Tokenizer

NANO = replace(ModelArgs.preset("nano"), n_mtp_layers=0)
SHAPES = {
    "nano": {},
    "compressed queries": dict(q_lora_rank=24),
    "groups": dict(n_routed_experts=8, n_expert_groups=4, n_limited_groups=2, route_scale=2.5),
    "short wavelengths": dict(rope_theta=50.0),
    "two shared, two dense": dict(n_shared_experts=2, n_layers=4, n_dense_layers=2),
    "V2": dict(score_func="softmax", gate_bias=False, route_scale=16.0),
    "YaRN": dict(max_seq_len=8192),
    "V3.2": dict(q_lora_rank=24, index_n_heads=16, index_head_dim=16, index_topk=8),
    "dense": dict(n_routed_experts=0),
}


def random_model(**changes) -> Transformer:
    """A small model whose norms and gate biases are not at their initial values."""
    torch.manual_seed(0)
    model = Transformer(replace(NANO, **changes))
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    for bias in model.gate_biases():
        bias.normal_(std=0.1)
    return model


def some_batch() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(NANO.vocab_size, (4, 33), generator=torch.Generator().manual_seed(1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def first_losses(model, other, dtype="fp32") -> list[float]:
    return bench.first_losses(Stepper(model, bench.minids_loss, dtype),
                              Stepper(other, bench.transformers_loss, dtype), some_batch())


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_both_sides_compute_the_same_loss(changes, dtype):
    model = random_model(**changes)
    ours, theirs = first_losses(model, bench.to_transformers(model), dtype)
    assert 8 < ours < 9 and 8 < theirs < 9  # about ln 4096 = 8.3


def test_transformers_bodies_agree():
    model = random_model()
    other = bench.to_transformers(model)
    losses = []
    for setting in bench.TRAIN_SETTINGS:
        bench.choose(other, setting)
        assert (other.config._attn_implementation, other.config._experts_implementation) == setting
        losses += [first_losses(model, other)[1]]
    assert max(losses) - min(losses) < 1e-5  # FP32 sums of a few hundred terms near 8


def swap_gate_and_up(state: dict) -> None:
    for name in [n for n in state if n.endswith("gate_up_proj")]:
        state[name].copy_(torch.cat(state[name].chunk(2, dim=1)[::-1], dim=1))


def roll_experts(state: dict) -> None:
    for name in [n for n in state if n.endswith("down_proj") and "mlp.experts" in n]:
        state[name].copy_(state[name].roll(1, 0))


def forget_bias(state: dict) -> None:
    for name in [n for n in state if n.endswith("e_score_correction_bias")]:
        state[name].zero_()


def half_split_rotary(state: dict) -> None:
    width = NANO.qk_rope_head_dim
    for name in [n for n in state if n.endswith("kv_a_proj_with_mqa.weight")]:
        pairs = state[name][-width:].view(width // 2, 2, -1)
        state[name][-width:] = pairs.transpose(0, 1).reshape(width, -1)


def forget_final_norm(state: dict) -> None:
    state["model.norm.weight"].fill_(1.0)


@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("spoil", [swap_gate_and_up, roll_experts, forget_bias, half_split_rotary,
                                   forget_final_norm])
def test_wrong_copy_of_the_weights_is_noticed(spoil, dtype):
    model = random_model()
    other = bench.to_transformers(model)
    first_losses(model, other, dtype)
    with torch.no_grad():
        spoil(other.state_dict())
    with pytest.raises(AssertionError, match="the two models differ"):
        first_losses(model, other, dtype)


def test_targets_are_not_shifted_twice():
    model = random_model()
    other = bench.to_transformers(model)
    ours = Stepper(model, bench.minids_loss, "fp32")
    twice = Stepper(other, lambda m, x, y: m(input_ids=x, labels=y).loss, "fp32")
    with pytest.raises(AssertionError, match="first losses differ"):
        bench.first_losses(ours, twice, some_batch())


def test_a_step_trains_both_sides_alike():
    model = random_model()
    other = bench.to_transformers(model)
    steppers = [Stepper(model, bench.minids_loss, "fp32"),
                Stepper(other, bench.transformers_loss, "fp32")]
    losses = [[s.step(*some_batch()).item() for _ in range(4)] for s in steppers]
    # The first steps of Adam are sign-like: FP32 rounding of tiny gradients moves single weights.
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0][-1] < losses[0][0] - 0.05


PROMPTS = [[3, 14, 159, 26], [53, 58, 97, 93]]


@pytest.fixture(scope="module")
def decoded():
    """A model and both sides' greedy tokens."""
    model = random_model().eval()
    other = bench.to_transformers(model).eval()
    return (model, bench.decode_minids(model, PROMPTS, 12),
            bench.decode_transformers(other, PROMPTS, 12))


def test_decoded_tokens_are_equal(decoded):
    model, ours, theirs = decoded
    assert [len(row) for row in ours] == [12, 12]
    assert bench.equal_tokens(model, PROMPTS, ours, theirs, bench.TIE["fp32"]) == 1.0


@pytest.mark.parametrize("dtype", bench.TIE)
def test_wrong_token_is_noticed(decoded, dtype):
    model, ours, theirs = decoded
    wrong = [list(row) for row in theirs]
    wrong[1][5] = (wrong[1][5] + 1) % NANO.vocab_size
    with pytest.raises(AssertionError, match="token 5 differs"):
        bench.equal_tokens(model, PROMPTS, ours, wrong, bench.TIE[dtype])
    short = [theirs[0], theirs[1][:-1]]
    with pytest.raises(AssertionError, match="12 and 11 tokens"):
        bench.equal_tokens(model, PROMPTS, ours, short, bench.TIE[dtype])


def test_tie_counts_as_a_difference_but_passes(decoded):
    model, ours, _ = decoded
    with torch.inference_mode():
        tokens = torch.tensor([PROMPTS[0] + ours[0][:11]])
        second = model(tokens)[0, -1].topk(2).indices[1].item()
    other = [ours[0][:11] + [second], ours[1]]
    assert bench.equal_tokens(model, PROMPTS, ours, other, tie=1.0) == 23 / 24


def test_sides_take_turns():
    calls = []
    timing = bench.in_turn(lambda pair: calls.append(f"a{pair}"),
                           lambda pair: calls.append(f"b{pair}"), 3, "cpu")
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [len(side) for side in timing] == [3, 3]


def test_ratio_is_the_median_of_pairs():
    # The ratio of medians would be 4: one slow moment of the machine hits both of a pair.
    timing = Timing([1.0, 1.0, 10.0], [2.0, 4.0, 30.0])
    assert timing.ratios == [2.0, 4.0, 3.0]
    assert timing.cells(100) == ["100", "25", "3.00", "2.00", "4.00"]


def test_trial_finds_the_fastest(monkeypatch):
    speeds = dict(zip(bench.TRAIN_SETTINGS, [0.3, 0.1, 0.2, 0.4], strict=True))
    chosen = []
    monkeypatch.setattr(bench, "choose", lambda theirs, setting: chosen.append(setting))
    monkeypatch.setattr(bench, "seconds", lambda work, device: speeds[chosen[-1]])
    found = bench.trial(None, bench.TRAIN_SETTINGS, None, "cpu", "work")
    assert found == bench.TRAIN_SETTINGS[1]
    assert chosen == bench.TRAIN_SETTINGS * (bench.TRIAL_ROUNDS + 1)


def active_gap(args: ModelArgs, dense: ModelArgs) -> float:
    active = count_parameters(args).active
    return abs(count_parameters(dense).active - active) / active


@pytest.mark.parametrize("preset", ["nano", "tiny", "small", "v3"])
def test_dense_model_has_equal_active_parameters(preset):
    args = ModelArgs.preset(preset)
    dense = equal_active_dense(args)
    assert not dense.has_moe and active_gap(args, dense) < 0.01
    assert active_gap(args, replace(dense, inter_dim=dense.inter_dim * 5 // 4)) > 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_block_is_seen():
    def added(work) -> float:
        memory = bench.watch_memory(work, "cpu")
        return (memory.peak - memory.before) / 2**20

    held = torch.ones(2**25)  # 128 MiB, held before and so not counted
    assert 60 < added(lambda: torch.ones(2**24)) < 80  # 64 MiB, freed again
    assert added(lambda: None) < 16
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_in_a_fresh_process(settings):
    ballast = torch.ones(2**27)  # 512 MiB that the measuring process must not have
    memory = bench.in_fresh_process(bench.memory_of_training, settings, NANO, "fp32", None)
    assert bench.process_memory("VmRSS") > 2**29
    assert 2**20 < memory.peak - memory.before < 2**29 and memory.before < 2**29
    del ballast


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> BenchArgs:
    """The smallest benchmark."""
    text = tmp_path_factory.mktemp("text") / "text.py"
    text.write_text(Path(argparse.__file__).read_text())
    return BenchArgs(preset="nano", data=f"text:{text}", pairs=1, steps_per_timing=1, batch_size=2,
                     seq_len=32, decode_batch=3, prompt=8, new_tokens=4, dtype="fp32", threads=1,
                     seeds=1, steps=2)


def run(settings: BenchArgs, what: str, capsys, *more: str) -> list[list[str]]:
    """The cells of the table that the program prints."""
    names = "preset data pairs batch_size seq_len decode_batch prompt new_tokens dtype threads " \
            "seeds steps steps_per_timing"
    flags = [f"--{n.replace('_', '-')}={getattr(settings, n)}" for n in names.split()]
    bench.main([f"--what={what}", *flags, *more])
    table = capsys.readouterr().out.split("\n\n")[1]
    return [[cell for cell in line.split("  ") if cell] for line in table.splitlines()]


@pytest.mark.parametrize("what,rows", [("train", 1), ("decode", 2), ("dense", 1)])
def test_program_prints_its_table(settings, what, rows, capsys):
    head, *body = run(settings, what, capsys)
    assert len(body) == rows and all(len(row) == len(head) for row in body)
    assert all(float(row[3]) > 0 for row in body)  # the ratio


def test_losses_in_the_table_agree(settings, capsys):
    head, row = run(settings, "train", capsys)
    assert head[-2:] == ["minids first loss", "transformers first loss"]
    assert float(row[-2].strip()) == pytest.approx(float(row[-1]), abs=1e-4)


def test_quality_table(settings, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, seed, mean = run(settings, "moe-vs-dense", capsys)
    assert [cell.strip() for cell in seed[1:6]] == [cell.strip() for cell in mean[1:6]]
    assert 1 < float(seed[1]) < 8 and seed[6].split()[:3] == ["2", "/", "2"]


SPARSE = replace(NANO, index_n_heads=3, index_head_dim=16, index_topk=24)


def costs_at(settings, *lengths: int) -> dict[int, dict[str, list[int]]]:
    """FLOPs at each length: of prefill dense and sparse, of decoding also outside the indexer."""
    both = bench.Sparse(bench.Bench(replace(settings, context=max(lengths)), SPARSE))
    return {n: {"prefill": [bench.count_flops(work) for work in both.prefills(n)],
                "decode": [bench.count_flops(work) for work in both.decodings(n)]}
            for n in lengths}


def test_decoding_grows_by_the_pairs_and_outside_the_indexer_not_at_all(settings):
    costs, pair = costs_at(settings, 64, 128), pair_flops(SPARSE)
    growth = [b - a for a, b in zip(costs[64]["decode"], costs[128]["decode"], strict=True)]
    weighing = 2 * SPARSE.index_n_heads  # the sum over the indexer's heads
    expected = [pair["mqa"], pair["indexer"] + weighing, 0]
    assert growth == [64 * SPARSE.n_layers * flops for flops in expected]


def test_the_experts_are_counted(settings):
    """A step is two operations for each number it meets, norms apart, and those on the keys."""
    dense, _, outside = costs_at(settings, 64)[64]["decode"]
    pair, args = pair_flops(SPARSE), replace(SPARSE, index_n_heads=0)
    active = count_parameters(args).active_without_embedding
    assert dense - outside == SPARSE.n_layers * pair["mqa"] * (65 - SPARSE.index_topk)
    attention = SPARSE.n_layers * pair["mqa"] * 65
    assert 0.97 < (dense - attention) / (2 * active) <= 1
    experts = 2 * 6 * SPARSE.dim * SPARSE.moe_inter_dim  # two experts' three matrices, one layer
    assert (dense - attention - experts) / (2 * active) < 0.97


def test_prefill_counts_all_pairs(settings, monkeypatch):
    """What is not in proportion to the tokens, 128 against twice 64."""
    monkeypatch.setattr(bench, "PIECE", 32)
    costs, pair = costs_at(settings, 64, 128), pair_flops(SPARSE)
    dense, sparse = (b - 2 * a for a, b in zip(costs[64]["prefill"], costs[128]["prefill"],
                                               strict=True))
    head = 2 * SPARSE.dim * SPARSE.vocab_size  # of the last token alone
    padding = 31 * SPARSE.n_routed_experts * 6 * SPARSE.dim * SPARSE.moe_inter_dim  # one MoE layer
    # Below 512 tokens attention's plain products take in all pairs.
    assert dense == SPARSE.n_layers * pair["mha"] * (128 ** 2 - 2 * 64 ** 2) - head - padding
    seen = 32 * (32 + 64 + 96 + 128) - 2 * 32 * (32 + 64)  # pairs of a piece and all keys so far
    weighing = 2 * SPARSE.index_n_heads
    assert sparse == SPARSE.n_layers * (pair["indexer"] + weighing) * seen - head


def test_causal_kernels_count_for_what_their_queries_see():
    q, k, v = (torch.randn(2, 3, 600, 16) for _ in range(3))

    def work(causal: bool, queries: int = 600):
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q[:, :, :queries], k, v, is_causal=causal)

    assert bench.count_flops(work(True)) == 2 * 2 * 3 * (600 * 601 // 2) * 32
    assert bench.count_flops(work(False, 7)) == 2 * 2 * 3 * (7 * 600) * 32
    with torch.utils.flop_counter.FlopCounterMode(display=False) as plain:
        work(True)()
    assert plain.get_total_flops() != bench.count_flops(work(True))  # not counted on a CPU


def test_both_models_are_one_model(settings):
    both = bench.Sparse(bench.Bench(replace(settings, context=40), SPARSE))
    dense, sparse = both.prefill_dense(20), both.prefill_sparse(20)  # k = 24 leaves nothing out
    assert (dense - sparse).abs().max() < 1e-5 * dense.abs().max()  # FP32, another order
    dense, sparse = both.prefill_dense(40), both.prefill_sparse(40)
    assert (dense - sparse).abs().max() > 1e-4 * dense.abs().max()


def test_sparse_table(settings, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SHORTEST", 32)
    flags = ["--context=96", "--index-n-heads=2", "--index-head-dim=16", "--index-topk=16"]
    head, *rows = run(settings, "sparse", capsys, *flags)
    assert [row[0].strip() for row in rows] == [f"{work}, {n} tokens" for work in
                                                ("prefill", "decode") for n in (32, 64, 96)]
    assert head[-1].strip() == "outside indexer MFLOP"
    assert len({row[-1] for row in rows[3:]}) == 1 and len({row[-2] for row in rows[3:]}) == 3


def a_run(tmp_path, **changes) -> str:
    """A run folder of a model that has learnt nothing."""
    tokenizer, folder = Tokenizer.load(), tmp_path / "run"
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size, **changes)
    torch.manual_seed(0)
    save_checkpoint(folder, 1, Transformer(args).state_dict(), {"step": 1})
    tokenizer.save(folder / "tokenizer")
    config = {"model": asdict(args), "tokenizer": tokenizer.fingerprint}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_speculative_table(settings, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PROMPTS", 2)
    head, *rows = run(settings, "speculative", capsys, f"--run={a_run(tmp_path)}")
    assert len(head) == 5
    assert [row[0].strip() for row in rows[:6]] == [
        f"{drafts} drafted, batch {batch}" for drafts in (1, 2, 3) for batch in (1, 2)]
    assert len(rows) == 6 + len(bench.DEPTHS)
    assert all(1 <= float(row[2]) <= 4 and float(row[3]) > 0 for row in rows[:6])
    predicted = [float(row[-1]) for row in rows[6:]]
    assert predicted == sorted(predicted)  # the deeper, the more a draft saves


def test_drafts_need_a_module(settings, capsys, tmp_path):
    with pytest.raises(ValueError, match="must have an MTP module"):
        run(settings, "speculative", capsys, f"--run={a_run(tmp_path, n_mtp_layers=0)}")


def test_texts_that_differ_stop_the_benchmark():
    same = [[1, 2]] * 16
    bench.require_same_text(same, [[1, 3], [1, 3], *same[2:]])  # ties
    with pytest.raises(ValueError, match="3 of 16"):
        bench.require_same_text(same, [*[[1, 3]] * 3, *same[3:]])


def test_lower_bits_per_byte_win():
    assert bench.quality_cells([1.6, 1.7, 1.5]) == ["1.6000", "1.7000", "experts", "1.5000",
                                                    "dense"]


@pytest.mark.parametrize("flags,named", [
    (["--score-func", "softmax"], "gate_bias"),
    (["--n-routed-experts", "1", "--n-activated-experts", "1"], "n_routed_experts"),
    (["--index-n-heads", "2"], "q_lora_rank"),
    (["--seq-len", "300"], "seq_len"),
    (["--new-tokens", "250"], "new_tokens"),
    (["--pairs", "0"], "pairs"),
    (["--decode-batch", "99999"], "decode_batch"),
    (["--preset", "nanoo"], "did you mean 'nano'"),
])
def test_bad_settings_are_named(settings, flags, named, monkeypatch):
    # refused for what it is, before anything is built
    monkeypatch.setattr(bench, "Transformer", None)
    with pytest.raises(ValueError, match=named):
        bench.main(["--what=train", "--preset=nano", f"--data={settings.data}", *flags])


def test_bad_flag_is_one_line():
    words = [sys.executable, "-m", "minids.lab.bench", "--what", "trian"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "trian" in done.stderr and "moe-vs-dense" in done.stderr


def test_rollout_table(settings, capsys):
    head, row = run(settings, "rollout", capsys, "--dtype=fp32")
    assert len(head) == len(row) == 6 and "fp32, batch" in row[0]
    assert float(row[3]) > 0 and float(row[4]) <= float(row[3]) <= float(row[5])
