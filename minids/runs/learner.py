"""One loop for every program that learns: steps, metrics, checkpoints, signals, resuming."""

import contextlib
import dataclasses
import math
import platform
import random
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minids import __version__
from minids.apply.compile import compile_blocks
from minids.apply.fp8 import StepRounding
from minids.apply.precision import StepCopies
from minids.base.command_line import Stopped, no_memory
from minids.base.fields import require
from minids.base.files import sealed, write_whole
from minids.config import ModelArgs
from minids.kernels import fp8 as fp8_kernels
from minids.kernels.registry import current_setting
from minids.model.sparse_attention import load_weights_without_indexer
from minids.model.transformer import Transformer
from minids.parallel.parts import Parts
from minids.parallel.team import ALONE
from minids.runs import checkpoints, optimizers
from minids.runs.device import check_memory, fetched, pick_device, pick_dtype
from minids.runs.loggers import Mirror
from minids.runs.metrics import METRICS, append, line_of, read_metrics, settle, summary
from minids.runs.open import CONFIG, Source, fitting, read_config, tokenizer_files
from minids.runs.settings import LearnArgs
from minids.runs.sharded import load_states
from minids.runs.threads import Threads
from minids.runs.writer import Writer, on_host
from minids.text.tokenizer import Tokenizer


