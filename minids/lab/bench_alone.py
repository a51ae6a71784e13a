"""minids alone: steps of the program `train`, steps of decoding, prompts of growing length."""

import gc
import shlex
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from minids.base.command_line import parse
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.costs.decoding import drafting
from minids.costs.flops import forward_flops_per_token
from minids.infer.generation import generate
from minids.lab.bench_setup import WARM_UP, Bench
from minids.lab.roofline import measure_peaks
from minids.lab.timing import watch_memory
from minids.model.transformer import Transformer
from minids.parallel.layout import Layout
from minids.parallel.team import Team, world_size
from minids.runs.settings import TrainArgs
from minids.text.tokenizer import Tokenizer
from minids.train import Trainer, fit_model, settings

SHORTEST = 2048  # tokens of the shortest prompt, a quarter of the next


def trainer(command: str, device: str, team: Team | None = None) -> Trainer:
    """Return what `python -m minids.train` with these flags makes before its first step.

    team: of the ranks that torchrun started, which take the layout that the flags name
    """
    given, changes, layout = parse("minids.train", "", TrainArgs, ModelArgs, Layout,
                                   argv=shlex.split(command))
    args, changes = settings({"device": device} | given, changes)
    layout, kind = Layout(**layout).fitted(world_size()), Trainer
    if team is not None:
        from minids.parallel.ranks import Ranks
        from minids.runs.over_ranks import TrainerOverRanks, over_ranks
        team.ranks = Ranks.of(layout, team.device)
        kind = over_ranks(Trainer, TrainerOverRanks, team)
    tokenizer = Tokenizer.open(args.tokenizer)
    return kind(args, fit_model(args, changes, tokenizer), Path(args.out or "runs"), tokenizer)


def program_table(bench: Bench) -> Iterator[list[str]]:
    """Measure the program's own steps: data, gradients, clipping, optimizers, metrics.

    Nothing of one command is left for the next, neither memory nor compiled code. Under torchrun
    all ranks take the steps, and memory is that of the rank which needs most.
    """
    yield ["train", "ranks", "parameters", "tokens/s", "MFU", "GiB", "first step s",
           "start to step 1 s", "first loss", "last loss"]
    for command in bench.settings.command.split(";"):
        yield program_row(bench, command.strip())
        gc.collect()
        if bench.settings.device == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def program_row(bench: Bench, command: str) -> list[str]:
    """Return the table's cells for one command."""
    s, team, start = bench.settings, bench.team, time.perf_counter()
    program = trainer(command, s.device, team)
    first = program.train_step()
    compiled, began = program.seconds, time.perf_counter() - start
    steps = [program.train_step() for _ in range(WARM_UP + s.pairs * s.steps_per_timing)][WARM_UP:]
    speed = statistics.median(step["tokens_per_s"] for step in steps)
    mfu = program.model_flops_utilisation(speed)
    count, memory = count_parameters(program.model.args), steps[-1]["memory_mib"]
    memory = memory if team is None else team.agree(memory)
    return [command, str(program.team.world), f"{count.total + count.mtp:,}", f"{speed:,.0f}",
            f"{mfu:.1%}" if mfu else "-", f"{memory / 1024:.1f}", f"{compiled:.1f}",
            f"{began:.1f}", f"{first['loss']:.3f}", f"{steps[-1]['loss']:.3f}"]


def seconds_per_step(model: Transformer, prompts: list[list[int]], new_tokens: int) -> float:
    """Return the mean time of the later half of `generate`'s steps, seconds."""
    at = []
    generate(model, prompts, new_tokens,
             on_token=lambda row, _: at.append(time.perf_counter()) if row == 0 else None)
    half = len(at) // 2
    return (at[-1] - at[half]) / (len(at) - 1 - half)


def step_table(bench: Bench) -> Iterator[list[str]]:
    """Time decoding steps beside the time that reading the weights takes.

    Experts are read if at least one token visits them, as if tokens chose evenly.
    """
    s, model = bench.settings, bench.decoder()
    rate = measure_peaks(s.device).bytes_per_second
    size = model.head.weight.element_size()
    yield ["decoding step", "ms", "tokens/s", "weights read GB", "floor ms", "share"]
    for batch in sorted({1, s.decode_batch}):
        prompts = bench.prompts(batch)
        generate(model, prompts, s.new_tokens)  # warms up
        taken = statistics.median(seconds_per_step(model, prompts, s.new_tokens)
                                  for _ in range(s.pairs))
        read = size * drafting(model.args, 0, drafts=0, batch=batch).plain
        yield [f"batch {batch}", f"{1e3 * taken:.2f}", f"{batch / taken:,.0f}", f"{read / 1e9:.3f}",
               f"{1e3 * read / rate:.3f}", f"{read / rate / taken:.0%}"]


def prompt_flops(args: ModelArgs, length: int) -> float:
    """Return the FLOPs of one prompt, whose last token alone meets the head."""
    head = 2 * args.dim * args.vocab_size
    return length * (forward_flops_per_token(args, length) - head) + head


def prompt_table(bench: Bench) -> Iterator[list[str]]:
    """Time `generate` up to the first token of one long prompt."""
    s = bench.settings
    lengths = [n for i in range(8) if (n := SHORTEST << 2 * i) < s.context] + [s.context]
    model = bench.decoder(max_seq_len=max(bench.args.max_seq_len, s.context + 1))
    peak = measure_peaks(s.device).flops[s.one_dtype]
    yield ["prompt", "ms", "tokens/s", "TFLOP/s", "of the peak", "MiB added"]
    for length in lengths:
        text = torch.randint(model.args.vocab_size, (1, length),
                             generator=torch.Generator().manual_seed(s.seed)).tolist()
        before, most = watch_memory(lambda text=text: generate(model, text, 1), s.device)
        taken = statistics.median(generate(model, text, 1).seconds for _ in range(s.pairs))
        rate = prompt_flops(model.args, length) / taken
        yield [f"{length:,} tokens", f"{1e3 * taken:,.1f}", f"{length / taken:,.0f}",
               f"{rate / 1e12:.1f}", f"{rate / peak:.0%}", f"{(most - before) / 2**20:,.0f}"]
