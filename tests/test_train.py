"""Pre-training: equal bytes after any stop, one bias update a step, and mistakes in one line.

Most runs call the program's `main` in this process, since importing torch takes seconds; what a
signal or an exit does is seen in processes of their own.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from kill_and_resume import (
    ROOT,
    differences,
    kill_and_resume,
    leaves,
    newest_step,
    start,
    wait_until_it_works,
)

from minids import ModelArgs, train
from minids.base.command_line import run_program
from minids.costs import flops_per_token
from minids.model.moe import Gate, Routing
from minids.runs.checkpoints import load_weights, newest_checkpoint, rng_state
from minids.runs.optimizers import Muon
from minids.runs.settings import TrainArgs
from minids.text.loaders import PackedLoader
from minids.tokenizer import Tokenizer
from minids.train import Trainer

STEPS = 24
VOCABULARY = 320


class Said(NamedTuple):
    """What a program did: exit status and what it wrote."""

    status: int
    out: str
    err: str


def run_train(*flags: str) -> Said:
    """`python -m minids.train` with these flags, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["minids.train", *flags])
        run_program("minids.train", train.main)
    return Said(end.value.code, out.getvalue(), err.getvalue())


def write_texts(folder: Path, documents: int) -> None:
    """Python-like text, the same every time."""
    words, dice = "alpha beta count delta item key row total value".split(), random.Random(0)
    folder.mkdir()
    for i in range(documents):
        functions = [f"def {dice.choice(words)}_{k}({(x := dice.choice(words))}):\n"
                     f"    return {x} + {dice.randrange(100)}\n" for k in range(30)]
        (folder / f"{i:02d}.py").write_text("\n".join(functions))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with texts and a small tokenizer; the runs of this file go there too."""
    home = tmp_path_factory.mktemp("train")
    write_texts(home / "texts", documents=40)
    corpus = (path.read_text() for path in sorted((home / "texts").iterdir()))
    Tokenizer.train(corpus, VOCABULARY).save(home / "tokenizer")
    return home


def settings(home: Path) -> dict:
    """Of a run that takes a second."""
    return dict(data=f"text:{home / 'texts'}", tokenizer=str(home / "tokenizer"), steps=STEPS,
                batch_size=4, seq_len=32, warmup_steps=4, save_every=3, keep_last=0, eval_every=8,
                eval_tokens=512, threads=1)


def as_flags(options: dict) -> list[str]:
    return [word for name, value in options.items()
            for word in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="module")
def flags(home) -> list[str]:
    return ["--preset", "nano", *as_flags(settings(home))]


@pytest.fixture(scope="module")
def unbroken(home, flags) -> Path:
    """A finished run."""
    run = home / "unbroken"
    said = run_train(*flags, "--out", str(run))
    assert (said.status, said.err) == (0, "")
    return run


def cut_back(unbroken: Path, run: Path, step: int) -> Path:
    """A copy of a run as it was after `step` steps and a kill some moments later."""
    shutil.copytree(unbroken, run)
    for name in ("loss.png", "sample.txt"):
        (run / name).unlink()
    for path in (run / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:step + 1]) + lines[step + 1][:20])
    return run


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def make_trainer(home: Path, run: Path, **changes) -> Trainer:
    """A trainer without its program."""
    torch.set_num_threads(1)
    args = TrainArgs.for_preset("nano", **settings(home) | {"out": str(run)} | changes)
    tokenizer = Tokenizer.load(args.tokenizer)
    model_args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size)
    return Trainer(args, model_args, run, tokenizer)


# The same bytes.

def test_seed_decides_the_bytes(home, flags, unbroken):
    again, other = home / "again", home / "other"
    random.random(), np.random.rand(), torch.rand(1)  # what ran before plays no part
    run_train(*flags, "--out", str(again))
    assert differences(unbroken, again) == []
    run_train(*flags, "--out", str(other), "--seed", "1")
    last = f"checkpoints/step_{STEPS:06d}/model.safetensors"
    assert last in differences(unbroken, other)


def test_seed_decides_the_first_weights(home, tmp_path):
    a, b, c = (make_trainer(home, tmp_path, seed=seed).model.head.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_killed_and_resumed_run_equals_an_unbroken_one(home, flags, unbroken):
    """Four kills; `python tests/kill_and_resume.py` has twenty, of the default nano run."""
    seconds = json.loads((unbroken / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    kill_and_resume(flags, unbroken, seconds + 1, home / "killed", kills=4)


def forget_position(loader: PackedLoader, state: dict) -> None:
    """The loader begins at the front of the text again."""


def forget_momentum(optimizer: Muon, state: dict) -> None:
    """The optimizer begins without its running means."""


WRONG_RESUMES = {"loader": (PackedLoader, forget_position), "momentum": (Muon, forget_momentum),
                 "AdamW's means": (torch.optim.AdamW, forget_momentum)}


def test_resumed_run_equals_an_unbroken_one(tmp_path, unbroken):
    run = cut_back(unbroken, tmp_path / "run", 9)
    said = run_train("--resume", "--out", str(run))
    assert said.status == 0 and f"resumed at step 9 of {STEPS}" in said.out
    assert differences(unbroken, run) == []


@pytest.mark.parametrize("name", WRONG_RESUMES)
def test_resume_check_notices_what_is_forgotten(name, tmp_path, unbroken, monkeypatch):
    run = cut_back(unbroken, tmp_path / "run", 9)
    owner, wrong = WRONG_RESUMES[name]
    monkeypatch.setattr(owner, "load_state_dict", wrong)
    run_train("--resume", "--out", str(run))
    assert f"checkpoints/step_{STEPS:06d}/model.safetensors" in differences(unbroken, run)


def test_run_killed_before_its_first_checkpoint_starts_over(tmp_path, unbroken):
    run = cut_back(unbroken, tmp_path / "run", 0)
    said = run_train("--resume", "--out", str(run))
    assert said.status == 0 and differences(unbroken, run) == []


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
def test_flipped_byte_is_named_and_the_checkpoint_before_is_used(name, tmp_path, unbroken):
    run = cut_back(unbroken, tmp_path / "run", 9)
    file = run / "checkpoints/step_000009" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = run_train("--resume", "--out", str(run))
    assert said.status == 0 and "resumed at step 6" in said.out
    assert said.err.count("\n") == 1 and "step_000009" in said.err and name in said.err
    assert differences(unbroken, run) == []


def test_moved_run_goes_on_from_its_folder_alone(tmp_path, unbroken, flags):
    """Finished, with other settings than the defaults, of which no flag says anything."""
    run = tmp_path / "elsewhere"
    shutil.copytree(unbroken, run)
    before = everything(run / "checkpoints")
    said = run_train("--resume", "--out", str(run))
    assert (said.status, said.err) == (0, "")
    assert everything(run / "checkpoints") == before and differences(unbroken, run) == []


# Stopping.

def raise_signals(monkeypatch, numbers: list[int], at_step: int) -> None:
    """Signals that arrive in the middle of a step."""
    accumulate = Trainer.accumulate

    def interrupted(trainer):
        for number in numbers if trainer.step == at_step else []:
            signal.raise_signal(number)
        return accumulate(trainer)

    monkeypatch.setattr(Trainer, "accumulate", interrupted)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_saves(number, status, tmp_path, flags, unbroken,
                                            monkeypatch):
    run = tmp_path / "run"
    raise_signals(monkeypatch, [number], at_step=5)  # between two saves
    said = run_train(*flags, "--out", str(run))
    assert said.status == status and newest_step(run) == 5
    assert said.err == "\nfinishing the step and saving ..\n"
    monkeypatch.undo()
    command = said.out.splitlines()[-1].split("continue with: ")[1]
    program = "python -m minids.train "
    assert command.startswith(program)
    said = run_train(*shlex.split(command.removeprefix(program)))
    shutil.rmtree(run / "checkpoints/step_000005")
    assert said.status == 0 and differences(unbroken, run) == []


def test_second_signal_stops_at_once(tmp_path, flags, monkeypatch):
    raise_signals(monkeypatch, [signal.SIGINT, signal.SIGINT], at_step=5)
    said = run_train(*flags, "--out", str(tmp_path / "run"))
    assert said.status == 130 and newest_step(tmp_path / "run") == 3
    assert "Traceback" not in said.err


def test_what_a_resume_changes_stays_changed(tmp_path, unbroken, monkeypatch):
    """The command on the screen goes on to the new end, not to the old one."""
    run = cut_back(unbroken, tmp_path / "run", 9)
    raise_signals(monkeypatch, [signal.SIGTERM], at_step=11)
    assert run_train("--resume", "--out", str(run), "--steps", str(STEPS + 3)).status == 143
    monkeypatch.undo()
    assert run_train("--resume", "--out", str(run)).status == 0
    assert newest_step(run) == STEPS + 3


def wait_for_steps(run: Path, steps: int) -> None:
    """Return when so many lines of metrics are there."""
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < steps:
        time.sleep(0.002)


def test_signals_to_a_process_of_its_own(tmp_path, flags):
    """SIGTERM to a run that would take long, SIGINT when it is resumed."""
    run = tmp_path / "run"
    for number, status in [(signal.SIGTERM, 143), (signal.SIGINT, 130)]:
        before = newest_step(run)
        process = start([*flags, "--steps", "100000"], run)
        wait_until_it_works(process)
        wait_for_steps(run, before + 2)
        process.send_signal(number)
        out, err = process.communicate()
        assert process.returncode == status, err
        assert out.endswith(f"python -m minids.train --resume --out {run}\n")
        assert err == "\nfinishing the step and saving ..\n"
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert newest_step(run) == len(lines) > before


# One optimizer step.

def gradients(trainer: Trainer) -> tuple[dict, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss parts, loads and gradients of the first batch, in FP64."""
    trainer.model.double()
    trainer.step = 1
    parts, loads = trainer.accumulate()
    return parts, loads, {n: p.grad for n, p in trainer.model.named_parameters()}


