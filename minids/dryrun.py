"""Plan a run over many ranks before renting them: memory, messages, bubble, hours and dollars.

    python -m minids.dryrun --preset v3 --gpus 2048 --pipeline 16 --expert-parallel 64
    python -m minids.dryrun --preset small --gpus 8 --gpu-memory 24
    python -m minids.dryrun --what table                which models fit 1 to 2,048 GPUs, and how
    python -m minids.dryrun --what inference            which GPUs hold released weights in FP8

The package's own code shards the model over ranks that are not there and runs micro-batches without
numbers (`minids.parallel.measuring` says what that leaves out). No GPU is touched and none is
measured: seconds are bytes over a bandwidth, or FLOPs over a share of the peak, that flags assume.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from tqdm import tqdm

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, demand, option
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.costs import count_parameters, flops
from minids.costs.bill import V3_TOKENS, Rental, training_bill
from minids.costs.cards import ROOM, named_card
from minids.costs.serving import held
from minids.parallel.layout import Layout
from minids.runs.optimizers import is_hidden_matrix

MODELS = ("small", "moonlight", "v2", "v3")
HOST = 8  # GPUs of one host
# For the table: pipeline, expert_parallel and replicate, in the order in which they are tried.
CHOICES = {1: [(1, 1, 1)], 2: [(1, 1, 1)], 8: [(1, 8, 1)], 64: [(1, 8, 1), (1, 32, 1)],
           256: [(1, 8, 1), (1, 32, 1)], 2048: [(1, 8, 8), (16, 64, 1)]}
HELD_BY = (1, 2, 4, 8, 16, 32)  # GPUs, for inference


@dataclass(frozen=True)
class DryRunArgs(Settings):
    """Model, ranks and batch."""

    what: str = option("model", "one model and layout; a table of models and numbers of GPUs; or "
                                "released weights in FP8, to be used and not trained",
                       ("model", "table", "inference"))
    preset: str = option("v3", "model: " + ", ".join(ModelArgs.presets()))
    gpus: int = option(2048, "GPUs, one rank each", low=1, high=2 ** 16)
    seq_len: int = option(0, "tokens of a sequence; 0: 4,096, or fewer if the model takes no more",
                          low=0)
    micro_batch: int = option(1, "sequences of a micro-batch on one rank", low=1)
    batch_size: int = option(0, "sequences of an optimizer step; 0: 120 micro-batches on each rank "
                                "with a pipeline, as V3 has it, and one without", low=0)
    recompute: str = option("blocks", "what is computed twice: none, or all of the blocks",
                            ("none", "blocks"))
    optimizer: str = option("adamw", "muon: one moment for the matrices in the blocks, not two",
                            ("adamw", "muon"))
    dtype: str = option("bf16", "precision of products; weights and gradients are FP32",
                        ("bf16", "fp32"))
    tokens: float = option(V3_TOKENS, "tokens to train on; V3 had 14.8e12", above=0)
    network: float = option(0.0, "assumed bandwidth of a GPU to all others, GB/s; 0: 400 for up "
                                 "to 8 GPUs, which NVLink joins, and 50 beyond, 400 Gbit/s", low=0)

    def sequence(self, args: ModelArgs) -> int:
        """Return the tokens of a sequence."""
        return self.seq_len or min(4096, args.max_seq_len)

    @property
    def bandwidth(self) -> float:
        """Return the assumed bandwidth, bytes per second."""
        return (self.network or (400 if self.gpus <= HOST else 50)) * 1e9


# Of an optimizer's state, per number of a parameter; Muon leaves all but hidden matrices to AdamW.
STATE_BYTES = {"adamw": lambda name, p: 8,
               "muon": lambda name, p: 4 if is_hidden_matrix(name, p) else 8}


class Rank(NamedTuple):
    """The memory and messages of one pipeline rank: a parameter count, and bytes elsewhere."""

    rank: int
    parameters: int
    weights: int
    state: int
    outlast: int  # gathered weights, gradients, copies: for the whole step
    stored: int  # activations of all micro-batches in flight
    peak: int  # beside all these, at the worst moment
    flights: int  # micro-batches stored at a time, at most, counted by stage
    messages: dict[str, int]  # by kind, of a step

    @property
    def total(self) -> int:
        """Return all that is there at the worst moment, bytes."""
        return self.weights + self.state + self.outlast + self.stored + self.peak


class Report(NamedTuple):
    """A layout of one model, measured."""

    layout: Layout
    stages: list  # of `measuring.Footprint`
    ranks: list[Rank]
    bubble: float

    @property
    def fullest(self) -> Rank:
        """Return the rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def busiest(self) -> Rank:
        """Return the rank that sends most."""
        return max(self.ranks, key=lambda rank: sum(rank.messages.values()))

    def fits(self, rental: Rental) -> bool:
        """Return whether every rank fits a GPU, with a tenth left for CUDA, NCCL and fragments."""
        return self.fullest.total <= ROOM * rental.gpu_memory * 1e9


