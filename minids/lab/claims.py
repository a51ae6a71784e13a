"""The papers' claims about training, each tested by many small runs.

    python -m minids.lab.claims --what balance --seeds 3
    python -m minids.lab.claims --what fp8 --seeds 5
    python -m minids.lab.claims --what fp8 --jobs 10 --device cuda       # ten runs side by side

The tables:
    balance   four regimes: no balancing, V2's auxiliary loss, V3's bias, the bias and V3's
              sequence-wise loss; MaxVio during training and at the end, dead experts, bits per byte
              (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 4.5)
    fp8       the same seeds with and without FP8: the gap in bits per byte with its 95 % interval,
              beside the spread between seeds; and the same weights evaluated both ways (V3
              appendix B.1 claims less than 0.25 %)

Every run is `python -m minids.train` with the preset's recipe, in its own folder below --out. The
command can be stopped and repeated: a finished run stays, an interrupted one is resumed.

Simplified: one recipe for all regimes; no learning rate was tuned for any of them.
"""

import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minids.apply.fp8 import use_fp8
from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.infer.validation import evaluate
from minids.runs.device import pick_device, prepare_cpu
from minids.runs.metrics import read_metrics
from minids.runs.open import is_run, open_model, read_config
from minids.text.loaders import open_data

REGIMES = {
    "balance": {
        "none": "--bias-speed 0 --balance-weight 0".split(),
        "auxiliary loss": "--bias-speed 0 --balance-loss expert --balance-weight 0.003".split(),
        "bias": ["--balance-weight", "0"],
        "bias and sequence loss": []},
    "fp8": {"without": [], "with": ["--fp8"]}}
# Student's t: half the width of a 95 % interval in standard errors, by number of values
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class ClaimArgs(Settings):
    """The claim to test, and its runs."""

    what: str = option("balance", "claim to test", tuple(REGIMES))
    preset: str = option("tiny", "model and recipe: " + ", ".join(ModelArgs.presets()))
    seeds: int = option(5, "runs of each regime", low=2, high=max(T95))
    steps: int = option(0, "steps of each run; 0: the preset's number", low=0)
    out: str = option("runs/claims", "folder for the runs", folder=True)
    jobs: int = option(1, "runs at a time", low=1)
    threads: int = option(2, "CPU threads of each run", low=1, high=1024)
    device: str = option("cpu", "device of the runs", ("cpu", "cuda"))


class Trained(NamedTuple):
    """A finished run."""

    folder: Path
    metrics: list[dict]

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte of the whole validation text after the last step."""
        return self.metrics[-1]["valid_bpb"]


def train_all(args: ClaimArgs) -> dict[str, list[Trained]]:
    """Train every regime with every seed, `jobs` at a time; return the runs by regime."""
    todo = [(regime, seed) for seed in range(args.seeds) for regime in REGIMES[args.what]]
    runs = {regime: [] for regime in REGIMES[args.what]}
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda job: train_one(args, *job), todo)
        for (regime, _), run in zip(todo, tqdm(done, total=len(todo), unit="run"), strict=True):
            runs[regime].append(run)
    return runs


def train_one(args: ClaimArgs, regime: str, seed: int) -> Trained:
    """Train one run in its own process, or the rest of one that was interrupted.

    Raises `ChildProcessError` with the last line of the run's errors if it fails.
    """
    folder = Path(args.out) / args.what / f"{regime.replace(' ', '-')}-seed-{seed}"
    last = [{}, *read_metrics(folder)][-1]
    if "valid_bpb" not in last or last["step"] < read_config(folder)["train"]["steps"]:
        if is_run(folder):
            flags = ["--resume"]
        else:
            flags = ["--preset", args.preset, "--seed", str(seed), *REGIMES[args.what][regime]]
            flags += ["--steps", str(args.steps)] if args.steps else []
        flags += ["--out", str(folder), "--device", args.device, "--threads", str(args.threads)]
        done = subprocess.run([sys.executable, "-m", "minids.train", *flags],
                              capture_output=True, encoding="utf-8")
        if done.returncode:
            raise ChildProcessError(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    return Trained(folder, read_metrics(folder))


def mean_vio(run: Trained, share: float) -> float:
    """Return the mean MaxVio in the tenth of a run around this share of its steps."""
    middle, reach = share * len(run.metrics), max(len(run.metrics) / 20, 0.5)
    near = [m["max_vio"] for m in run.metrics if abs(m["step"] - middle) <= reach]
    return statistics.mean(v for layers in near for v in layers)


def dead_experts(run: Trained) -> int:
    """Count experts that get less than 1 % of their even share of the validation text."""
    loads = run.metrics[-1]["valid_loads"]
    return sum(load < 0.01 * sum(layer) / len(layer) for layer in loads for load in layer)


def balance_table(args: ClaimArgs, runs: dict[str, list[Trained]]) -> list[tuple]:
    """Return the table of regimes, means over seeds."""
    shares = (0.05, 0.25, 0.5, 0.95)
    rows = [("regime", *(f"MaxVio at {share:.0%}" for share in shares), "validation MaxVio",
             "dead experts", "bits per byte", "spread")]
    for regime, trained in runs.items():
        bits = [run.bits_per_byte for run in trained]
        vio = [statistics.mean(mean_vio(run, share) for run in trained) for share in shares]
        end = [statistics.mean(run.metrics[-1]["valid_max_vio"]) for run in trained]
        rows.append((regime, *(f"{value:.2f}" for value in [*vio, statistics.mean(end)]),
                     f"{statistics.mean(map(dead_experts, trained)):.1f}",
                     f"{statistics.mean(bits):.4f}", f"{statistics.stdev(bits):.4f}"))
    return rows


def interval(gaps: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t)."""
    half = T95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.mean(gaps), half


