"""minids beside transformers: training, greedy decoding, memory and sampling of the same model."""

import copy
import functools
import itertools
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from minids.base.command_line import one_line
from minids.config import ModelArgs
from minids.costs.cards import PEAK_FLOPS
from minids.costs.flops import flops_per_token
from minids.hf import config_from_args, save_hf
from minids.infer.generation import generate
from minids.infer.sampling import Sampler
from minids.lab.bench_setup import DTYPES, Bench, BenchArgs, Stepper, minids_loss
from minids.lab.timing import RATIOS, in_turn, speed_cells, watch_memory
from minids.model.transformer import Transformer
from minids.rl.rollout import roll_out
from minids.runs.device import prepare_cpu

TRIAL_ROUNDS = {"cpu": (1, 3), "cuda": (0, 1)}  # to warm up, to time; `can` warms a GPU up
MEMORY_STEPS = 5  # training steps whose memory is watched
NEVER = -1  # a token id that never occurs, so that no sequence ends early

# Both sides add the same products in another order. The typical logit then moves by 1e-7 to 2e-6 of
# the logits' spread in FP32 (measured), and by 4e-5 or more if a kind of weight is copied wrongly.
# Weights in BF16 make every product round to 2^-9; another row holds the same copy in FP32.
LOGIT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# FP32: sums near 8; BF16: roundings of 2^-9
LOSS_TOLERANCE = {"fp32": 5e-5, "bf16": 1e-2, "bf16-weights": 1e-2}
# How far a decoded token may lie below the best one, as a share of the distance from the best logit
# to the mean: ties that rounding decides. In BF16 rounding also sends tokens to other experts
# (measured: up to 0.17); any other token lies about 1 below.
TIE = {"fp32": 1e-4, "bf16": 0.25}
# A setting of transformers: which of its implementations of attention and experts run.
TRAIN_SETTINGS = ["sdpa + grouped_mm", "sdpa + eager", "eager + grouped_mm", "eager + eager"]
DECODE_SETTINGS = [*TRAIN_SETTINGS, "sdpa + batched_mm", "eager + batched_mm"]
# On a GPU layers are compiled one by one in training, and a decoding step as one graph over a cache
# of fixed size. What is left out is slower; layers compiled for a growing cache were not ready
# within two minutes. After the prompt, transformers itself takes batched_mm for grouped_mm.
GPU_TRAIN_SETTINGS = ["sdpa + grouped_mm", "sdpa + grouped_mm + compiled"]
GPU_DECODE_SETTINGS = ["sdpa + grouped_mm", "sdpa + batched_mm", "sdpa + grouped_mm + static"]
RECOMPILE_LIMIT = 64  # a compiled layer that knows its number is compiled once per layer
GPU_TITLES = ["minids MFU", "transformers MFU", "minids GiB", "transformers GiB", "ratio",
              "minids first step s"]
SPEEDS = ["minids tokens/s", "transformers tokens/s", *RATIOS]  # titles of `speed_cells`


