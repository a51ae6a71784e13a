"""Paired timings: minids beside transformers, and experts beside a dense model.

    python -m minids.lab.bench                          # the preset tiny on a CPU
    python -m minids.lab.bench --what decode --dtype fp32 --pairs 15
    python -m minids.lab.bench --what moe-vs-dense --seeds 3 --steps 500
    python -m minids.lab.bench --what sparse --context 32768 --pairs 3
    python -m minids.lab.bench --what fp8 --preset v3 --batch-size 16 --seq-len 1024 --device cuda
    python -m minids.lab.bench --what speculative --run runs/deep
    python -m minids.lab.bench --what serve,batching --run data/r1/base --pairs 3 --dtype fp32
    python -m minids.lab.bench --device cuda --what train,roofline --preset small --batch-size 16
    torchrun --nproc-per-node 2 -m minids.lab.bench --what program --command "--preset nano"
    python -m minids.lab.bench --what profile --record figures/profile.json

The tables:
    train         training steps: forward, backward, clipping and fused AdamW
    decode        greedy decoding with a cache, at batch 1 and at --decode-batch
    memory        peak memory of both, each measured in its own process
    dense         training with experts beside a dense model with as many active parameters
    moe-vs-dense  both of these trained: validation bits per byte at equal tokens and equal time
    sparse        prefill and decoding against context length, dense and sparse: time and FLOPs; on
                  a GPU one attention layer of V3.2, its training too
    speculative   greedy decoding of a trained run with and without drafts of its MTP modules,
                  beside the predictions of the cost model in `minids.costs`, also at other depths
    rollout       sampling for reinforcement learning: `minids.rl.rollout`, which also returns
                  log-probabilities and routes, beside transformers' generate, which does not
    serve         the server of --run under 1, 8 and 64 clients, over HTTP: each reads its stream,
                  pauses at random, and asks again; prompts and replies of unequal length
    batching      one trace of Poisson arrivals and replies of 16 to 512 tokens, at the rate that
                  saturates static batching (`generate`): static beside continuous batching
    program       steps of `minids.train` itself, with the flags that --command gives; under
                  torchrun over its ranks, and --command names their layout too
    step          a decoding step of minids beside the time that reading its weights takes
    prompt        `generate` up to the first token of prompts of up to --context tokens
    fp8           rounding, a linear layer and a layer of experts of the preset in FP8 beside BF16
    roofline      the machine's measured peaks, and each kernel body's share of them
    profile       where the time of a training step (--command) and a decoding step goes; with
                  --label it is measured and kept in --record, without it is drawn from there

The other side of train, decode, memory and rollout is transformers' model with the same weights
(`minids.hf`), data, precision, threads and allocator, under whichever of its settings a trial finds
fastest. The two run in turn, A B then B A, and the ratio is the median over such pairs: where other
programs share the machine, a ratio within a pair is steadier than any time. The benchmark first
checks that both compute the same function and stops if they do not: it compares logits and first
losses. Decoded tokens may differ only where rounding decides; where more differs, the row says so.

Rows appear on stderr as they are measured; below each table stands which body of each function ran
(`minids.kernels.registry`).

Simplified: no MTP modules, gate-bias updates or balance loss, which transformers' model does not
train; weights are random. `batched_mm`, a third implementation of transformers' experts, joins the
trial for decoding only: in training it is many times slower on a CPU.
"""

import contextlib
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from minids.base.command_line import parse, run_program
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.hf import config_from_args
from minids.kernels.registry import recorded
from minids.lab import bench_sparse
from minids.lab.bench_alone import program_table, prompt_table, step_table
from minids.lab.bench_decoding import speculative_table
from minids.lab.bench_fp8 import fp8_table, one_layer
from minids.lab.bench_serving import batching_table, clients_table
from minids.lab.bench_setup import ALONE, Bench, BenchArgs, Stepper, minids_loss
from minids.lab.bench_transformers import decode_table, memory_table, rollout_table, train_table
from minids.lab.profiling import profile_table
from minids.lab.roofline import roofline_table
from minids.lab.timing import RATIOS
from minids.parallel.layout import Layout
from minids.parallel.team import Team, speaking_first, started, world_size
from minids.runs.device import check_memory, pick_device, prepare_cpu
from minids.runs.folders import free_folders
from minids.runs.metrics import read_metrics
from minids.runs.settings import TrainArgs
from minids.train import train

BESIDE_TRANSFORMERS = ("train", "decode", "memory", "rollout")
WIDTH_MULTIPLE = 8  # of the dense model's hidden width, to avoid odd shapes


def equal_active_dense(args: ModelArgs) -> ModelArgs:
    """Return the dense model with as many active parameters; all its layers share one width."""
    dense = replace(args, n_routed_experts=0, inter_dim=WIDTH_MULTIPLE)
    missing = count_parameters(args).active - count_parameters(dense).active
    each = 3 * args.dim * args.n_layers * WIDTH_MULTIPLE
    return replace(dense, inter_dim=WIDTH_MULTIPLE * max(1, 1 + round(missing / each)))


def dense_table(bench: Bench) -> Iterator[list[str]]:
    """Compare the training speed of experts and the dense model."""
    yield ["training", "experts tokens/s", "dense tokens/s", *RATIOS, "experts active",
           "dense active"]
    pair = bench.args, equal_active_dense(bench.args)
    active = [f"{count_parameters(args).active:,}" for args in pair]
    for dtype in bench.settings.dtypes:
        steppers = [Stepper(bench.model(args), minids_loss, dtype) for args in pair]
        yield [dtype, *bench.time_steps(*steppers), *active]


