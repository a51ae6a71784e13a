"""Training in FP16, for cards without BF16: scaled losses, and an overflow is no divergence."""

import json
import math

import pytest
import torch
import training_runs
from kill_and_resume import differences
from training_runs import cut_back, make_trainer, read_records, run_train, whole_state

from minids.runs.optimizers import Muon

home, flags = training_runs.home, training_runs.flags


def steps(trainer, count: int) -> list[dict]:
    """Take steps, and return their records."""
    return [trainer.train_step() for _ in range(count)]


@pytest.fixture(scope="module")
def losses(home, tmp_path_factory) -> dict[str, list[float]]:
    """The losses of the first steps in each precision."""
    folder = tmp_path_factory.mktemp("precisions")
    return {dtype: [record["loss"] for record in
                    steps(make_trainer(home, folder / dtype, dtype=dtype), 16)]
            for dtype in ("fp32", "fp16", "bf16")}


def furthest(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative distance of two runs' losses."""
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_fp16_learns_as_fp32_does(losses):
    """FP16 keeps three bits more than BF16: it stays nearer to FP32."""
    assert losses["fp32"][-1] < 0.9 * losses["fp32"][0]
    assert furthest(losses["fp16"], losses["fp32"]) < furthest(losses["bf16"], losses["fp32"])
    # FP16 rounds a product by 5e-4, and sixteen steps on the loss moves by a tenth of a step.
    assert furthest(losses["fp16"], losses["fp32"]) < 5e-3


def test_gate_norms_and_losses_stay_in_fp32(home, tmp_path):
    """What the gates score and the loss add up is FP32 under FP16 products, which are there."""
    trainer = make_trainer(home, tmp_path, dtype="fp16")
    tokens, targets = trainer.data.loader.next_batch(2)
    names, seen = {module: name for name, module in trainer.model.named_modules()}, {}

    def note(module, given, found) -> None:
        seen[names[module]] = given, found

    for module in names:
        module.register_forward_hook(note)
    with trainer.autocast():
        found = trainer.model.loss(tokens, targets, 0.3, 1e-4)
    gate = next(found for name, (_, found) in seen.items() if name.endswith(".gate"))
    assert gate[0].dtype == gate[1].scores.dtype == torch.float32
    assert {part.dtype for part in found[:-1]} == {torch.float32}
    assert next(f for n, (_, f) in seen.items() if n.endswith(".wo")).dtype == torch.float16
    stream = next(given for name, (given, _) in seen.items() if name.endswith("layers.1"))
    assert stream[0].dtype == torch.float32  # the residual stream


def test_small_gradients_survive_because_the_loss_is_scaled(home, tmp_path):
    """A share of the gradient is below FP16's smallest number, unless the loss is scaled."""
    zeros = {}
    for name, scale in (("scaled", 2.0 ** 16), ("unscaled", 1.0)):
        trainer = make_trainer(home, tmp_path / name, dtype="fp16", batch_size=8)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.accumulate()
        grads = [p.grad for n, p in trainer.model.named_parameters() if "experts" in n]
        zeros[name] = sum((g == 0).sum().item() for g in grads) / sum(g.numel() for g in grads)
    assert zeros["scaled"] == 0 and zeros["unscaled"] > 0.005  # 1 % here


def overflowing(trainer, at_step: int) -> None:
    """Let one step's scaled gradient overflow."""
    def spoil(grad):
        return grad * math.inf if trainer.step == at_step else grad

    trainer.model.head.weight.register_hook(spoil)


def test_an_overflow_skips_the_step_and_halves_the_scale(home, tmp_path, capsys):
    trainer = make_trainer(home, tmp_path, dtype="fp16", steps=4)
    overflowing(trainer, at_step=2)
    steps(trainer, 1)
    before = whole_state(trainer)
    [record] = steps(trainer, 1)
    after = whole_state(trainer)
    moved = {n for n in after if after[n] != before.get(n)}
    assert not any(n.startswith((".weights", ".optimizers")) and ".lr" not in n for n in moved)
    assert record["skipped"] and record["overflow"] and record["grad_norm"] is None
    json.dumps(record, allow_nan=False)
    [record] = steps(trainer, 1)
    assert "skipped" not in record and math.isfinite(record["grad_norm"])
    assert (record["loss_scale"], trainer.scaler.get_scale()) == (2.0 ** 15, 2.0 ** 15)


def runs_overflow(monkeypatch, at_step: int) -> None:
    """Let the gradients of every run that is started overflow at one step."""
    build = training_runs.Trainer.prepare

    def prepare(trainer, model):
        build(trainer, model)
        trainer.model = model
        overflowing(trainer, at_step=at_step)

    monkeypatch.setattr(training_runs.Trainer, "prepare", prepare)


def test_overflows_are_counted_at_the_end(flags, tmp_path, monkeypatch):
    runs_overflow(monkeypatch, at_step=3)
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--dtype", "fp16", "--steps", "4")
    assert said.status == 0, said.err
    assert "1 of 4 steps were skipped: their gradients overflowed FP16" in said.out


def test_a_gradient_that_no_scale_makes_finite_is_a_divergence(home, tmp_path):
    trainer = make_trainer(home, tmp_path, dtype="fp16", steps=40)
    trainer.model.head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(ValueError, match="step 18: .* the gradient's norm nan"):
        steps(trainer, 40)  # 2^16 halved 16 times is 1, and the 17th makes it less


def test_gradients_are_clipped_after_unscaling(home, tmp_path):
    norms = [steps(make_trainer(home, tmp_path / dtype, dtype=dtype), 1)[0]["grad_norm"]
             for dtype in ("fp16", "fp32")]
    # The scale is 65,536; FP16 rounds each of the products by 5e-4.
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_a_resumed_run_is_the_unbroken_one(flags, tmp_path, monkeypatch):
    """The scale, halved before the break, is part of the checkpoint."""
    runs_overflow(monkeypatch, at_step=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said = run_train(*flags, "--out", str(whole), "--dtype", "fp16", "--steps", "8",
                     "--save-every", "4")
    assert said.status == 0, said.err
    cut_back(whole, broken, step=4)
    said = run_train("--resume", "--out", str(broken))
    assert said.status == 0 and differences(whole, broken) == []
    scales = [record["loss_scale"] for record in read_records(broken)]
    assert scales == [2.0 ** 16] * 2 + [2.0 ** 15] * 6


def test_muon_normalises_gradients_that_fp16_cannot_hold(home, tmp_path):
    """The gradient of a step is unscaled before Muon sees it."""
    trainer = make_trainer(home, tmp_path, dtype="fp16", optimizer="muon")
    [muon] = (o for o in trainer.optimizers if isinstance(o, Muon))
    assert muon.dtype == torch.float32


def test_fp8_on_top_of_fp16_is_refused(flags, tmp_path):
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--dtype", "fp16", "--fp8")
    assert said.status == 2 and "fp8 = True is not valid: it must be false where" in said.err
    assert said.err.count("\n") == 1