def apart(a: tuple, b: tuple) -> float:
    """The largest relative difference between two batches' gradients and loss parts."""
    gaps = [(a[2][name] - grad).norm() / grad.norm() for name, grad in b[2].items()]
    return max(*map(float, gaps), *(abs(a[0][k] / v - 1) for k, v in b[0].items()))


def forgets_to_average(trainer: Trainer) -> Trainer:
    """The wrong variant: micro-batches are added up and not divided by their number."""
    whole = trainer.loss

    def loss(*inputs):
        losses = whole(*inputs)
        return losses._replace(total=losses.total * trainer.args.grad_accum)

    trainer.loss = loss
    return trainer


def test_micro_batches_equal_one_batch(tmp_path, home):
    whole = gradients(make_trainer(home, tmp_path, dtype="fp32"))
    parts = make_trainer(home, tmp_path, dtype="fp32", grad_accum=2)
    halves = gradients(parts)
    # All in FP64: what is left is another order of adding up.
    assert apart(halves, whole) < 1e-10
    assert torch.equal(halves[1], whole[1])
    wrong = make_trainer(home, tmp_path, dtype="fp32", grad_accum=2)
    assert apart(gradients(forgets_to_average(wrong)), whole) > 0.5


def bias_moves_by_the_whole_batch(trainer: Trainer) -> bool:
    """After one step each bias has moved by the speed, against the loads of the whole batch."""
    args, total = trainer.args, 0
    step, seen = trainer.loss, []

    def loss(*inputs):
        seen.append(step(*inputs))
        return seen[-1]

    trainer.loss = loss
    trainer.train_step()
    total = sum(losses.loads for losses in seen)
    assert len(seen) == args.grad_accum
    tokens = args.batch_size * (args.seq_len + args.seq_len - 1)  # the MTP module has one fewer
    assert total.sum() == tokens * trainer.model.args.n_activated_experts
    expected = args.bias_speed * (total.float().mean(1, keepdim=True) - total).sign()
    return all(torch.equal(bias, e)
               for bias, e in zip(trainer.model.gate_biases(), expected, strict=True))


