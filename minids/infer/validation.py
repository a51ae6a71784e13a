"""Measurements on held-out text: bits per byte, balance, drafts, selections; Python in a sample.

Bits per byte is the cross-entropy of all tokens, in bits, over the number of bytes they stand for.
Unlike the loss per token it does not depend on the vocabulary, so models with different tokenizers
can be compared (V3's table of base models has it as Pile BPB, section 4.4).

A draft of an MTP module (V3 section 5.4.3) is compared with the model's own prediction from the
same true text, so a module cannot profit from the repetitions of a model's own output.

What does sparse attention (V3.2 section 2.1) lose, and why? The same model attends to all tokens,
to the k that its indexer selects, to the k that attention itself weighs most, to the last k, and to
k at random.
"""

import ast
import contextlib
import functools
import io
import keyword
import math
import tokenize
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.base.fields import demand
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.infer.generation import generate
from minids.kernels.indexer import few_queries
from minids.model.mla import MLA, Context, seen_by
from minids.model.moe import Routing, max_violation
from minids.model.sparse_attention import Selection, attention_mass, select

# From a layer's attention, its input (B, S, D), its query latent and the context of the pass:
Scores = Callable[[MLA, Tensor, Tensor, Context], Tensor]  # of each query for each token, (B, S, T)
Rule = Callable[[MLA, Tensor, Tensor, Context], Selection | None]  # what queries see; None: all

KINDS = {tokenize.COMMENT: "comments", tokenize.STRING: "strings", tokenize.NUMBER: "numbers",
         tokenize.OP: "punctuation"}


class Evaluation(NamedTuple):
    """The measurements of one pass over validation text.

    bits_per_byte: of all targets, special tokens included
    loads: (n MoE layers, E) int64, tokens sent to each expert, without the MTP modules
    """

    bits_per_byte: float
    loads: Tensor

    @property
    def max_vio(self) -> list[float]:
        """Return MaxVio of each MoE layer over all of the text: "global" in arXiv 2408.15664."""
        return max_violation(self.loads).tolist() if self.loads.numel() else []


