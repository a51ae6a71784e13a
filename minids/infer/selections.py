"""Ways of selecting the k tokens that a query attends to, and what each of them costs.

What does sparse attention (V3.2 section 2.1) lose, and why? The same model attends to all tokens,
to the k that its indexer selects, to the k that attention itself weighs most, to the last k, and to
k at random.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minids.base.tables import format_table
from minids.infer.validation import evaluate, windows
from minids.kernels.indexer import few_queries
from minids.model.mla import MLA, Context, seen_by
from minids.model.sparse_attention import Selection, attention_mass, select

# From a layer's attention, its input (B, S, D), its query latent and the context of the pass:
Scores = Callable[[MLA, Tensor, Tensor, Context], Tensor]  # of each query for each token, (B, S, T)
Rule = Callable[[MLA, Tensor, Tensor, Context], Selection | None]  # what queries see; None: all


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
    if tokens.size(1) <= k:
        raise ValueError(f"index_topk = {k} is not valid: it must be less than the "
                         f"{tokens.size(1)} tokens of a window, else nothing is left out")
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