def moves_bias_per_micro_batch(trainer: Trainer) -> Trainer:
    """The wrong variant: the biases move after each micro-batch, then not after the step."""
    whole, update = trainer.loss, trainer.model.update_gate_bias

    def loss(*inputs):
        losses = whole(*inputs)
        update(losses.loads, trainer.args.bias_speed)
        return losses

    trainer.loss = loss
    trainer.model.update_gate_bias = lambda loads, speed: None
    return trainer


def test_bias_moves_once_a_step(tmp_path, home):
    options = dict(grad_accum=4, bias_speed=0.25)  # exact in FP32
    assert bias_moves_by_the_whole_batch(make_trainer(home, tmp_path, **options))
    wrong = moves_bias_per_micro_batch(make_trainer(home, tmp_path, **options))
    assert not bias_moves_by_the_whole_batch(wrong)


def loads_counted_in_forward(trainer: Trainer) -> torch.Tensor:
    """The wrong variant: what a gate that counts in its forward pass would pass on."""
    counted = {}

    def count(gate: Gate, inputs, output: tuple[torch.Tensor, Routing]) -> None:
        counted[gate] = counted.get(gate, 0) + output[1].load()

    for module in trainer.model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(count)
    trainer.step = 1
    trainer.accumulate()
    return torch.stack(list(counted.values()))


