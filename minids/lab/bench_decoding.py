"""Time decoding: dense and sparse attention by context length, plain and speculative decoding."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minids.apply.folded import fold
from minids.costs.decoding import drafting
from minids.infer.decoding import new_cache
from minids.infer.generation import Generation, generate
from minids.infer.validation import Rule, selecting, windows
from minids.lab.bench_setup import Bench
from minids.lab.timing import in_turn
from minids.model.sparse_attention import Selection, load_weights_without_indexer
from minids.model.transformer import Transformer
from minids.runs.open import open_model
from minids.runs.stages import default_indexer
from minids.text.loaders import open_data

SHORTEST = 1024    # tokens; the table's first context
PIECE = 256        # tokens that sparse prefill processes at a time
DECODE_STEPS = 16  # in one timing
PROMPTS = 16       # that a run continues with drafts and without
DEPTHS = (2, 4, 8, 16, 32, 64)  # numbers of layers for which the cost model predicts


class Sparse:
    """A dense and a sparse model with the same weights, and the work that is timed on both."""

    def __init__(self, bench: Bench):
        s = bench.settings
        args = replace(bench.args, max_seq_len=s.context + 1)
        if not args.has_indexer:  # it gets one in V3.2's proportions, which selects 2,048 tokens
            args = replace(args, **default_indexer(asdict(args), 8 * 2048))
        self.args = args
        self.sparse = bench.model(args).to(s.one_dtype).eval()
        self.dense = bench.model(replace(args, index_n_heads=0)).to(s.one_dtype).eval()
        load_weights_without_indexer(self.sparse, self.dense.state_dict())
        self.tokens = torch.randint(args.vocab_size, (1, s.context), device=s.device,
                                    generator=torch.Generator(s.device).manual_seed(s.seed))

    @torch.inference_mode()
    def prefill_dense(self, length: int) -> Tensor:
        """Prefill in the naive form, all tokens at once in the fused causal kernel."""
        return self.dense.head(self.dense.hidden(self.tokens[:, :length])[0][:, -1])

    @torch.inference_mode()
    def prefill_sparse(self, length: int) -> Tensor:
        """Prefill piece by piece, each query gathering its own k tokens: work per token ~ k."""
        cache = new_cache(self.sparse, 1, length)
        for piece in self.tokens[:, :length].split(PIECE, dim=1):
            hidden = self.sparse.hidden(piece, cache, absorbed=True).states
        return self.sparse.head(hidden[:, -1])

    def decoding(self, model: Transformer, length: int) -> Callable[[], Tensor]:
        """Return a decoding step after `length` tokens; each call repeats it."""
        cache = new_cache(model, 1, length + 1)
        cache.latents.normal_()  # the values do not change the time
        if cache.index_keys is not None:
            cache.index_keys.normal_()

        @torch.inference_mode()
        def step() -> Tensor:
            cache.length = length
            return model(self.tokens[:, :1], cache, absorbed=True)
        return step

    def prefills(self, length: int) -> list[Callable[[], Tensor]]:
        """Return the prefills of `length` tokens: dense, sparse."""
        return [lambda: self.prefill_dense(length), lambda: self.prefill_sparse(length)]

    def decodings(self, length: int) -> list[Callable[[], Tensor]]:
        """Return the decoding steps: dense, sparse, and sparse with the indexer's work left out."""
        sparse = self.decoding(self.sparse, length)

        def outside() -> Tensor:
            with selecting(self.sparse, same_tokens(self.args.index_topk)):
                return sparse()
        return [self.decoding(self.dense, length), sparse, outside]


def same_tokens(k: int) -> Rule:
    """Return a rule that always selects the first k tokens, and so costs nothing."""
    @functools.cache
    def first(batch: int, queries: int, device: torch.device) -> Selection:
        indices = torch.arange(k, device=device).expand(batch, queries, k)
        return Selection(indices, torch.ones_like(indices, dtype=torch.bool))

    def rule(attn, x: Tensor, c_q: Tensor, context) -> Selection | None:
        keys = context.cache.length + x.size(1)
        return first(*x.shape[:2], x.device) if keys > k else None
    return rule


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of all matrix products in `work`, two per multiply-add.

    A causal kernel counts the S (S + 1) / 2 pairs that its queries see; torch itself counts all
    pairs on a GPU and none on a CPU, and leaves out the experts' grouped products.
    """
    def attention(q, k, v, *_, **__) -> int:
        pairs = q[-2] * (q[-2] + 1) // 2 if q[-2] == k[-2] else q[-2] * k[-2]
        return 2 * q[0] * q[1] * pairs * (q[-1] + v[-1])

    def grouped(x, weight, *_, **__) -> int:
        return 2 * x[0] * weight[1] * weight[2]

    names = "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"
    formulas = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): attention for name in names}
    formulas[torch.ops.aten._grouped_mm] = grouped
    with FlopCounterMode(display=False, custom_mapping=formulas) as count:
        work()
    return count.get_total_flops()


def sparse_table(bench: Bench) -> Iterator[list[str]]:
    """Compare dense and sparse attention; decoding is one token of one sequence."""
    both, s = Sparse(bench), bench.settings
    lengths = [SHORTEST << i for i in range(s.context.bit_length()) if SHORTEST << i < s.context]
    yield [f"k = {both.args.index_topk:,}", "dense ms", "sparse ms", "ratio", "outside indexer ms",
           "dense MFLOP", "sparse MFLOP", "outside indexer MFLOP"]
    for name, works_at, times in (("prefill", both.prefills, 1),
                                  ("decode", both.decodings, DECODE_STEPS)):
        for length in [*lengths, s.context]:
            works = works_at(length)
            flops = [f"{count_flops(work) / 1e6:,.3f}" for work in works]  # also warms up
            taken = [statistics.median(t) for t in in_turn(works, s.pairs, s.device, times)]
            dense, sparse, *outside = (f"{1e3 * t:,.2f}" for t in taken)
            missing = [""] * (3 - len(works))  # prefill has no third work
            yield [f"{name}, {length:,} tokens", dense, sparse, f"{taken[0] / taken[1]:.2f}",
                   *outside, *missing, *flops, *missing]


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
    """Return `call` and `row` of `drafting`, measured on a CPU on passes of 1 and 2 tokens.

    They are the time beyond reading the weights, at the rate at which the head is read.
    """
    args, head = model.args, model.head.weight
    x, cache = head.new_zeros(1, args.dim), new_cache(model, 1, 200)
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
    # On a GPU a pass is a graph: no calls, and weights alone are counted.
    call, row = constants(model, prompts[0]) if s.device == "cpu" else (0.0, 0.0)
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
