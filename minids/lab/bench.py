"""Paired timings: minids beside transformers, and experts beside a dense model.

    python -m minids.lab.bench                          # the preset tiny on a CPU
    python -m minids.lab.bench --what decode --dtype fp32 --pairs 15
    python -m minids.lab.bench --what moe-vs-dense --seeds 3 --steps 500
    python -m minids.lab.bench --what sparse --context 32768 --pairs 3
    python -m minids.lab.bench --what speculative --run runs/deep
    python -m minids.lab.bench --what rollout --preset micro --decode-batch 256 --prompt 16 \\
        --new-tokens 48 --dtype fp32

What each table shows:
    train         training steps a second: forward, backward, clipping and fused AdamW
    decode        greedy decoding with a cache, at batch 1 and at --decode-batch
    memory        the most memory that either takes, each in a process of its own
    dense         training with experts beside a dense model of as many active parameters
    moe-vs-dense  both of these trained: validation bits per byte at equal tokens and equal time
    sparse        prefill and decoding against context length, dense and sparse: time and FLOPs
    speculative   greedy decoding of a trained run with and without drafts of its MTP modules,
                  beside what the cost model of `minids.costs` says, and what of other depths
    rollout       sampling for reinforcement learning (`minids.rl.rollout`), log-probabilities and
                  routes kept, beside transformers' generate, which keeps neither

The other side of the first three and of the last is transformers' model with the same weights
(`minids.hf`), data, precision, threads and allocator, under those of its settings that a trial
finds fastest. The two run in turn, A B then B A, and the figure is the median of the ratios of such
pairs: on a machine with neighbours a ratio within a pair is steadier than any time. Both compute
the same function, and the benchmark stops if they do not: logits and first losses are compared
before anything is timed, and decoded tokens may differ only where rounding decides.

Simplified: without MTP modules, gate-bias updates and balance loss, which transformers' model does
not train; weights are random. `batched_mm`, a third body of transformers' experts, joins the trial
for decoding only: in training it is many times slower on a CPU.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, option, require
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.costs import count_parameters, drafting
from minids.generate import Generation, generate
from minids.hf import config_from_args, open_model, save_hf
from minids.infer.decode import decoder_for
from minids.infer.sampling import Sampler
from minids.infer.selections import Rule, selecting
from minids.infer.validation import windows
from minids.model.mla import LatentCache
from minids.model.sparse_attention import Selection, load_weights_without_indexer
from minids.model.transformer import Transformer
from minids.rl.rollout import roll_out
from minids.runs.learner import read_metrics, tune_allocator
from minids.runs.settings import TrainArgs
from minids.text.loaders import open_data
from minids.text.tokenizer import Tokenizer
from minids.train import default_indexer, free_run_folder, train

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TABLES = ("train", "decode", "memory", "dense", "moe-vs-dense", "sparse", "speculative",
          "rollout")
ASKED_FOR = ("moe-vs-dense", "sparse", "speculative", "rollout")  # tables that "all" leaves out
TRIAL_ROUNDS = 3
WARM_UP = 2           # training steps; the first ones build kernels
MEMORY_STEPS = 5
NEVER = -1            # a token that ends no text
LEARNING_RATE = 1e-3  # of the timed steps
WIDTH_MULTIPLE = 8    # of the dense model's hidden width, to give it no odd shape

# Both sides add the same products in another order. The typical logit then moves by 1e-7 to 2e-6 of
# the logits' spread in FP32 (measured), and by 4e-5 or more if a kind of weight is copied wrongly.
LOGIT_TOLERANCE = 1e-5
LOSS_TOLERANCE = {"fp32": 5e-5, "bf16": 1e-2}  # FP32: sums near 8; BF16: roundings of 2^-9
# How far a decoded token may lie below the best one, as a share of the distance from the best logit
# to the mean: ties that rounding decides. In BF16 rounding also sends tokens to other experts
# (measured: up to 0.17); any other token lies about 1 below.
TIE = {"fp32": 1e-4, "bf16": 0.25}


@dataclass(frozen=True)
class BenchArgs:
    """What to measure."""

    preset: str = option("tiny", "model: " + ", ".join(ModelArgs.presets()))
    what: str = option("all", "table to make; all: every one but moe-vs-dense and sparse",
                       ("all", *TABLES))
    pairs: int = option(7, "timings of each side; they take turns")
    steps_per_timing: int = option(8, "training steps in one timing")
    batch_size: int = option(8, "training: sequences in a step")
    seq_len: int = option(256, "training: tokens in a sequence")
    decode_batch: int = option(64, "decoding: sequences, beside a single one")
    prompt: int = option(64, "decoding: tokens of each prompt")
    new_tokens: int = option(128, "decoding: tokens to generate after each prompt")
    dtype: str = option("both", "bf16: autocast with FP32 weights to train, BF16 weights to decode",
                        ("both", *DTYPES))
    data: str = option("pystdlib", "text: pystdlib, text:PATH or hf:NAME[:CONFIG[:COLUMN]]")
    context: int = option(32768, "sparse: the longest context, tokens; the others are halves")
    run: str = option("runs/tiny", "speculative: run folder of the model")
    seed: int = option(0, "decides the weights and the order of the text")
    seeds: int = option(3, "moe-vs-dense: runs of each model")
    steps: int = option(0, "moe-vs-dense: steps of each run; 0: as many as the preset trains")
    threads: int = option(2, "CPU threads")
    device: str = option("cpu", "cpu or cuda", ("cpu", "cuda"))

    def __post_init__(self):
        check_types(self)
        for name in ("pairs steps_per_timing batch_size seq_len decode_batch prompt new_tokens "
                     "context seeds threads").split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "steps"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        require(self, "device", self.device == "cpu" or torch.cuda.is_available(),
                "cpu: this machine has no GPU that torch can use")

    @property
    def dtypes(self) -> list[str]:
        """The precisions to measure."""
        return list(DTYPES) if self.dtype == "both" else [self.dtype]


class Setting(NamedTuple):
    """Which of transformers' bodies run."""

    attention: str
    experts: str

    def __str__(self) -> str:
        return f"{self.attention} + {self.experts}"