class Learner:
    """One run: the model, its optimizers, and how far it has come.

    A step is written once, in `train_step`: accumulate gradients, clip them, refuse a loss or
    gradient that is not finite, update, record. A program says what is particular to it in
    `accumulate`, `measure` and `line`, and may fill the methods that do nothing here.

    program: name of the run's settings in config.json; run: its folder
    numbers: attributes that a checkpoint's state holds, besides optimizers and generators
    team: the processes that share the model; the first writes and speaks for all
    over_ranks: "module:class" of what they do otherwise, imported by them alone
    replies: whether the model writes replies while it learns
    """

    program = ""
    team, over_ranks = ALONE, "minids.runs.over_ranks:OverRanks"
    replies = False
    numbers: tuple[str, ...] = ("step", "seconds")

    def __init__(self, args: LearnArgs, model_args: ModelArgs, run: Path, tokenizer: Tokenizer):
        self.args, self.run, self.tokenizer = args, run, tokenizer
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        check_memory(model_args, self.device, ranks=self.team.world,
                     whole=self.replies and self.team.world > 1)
        self.mirror = Mirror(args.log if self.team.first else "", run)
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(args.seed)  # all the generators that a checkpoint holds
        self.copies: StepCopies | StepRounding | None = None
        self.model = self.build(model_args)
        self.optimizers = optimizers.build_optimizers(self.model, args, self.dtype)
        # FP16 has no number below 6e-8: there the loss is scaled, or small gradients would vanish.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.seconds, self.stop_signal = 0, 0.0, 0
        self.writer, self.saves_beside = Writer(), self.device.type != "cpu"  # training goes on
        self.source: dict | None = None  # what this run began with
        self.more_config, self.metrics = {}, []  # what else config.json says, lines of metrics

    def accumulate(self) -> tuple[dict, Tensor | None]:
        """Add up the gradients of one batch; `step` already counts this step, from 1.

        Returns the metrics, "loss" among them: numbers, scalars on the device, or lists of such
        scalars, one of each micro-batch, of which the mean is taken; and the tokens of every
        expert, (layers, E), for `after_update` and `more_metrics`; None where they need none.
        """

    def measure(self, record: dict, last: bool) -> float | None:
        """Add what is measured to a step's metrics; return one to judge by, lower is better."""

    def line(self, record: dict) -> str:
        """Return what the progress bar, or a log file without one, says about a step."""

    def describe(self) -> str:
        """Return what the first line that `learn` prints says about the run."""

    def build(self, model_args: ModelArgs):
        """Return the model, prepared."""
        model = Transformer(model_args).to(self.device)
        self.prepare(model)
        return model

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Transformer]:
        """Yield the model with all its weights in this process, to generate text with."""
        yield self.model

    def prepare(self, model: Transformer) -> None:
        """Freeze or convert the model before the optimizers are built."""

    def lighter(self) -> list[str]:
        """Return flags that let a resumed run take its steps in less memory; none if none do."""
        return []

    def is_spike(self, loss: float) -> bool:
        """Return whether to skip the update of this step."""
        return False

    def after_update(self, loads: Tensor | None) -> None:
        """Move what follows the weights, such as gate biases; not called for a skipped step."""

    def more_metrics(self, loads: Tensor | None, elapsed: float) -> dict:
        """Return metrics that are known only after the step; elapsed: its seconds."""
        return {}

    def more_state(self) -> dict:
        """Return what else a checkpoint has to hold."""
        return {}

    def restore_more(self, state: dict) -> None:
        """Restore what `more_state` returned."""

    def finish(self) -> None:
        """Write and print what a run ends with; no longer interrupted by a first signal."""

    def gradient_norms(self) -> dict[str, Tensor | float]:
        """Return the norms of the gradients by their names in metrics.jsonl."""
        return optimizers.gradient_norms(self.model)

    def scale_gradients(self, norms: dict[str, float]) -> None:
        """Scale gradients that are too long down; norms: of `gradient_norms`, fetched"""
        optimizers.scale_gradients(self.model, norms, self.args.clip)

    def asked_to_stop(self) -> int:
        """Return the number of the signal that asks for an end; 0: none does."""
        self.writer.check()
        return self.stop_signal

    def autocast(self):
        """Return a context of BF16 or FP16 products over FP32 weights, if the run has them.

        Over ranks, no cast outlives its micro-batch: FSDP would miss gradients through it.
        """
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32,
                              cache_enabled=self.team.world == 1)

    def speed_up(self, model: Transformer, compile: str, sequences: int, fp8: bool = False,
                 plain: bool = False) -> None:
        """Set up what makes steps faster, on a GPU and where it is asked for: for `prepare`.

        compile: "true", "false", or "auto": on a GPU in BF16, unless `plain`
        sequences: of a micro-batch, once it has grown
        fp8: whether products are in FP8; its kernels compile, the simulation does not
        plain: whether there are other unusual products, as of indexers that learn
        """
        usual = self.device.type == "cuda" and self.dtype == torch.bfloat16 and not plain
        in_kernels = fp8_kernels.run_on(self.device) and current_setting() == "auto"
        usual = usual and (not fp8 or in_kernels)
        if usual and self.team.world == 1:  # over ranks weights are gathered anew, and cast then
            self.copies = StepRounding(model.blocks()) if fp8 else StepCopies(model)
        if compile == "true" or compile == "auto" and usual:
            compile_blocks(model, self.dtype, sequences, tqdm.write)

    def send(self, batch: Tensor) -> Tensor:
        """Return a batch on the device; a GPU fetches it while it works on the one before."""
        if self.device.type != "cuda":
            return batch.to(self.device)
        return batch.pin_memory().to(self.device, non_blocking=True)

    def train_step(self) -> dict:
        """Take one optimizer step; returns its line of metrics.

        A gradient that overflows FP16 is no divergence: the step is skipped, and the loss scaled
        by half as much. Below 1 it is, since the gradient itself is no number then.
        """
        start = time.perf_counter()
        self.step += 1
        factor = optimizers.learning_rate_factor(self.step, self.args)
        optimizers.set_learning_rate(self.optimizers, factor)
        if self.copies:
            self.copies.refresh()
        metrics, loads = self.accumulate()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # clipping means the true gradient
        norms = self.gradient_norms()
        found = fetched(metrics | norms)  # the only wait for the device in a step
        counted = None if loads is None else loads.cpu()  # later it would wait for the optimizers
        loss, norm = found["loss"], sum(found[name] for name in norms)
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 0
        overflow = scale >= 1 and not math.isfinite(norm)
        if not (math.isfinite(loss) and (math.isfinite(norm) or overflow)):  # before the weights
            raise self.diverged(f"the loss is {loss} and the gradient's norm {norm}")
        self.scale_gradients({name: found[name] for name in norms})
        found |= {name: None for name in norms} if overflow else {}
        skipped = overflow or self.is_spike(loss)
        if not skipped:
            for optimizer in self.optimizers:
                optimizer.step()
            self.after_update(loads)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.scaler.update()
        self.seconds += (elapsed := time.perf_counter() - start)
        record = dict(step=self.step, **found,
                      lr=self.optimizers[0].param_groups[0]["lr"], seconds=round(self.seconds, 3))
        record |= {"loss_scale": scale} if scale else {}
        record |= {"overflow": True} if overflow else {}
        return record | self.more_metrics(counted, elapsed) | ({"skipped": True} if skipped else {})

    def train(self) -> None:
        """Take all steps that are left; measure, save and show progress on the way."""
        args = self.args
        threads = Threads(args.threads != 0 or self.device.type != "cpu", tqdm.write)
        with tqdm(total=args.steps, initial=self.step, unit="step",
                  disable=None if self.team.first else True) as bar, self.writer:
            while self.step < args.steps:
                before = self.seconds
                with self.fitting_memory():
                    record = self.train_step()
                    speed = record.get("tokens_per_s")
                    threads.took(1 / speed if speed else self.seconds - before)
                    last = self.step == args.steps
                    metric = self.measure(record, last)
                self.write_record(record)
                bar.update()
                bar.set_postfix_str(self.line(record))
                if bar.disable and (last or metric is not None):
                    print(f"step {self.step}/{args.steps}: {self.line(record)}", flush=True)
                stop = self.asked_to_stop()
                if self.step % args.save_every == 0 or last or stop:
                    self.save(metric, beside=self.saves_beside and not (last or stop))
                if stop and not last:
                    raise Stopped(stop, ["--resume", "--out", str(self.run)])
        threads.end()
        if overflows := sum(record.get("overflow", False) for record in self.metrics):
            print(f"{overflows} of {self.step} steps were skipped: their gradients overflowed FP16")

    def begin(self, source: Source | None) -> None:
        """Write what a run's folder holds from its first step on; source: of its weights"""
        if source:
            with self.team.together():
                self.begin_from(source)  # weights that cannot be read leave nothing behind
        with self.team.together():
            if self.team.first:
                checkpoints.forget_beginning(self.run)
                self.tokenizer.save(self.run / "tokenizer")
        if source:
            self.save()  # the run's own folder is then all it needs
        with self.team.together():
            self.write_config()  # comes last, so a folder that has it is complete

    def begin_from(self, source: Source) -> None:
        """Take over weights; step 0 is saved when this, and what a subclass adds, is done."""
        self.source = source.describe()
        with fitting(source.path):
            self.take(source.weights())

    def take(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of another run."""
        load_weights_without_indexer(self.model, weights)

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one, with this run's peak rates."""
        stored, checkpoint = read_config(self.run), None
        self.source = stored.get("source")
        for name, now in self.more_config.items():
            if stored.get(name, now) != now:
                raise ValueError(f"the {name} of the run in {self.run} was changed since it began; "
                                 "put it back, or name another folder with --out")
        if checkpoints.all_checkpoints(self.run):
            checkpoint = checkpoints.resolve(self.run)
            state = self.load(checkpoint)
            if scaling := state.get("scaler"):  # none of a run in another precision
                self.scaler.load_state_dict(scaling)
            self.restore_more(state)
            checkpoints.set_rng_state(state["rng"])
            for name in self.numbers:
                setattr(self, name, state[name])
            require(self.args, "steps", self.args.steps >= self.step,
                    f"at least {self.step}, the steps that the run in {self.run} has done")
            if self.team.first:
                checkpoints.remove_leftovers(checkpoint.parent)
                checkpoints.prune(self.run, checkpoint, self.args.keep_last)
        self.metrics = read_metrics(self.run, checkpoint)[:self.step]
        if self.team.first:
            write_whole(self.run / METRICS, b"".join(map(line_of, self.metrics)))

    def load_into(self, model: nn.Module, weights: Parts | dict[str, Tensor]) -> None:
        """Load a checkpoint's weights into a model with this run's layout."""
        model.load_state_dict(weights.whole() if isinstance(weights, Parts) else weights)

    def load(self, checkpoint: Path) -> dict:
        """Load weights and optimizer states, of one process or of many; return the whole state."""
        with fitting(checkpoint):
            self.model.load_state_dict(checkpoints.load_weights(checkpoint))
        state = checkpoints.load_state(checkpoint)
        if isinstance(saved := state["optimizers"], Parts):
            load_states(self.model, self.optimizers, saved.found, saved.read)
            return state
        optimizers.restore(self.optimizers, saved)
        return state

    def save(self, metric: float | None = None, beside: bool = False) -> Path | None:
        """Write a checkpoint, `beside` training or at once; refuse to save NaN or Inf weights.

        metric: measured at this step
        """
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged("a weight is no longer a finite number")
        state = dict(optimizers=[o.state_dict() for o in self.optimizers],
                     scaler=self.scaler.state_dict(), rng=checkpoints.rng_state(),
                     **self.more_state(),
                     **{name: getattr(self, name) for name in self.numbers})
        weights = self.model.state_dict()
        if self.saves_beside:
            weights, state = on_host((weights, state))
        settle(self.run)
        record = dict(config=self.config(), metrics=summary(self.metrics))
        return self.writer.run(lambda step=self.step: checkpoints.save_checkpoint(
            self.run, step, weights, state, self.args.keep_last, metric, record), beside)

    @contextlib.contextmanager
    def fitting_memory(self):
        """Turn an error of memory in a step into what to lower, and where to continue from."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not (lacks := no_memory(error)):
                raise
            good, again = self.writer.newest(self.run), self.lighter()
            advice = ("a new run with a smaller --batch-size or --seq-len" if not again else
                      shlex.join(["--resume", "--out", str(self.run), *again]))
            raise ValueError(f"step {self.step}: {lacks}; the last good checkpoint is "
                             f"{good or 'none'}; try {advice}") from error

    def diverged(self, what: str) -> ValueError:
        """Return the error that says what happened, where to continue from, and what to try."""
        good, run = self.writer.newest(self.run), shlex.quote(str(self.run))
        return ValueError(f"step {self.step}: {what}; the last good checkpoint is {good or 'none'};"
                          f" try --resume --out {run} with half the learning rate (--lr "
                          f"{self.args.lr / 2:g} --muon-lr {self.args.muon_lr / 2:g}) or a smaller"
                          " --clip, or a new run with more --warmup-steps or --dtype fp32")

    def write_record(self, record: dict) -> None:
        """Append a line to metrics.jsonl, and to the log that --log names."""
        self.metrics.append(record)
        if self.team.first:
            append(self.run, record)
        self.mirror.write(record)

    def config(self) -> dict:
        """Return every setting as it is now, and what a reader of the run has to know."""
        versions = dict(minids=__version__, torch=torch.__version__,
                        python=platform.python_version())
        return ({"source": self.source} if self.source else {}) | {
            "model": dataclasses.asdict(self.model.args),
            self.program: dataclasses.asdict(self.args),
            "tokenizer": self.tokenizer.fingerprint, "files": tokenizer_files(self.run),
            **self.more_config, "dtype": str(self.dtype).removeprefix("torch."),
            "versions": versions}

    def write_config(self) -> None:
        """Write config.json, sealed; written anew by a resumed run, which may have other values."""
        if self.team.first:
            write_whole(self.run / CONFIG, sealed(self.config()))
