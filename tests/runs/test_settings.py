"""Settings of pre-training: presets, the stages of sparse attention, rules that cross fields."""

from dataclasses import replace

import pytest

from minids.config import ModelArgs
from minids.runs.settings import TRAIN_PRESETS, TrainArgs

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


def test_stages_need_a_model_to_begin_with():
    for dsa in ("warmup", "sparse"):
        with pytest.raises(ValueError, match=f"dsa = '{dsa}' is not valid: .*--from"):
            TrainArgs(dsa=dsa)
    with pytest.raises(ValueError, match="dsa = 'warm' .* one of , warmup, sparse"):
        TrainArgs(dsa="warm", from_run="x")


