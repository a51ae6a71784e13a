"""Paired timings: minids beside transformers, and experts beside a dense model.

    python -m minids.lab.bench                          # the preset tiny on a CPU
    python -m minids.lab.bench --what decode --dtype fp32 --pairs 15
    python -m minids.lab.bench --what moe-vs-dense --seeds 3 --steps 500
    python -m minids.lab.bench --what sparse --context 32768 --pairs 3
    python -m minids.lab.bench --what speculative --run runs/deep
    python -m minids.lab.bench --what rollout --preset micro --decode-batch 256 --prompt 16 \\
        --new-tokens 48 --dtype fp32

The tables:
    train         training steps: forward, backward, clipping and fused AdamW
    decode        greedy decoding with a cache, at batch 1 and at --decode-batch
    memory        peak memory of both, each measured in its own process
    dense         training with experts beside a dense model with as many active parameters
    moe-vs-dense  both of these trained: validation bits per byte at equal tokens and equal time
    sparse        prefill and decoding against context length, dense and sparse: time and FLOPs
    speculative   greedy decoding of a trained run with and without drafts of its MTP modules,
                  beside the predictions of the cost model in `minids.costs`, also at other depths
    rollout       sampling for reinforcement learning: `minids.rl.rollout`, which also returns
                  log-probabilities and routes, beside transformers' generate, which does not

The other side of train, decode, memory and rollout is transformers' model with the same weights
(`minids.hf`), data, precision, threads and allocator, under whichever of its settings a trial finds
fastest. The two run in turn, A B then B A, and the ratio is the median over such pairs: where other
programs share the machine, a ratio within a pair is steadier than any time. The benchmark first
checks that both compute the same function and stops if they do not: it compares logits and first
losses, and decoded tokens may differ only where rounding decides.

Below each table stands which body of each function ran (`minids.kernels.registry`).

Simplified: no MTP modules, gate-bias updates or balance loss, which transformers' model does not
train; weights are random. `batched_mm`, a third implementation of transformers' experts, joins the
trial for decoding only: in training it is many times slower on a CPU.
"""

from dataclasses import replace
from importlib.metadata import version

import torch

from minids.base.command_line import parse, run_program
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.hf import config_from_args
from minids.kernels.registry import recorded
from minids.lab.bench_dense import dense_table, quality_table
from minids.lab.bench_setup import DEFAULT_TABLES, Bench, BenchArgs
from minids.lab.bench_sparse import sparse_table
from minids.lab.bench_speculative import speculative_table
from minids.lab.bench_transformers import (
    decode_table,
    memory_table,
    rollout_table,
    train_table,
)
from minids.runs.device import prepare_cpu

MAKERS = {"train": train_table, "decode": decode_table, "memory": memory_table,
          "dense": dense_table, "moe-vs-dense": quality_table, "sparse": sparse_table,
          "speculative": speculative_table, "rollout": rollout_table}
BESIDE_TRANSFORMERS = ("all", "train", "decode", "memory", "rollout")


def describe(bench: Bench) -> str:
    """Return two lines on the model, the machine and the sizes that all tables share."""
    s, count = bench.settings, count_parameters(bench.args)
    where = torch.cuda.get_device_name() if s.device == "cuda" else (
        f"cpu ({torch.backends.cpu.get_cpu_capability()}), {s.threads} threads")
    return (f"{s.preset}: {count.total:,} parameters, {count.active:,} active, without MTP\n"
            f"{where}; torch {torch.__version__}, transformers {version('transformers')}; "
            f"{s.pairs} pairs; training {s.batch_size} x {s.seq_len} tokens per step, decoding "
            f"{s.new_tokens} tokens after {s.prompt}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    given, changes = parse("minids.lab.bench", __doc__, BenchArgs, ModelArgs, argv=argv)
    settings = BenchArgs(**given)
    prepare_cpu(settings.threads)
    args = replace(ModelArgs.preset(settings.preset), **changes)
    if settings.what in BESIDE_TRANSFORMERS:
        config_from_args(args)  # refuses a model that transformers has no class for
    bench = Bench(settings, args)
    print(describe(bench), flush=True)
    for name in DEFAULT_TABLES if settings.what == "all" else [settings.what]:
        with recorded() as calls:  # costs 0.1 us per call
            rows = MAKERS[name](bench)
        ran = ", ".join(f"{function} {body}" for function, body in sorted(calls))
        print(f"\n{format_table(rows)}\n\nbodies: {ran or 'ran in another process'}", flush=True)


if __name__ == "__main__":
    run_program("minids.lab.bench", main)
