"""Multi-head latent attention (V2 section 2.1; V3 section 2.1.1, equations 1 to 11).

Keys and values of all heads are one latent vector of kv_lora_rank numbers a token; position enters
through one rotated key of qk_rope_head_dim numbers that all heads share. These two, and nothing
else, are what a decoder caches: 576 numbers a token and layer in V3, where plain attention keeps
32,768.

The same weights give the same result in two forms:
    naive     expands the latent into keys and values for each head: training and prefill
    absorbed  folds the expansion into the query and the output, and attends to the latents
              themselves as to one shared key: decoding (V2 appendix C)
Which form runs is said by the caller and never guessed.

With an indexer (V3.2) each query attends to the tokens that `minids.model.sparse_attention`
selects: the naive form by a mask, the absorbed form by fetching their latents and no others, so
that a decoding step's attention costs the same at any length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.model.layers import Linear, RMSNorm
from minids.model.rope import apply_rotary_emb, softmax_scale
from minids.model.sparse_attention import Indexer, IndexerLoss, Selection, Teaching, select

LATENT_EPS = 1e-6  # of the norms on the latents, whatever norm_eps is: so in the official code


class LatentCache:
    """The latents and rotated keys of the tokens seen so far, for every layer.

    With an indexer also its keys. Tensors: (n_layers, batch, max_len, width). A place along max_len
    is a slot; those of a sequence are filled in order, after its padding.

    batch: sequences decoded together
    max_len: slots of each
    pad: (B,) int64, tokens of padding before each prompt; None when all prompts are equally long
    mtp: keep the latents of the MTP modules in place of those of the layers

    length: slots that the longest sequence has filled
    behind: (B,) int64, how many fewer each of the others has; None when all have as many
    """

    def __init__(self, args: ModelArgs, batch: int, max_len: int, pad: Tensor | None = None,
                 device=None, dtype: torch.dtype = torch.float32, mtp: bool = False):
        width = args.kv_lora_rank + args.qk_rope_head_dim
        self.first_layer = args.n_layers if mtp else 0
        layers = args.n_mtp_layers if mtp else args.n_layers
        shape, kind = (layers, batch, max_len), dict(device=device, dtype=dtype)
        self.latents = torch.zeros(*shape, width, **kind)
        self.index_keys = None
        if args.has_indexer:
            self.index_keys = torch.zeros(*shape, args.index_head_dim, **kind)
        self.pad = pad
        self.length, self.behind = 0, None

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.latents.size(2) - self.length

    def slots(self, count: int) -> Tensor:
        """The next slots of each sequence, (B or 1, count) int64."""
        slots = torch.arange(self.length, self.length + count, device=self.latents.device)
        return slots[None] if self.behind is None else slots - self.behind[:, None]

    def place(self, count: int) -> tuple[Tensor, Tensor]:
        """Where the next `count` tokens of each sequence stand, and what they see.

        Returns their positions, (B or 1, count), and the slots that each sees, (B or 1, count, T).
        """
        slots = self.slots(count)
        keys = torch.arange(self.length + count, device=slots.device)  # (T,)
        visible = keys <= slots[..., None]
        if self.pad is None:
            return slots, visible
        # A padded position sees itself alone, so that its softmax has something to weigh.
        visible = visible & (keys >= self.pad[:, None, None]) | (keys == slots[..., None])
        return (slots - self.pad[:, None]).clamp(min=0), visible

    def append(self, layer: int, latent: Tensor) -> Tensor:
        """Keep the new tokens' latents of one layer; the model moves `length` on afterwards.

        latent: (B, S, kv_lora_rank + qk_rope_head_dim)
        Returns those of all tokens so far, (B, T, kv_lora_rank + qk_rope_head_dim).
        """
        return self._append(self.latents[layer - self.first_layer], latent)

    def append_index_keys(self, layer: int, keys: Tensor) -> Tensor:
        """The same for the indexer's keys: (B, S, index_head_dim) -> (B, T, index_head_dim)"""
        return self._append(self.index_keys[layer - self.first_layer], keys)

    def _append(self, rows: Tensor, new: Tensor) -> Tensor:
        end = self.length + new.size(1)
        if self.behind is None:
            rows[:, self.length:end] = new
        else:
            sequence = torch.arange(len(rows), device=rows.device)[:, None]
            rows[sequence, self.slots(new.size(1))] = new
        return rows[:, :end]

    def go_back(self, filled: Tensor) -> None:
        """Forget what is after the first `filled` slots of each sequence, (B,) int64."""
        self.length = int(filled.max())
        behind = self.length - filled
        self.behind = behind if behind.any() else None