def train_one(s: BenchArgs, args: ModelArgs, seed: int, steps: int, run: Path) -> dict:
    """Train a model with the preset's recipe; return its last metrics, validation included."""
    dtype = "auto" if s.dtype == "both" else s.dtype
    train_args = TrainArgs.for_preset(
        s.preset, steps=steps, seed=seed, out=str(run), data=s.data, dtype=dtype, device=s.device,
        threads=s.threads, eval_every=0, save_every=steps, keep_last=1)
    with contextlib.redirect_stdout(sys.stderr):
        train(train_args, asdict(args))
    return read_metrics(run)[-1]


def quality_table(bench: Bench) -> Iterator[list[str]]:
    """Compare validation bits per byte: experts, dense for equal tokens, dense for equal time.

    The third run has as many steps as fit into the first one's time, so its learning rate decays
    to the end like the first one's; a run cut off at that time would stop before the decay.
    """
    s, folder = bench.settings, next(free_folders(Path("runs") / "moe-vs-dense"))
    moe, dense = bench.trained_args, equal_active_dense(bench.trained_args)
    steps = s.steps or TrainArgs.for_preset(s.preset).steps
    yield ["bits per byte", "experts", "dense, equal tokens", "lower", "dense, equal time", "lower",
           "steps", "seconds"]
    bits = []
    for seed in range(s.seed, s.seed + s.seeds):
        first = train_one(s, moe, seed, steps, folder / f"experts-seed-{seed}")
        second = train_one(s, dense, seed, steps, folder / f"dense-tokens-seed-{seed}")
        more = max(1, round(steps * first["seconds"] / second["seconds"]))
        third = train_one(s, dense, seed, more, folder / f"dense-time-seed-{seed}")
        three = first, second, third
        bits.append([last["valid_bpb"] for last in three])
        yield [f"seed {seed}", *quality_cells(bits[-1]),
               " / ".join(str(last["step"]) for last in three),
               " / ".join(f"{last['seconds']:.0f}" for last in three)]
    means = [statistics.mean(column) for column in zip(*bits, strict=True)]
    yield ["mean", *quality_cells(means), "", ""]


def quality_cells(bits: list[float]) -> list[str]:
    """Return table cells: bits per byte of the three runs, and the winner of each comparison."""
    experts, *dense = bits
    cells = [f"{experts:.4f}"]
    for other in dense:
        cells += [f"{other:.4f}", "experts" if experts < other else "dense"]
    return cells


# Each yields the row of titles, then row by row.
MAKERS = {"train": train_table, "decode": decode_table, "memory": memory_table,
          "dense": dense_table, "moe-vs-dense": quality_table, "sparse": bench_sparse.table,
          "speculative": speculative_table, "rollout": rollout_table, "serve": clients_table,
          "batching": batching_table, "program": program_table, "step": step_table,
          "prompt": prompt_table, "roofline": roofline_table, "profile": profile_table,
          "fp8": fp8_table}


def main(argv: list[str] | None = None) -> None:
    with speaking_first():
        given, changes = parse("minids.lab.bench", __doc__, BenchArgs, ModelArgs, argv=argv)
        s = BenchArgs(**given)
    prepare_cpu(s.threads)
    with started(Layout().fitted(world_size()), pick_device(s.device).type) as team:
        if team is None:
            print_tables(s, changes, None)
        else:
            with team.alike():
                print_tables(s, changes, team)


def print_tables(s: BenchArgs, changes: dict, team: Team | None) -> None:
    """Make the tables; changes: fields of `ModelArgs` that differ from the preset's"""
    args = replace(ModelArgs.preset(s.preset), **changes)
    each = s.one_dtype.itemsize if set(s.tables) <= set(ALONE) else 16
    held = args
    if s.tables == ["fp8"]:  # weights and gradients of one layer in BF16, and both copies in FP8
        held, each = one_layer(args), 6
    check_memory(held, pick_device(s.device), each)  # refuses a GPU that is not there, too
    if set(s.tables) & set(BESIDE_TRANSFORMERS):
        config_from_args(args)  # refuses a model that transformers has no class for
    bench = Bench(s, args, team)
    count = count_parameters(bench.args)
    where = torch.cuda.get_device_name() if s.device == "cuda" else (
        f"cpu ({torch.backends.cpu.get_cpu_capability()}), {s.threads} threads")
    if s.tables != ["program"]:  # which has a model of its own
        print(f"{s.preset}: {count.total:,} parameters, {count.active:,} active, without MTP")
    print(f"{where}; torch {torch.__version__}, transformers {version('transformers')}; "
          f"{s.pairs} pairs; training {s.batch_size} x {s.seq_len} tokens per step, decoding "
          f"{s.new_tokens} tokens after {s.prompt}", flush=True)
    for name in s.tables:
        rows = []
        with recorded() as calls:  # costs 0.1 us per call
            for row in MAKERS[name](bench):
                if team is None or team.first:
                    print("  ".join(row), file=sys.stderr, flush=True)
                rows.append(row)
        ran = ", ".join(f"{function} {body}" for function, body in sorted(calls))
        print(f"\n{format_table(rows)}\n\nbodies: {ran or 'none ran in this process'}", flush=True)


if __name__ == "__main__":
    run_program("minids.lab.bench", main)