def test_recomputing_changes_nothing(tmp_path, home):
    """The same products in the same order: equal bits, and no token counted twice."""
    plain, recomputing = (make_trainer(home, tmp_path, recompute=r) for r in (False, True))
    for _ in range(3):
        a, b = plain.train_step(), recomputing.train_step()
        for measured in ("tokens_per_s", "seconds", "memory_mib"):
            del a[measured], b[measured]
        assert a == b
    for (name, p), q in zip(plain.model.state_dict().items(),
                            recomputing.model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    recomputing.step = plain.step = 1
    loads = recomputing.accumulate()[1]
    assert torch.equal(loads, plain.accumulate()[1])
    wrong = loads_counted_in_forward(make_trainer(home, tmp_path, recompute=True))
    assert wrong.sum() == 2 * loads.sum()


def whole_state(trainer: Trainer) -> dict[str, object]:
    """Every bit that decides how a run goes on."""
    return dict(leaves(dict(
        weights=dict(trainer.model.state_dict()), loader=trainer.data.loader.state_dict(),
        optimizers=[o.state_dict() for o in trainer.optimizers],
        grads=[p.grad is None for p in trainer.model.parameters()],
        rng=rng_state(), step=trainer.step, recent_loss=trainer.recent_loss)))


def moves_something(trainer: Trainer) -> list[str]:
    """What a validation and a sample change."""
    before = whole_state(trainer)
    trainer.validate(256)
    trainer.sample(8)
    after = whole_state(trainer)
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def test_evaluation_moves_nothing(tmp_path, home):
    trainer = make_trainer(home, tmp_path)
    trainer.train_step()
    assert moves_something(trainer) == []

    def move_bias(*call):
        trainer.model.gate_biases()[0].add_(0.01)

    trainer.model.norm.register_forward_hook(move_bias)
    assert moves_something(trainer) == [".weights.layers.1.ffn.gate.bias"]


def test_validation_and_samples_leave_the_weights_alone(tmp_path, unbroken, flags):
    run = tmp_path / "run"
    run_train(*flags, "--out", str(run), "--eval-every", "1", "--sample-every", "3",
              "--save-every", str(STEPS))
    name = f"checkpoints/step_{STEPS:06d}/model.safetensors"
    assert (run / name).read_bytes() == (unbroken / name).read_bytes()


@pytest.mark.slow  # compiling takes more than a minute
def test_compiled_run_has_nearly_the_same_loss(tmp_path, flags):
    records = []
    for option in ([], ["--compile"]):
        run = tmp_path / f"run{len(option)}"
        said = run_train(*flags, "--out", str(run), "--steps", "3", *option)
        assert said.status == 0
        records.append([json.loads(s) for s in (run / "metrics.jsonl").read_text().splitlines()])
    for plain, compiled in zip(*records, strict=True):
        # Fused kernels round in other places; BF16 keeps 8 bits, averaged over 128 positions.
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert records[0][-1]["loss"] < records[0][0]["loss"] - 0.1  # more than 1e-3, so it trained


# A loss that is no number, and a spike.

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


# What a run leaves behind.

LISTED = {"step", "loss", "main", "mtp", "balance", "lr", "grad_norm", "tokens_per_s", "max_vio",
          "memory_mib", "seconds", "tokens"}


def test_metrics_have_one_whole_line_a_step(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        extra = {"valid_bpb", "valid_max_vio", "valid_loads", "loads", "biases", "mfu"}
        assert line.keys() - extra == LISTED
        parts = line["main"] + 0.3 * line["mtp"] + 1e-4 * line["balance"]
        late = line["main"] + 0.1 * line["mtp"] + 1e-4 * line["balance"]
        assert min(abs(line["loss"] - parts), abs(line["loss"] - late)) < 1e-5
        assert len(line["max_vio"]) == 2 and line["memory_mib"] > 50
    assert [line["step"] for line in lines if "valid_bpb" in line] == [8, 16, 24]
    assert [line["step"] for line in lines if "loads" in line] == [10, 20]
    assert [line["step"] for line in lines if "valid_loads" in line] == [8, 16, 24]
    for line in lines:
        for load, vio in zip(line.get("loads", []), line["max_vio"], strict="loads" in line):
            assert max(load) / (sum(load) / len(load)) - 1 == pytest.approx(vio, abs=1e-4)
        assert all(map(any, line.get("biases", [])))  # they have moved
    assert lines[-1]["main"] < lines[0]["main"] - 0.5  # it learns


def test_model_flops_utilisation_needs_a_known_peak(tmp_path, home, unbroken, monkeypatch):
    assert "mfu" not in (unbroken / "metrics.jsonl").read_text()  # no one peak for a CPU
    trainer = make_trainer(home, tmp_path)
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    rate = 989e12 / flops_per_token(trainer.model.args, trainer.args.seq_len)
    assert trainer.model_flops_utilisation(rate / 4) == 0.25
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard Of 9000")
    assert trainer.model_flops_utilisation(rate) is None


def test_run_folder_describes_itself(home, unbroken):
    config = json.loads((unbroken / "config.json").read_text())
    model, args = ModelArgs(**config["model"]), TrainArgs(**config["train"])
    expected = settings(home) | {"out": str(unbroken)}
    assert args == TrainArgs.for_preset("nano", **expected)
    assert asdict(model) == asdict(replace(ModelArgs.preset("nano"), vocab_size=VOCABULARY))
    tokenizer = Tokenizer.load(unbroken / "tokenizer")
    assert config["tokenizer"] == tokenizer.fingerprint
    assert config["versions"].keys() >= {"minids", "torch", "python"}
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (unbroken / "sample.txt").read_text().startswith("def")


def test_dense_model_trains(tmp_path, flags):
    """Without experts there is no load and no balance to tell."""
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--steps", "2",
                     "--n-routed-experts", "0")
    assert said.status == 0 and "MaxVio" not in said.out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["max_vio"] for line in lines] == [[], []]


