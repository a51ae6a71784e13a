"""One loop for every program that learns: steps, metrics, checkpoints, signals, resuming.

`Learner` holds a model, its optimizers and where it stands; a program says what a step is, what is
measured on the way and what else its state holds. A run folder has config.json (every setting),
tokenizer/, metrics.jsonl (one object a step) and checkpoints/step_NNNNNN/. On one machine a run
that was stopped at any moment and resumed ends with the same bytes as one that was not; Ctrl-C
finishes the step and saves.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import platform
import random
import resource
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minids import __version__
from minids.base.files import read_jsonl, write_json
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.hf import inspect, is_hf_folder, load_hf
from minids.model.sparse_attention import load_weights_without_indexer
from minids.model.transformer import Transformer
from minids.runs.checkpoints import (
    checkpoints,
    load_state,
    load_weights,
    newest_checkpoint,
    pick_device,
    read_manifest,
    resolve,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from minids.runs.settings import LearnArgs
from minids.text.tokenizer import Tokenizer


class Stopped(Exception):
    """The run was asked to stop and has saved its state; holds the signal's number."""


class Learner:
    """One run: the model, its optimizers, and where it stands.

    A program adds `optimizers`, `train_step`, `measure`, `brief` and `line`.

    program: what the run's settings are called in config.json
    numbers: attributes that a checkpoint's state holds, besides optimizers and generators
    run: the run's folder
    """

    program = ""
    numbers: tuple[str, ...] = ("step", "seconds")

    def __init__(self, args, model_args: ModelArgs, run: Path, tokenizer: Tokenizer):
        self.args, self.run, self.tokenizer = args, run, tokenizer
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        check_memory(model_args, self.device)
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(args.seed)  # all the generators that a checkpoint holds
        self.model = Transformer(model_args).to(self.device)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.step, self.seconds = 0, 0.0
        self.stop_signal = 0
        self.source: dict | None = None  # what this run began with
        self.metrics: list[dict] = []

    def train_step(self) -> dict:
        """One optimizer step; returns its line of metrics."""
        raise NotImplementedError

    def measure(self, record: dict, last: bool) -> float | None:
        """Add to a step's metrics what is measured now and then.

        Returns what the best checkpoint is judged by, lower is better; None if nothing was measured
        """
        raise NotImplementedError

    def brief(self, record: dict) -> str:
        """What the progress bar says beside the count."""
        raise NotImplementedError

    def line(self, record: dict) -> str:
        """What a log file shows in place of a progress bar."""
        raise NotImplementedError

    def more_state(self) -> dict:
        """What else a checkpoint has to hold."""
        return {}

    def restore_more(self, state: dict) -> None:
        """Take `more_state` back."""

    def more_config(self) -> dict:
        """What else config.json says."""
        return {}

    def autocast(self):
        """BF16 products over FP32 weights, where the run has them."""
        on = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def begin_from(self, checkpoint: Path) -> None:
        """Take the weights of another run, and save them as step 0, so that this one's folder is
        all that a resumed run needs."""
        self.source = dict(checkpoint=str(checkpoint))
        if is_hf_folder(checkpoint):
            weights = load_hf(checkpoint).state_dict()
        else:
            weights = load_weights(checkpoint)
            digest = read_manifest(checkpoint)["files"]["model.safetensors"]["sha256"]
            self.source |= dict(sha256=digest)
        load_weights_without_indexer(self.model, weights)
        self.save()

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        self.source = json.loads((self.run / "config.json").read_text()).get("source")
        checkpoint = resolve(self.run) if checkpoints(self.run) else None
        if checkpoint is not None:
            self.model.load_state_dict(load_weights(checkpoint))
            state = load_state(checkpoint)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                peaks = [group["peak_lr"] for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["peak_lr"] = peak  # this run's setting, not the saved one
            self.restore_more(state)
            set_rng_state(state["rng"])
            for name in self.numbers:
                setattr(self, name, state[name])
        self.metrics = [m for m in read_metrics(self.run) if m["step"] <= self.step]
        lines = "".join(json.dumps(m) + "\n" for m in self.metrics)
        replacement = self.run / "metrics.jsonl.new"
        replacement.write_text(lines)
        replacement.replace(self.run / "metrics.jsonl")

    def save(self, metric: float | None = None) -> Path:
        """Write a checkpoint of this step, unless a weight in it is no number.

        metric: measured at this very step; without it the checkpoint is never the best one
        """
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged("a weight is no longer a finite number")
        state = dict(optimizers=[o.state_dict() for o in self.optimizers], rng=rng_state(),
                     **self.more_state(), **{name: getattr(self, name) for name in self.numbers})
        return save_checkpoint(self.run, self.step, self.model.state_dict(), state,
                               self.args.keep_last, metric)

    def train(self) -> None:
        """All steps that are left, with a bar, measurements and checkpoints on the way."""
        args = self.args
        bar = tqdm(total=args.steps, initial=self.step, unit="step", disable=None)
        with bar:
            while self.step < args.steps:
                record = self.train_step()
                last = self.step == args.steps
                metric = self.measure(record, last)
                self.write_record(record)
                bar.update()
                bar.set_postfix_str(self.brief(record))
                if bar.disable and (last or metric is not None):
                    print(self.line(record), flush=True)
                if self.step % args.save_every == 0 or last or self.stop_signal:
                    self.save(metric)
                if self.stop_signal and not last:
                    raise Stopped(self.stop_signal)

    def check_finite(self, loss: float, norm: float) -> None:
        """Stop before a loss or gradient that is no number reaches the weights."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self.diverged(f"the loss is {loss} and the gradient's norm {norm}")

    def diverged(self, what: str) -> ValueError:
        """The error that says what happened, where to go on from, and what to try."""
        good = newest_checkpoint(self.run)
        return ValueError(f"step {self.step}: {what}; the last good checkpoint is "
                          f"{good or 'none'}; try --resume --out {self.run} with half the "
                          f"learning rate (--lr {self.args.lr / 2:g} --muon-lr "
                          f"{self.args.muon_lr / 2:g}) or a smaller --clip, or a new run with "
                          "more --warmup-steps or --dtype fp32")

    def write_record(self, record: dict) -> None:
        """Add a line to metrics.jsonl."""
        self.metrics.append(record)
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def start_folder(self) -> None:
        """Make the run folder; config.json comes last: a folder that has it is complete."""
        self.run.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(self.run / "tokenizer")
        self.write_config()

    def write_config(self) -> None:
        """Every setting of the run as it goes on now: a resumed run may have changed some."""
        versions = dict(minids=__version__, torch=torch.__version__,
                        python=platform.python_version())
        source = {"source": self.source} if self.source else {}
        write_json(self.run / "config.json", source | {
            "model": dataclasses.asdict(self.model.args),
            self.program: dataclasses.asdict(self.args),
            "tokenizer": self.tokenizer.fingerprint} | self.more_config() | {
            "dtype": str(self.dtype).removeprefix("torch."), "versions": versions})


@contextlib.contextmanager
def stopping(learner: Learner):
    """Let Ctrl-C and SIGTERM finish the step; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number, _frame):
        if learner.stop_signal:
            raise KeyboardInterrupt
        learner.stop_signal = number
        print("\nfinishing the step and saving ..", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_learner(learner: Learner, resumed: bool, begin: Path | None = None) -> None:
    """Start a run, or go on with it, up to its last step.

    resumed: whether its folder is there; begin: a checkpoint to take the weights of
    Raises `Stopped` after a signal, with the state saved.
    """
    with stopping(learner):
        if resumed:
            learner.restore()
            learner.write_config()
            print(f"resumed at step {learner.step} of {learner.args.steps}", flush=True)
        else:
            if learner.args.resume:
                print(f"{learner.run} holds no run yet: starting from the beginning", flush=True)
            if begin:
                learner.begin_from(begin)
            learner.start_folder()
        learner.train()


def settings(program: str, cls, given: dict, suffix: str):
    """The settings of a run that begins with another, or is resumed.

    cls: a kind of `LearnArgs`, with `for_preset`; given: the flags; suffix: of the folder's name
    Raises `ValueError` for a run folder that is taken, or of another configuration.
    """
    out, resume = given.get("out", ""), given.get("resume", False)
    if resume and not out:
        raise ValueError("out = '' is not valid with --resume: name the run's folder")
    stored = read_settings(Path(out), program, cls) if out else None
    if stored and not resume:
        raise ValueError(f"out = {out!r} holds a run already: go on with it by --resume, or name "
                         "another folder")
    if stored:
        changed = {k: v for k, v in given.items() if k in cls.may_change}
        fixed = {k: v for k, v in given.items() if k not in cls.may_change}
        refuse_changes(Path(out), dataclasses.asdict(stored), fixed)
        return dataclasses.replace(stored, **changed)
    if not given.get("from_run"):
        raise ValueError("from = '' is not valid: name the run to begin with, --from RUN")
    before = Path(given["from_run"])
    name = before if is_hf_folder(before) else run_of(resolve(before))
    out = out or str(free_folder(Path("runs") / (name.resolve().name + suffix)))
    return cls.for_preset(**given | {"out": out})


def read_settings(run: Path, program: str, cls):
    """What a run of this program was started with; None where there is no run."""
    path = run / "config.json"
    if not path.exists():
        return None
    try:
        return cls(**json.loads(path.read_text())[program])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, of another version of minids, or no run of "
                         f"minids.{program}: {error}") from error