def settings_of(experts: tuple[str, ...]) -> list[Setting]:
    """Every setting with one of these bodies for the experts."""
    return [Setting(*pair) for pair in itertools.product(("sdpa", "eager"), experts)]


TRAIN_SETTINGS = settings_of(("grouped_mm", "eager"))
DECODE_SETTINGS = settings_of(("grouped_mm", "eager", "batched_mm"))


def build_transformers(args: ModelArgs):
    """transformers' model of this configuration, with its own random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    config = AutoConfig.for_model(**config_from_args(args))
    return AutoModelForCausalLM.from_config(config)


def to_transformers(model: Transformer):
    """transformers' model with the weights of ours (without MTP): it computes the same function."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    weight = model.head.weight
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model", dtype=weight.dtype)
        other = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=weight.dtype)
    return other.to(weight.device)


def choose(theirs, setting: Setting) -> None:
    """Switch transformers' model to these bodies."""
    theirs.set_attn_implementation(setting.attention)
    theirs.set_experts_implementation(setting.experts)


def minids_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, nats."""
    return model.loss(tokens, targets, mtp_weight=0.0, balance_weight=0.0).total


def transformers_loss(theirs, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, nats; `shift_labels` says that the targets are one token ahead."""
    return theirs(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss


class Stepper:
    """One model's training step: forward, backward, clipping, fused AdamW.

    loss: minids_loss or transformers_loss
    dtype: "bf16" (autocast, FP32 master weights) or "fp32"
    """

    def __init__(self, model: nn.Module, loss: Callable, dtype: str):
        self.model, self.loss, self.dtype = model, loss, dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, tokens and targets (B, S)."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.loss(self.model, tokens, targets)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step; returns the loss before it."""
        loss = self.forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, batches: list) -> None:
        """A step on each batch."""
        for batch in batches:
            self.step(*batch)


