"""The benchmark times the same work on both sides, or stops.

Nothing here is timed: a benchmark is a program. The tests check that it notices when the two sides
do different work, since a ratio of two different works would mean nothing.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minids.config import ModelArgs
from minids.lab import bench_setup, timing
from minids.lab import bench_transformers as beside
from minids.lab.bench_setup import Stepper
from minids.lab.timing import RATIOS, process_memory, speed_cells
from minids.model.transformer import Transformer

NANO = replace(ModelArgs.preset("nano"), n_mtp_layers=0)
# The formulas are held to each other in FP32; BF16 is the tolerance of the benchmark besides.
DTYPES = "fp32", pytest.param("bf16", marks=pytest.mark.slow)
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
    return beside.first_losses(Stepper(model, beside.minids_loss, dtype),
                              Stepper(other, beside.transformers_loss, dtype), some_batch())


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sides_compute_the_same_loss(changes, dtype):
    model = random_model(**changes)
    ours, theirs = first_losses(model, beside.to_transformers(model), dtype)
    assert 8 < ours < 9 and 8 < theirs < 9  # about ln 4096 = 8.3


def test_with_weights_in_bf16_both_sides_compute_the_same_loss():
    model = random_model().bfloat16()
    ours, theirs = first_losses(model, beside.to_transformers(model), "bf16-weights")
    assert ours == pytest.approx(theirs, abs=1e-2)  # roundings of 2^-9 of sums near 8
    other = beside.to_transformers(model)
    with torch.no_grad():
        forget_final_norm(other.state_dict())
    with pytest.raises(AssertionError, match="the two models differ"):
        first_losses(model, other, "bf16-weights")


def test_transformers_bodies_agree():
    model = random_model()
    other = beside.to_transformers(model)
    losses = []
    for setting in beside.TRAIN_SETTINGS:
        beside.choose(other, setting)
        ran = other.config._attn_implementation, other.config._experts_implementation
        assert " + ".join(ran) == setting
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoil", [swap_gate_and_up, roll_experts, forget_bias, half_split_rotary,
                                   forget_final_norm])
def test_wrong_copy_of_the_weights_is_noticed(spoil, dtype):
    model = random_model()
    other = beside.to_transformers(model)
    first_losses(model, other, dtype)
    with torch.no_grad():
        spoil(other.state_dict())
    with pytest.raises(AssertionError, match="the two models differ"):
        first_losses(model, other, dtype)


def test_targets_are_not_shifted_twice():
    model = random_model()
    other = beside.to_transformers(model)
    ours = Stepper(model, beside.minids_loss, "fp32")
    twice = Stepper(other, lambda m, x, y: m(input_ids=x, labels=y).loss, "fp32")
    with pytest.raises(AssertionError, match="first losses differ"):
        beside.first_losses(ours, twice, some_batch())


def test_a_step_trains_both_sides_alike():
    model = random_model()
    other = beside.to_transformers(model)
    steppers = [Stepper(model, beside.minids_loss, "fp32"),
                Stepper(other, beside.transformers_loss, "fp32")]
    losses = [[s.step(*some_batch()).item() for _ in range(4)] for s in steppers]
    # The first steps of Adam are sign-like: FP32 rounding of tiny gradients moves single weights.
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0][-1] < losses[0][0] - 0.05


PROMPTS = [[3, 14, 159, 26], [53, 58, 97, 93]]


@pytest.fixture(scope="module")
def decoded():
    """A model and both sides' greedy tokens."""
    model = random_model().eval()
    other = beside.to_transformers(model).eval()
    return (model, beside.decode_minids(model, PROMPTS, 12),
            beside.decode_transformers(other, PROMPTS, 12))


def test_decoded_tokens_are_equal(decoded):
    model, ours, theirs = decoded
    assert [len(row) for row in ours] == [12, 12]
    assert beside.equal_tokens(model, PROMPTS, ours, theirs, beside.TIE["fp32"]) == 1.0