def to_transformers(model: Transformer) -> nn.Module:
    """Return transformers' model with our weights, MTP left out: it computes the same function."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    weight = model.head.weight
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model", dtype=weight.dtype)
        other = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=weight.dtype)
    return other.to(weight.device)


def choose(theirs: nn.Module, setting: str) -> None:
    """Switch transformers' model to a setting's implementations, compiled or not."""
    attention, experts, *more = setting.split(" + ")
    theirs.set_attn_implementation(attention)
    theirs.set_experts_implementation(experts)
    theirs.generation_config.cache_implementation = "static" if "static" in more else None
    for layer in theirs.model.layers:
        layer._compiled_call_impl = None
        if "compiled" in more:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            layer.compile()


def transformers_loss(theirs: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats; `shift_labels`: targets are one position ahead."""
    return theirs(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def decode_minids(model: Transformer, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Return each prompt's greedy continuation by minids."""
    return generate(model, prompts, new_tokens).tokens


def roll_out_minids(model: Transformer, prompts: list[list[int]], new_tokens: int) -> list:
    """Return each prompt's sampled continuation by minids, as `minids.grpo` asks for it."""
    sampler = Sampler(1.0, generator=torch.Generator(model.head.weight.device).manual_seed(0))
    return roll_out(model, prompts, new_tokens, sampler, eos_id=NEVER).replies()


def decode_transformers(theirs: nn.Module, prompts: list[list[int]], new_tokens: int,
                        sample: bool = False) -> list[list[int]]:
    """Return each prompt's continuation by transformers: greedy, or sampled at temperature 1."""
    ids = torch.tensor(prompts, device=theirs.device)  # (B, S)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=sample,
                          temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                          min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return out[:, ids.size(1):].tolist()


def trial(theirs: nn.Module, settings: list[str], work: Callable[[], object], device: str,
          what: str) -> str:
    """Return the setting under which `work` takes the least time; all times go to stderr.

    On a GPU a setting that transformers refuses is left out, and the reason goes there too.
    """
    def under(setting: str) -> None:
        choose(theirs, setting)
        work()

    if device == "cuda":
        settings = [name for name in settings if can(functools.partial(under, name), name)]
    works = [functools.partial(under, setting) for setting in settings]
    before, rounds = TRIAL_ROUNDS[device]
    taken = in_turn(works, before + rounds, device)
    found = sorted((min(times[before:]), name) for times, name in zip(taken, settings, strict=True))
    listed = ", ".join(f"{setting} {taken:.3f} s" for taken, setting in found)
    print(f"transformers, {what}: {listed}", file=sys.stderr, flush=True)
    return found[0][1]


def can(work: Callable[[], object], setting: str) -> bool:
    """Return whether `work` raises nothing; time, or error, go to stderr."""
    start = time.perf_counter()
    try:
        work()
    except Exception as error:  # any library's, about what it cannot compile
        print(f"transformers, {setting}: {one_line(error)[:200]}", file=sys.stderr, flush=True)
        return False
    taken = time.perf_counter() - start
    print(f"transformers, {setting}: {taken:.1f} s the first time", file=sys.stderr, flush=True)
    return True


@functools.lru_cache(maxsize=1)
def their_stepper(bench: Bench, dtype: str) -> Stepper:
    """Return transformers' training step, whose weights equal those of `bench.model`."""
    return Stepper(to_transformers(bench.trained(dtype)), transformers_loss, dtype)


@functools.cache
def fastest_training(bench: Bench, dtype: str) -> str:
    """Return transformers' fastest setting for a training step; no weight changes."""
    s, stepper, batch = bench.settings, their_stepper(bench, dtype), bench.batches(1)
    settings = TRAIN_SETTINGS if s.device == "cpu" else GPU_TRAIN_SETTINGS
    with stepper.resting():
        return trial(stepper.model, settings, lambda: stepper.run(batch), s.device,
                     f"a training step in {dtype}")


@functools.cache
def fastest_decoding(bench: Bench, dtype: str, batch: int) -> str:
    """Return transformers' fastest setting for decoding a batch of prompts."""
    s, theirs = bench.settings, decoders(bench, dtype)[2]
    if s.device == "cuda":
        torch.compiler.reset()  # or code for another batch would be made to take this one too
    settings = DECODE_SETTINGS if s.device == "cpu" else GPU_DECODE_SETTINGS
    prompts = bench.prompts(batch)
    return trial(theirs, settings, lambda: decode_transformers(theirs, prompts, s.new_tokens),
                 s.device, f"decoding {batch} x {s.new_tokens} tokens in {dtype}")


@functools.lru_cache(maxsize=1)
def decoders(bench: Bench, dtype: str) -> tuple[Transformer, Transformer, nn.Module]:
    """Return our model, its rounded weights in FP32 as a judge, and transformers' model."""
    ours = bench.model().to(DTYPES[dtype]).eval()
    judge = copy.deepcopy(ours).float()
    return ours, judge, to_transformers(judge).to(DTYPES[dtype]).eval()


@torch.no_grad()
def check_same_function(model: Transformer, theirs: nn.Module, tokens: Tensor) -> None:
    """Stop unless both models give the same logits for tokens (B, S)."""
    logits = model(tokens)  # (B, S, vocab_size)
    gaps = (logits - theirs(input_ids=tokens, use_cache=False).logits).abs().mean(-1)  # (B, S)
    gap = (gaps.median() / logits.std()).item()  # rounding may send one to another expert
    limit = LOGIT_TOLERANCE[logits.dtype]
    assert gap <= limit, f"the two models differ: logits are {gap:.1e} apart"


@torch.no_grad()
def first_losses(ours: Stepper, theirs: Stepper, batch: tuple[Tensor, Tensor]) -> list[float]:
    """Return both losses on a batch, after checking that logits and losses agree."""
    check_same_function(ours.model, theirs.model, batch[0][:4])
    losses = [stepper.forward(*batch).item() for stepper in (ours, theirs)]
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE[ours.dtype], (
        f"the first losses differ: minids {losses[0]:.6f}, transformers {losses[1]:.6f}")
    return losses


@torch.inference_mode()
def equal_tokens(judge: Transformer, prompts: list[list[int]], ours: list[list[int]],
                 theirs: list[list[int]], tie: float) -> float:
    """Return the share of equal tokens, after checking that each first difference is a tie.

    judge: the model in FP32; tie: how far below the best token either may lie, see `TIE`
    """
    equal = 0
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        assert len(a) == len(b), f"{len(a)} and {len(b)} tokens were decoded"
        same = [x == y for x, y in zip(a, b, strict=True)]
        equal += sum(same)
        if not all(same):
            at = same.index(False)
            tokens = torch.tensor([prompt + a[:at]], device=judge.head.weight.device)
            logits = judge(tokens)[0, -1]  # (vocab_size,)
            best, worse = logits.max(), logits[[a[at], b[at]]].min()
            below = ((best - worse) / (best - logits.mean())).item()
            assert below <= tie, f"token {at} differs and is no tie: it lies {below:.4f} below"
    return equal / sum(map(len, ours))


def train_table(bench: Bench) -> Iterator[list[str]]:
    """Compare training; on a GPU also its share of the peak, its memory, and its first step."""
    s, gpu = bench.settings, bench.settings.device == "cuda"
    yield ["training", *SPEEDS, "minids first loss", "transformers first loss",
           *(GPU_TITLES if gpu else [])]
    for dtype in s.dtypes:
        theirs = their_stepper(bench, dtype)
        setting = fastest_training(bench, dtype)
        choose(theirs.model, setting)
        ours = Stepper(bench.trained(dtype), minids_loss, dtype)
        batch = bench.batches(1)[0]
        losses = first_losses(ours, theirs, batch)
        if gpu:
            ours.speed_up()
            ours.check(batch, losses[0], LOSS_TOLERANCE[dtype])
        cells = bench.time_steps(ours, theirs)
        yield [f"{dtype}, {setting}", *cells, *(f"{loss:.5f}" for loss in losses),
               *(gpu_cells(bench, ours, theirs, cells) if gpu else [])]
        their_stepper.cache_clear()
        del ours, theirs  # or the next row's would have to find room beside them


def gpu_cells(bench: Bench, ours: Stepper, theirs: Stepper, speeds: list[str]) -> list[str]:
    """Return a training row's cells under `GPU_TITLES`."""
    name, flops = torch.cuda.get_device_name(), flops_per_token(bench.args, bench.settings.seq_len)
    peak = next((rate for key, rate in PEAK_FLOPS.items() if key in name), math.inf)
    shares = [flops * float(cell.replace(",", "")) / peak for cell in speeds[:2]]
    batches = bench.batches(MEMORY_STEPS)
    peaks = [watch_memory(lambda side=side: side.run(batches), "cuda") for side in (ours, theirs)]
    held = theirs.held()  # what the other side leaves on the card meanwhile
    mine, other = peaks[0][1] - held, peaks[1][1] - (peaks[1][0] - held)
    return [*(f"{share:.1%}" for share in shares), *(f"{n / 2**30:.1f}" for n in (mine, other)),
            f"{other / mine:.2f}", f"{ours.first:.1f}"]


def decode_table(bench: Bench) -> Iterator[list[str]]:
    """Compare greedy decoding."""
    s = bench.settings
    yield ["decoding", *SPEEDS, "equal tokens"]
    for dtype, batch in itertools.product(s.decode_dtypes, sorted({1, s.decode_batch})):
        ours, judge, theirs = decoders(bench, dtype)
        choose(theirs, setting := fastest_decoding(bench, dtype, batch))
        prompts = bench.prompts(batch)
        works = [functools.partial(decode_minids, ours, prompts, s.new_tokens),
                 functools.partial(decode_transformers, theirs, prompts, s.new_tokens)]
        try:
            share = equal_tokens(judge, prompts, *(decode() for decode in works), TIE[dtype])
            equal = f"{share:.1%}"
        except AssertionError as wrong:  # more than a tie: the row says so
            equal = str(wrong)
        speeds = speed_cells(in_turn(works, s.pairs, s.device), batch * s.new_tokens)
        yield [f"{dtype}, batch {batch}, {setting}", *speeds, equal]


def rollout_table(bench: Bench) -> Iterator[list[str]]:
    """Compare sampling; only the logits can be checked."""
    s = bench.settings
    yield ["sampling", *SPEEDS]
    for dtype in s.decode_dtypes:
        ours, judge, theirs = decoders(bench, dtype)
        choose(theirs, setting := fastest_decoding(bench, dtype, s.decode_batch))
        prompts = bench.prompts(s.decode_batch)
        check_same_function(judge, to_transformers(judge), torch.tensor(prompts, device=s.device))
        works = [functools.partial(roll_out_minids, ours, prompts, s.new_tokens),
                 functools.partial(decode_transformers, theirs, prompts, s.new_tokens, sample=True)]
        assert all(len(row) == s.new_tokens for sample in works for row in sample())
        speeds = speed_cells(in_turn(works, s.pairs, s.device), s.decode_batch * s.new_tokens)
        yield [f"{dtype}, batch {s.decode_batch}, {setting}", *speeds]


def memory_table(bench: Bench) -> Iterator[list[str]]:
    """Compare peak memory, each side in a process of its own; the ratio is theirs to ours."""
    s = bench.settings
    yield ["memory, MiB", "minids added", "transformers added", "ratio", "minids peak",
           "transformers peak", "ratio"]
    for dtype, work in itertools.product(s.dtypes, ("training", "decoding")):
        training = work == "training"
        setting = fastest_training(bench, dtype) if training else fastest_decoding(
            bench, dtype, s.decode_batch)
        (before, peak), (their_before, their_peak) = (
            in_fresh_process(work, s, bench.args, dtype, which) for which in (None, setting))
        cells = memory_cells(peak - before, their_peak - their_before)
        name = work if training else f"{work}, batch {s.decode_batch}"
        yield [f"{dtype} {name}, {setting}", *cells, *memory_cells(peak, their_peak)]


def memory_cells(ours: int, theirs: int) -> list[str]:
    """Return table cells: both in MiB, and transformers' as a multiple of ours."""
    return [f"{ours / 2**20:,.0f}", f"{theirs / 2**20:,.0f}", f"{theirs / ours:.2f}"]


def in_fresh_process(work: str, settings: BenchArgs, args: ModelArgs, dtype: str,
                     setting: str | None) -> tuple[int, int]:
    """Return `memory_of` these arguments in a newly started process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=prepare_cpu,
                             initargs=(settings.threads,)) as pool:
        return pool.submit(memory_of, work, settings, args, dtype, setting).result()


def memory_of(work: str, settings: BenchArgs, args: ModelArgs, dtype: str,
              setting: str | None) -> tuple[int, int]:
    """Return `watch_memory` of one side, with random weights of its own.

    work: "training": steps; "decoding": the larger batch; setting: transformers', None for minids
    """
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    bench = Bench(settings, args)
    if setting is None:
        model = bench.model()
    else:
        logging.set_verbosity_error()
        config = AutoConfig.for_model(**config_from_args(bench.args))
        model = AutoModelForCausalLM.from_config(config).to(settings.device)
        choose(model, setting)
    if work == "training":
        stepper = Stepper(model, transformers_loss if setting else minids_loss, dtype)
        batches = bench.batches(MEMORY_STEPS)
        return watch_memory(lambda: stepper.run(batches), settings.device)
    model, prompts = model.to(DTYPES[dtype]).eval(), bench.prompts(settings.decode_batch)
    decode = decode_transformers if setting else decode_minids
    return watch_memory(lambda: decode(model, prompts, settings.new_tokens), settings.device)
