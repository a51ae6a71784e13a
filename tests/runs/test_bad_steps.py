"""Steps of the learner that are refused or skipped: a loss that is no number, a spike."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import training_runs
from kill_and_resume import differences
from training_runs import make_trainer, run_train, whole_state

from minids.runs.checkpoints import newest_checkpoint
from minids.train import Trainer

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken


def test_huge_learning_rate_stops_with_advice(tmp_path, flags):
    run = tmp_path / "run"
    said = run_train(*flags, "--out", str(run), "--lr", "1e30", "--muon-lr", "1e30",
                     "--save-every", "100")
    assert said.status == 2 and said.err.count("\n") == 1
    assert "step 2: the loss is" in said.err and "--lr 5e+29" in said.err


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, home):
    trainer = make_trainer(home, tmp_path)
    good = trainer.save()
    trainer.step = 1
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"step 1: a weight is no longer .*{good.name}"):
        trainer.save()
    assert newest_checkpoint(tmp_path) == good


def test_resumed_run_takes_a_lower_learning_rate(tmp_path, flags):
    run = tmp_path / "run"
    run_train(*flags, "--out", str(run), "--steps", "3", "--muon-lr", "0.002")
    before = read_rates(run)
    said = run_train("--resume", "--out", str(run), "--steps", "4", "--lr", "1e-9",
                     "--muon-lr", "1e-9")
    assert said.status == 0, said.err
    assert min(before) > 1e-6 > read_rates(run)[-1]


def read_rates(run: Path) -> list[float]:
    """The learning rate of every step of a run."""
    return [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def out_of_memory(monkeypatch, at_step: int) -> None:
    """Let the GPU's memory run out in one step, after half of its gradients."""
    accumulate = Trainer.accumulate

    def exhausted(trainer):
        found = accumulate(trainer)
        if trainer.step == at_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"
                                         " a total capacity of 79.11 GiB of which 1.2 GiB is free.")
        return found

    monkeypatch.setattr(Trainer, "accumulate", exhausted)


def test_memory_that_runs_out_in_a_step_names_what_to_lower(tmp_path, flags, monkeypatch):
    run = tmp_path / "run"
    out_of_memory(monkeypatch, at_step=8)
    said = run_train(*flags, "--out", str(run), "--batch-size", "8", "--grad-accum", "2")
    good = run / "checkpoints/step_000006"
    advice = ["--resume", "--out", str(run), "--grad-accum=4", "--recompute"]
    assert said.status == 2 and said.err == (
        f"python -m minids.train: step 8: not enough memory for 2.50 GiB; the last good checkpoint "
        f"is {good}; try {shlex.join(advice)}\n")
    monkeypatch.undo()
    said = run_train(*advice, "--steps", "8")  # it is good advice
    assert said.status == 0, said.err
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
            ] == [*range(1, 9)]


def test_memory_that_runs_out_before_the_first_checkpoint(tmp_path, flags, monkeypatch):
    run = tmp_path / "run"
    out_of_memory(monkeypatch, at_step=1)
    said = run_train(*flags, "--out", str(run), "--batch-size", "2", "--grad-accum", "2",
                     "--recompute")
    assert said.status == 2 and said.err.endswith(
        "step 1: not enough memory for 2.50 GiB; the last good checkpoint is none; try a new run "
        "with a smaller --batch-size or --seq-len\n")


def test_another_error_in_a_step_keeps_its_traceback(tmp_path, home, monkeypatch):
    trainer = make_trainer(home, tmp_path)
    monkeypatch.setattr(Trainer, "accumulate", lambda self: 1 / torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        trainer.train()


def test_only_a_step_that_was_validated_can_be_the_best(tmp_path, flags):
    run = tmp_path / "run"
    run_train(*flags, "--out", str(run), "--steps", "5", "--save-every", "1", "--eval-every", "2",
              "--keep-last", "0")
    manifests = sorted((run / "checkpoints").glob("step_*/manifest.json"))
    judged = [json.loads(m.read_text())["metric"] is not None for m in manifests]
    assert judged == [False, True, False, True, True]  # the last step is always validated


def test_model_that_no_memory_holds_is_refused_in_one_line(tmp_path):
    said = run_train("--preset", "v3", "--out", str(tmp_path / "run"))
    assert said.status == 2 and said.err.count("\n") == 1 and "does not fit" in said.err
    assert not (tmp_path / "run").exists()


def poison(monkeypatch, at_step: int) -> None:
    """A loss that is no number, once."""
    accumulate = Trainer.accumulate

    def poisoned(trainer):
        parts, loads = accumulate(trainer)
        return parts | ({"loss": float("nan")} if trainer.step == at_step else {}), loads

    monkeypatch.setattr(Trainer, "accumulate", poisoned)


def test_loss_that_is_no_number_names_step_and_checkpoint(tmp_path, flags, unbroken, monkeypatch):
    run = tmp_path / "run"
    poison(monkeypatch, at_step=8)
    said = run_train(*flags, "--out", str(run))
    good = run / "checkpoints/step_000006"
    assert said.status == 2 and said.err.count("\n") == 1
    assert "step 8: the loss is nan" in said.err and f"{good}; try --resume" in said.err
    assert newest_checkpoint(run) == good
    name = "checkpoints/step_000006/model.safetensors"
    assert (run / name).read_bytes() == (unbroken / name).read_bytes()
    monkeypatch.undo()
    said = run_train("--resume", "--out", str(run))
    assert said.status == 0 and differences(unbroken, run) == []


def test_infinite_gradient_stops_before_the_weights(tmp_path, home):
    trainer = make_trainer(home, tmp_path)
    trainer.model.head.weight.register_hook(lambda grad: grad * float("inf"))
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="step 1: .*gradient's norm (nan|inf)"):
        trainer.train_step()
    torch.testing.assert_close(dict(trainer.model.state_dict()), before, rtol=0, atol=0)


def skipped_steps(trainer: Trainer) -> list[bool]:
    """For four steps, whether the weights and the optimizers stood still."""
    stood = []
    for _ in range(4):
        before = whole_state(trainer)
        record = trainer.train_step()
        after = whole_state(trainer)
        moved = {n for n in after if after[n] != before.get(n)}
        stood.append(not any(n.startswith((".weights", ".optimizers")) and ".lr" not in n
                             for n in moved))
        assert record.get("skipped", False) == stood[-1]
    return stood


def test_spike_skips_the_step_and_says_so(tmp_path, home, capsys):
    """A factor under one makes a spike of every step after the first, which sets the mean."""
    assert skipped_steps(make_trainer(home, tmp_path, spike_factor=0.5)) == [False] + 3 * [True]
    said = capsys.readouterr().out
    assert said.count("the step is skipped") == 3 and "step 2: loss" in said
    assert skipped_steps(make_trainer(home, tmp_path)) == 4 * [False]


def test_spike_is_told_by_a_slow_mean(tmp_path, home):
    trainer = make_trainer(home, tmp_path, spike_factor=1.5)
    losses = [4.0, 2.0, 5.9, 2.0]  # 0.95 * 4 + 0.05 * 2 = 3.9; 5.9 is above 1.5 times that
    assert [trainer.is_spike(loss) for loss in losses] == [False, False, True, False]
    assert trainer.recent_loss == pytest.approx(0.95 * 3.9 + 0.05 * 2.0)  # without the spike


