"""DeepSeek sparse attention (V3.2, arXiv 2512.02556, section 2.1): attend to k tokens, not to all.

A lightning indexer, small beside the attention it serves, scores every earlier token for each
query (equation 1):

    I_{t,s} = sum over heads j of  w_{t,j} ReLU(q_{t,j} . k_s)

and the query attends to the index_topk best, one choice for all attention heads. The indexer has
one key a token, kept in a cache of its own. While no query sees more than index_topk tokens nothing
is left out, and the model is V3 exactly.

Two traps. The indexer's rotated part comes first in its vectors, and its pairs are half-split where
attention's are interleaved (DeepSeek's first demonstration code had this wrong). And w may be
negative, so a score below that of a token nobody noticed is a score like any other.

The choice has no gradient, so the indexer learns from attention instead (section 2.1.1): its scores
are to rank tokens as the main attention, summed over its heads, weighs them.

    warm-up   L_I = sum over queries of KL(p_{t,:} || softmax(I_{t,:})), attention dense
    sparse    L_I = sum over queries of KL(p_{t,S} || softmax(I_{t,S})), S the tokens selected

In the warm-up the model is frozen; then all of it learns. p is a constant, and what the indexer
reads is detached: its loss moves nothing but the indexer, and the language-model loss everything
else. L_I is counted here as the mean over queries, and added up over the layers.

Simplified: the loss computes attention's probabilities in plain form, a second time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.fp8 import dequantize, quantize_activation
from minids.model.layers import Linear
from minids.model.rope import apply_rotary_emb_half

SCORES = 2 ** 24  # numbers that all heads together may hold at a time
STAGES = ("warmup", "sparse")


class Selection(NamedTuple):
    """The tokens that each query attends to.

    indices: (B, S, k) int64, positions among the keys, in no order
    seen: (B, S, k) bool; False where a query sees fewer than k tokens and the place is empty
    """

    indices: Tensor
    seen: Tensor

    def mask(self, keys: int) -> Tensor:
        """The same as (B, S, T) bool over all T keys: for the naive form."""
        nobody = torch.zeros(*self.indices.shape[:2], keys, dtype=torch.bool,
                             device=self.indices.device)
        return nobody.scatter_(-1, self.indices, self.seen)

    def gather(self, latent: Tensor) -> Tensor:
        """Each query's own tokens, (B, T, ..) -> (B, S, k, ..): for the absorbed form."""
        first = torch.arange(len(latent), device=latent.device)[:, None, None] * latent.size(1)
        own = latent.flatten(0, 1).index_select(0, (self.indices + first).flatten())
        return own.view(*self.indices.shape, -1)  # indexing by two tensors takes twice the time


