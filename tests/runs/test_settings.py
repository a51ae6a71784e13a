"""Settings of pre-training: presets, the stages of sparse attention, rules that cross fields."""

from dataclasses import replace

import pytest

from minids.config import ModelArgs
from minids.grpo import GrpoArgs
from minids.runs.optimizers import batch_size_at, learning_rate_factor
from minids.runs.settings import TRAIN_PRESETS, TrainArgs
from minids.runs.stages import default_indexer
from minids.sft import SftArgs

TRAINING_MISTAKES = [
    (dict(constant_until=0.9, decay_until=0.5), "decay_until", "constant_until = 0.9 or more"),
    (dict(batch_size=8, grad_accum=3), "grad_accum", "a divisor of batch_size = 8"),
    (dict(batch_start=9), "batch_start", "at most batch_size = 8"),
    (dict(optimizer="sgd"), "optimizer", "one of adamw, muon"),
]


@pytest.mark.parametrize("changes, field, valid", TRAINING_MISTAKES)
def test_a_mistake_names_field_value_and_what_is_valid(changes, field, valid):
    with pytest.raises(ValueError) as caught:
        TrainArgs(**changes)
    message = str(caught.value)
    assert message.startswith(f"{field} = {changes[field]!r} ") and valid in message
    assert "\n" not in message


def test_every_preset_has_training_settings():
    assert set(TRAIN_PRESETS) <= set(ModelArgs.presets())
    for name in ModelArgs.presets():
        args = TrainArgs.for_preset(name, seed=7)
        assert (args.preset, args.seed) == (name, 7)
        assert replace(args, **TRAIN_PRESETS.get(name, {})) == args


# Tokens of a run, and what its learning rate is after so many: V3 section 4.2, V2 section 3.1.2 and
# appendix B (x 0.316, twice), Moonlight (2502.16982) section 3.3, Kimi K2 (2507.20534) section 2.5.
PAPERS = {
    "v3": (14.8e12, {5e12: 2.2e-4, 9.9e12: 2.2e-4, 14.4e12: 2.2e-5}),
    "v2": (8.1e12, {4e12: 2.4e-4, 6e12: 7.584e-5, 8e12: 2.397e-5}),
    "v2-lite": (5.7e12, {4e12: 4.2e-4, 4.8e12: 1.327e-4, 5.5e12: 4.194e-5}),
    "moonlight": (5.2e12, {40e9: 4.2e-4, 5.17e12: 4.2e-5}),
    "kimi-k2": (15.5e12, {9.9e12: 2e-4, 15.49e12: 2e-5}),
}


def off_the_papers(name: str, **changes) -> list[str]:
    """Where the steps of a preset are not a paper's tokens and rates, within half a percent."""
    args, tokens, (total, rates) = TrainArgs.for_preset(name, **changes), 0, PAPERS[name]
    left, wrong = sorted(rates), []
    for step in range(1, args.steps + 1):
        tokens += batch_size_at(step, args) * args.seq_len
        if left and tokens >= left[0]:
            rate = args.lr * learning_rate_factor(step, args)
            if rate != pytest.approx(rates[left[0]], rel=0.005):
                wrong.append(f"{rate} after {left[0]:g} tokens")
            left.pop(0)
    return wrong + ([] if tokens == pytest.approx(total, rel=0.005) else [f"{tokens} tokens"])


@pytest.mark.parametrize("name", PAPERS)
def test_presets_of_released_models_have_the_papers_tokens_and_rates(name):
    assert off_the_papers(name) == []
    assert off_the_papers(name, batch_start=0)[-1:] or name in ("v2-lite", "kimi-k2")
    assert off_the_papers(name, final_lr=0.5)


# What the papers state beside tokens and rates: V3 section 4.2, V2 section 3.1.2, appendix B, and
# for K2 67M tokens in a batch; R1 (Nature 645:633, Methods) for sft's and grpo's "r1".
USUAL = dict(beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0)
STATED = {
    "v3": USUAL | dict(optimizer="adamw", warmup_steps=2000, seq_len=4096, batch_start=3072,
                       batch_size=15360, fim_rate=0.1, mtp_weight=0.3, mtp_weight_late=0.1,
                       balance_weight=1e-4, bias_speed=0.001, separate=False, final_lr=0.1),
    "v2": USUAL | dict(optimizer="adamw", warmup_steps=2000, seq_len=4096, batch_start=2304,
                       batch_size=9216, decay="steps", final_lr=0.1),
    "v2-lite": USUAL | dict(optimizer="adamw", warmup_steps=2000, seq_len=4096, batch_start=0,
                            batch_size=4608, decay="steps"),
    "moonlight": USUAL | dict(optimizer="muon", warmup_steps=2000, seq_len=8192, batch_start=2048,
                              batch_size=4096, bias_speed=0.001, bias_until=1.0),
    "kimi-k2": USUAL | dict(optimizer="muon", warmup_steps=500, seq_len=4096, batch_size=16384),
}
STATED_OF_R1 = {
    SftArgs: USUAL | dict(lr=5e-5, final_lr=0.1, constant_until=0.0, decay_until=1.0,
                          decay="cosine", seq_len=32768, batch_size=128, steps=12_500),
    GrpoArgs: dict(lr=3e-6, steps=10_400, questions=32 * 16, group=16, updates=16, kl_beta=0.001,
                   temperature=1.0, top_p=1.0, clip_low=10.0, clip_high=10.0, reference_every=400,
                   accuracy_weight=1.0, format_weight=1.0, language_weight=0.0, kl="k3",
                   max_new_tokens=32768, mode="think", advantage="std", normalise="sequence"),
}