def test_end_says_what_was_reached_and_what_to_do_next(tmp_path, flags):
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--steps", "2")
    assert "bits per byte" in said.out and "MaxVio of each layer" in said.out
    assert f"python -m minids.generate --run {tmp_path / 'run'} --prompt" in said.out


def test_runs_without_a_name_lie_side_by_side(tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_train(*flags, "--steps", "1").status == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["nano", "nano-2"]
    assert "run     runs/nano-2" in run_train("--preset", "nano", "--resume").out


# A run that begins with another's weights; the stages of sparse attention.

DSA_STEPS = 9


@pytest.fixture(scope="module")
def warm(home, unbroken) -> Path:
    """The warm-up of the finished run's indexers."""
    run = home / "warm"
    said = run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", str(DSA_STEPS),
                     "--out", str(run))
    assert (said.status, said.err) == (0, "")
    assert f"minids.train --from {run} --dsa sparse" in said.out
    return run


@pytest.fixture(scope="module")
def sparse(home, warm) -> Path:
    """The stage after it."""
    run = home / "sparse"
    said = run_train("--from", str(warm), "--dsa", "sparse", "--steps", str(DSA_STEPS),
                     "--out", str(run))
    assert (said.status, said.err) == (0, "")
    assert f"minids.evaluate --run {run} --selections" in said.out
    return run


def weights_of(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    step = newest_step(run) if step is None else step
    return load_weights(run / f"checkpoints/step_{step:06d}")


def moved(before: dict, after: dict) -> set[str]:
    """The names of what is not the same, bit for bit, in both."""
    return {name for name in after if name not in before
            or not torch.equal(before[name], after[name])}


def test_the_warmup_moves_nothing_but_the_indexers(unbroken, warm):
    dense, begun, ended = weights_of(unbroken), weights_of(warm, 0), weights_of(warm)
    indexers = {name for name in begun if ".indexer." in name}
    assert len(indexers) == 3 * 5  # of two layers and the MTP module
    assert moved(dense, begun) == indexers == moved(begun, ended)
    lines = read_records(warm)
    assert lines[-1]["indexer"] < lines[0]["indexer"]
    assert all(line["grad_norm"] == 0 < line["indexer_grad_norm"] for line in lines)
    assert all(line["lr"] == 3e-3 for line in lines)  # the indexers'


def test_the_sparse_stage_moves_everything(warm, sparse):
    assert weights_of(sparse, 0).keys() == weights_of(warm).keys()
    assert moved(weights_of(warm), weights_of(sparse, 0)) == set()
    rest = weights_of(warm).keys() - moved(weights_of(warm), weights_of(sparse))
    assert all(name.endswith("gate.bias") for name in rest)  # these go up and down by equal steps
    for line in read_records(sparse):
        parts = (line["main"] + 0.1 * line["mtp"] + 1e-4 * line["balance"] + line["indexer"])
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_check_of_the_warmup_notices(home, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "freeze_all_but_indexers", lambda model: None)
    run = tmp_path / "run"
    run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", "1", "--out", str(run))
    assert "layers.0.attn.wo.weight" in moved(weights_of(unbroken), weights_of(run))


def read_records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["warm", "sparse"])
def test_a_stage_has_the_same_bytes_twice(stage, tmp_path, request, unbroken, warm):
    """From the command line, and by the settings that its folder states."""
    first = request.getfixturevalue(stage)
    config = json.loads((first / "config.json").read_text())
    args = TrainArgs(**config["train"] | {"out": str(tmp_path / "again")})
    with contextlib.redirect_stdout(io.StringIO()):
        again = train.train(args)
    assert differences(first, again) == []
    other = replace(args, indexer_lr=2e-3, out=str(tmp_path / "other"))
    with contextlib.redirect_stdout(io.StringIO()):
        assert differences(first, train.train(other)) != []