def model_and_tokenizer(args: LearnArgs) -> tuple[ModelArgs, Tokenizer, Path | None]:
    """What a run works with: its own when resumed, else those of the run that it begins with.

    The third thing is where the weights to begin with are; None when resumed.
    """
    run = Path(args.out)
    if args.resume and (run / "config.json").exists():
        config = json.loads((run / "config.json").read_text())
        return ModelArgs(**config["model"]), stored_tokenizer(run), None
    before = Path(args.from_run)
    if is_hf_folder(before):
        return inspect(before).args, Tokenizer.load(before), before
    checkpoint = resolve(before)
    config = json.loads((run_of(checkpoint) / "config.json").read_text())
    return ModelArgs(**config["model"]), stored_tokenizer(run_of(checkpoint)), checkpoint


def read_metrics(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl; a line that a crash cut short is left out."""
    path, records = run / "metrics.jsonl", []
    try:
        for _, record in read_jsonl(path) if path.exists() else []:
            records.append(record)
    except ValueError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise
    return records


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint folder belongs to; `ValueError` if that is no run's."""
    run = checkpoint.resolve().parent.parent
    if not (run / "config.json").exists():
        raise ValueError(f"from = {str(checkpoint)!r} is not valid: {run} holds no config.json, so "
                         "it is no run folder")
    return run


def stored_tokenizer(run: Path) -> Tokenizer:
    """The run's own tokenizer, if it is still the one that the run was started with."""
    tokenizer = Tokenizer.load(run / "tokenizer")
    started = json.loads((run / "config.json").read_text())["tokenizer"]
    if tokenizer.fingerprint != started:
        raise ValueError(f"tokenizer in {run} is not the run's: its fingerprint is "
                         f"{tokenizer.fingerprint}, the run's is {started}; put that one back")
    return tokenizer


def refuse_changes(run: Path, stored: dict, given: dict) -> None:
    """Raise `ValueError` for a flag that differs from what the run was started with."""
    for name, value in given.items():
        if stored[name] != value:
            raise ValueError(f"{name} = {value!r} is not valid: the run in {run} has "
                             f"{stored[name]!r}, and a resumed run keeps its configuration")


def free_folder(wanted: Path) -> Path:
    """That folder, or the first of NAME-2, NAME-3, .. where it is taken."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def memory_mib(device: torch.device) -> int:
    """Largest memory held so far, MiB: the GPU's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of products; 'auto' is BF16 where the hardware multiplies it."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if able else torch.float32


def check_memory(args: ModelArgs, device: torch.device) -> None:
    """Refuse a model that cannot be trained here, before torch runs out of memory on the way."""
    count = count_parameters(args)
    needed = 16 * (count.total + count.mtp)  # weight, gradient and two moments, FP32
    if device.type == "cuda":
        here = torch.cuda.mem_get_info(device)[1]
    else:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > here:
        raise ValueError(f"a model of {count.total + count.mtp:,} parameters does not fit: weights,"
                         f" gradients and optimizer take {needed / 2**30:,.0f} GiB, and {device} "
                         f"has {here / 2**30:,.0f}; take a smaller preset or fewer layers")


def tune_allocator() -> None:
    """Keep freed memory in the process, where the C library is glibc.

    By default it hands every large block back to the kernel and fetches it, zeroed, for the next
    tensor: 1.05 to 1.5 times the time of a step, measured on two cores.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of <malloc.h>
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(top_pad, 1 << 26)
