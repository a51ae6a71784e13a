"""A longer context with YaRN, as a stage after pre-training (V3, arXiv 2412.19437, section 4.3)."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import training_runs
from kill_and_resume import differences
from parity_hf import theirs_of
from training_runs import assert_refused, cut_back, everything, read_records, run_train

from minids import ModelArgs
from minids.infer.validation import evaluate
from minids.runs import stages
from minids.runs.open import Source, open_model
from minids.runs.settings import TrainArgs
from minids.text.loaders import open_data

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken

SHORT, LONG, STEPS = 32, 128, 12


@pytest.fixture(scope="module")
def longer(home, unbroken) -> Path:
    """The finished run, which learned from 32 tokens at a time, extended to 128."""
    run = home / "longer"
    said = run_train("--from", str(unbroken), "--context", str(LONG), "--steps", str(STEPS),
                     "--out", str(run))
    assert (said.status, said.err) == (0, "")
    return run


def bits_per_byte(checkpoint: Path, home: Path) -> float:
    """Of held-out text, in sequences of the longer context."""
    model, tokenizer = (found := open_model(checkpoint)).model, found.tokenizer
    valid = open_data(f"text:{home / 'texts'}", tokenizer, LONG, cache=home / "cache").valid
    with torch.no_grad():
        return evaluate(model, valid, tokenizer.n_bytes, LONG, 4, 2048).bits_per_byte


def test_loss_at_the_longer_context_falls(home, longer):
    before, after = (bits_per_byte(longer / f"checkpoints/step_{step:06d}", home)
                     for step in (0, STEPS))
    assert after < before - 0.02  # it was 0.05 to 0.15


def test_a_longer_context_has_yarn_and_the_tokens_of_a_batch_stay(unbroken, longer):
    config, before = (json.loads((run / "config.json").read_text()) for run in (longer, unbroken))
    changed = {name: value for name, value in config["model"].items()
               if value != before["model"][name]}
    assert changed == dict(max_seq_len=40 * SHORT, original_seq_len=SHORT)
    assert ModelArgs(**config["model"]).yarn and not ModelArgs(**before["model"]).yarn
    assert config["train"]["batch_size"] * LONG == before["train"]["batch_size"] * SHORT
    # The run before ended at a tenth of its peaks; this one stays there.
    rate = 0.1 * before["train"]["lr"]
    assert all(line["lr"] == pytest.approx(rate, rel=1e-12) for line in read_records(longer))


def test_the_extended_model_is_transformers_model(longer):
    """On tokens beyond the first context. FP32 rounds at 6e-8, through two layers: 1e-5."""
    ours = open_model(longer).model
    tokens = torch.randint(ours.args.vocab_size, (2, LONG), generator=torch.manual_seed(0))
    with torch.no_grad():
        theirs = theirs_of(ours)(tokens).logits
        assert (ours(tokens) - theirs).abs().max() < 1e-5 * theirs.abs().max()
        plain = type(ours)(replace(ours.args, rope_factor=1.0))
        plain.load_state_dict(ours.state_dict())
        assert (plain(tokens) - theirs).abs().max() > 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("step", [0, 6])
def test_a_resumed_extension_equals_an_unbroken_one(longer, tmp_path, step):
    run = cut_back(longer, tmp_path / "run", step)
    said = run_train("--resume", "--out", str(run))
    assert said.status == 0 and f"resumed at step {step} of {STEPS}" in said.out
    assert differences(longer, run) == []


def test_a_second_extension_stretches_the_same_base(longer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(longer, "runs/x-128")
    said = run_train("--from", "runs/x-128", "--context", "512", "--steps", "1")
    assert said.status == 0, said.err
    config, before = (json.loads(Path(run, "config.json").read_text())
                      for run in ("runs/x-512", longer))
    assert config["model"] == before["model"] and config["train"]["seq_len"] == 512
    assert config["train"]["lr"] == before["train"]["lr"]  # it was constant


def test_v3_trained_without_yarn_and_its_two_stages_end_with_the_released_model():
    """Batches, rate, steps and factor of section 4.3; 62.9B tokens each."""
    released = ModelArgs.preset("v3")
    tokenizer = type("Tokens", (), dict(vocab_size=released.vocab_size))
    args = TrainArgs.for_preset("v3")
    first = stages.fit_model(args, {}, tokenizer)
    assert (first.max_seq_len, first.yarn) == (4096, False)
    model, expected = first, {32_768: 1920, 131_072: 480}
    for context, batch in expected.items():
        source = Source(Path("x"), Path("x"), model, tokenizer, {"train": asdict(args)})
        before = {k: v for k, v in vars(args).items() if k not in stages.STAGE_FIELDS | {"preset"}}
        args = TrainArgs.for_preset("v3", before, from_run="x", context=context)
        assert (args.batch_size, args.seq_len, args.steps, args.lr) == (batch, context, 1000,
                                                                        7.3e-6)
        assert args.warmup_steps == 0 and args.constant_until == 1
        model = stages.fit_model(args, stages.model_after(args, {}, source), tokenizer)
        assert model == released


MISTAKES = {
    "no run": (["--context", "128"], "context = 128", "0 without --from"),
    "shorter": (["--from", "{unbroken}", "--context", "16"], "context = 16",
                f"more than the {SHORT} tokens of a sequence"),
    "as long": (["--from", "{longer}", "--context", "128"], "context = 128", "more than the 128"),
    "too long": (["--from", "{unbroken}", "--context", "2000"], "context = 2000",
                 "rope_factor x original_seq_len = 40 x 32 = 1280"),
    "too long for its factor": (["--from", "{longer}", "--context", "300", "--rope-factor", "8"],
                                "context = 300", "8 x 32 = 256"),
    "another base": (["--from", "{longer}", "--context", "512", "--original-seq-len", "64"],
                     "original_seq_len = 64", "stretches 32 tokens"),
    "another base without a stage": (["--from", "{longer}", "--original-seq-len", "64"],
                                     "original_seq_len = 64", "stretches 32 tokens"),
    "another theta": (["--from", "{longer}", "--context", "512", "--rope-theta", "50000"],
                      "rope_theta = 50000.0", "have 10000.0"),
    "with indexers": (["--from", "{unbroken}", "--context", "128", "--dsa", "warmup"],
                      "context = 128", "with --dsa"),
    "two lengths": (["--from", "{unbroken}", "--context", "128", "--seq-len", "64"],
                    "seq_len = 64", "context = 128"),
    "negative": (["--from", "{unbroken}", "--context", "-1"], "context = -1", "0 or more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_context_is_one_line_and_writes_nothing(name, tmp_path, unbroken, longer,
                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, *words = MISTAKES[name]
    before = everything(longer)
    bad = [word.format(unbroken=unbroken, longer=longer) for word in bad]
    assert_refused(run_train(*bad), *words)
    assert list(tmp_path.iterdir()) == [] and everything(longer) == before