@pytest.mark.parametrize("step", [0, 6])
@pytest.mark.parametrize("stage", ["warm", "sparse"])
def test_a_resumed_stage_equals_an_unbroken_one(stage, step, tmp_path, request, home, monkeypatch):
    """From its folder alone, also when it was killed before its first step was saved."""
    first = request.getfixturevalue(stage)
    run = cut_back(first, tmp_path / "run", step)
    config = json.loads((run / "config.json").read_text())
    config["train"]["from_run"] = str(tmp_path / "is gone")
    (run / "config.json").write_text(json.dumps(config))
    said = run_train("--resume", "--out", str(run))
    assert said.status == 0 and f"resumed at step {step} of {DSA_STEPS}" in said.out
    assert differences(first, run) == []
    assert json.loads((run / "config.json").read_text())["source"] == config["source"]


def test_killed_and_resumed_stage_equals_an_unbroken_one(home, warm, sparse):
    seconds = read_records(sparse)[-1]["seconds"]
    flags = ["--from", str(warm), "--dsa", "sparse", "--steps", str(DSA_STEPS)]
    kill_and_resume(flags, sparse, seconds + 1, home / "killed-sparse", kills=1)


def test_a_stages_folder_says_what_it_began_with(home, unbroken, warm):
    config = json.loads((warm / "config.json").read_text())
    checkpoint = newest_checkpoint(unbroken)
    assert config["source"] == {
        "checkpoint": str(checkpoint),
        "sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()}
    before = json.loads((unbroken / "config.json").read_text())
    assert "source" not in before
    differing = {k for k, v in config["train"].items() if before["train"][k] != v}
    assert differing == {"out", "from_run", "dsa", "steps", "warmup_steps", "constant_until",
                         "mtp_weight", "indexer_lr"}
    model = ModelArgs(**config["model"])
    assert (model.index_n_heads, model.index_head_dim, model.index_topk) == (4, 16, 4)
    assert replace(model, index_n_heads=0, index_head_dim=32, index_topk=128) == ModelArgs(
        **before["model"])
    assert config["tokenizer"] == before["tokenizer"]


def test_a_longer_context_and_another_indexer_can_be_asked_for(tmp_path, unbroken):
    run = tmp_path / "run"
    said = run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", "1", "--out", str(run),
                     "--seq-len", "300", "--max-seq-len", "300", "--batch-size", "1",
                     "--index-n-heads", "2", "--index-topk", "7", "--index-fp8")
    assert said.status == 0, said.err
    model = json.loads((run / "config.json").read_text())["model"]
    assert [model[f"index_{n}"] for n in ("n_heads", "head_dim", "topk", "fp8")] == [2, 16, 7, True]
    assert model["max_seq_len"] == 300


def test_the_default_indexer_at_v3s_size_is_v32s():
    v3, v32 = (asdict(ModelArgs.preset(name)) for name in ("v3", "v3.2"))
    args = TrainArgs.for_preset("v3", from_run="x", dsa="warmup")
    assert v3 | train.default_indexer(v3, args.seq_len) == v32


def test_a_dense_model_goes_on(tmp_path, unbroken, sparse):
    """The control: equal steps, batches and learning rates as in the sparse stage."""
    run = tmp_path / "run"
    said = run_train("--from", str(unbroken), "--steps", str(DSA_STEPS), "--out", str(run))
    assert said.status == 0 and "generate" in said.out
    assert moved(weights_of(unbroken), weights_of(run, 0)) == set()
    dense, other = (json.loads((r / "config.json").read_text())["train"] for r in (run, sparse))
    assert {k for k in dense if dense[k] != other[k]} == {"out", "from_run", "dsa"}
    assert "indexer" not in read_records(run)[0]


def test_runs_after_others_are_named_after_them(tmp_path, unbroken, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken, tmp_path / "runs/x")
    for words in (["--from", "runs/x", "--dsa", "warmup"], ["--from", "runs/x", "--dsa", "warmup"],
                  ["--from", "runs/x-warm", "--dsa", "sparse"],
                  ["--from", f"runs/x/checkpoints/step_{STEPS:06d}"]):
        assert run_train(*words, "--steps", "1").status == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "x", "x-more", "x-sparse", "x-warm", "x-warm-2"]


# Mistakes: one line on stderr, exit status 2, nothing written and nothing lost.

