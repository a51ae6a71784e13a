"""Greedy decoding of a trained run with and without drafts, beside what the cost model predicts."""

import functools
import statistics
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.apply.folded import fold
from minids.costs import drafting
from minids.infer.generation import Generation, generate
from minids.infer.validation import windows
from minids.lab.bench_setup import Bench
from minids.lab.timing import round_robin
from minids.model.cache import LatentCache
from minids.runs.open import open_model
from minids.text.loaders import open_data

DEPTHS = (2, 4, 8, 16, 32, 64)  # numbers of layers for which the cost model predicts
PROMPTS = 16


class Drafts:
    """A trained run that decodes the same prompts with drafts and without.

    Raises `ValueError` if the run has no MTP module.
    """

    def __init__(self, bench: Bench):
        s = self.settings = bench.settings
        run = open_model(s.run, s.device)
        if not run.model.mtp:
            raise ValueError(f"run = {s.run!r} is not valid: it must have an MTP module")
        self.model = run.model.to(s.one_dtype)
        text = open_data(s.data, run.tokenizer, s.prompt).valid
        self.prompts = windows(text, s.prompt, PROMPTS * s.prompt)[:, :-1].tolist()

    def decode(self, drafts: int, batch: int) -> Generation:
        """Continue all prompts, `batch` at a time."""
        parts = [generate(self.model, self.prompts[i:i + batch], self.settings.new_tokens,
                          speculative=drafts) for i in range(0, len(self.prompts), batch)]
        return Generation([row for part in parts for row in part.tokens],
                          sum(part.steps for part in parts), sum(part.seconds for part in parts),
                          sum(part.prompt_tokens for part in parts), drafts,
                          [row for part in parts for row in part.passed])

    def compare(self, drafts: int, batch: int) -> tuple[Generation, float]:
        """Return the generation with drafts and its speed-up, the median of paired timings."""
        plain, drafted = (functools.partial(self.decode, n, batch) for n in (0, drafts))
        one, other = plain(), drafted()
        if self.settings.one_dtype == torch.float32:
            require_same_text(one.tokens, other.tokens)
        ratios = [plain().seconds / drafted().seconds for _ in range(self.settings.pairs)]
        return other, statistics.median(ratios)

    def constants(self) -> tuple[float, float]:
        """Return `call` and `row` of `minids.costs.drafting`, measured on passes of 1 and 2 tokens.

        They are the time beyond reading the weights, at the rate at which the head is read.
        """
        args, head = self.model.args, self.model.head.weight
        x, cache = head.new_zeros(1, args.dim), LatentCache(args, 1, 200, dtype=head.dtype)
        with torch.inference_mode():
            self.model(torch.tensor(self.prompts[:1]), cache)
            fold(self.model, cache)
            length = cache.length

            def step(tokens: Tensor) -> None:
                cache.length = length
                self.model.hidden(tokens, cache, absorbed=True)
            works = [lambda: F.linear(x, head), *(functools.partial(step, torch.ones(
                1, count, dtype=torch.int64)) for count in (1, 2))]
            reading, one, two = round_robin(works, 5, 50, "cpu")
        costs = drafting(args, 0, drafts=1)
        call = one / reading * head.numel() - (costs.plain - head.numel())
        both = two / reading * head.numel() - (costs.check - head.numel())
        return max(call, 0) / args.n_layers, max(both - call, 0) / args.n_layers


def require_same_text(plain: list[list[int]], drafted: list[list[int]]) -> None:
    """Raise `ValueError` if more than one text in eight differs: FP32 ties are rarer than that."""
    other = sum(a != b for a, b in zip(plain, drafted, strict=True))
    if 8 * other > len(plain):
        raise ValueError(f"{other} of {len(plain)} texts differ with drafts: decoding is wrong")


def speculative_table(bench: Bench) -> list[list[str]]:
    """Return the table of drafts, measured and predicted, then predicted at other depths."""
    both = Drafts(bench)
    args, (call, row) = both.model.args, both.constants()
    rows = [[f"{args.n_layers} layers, greedy", "accepted", "tokens a pass", "times as fast",
             "predicted"]]
    for drafts in (1, 2, 3):
        for batch in (1, PROMPTS):
            done, ratio = both.compare(drafts, batch)
            costs = drafting(args, 0, drafts, batch, call, row)
            costs = costs._replace(tokens=done.tokens_per_pass)
            rows += [[f"{drafts} drafted, batch {batch}",
                      " ".join(f"{share:.0%}" for share in done.acceptance),
                      f"{done.tokens_per_pass:.2f}", f"{ratio:.2f}", f"{costs.speedup:.2f}"]]
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
            if (drafts, batch) == (1, 1):
                first = done.acceptance[0]
    for depth in DEPTHS:
        costs = drafting(replace(args, n_layers=depth), first, call=call, row=row)
        rows += [[f"1 drafted, batch 1, at {depth} layers", f"{first:.0%}", f"{costs.tokens:.2f}",
                  "", f"{costs.speedup:.2f}"]]
    return rows