def dry_run(args: ModelArgs, run: DryRunArgs, layout: Layout, known: dict | None = None,
            memory: float = 80e9) -> Report:
    """Run a model on ranks that are not there; return what each of them holds and sends.

    args: the model; run: GPUs, batch, precision, optimizer; its `preset` and `what` are not read
    layout: as in training, with numbers left open for this many GPUs
    known: what earlier calls measured: pass one dict to all of them, and equal stages are run once
    memory: of a GPU, bytes: where there is room, gathered weights stay for a whole step
    Raises ValueError, naming the field, for a layout that fits neither GPUs nor model.

        dry_run(ModelArgs.preset("v3"), DryRunArgs(gpus=2048),
                Layout(pipeline=16, expert_parallel=64)).ranks[0].total   # bytes on a GPU
    """
    from minids.parallel.measuring import Load, Measured, fake_ranks  # FSDP: some seconds
    from minids.parallel.schedules import bubble, most_stored, orders

    layout = fitted(layout, run)
    layout.check(args)
    load = Load(run.micro_batch, run.sequence(args), STATE_BYTES[run.optimizer], run.recompute,
                torch.bfloat16 if run.dtype == "bf16" else torch.float32, memory)
    known = {} if known is None else known
    measured = known.setdefault((args, load), Measured(args, load))
    with fake_ranks(layout, run.gpus) as here:
        stages = [measured.stage(here, stage) for stage in range(layout.n_stages)]
    rows, found = orders(layout), []
    for rank, row in enumerate(rows):
        parts = {stage: stages[stage] for stage in layout.stages_of(rank)}
        both = stages[0]._make(sum(values) for values in zip(*parts.values(), strict=True))
        found.append(Rank(
            rank, both.own, both.weights, both.state, both.outlast,
            most_stored(row, {stage: one.kept for stage, one in parts.items()}),
            max(one.peak for one in parts.values()), most_stored(row, dict.fromkeys(parts, 1)),
            both.step(layout.micro_batches)))
    return Report(layout, stages, found, bubble(rows))


