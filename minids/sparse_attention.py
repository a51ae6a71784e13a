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

Not here yet: training the indexer. Its choice has no gradient, and none reaches it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.fp8 import dequantize, quantize_activation
from minids.layers import Linear
from minids.rope import apply_rotary_emb_half

SCORES = 2 ** 24  # numbers that all of the indexer's heads may hold at a time


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
        rows = torch.arange(len(latent), device=latent.device)[:, None, None]
        return latent[rows, self.indices]


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

    def keys(self, x: Tensor, rotation: Tensor) -> Tensor:
        """What the indexer's cache holds: (B, S, D) -> (B, S, index_head_dim)"""
        k = self.k_norm(self.wk(x)).to(x.dtype)
        return self.positioned(k.unsqueeze(2), rotation).squeeze(2)

    def scores(self, x: Tensor, c_q: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        """How much each query wants each token, in FP32 or wider.

        x: (B, S, D), the attention's input; c_q: its query latent, or x where there is none
        keys: (B, T, index_head_dim) -> (B, S, T)
        """
        q = self.wq_b(c_q).unflatten(-1, (self.args.index_n_heads, -1))
        q = self.positioned(q, rotation)  # (B, S, index_n_heads, index_head_dim)
        at_once = max(SCORES // (len(keys) * keys.size(1) * self.args.index_n_heads), 1)
        rows = zip(q.split(at_once, dim=1), self.weights(x).split(at_once, dim=1), strict=True)
        return torch.cat([index_scores(q, weights, keys) for q, weights in rows], dim=1)

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
            x = dequantize(*quantize_activation(x, ue8m0=True)).to(x.dtype)
        return x


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


def hadamard(width: int, device=None) -> Tensor:
    """Sylvester's matrix of +1 and -1, scaled to turn and not to stretch: (width, width) FP32

    width: a power of two
    """
    h = torch.ones(1, 1, device=device)
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h * width ** -0.5
