"""The learner: equal bytes after any stop.

Pre-training stands for all programs. What a signal or an exit does is seen in processes of their
own.
"""

import contextlib
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training_runs
from kill_and_resume import (
    assert_same_end,
    differences,
    kill_and_resume,
    newest_step,
    start,
    wait_until_it_works,
)
from training_runs import (
    STEPS,
    cut_back,
    everything,
    make_trainer,
    run_train,
)

from minids import train
from minids.base.command_line import Stopped, run_program
from minids.runs import learner
from minids.runs.checkpoints import load_weights, newest_checkpoint, save_checkpoint
from minids.runs.optimizers import Muon, learning_rate_factor
from minids.runs.signals import stopping
from minids.text.loaders import PackedLoader
from minids.train import Trainer

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken


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


def test_a_step_asks_for_loads_before_the_optimizers_work(home, tmp_path, monkeypatch):
    """On a GPU it would wait for them otherwise, after its clock has stopped."""
    trainer, seen = make_trainer(home, tmp_path), []
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: seen.append("loads") or plain(t).clone())
    for optimizer in trainer.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: seen.append("step"))
    monkeypatch.setattr(trainer, "after_update", seen.append)
    monkeypatch.setattr(trainer, "more_metrics", lambda loads, _: dict(given=loads))
    begin = time.perf_counter()
    given = trainer.train_step()["given"]
    assert 0 < trainer.seconds < time.perf_counter() - begin
    *before, on_device = seen
    assert before == ["loads", *["step"] * len(trainer.optimizers)]
    assert given is not on_device and torch.equal(given, on_device)


def test_a_step_tells_its_own_rate_and_not_that_of_indexers(home, tmp_path):
    trainer = make_trainer(home, tmp_path)
    first, *_, last = trainer.optimizers[0].param_groups
    first["peak_lr"], last["peak_lr"] = 0.25, 0.125
    assert trainer.train_step()["lr"] == 0.25 * learning_rate_factor(1, trainer.args)


@pytest.mark.parametrize("threads, device, fixed", [
    (0, "cpu", False), (2, "cpu", True), (0, "cuda", True)])
def test_threads_that_a_user_has_chosen_stay(threads, device, fixed, home, tmp_path, monkeypatch):
    trainer, seen = make_trainer(home, tmp_path, threads=threads, save_every=1), []
    trainer.step, trainer.device = trainer.args.steps, torch.device(device)  # nothing is left to do
    watch = SimpleNamespace(end=lambda: seen.append("end"))
    monkeypatch.setattr(learner, "Threads", lambda fixed, say: seen.append(fixed) or watch)
    trainer.train()
    assert seen == [fixed, "end"]