class Indexer(nn.Module):
    """The lightning indexer: index_n_heads queries a token, one key, and a weight for each head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        heads, width = args.index_n_heads, args.index_head_dim
        self.wq_b = Linear(args.q_lora_rank or args.dim, heads * width)
        self.wk = Linear(args.dim, width)
        self.k_norm = nn.LayerNorm(width, eps=1e-6)
        self.weights_proj = Linear(args.dim, heads)

    def queries(self, c_q: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, q_lora_rank), or (B, S, D) -> (B, S, index_n_heads, index_head_dim)"""
        q = self.wq_b(c_q).unflatten(-1, (self.args.index_n_heads, -1))
        return self.positioned(q, rotation)

    def keys(self, x: Tensor, rotation: Tensor) -> Tensor:
        """What the indexer's cache holds: (B, S, D) -> (B, S, index_head_dim)"""
        k = self.k_norm(self.wk(x)).to(x.dtype)
        return self.positioned(k.unsqueeze(2), rotation).squeeze(2)

    def scores(self, x: Tensor, c_q: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        """How much each query wants each token, in FP32 or wider.

        x: (B, S, D), the attention's input; c_q: its query latent, or x where there is none
        keys: (B, T, index_head_dim) -> (B, S, T)
        """
        q, weights = self.queries(c_q, rotation), self.weights(x)
        return torch.cat([index_scores(q[:, rows], weights[:, rows], keys)
                          for rows in few_rows(x.size(1), keys, q.size(2))], dim=1)

    def weights(self, x: Tensor) -> Tensor:
        """The heads' weights and both scale factors: (B, S, D) -> (B, S, index_n_heads) FP32"""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            weights = F.linear(x.to(wide), self.weights_proj.weight.to(wide))
        return weights * (self.args.index_n_heads * self.args.index_head_dim) ** -0.5

    def positioned(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Turn the first qk_rope_head_dim numbers to their position: (B, S, H, index_head_dim)

        Then, if the settings say so, what deployment does: a Hadamard turn, which spreads outliers
        and changes no product, and rounding to FP8.
        """
        args = self.args
        rope, rest = x.tensor_split([args.qk_rope_head_dim], dim=-1)
        x = torch.cat([apply_rotary_emb_half(rope, rotation), rest], dim=-1)
        if args.index_hadamard:
            x = x @ hadamard(args.index_head_dim, x.device).to(x.dtype)
        if args.index_fp8:
            x = RoundToFP8.apply(x)
        return x


class RoundToFP8(torch.autograd.Function):
    """Each vector in E4M3 with one scale, a power of two; the gradient passes as if unrounded."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return dequantize(*quantize_activation(x, ue8m0=True)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def few_rows(queries: int, keys: Tensor, heads: int) -> list[slice]:
    """Pieces of the S queries, so small that `heads` scores for each pair are at most SCORES.

    keys: (B, T, ..)
    """
    step = max(SCORES // (len(keys) * keys.size(1) * heads), 1)
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """V3.2 equation 1, in FP32 or wider.

    q: (B, S, H, d); weights: (B, S, H); keys: (B, T, d) -> (B, S, T)
    """
    wide = weights.dtype
    with torch.autocast(q.device.type, enabled=False):
        products = torch.einsum("bshd,btd->bsht", q.to(wide), keys.to(wide)).relu()
        return torch.einsum("bsht,bsh->bst", products, weights)


def select(scores: Tensor, visible: Tensor, k: int) -> Selection:
    """The k best of the tokens that each query sees, all of them if they are fewer.

    scores: (B, S, T); visible: (B or 1, S, T) bool; k: at most T
    """
    best = scores.detach().masked_fill(~visible, float("-inf")).topk(k, dim=-1, sorted=False)
    return Selection(best.indices, best.values > float("-inf"))


class Teaching(NamedTuple):
    """How the indexers learn in one forward pass.

    stage: "warmup", with dense attention, or "sparse"
    losses: layer -> the loss of its indexer, nats a query; filled as the layers run
    """

    stage: str
    losses: dict[int, Tensor]


def attention_mass(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """p of the indexer's loss: attention's probabilities, the sum over heads brought back to one.

    q: (B, S, H, d); k: (B, T, H, d); seen: (B or 1, S, T) bool, what the queries attend to
    Returns (B, S, T) in FP32 or wider: the mean over heads, for each head's sum is one.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bshd,bthd->bsht", q.to(wide), k.to(wide)) * scale
    return scores.masked_fill(~seen.unsqueeze(2), float("-inf")).softmax(-1).mean(2)


def divergence(p: Tensor, scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(I)) over what each query attends to, nats, and its gradient.

    p, scores: (B, S, T); seen: (B or 1, S, T) bool; p is 0 where it is False
    Returns (B, S), and softmax(I) - p, (B, S, T).
    """
    log_probs = scores.masked_fill(~seen, float("-inf")).log_softmax(-1)
    surprise = p * log_probs.masked_fill(~seen, 0.0)  # no 0 times infinity
    return (torch.xlogy(p, p) - surprise).sum(-1), log_probs.exp_() - p


class IndexerLoss(torch.autograd.Function):
    """Mean over queries of KL(p || softmax(I)), few queries at a time, FP32 or wider.

    The gradient with respect to the scores is known as soon as they are. So each piece goes through
    forward and backward at once, and nothing with S, T and heads in its shape is kept.
    """

    @staticmethod
    def forward(ctx, index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                seen: Tensor, scale: float) -> Tensor:
        """The first three are the indexer's and learn: (B, S, H, d) and (B, S, H) of its own heads
        and widths, (B, T, d). The others as for `attention_mass`."""
        ctx.dtypes = [t.dtype for t in (index_q, weights, index_k)]
        index_q, index_k = index_q.to(weights.dtype), index_k.to(weights.dtype)
        grads = [torch.zeros_like(t) for t in (index_q, weights, index_k)]
        total, queries = weights.new_zeros(()), q.size(0) * q.size(1)
        for rows in few_rows(q.size(1), k, max(q.size(2), index_q.size(2))):
            end = k.size(1) - q.size(1) + rows.stop  # no query of these sees further
            visible = seen[:, rows, :end]
            p = attention_mass(q[:, rows], k[:, :end], visible, scale)  # (B, s, end)
            own = index_q[:, rows], weights[:, rows], index_k[:, :end]
            loss, d_scores = divergence(p, index_scores(*own), visible)
            total += loss.sum()
            for grad, part, where in zip(grads, index_gradients(d_scores / queries, *own),
                                         (rows, rows, slice(end)), strict=True):
                grad[:, where] += part
        ctx.save_for_backward(*grads)
        return total / queries

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        own = ((grad * t).to(dtype) for t, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *own, None, None, None, None


def index_gradients(grad: Tensor, q: Tensor, weights: Tensor, keys: Tensor) -> list[Tensor]:
    """The backward pass of `index_scores`: grad (B, S, T) -> gradients of its three arguments."""
    with torch.autocast(q.device.type, enabled=False):
        products = torch.einsum("bshd,btd->bsht", q, keys)
        d_weights = torch.einsum("bst,bsht->bsh", grad, products.relu())
        d_products = torch.einsum("bst,bsh->bsht", grad, weights).mul_(products > 0)
        return [torch.einsum("bsht,btd->bshd", d_products, keys), d_weights,
                torch.einsum("bsht,bshd->btd", d_products, q)]


def in_indexer(name: str) -> bool:
    """Whether a parameter of that name is an indexer's."""
    return ".indexer." in name


def freeze_all_but_indexers(model: nn.Module) -> None:
    """For the warm-up: no other parameter gets a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_indexer(name))


def load_weights_without_indexer(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Take a dense model's weights, or a sparse one's; indexers that have none stay as they are."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(map(in_indexer, missing)), (missing, unexpected)


def hadamard(width: int, device=None) -> Tensor:
    """Sylvester's matrix of +1 and -1, scaled to turn and not to stretch: (width, width) FP32

    width: a power of two
    """
    h = torch.ones(1, 1, device=device)
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h * width ** -0.5
