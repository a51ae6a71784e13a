"""minids beside transformers: training, greedy decoding, memory and sampling of the same model."""

import copy
import functools
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.hf import config_from_args, save_hf
from minids.infer.generation import generate
from minids.infer.sampling import Sampler
from minids.lab.bench_setup import DTYPES, Bench, BenchArgs, Stepper, minids_loss
from minids.lab.timing import RATIOS, Memory, in_turn, seconds, watch_memory
from minids.model.transformer import Transformer
from minids.rl.rollout import roll_out
from minids.runs.device import prepare_cpu

TRIAL_ROUNDS = 3
MEMORY_STEPS = 5  # training steps whose memory is watched
NEVER = -1  # a token id that never occurs, so that no sequence ends early

# Both sides add the same products in another order. The typical logit then moves by 1e-7 to 2e-6 of
# the logits' spread in FP32 (measured), and by 4e-5 or more if a kind of weight is copied wrongly.
LOGIT_TOLERANCE = 1e-5
LOSS_TOLERANCE = {"fp32": 5e-5, "bf16": 1e-2}  # FP32: sums near 8; BF16: roundings of 2^-9
# How far a decoded token may lie below the best one, as a share of the distance from the best logit
# to the mean: ties that rounding decides. In BF16 rounding also sends tokens to other experts
# (measured: up to 0.17); any other token lies about 1 below.
TIE = {"fp32": 1e-4, "bf16": 0.25}


class Setting(NamedTuple):
    """Which of transformers' own implementations run."""

    attention: str
    experts: str

    def __str__(self) -> str:
        return f"{self.attention} + {self.experts}"


TRAIN_SETTINGS = [Setting(*pair) for pair in
                  itertools.product(("sdpa", "eager"), ("grouped_mm", "eager"))]
DECODE_SETTINGS = [*TRAIN_SETTINGS, *(Setting(name, "batched_mm") for name in ("sdpa", "eager"))]


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


def choose(theirs: nn.Module, setting: Setting) -> None:
    """Switch transformers' model to these implementations."""
    theirs.set_attn_implementation(setting.attention)
    theirs.set_experts_implementation(setting.experts)