def windows(tokens: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Return consecutive windows of a text, (M,) int64, each with the next token: (n, S + 1).

    seq_len: S, tokens in a window; `ValueError` for a text shorter than one
    max_tokens: take at most this many tokens, in windows spread evenly over the text; None: all
    """
    count = (len(tokens) - 1) // seq_len
    if count < 1:
        raise ValueError(f"seq_len = {seq_len} is longer than the validation text, "
                         f"{len(tokens)} tokens: it must be at most {len(tokens) - 1}")
    chosen = min(count, max(max_tokens // seq_len, 1)) if max_tokens else count
    starts = torch.arange(chosen) * count // chosen * seq_len
    return tokens[starts[:, None] + torch.arange(seq_len + 1)]


@torch.no_grad()
def evaluate(model, tokens: Tensor, n_bytes: Tensor, seq_len: int, batch_size: int,
             max_tokens: int | None = None, begin_id: int | None = None) -> Evaluation:
    """Run the model over validation text.

    tokens: (M,) int64, packed documents; seq_len, max_tokens: as for `windows`
    n_bytes: (vocab_size,) int64, bytes that each token stands for; batch_size: windows at a time
    begin_id: the token that begins a document, if documents must not see each other
    """
    device = model.head.weight.device

    def run(inputs: Tensor, samples: Tensor | None) -> tuple:
        states, routings, _ = model.hidden(inputs, samples=samples)
        return model.head, states, enumerate(routings)

    batches = windows(tokens, seq_len, max_tokens).split(batch_size)
    return counted(model.args, ((b.to(device), len(b)) for b in batches), run, n_bytes, begin_id)


def counted(args: ModelArgs, batches: Iterable[tuple[Tensor, int]], run: Callable, n_bytes: Tensor,
            begin_id: int | None, summed: Callable[[Tensor], Tensor] | None = None) -> Evaluation:
    """Run batches of windows and add up what `Evaluation` holds, over ranks too.

    batches: windows (B, S + 1), and how many of them count
    run: of tokens and samples, (B, S) each; returns the head, None on a rank without it, its states
        (B, S, D), and pairs of a MoE layer's number and its routing
    summed: the sum of a tensor over ranks, if there are several
    """
    layers = sum(map(args.is_moe_layer, range(args.n_layers)))
    loads = torch.zeros(layers, args.n_routed_experts, dtype=torch.int64)
    nats, size = 0.0, 0
    for batch, count in batches:
        inputs, targets = batch[:, :-1], batch[:count, 1:]
        samples = None if begin_id is None else (inputs == begin_id).cumsum(1)
        head, states, routings = run(inputs, samples)
        if count == 0:
            continue
        for layer, routing in routings:
            loads[layer] += Routing(*(t[:count] for t in routing)).load().cpu()
        if head is not None:
            logits = head(states[:count]).float()
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            size += int(n_bytes[targets.cpu()].sum())
    if summed:
        nats, size = summed(torch.tensor([nats, size], dtype=torch.float64)).tolist()
        loads = summed(loads)
    return Evaluation(nats / math.log(2) / size, loads)


def parse_share(text: str) -> tuple[int, int]:
    """Return how much of a text is Python: (top-level blocks that parse, top-level blocks).

    A block starts at a line without indentation, unless that continues the block before (`else:`, a
    closing bracket, a decorated function). Ignored are comments between blocks, and the last block,
    which the end of the text may have cut.
    """
    blocks = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        goes_on = not line[:1].strip() or line.startswith(
            ("else:", "elif ", "except", "finally:", ")", "]", "}"))
        if blocks and (goes_on or blocks[-1].rstrip().rsplit("\n", 1)[-1].startswith("@")):
            blocks[-1] += "\n" + line
        elif line.strip():
            blocks.append(line)
    parsed = 0
    for block in blocks[:-1]:
        with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
            ast.parse(block)
            parsed += 1
    return parsed, len(blocks[:-1])


class Agreement(NamedTuple):
    """The number of drafts of one kind of text, and the shares accepted at temperature 0 and 1."""

    tokens: int
    greedy: float
    sampled: float


def kinds_of_python(text: str) -> list[str]:
    """Return the kind of word that each character belongs to, by Python's own tokenizer."""
    kinds = ["white space" if c.isspace() else "other" for c in text]
    starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for word in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = KINDS.get(word.type)
            if word.type == tokenize.NAME:
                kind = "keywords" if keyword.iskeyword(word.string) else "names"
            if kind:
                first, last = (starts[line - 1] + column for line, column in (word.start, word.end))
                kinds[first:last] = [kind] * (last - first)
    return kinds


def kinds_of_tokens(tokens: Tensor, tokenizer) -> list[str]:
    """Return the kind of each token of packed documents: that of its first non-space character."""
    special, kinds = set(tokenizer.special.values()), []
    ends = ((tokens == tokenizer.eos_id).nonzero().flatten() + 1).tolist()
    for document in tokens.tensor_split(ends):
        raw = [b"" if i in special else tokenizer.decode_bytes([i]) for i in document.tolist()]
        text = b"".join(raw).decode("utf-8", "replace")
        of_bytes = (kind for kind, c in zip(kinds_of_python(text), text, strict=True)
                    for _ in c.encode())
        for piece in raw:
            own = list(islice(of_bytes, len(piece)))
            kinds.append(next((k for k in own if k != "white space"),
                              "white space" if own else "ends of documents"))
    return kinds


@torch.no_grad()
def draft_agreement(model, tokens: Tensor, kinds: list[str], seq_len: int, batch_size: int,
                    max_tokens: int | None = None) -> list[dict[str, Agreement]]:
    """Return how well each MTP module predicts the model's own next token on given text.

    kinds: the kind of each token; the other arguments are those of `evaluate`
    Returns for each depth the agreement by kind of the drafted token, and of "all".
    """
    names = sorted(set(kinds))
    codes = windows(torch.tensor([names.index(kind) for kind in kinds]), seq_len, max_tokens)
    device = model.head.weight.device
    sums = torch.zeros(len(model.mtp), len(names), 3, dtype=torch.float64)
    for batch, kind in zip(windows(tokens, seq_len, max_tokens).split(batch_size),
                           codes.split(batch_size), strict=True):
        batch = batch[:, :-1].to(device)
        states = model.hidden(batch)[0]
        own = model.head(states).float().softmax(-1)  # (B, S, V)
        for k, module in enumerate(model.mtp, start=1):
            context = model.context(batch[:, k:])
            states, *_ = module(states[:, :-1], model.embed(batch[:, k:]), context)
            draft = model.head(states).float().softmax(-1)  # (B, S - k, V), of token i + k + 1
            p, drafted = own[:, k:], kind[:, k + 1:].flatten()
            passes = torch.stack([torch.ones_like(p[..., 0]), draft.argmax(-1) == p.argmax(-1),
                                  torch.minimum(p, draft).sum(-1)], dim=-1)
            sums[k - 1].index_add_(0, drafted, passes.flatten(0, 1).cpu().double())
    rows = [dict(zip(names, depth, strict=True)) | {"all": depth.sum(0)} for depth in sums]
    return [{name: Agreement(int(n), float(g / n), float(s / n))
             for name, (n, g, s) in row.items() if n} for row in rows]


def draft_table(run, text: Tensor, seq_len: int, batch_size: int, max_tokens: int | None) -> str:
    """Return `draft_agreement` as text, with a last row for the model's own greedy output."""
    tables = draft_agreement(run.model, text, kinds_of_tokens(text, run.tokenizer), seq_len,
                             batch_size, max_tokens)
    rows = [("drafts that are the model's choice", "tokens", *(
        f"draft {k}{how}" for how in ("", ", sampled") for k in range(1, len(tables) + 1)))]
    for name, first in sorted(tables[0].items(), key=lambda item: (item[0] == "all", -item[1][0])):
        each = [table[name] for table in tables]
        rows.append((name, first.tokens, *(f"{a.greedy:.1%}" for a in each),
                     *(f"{a.sampled:.1%}" for a in each)))
    prompts = windows(text, seq_len // 2, 16 * (seq_len // 2))[:, :-1].tolist()
    new = seq_len // 2 - 2 * len(tables)
    shares = [generate(run.model, prompts, new, t, speculative=len(tables)).acceptance
              for t in (0.0, 1.0)]
    return format_table([*rows, ("on its own text", len(prompts) * new,
                                 *(f"{share:.1%}" for own in shares for share in own))])


@contextlib.contextmanager
def selecting(model: torch.nn.Module, rule: Rule) -> Iterator[None]:
    """Make every layer attend to what `rule` selects, in place of its own indexer's selection."""
    layers = [module for module in model.modules() if isinstance(module, MLA)]
    for attn in layers:
        attn.selection = functools.partial(rule, attn)
    try:
        yield
    finally:
        for attn in layers:
            del attn.selection


def everything(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> None:
    """Select all tokens: dense attention."""


def best(k: int, scores: Scores) -> Rule:
    """Return the rule that gives each query the k tokens of the highest scores."""
    def rule(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Selection | None:
        wanted = scores(attn, x, c_q, context)  # (B, S, T)
        keys = wanted.size(2)
        return select(wanted, seen_by(context, x, keys), k) if keys > k else None
    return rule


def indexer_scores(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Tensor:
    """Return the scores of the layer's indexer."""
    return attn.indexer.scores(x, c_q, attn.indexer.keys(x, context.rotation), context.rotation)


def attention_scores(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Tensor:
    """Return the probabilities of dense attention, the mean over its heads."""
    q = torch.cat(attn.queries(c_q, context.rotation), dim=-1)  # (B, S, H, qk_head_dim)
    k, _ = attn.expand(attn.latent(x, context.rotation))
    seen = seen_by(context, x, k.size(1))
    return torch.cat([attention_mass(q[:, rows], k, seen[:, rows], attn.scale)
                      for rows in few_queries(q.size(1), k, q.size(2))], dim=1)


def position_scores(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Tensor:
    """Return higher scores for later tokens: a sliding window."""
    return torch.arange(float(x.size(1)), device=x.device).expand(*x.shape[:2], -1)


def random_scores(seed: int = 0) -> Scores:
    """Return a function that draws scores at random, new ones for each query and layer."""
    generator = torch.Generator().manual_seed(seed)
    return lambda attn, x, *_: torch.rand(*x.shape[:2], x.size(1), generator=generator).to(x.device)


def all_scores(model: torch.nn.Module) -> dict[str, Scores]:
    """Return the ways of scoring by name, with "indexer" if the model has one."""
    own = {"indexer": indexer_scores} if model.args.has_indexer else {}
    return own | {"attention": attention_scores, "window": position_scores,
                  "random": random_scores()}


@torch.no_grad()
def attention_recall(model, tokens: Tensor, k: int) -> dict[str, list[float]]:
    """Return how much of dense attention each way of selecting k tokens holds.

    tokens: (B, S) int64
    Returns, by the names of `all_scores`, for each layer the share of the probability (the mean
    over heads) on the selected tokens, averaged over the queries that see more than k. "attention"
    is the largest possible share. Raises `ValueError` if no query sees more than k.
    """
    demand("index_topk", k, k < tokens.size(1),
           f"less than the {tokens.size(1)} tokens of a window, else nothing is left out")
    ways, held = all_scores(model), {}

    def measure(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> None:
        mass = attention_scores(attn, x, c_q, context)[:, k:]  # of queries that see more than k
        for name, scores in ways.items():
            chosen = best(k, scores)(attn, x, c_q, context)
            share = mass.gather(-1, chosen.indices[:, k:]).sum(-1).mean()
            held.setdefault(name, []).append(share.item())

    with selecting(model, measure):
        model.hidden(tokens)
    return held


def compare_selections(model, tokens: Tensor, n_bytes: Tensor, seq_len: int, batch_size: int,
                       k: int, max_tokens: int | None = None) -> dict[str, tuple]:
    """Evaluate a model under dense attention, then under every way of selecting k tokens.

    The other arguments are those of `evaluate`. Returns by name the bits per byte and each layer's
    `attention_recall`, of one batch of the text; raises `ValueError` as that does.
    """
    batch = windows(tokens, seq_len, batch_size * seq_len)[:, :-1]
    recall = attention_recall(model, batch.to(model.head.weight.device), k)
    rules = {"dense": everything} | {n: best(k, s) for n, s in all_scores(model).items()}
    found = {}
    for name, rule in rules.items():
        with selecting(model, rule):
            result = evaluate(model, tokens, n_bytes, seq_len, batch_size, max_tokens)
        found[name] = result.bits_per_byte, recall.get(name, [1.0] * model.args.n_layers)
    return found


def selection_table(found: dict[str, tuple], k: int) -> str:
    """Return `compare_selections` as text."""
    dense, _ = found["dense"]
    return format_table([
        (f"attention to {k} tokens", "bits/byte", "above dense", "recall of attention by layer"),
        *((name, f"{bits:.4f}", f"{bits / dense - 1:+.2%}", " ".join(f"{x:.3f}" for x in recall))
          for name, (bits, recall) in found.items())])