@pytest.mark.parametrize("dtype", beside.TIE)
def test_wrong_token_is_noticed(decoded, dtype):
    model, ours, theirs = decoded
    wrong = [list(row) for row in theirs]
    wrong[1][5] = (wrong[1][5] + 1) % NANO.vocab_size
    with pytest.raises(AssertionError, match="token 5 differs"):
        beside.equal_tokens(model, PROMPTS, ours, wrong, beside.TIE[dtype])
    short = [theirs[0], theirs[1][:-1]]
    with pytest.raises(AssertionError, match="12 and 11 tokens"):
        beside.equal_tokens(model, PROMPTS, ours, short, beside.TIE[dtype])


def test_tie_counts_as_a_difference_but_passes(decoded):
    model, ours, _ = decoded
    with torch.inference_mode():
        tokens = torch.tensor([PROMPTS[0] + ours[0][:11]])
        second = model(tokens)[0, -1].topk(2).indices[1].item()
    other = [ours[0][:11] + [second], ours[1]]
    assert beside.equal_tokens(model, PROMPTS, ours, other, tie=1.0) == 23 / 24


class Judge:
    """A model whose second token lies a quarter of the way to the mean below the best one."""

    head = torch.nn.Linear(1, 1)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tensor([4.0, 3.0, -3.0, -4.0]).expand(1, tokens.size(1), 4)


def test_a_tie_is_as_wide_as_is_said():
    assert beside.equal_tokens(Judge(), [[2]], [[0, 3]], [[1, 2]], tie=0.25) == 0
    with pytest.raises(AssertionError, match="token 0 differs and is no tie: it lies 0.2500 below"):
        beside.equal_tokens(Judge(), [[2]], [[0, 3]], [[1, 2]], tie=0.2499)


def test_settings_are_tried_on_a_batch_and_change_no_weight(monkeypatch):
    stepper, seen = Stepper(random_model(), beside.minids_loss, "fp32"), []
    monkeypatch.setattr(stepper, "run", lambda batches: seen.append(
        (len(batches), stepper.optimizer.param_groups[0]["lr"])))
    monkeypatch.setattr(beside, "their_stepper", lambda *_: stepper)
    monkeypatch.setattr(beside, "trial", lambda model, settings, work, *_: (work(), settings[0])[1])
    bench = SimpleNamespace(settings=SimpleNamespace(device="cpu"),
                            batches=lambda count: [some_batch()] * count)
    assert beside.fastest_training.__wrapped__(bench, "fp32") == beside.TRAIN_SETTINGS[0]
    assert seen == [(1, 0.0)] and stepper.optimizer.param_groups[0]["lr"] > 0


def test_trial_finds_the_fastest(monkeypatch):
    speeds = dict(zip(beside.TRAIN_SETTINGS, [0.3, 0.1, 0.2, 0.4], strict=True))
    chosen, now = [], [0.0]
    monkeypatch.setattr(beside, "choose", lambda theirs, setting: chosen.append(setting))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    found = beside.trial(None, beside.TRAIN_SETTINGS,
                         lambda: now.append(now[-1] + speeds[chosen[-1]]), "cpu", "work")
    assert found == beside.TRAIN_SETTINGS[1]
    there = beside.TRAIN_SETTINGS
    assert chosen == [*there, *there[::-1]] * 2 and beside.TRIAL_ROUNDS["cpu"] == (1, 3)


def test_the_first_round_of_a_trial_only_warms_up(monkeypatch):
    """A setting whose kernels were compiled already is not the fastest for it."""
    taken, now = iter([0.1, 9.0, 0.2, 0.3, 0.3, 0.2, 0.2, 0.3]), [0.0]
    monkeypatch.setattr(beside, "choose", lambda *_: None)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    found = beside.trial(None, ["a + b", "c + d"], lambda: now.append(now[-1] + next(taken)),
                         "cpu", "work")
    assert found == "c + d"


def test_on_a_gpu_the_first_call_warms_up(monkeypatch, capsys):
    """A text takes seconds: a setting runs once to see whether it can, and once for its time."""
    taken, now, calls = iter([9.0, 0.1, 0.2, 0.3]), [0.0], []

    def work() -> None:
        calls.append(chosen[-1])
        if chosen[-1] == "c + d":
            raise RuntimeError("not on this card")
        now.append(now[-1] + next(taken))

    chosen: list[str] = []
    monkeypatch.setattr(beside, "choose", lambda theirs, setting: chosen.append(setting))
    for module in (timing, beside):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert beside.trial(None, ["a + b", "c + d", "e + f"], work, "cuda", "work") == "a + b"
    assert calls == ["a + b", "c + d", "e + f", "a + b", "e + f"]
    assert "transformers, c + d: not on this card\n" in capsys.readouterr().err