def assert_refused(said: Said, *words: str) -> None:
    lines = said.err.splitlines()
    assert said.status == 2 and len(lines) == 1, said
    assert lines[0].startswith("python -m minids.train: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


BAD = {
    "unknown preset": (["--preset", "tinny"], "preset 'tinny'", "did you mean 'tiny'?"),
    "unknown flag": (["--warm-up-steps", "3"], "--warm-up-steps", "'--warmup-steps'"),
    "not a number": (["--steps", "many"], "--steps", "'many'"),
    "no heads": (["--n-heads", "0"], "n_heads = 0", "at least 1"),
    "odd rotary width": (["--qk-rope-head-dim", "7"], "qk_rope_head_dim = 7", "even"),
    "longer than the model": (["--seq-len", "300"], "seq_len = 300", "max_seq_len = 256"),
    "longer than the text": (["--data", "text:{home}/short.txt", "--seq-len", "200"],
                             "seq_len = 200 is longer than the text", "at most"),
    "longer than the held-out text": (["--data", "text:{home}/short.txt", "--seq-len", "20"],
                                      "seq_len = 20 is longer than the validation text"),
    "too short to predict two tokens": (["--seq-len", "1"], "seq_len = 1", "n_mtp_layers = 1"),
    "prompt longer than the model": (["--prompt", "x " * 300], "prompt = 'x x ", "max_seq_len"),
    "unknown device": (["--device", "gpu"], "device = 'gpu'", "cuda"),
    "empty file": (["--data", "text:{home}/empty.txt"], "empty.txt is empty"),
    "binary file": (["--data", "text:{home}/binary.txt"], "binary.txt is binary"),
    "folder without text": (["--data", "text:{home}/pictures"], "pictures", "no text"),
    "no such folder": (["--data", "text:{home}/textes"], "textes", "did you mean 'texts'?"),
    "unknown corpus": (["--data", "pystdlip"], "data = 'pystdlip'", "did you mean 'pystdlib'?"),
    "no such tokenizer": (["--tokenizer", "{home}/texts"], "no whole tokenizer in", "texts"),
    "vocabulary too small": (["--vocab-size", "64"], "vocab_size = 64", f"at least {VOCABULARY}"),
    "does not divide": (["--grad-accum", "3"], "grad_accum = 3", "batch_size = 4"),
    "resume of nothing": (["--preset", "small", "--resume"], "no run of minids.train with preset",
                          "'small'"),
}


@pytest.fixture(scope="module")
def bad_files(home) -> None:
    (home / "short.txt").write_text("def f(x):\n    return x\n" * 4)
    (home / "empty.txt").write_text("")
    (home / "binary.txt").write_bytes(bytes(range(256)))
    (home / "pictures").mkdir()
    (home / "pictures/a.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_line_and_writes_nothing(name, tmp_path, home, flags, bad_files,
                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, *words = BAD[name]
    bad = [word.format(home=home) for word in bad]
    assert_refused(run_train(*flags, *bad), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_where_there_is_none(tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_train(*flags, "--device", "cuda"), "device = 'cuda'", "cpu")
    assert list(tmp_path.iterdir()) == []


BAD_STAGES = {
    "stage without a model": (["--dsa", "warmup"], "dsa = 'warmup'", "--from"),
    "unknown stage": (["--from", "{warm}", "--dsa", "warm"], "--dsa", "'warm'"),
    "no such run": (["--from", "{home}/warmer"], "warmer", "did you mean 'warm'?"),
    "no run": (["--from", "{home}/texts"], "texts holds no checkpoint"),
    "other preset": (["--from", "{warm}", "--dsa", "sparse", "--preset", "tiny"],
                     "preset = 'tiny'", "has 'nano'"),
    "other tokenizer": (["--from", "{warm}", "--dsa", "sparse", "--tokenizer", "{home}/tokenizer"],
                        "tokenizer = ", "knows the one in"),
    "other width": (["--from", "{warm}", "--dsa", "sparse", "--dim", "128"], "dim = 128",
                    "have 64"),
    "other indexer": (["--from", "{warm}", "--dsa", "sparse", "--index-n-heads", "2"],
                      "index_n_heads = 2", "have 4"),
    "indexer too narrow": (["--from", "{unbroken}", "--dsa", "warmup", "--index-head-dim", "4"],
                           "index_head_dim = 4", "8 or more"),
    "indexer that does not learn": (["--from", "{warm}"], "index_n_heads = 4", "--dsa"),
    "indexer from the start": (["--preset", "nano", "--index-n-heads", "4"], "index_n_heads = 4",
                               "--from RUN --dsa warmup"),
    "too long": (["--from", "{unbroken}", "--dsa", "warmup", "--seq-len", "300"], "seq_len = 300",
                 "max_seq_len = 256"),
}


@pytest.mark.parametrize("name", BAD_STAGES)
def test_mistake_in_a_stage_is_one_line_and_writes_nothing(name, tmp_path, home, unbroken, warm,
                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, *words = BAD_STAGES[name]
    before = everything(warm)
    bad = [word.format(home=home, unbroken=unbroken, warm=warm) for word in bad]
    assert_refused(run_train(*bad, "--out", str(tmp_path / "run")), *words)
    assert list(tmp_path.iterdir()) == [] and everything(warm) == before


OTHER = {
    "other stage": (["--resume", "--dsa", "sparse"], "dsa = 'sparse'", "has ''"),
    "other seed": (["--resume", "--seed", "1"], "seed = 1", "has 0"),
    "other width": (["--resume", "--dim", "128"], "dim = 128", "has 64"),
    "other text": (["--resume", "--data", "pystdlib"], "data = 'pystdlib'", "has 'text:"),
    "other tokenizer": (["--resume", "--tokenizer", "x"], "tokenizer = 'x'", "has '"),
    "without --resume": (["--steps", "99"], "holds a run already", "--resume"),
}


@pytest.mark.parametrize("name", OTHER)
def test_run_of_another_configuration_is_left_alone(name, unbroken):
    bad, *words = OTHER[name]
    before = everything(unbroken)
    assert_refused(run_train("--preset", "nano", "--out", str(unbroken), *bad), *words)
    assert everything(unbroken) == before


def test_tokenizer_of_another_run_is_refused(tmp_path, home, unbroken):
    """The run folder's own tokenizer was exchanged."""
    run = cut_back(unbroken, tmp_path / "run", 9)
    texts = (path.read_text() for path in sorted((home / "texts").iterdir()))
    Tokenizer.train(texts, VOCABULARY - 10).save(run / "tokenizer")
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), "tokenizer in", "is not the run's")
    assert everything(run) == before


def test_run_without_a_whole_checkpoint_is_left_alone(tmp_path, unbroken):
    """To begin again at step 1 would write over what may still be saved."""
    run = cut_back(unbroken, tmp_path / "run", 6)
    for file in run.glob("checkpoints/*/state.pt"):
        file.write_bytes(b"cut short")
    before = everything(run)
    said = run_train("--resume", "--out", str(run))
    *refusals, last = said.err.splitlines()
    assert said.status == 2 and len(refusals) == 2 and "state.pt has 9 bytes" in refusals[0]
    assert "holds no whole checkpoint: all 2 of them were refused" in last
    assert everything(run) == before


@pytest.mark.parametrize("text", ["{}", '{"model": {"later": 1}, "train": {}}', '{"mod'])
def test_config_of_another_version_is_refused(text, tmp_path, unbroken):
    run = cut_back(unbroken, tmp_path / "run", 6)
    (run / "config.json").write_text(text)
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), f"{run / 'config.json'} is damaged")
    assert everything(run) == before