class Context(NamedTuple):
    """What one forward pass shares between its layers.

    rotation: (B or 1, S, qk_rope_head_dim / 2) complex, each token's position
    visible: (B or 1, S, T) bool, which keys a query sees; None: those up to itself
    cache: earlier tokens' latents; None in training
    absorbed: the form of attention
    teaching: how the indexers learn; None when they do not
    kept: by layer, the experts that its tokens are to go to, (B, S, K) int64; None: gates choose
    """

    rotation: Tensor
    visible: Tensor | None = None
    cache: LatentCache | None = None
    absorbed: bool = False
    teaching: Teaching | None = None
    kept: dict[int, Tensor] | None = None


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

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: (B, S, D), normalised -> (B, S, D)"""
        c_q = self.query_latent(x)
        q_nope, q_pe = self.queries(c_q, context.rotation)
        latent = self.latent(x, context.rotation)  # (B, S, kv_lora_rank + qk_rope_head_dim)
        if context.cache is not None:
            latent = context.cache.append(self.layer, latent)  # (B, T, ..)
        chosen = self.selection(x, c_q, context)
        if context.teaching is not None:
            loss = self.indexer_loss(x, c_q, (q_nope, q_pe), latent, chosen, context)
            context.teaching.losses[self.layer] = loss
        attend = self.absorbed if context.absorbed else self.naive
        if chosen is None:
            heads = attend(q_nope, q_pe, latent, context.visible)  # (B, S, H, v_head_dim)
        elif context.absorbed:
            heads = self.absorbed_sparse(q_nope, q_pe, latent, chosen)
        else:
            heads = self.naive(q_nope, q_pe, latent, chosen.mask(latent.size(1)))
        return self.wo(heads.flatten(2))

    @torch.no_grad()
    def selection(self, x: Tensor, c_q: Tensor, context: Context) -> Selection | None:
        """The tokens to attend to; None for all, as there is no indexer or nothing to leave out."""
        teaching = context.teaching
        if self.indexer is None or (teaching is not None and teaching.stage == "warmup"):
            return None
        keys = self.indexer.keys(x, context.rotation)  # (B, S, index_head_dim)
        if context.cache is not None:
            keys = context.cache.append_index_keys(self.layer, keys)  # (B, T, index_head_dim)
        if keys.size(1) <= self.args.index_topk:
            return None
        scores = self.indexer.scores(x, c_q, keys, context.rotation)  # (B, S, T)
        return select(scores, seen_by(context, x, scores.size(2)), self.args.index_topk)

    def indexer_loss(self, x: Tensor, c_q: Tensor, queries: tuple[Tensor, Tensor], latent: Tensor,
                     chosen: Selection | None, context: Context) -> Tensor:
        """How far the indexer is from attention itself over the tokens attended to (V3.2 2.1.1).

        queries: those of attention, its two parts; the other arguments are those of `forward`
        Returns a scalar, nats a query, whose gradient reaches the indexer alone.
        """
        x, c_q = x.detach(), c_q.detach()
        indexer, rotation = self.indexer, context.rotation
        with torch.no_grad():
            q, k = torch.cat(queries, dim=-1), self.expand(latent)[0]
        seen = chosen.mask(k.size(1)) if chosen else seen_by(context, x, k.size(1))
        return IndexerLoss.apply(indexer.queries(c_q, rotation), indexer.weights(x),
                                 indexer.keys(x, rotation), q, k, seen, self.scale)

    def query_latent(self, x: Tensor) -> Tensor:
        """What queries are made of: the latent, (B, S, q_lora_rank), or x itself without one."""
        return self.q_norm(self.wq_a(x)) if self.args.q_lora_rank else x

    def queries(self, c_q: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of each head's query: (B, S, H, qk_nope) and the rotated (B, S, H, rope)"""
        args = self.args
        q = (self.wq_b if args.q_lora_rank else self.wq)(c_q)
        q = q.unflatten(-1, (args.n_heads, args.qk_head_dim))  # (B, S, H, qk_head_dim)
        q_nope, q_pe = q.split([args.qk_nope_head_dim, args.qk_rope_head_dim], dim=-1)
        return q_nope, apply_rotary_emb(q_pe, rotation)

    def latent(self, x: Tensor, rotation: Tensor) -> Tensor:
        """What the cache holds: [normalised c_kv ; rotated k_pe] (V3 equations 1 and 3)."""
        args = self.args
        c_kv, k_pe = self.wkv_a(x).split([args.kv_lora_rank, args.qk_rope_head_dim], dim=-1)
        k_pe = apply_rotary_emb(k_pe.unsqueeze(2), rotation).squeeze(2)  # one key for all heads
        return torch.cat([self.kv_norm(c_kv), k_pe], dim=-1)

    def naive(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor,
              visible: Tensor | None) -> Tensor:
        """Expand keys and values for each head and attend to them -> (B, S, H, v_head_dim)"""
        k, v = self.expand(latent)
        return attention(torch.cat([q_nope, q_pe], dim=-1), k, v, visible, self.scale)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's keys, (B, T, H, qk_head_dim), and values, (B, T, H, v_head_dim)"""
        args = self.args
        c_kv, k_pe = latent.split([args.kv_lora_rank, args.qk_rope_head_dim], dim=-1)
        kv = self.wkv_b(c_kv).unflatten(-1, (args.n_heads, -1))  # (B, T, H, qk_nope + v_head_dim)
        k_nope, v = kv.split([args.qk_nope_head_dim, args.v_head_dim], dim=-1)
        k_pe = k_pe.unsqueeze(2).expand(-1, -1, args.n_heads, -1)
        return torch.cat([k_nope, k_pe], dim=-1), v

    def absorbed(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor,
                 visible: Tensor | None) -> Tensor:
        """Attend to the latents as to one shared key and value -> (B, S, H, v_head_dim)"""
        args = self.args
        wkv_b = self.wkv_b.weight.to(q_nope.dtype).unflatten(0, (args.n_heads, -1))
        w_uk, w_uv = wkv_b.split([args.qk_nope_head_dim, args.v_head_dim], dim=1)
        q = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)  # (B, S, H, kv_lora_rank)
        q = torch.cat([q, q_pe], dim=-1)
        seen = causal(q.size(1), latent.size(1), q.device) if visible is None else visible
        scores = torch.einsum("bshc,btc->bsht", q, latent) * self.scale
        scores = scores.masked_fill(~seen.unsqueeze(2), float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs = scores.softmax(dim=-1, dtype=wide).to(q.dtype)  # (B, S, H, T)
        z = torch.einsum("bsht,btc->bshc", probs, latent[..., :args.kv_lora_rank])
        return torch.einsum("bshc,hdc->bshd", z, w_uv)

    def absorbed_sparse(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor,
                        chosen: Selection) -> Tensor:
        """`absorbed`, each query alone with the latents that were chosen for it."""
        alone = (t.flatten(0, 1).unsqueeze(1) for t in (q_nope, q_pe))  # (B*S, 1, H, ..)
        own = chosen.gather(latent).flatten(0, 1)  # (B*S, k, kv_lora_rank + qk_rope_head_dim)
        heads = self.absorbed(*alone, own, chosen.seen.flatten(0, 1).unsqueeze(1))
        return heads.view(*q_nope.shape[:3], -1)


def seen_by(context: Context, x: Tensor, keys: int) -> Tensor:
    """Which of the T keys the queries made of x (B, S, ..) see: (B or 1, S, T) bool"""
    visible = context.visible
    return causal(x.size(1), keys, x.device) if visible is None else visible


def causal(queries: int, keys: int, device=None) -> Tensor:
    """(1, S, T) bool: the S queries are the last of the T positions and see those up to theirs."""
    return torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of every head.

    q: (B, S, H, qk_head_dim); k: (B, T, H, qk_head_dim); v: (B, T, H, v_head_dim)
    visible: (B or 1, S, T) bool; None: S = T and a query sees the keys up to itself
    Returns (B, S, H, v_head_dim).
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S or T, ..)
    # On a CPU two batched products beat the fused kernel while the scores are small (measured:
    # BF16 2.5 times at 256 tokens, FP32 alike); its memory grows with the square of the length.
    plain = q.device.type == "cpu" and k.size(-2) <= 512
    return (attention_plain if plain else attention_fused)(q, k, v, visible, scale).transpose(1, 2)