TAKEN = [1.0], [2.0]  # seconds of both sides


class Forgetful:
    """A cached function whose stepper has no model."""

    def __call__(self, *_):
        return SimpleNamespace(model=None)

    def cache_clear(self) -> None:
        pass


@pytest.fixture
def nothing_runs(monkeypatch) -> SimpleNamespace:
    """A benchmark of two precisions in which nothing is computed: a work takes 1 or 2 seconds."""
    setting, both = "sdpa + eager", ["bf16", "fp32"]
    stubs = dict(
        fastest_training=lambda *_: setting, fastest_decoding=lambda *_: setting,
        to_transformers=lambda *_: None, choose=lambda *_: None, Stepper=lambda *_: None,
        their_stepper=Forgetful(), first_losses=lambda *_: [8.25, 8.5],
        decoders=lambda *_: (None, None, None),
        decode_minids=lambda model, prompts, new: [[0] * new] * len(prompts),
        roll_out_minids=lambda model, prompts, new: [[0] * new] * len(prompts),
        decode_transformers=lambda model, prompts, new, sample=False: [[0] * new] * len(prompts),
        check_same_function=lambda *_: None, equal_tokens=lambda *_: 0.5,
        in_turn=lambda *_: TAKEN,
        in_fresh_process=lambda work, settings, args, dtype, which: (
            (2**20, 7 * 2**20) if which else (2**20, 5 * 2**20)))
    for name, stub in stubs.items():
        monkeypatch.setattr(beside, name, stub)
    return SimpleNamespace(
        settings=SimpleNamespace(dtypes=both, decode_dtypes=both, decode_batch=3, new_tokens=4,
                                 pairs=1, device="cpu"),
        args=NANO, model=lambda: None, trained=lambda dtype: None,
        batches=lambda count: [None] * count,
        prompts=lambda count: [[1, 2]] * count,
        time_steps=lambda *_: speed_cells(TAKEN, 10))


def test_a_table_has_a_row_for_each_setting(nothing_runs):
    def rows(table) -> list[list[str]]:
        head, *body = table(nothing_runs)
        assert all(len(row) == len(head) for row in body)
        return body

    both = ["bf16", "fp32"]
    trained = rows(beside.train_table)
    assert [row[0] for row in trained] == [f"{dtype}, sdpa + eager" for dtype in both]
    assert [row[-2:] for row in trained] == [["8.25000", "8.50000"]] * 2
    decoded = rows(beside.decode_table)
    assert [row[0] for row in decoded] == [
        f"{dtype}, batch {batch}, sdpa + eager" for dtype in both for batch in (1, 3)]
    assert [row[-1] for row in decoded] == ["50.0%"] * 4
    assert [row[1:-1] for row in decoded[:2]] == [
        speed_cells(TAKEN, 4), speed_cells(TAKEN, 12)]  # tokens of the batch
    sampled = rows(beside.rollout_table)
    assert [row[0] for row in sampled] == [f"{dtype}, batch 3, sdpa + eager" for dtype in both]
    assert [row[1:] for row in sampled] == [speed_cells(TAKEN, 12)] * 2
    memory = rows(beside.memory_table)
    assert [row[0] for row in memory] == [f"{dtype} {work}, sdpa + eager" for dtype in both
                                          for work in ("training", "decoding, batch 3")]
    assert all(row[1:] == ["4", "6", "1.50", "5", "7", "1.40"] for row in memory)