def fitted(layout: Layout, run: DryRunArgs) -> Layout:
    """Return the layout on these GPUs, with the micro-batches of a batch."""
    chosen = layout.fitted(run.gpus)
    if layout.micro_batches or (chosen.pipeline == 1 and not run.batch_size):
        return chosen
    pieces = chosen.data_ranks * run.micro_batch
    batch = run.batch_size or 120 * pieces
    demand("batch_size", batch, batch % pieces == 0,
           f"a multiple of {pieces}, for {chosen.data_ranks} ranks that see different tokens")
    if chosen.pipeline == 1:  # --grad-accum splits a step there
        return replace(chosen, micro_batches=batch // pieces)
    return replace(layout, micro_batches=batch // pieces).fitted(run.gpus)


def size(amount: float) -> str:
    """Return bytes in GB of 10^9."""
    return f"{amount / 1e9:,.2f} GB"


def seconds(args: ModelArgs, run: DryRunArgs, report: Report, rental: Rental) -> tuple:
    """Return how long a step computes, bubble included, and how long its busiest rank sends."""
    layout, seq_len = report.layout, run.sequence(args)
    tokens = layout.micro_batches * run.micro_batch * seq_len / layout.pipeline  # of one GPU
    rate = rental.gpu_peak * 1e12 * rental.mfu
    computing = tokens * flops.flops_per_token(args, seq_len) / rate / (1 - report.bubble)
    return computing, sum(report.busiest.messages.values()) / run.bandwidth


def model_rows(name: str, args: ModelArgs, run: DryRunArgs, report: Report, other: Report,
               rental: Rental) -> Iterator:
    """Yield the rows of one layout; other: the same with the other choice of recomputation."""
    layout, top, seq_len = report.layout, report.fullest, run.sequence(args)
    step = layout.data_ranks * layout.micro_batches * run.micro_batch
    yield (f"{name} on {run.gpus:,} {rental.gpu}: pipeline {layout.pipeline} x replicate "
           f"{layout.replicate} x fsdp {layout.fsdp}, experts over {layout.expert_parallel}")
    yield (f"{layout.schedule if layout.pipeline > 1 else 'no pipeline'}, {layout.micro_batches} "
           f"micro-batches of {run.micro_batch} x {seq_len:,} tokens on each rank, {step:,} "
           f"sequences a step; recompute {run.recompute}, {run.dtype}, {run.optimizer}")
    yield "the package's own sharding on ranks that are not there; nothing of this was run on a GPU"
    yield ""
    yield ("rank", "parameters", "weights", "optimizer", "gathered, gradients", "activations",
           "at work", "all")
    for rank in report.ranks:
        sizes = rank.weights, rank.state, rank.outlast, rank.stored, rank.peak, rank.total
        yield f"{rank.rank}", rank.parameters, *map(size, sizes)
    yield ""
    says = {True: "fits", False: "does not fit"}
    yield (f"fullest is rank {top.rank}: {size(top.total)}, {says[report.fits(rental)]} "
           f"{ROOM:.0%} of {rental.gpu_memory:g} GB")
    yield (f"with recompute {'none' if run.recompute == 'blocks' else 'blocks'}: "
           f"{size(other.fullest.total)}, {says[other.fits(rental)]}; activations "
           f"{size(other.fullest.stored)}")
    if run.gpus > 1:
        yield from message_rows(args, run, report, rental)
    if layout.pipeline > 1:
        most = [rank.flights for rank in report.ranks]
        yield (f"bubble: {report.bubble:.1%} of a step, if all stages take equally long; at most "
               f"{max(most)} micro-batches stored on a rank" + (
                   ", each in one of its two stages" if layout.n_stages > layout.pipeline else ""))
    due = training_bill(flops.flops_per_token(args, seq_len), run.tokens, run.gpus, rental)
    yield (f"{run.tokens:,.0f} tokens at {rental.mfu:.0%} of {rental.gpu_peak:g} TFLOPS, assumed: "
           f"{due.days * 24:,.0f} hours, {due.gpu_hours:,.0f} GPU-hours, {due.dollars:,.0f} USD at "
           f"{rental.gpu_price:g} USD each")


def message_rows(args: ModelArgs, run: DryRunArgs, report: Report, rental: Rental) -> Iterator[str]:
    """Yield what the busiest rank sends in a step, and how long that takes at least."""
    busiest = report.busiest
    yield f"messages that rank {busiest.rank}, the busiest, sends"
    for kind, amount in busiest.messages.items():
        if amount:
            yield (f"  {kind}: {size(amount)} a step, "
                   f"{size(amount / report.layout.micro_batches)} a micro-batch")
    computing, sending = seconds(args, run, report, rental)
    yield (f"  {sending:,.2f} s a step: these bytes over an assumed {run.bandwidth / 1e9:g} GB/s; "
           f"computing takes {computing:,.2f} s at the share of the peak below")


def flags_of(layout: Layout) -> str:
    """Return the flags of a layout."""
    words = {"--replicate": layout.replicate, "--pipeline": layout.pipeline,
             "--expert-parallel": layout.expert_parallel}
    return "".join(f" {flag} {value}" for flag, value in words.items() if value > 1)


def first_fit(args: ModelArgs, run: DryRunArgs, rental: Rental, known: dict) -> str:
    """Return memory, messages and flags of the first of CHOICES that fits, or that none does.

    known: as in `dry_run`
    """
    count, needs = count_parameters(args), []
    least = 16 * (count.total + count.mtp) / run.gpus  # weight, gradient and two moments
    if run.optimizer == "adamw" and least > ROOM * rental.gpu_memory * 1e9:
        return f"no: {least / 1e9:,.0f} GB of state"
    for pipeline, experts, replicate in CHOICES[run.gpus]:
        report = dry_run(args, run, Layout(pipeline=pipeline, expert_parallel=experts,
                                           replicate=replicate), known, rental.gpu_memory * 1e9)
        needs.append(report.fullest.total / 1e9)
        if report.fits(rental):
            computing, sending = seconds(args, run, report, rental)
            return f"{needs[-1]:,.1f} GB, {sending / computing:.1f}{flags_of(report.layout)}"
    return f"no: {min(needs):,.0f} GB"


def table(run: DryRunArgs, rental: Rental) -> str:
    """Return what fits: models by numbers of GPUs."""
    known, cells = {}, {}
    for name, gpus in tqdm(list(product(MODELS, CHOICES)), unit="cell", disable=None):
        cells[name, gpus] = first_fit(ModelArgs.preset(name), replace(run, gpus=gpus), rental,
                                      known)
    return format_table([
        ("GPUs", *MODELS),
        *((f"{gpus:,}", *(cells[name, gpus] for name in MODELS)) for gpus in CHOICES), "",
        "The most that a rank holds, how long it sends as a multiple of how long it computes, and "
        f"the flags beside --recompute {run.recompute};",
        f"no: more than {ROOM:.0%} of {rental.gpu_memory:g} GB. {run.micro_batch} sequence(s) a "
        f"micro-batch, {run.optimizer}; {rental.mfu:.0%} of {rental.gpu_peak:g} TFLOPS",
        "and the bandwidth are assumed. The package's own sharding on ranks that are not there: "
        "none of this was run on GPUs."])


def inference(preset: str, args: ModelArgs, layout: Layout, cards: list[Rental],
              sizes: tuple[int, ...]) -> str:
    """Return which GPUs hold a released checkpoint in FP8 blocks, and how much cache beside it.

    layout: its pipeline and expert_parallel; if both are 1, experts are spread over up to 8 GPUs,
        one host, and layers over hosts
    """
    rows = [("GPUs", "flags", "weights", *(f"tokens of cache, {card.gpu} {card.gpu_memory:g} GB"
                                           for card in cards))]
    for gpus in sizes:
        placed = layout
        if layout.pipeline * layout.expert_parallel == 1:
            experts = math.gcd(gpus, HOST) if args.has_moe else 1
            placed = Layout(pipeline=gpus // experts, expert_parallel=experts)
        ranks = placed.pipeline * placed.expert_parallel
        demand("gpus", gpus, gpus == ranks, f"pipeline x expert_parallel = {ranks}")
        placed.check(args)
        ranks = [held(args, placed.layers_of(rank, args), placed.expert_parallel,
                      rank == placed.pipeline - 1) for rank in range(placed.pipeline)]
        found = [min(rank.tokens(ROOM * card.gpu_memory * 1e9) for rank in ranks) for card in cards]
        rows.append((f"{gpus}", flags_of(placed).strip() or "none",
                     size(max(rank.weights for rank in ranks)),
                     *(f"{tokens:,}" if tokens else "does not fit" for tokens in found)))
    return format_table([
        f"{preset} as released, matrices in FP8 with a scale per 128 x 128 block, cache in BF16",
        *rows, "", "Weights of the fullest rank; tokens of all requests together in "
        f"{ROOM:.0%} of the card beside them.", "By arithmetic: nothing was loaded."])


def main(argv: list[str] | None = None) -> None:
    """Print one layout, or the table."""
    given, spread, rented, changes = parse("minids.dryrun", __doc__, DryRunArgs, Layout, Rental,
                                           ModelArgs, argv=argv)
    run, rental = DryRunArgs(**given), named_card(rented)
    if run.what == "table":
        return print(table(run, rental))
    args, layout = replace(ModelArgs.preset(run.preset), **changes), Layout(**spread)
    name = run.preset + "".join(f", {field} = {value}" for field, value in changes.items())
    if run.what == "inference":
        cards = [rental] if rented else [named_card({"gpu": gpu}) for gpu in ("H100", "H200")]
        own = layout.pipeline * layout.expert_parallel
        sizes = (run.gpus,) if "gpus" in given else (own,) if own > 1 else HELD_BY
        return print(inference(name, args, layout, cards, sizes))
    other = replace(run, recompute="none" if run.recompute == "blocks" else "blocks")
    memory = rental.gpu_memory * 1e9
    reports = (dry_run(args, run, layout, memory=memory),
               dry_run(args, other, layout, memory=memory))
    print(format_table(list(model_rows(name, args, run, *reports, rental))))


if __name__ == "__main__":
    run_program("minids.dryrun", main)
