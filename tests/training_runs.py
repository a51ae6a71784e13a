"""Small pre-training runs that several test files use: a home with texts, a finished run, trainers.

Most runs call the program's `main` in this process, since importing torch takes seconds.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kill_and_resume import (
    leaves,
)

from minids import ModelArgs, train
from minids.base.command_line import run_program
from minids.runs.checkpoints import rng_state
from minids.runs.settings import TrainArgs
from minids.tokenizer import Tokenizer
from minids.train import Trainer

STEPS = 18
VOCABULARY = 320
SAMPLED = 40  # longest text; else the sample at a run's end takes twice the time of its steps


class Said(NamedTuple):
    """What a program did: exit status and what it wrote."""

    status: int
    out: str
    err: str


def left_by(process: int, leave: Callable) -> Callable:
    """Return what stands for `os._exit` in this process, which is to go on; in forks it is real."""
    return lambda status: sys.exit(status) if os.getpid() == process else leave(status)


def run_main(module, *flags: str) -> Said:
    """`python -m` with this module and these flags, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [module.__name__, *flags])
        patch.setattr(os, "fsync", lambda handle: None)  # no power fails here; it takes its time
        patch.setattr(os, "_exit", left_by(os.getpid(), os._exit))
        run_program(module.__name__, module.main)
    return Said(end.value.code, out.getvalue(), err.getvalue())


DRAW = train.loss_curve


def no_picture(metrics: list[dict], path: Path) -> None:
    """Stand for the figure at a run's end, which takes a third of a short run's time."""
    Path(path).write_bytes(b"\x89PNG")


SAMPLE = Trainer.sample


def short_sample(trainer: Trainer, _: int, count: int = 1) -> list[str]:
    """Stand for the samples at a run's end: sixteen texts take longer than a few steps."""
    return SAMPLE(trainer, 2, count)


def run_train(*flags: str) -> Said:
    """`python -m minids.train` with these flags, in this process; its figure is not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        if train.loss_curve is DRAW:  # a test may have put another one there
            patch.setattr(train, "loss_curve", no_picture)
        return run_main(train, *flags)


def write_texts(folder: Path, documents: int) -> None:
    """Python-like text, the same every time."""
    words, dice = "alpha beta count delta item key row total value".split(), random.Random(0)
    folder.mkdir(parents=True)
    for i in range(documents):
        functions = [f"def {dice.choice(words)}_{k}({(x := dice.choice(words))}):\n"
                     f"    return {x} + {dice.randrange(100)}\n" for k in range(30)]
        (folder / f"{i:02d}.py").write_text("\n".join(functions))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with texts and a small tokenizer; runs go there too, under names of their own.

    All test files of a process have the same one, and the same finished run in it.
    """
    home = tmp_path_factory.getbasetemp() / "train"
    if not home.exists():
        write_texts(home / "texts", documents=40)
        corpus = (path.read_text() for path in sorted((home / "texts").iterdir()))
        Tokenizer.train(corpus, VOCABULARY).save(home / "tokenizer")
    return home


def settings(home: Path) -> dict:
    """Of a run that takes a second, at the end of which its attention has something to look at."""
    return dict(data=f"text:{home / 'texts'}", tokenizer=str(home / "tokenizer"), steps=STEPS,
                muon_lr=0.01, batch_size=4, seq_len=32, warmup_steps=4, save_every=3, keep_last=0,
                eval_every=9, eval_tokens=512, threads=1)


def as_flags(options: dict) -> list[str]:
    return [word for name, value in options.items()
            for word in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="module")
def flags(home) -> list[str]:
    return ["--preset", "nano", "--max-seq-len", str(SAMPLED), *as_flags(settings(home))]


@pytest.fixture(scope="module")
def unbroken(home, flags) -> Path:
    """A finished run, which no test changes; its figure is drawn."""
    run = home / "unbroken"
    if not run.exists():
        said = run_main(train, *flags, "--out", str(run))
        assert (said.status, said.err) == (0, "")
    return run


def cut_back(unbroken: Path, run: Path, step: int) -> Path:
    """A copy of a run as it was after `step` steps and a kill some moments later."""
    shutil.copytree(unbroken, run)
    for name in ("loss.png", "sample.txt"):
        (run / name).unlink(missing_ok=True)  # only pre-training writes them
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


def read_records(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def make_trainer(home: Path, run: Path, **changes) -> Trainer:
    """A trainer without its program."""
    torch.set_num_threads(1)
    args = TrainArgs.for_preset("nano", **settings(home) | {"out": str(run)} | changes)
    tokenizer = Tokenizer.load(args.tokenizer)
    model_args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size,
                         max_seq_len=SAMPLED)
    return Trainer(args, model_args, run, tokenizer)


def whole_state(trainer: Trainer) -> dict[str, object]:
    """Every bit that decides how a run goes on."""
    return dict(leaves(dict(
        weights=dict(trainer.model.state_dict()), loader=trainer.data.loader.state_dict(),
        optimizers=[o.state_dict() for o in trainer.optimizers],
        grads=[p.grad is None for p in trainer.model.parameters()],
        rng=rng_state(), step=trainer.step, recent_loss=trainer.recent_loss)))


def assert_refused(said: Said, *words: str) -> None:
    """One line on stderr that has these words, exit status 2."""
    lines = said.err.splitlines()
    assert said.status == 2 and len(lines) == 1, said
    assert lines[0].startswith("python -m minids.train: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
