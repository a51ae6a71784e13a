"""The papers' claims about training, each put to the test by many small runs.

    python -m minids.lab.claims --what balance --seeds 3
    python -m minids.lab.claims --what fp8 --seeds 5
    python -m minids.lab.claims --what fp8 --jobs 10 --device cuda       # ten runs side by side

What each table shows:
    balance   four regimes: no balancing, V2's auxiliary loss, V3's bias, the bias and V3's
              sequence-wise loss; MaxVio on the way and at the end, dead experts, bits per byte
              (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 4.5)
    fp8       the same seeds with and without FP8: the gap in the loss with its 95 % interval,
              beside the spread between seeds; and the same weights evaluated both ways (V3
              appendix B.1 claims less than 0.25 %)

Every run is `python -m minids.train` with its own folder below --out, at the preset's recipe. A run
that is there already is not run again, and one that was cut off goes on: the command can be
stopped and repeated at will.

Simplified: one recipe for all regimes; no learning rate was tuned for any of them.
"""

import json
import math
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
from minids.base.fields import check_types, option, require
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.evaluate import evaluate
from minids.runs.checkpoints import load_run, pick_device
from minids.runs.learner import read_metrics
from minids.text.loaders import open_data

REGIMES = {
    "balance": {
        "none": ["--bias-speed", "0", "--balance-weight", "0"],
        "auxiliary loss": ["--bias-speed", "0", "--balance-loss", "expert",
                           "--balance-weight", "0.003"],
        "bias": ["--balance-weight", "0"],
        "bias and sequence loss": [],
    },
    "fp8": {"without": [], "with": ["--fp8"]},
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class ClaimArgs:
    """Which claim, and on what."""

    what: str = option("balance", "claim to test", tuple(REGIMES))
    preset: str = option("tiny", "model and recipe: " + ", ".join(ModelArgs.presets()))
    seeds: int = option(5, "runs of each regime, at least 2")
    steps: int = option(0, "steps of each run; 0: as many as the preset trains")
    out: str = option("runs/claims", "folder for the runs")
    jobs: int = option(1, "runs at a time")
    threads: int = option(2, "CPU threads of each run")
    device: str = option("cpu", "cpu or cuda", ("cpu", "cuda"))

    def __post_init__(self):
        check_types(self)
        require(self, "seeds", 2 <= self.seeds <= max(T95), f"between 2 and {max(T95)}")
        for name in ("jobs", "threads"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "steps", self.steps >= 0, "0 or more")


class Trained(NamedTuple):
    """A finished run: its folder and the lines of its metrics."""

    folder: Path
    metrics: list[dict]

    @property
    def bits_per_byte(self) -> float:
        """Over the whole validation text, at the end."""
        return self.metrics[-1]["valid_bpb"]


def train_all(args: ClaimArgs) -> dict[str, list[Trained]]:
    """Every regime at every seed, `jobs` at a time."""
    todo = [(regime, seed) for seed in range(args.seeds) for regime in REGIMES[args.what]]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
        def one(job):
            done = train_one(args, *job)
            bar.update()
            return done
        runs = dict(zip(todo, pool.map(one, todo), strict=True))
    return {regime: [runs[regime, seed] for seed in range(args.seeds)]
            for regime in REGIMES[args.what]}


def train_one(args: ClaimArgs, regime: str, seed: int) -> Trained:
    """One run in a process of its own; it goes on where an earlier one was cut off.

    Raises ChildProcessError with the run's last words if it fails.
    """
    folder = Path(args.out) / args.what / f"{regime.replace(' ', '-')}-seed-{seed}"
    if not is_finished(folder):
        if (folder / "config.json").exists():
            words = ["--resume"]
        else:
            words = ["--preset", args.preset, "--seed", str(seed), *REGIMES[args.what][regime]]
            words += ["--steps", str(args.steps)] if args.steps else []
        words += ["--out", str(folder), "--device", args.device, "--threads", str(args.threads)]
        done = subprocess.run([sys.executable, "-m", "minids.train", *words], capture_output=True,
                              text=True)
        if done.returncode:
            raise ChildProcessError(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    return Trained(folder, read_metrics(folder))


def is_finished(folder: Path) -> bool:
    """Whether a run has all its steps."""
    if not (folder / "config.json").exists():
        return False
    steps = json.loads((folder / "config.json").read_text())["train"]["steps"]
    metrics = read_metrics(folder)
    return bool(metrics) and metrics[-1]["step"] == steps and "valid_bpb" in metrics[-1]


def mean_vio(run: Trained, share: float) -> float:
    """MaxVio of the training batches around a share of the run, the mean over layers and steps."""
    middle, reach = share * len(run.metrics), max(len(run.metrics) / 20, 0.5)
    near = [m["max_vio"] for m in run.metrics if abs(m["step"] - middle) <= reach]
    return statistics.mean(v for layers in near for v in layers)


def dead_experts(run: Trained) -> int:
    """Experts that get less than a hundredth of their even share of the validation text."""
    loads = run.metrics[-1]["valid_loads"]
    return sum(load < 0.01 * sum(layer) / len(layer) for layer in loads for load in layer)


def balance_table(args: ClaimArgs, runs: dict[str, list[Trained]]) -> list[tuple]:
    """A row a regime, means over seeds."""
    shares = (0.05, 0.25, 0.5, 0.95)
    rows = [("regime", *(f"MaxVio at {share:.0%}" for share in shares), "validation MaxVio",
             "dead experts", "bits per byte", "spread")]
    for regime, trained in runs.items():
        bits = [run.bits_per_byte for run in trained]
        vio = [statistics.mean(run.metrics[-1]["valid_max_vio"]) for run in trained]
        rows.append((regime, *(f"{statistics.mean(mean_vio(r, s) for r in trained):.2f}"
                               for s in shares),
                     f"{statistics.mean(vio):.2f}",
                     f"{statistics.mean(map(dead_experts, trained)):.1f}",
                     f"{statistics.mean(bits):.4f}", f"{statistics.stdev(bits):.4f}"))
    return rows


def interval(gaps: list[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval (Student's t)."""
    half = T95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.mean(gaps), half


def fp8_table(args: ClaimArgs, runs: dict[str, list[Trained]]) -> list[tuple]:
    """A row a seed: both runs, their gap, and the run without FP8 evaluated with it."""
    rows = [("bits per byte", "without FP8", "with FP8", "gap", "same weights with FP8", "gap")]
    gaps, same = [], []
    for seed, (plain, fp8) in enumerate(zip(*runs.values(), strict=True)):
        full, rounded = both_ways(plain.folder, args.device)
        gaps.append(fp8.bits_per_byte / plain.bits_per_byte - 1)
        same.append(rounded / full - 1)
        rows.append((f"seed {seed}", f"{plain.bits_per_byte:.4f}", f"{fp8.bits_per_byte:.4f}",
                     f"{gaps[-1]:+.2%}", f"{rounded:.4f}", f"{same[-1]:+.3%}"))
    bits = [run.bits_per_byte for run in runs["without"]]
    (mean, half), (mean_same, half_same) = interval(gaps), interval(same)
    return [*rows,
            ("mean, 95 % interval", f"{statistics.mean(bits):.4f}", "",
             f"{mean:+.2%} +- {half:.2%}", "", f"{mean_same:+.3%} +- {half_same:.3%}"),
            ("spread between seeds", f"{statistics.stdev(bits) / statistics.mean(bits):.2%}",
             "", "", "", "")]


def both_ways(folder: Path, device: str) -> tuple[float, float]:
    """Bits per byte of one run's weights in full precision and in FP8."""
    run = load_run(folder, pick_device(device))
    seq_len = run.config["train"]["seq_len"]
    data = open_data(run.config["train"]["data"], run.tokenizer, seq_len)
    results = []
    for prepare in (lambda: None, lambda: use_fp8(run.model)):
        prepare()
        results.append(evaluate(run.model, data.valid, run.tokenizer.n_bytes, seq_len, 16))
    return results[0].bits_per_byte, results[1].bits_per_byte


TABLES = {"balance": balance_table, "fp8": fp8_table}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    [given] = parse("minids.lab.claims", __doc__, ClaimArgs, argv=argv)
    args = ClaimArgs(**given)
    runs = train_all(args)
    torch.set_num_threads(args.threads * args.jobs)  # what the runs had together
    print(format_table(TABLES[args.what](args, runs)))


if __name__ == "__main__":
    run_program("minids.lab.claims", main)
