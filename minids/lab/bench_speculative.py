"""Greedy decoding of a trained run with and without drafts, beside what the cost model predicts."""

import functools
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from minids.apply.folded import fold
from minids.costs import drafting
from minids.infer.generation import Generation, generate
from minids.infer.validation import windows
from minids.lab.bench_setup import Bench
from minids.lab.timing import in_turn
from minids.model.cache import LatentCache
from minids.model.transformer import Transformer
from minids.runs.open import open_model
from minids.text.loaders import open_data

DEPTHS = (2, 4, 8, 16, 32, 64)  # numbers of layers for which the cost model predicts
PROMPTS = 16


def decode(model: Transformer, prompts: list[list[int]], new_tokens: int, drafts: int,
           batch: int) -> Generation:
    """Continue all prompts, `batch` at a time."""
    parts = [generate(model, prompts[i:i + batch], new_tokens, speculative=drafts)
             for i in range(0, len(prompts), batch)]
    return Generation([row for part in parts for row in part.tokens],
                      sum(part.steps for part in parts), sum(part.seconds for part in parts),
                      sum(part.prompt_tokens for part in parts), drafts,
                      [row for part in parts for row in part.passed])


def constants(model: Transformer, prompt: list[int]) -> tuple[float, float]:
    """Return `call` and `row` of `minids.costs.drafting`, measured on passes of 1 and 2 tokens.

    They are the time beyond reading the weights, at the rate at which the head is read.
    """
    args, head = model.args, model.head.weight
    x, cache = head.new_zeros(1, args.dim), LatentCache(args, 1, 200, dtype=head.dtype)
    with torch.inference_mode():
        model(torch.tensor([prompt]), cache)
        fold(model, cache)
        length = cache.length

        def step(count: int) -> None:
            cache.length = length
            model.hidden(torch.ones(1, count, dtype=torch.int64), cache, absorbed=True)

        works = [lambda: F.linear(x, head), lambda: step(1), lambda: step(2)]
        taken = in_turn(works, 5, "cpu", times=50)
    reading, one, two = map(statistics.median, taken)
    costs = drafting(args, 0, drafts=1)
    call = one / reading * head.numel() - (costs.plain - head.numel())
    both = two / reading * head.numel() - (costs.check - head.numel())
    return max(call, 0) / args.n_layers, max(both - call, 0) / args.n_layers


def require_same_text(plain: list[list[int]], drafted: list[list[int]]) -> None:
    """Raise `ValueError` if more than one text in eight differs: FP32 ties are rarer than that."""
    other = sum(a != b for a, b in zip(plain, drafted, strict=True))
    if 8 * other > len(plain):
        raise ValueError(f"{other} of {len(plain)} texts differ with drafts: decoding is wrong")


def speculative_table(bench: Bench) -> Iterator[list[str]]:
    """Compare decoding with and without drafts, then predict it at other depths."""
    s = bench.settings
    run = open_model(s.run, s.device)
    if not run.model.mtp:
        raise ValueError(f"run = {s.run!r} is not valid: it must have an MTP module")
    model, args = run.model.to(s.one_dtype), run.model.args
    text = open_data(s.data, run.tokenizer, s.prompt).valid
    prompts = windows(text, s.prompt, PROMPTS * s.prompt)[:, :-1].tolist()
    call, row = constants(model, prompts[0])
    yield [f"{args.n_layers} layers, greedy", "accepted", "tokens a pass", "times as fast",
           "predicted"]
    first = None  # acceptance of one draft
    for drafts, batch in itertools.product((1, 2, 3), (1, PROMPTS)):
        plain, drafted = (functools.partial(decode, model, prompts, s.new_tokens, n, batch)
                          for n in (0, drafts))
        one, done = plain(), drafted()
        if s.one_dtype == torch.float32:
            require_same_text(one.tokens, done.tokens)
        first = done.acceptance[0] if first is None else first
        ratio = statistics.median(plain().seconds / drafted().seconds for _ in range(s.pairs))
        costs = drafting(args, 0, drafts, batch, call, row)._replace(tokens=done.tokens_per_pass)
        accepted = " ".join(f"{share:.0%}" for share in done.acceptance)
        yield [f"{drafts} drafted, batch {batch}", accepted, f"{costs.tokens:.2f}",
               f"{ratio:.2f}", f"{costs.speedup:.2f}"]
    for depth in DEPTHS:
        costs = drafting(replace(args, n_layers=depth), first, call=call, row=row)
        yield [f"1 drafted, batch 1, at {depth} layers", f"{first:.0%}", f"{costs.tokens:.2f}", "",
               f"{costs.speedup:.2f}"]
