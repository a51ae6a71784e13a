"""Multi-head latent attention (V2 section 2.1; V3 section 2.1.1, equations 1 to 11).

Keys and values of all heads are one latent vector of kv_lora_rank numbers per token; position
enters through one rotated key of qk_rope_head_dim numbers that all heads share. A decoder caches
these two and nothing else: V3 stores 576 numbers per token per layer, where multi-head attention
would store 32,768.

The same weights give the same result in two forms:
    naive     expands the latent into keys and values for each head: training and prefill
    absorbed  folds the expansion into the query and the output, and attends to the latents
              themselves as to one shared key: decoding (V2 appendix C)
The caller picks the form; it is never inferred.

With an indexer (V3.2) each query attends to the tokens that `minids.model.sparse_attention`
selects: the naive form by a mask, the absorbed form by fetching their latents and no others, so
that a decoding step's attention costs the same at any length.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.kernels import attention as kernels
from minids.kernels import selected
from minids.kernels.attention import causal
from minids.kernels.registry import bodies
from minids.model.cache import LatentCache
from minids.model.layers import Linear, RMSNorm
from minids.model.rope import apply_rotary_emb, softmax_scale
from minids.model.sparse_attention import Indexer, Selection, indexer_loss, selected_indexer_loss

LATENT_EPS = 1e-6  # of the norms on the latents, whatever norm_eps is, as in the official code


class Context(NamedTuple):
    """The inputs that the layers of one forward pass share.

    visible: which keys a query sees; None: the S queries are the last of the T positions and see
        those up to themselves
    indexer_stage: how the indexers learn: "warmup", with dense attention, "sparse", or "", not
    routes: by layer, the experts that its tokens are to visit, (B, S, K) int64; None: gates choose
    """

    rotation: Tensor  # (B or 1, S, qk_rope_head_dim / 2) complex, each token's position
    visible: Tensor | None = None  # (B or 1, S, T) bool
    cache: LatentCache | None = None  # earlier tokens' latents; None in training
    absorbed: bool = False  # the form of attention
    indexer_stage: str = ""
    routes: dict[int, Tensor] | None = None


class MLA(nn.Module):
    """Attention over latents; `layer` is its row in the cache."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.args = args
        self.layer = layer
        self.scale = softmax_scale(args)
        query_width = args.n_heads * args.qk_head_dim
        if args.q_lora_rank:
            self.wq_a = Linear(args.dim, args.q_lora_rank)
            self.q_norm = RMSNorm(args.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(args.q_lora_rank, query_width)
        else:
            self.wq = Linear(args.dim, query_width)
        self.wkv_a = Linear(args.dim, args.kv_lora_rank + args.qk_rope_head_dim)
        self.kv_norm = RMSNorm(args.kv_lora_rank, LATENT_EPS)
        self.wkv_b = Linear(args.kv_lora_rank,
                            args.n_heads * (args.qk_nope_head_dim + args.v_head_dim))
        self.wo = Linear(args.n_heads * args.v_head_dim, args.dim)
        self.indexer = Indexer(args) if args.has_indexer else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """x: (B, S, D), normalised -> (B, S, D), and the indexer's loss where it learns"""
        c_q = self.query_latent(x)  # (B, S, q_lora_rank or D)
        q_nope, q_pe = self.queries(c_q, context.rotation)
        latent = self.latent(x, context.rotation)  # (B, S, kv_lora_rank + qk_rope_head_dim)
        if context.cache is not None:
            latent = context.cache.append(self.layer, latent)  # (B, T, ..)
        chosen, loss = self.selection(x, c_q, context), None
        if context.indexer_stage:
            loss = self.indexer_loss(x, c_q, (q_nope, q_pe), latent, chosen, context)
        if chosen is None:
            attend = self.absorbed if context.absorbed else self.naive
            heads = attend(q_nope, q_pe, latent, context.visible)  # (B, S, H, v_head_dim)
        else:
            attend = self.absorbed_sparse if context.absorbed else self.naive_sparse
            heads = attend(q_nope, q_pe, latent, chosen)
        return self.wo(heads.flatten(2)), loss

    def query_latent(self, x: Tensor) -> Tensor:
        """Return c_Q, (B, S, q_lora_rank), or x itself in a model without one (V3 equation 6)."""
        return self.q_norm(self.wq_a(x)) if self.args.q_lora_rank else x

    def queries(self, c_q: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return each head's query: (B, S, H, qk_nope_head_dim), and rotated (B, S, H, rope)"""
        args = self.args
        q = (self.wq_b if args.q_lora_rank else self.wq)(c_q)
        q = q.unflatten(-1, (args.n_heads, args.qk_head_dim))  # (B, S, H, qk_head_dim)
        q_nope, q_pe = q.split([args.qk_nope_head_dim, args.qk_rope_head_dim], dim=-1)
        return q_nope, apply_rotary_emb(q_pe, rotation)

    def latent(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Return what the cache stores: [normalised c_kv ; rotated k_pe] (V3 equations 1, 3)."""
        args = self.args
        c_kv, k_pe = self.wkv_a(x).split([args.kv_lora_rank, args.qk_rope_head_dim], dim=-1)
        k_pe = apply_rotary_emb(k_pe.unsqueeze(2), rotation).squeeze(2)  # one key for all heads
        return torch.cat([self.kv_norm(c_kv), k_pe], dim=-1)

    def naive(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, visible: Tensor | None) -> Tensor:
        """Expand keys and values for each head and attend to them -> (B, S, H, v_head_dim)"""
        k, v = self.expand(latent)
        return attention(torch.cat([q_nope, q_pe], dim=-1), k, v, visible, self.scale)

    @bodies(selected.absorbed_for_naive)
    def naive_sparse(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor,
                     chosen: Selection) -> Tensor:
        """Run `naive` with a mask: all pairs are computed, and most of them thrown away."""
        return self.naive(q_nope, q_pe, latent, chosen.mask(latent.size(1)))

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return each head's keys, (B, T, H, qk_head_dim), and values, (B, T, H, v_head_dim)"""
        args = self.args
        c_kv, k_pe = latent.split([args.kv_lora_rank, args.qk_rope_head_dim], dim=-1)
        kv = self.wkv_b(c_kv).unflatten(-1, (args.n_heads, -1))  # (B, T, H, qk_nope + v_head_dim)
        k_nope, v = kv.split([args.qk_nope_head_dim, args.v_head_dim], dim=-1)
        k_pe = k_pe.unsqueeze(2).expand(-1, -1, args.n_heads, -1)
        return torch.cat([k_nope, k_pe], dim=-1), v

    def absorbed(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor,
                 visible: Tensor | None) -> Tensor:
        """Attend to the latents as to one shared key and value -> (B, S, H, v_head_dim)"""
        q = self.fold(q_nope, q_pe)
        return self.unfold(latent_attention(q, latent, self.args.kv_lora_rank, visible, self.scale))

    def absorbed_sparse(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor,
                        chosen: Selection) -> Tensor:
        """Run `absorbed`, each query with the latents that were chosen for it and no others."""
        q = self.fold(q_nope, q_pe)
        return self.unfold(selected_attention(q, latent, self.args.kv_lora_rank, *chosen,
                                              self.scale))

    def expansions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return W_UK (H, qk_nope_head_dim, kv_lora_rank), W_UV (H, v_head_dim, ..), x's type."""
        wkv_b = self.wkv_b.weight.to(x.dtype).unflatten(0, (self.args.n_heads, -1))
        return wkv_b.split([self.args.qk_nope_head_dim, self.args.v_head_dim], dim=1)

    def fold(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        """Multiply W_UK into the queries -> (B, S, H, kv_lora_rank + qk_rope_head_dim)"""
        q = torch.einsum("bshd,hdc->bshc", q_nope, self.expansions(q_nope)[0])
        return torch.cat([q, q_pe], dim=-1)

    def unfold(self, z: Tensor) -> Tensor:
        """Multiply W_UV with what was attended to, (B, S, H, kv_lora_rank) -> (.., v_head_dim)"""
        return torch.einsum("bshc,hdc->bshd", z, self.expansions(z)[1])

    @torch.no_grad()
    def selection(self, x: Tensor, c_q: Tensor, context: Context) -> Selection | None:
        """Return the tokens to attend to; None for all: no indexer, or nothing to leave out."""
        if self.indexer is None or context.indexer_stage == "warmup":
            return None
        keys = self.indexer.keys(x, context.rotation)  # (B, S, index_head_dim)
        if context.cache is not None:
            keys = context.cache.append_index_keys(self.layer, keys)  # (B, T, index_head_dim)
        if keys.size(1) <= self.args.index_topk:
            return None
        return Selection(*self.indexer.select(x, c_q, keys, context.rotation, context.visible,
                                              self.args.index_topk))

    def indexer_loss(self, x: Tensor, c_q: Tensor, queries: tuple[Tensor, Tensor], latent: Tensor,
                     chosen: Selection | None, context: Context) -> Tensor:
        """Return how far the indexer is from attention over the tokens attended to (V3.2 2.1.1).

        queries: those of attention, its two parts
        Returns a scalar, nats per query, whose gradient reaches the indexer alone.
        """
        x, c_q, rotation = x.detach(), c_q.detach(), context.rotation
        own = (self.indexer.queries(c_q, rotation), self.indexer.weights(x),
               self.indexer.keys(x, rotation))
        with torch.no_grad():
            if chosen:
                q = self.fold(*queries)
            else:
                q, k = torch.cat(queries, dim=-1), self.expand(latent)[0]
        if chosen:
            return selected_indexer_loss(*own, q, latent.detach(), *chosen, self.scale)
        return indexer_loss(*own, q, k, context.visible, self.scale)


def seen_by(context: Context, x: Tensor, keys: int) -> Tensor:
    """Return which of the T keys the queries made of x (B, S, ..) see: (B or 1, S, T) bool"""
    visible = context.visible
    return causal(x.size(1), keys, x.device) if visible is None else visible


@bodies(kernels.products, kernels.in_parts, kernels.unequal_widths, kernels.fused)
def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of every head: (B, S, H, v_head_dim). visible: as in `Context`

    q: (B, S, H, qk_head_dim); k: (B, T, H, qk_head_dim); v: (B, T, H, v_head_dim)
    """
    visible = causal(q.size(1), k.size(1), q.device) if visible is None else visible
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    probs = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bhst,bthd->bshd", probs, v)


@bodies(kernels.shared_key)
def latent_attention(q: Tensor, latent: Tensor, rank: int, visible: Tensor | None,
                     scale: float) -> Tensor:
    """Softmax attention of every head over latents, which are keys and, in part, values.

    q: (B, S, H, width), with W_UK folded in; latent: (B, T, width) -> (B, S, H, kv_lora_rank)
    """
    visible = causal(q.size(1), latent.size(1), q.device) if visible is None else visible
    scores = torch.einsum("bshc,btc->bsht", q, latent) * scale
    scores = scores.masked_fill(~visible.unsqueeze(2), float("-inf"))
    probs = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("bsht,btc->bshc", probs, latent[..., :rank])


@bodies(selected.attend_selected)
def selected_attention(q: Tensor, latent: Tensor, rank: int, indices: Tensor, seen: Tensor,
                       scale: float) -> Tensor:
    """Run `latent_attention`, each query alone with its own latents; indices, seen: a `Selection`

    q: (B, S, H, width), with W_UK folded in; latent: (B, T, width) -> (B, S, H, kv_lora_rank)
    """
    own = Selection(indices, seen).gather(latent).flatten(0, 1)  # (B*S, k, width)
    z = latent_attention(q.flatten(0, 1).unsqueeze(1), own, rank, seen.flatten(0, 1).unsqueeze(1),
                         scale)
    return z.reshape(*q.shape[:3], rank)