def fp8_table(args: ClaimArgs, runs: dict[str, list[Trained]]) -> list[tuple]:
    """Return the table of seeds: both runs, their gap, and the run without FP8 read in FP8."""
    rows = [("bits per byte", "without FP8", "with FP8", "gap", "same weights with FP8", "gap")]
    gaps, same = [], []
    for seed, (plain, fp8) in enumerate(zip(*runs.values(), strict=True)):
        run = open_model(plain.folder, pick_device(args.device))
        seq_len = run.config["train"]["seq_len"]
        data = open_data(run.config["train"]["data"], run.tokenizer, seq_len)
        text = data.valid, run.tokenizer.n_bytes, seq_len, 16
        full = evaluate(run.model, *text).bits_per_byte
        use_fp8(run.model)
        rounded = evaluate(run.model, *text).bits_per_byte
        gaps.append(fp8.bits_per_byte / plain.bits_per_byte - 1)
        same.append(rounded / full - 1)
        rows.append((f"seed {seed}", f"{plain.bits_per_byte:.4f}", f"{fp8.bits_per_byte:.4f}",
                     f"{gaps[-1]:+.2%}", f"{rounded:.4f}", f"{same[-1]:+.3%}"))
    bits = [run.bits_per_byte for run in runs["without"]]
    (mean, half), (mean_same, half_same) = interval(gaps), interval(same)
    middle, spread = statistics.mean(bits), statistics.stdev(bits)
    return [*rows, ("mean, 95 % interval", f"{middle:.4f}", "", f"{mean:+.2%} +- {half:.2%}", "",
                    f"{mean_same:+.3%} +- {half_same:.3%}"),
            ("spread between seeds", f"{spread / middle:.2%}", "", "", "", "")]


TABLES = {"balance": balance_table, "fp8": fp8_table}


def main(argv: list[str] | None = None) -> None:
    [given] = parse("minids.lab.claims", __doc__, ClaimArgs, argv=argv)
    args = ClaimArgs(**given)
    ModelArgs.preset(args.preset)  # refuses what is not there before the first run
    pick_device(args.device)
    prepare_cpu(args.threads)
    runs = train_all(args)
    torch.set_num_threads(min(args.threads * args.jobs, os.cpu_count() or 1))  # as the runs had
    print(format_table(TABLES[args.what](args, runs)))


if __name__ == "__main__":
    run_program("minids.lab.claims", main, lasting=True)