def transformers_loss(theirs: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats; `shift_labels`: targets are one position ahead."""
    return theirs(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def decode_minids(model: Transformer, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Return each prompt's greedy continuation by minids."""
    return generate(model, prompts, new_tokens).tokens


def roll_out_minids(model: Transformer, prompts: list[list[int]], new_tokens: int) -> list:
    """Return each prompt's sampled continuation by minids, as `minids.grpo` asks for it."""
    generator = torch.Generator(model.head.weight.device).manual_seed(0)
    return roll_out(model, prompts, new_tokens, Sampler(1.0, generator=generator),
                    eos_id=NEVER).replies()


def decode_transformers(theirs: nn.Module, prompts: list[list[int]], new_tokens: int,
                        sample: bool = False) -> list[list[int]]:
    """Return each prompt's continuation by transformers: greedy, or sampled at temperature 1."""
    ids = torch.tensor(prompts, device=theirs.device)  # (B, S)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=sample,
                          temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                          min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return out[:, ids.size(1):].tolist()


def trial(theirs: nn.Module, settings: list[Setting], work: Callable[[], object], device: str,
          what: str) -> Setting:
    """Return the setting of transformers under which `work` takes the least time.

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


@functools.cache
def fastest_training(bench: Bench, dtype: str) -> Setting:
    """Return the setting under which transformers trains fastest here."""
    stepper = Stepper(to_transformers(bench.model()), transformers_loss, dtype)
    batch = bench.batches(1)
    return trial(stepper.model, TRAIN_SETTINGS, lambda: stepper.run(batch), bench.settings.device,
                 f"a training step in {dtype}")


@functools.cache
def fastest_decoding(bench: Bench, dtype: str, batch: int) -> Setting:
    """Return the setting under which transformers decodes a batch of prompts fastest here."""
    theirs, tokens = decoders(bench, dtype)[2], bench.settings.new_tokens
    prompts = bench.prompts(batch)
    return trial(theirs, DECODE_SETTINGS, lambda: decode_transformers(theirs, prompts, tokens),
                 bench.settings.device, f"decoding {batch} x {tokens} tokens in {dtype}")


def decoders(bench: Bench, dtype: str) -> tuple[Transformer, Transformer, nn.Module]:
    """Return our model, its rounded weights in FP32 as a judge, and transformers' model."""
    ours = bench.model().to(DTYPES[dtype]).eval()
    judge = copy.deepcopy(ours).float()
    return ours, judge, to_transformers(judge).to(DTYPES[dtype]).eval()


@torch.no_grad()
def check_same_function(model: Transformer, theirs: nn.Module, tokens: Tensor) -> None:
    """Stop unless both models give the same FP32 logits for tokens (B, S).

    Compares the median over tokens: rounding may send one of them to another expert.
    """
    logits = model(tokens)  # (B, S, vocab_size)
    gaps = (logits - theirs(input_ids=tokens, use_cache=False).logits).abs().mean(-1)  # (B, S)
    gap = (gaps.median() / logits.std()).item()
    assert gap <= LOGIT_TOLERANCE, f"the two models differ: logits are {gap:.1e} apart"


@torch.no_grad()
def first_losses(ours: Stepper, theirs: Stepper, batch: tuple[Tensor, Tensor]) -> list[float]:
    """Return both losses on one batch, after checking that logits and losses agree."""
    check_same_function(ours.model, theirs.model, batch[0][:4])
    losses = [stepper.forward(*batch).item() for stepper in (ours, theirs)]
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE[ours.dtype], (
        f"the first losses differ: minids {losses[0]:.6f}, transformers {losses[1]:.6f}")
    return losses


def equal_tokens(model: Transformer, prompts: list[list[int]], ours: list[list[int]],
                 theirs: list[list[int]], tie: float) -> float:
    """Return the share of equal tokens, after checking that each first difference is a tie.

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
    """Return how far the worst candidate for the next token lies below the best token.

    The unit is the distance from the best logit to the mean logit.
    """
    logits = model(torch.tensor([tokens], device=model.head.weight.device))[0, -1]  # (vocab_size,)
    best = logits.max()
    return ((best - logits[candidates].min()) / (best - logits.mean())).item()


def train_table(bench: Bench) -> list[list[str]]:
    """Return the table of training beside transformers."""
    rows = [["training", "minids tokens/s", "transformers tokens/s", *RATIOS, "minids first loss",
             "transformers first loss"]]
    for dtype in bench.settings.dtypes:
        setting = fastest_training(bench, dtype)
        model = bench.model()
        other = to_transformers(model)
        choose(other, setting)
        ours, theirs = Stepper(model, minids_loss, dtype), Stepper(other, transformers_loss, dtype)
        losses = first_losses(ours, theirs, bench.batches(1)[0])
        rows += [[f"{dtype}, {setting}", *bench.time_steps(ours, theirs),
                  *(f"{loss:.5f}" for loss in losses)]]
    return rows


def decode_table(bench: Bench) -> list[list[str]]:
    """Return the table of greedy decoding beside transformers."""
    s = bench.settings
    rows = [["decoding", "minids tokens/s", "transformers tokens/s", *RATIOS, "equal tokens"]]
    for dtype, batch in itertools.product(s.dtypes, sorted({1, s.decode_batch})):
        ours, judge, theirs = decoders(bench, dtype)
        choose(theirs, setting := fastest_decoding(bench, dtype, batch))
        prompts = bench.prompts(batch)
        work = [functools.partial(decode_minids, ours, prompts, s.new_tokens),
                functools.partial(decode_transformers, theirs, prompts, s.new_tokens)]
        share = equal_tokens(judge, prompts, *(decode() for decode in work), TIE[dtype])
        timing = in_turn(*work, s.pairs, s.device)
        rows += [[f"{dtype}, batch {batch}, {setting}", *timing.cells(batch * s.new_tokens),
                  f"{share:.1%}"]]
    return rows


def rollout_table(bench: Bench) -> list[list[str]]:
    """Return the table of sampling beside transformers; only the logits can be checked."""
    s = bench.settings
    rows = [["sampling", "minids tokens/s", "transformers tokens/s", *RATIOS]]
    for dtype in s.dtypes:
        ours, judge, theirs = decoders(bench, dtype)
        choose(theirs, setting := fastest_decoding(bench, dtype, s.decode_batch))
        prompts = bench.prompts(s.decode_batch)
        check_same_function(judge, to_transformers(judge), torch.tensor(prompts, device=s.device))
        work = [functools.partial(roll_out_minids, ours, prompts, s.new_tokens),
                functools.partial(decode_transformers, theirs, prompts, s.new_tokens, sample=True)]
        assert all(len(row) == s.new_tokens for sample in work for row in sample())
        timing = in_turn(*work, s.pairs, s.device)
        rows += [[f"{dtype}, batch {s.decode_batch}, {setting}",
                  *timing.cells(s.decode_batch * s.new_tokens)]]
    return rows


def memory_table(bench: Bench) -> list[list[str]]:
    """Return the table of both sides' peak memory; the ratio is transformers' to ours."""
    s = bench.settings
    rows = [["memory, MiB", "minids added", "transformers added", "ratio", "minids peak",
             "transformers peak", "ratio"]]
    for dtype in s.dtypes:
        for name, measure, setting in (
                ("training", memory_of_training, fastest_training(bench, dtype)),
                (f"decoding, batch {s.decode_batch}", memory_of_decoding,
                 fastest_decoding(bench, dtype, s.decode_batch))):
            ours, theirs = (in_fresh_process(measure, s, bench.args, dtype, which)
                            for which in (None, setting))
            added = ours.peak - ours.before, theirs.peak - theirs.before
            rows += [[f"{dtype} {name}, {setting}", *memory_cells(*added),
                      *memory_cells(ours.peak, theirs.peak)]]
    return rows


def memory_cells(ours: int, theirs: int) -> list[str]:
    """Return table cells: both in MiB, and transformers' as a multiple of ours."""
    return [f"{ours / 2**20:,.0f}", f"{theirs / 2**20:,.0f}", f"{theirs / ours:.2f}"]


def in_fresh_process(measure: Callable, settings: BenchArgs, args: ModelArgs, dtype: str,
                     setting: Setting | None) -> Memory:
    """Return `measure(settings, args, dtype, setting)`, called in a newly started process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=prepare_cpu,
                             initargs=(settings.threads,)) as pool:
        return pool.submit(measure, settings, args, dtype, setting).result()


def memory_of_training(settings: BenchArgs, args: ModelArgs, dtype: str,
                       setting: Setting | None) -> Memory:
    """Return the memory of a few training steps; setting: transformers', or None for minids."""
    bench = Bench(settings, args)
    loss = transformers_loss if setting else minids_loss
    stepper, batches = Stepper(side(bench, setting), loss, dtype), bench.batches(MEMORY_STEPS)
    return watch_memory(lambda: stepper.run(batches), settings.device)


def memory_of_decoding(settings: BenchArgs, args: ModelArgs, dtype: str,
                       setting: Setting | None) -> Memory:
    """Return the memory of decoding the larger batch; setting: as above."""
    bench = Bench(settings, args)
    model, prompts = side(bench, setting).to(DTYPES[dtype]), bench.prompts(settings.decode_batch)
    decode = decode_transformers if setting else decode_minids
    return watch_memory(lambda: decode(model.eval(), prompts, settings.new_tokens), settings.device)


def side(bench: Bench, setting: Setting | None) -> nn.Module:
    """Return a model of one side alone, with random weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    if setting is None:
        return bench.model()
    logging.set_verbosity_error()
    config = AutoConfig.for_model(**config_from_args(bench.args))
    model = AutoModelForCausalLM.from_config(config).to(bench.settings.device)
    choose(model, setting)
    return model
