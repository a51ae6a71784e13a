"""Experts beside a dense model with as many active parameters: speed, and quality once trained."""

import contextlib
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.lab.bench_setup import Bench, Stepper, minids_loss
from minids.lab.timing import RATIOS
from minids.runs.learner import read_metrics
from minids.runs.resume import free_folder
from minids.runs.settings import TrainArgs
from minids.train import train

WIDTH_MULTIPLE = 8  # of the dense model's hidden width, to avoid odd shapes


def equal_active_dense(args: ModelArgs) -> ModelArgs:
    """Return the dense model with as many active parameters; all its layers share one width."""
    dense = replace(args, n_routed_experts=0, inter_dim=WIDTH_MULTIPLE)
    missing = count_parameters(args).active - count_parameters(dense).active
    each = 3 * args.dim * args.n_layers * WIDTH_MULTIPLE
    return replace(dense, inter_dim=WIDTH_MULTIPLE * max(1, 1 + round(missing / each)))


def dense_table(bench: Bench) -> list[list[str]]:
    """Return the table of training speed, experts beside dense."""
    rows = [["training", "experts tokens/s", "dense tokens/s", *RATIOS, "experts active",
             "dense active"]]
    pair = bench.args, equal_active_dense(bench.args)
    active = [f"{count_parameters(args).active:,}" for args in pair]
    for dtype in bench.settings.dtypes:
        steppers = [Stepper(bench.model(args), minids_loss, dtype) for args in pair]
        rows += [[dtype, *bench.time_steps(*steppers), *active]]
    return rows


class Quality(NamedTuple):
    """The result of one training run."""

    bits_per_byte: float
    seconds: float
    steps: int


def train_one(bench: Bench, args: ModelArgs, seed: int, steps: int, run: Path) -> Quality:
    """Train a model with the preset's recipe and validate it after the last step."""
    s = bench.settings
    dtype = "auto" if s.dtype == "both" else s.dtype
    train_args = TrainArgs.for_preset(
        s.preset, steps=steps, seed=seed, out=str(run), data=s.data, dtype=dtype, device=s.device,
        threads=s.threads, eval_every=0, save_every=steps, keep_last=1)
    with contextlib.redirect_stdout(sys.stderr):
        train(train_args, asdict(args))
    last = read_metrics(run)[-1]
    return Quality(last["valid_bpb"], last["seconds"], steps)


def train_three(bench: Bench, seed: int, folder: Path) -> list[Quality]:
    """Train the experts, the dense model for equal tokens, and the dense model for equal time.

    The third run has as many steps as fit into the first one's time, so its learning rate decays
    to the end like the first one's; a run cut off at that time would stop before the decay.
    """
    steps = bench.settings.steps or TrainArgs.for_preset(bench.settings.preset).steps
    moe, dense = bench.trained_args, equal_active_dense(bench.trained_args)
    first = train_one(bench, moe, seed, steps, folder / f"experts-seed-{seed}")
    second = train_one(bench, dense, seed, steps, folder / f"dense-tokens-seed-{seed}")
    more = max(1, round(steps * first.seconds / second.seconds))
    third = train_one(bench, dense, seed, more, folder / f"dense-time-seed-{seed}")
    return [first, second, third]


def quality_table(bench: Bench) -> list[list[str]]:
    """Return the table of validation bits per byte, one row per seed, and the means."""
    folder = free_folder(Path("runs") / "moe-vs-dense")
    rows = [["bits per byte", "experts", "dense, equal tokens", "lower", "dense, equal time",
             "lower", "steps", "seconds"]]
    runs = []
    for seed in range(bench.settings.seed, bench.settings.seed + bench.settings.seeds):
        three = train_three(bench, seed, folder)
        runs.append([run.bits_per_byte for run in three])
        rows += [[f"seed {seed}", *quality_cells(runs[-1]),
                  " / ".join(str(run.steps) for run in three),
                  " / ".join(f"{run.seconds:.0f}" for run in three)]]
    means = [statistics.mean(column) for column in zip(*runs, strict=True)]
    return [*rows, ["mean", *quality_cells(means), "", ""]]


def quality_cells(bits: list[float]) -> list[str]:
    """Return table cells: bits per byte of the three runs, and the winner of each comparison."""
    experts, *dense = bits
    cells = [f"{experts:.4f}"]
    for other in dense:
        cells += [f"{other:.4f}", "experts" if experts < other else "dense"]
    return cells