def test_a_gpu_has_columns_of_its_own(nothing_runs, monkeypatch):
    """Theirs holds 1 GiB on the card while ours reaches 4; ours holds 2 while theirs reaches 8."""
    GiB = 2 ** 30
    ours = SimpleNamespace(run=None, first=12.5)
    theirs = SimpleNamespace(run=None, held=lambda: GiB)
    peaks = iter([(3 * GiB, 5 * GiB), (3 * GiB, 10 * GiB)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(beside, "watch_memory", lambda *_: next(peaks))
    monkeypatch.setattr(beside, "flops_per_token", lambda *_: 1e9)
    nothing_runs.settings.seq_len = 7
    cells = beside.gpu_cells(nothing_runs, ours, theirs, ["494,500", "98,900", "5.00"])
    assert cells == ["50.0%", "10.0%", "4.0", "8.0", "2.00", "12.5"]
    assert len(cells) == len(beside.GPU_TITLES)


def test_a_setting_that_fails_on_a_gpu_is_left_out(monkeypatch, capsys):
    def work() -> None:
        if chosen[-1] == "c + d":
            raise RuntimeError("no kernel\nfor this")

    chosen = []
    monkeypatch.setattr(beside, "choose", lambda theirs, setting: chosen.append(setting))
    monkeypatch.setattr(beside, "in_turn", lambda works, rounds, device: [[9.0, 1.0]] * len(works))
    assert beside.trial(None, ["c + d", "e + f"], work, "cuda", "work") == "e + f"
    said = capsys.readouterr().err
    assert "c + d: no kernel for this" in said and "c + d 1.000" not in said


def test_compiling_is_undone_by_the_next_setting():
    model = beside.to_transformers(random_model())
    compiled = []
    for setting in ("sdpa + eager + compiled", "sdpa + eager + static", "sdpa + eager"):
        beside.choose(model, setting)
        compiled.append([layer._compiled_call_impl is not None for layer in model.model.layers])
        static = model.generation_config.cache_implementation == "static"
        assert static == ("static" in setting)
    assert compiled == [[True, True], [False, False], [False, False]]


def test_a_trial_of_training_changes_no_weight():
    stepper = Stepper(random_model(), beside.minids_loss, "bf16-weights")
    before = {n: p.clone() for n, p in stepper.model.named_parameters()}
    with stepper.resting():
        stepper.run([some_batch()] * 2)
    assert all(torch.equal(before[n], p) for n, p in stepper.model.named_parameters())
    size = sum(p.nbytes for p in stepper.model.parameters())
    buffers = sum(b.nbytes for b in stepper.model.buffers())
    counters = 4 * len(before)  # the optimizer's step, of each parameter
    assert stepper.held() == 3 * size + buffers + counters and stepper.first > 0
    stepper.run([some_batch()])
    assert not all(torch.equal(before[n], p) for n, p in stepper.model.named_parameters())


def test_a_fast_step_computes_what_the_slow_one_does(monkeypatch):
    """With copies of the weights; compiled code is a GPU's, and nothing compiles here."""
    monkeypatch.setattr(bench_setup, "compile_blocks", lambda model: None)
    stepper = Stepper(random_model(), beside.minids_loss, "bf16")
    with torch.no_grad():
        loss = stepper.forward(*some_batch()).item()
    stepper.speed_up()
    stepper.check(some_batch(), loss, beside.LOSS_TOLERANCE["bf16"])
    stepper.run([some_batch()] * 3)  # the copies follow the weights
    with torch.no_grad():
        learnt = stepper.forward(*some_batch()).item()
    stepper.first = 0.0
    with pytest.raises(AssertionError, match="when fast"):
        stepper.check(some_batch(), loss, beside.LOSS_TOLERANCE["bf16"])
    assert stepper.first_loss == pytest.approx(learnt, abs=beside.LOSS_TOLERANCE["bf16"])


def test_tokens_that_differ_are_told(nothing_runs, monkeypatch):
    def differ(*_):
        raise AssertionError("token 5 differs and is no tie")
    monkeypatch.setattr(beside, "equal_tokens", differ)
    _, row, *_ = beside.decode_table(nothing_runs)
    assert row[-1] == "token 5 differs and is no tie"


def test_one_batch_size_is_one_row(nothing_runs):
    nothing_runs.settings.decode_batch = 1
    head, *rows = beside.decode_table(nothing_runs)
    assert len(rows) == 2 and head[-1 - len(RATIOS):-1] == RATIOS


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process(settings):
    ballast = torch.ones(2**27)  # 512 MiB that the measuring process must not have
    before, peak = beside.in_fresh_process("training", settings, NANO, "fp32", None)
    assert process_memory("VmRSS") > 2**29
    assert 2**20 < peak - before < 2**29 and before < 2**29
    del ballast