def test_changed_text_is_refused(tmp_path, home, flags):
    shutil.copytree(home / "texts", tmp_path / "texts")
    run = tmp_path / "run"
    raised = run_train(*flags, "--data", f"text:{tmp_path / 'texts'}", "--out", str(run))
    assert raised.status == 0
    (tmp_path / "texts/00.py").write_text("x = 1\n" * 99)
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), "data = ")
    assert everything(run) == before


def in_process(*flags: str, cwd: Path, **environment: str) -> Said:
    """`python -m minids.train` in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "minids.train", *flags], cwd=cwd, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": path} | environment)
    return Said(done.returncode, done.stdout, done.stderr)


def test_mistake_in_a_process_of_its_own(tmp_path, flags):
    """No library writes a line of its own to stderr, and no half-made folder is left."""
    said = in_process(*flags, "--seq-len", "300", cwd=tmp_path)
    assert_refused(said, "seq_len = 300")
    said = in_process(*flags, "--data", "hf:roneneldan/TinyStories", cwd=tmp_path,
                      HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(said, "no network")
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_said_within_two_seconds(tmp_path, flags, monkeypatch):
    """Nobody listens on port 9. Two seconds besides the import of torch, which is done here."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    said = run_train(*flags, "--data", "hf:roneneldan/TinyStories", "--out", str(tmp_path / "run"))
    assert time.monotonic() - begin < 2
    assert_refused(said, "no network", "127.0.0.1:9", "pystdlib")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB: room for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_leaves_the_last_checkpoint(small_disk, tmp_path, flags, unbroken):
    run = small_disk / "run"
    said = run_train(*flags, "--out", str(run))
    good = newest_checkpoint(run)
    assert_refused(said, "could not be written", "No space left on device", str(good))
    shutil.move(run, tmp_path / "larger")  # to a disk with room
    said = run_train("--resume", "--out", str(tmp_path / "larger"))
    assert said.status == 0 and differences(unbroken, tmp_path / "larger") == []


def test_fp8_rounds_the_products(home, flags, unbroken):
    """The first loss, before any update, moves a little: a run with --fp8 does not train wide."""
    run = home / "fp8"
    said = run_train(*flags, "--fp8", "--steps", "1", "--out", str(run))
    assert (said.status, said.err) == (0, "")
    wide, rounded = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["main"]
                     for folder in (unbroken, run))
    assert wide != rounded and abs(rounded / wide - 1) < 0.01