def decode_minids(model: Transformer, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy continuation of each prompt by minids."""
    return generate(model, prompts, new_tokens).tokens


def roll_out_minids(model: Transformer, prompts: list[list[int]], new_tokens: int) -> list:
    """A drawn continuation of each prompt by minids, as the trainer of `minids.grpo` wants it."""
    generator = torch.Generator(model.head.weight.device).manual_seed(0)
    return roll_out(model, prompts, new_tokens, Sampler(1.0, generator=generator),
                    eos_id=NEVER).replies()


def decode_transformers(theirs, prompts: list[list[int]], new_tokens: int,
                        draw: bool = False) -> list[list[int]]:
    """The continuation of each prompt by transformers, greedy or drawn at temperature 1."""
    ids = torch.tensor(prompts, device=theirs.device)  # (B, S)
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if draw else dict(
        do_sample=False)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how, use_cache=True,
                          min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return out[:, ids.size(1):].tolist()


class Timing(NamedTuple):
    """Seconds of both sides in each pair."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast ours is, pair by pair."""
        return [b / a for a, b in zip(self.ours, self.theirs, strict=True)]

    def cells(self, tokens: int) -> list[str]:
        """For a table: tokens a second of both, and the median, least and largest ratio."""
        speeds = [tokens / statistics.median(side) for side in self]
        ratios = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        return [f"{speed:,.0f}" for speed in speeds] + [f"{ratio:.2f}" for ratio in ratios]


RATIOS = ["ratio", "min", "max"]


def seconds(work: Callable[[], object], device: str) -> float:
    """How long `work` takes, until the device is done with it."""
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def in_turn(ours: Callable[[int], object], theirs: Callable[[int], object], pairs: int,
            device: str) -> Timing:
    """Time both `pairs` times; each is called with the pair's number, and who begins alternates."""
    timing = Timing([], [])
    for pair in range(pairs):
        sides = [(ours, timing.ours), (theirs, timing.theirs)]
        for work, times in sides if pair % 2 == 0 else reversed(sides):
            times.append(seconds(functools.partial(work, pair), device))
    return timing


def trial(theirs, settings: list[Setting], work: Callable[[], object], device: str,
          what: str) -> Setting:
    """The setting of transformers under which `work` takes the least time.

    what: the work in words, for the line on stderr that reports all times
    """
    times = {setting: [] for setting in settings}
    for round in range(TRIAL_ROUNDS + 1):
        for setting in settings:
            choose(theirs, setting)
            taken = seconds(work, device)
            if round:  # the first round warms up
                times[setting].append(taken)
    found = sorted((min(taken), setting) for setting, taken in times.items())
    listed = ", ".join(f"{setting} {taken:.3f} s" for taken, setting in found)
    print(f"transformers, {what}: {listed}", file=sys.stderr, flush=True)
    return found[0][1]


@torch.no_grad()
def check_same_function(model: Transformer, theirs, tokens: Tensor) -> None:
    """Both models give the same FP32 logits for tokens (B, S); otherwise stop.

    The median over tokens: rounding may send one of them to another expert.
    """
    logits = model(tokens)  # (B, S, vocab_size)
    gaps = (logits - theirs(input_ids=tokens, use_cache=False).logits).abs().mean(-1)  # (B, S)
    gap = (gaps.median() / logits.std()).item()
    assert gap <= LOGIT_TOLERANCE, f"the two models differ: logits are {gap:.1e} apart"


@torch.no_grad()
def first_losses(ours: Stepper, theirs: Stepper, batch: tuple[Tensor, Tensor]) -> list[float]:
    """The loss of both on one batch, after checking that they compute the same."""
    check_same_function(ours.model, theirs.model, batch[0][:4])
    losses = [stepper.forward(*batch).item() for stepper in (ours, theirs)]
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE[ours.dtype], (
        f"the first losses differ: minids {losses[0]:.6f}, transformers {losses[1]:.6f}")
    return losses


def equal_tokens(model: Transformer, prompts: list[list[int]], ours: list[list[int]],
                 theirs: list[list[int]], tie: float) -> float:
    """The share of equal tokens, after checking that each first difference is a tie.

    model: judges the ties, in FP32
    tie: how far below the best token either may lie, see `TIE`
    """
    equal = 0
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        assert len(a) == len(b), f"{len(a)} and {len(b)} tokens were decoded"
        same = [x == y for x, y in zip(a, b, strict=True)]
        equal += sum(same)
        if not all(same):
            at = same.index(False)
            below = distance_from_best(model, prompt + a[:at], [a[at], b[at]])
            assert below <= tie, f"token {at} differs and is no tie: it lies {below:.4f} below"
    return equal / sum(map(len, ours))


@torch.inference_mode()
def distance_from_best(model: Transformer, tokens: list[int], candidates: list[int]) -> float:
    """How far the worst candidate for the next token lies below the best: 1 is as far as the mean
    of all tokens."""
    logits = model(torch.tensor([tokens], device=model.head.weight.device))[0, -1]  # (vocab_size,)
    best = logits.max()
    return ((best - logits[candidates].min()) / (best - logits.mean())).item()


def equal_active_dense(args: ModelArgs) -> ModelArgs:
    """The dense model with as many active parameters: every layer has one width, found to fit."""
    dense = replace(args, n_routed_experts=0, inter_dim=WIDTH_MULTIPLE)
    missing = count_parameters(args).active - count_parameters(dense).active
    each = 3 * args.dim * args.n_layers * WIDTH_MULTIPLE
    return replace(dense, inter_dim=WIDTH_MULTIPLE * max(1, 1 + round(missing / each)))


class Bench:
    """The text and the configuration that all tables of one program share.

    settings: what to measure
    args: the model; the timed ones go without its MTP modules
    """

    def __init__(self, settings: BenchArgs, args: ModelArgs):
        tokenizer = Tokenizer.open(TrainArgs.for_preset(settings.preset).tokenizer)
        self.settings = settings
        self.trained_args = replace(args, vocab_size=tokenizer.vocab_size)
        self.args = replace(self.trained_args, n_mtp_layers=0)
        self.fastest: dict[tuple, Setting] = {}  # what trials of transformers have found
        self.check_lengths()
        data = open_data(settings.data, tokenizer, settings.seq_len, seed=settings.seed)
        self.loader, self.valid = data.loader, data.valid
        needed = settings.prompt * settings.decode_batch
        require(settings, "decode_batch", needed <= len(self.valid),
                f"at most {len(self.valid) // settings.prompt}: the validation text is short")

    def check_lengths(self) -> None:
        """Raise `ValueError` for a model without experts, or sequences longer than it takes."""
        limit, s = self.args.max_seq_len, self.settings
        require(self.args, "n_routed_experts", self.args.has_moe, "at least 1")
        require(s, "seq_len", s.seq_len <= limit, f"at most max_seq_len = {limit}")
        require(s, "new_tokens", s.prompt + s.new_tokens <= limit,
                f"at most {limit - s.prompt}, so that max_seq_len = {limit} holds the prompt too")

    def model(self, args: ModelArgs | None = None) -> Transformer:
        """A new minids model; the same weights every time."""
        torch.manual_seed(self.settings.seed)
        return Transformer(args or self.args).to(self.settings.device)

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The next training batches, on the device."""
        drawn = [self.loader.next_batch(self.settings.batch_size) for _ in range(count)]
        return [tuple(t.to(self.settings.device) for t in batch) for batch in drawn]

    def prompts(self, count: int) -> list[list[int]]:
        """Pieces of the validation text."""
        size = self.settings.prompt
        return self.valid[:count * size].view(count, size).tolist()

    def time_steps(self, ours: Stepper, theirs: Stepper) -> Timing:
        """Time training steps in turn; each is on a batch of its own, the same for both."""
        s = self.settings
        for stepper in (ours, theirs):
            stepper.run(self.batches(WARM_UP))
        batches = [self.batches(s.steps_per_timing) for _ in range(s.pairs)]
        return in_turn(lambda pair: ours.run(batches[pair]), lambda pair: theirs.run(batches[pair]),
                       s.pairs, s.device)

    @property
    def tokens_per_timing(self) -> int:
        """Tokens that one timing of training steps takes in."""
        return self.settings.steps_per_timing * self.settings.batch_size * self.settings.seq_len

    def fastest_training(self, dtype: str) -> Setting:
        """The setting under which transformers trains fastest here."""
        if ("train", dtype) not in self.fastest:
            stepper = Stepper(to_transformers(self.model()), transformers_loss, dtype)
            batch = self.batches(1)
            self.fastest["train", dtype] = trial(
                stepper.model, TRAIN_SETTINGS, lambda: stepper.run(batch), self.settings.device,
                f"a training step in {dtype}")
        return self.fastest["train", dtype]

    def fastest_decoding(self, dtype: str, batch: int) -> Setting:
        """The same for decoding a batch of prompts."""
        if (dtype, batch) not in self.fastest:
            theirs, tokens = self.decoders(dtype)[2], self.settings.new_tokens
            prompts = self.prompts(batch)
            self.fastest[dtype, batch] = trial(
                theirs, DECODE_SETTINGS, lambda: decode_transformers(theirs, prompts, tokens),
                self.settings.device, f"decoding {batch} x {tokens} tokens in {dtype}")
        return self.fastest[dtype, batch]

    def decoders(self, dtype: str) -> tuple[Transformer, Transformer, nn.Module]:
        """Ours, ours with the same rounded weights in FP32 as a judge, and transformers'."""
        ours = self.model().to(DTYPES[dtype]).eval()
        judge = copy.deepcopy(ours).float()
        return ours, judge, to_transformers(judge).to(DTYPES[dtype]).eval()


def train_table(bench: Bench) -> list[list[str]]:
    """Training beside transformers."""
    rows = [["training", "minids tokens/s", "transformers tokens/s", *RATIOS, "minids first loss",
             "transformers first loss"]]
    for dtype in bench.settings.dtypes:
        setting = bench.fastest_training(dtype)
        model = bench.model()
        other = to_transformers(model)
        choose(other, setting)
        ours, theirs = Stepper(model, minids_loss, dtype), Stepper(other, transformers_loss, dtype)
        losses = first_losses(ours, theirs, bench.batches(1)[0])
        timing = bench.time_steps(ours, theirs)
        rows += [[f"{dtype}, {setting}", *timing.cells(bench.tokens_per_timing),
                  *(f"{loss:.5f}" for loss in losses)]]
    return rows


def decode_table(bench: Bench) -> list[list[str]]:
    """Greedy decoding beside transformers."""
    s = bench.settings
    rows = [["decoding", "minids tokens/s", "transformers tokens/s", *RATIOS, "equal tokens"]]
    for dtype, batch in itertools.product(s.dtypes, sorted({1, s.decode_batch})):
        ours, judge, theirs = bench.decoders(dtype)
        choose(theirs, setting := bench.fastest_decoding(dtype, batch))
        prompts = bench.prompts(batch)
        work = [functools.partial(decode_minids, ours, prompts, s.new_tokens),
                functools.partial(decode_transformers, theirs, prompts, s.new_tokens)]
        share = equal_tokens(judge, prompts, *(decode() for decode in work), TIE[dtype])
        timing = in_turn(*(lambda pair, decode=decode: decode() for decode in work), s.pairs,
                         s.device)
        rows += [[f"{dtype}, batch {batch}, {setting}", *timing.cells(batch * s.new_tokens),
                  f"{share:.1%}"]]
    return rows


def rollout_table(bench: Bench) -> list[list[str]]:
    """Sampling beside transformers; a draw needs no check beyond that of the logits."""
    s = bench.settings
    rows = [["sampling", "minids tokens/s", "transformers tokens/s", *RATIOS]]
    for dtype in s.dtypes:
        ours, judge, theirs = bench.decoders(dtype)
        choose(theirs, setting := bench.fastest_decoding(dtype, s.decode_batch))
        prompts = bench.prompts(s.decode_batch)
        check_same_function(judge, to_transformers(judge), torch.tensor(prompts, device=s.device))
        work = [functools.partial(roll_out_minids, ours, prompts, s.new_tokens),
                functools.partial(decode_transformers, theirs, prompts, s.new_tokens, draw=True)]
        assert all(len(row) == s.new_tokens for sample in work for row in sample())
        timing = in_turn(*(lambda pair, sample=sample: sample() for sample in work), s.pairs,
                         s.device)
        rows += [[f"{dtype}, batch {s.decode_batch}, {setting}",
                  *timing.cells(s.decode_batch * s.new_tokens)]]
    return rows


def dense_table(bench: Bench) -> list[list[str]]:
    """Training with experts beside the dense model of as many active parameters."""
    rows = [["training", "experts tokens/s", "dense tokens/s", *RATIOS, "experts active",
             "dense active"]]
    pair = bench.args, equal_active_dense(bench.args)
    active = [f"{count_parameters(args).active:,}" for args in pair]
    for dtype in bench.settings.dtypes:
        steppers = [Stepper(bench.model(args), minids_loss, dtype) for args in pair]
        timing = bench.time_steps(*steppers)
        rows += [[dtype, *timing.cells(bench.tokens_per_timing), *active]]
    return rows


class Memory(NamedTuple):
    """Bytes in use before the work, and the most during it."""

    before: int
    peak: int


def process_memory(field: str) -> int:
    """A field of this process's status, bytes: VmRSS, in use now; VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def watch_memory(work: Callable[[], object], device: str) -> Memory:
    """The memory of `work`: the GPU's, or on a CPU the process's (Linux only)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return Memory(before, torch.cuda.max_memory_allocated())
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what building the model freed is no head start
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = process_memory("VmRSS")
    work()
    return Memory(before, process_memory("VmHWM"))


def memory_of_training(bench: Bench, dtype: str, setting: Setting | None) -> Memory:
    """Memory of a few training steps; setting: transformers' bodies, None for minids."""
    model, loss = side(bench, setting), transformers_loss if setting else minids_loss
    stepper, batches = Stepper(model, loss, dtype), bench.batches(MEMORY_STEPS)
    return watch_memory(lambda: stepper.run(batches), bench.settings.device)


def memory_of_decoding(bench: Bench, dtype: str, setting: Setting | None) -> Memory:
    """Memory of decoding the larger batch; setting: transformers' bodies, None for minids."""
    model = side(bench, setting).to(DTYPES[dtype]).eval()
    prompts, tokens = bench.prompts(bench.settings.decode_batch), bench.settings.new_tokens
    decode = decode_transformers if setting else decode_minids
    return watch_memory(lambda: decode(model, prompts, tokens), bench.settings.device)


def side(bench: Bench, setting: Setting | None) -> nn.Module:
    """A model of one side alone, with random weights of its own."""
    if setting is None:
        return bench.model()
    model = build_transformers(bench.args).to(bench.settings.device)
    choose(model, setting)
    return model


def in_fresh_process(measure: Callable, settings: BenchArgs, args: ModelArgs, dtype: str,
                     setting: Setting | None) -> Memory:
    """`measure(bench, dtype, setting)` in a Python process that did nothing else before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=prepare, initargs=(settings,)) as pool:
        return pool.submit(measure_with, measure, settings, args, dtype, setting).result()


def measure_with(measure: Callable, settings: BenchArgs, args: ModelArgs, dtype: str,
                 setting: Setting | None) -> Memory:
    """What the fresh process does."""
    return measure(Bench(settings, args), dtype, setting)


def memory_table(bench: Bench) -> list[list[str]]:
    """Peak memory of both sides; the ratio is transformers' to ours."""
    s = bench.settings
    rows = [["memory, MiB", "minids added", "transformers added", "ratio", "minids peak",
             "transformers peak", "ratio"]]
    for dtype in s.dtypes:
        for name, measure, setting in (
                ("training", memory_of_training, bench.fastest_training(dtype)),
                (f"decoding, batch {s.decode_batch}", memory_of_decoding,
                 bench.fastest_decoding(dtype, s.decode_batch))):
            ours, theirs = (in_fresh_process(measure, s, bench.args, dtype, which)
                            for which in (None, setting))
            added = ours.peak - ours.before, theirs.peak - theirs.before
            rows += [[f"{dtype} {name}, {setting}", *memory_cells(*added),
                      *memory_cells(ours.peak, theirs.peak)]]
    return rows


def memory_cells(ours: int, theirs: int) -> list[str]:
    """Bytes of both in MiB, and how many times as much transformers takes."""
    return [f"{ours / 2**20:,.0f}", f"{theirs / 2**20:,.0f}", f"{theirs / ours:.2f}"]


class Quality(NamedTuple):
    """What one training run came to."""

    bits_per_byte: float
    seconds: float
    steps: int


def train_one(bench: Bench, args: ModelArgs, seed: int, steps: int, run: Path) -> Quality:
    """Train a model with the preset's recipe; its validation after the last step."""
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
    """The model with experts, the dense one at equal tokens, and the dense one at equal time.

    The third run has as many steps as fit into the first one's time: its learning rate falls to
    the end as the first one's does, which a run that is only cut off at that time would not.
    """
    steps = bench.settings.steps or TrainArgs.for_preset(bench.settings.preset).steps
    moe, dense = bench.trained_args, equal_active_dense(bench.trained_args)
    first = train_one(bench, moe, seed, steps, folder / f"experts-seed-{seed}")
    second = train_one(bench, dense, seed, steps, folder / f"dense-tokens-seed-{seed}")
    more = max(1, round(steps * first.seconds / second.seconds))
    third = train_one(bench, dense, seed, more, folder / f"dense-time-seed-{seed}")
    return [first, second, third]


def quality_table(bench: Bench) -> list[list[str]]:
    """Experts and dense, trained: validation bits per byte for each seed, and the means."""
    folder = free_run_folder("moe-vs-dense")
    rows = [["bits per byte", "experts", "dense, equal tokens", "lower", "dense, equal time",
             "lower", "steps", "seconds"]]
    seeds = range(bench.settings.seed, bench.settings.seed + bench.settings.seeds)
    runs = [train_three(bench, seed, folder) for seed in seeds]
    for seed, three in zip(seeds, runs, strict=True):
        rows += [[f"seed {seed}", *quality_cells([q.bits_per_byte for q in three]),
                  " / ".join(str(q.steps) for q in three),
                  " / ".join(f"{q.seconds:.0f}" for q in three)]]
    means = [statistics.mean(q.bits_per_byte for q in column) for column in zip(*runs, strict=True)]
    return [*rows, ["mean", *quality_cells(means), "", ""]]


def quality_cells(bits: list[float]) -> list[str]:
    """Bits per byte of the three runs, and which is lower in each comparison."""
    experts, *dense = bits
    cells = [f"{experts:.4f}"]
    for other in dense:
        cells += [f"{other:.4f}", "experts" if experts < other else "dense"]
    return cells


SHORTEST = 1024    # tokens; the first row of the table of sparse attention
PIECE = 256        # tokens that sparse prefill takes at a time
DECODE_STEPS = 16  # in one timing


class Sparse:
    """A dense and a sparse model of the same weights, and the work that both are timed at.

    args: the model; without an indexer it gets one in V3.2's proportions that selects 2,048 tokens
    """

    def __init__(self, bench: Bench):
        s = self.settings = bench.settings
        self.dtype = DTYPES["bf16" if s.dtype == "bf16" else "fp32"]
        args = replace(bench.args, max_seq_len=s.context + 1)
        if not args.has_indexer:
            args = replace(args, **default_indexer(asdict(args), 8 * 2048))
        self.args = args
        self.sparse = bench.model(args).to(self.dtype).eval()
        self.dense = bench.model(replace(args, index_n_heads=0)).to(self.dtype).eval()
        load_weights_without_indexer(self.sparse, self.dense.state_dict())
        self.tokens = torch.randint(args.vocab_size, (1, s.context), device=s.device,
                                    generator=torch.Generator(s.device).manual_seed(s.seed))

    def cache(self, model: Transformer, length: int) -> LatentCache:
        """Room for so many tokens and one more."""
        return LatentCache(model.args, 1, length + 1, device=self.settings.device, dtype=self.dtype)

    def full_cache(self, model: Transformer, length: int) -> LatentCache:
        """A cache as after so many tokens; what it holds changes no time."""
        cache = self.cache(model, length)
        cache.latents.normal_()
        if cache.index_keys is not None:
            cache.index_keys.normal_()
        cache.length = length
        return cache

    @torch.inference_mode()
    def prefill_dense(self, length: int) -> Tensor:
        """The naive form, all at once by the fused causal kernel."""
        return self.dense.head(self.dense.hidden(self.tokens[:, :length])[0][:, -1])

    @torch.inference_mode()
    def prefill_sparse(self, length: int) -> Tensor:
        """Piece by piece, each query fetching its own tokens: work that grows by k, not by T."""
        cache = self.cache(self.sparse, length)
        for piece in self.tokens[:, :length].split(PIECE, dim=1):
            hidden, _ = self.sparse.hidden(piece, cache, absorbed=True)
        return self.sparse.head(hidden[:, -1])

    def decoding(self, model: Transformer, length: int) -> Callable[[], Tensor]:
        """One step after `length` tokens, always the same one."""
        cache = self.full_cache(model, length)

        @torch.inference_mode()
        def step() -> Tensor:
            cache.length = length
            return model(self.tokens[:, :1], cache, absorbed=True)
        return step

    def prefills(self, length: int) -> list[Callable[[], Tensor]]:
        """Dense and sparse."""
        return [functools.partial(self.prefill_dense, length),
                functools.partial(self.prefill_sparse, length)]

    def decodings(self, length: int) -> list[Callable[[], Tensor]]:
        """Dense, sparse, and sparse with a selection that costs nothing: outside the indexer."""
        sparse = self.decoding(self.sparse, length)

        def outside() -> Tensor:
            with selecting(self.sparse, same_tokens(self.args.index_topk)):
                return sparse()
        return [self.decoding(self.dense, length), sparse, outside]


def same_tokens(k: int) -> Rule:
    """Always the first k tokens, chosen beforehand; None where there are no more."""
    @functools.cache
    def first(batch: int, queries: int, device: torch.device) -> Selection:
        indices = torch.arange(k, device=device).expand(batch, queries, k)
        return Selection(indices, torch.ones_like(indices, dtype=torch.bool))

    def rule(attn, x: Tensor, c_q: Tensor, context) -> Selection | None:
        return first(*x.shape[:2], x.device) if context.visible.size(-1) > k else None
    return rule


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of all products, two for a multiplication and an addition.

    A causal kernel counts for the keys that its queries see, S (S + 1) / 2 pairs; torch counts all
    pairs on a GPU and none on a CPU, and leaves out the experts' grouped products.
    """
    def attention(q, k, v, *_, **__) -> int:
        pairs = q[-2] * (q[-2] + 1) // 2 if q[-2] == k[-2] else q[-2] * k[-2]
        return 2 * q[0] * q[1] * pairs * (q[-1] + v[-1])

    def grouped(x, weight, *_, **__) -> int:
        return 2 * x[0] * weight[1] * weight[2]

    names = ("flash_attention", "flash_attention_for_cpu", "efficient_attention",
             "cudnn_attention")
    formulas = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): attention for name in names}
    formulas[torch.ops.aten._grouped_mm] = grouped
    with FlopCounterMode(display=False, custom_mapping=formulas) as count:
        work()
    return count.get_total_flops()


def repeat(work: Callable[[], object], times: int) -> None:
    """Do it so many times."""
    for _ in range(times):
        work()


def round_robin(works: list[Callable[[], object]], rounds: int, times: int,
                device: str) -> list[float]:
    """The median seconds of each, done so many times in one timing; they take turns."""
    taken = [[seconds(functools.partial(repeat, work, times), device) / times for work in works]
             for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def contexts(longest: int) -> Iterator[int]:
    """SHORTEST, twice that, .. and the longest."""
    length = SHORTEST
    while length < longest:
        yield length
        length *= 2
    yield longest


def sparse_table(bench: Bench) -> list[list[str]]:
    """Dense and sparse attention against context length; decoding is one token of one sequence.

    What is counted has been run once, so that no clock starts cold.
    """
    both, s = Sparse(bench), bench.settings
    rows = [[f"k = {both.args.index_topk:,}", "dense ms", "sparse ms", "ratio",
             "outside indexer ms", "dense MFLOP", "sparse MFLOP", "outside indexer MFLOP"]]
    for name, works_at, times_each in (("prefill", both.prefills, 1),
                                       ("decode", both.decodings, DECODE_STEPS)):
        for length in contexts(s.context):
            works = works_at(length)
            flops = [f"{count_flops(work) / 1e6:,.3f}" for work in works]
            taken = round_robin(works, s.pairs, times_each, s.device)
            times = [f"{1e3 * t:,.2f}" for t in taken]
            times.insert(2, f"{taken[0] / taken[1]:.2f}")
            rows += [[f"{name}, {length:,} tokens", *times, *[""] * (4 - len(times)), *flops,
                      *[""] * (3 - len(flops))]]
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


DEPTHS = (2, 4, 8, 16, 32, 64)  # of which the cost model is asked
PROMPTS = 16  # texts that are gone on from


class Drafts:
    """A trained run that decodes the same prompts with drafts and without."""

    def __init__(self, bench: Bench):
        s = self.settings = bench.settings
        run = open_model(s.run, s.device)
        if not run.model.mtp:
            raise ValueError(f"run = {s.run!r} is not valid: it must have an MTP module")
        self.model = run.model.to(DTYPES["bf16" if s.dtype == "bf16" else "fp32"])
        text = open_data(s.data, run.tokenizer, s.prompt).valid
        self.prompts = windows(text, s.prompt, PROMPTS * s.prompt)[:, :-1].tolist()

    def decode(self, drafts: int, batch: int) -> Generation:
        """All prompts, `batch` at a time."""
        parts = [generate(self.model, self.prompts[i:i + batch], self.settings.new_tokens,
                          speculative=drafts) for i in range(0, len(self.prompts), batch)]
        return Generation([row for part in parts for row in part.tokens],
                          sum(part.steps for part in parts), sum(part.seconds for part in parts),
                          sum(part.prompt_tokens for part in parts), drafts,
                          [row for part in parts for row in part.passed])

    def compare(self, drafts: int, batch: int) -> tuple[Generation, float]:
        """The drafted text, and how many times as fast it came: the median of paired timings."""
        plain, drafted = (functools.partial(self.decode, n, batch) for n in (0, drafts))
        one, other = plain(), drafted()
        if self.model.head.weight.dtype == torch.float32:
            require_same_text(one.tokens, other.tokens)
        ratios = [plain().seconds / drafted().seconds for _ in range(self.settings.pairs)]
        return other, statistics.median(ratios)

    def constants(self) -> tuple[float, float]:
        """`call` and `row` of `minids.costs.drafting`, from passes over one token and over two.

        What they take beyond reading their weights, at the speed at which the head is read.
        """
        args, head = self.model.args, self.model.head.weight
        x, cache = head.new_zeros(1, args.dim), LatentCache(args, 1, 200, dtype=head.dtype)
        with torch.inference_mode():
            self.model(torch.tensor(self.prompts[:1]), cache)
            decode, length = decoder_for(self.model, cache), cache.length

            def step(tokens: Tensor) -> None:
                cache.length = length
                decode.hidden(tokens)
            works = [lambda: F.linear(x, head), *(functools.partial(step, torch.ones(
                1, count, dtype=torch.int64)) for count in (1, 2))]
            reading, one, two = round_robin(works, 5, 50, "cpu")
        costs = drafting(args, 0, drafts=1)
        call = one / reading * head.numel() - (costs.plain - head.numel())
        both = two / reading * head.numel() - (costs.check - head.numel())
        return max(call, 0) / args.n_layers, max(both - call, 0) / args.n_layers


def require_same_text(plain: list[list[int]], drafted: list[list[int]]) -> None:
    """Stop if more than one text in eight differs: a tie that rounding decides is rare in FP32."""
    other = sum(a != b for a, b in zip(plain, drafted, strict=True))
    if 8 * other > len(plain):
        raise ValueError(f"{other} of {len(plain)} texts differ with drafts: decoding is wrong")


def speculative_table(bench: Bench) -> list[list[str]]:
    """Drafts measured and predicted, then predicted for the same model at other depths."""
    both = Drafts(bench)
    args, (call, row) = both.model.args, both.constants()
    rows = [[f"{args.n_layers} layers, greedy", "accepted", "tokens a pass", "times as fast",
             "predicted"]]
    for drafts in (1, 2, 3):
        for batch in (1, PROMPTS):
            done, ratio = both.compare(drafts, batch)
            first = done.acceptance[0]
            said = drafting(args, 0, drafts, batch, call, row)._replace(tokens=done.tokens_per_pass)
            rows += [[f"{drafts} drafted, batch {batch}", " ".join(f"{a:.0%}" for a in
                                                                   done.acceptance),
                      f"{done.tokens_per_pass:.2f}", f"{ratio:.2f}", f"{said.speedup:.2f}"]]
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
            if (drafts, batch) == (1, 1):
                alone = first
    for depth in DEPTHS:
        said = drafting(replace(args, n_layers=depth), alone, call=call, row=row)
        rows += [[f"1 drafted, batch 1, at {depth} layers", f"{alone:.0%}", f"{said.tokens:.2f}",
                  "", f"{said.speedup:.2f}"]]
    return rows


MAKERS = dict(zip(TABLES, (train_table, decode_table, memory_table, dense_table, quality_table,
                           sparse_table, speculative_table, rollout_table), strict=True))


def prepare(settings: BenchArgs) -> None:
    """The same allocator and threads for everything that is measured in this process."""
    tune_allocator()
    torch.set_num_threads(settings.threads)


def describe(bench: Bench) -> str:
    """What the tables are about, in two lines."""
    s, count = bench.settings, count_parameters(bench.args)
    where = torch.cuda.get_device_name() if s.device == "cuda" else (
        f"cpu ({torch.backends.cpu.get_cpu_capability()}), {s.threads} threads")
    return (f"{s.preset}: {count.total:,} parameters, {count.active:,} active, without MTP\n"
            f"{where}; torch {torch.__version__}, transformers {version('transformers')}; "
            f"{s.pairs} pairs; training {s.batch_size} x {s.seq_len} tokens a step, decoding "
            f"{s.new_tokens} tokens after {s.prompt}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    given, changes = parse("minids.lab.bench", __doc__, BenchArgs, ModelArgs, argv=argv)
    settings = BenchArgs(**given)
    prepare(settings)
    args = replace(ModelArgs.preset(settings.preset), **changes)
    if settings.what not in ("dense", *ASKED_FOR):
        config_from_args(args)  # refuses a model that transformers has no class for
    bench = Bench(settings, args)
    print(describe(bench), flush=True)
    every = [name for name in TABLES if name not in ASKED_FOR]
    for name in every if settings.what == "all" else [settings.what]:
        print(f"\n{format_table(MAKERS[name](bench))}", flush=True)


if __name__ == "__main__":
    run_program("minids.lab.bench", main)
