"""DeepSeek sparse attention (V3.2, arXiv 2512.02556, section 2.1): attend to k tokens, not to all.

A lightning indexer, small beside the attention it serves, scores every earlier token for each
query (equation 1):

    I_{t,s} = sum over heads j of  w_{t,j} ReLU(q_{t,j} . k_s)

and the query attends to the index_topk best, one choice for all attention heads. The indexer has
one key per token, stored in a cache of its own. While no query sees more than index_topk tokens
nothing is left out, and the model is V3 exactly.

Two traps. The indexer's rotated part comes first in its vectors, and its pairs are half-split where
attention's are interleaved (DeepSeek's first demonstration code had this wrong). And w may be
negative, so a score below that of a token nobody noticed is a score like any other.

The choice has no gradient, so the indexer learns from attention instead (section 2.1.1): its scores
should rank tokens as the main attention, summed over its heads, weighs them.

    warm-up   L_I = sum over queries of KL(p_{t,:} || softmax(I_{t,:})), attention dense
    sparse    L_I = sum over queries of KL(p_{t,S} || softmax(I_{t,S})), S the tokens selected

In the warm-up the model is frozen; then all of it learns. p is a constant, and what the indexer
reads is detached: its loss moves nothing but the indexer, and the language-model loss everything
else. L_I is counted here as the mean over queries.

Simplified: the loss computes attention's probabilities in plain form, a second time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.fp8 import rounded_to_fp8
from minids.kernels import indexer
from minids.kernels.attention import causal
from minids.kernels.precision import without_autocast
from minids.kernels.registry import bodies
from minids.model.layers import Linear
from minids.model.rope import apply_rotary_emb_half


class Selection(NamedTuple):
    """The tokens that each query attends to."""

    indices: Tensor  # (B, S, k) int64, positions among the keys, in no order
    seen: Tensor  # (B, S, k) bool; False: the query sees fewer than k tokens, the entry is empty

    def mask(self, keys: int) -> Tensor:
        """Return the same as (B, S, T) bool over all T keys: for the naive form."""
        nobody = torch.zeros(*self.indices.shape[:2], keys, dtype=torch.bool,
                             device=self.indices.device)
        return nobody.scatter_(-1, self.indices, self.seen)

    def gather(self, latent: Tensor) -> Tensor:
        """Return each query's own tokens, (B, T, ..) -> (B, S, k, ..): for the absorbed form."""
        first = torch.arange(len(latent), device=latent.device)[:, None, None] * latent.size(1)
        own = latent.flatten(0, 1).index_select(0, (self.indices + first).flatten())
        return own.view(*self.indices.shape, -1)  # indexing by two tensors takes twice the time