def test_killed_and_resumed_run_equals_an_unbroken_one(flags, unbroken, tmp_path):
    """A process of its own is killed, wherever it is just then; this one goes on."""
    run = tmp_path / "run"
    with ended(process := start(flags, run)):
        wait_for_steps(process, run, 5)
    assert process.returncode == -signal.SIGKILL and 3 <= newest_step(run) < STEPS
    assert run_train("--resume", "--out", str(run)).status == 0
    assert_same_end(unbroken, run)


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_equals_an_unbroken_one(home, flags, unbroken):
    """`python tests/kill_and_resume.py` has twenty kills, of the default nano run."""
    seconds = json.loads((unbroken / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    kill_and_resume(flags, unbroken, seconds + 1, home / "killed", kills=3)


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


def test_a_run_that_never_began_leaves_no_step_to_resume_from(tmp_path, unbroken, flags):
    """It was to begin with another run's weights, and was killed before its config.json."""
    run = tmp_path / "run"
    save_checkpoint(run, 0, load_weights(newest_checkpoint(unbroken)), {})
    assert run_train(*flags, "--out", str(run)).status == 0
    assert not (run / "checkpoints/step_000000").exists() and differences(unbroken, run) == []


def test_checkpoints_without_their_config_are_not_written_over(tmp_path, unbroken, flags):
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    before = everything(tmp_path / "run")
    said = run_train(*flags, "--out", str(tmp_path / "run"))
    training_runs.assert_refused(said, "out = ", f"step_{STEPS:06d} but no config.json")
    assert everything(tmp_path / "run") == before


@pytest.mark.parametrize("name", [
    "model.safetensors", pytest.param("state.pt", marks=pytest.mark.slow), "manifest.json"])
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

@pytest.fixture(autouse=True)
def not_under_nohup():
    """A closed terminal is told to the tests, and to what they start, as a shell does it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def raise_signals(monkeypatch, numbers: list[int], at_step: int) -> None:
    """Signals that arrive in the middle of a step."""
    accumulate = Trainer.accumulate

    def interrupted(trainer):
        for number in numbers if trainer.step == at_step else []:
            signal.raise_signal(number)
        return accumulate(trainer)

    monkeypatch.setattr(Trainer, "accumulate", interrupted)


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("world", [1, 2])
def test_signals_are_as_before_after_a_run_but_not_in_one_of_many_ranks(world):
    stopped = SimpleNamespace(stop_signal=0, team=SimpleNamespace(world=world, first=True))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with stopping(stopped):
        pass
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert (after == before) == (world == 1)


def test_what_is_ignored_stays_ignored(tmp_path, flags, monkeypatch):
    """As under nohup, where a closed terminal is no reason to stop."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_signals(monkeypatch, [signal.SIGHUP], at_step=5)
    try:
        assert run_train(*flags, "--out", str(tmp_path / "run")).status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signals, status", [(1, 0), (2, 130)])
def test_a_signal_in_the_last_figure(tmp_path, flags, unbroken, monkeypatch, signals, status):
    """The first one lets the run finish; the second stops it, which it says, and it can go on."""
    draw, run = train.loss_curve, tmp_path / "run"

    def interrupted(*given):
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)
        draw(*given)

    monkeypatch.setattr(train, "loss_curve", interrupted)
    said = run_train(*flags, "--out", str(run))
    assert said.status == status
    assert (said.err.splitlines()[-1] == "python -m minids.train: interrupted") == bool(status)
    monkeypatch.undo()
    if status:
        assert run_train("--resume", "--out", str(run)).status == 0
    assert differences(unbroken, run) == [] and (run / "loss.png").exists()


def test_fewer_steps_than_are_done_are_refused(tmp_path, unbroken):
    run = shutil.copytree(unbroken, tmp_path / "run")
    before = everything(run)
    said = run_train("--resume", "--out", str(run), "--steps", "10")
    training_runs.assert_refused(said, f"steps = 10 is not valid: it must be at least {STEPS}")
    assert everything(run) == before


def test_the_next_command_is_quoted(tmp_path, flags):
    run = tmp_path / "a b$(touch x)"
    said = run_train(*flags, "--out", str(run), "--steps", "1")
    words = shlex.split(said.out.splitlines()[-1].removeprefix("next "))
    assert words == ["python", "-m", "minids.generate", "--run", str(run), "--prompt", "def read_"]


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_stop_a_run(tmp_path, flags, unbroken):
    """`python -m minids.train | head -1`."""
    process = start(flags, tmp_path / "run")
    process.stdout.close()  # at once: a run could end before a slow test has read a line
    [line] = process.stderr.read().splitlines()
    assert line == "<stdout> takes no more text (Broken pipe); the program goes on"
    assert process.wait() == 0 and differences(unbroken, tmp_path / "run") == []


@pytest.mark.slow  # its signal is tried above, in this process
def test_a_closed_terminal_saves_the_step(tmp_path, flags):
    """Its signal comes, and nothing can be printed any more."""
    run, (main, child) = tmp_path / "run", os.openpty()
    process = subprocess.Popen([sys.executable, "-m", "minids.train", *flags, "--steps", "100000",
                                "--out", str(run)], cwd=Path(__file__).parents[2], stdin=child,
                               stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    with ended(process):
        wait_for_steps(process, run, 2)
        os.close(main)
        process.send_signal(signal.SIGHUP)
        assert process.wait(600) == 129
    assert newest_step(run) == len((run / "metrics.jsonl").read_text().splitlines())


def test_what_a_resume_changes_stays_changed(tmp_path, unbroken, monkeypatch):
    """The command on the screen goes on to the new end, not to the old one."""
    run = cut_back(unbroken, tmp_path / "run", 9)
    raise_signals(monkeypatch, [signal.SIGTERM], at_step=11)
    assert run_train("--resume", "--out", str(run), "--steps", str(STEPS + 3)).status == 143
    monkeypatch.undo()
    assert run_train("--resume", "--out", str(run)).status == 0
    assert newest_step(run) == STEPS + 3


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """Let no run outlive its test."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for_steps(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Return when so many lines of metrics are there."""
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < steps:
        assert process.poll() is None, "the run has ended"
        time.sleep(0.002)


@pytest.mark.slow  # what signals do is tried above, in this process
def test_signals_to_a_process_of_its_own(tmp_path, flags):
    """SIGTERM to a run that would take long, SIGINT when it is resumed."""
    run = tmp_path / "run"
    for number, status in [(signal.SIGTERM, 143), (signal.SIGINT, 130)]:
        before = newest_step(run)
        process = start([*flags, "--steps", "100000"], run)
        with ended(process):
            wait_until_it_works(process)
            wait_for_steps(process, run, before + 2)
            process.send_signal(number)
            out, err = process.communicate()
        assert process.returncode == status, err
        assert out.endswith(f"python -m minids.train --resume --out {run}\n")
        assert err == "\nfinishing the step and saving ..\n"
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert newest_step(run) == len(lines) > before


FROM = ["--from", str(Path(__file__).parents[2] / "data" / "r1" / "base")]


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize("program, learns, words", [
    ("train", "train", []), ("sft", "sft", FROM), ("grpo", "grpo", FROM), ("r1", "r1", []),
    ("distill", "sft", [*FROM, "--teacher", FROM[1], "--corpus", __file__])])
def test_a_stopped_program_ends_as_its_signal_says(program, learns, words, number, capsys,
                                                   monkeypatch, tmp_path):
    words = ["--out", str(tmp_path / "run"), *words]

    def stop(*_, **__):
        raise Stopped(number, ["--resume", *words[:2]])

    module = importlib.import_module(f"minids.{program}")
    monkeypatch.setattr(module, learns, stop)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit) as end:
        run_program(f"minids.{program}", module.main)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (128 + number, "")
    assert f"stopped; continue with: python -m minids.{program} " in out
    assert set(words[:2]) <= set(out.split())