def test_presets_have_what_the_papers_state():
    made = {name: (TrainArgs.for_preset(name), stated) for name, stated in STATED.items()}
    made |= {kind: (kind.for_preset("r1"), stated) for kind, stated in STATED_OF_R1.items()}
    for name, (args, stated) in made.items():
        assert {field: getattr(args, field) for field in stated} == stated, name
    v3 = TrainArgs.for_preset("v3")  # the late weight after 10T of 14.8T tokens, rest after 14.3T
    assert (v3.mtp_switch, v3.bias_until) == pytest.approx((10 / 14.8, 14.3 / 14.8), abs=5e-3)


def test_balance_losses_of_released_models_work_over_ranks():
    """V2's of experts alone, per sequence, as its config.json says; V3's elsewhere."""
    weights = {"v2": 0.003, "v2-lite": 0.001, "v3": 1e-4, "moonlight": 1e-4, "kimi-k2": 1e-4}
    for name, weight in weights.items():
        args = TrainArgs.for_preset(name)
        assert (args.balance_weight, args.balance_loss) == (weight, "sequence")


def test_moonlights_cool_down_is_a_stage():
    """500B tokens, up to 1e-4 in 100 steps, then straight to 0, and the biases rest."""
    args = TrainArgs.for_preset("moonlight", vars(TrainArgs.for_preset("moonlight", steps=9)) | {
        "preset": "moonlight"}, from_run="x")
    assert args.steps * args.batch_size * args.seq_len == pytest.approx(5e11, rel=0.005)
    factors = [learning_rate_factor(step, args) for step in (50, 100, 7450, 14_900)]
    assert factors == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=1e-2)
    assert args.lr == args.muon_lr == 1e-4 and args.bias_speed == 0


def test_the_stages_of_sparse_attention_are_the_papers():
    """V3.2 (arXiv 2512.02556) section 2.1.1: learning rates, steps, and the tokens they make."""
    warm, sparse = (TrainArgs.for_preset("v3.2", from_run="x", dsa=s) for s in ("warmup", "sparse"))
    tokens = [args.steps * args.batch_size * args.seq_len for args in (warm, sparse)]
    assert tokens == [2_097_152_000, 943_718_400_000]
    assert (warm.indexer_lr, sparse.indexer_lr, sparse.lr) == (1e-3, 7.3e-6, 7.3e-6)
    assert warm.warmup_steps == 0 and warm.constant_until == 1.0  # one rate is all that is stated
    assert TrainArgs.for_preset("v3", from_run="x", dsa="warmup").indexer_lr == 1e-3
    assert TrainArgs.for_preset("v3").indexer_lr == TrainArgs.indexer_lr  # no stage without --from


def test_a_run_after_another_keeps_its_settings_but_for_the_stages():
    before = vars(TrainArgs.for_preset("tiny", batch_size=6, lr=1.0, steps=7, seed=3))
    before = {k: v for k, v in before.items() if k not in ("preset", "dsa", "from_run")}
    after = TrainArgs.for_preset("tiny", before, from_run="x", muon_lr=2.0)
    assert (after.batch_size, after.seed, after.muon_lr) == (6, 3, 2.0)
    assert (after.lr, after.steps) == (5e-4, 200) and after.warmup_steps == 0
    # The dense model that a sparse one is compared with learns by the same settings.
    sparse = TrainArgs.for_preset("tiny", before, from_run="x", muon_lr=2.0, dsa="sparse")
    assert replace(sparse, dsa="") == after


@pytest.mark.parametrize("heads, width, seq_len, indexer", [
    (128, 64, 131_072, (64, 128, 2048)),  # V3.2's own
    (9, 8, 256, (4, 16, 32)), (10, 16, 16_392, (5, 32, 2048)), (6, 16, 16_376, (4, 32, 2047)),
    (8, 8, 15, (4, 16, 1)), (8, 8, 7, (4, 16, 1))])
def test_an_indexer_has_half_the_heads_and_selects_an_eighth(heads, width, seq_len, indexer):
    found = default_indexer(dict(n_heads=heads, qk_rope_head_dim=width), seq_len)
    assert found == dict(zip(("index_n_heads", "index_head_dim", "index_topk"), indexer,
                             strict=True))


def test_stages_need_a_model_to_begin_with():
    for dsa in ("warmup", "sparse"):
        with pytest.raises(ValueError, match=f"dsa = '{dsa}' is not valid: .*--from"):
            TrainArgs(dsa=dsa)
    with pytest.raises(ValueError, match="dsa = 'warm' .* one of , warmup, sparse"):
        TrainArgs(dsa="warm", from_run="x")