def attention_fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None,
                    scale: float) -> Tensor:
    """`attention` by torch's kernel, heads before positions."""
    width = v.size(-1)
    # The kernels want values as wide as keys: zeros added here leave the result unchanged.
    v = F.pad(v, (0, k.size(-1) - width)) if k.size(-1) > width else v
    mask = None if visible is None else visible.unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return out[..., :width]


def attention_plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None,
                    scale: float) -> Tensor:
    """`attention` as product, softmax, product, heads before positions."""
    batch, heads = q.shape[:2]
    seen = causal(q.size(2), k.size(2), q.device) if visible is None else visible
    hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
    hidden = hidden.masked_fill_(~seen, float("-inf"))  # (B or 1, S, T)
    hidden = hidden.repeat_interleave(heads, dim=0) if len(hidden) > 1 else hidden
    q, v = (rearrange(t, "b h s d -> (b h) s d") for t in (q, v))
    k = rearrange(k, "b h t d -> (b h) d t")
    scores = torch.baddbmm(hidden, q, k, alpha=scale)  # (B*H, S, T)
    # Softmax works in FP32 inside and rounds its result only.
    out = torch.bmm(scores.softmax(dim=-1), v)  # (B*H, S, v_head_dim)
    return rearrange(out, "(b h) s d -> b h s d", b=batch)