class Indexer(nn.Module):
    """The lightning indexer: index_n_heads queries and head weights per token, and one key."""

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
        """Return what the indexer's cache stores: (B, S, D) -> (B, S, index_head_dim)"""
        k = self.k_norm(self.wk(x)).to(x.dtype)
        return self.positioned(k.unsqueeze(2), rotation).squeeze(2)

    def scores(self, x: Tensor, c_q: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        """Return how much each query wants each token, in FP32 or wider: (B, S, T)

        x: (B, S, D), the attention's input; c_q: its query latent, or x where there is none
        """
        return index_scores(self.queries(c_q, rotation), self.weights(x), keys)

    @bodies(indexer.select_in_pieces)
    def select(self, x: Tensor, c_q: Tensor, keys: Tensor, rotation: Tensor,
               visible: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Return the `Selection` of k of T keys for each query; visible: as in `Context`"""
        scores = self.scores(x, c_q, keys, rotation)  # (B, S, T)
        visible = causal(*scores.shape[1:], x.device) if visible is None else visible
        return select(scores, visible, k)

    def weights(self, x: Tensor) -> Tensor:
        """Weigh the heads, both scale factors included: (B, S, D) -> (B, S, index_n_heads) FP32"""
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            weights = F.linear(x.to(wide), self.weights_proj.weight.to(wide))
        return weights * (self.args.index_n_heads * self.args.index_head_dim) ** -0.5

    def positioned(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Rotate the first qk_rope_head_dim numbers to their position: (B, S, H, index_head_dim)

        Then, if the settings say so, do as deployment does: a Hadamard rotation, which spreads
        outliers and changes no product, and rounding to FP8.
        """
        args = self.args
        rope, rest = x.tensor_split([args.qk_rope_head_dim], dim=-1)
        x = torch.cat([apply_rotary_emb_half(rope, rotation), rest], dim=-1)
        if args.index_hadamard:
            x = x @ hadamard(args.index_head_dim, x.device).to(x.dtype)
        return rounded_to_fp8(x) if args.index_fp8 else x


@bodies(indexer.scores_in_one_kernel, indexer.scores_in_pieces)
def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Return V3.2's equation 1, FP32 or wider: (B, S, H, d), (B, S, H), (B, T, d) -> (B, S, T)"""
    with without_autocast(q):
        products = torch.einsum("bshd,btd->bsht", q.to(weights.dtype), keys.to(weights.dtype))
        return torch.einsum("bsht,bsh->bst", products.relu(), weights)


def select(scores: Tensor, visible: Tensor, k: int) -> Selection:
    """Select the k best (at most T) of the tokens that each query sees; scores: (B, S, T)"""
    best = scores.detach().masked_fill(~visible, float("-inf")).topk(k, dim=-1, sorted=False)
    return Selection(best.indices, best.values > float("-inf"))


def attention_mass(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Return p of the indexer's loss, (B, S, T) in FP32 or wider: attention's, mean over heads.

    q: (B, S, H, d); k: (B, T, H, d); seen: (B or 1, S, T) bool, what the queries attend to
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        scores = torch.einsum("bshd,bthd->bsht", q.to(wide), k.to(wide)) * scale
    return scores.masked_fill(~seen.unsqueeze(2), float("-inf")).softmax(-1).mean(2)


@bodies(indexer.loss_over_all, indexer.loss_in_pieces)
def indexer_loss(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                 seen: Tensor | None, scale: float) -> Tensor:
    """Return the mean over queries of KL(p || softmax(I)), nats, in FP32 or wider (section 2.1.1).

    index_q: (B, S, H, d), weights: (B, S, H), index_k: (B, T, d), the indexer's, which learn
    q, k, seen, scale: attention's, as for `attention_mass`; constants. seen: None is causal
    """
    seen = causal(q.size(1), k.size(1), q.device) if seen is None else seen
    with torch.no_grad():
        p = attention_mass(q, k, seen, scale)  # (B, S, T)
    scores = index_scores(index_q, weights, index_k).masked_fill(~seen, float("-inf"))
    log_probs = scores.log_softmax(-1).masked_fill(~seen, 0.0)  # no 0 times infinity
    return (torch.xlogy(p, p) - p * log_probs).sum(-1).mean()


@bodies(indexer.loss_over_selection)
def selected_indexer_loss(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor,
                          latent: Tensor, indices: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Return the same loss over the tokens that each query attends to, attention absorbed.

    q: (B, S, H, width), folded; latent: (B, T, width), one key for all heads; indices, seen:
    a `Selection`
    """
    k = latent.unsqueeze(2).expand(-1, -1, q.size(2), -1)  # (B, T, H, width)
    seen = Selection(indices, seen).mask(latent.size(1))
    return indexer_loss(index_q, weights, index_k, q, k, seen, scale)


def in_indexer(name: str) -> bool:
    """Return whether a parameter of that name is an indexer's."""
    return ".indexer." in name


def freeze_all_but_indexers(model: nn.Module) -> None:
    """Prepare the warm-up: no other parameter gets a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_indexer(name))


def load_weights_without_indexer(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a dense model's weights, or a sparse one's; indexers that have none stay as they are."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(map(in_indexer, missing)), (missing, unexpected)


def hadamard(width: int, device=None) -> Tensor:
    """Return Sylvester's matrix of +1 and -1, (width, width), scaled to rotate and not stretch."""
    h = torch.ones(1, 1, device=device)
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h * width ** -0.5
