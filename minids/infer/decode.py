"""A few tokens of every sequence, for small models on a CPU: the absorbed form in few operations.

A decoding step of a small model on a CPU spends its time between the products, calling some
hundred little operations a layer. `Decoder` computes the same function with fewer:

    Weights come first in every product, W x^T, which is quicker for few rows.
    W_UK is multiplied into W_Q and W_UV into W_O beforehand, as V2 says they can be (arXiv
    2405.04434, section 2.1.2 and appendix C); the token's own latent is then one more head of the
    same product.
    A query that is alone sees all keys, and needs no mask unless there is padding, or sequences of
    unequal length.
    The experts' tokens are few: they go side by side into batched products, or one expert after
    the other, whichever was measured faster.

`decoder_for` returns it where it computes what the model computes and pays; else the model itself.
The multiplied matrices are copies, made once per generation. No gradient passes through here.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.model.layers import MLP, Linear, RMSNorm, compute_dtype
from minids.model.mla import MLA, LatentCache
from minids.model.moe import Experts, Gate, MoE
from minids.model.mtp import MTPModule
from minids.model.rope import apply_rotary_emb, rotations
from minids.model.transformer import Block, Transformer

PARTS = {nn.Embedding, nn.ModuleList, Block, MLA, MLP, MoE, Gate, Experts, Linear, RMSNorm,
         MTPModule}


class Steps:
    """Gives a model a few tokens of each sequence at a time, and their latents to the caches.

    cache: of the model's layers; ahead: of its MTP modules, where they are used
    absorbed: the form of attention
    """

    def __init__(self, model: Transformer, cache: LatentCache, ahead: LatentCache | None = None,
                 absorbed: bool = True):
        self.model, self.cache, self.ahead, self.absorbed = model, cache, ahead, absorbed

    def __call__(self, tokens: Tensor) -> Tensor:
        """One token of each sequence: (B,) int64 -> logits (B, V)"""
        return self.model.head(self.hidden(tokens.unsqueeze(1))[:, -1])

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads after each token: (B, S) int64 -> (B, S, D)"""
        return self.model.hidden(tokens, self.cache, self.absorbed)[0]

    def mtp(self, k: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """One MTP module further; the cache's `length` stays where it is.

        k: the module, counted from 0; hidden: (B, S, D); tokens: (B, S) int64, those embedded
        """
        model, context = self.model, self.model.context(tokens, self.ahead, self.absorbed)
        return model.mtp[k](hidden, model.embed(tokens), context)[0]


def decoder_for(model: Transformer, cache: LatentCache, ahead: LatentCache | None = None) -> Steps:
    """The quicker of the two that compute what this model computes."""
    return (Decoder if few_operations_pay(model) else Steps)(model, cache, ahead)


def few_operations_pay(model: Transformer) -> bool:
    """Whether `Decoder` computes what this model computes, and its copies of weights stay small.

    Not with parts of another kind, nor under autocast; nor for a wide model, where the multiplied
    matrices are much larger than those they replace, and reading weights is what takes the time.
    """
    args, weight = model.args, model.head.weight
    parts = [model.embed, *model.layers, model.norm, model.head, model.mtp]
    known = type(model) is Transformer and all(type(module) in PARTS for part in parts
                                               for module in part.modules())
    return (known and weight.device.type == "cpu" and compute_dtype(weight) == weight.dtype
            and args.kv_lora_rank % 2 == 0 and args.n_heads * args.kv_lora_rank <= 2 * args.dim)


class Place(NamedTuple):
    """Where the tokens of one pass stand.

    cache: where their latents go
    rotation: (B or 1, S, rope / 2) complex
    mask: (B or 1, 1, S * H, T), or a shape that broadcasts to it, -inf where nothing is seen; None
        where a token sees all
    """

    cache: LatentCache
    rotation: Tensor
    mask: Tensor | None


class Decoder(Steps):
    """The same in few operations."""

    def __init__(self, model: Transformer, cache: LatentCache, ahead: LatentCache | None = None):
        super().__init__(model, cache, ahead)
        self.products = [Folded(block.attn) for block in model.layers]
        if ahead is not None:
            self.mtp_products = [Folded(module.block.attn) for module in model.mtp]
        positions, self.mask = torch.arange(cache.latents.size(2))[None], None  # (1, T)
        if cache.pad is not None:
            positions = positions - cache.pad[:, None]  # (B, T)
            mask = torch.zeros(positions.shape, dtype=cache.latents.dtype)
            self.mask = mask.masked_fill_(positions < 0, float("-inf"))[:, None, None]
        self.rotations = rotations(positions.clamp(min=0), model.args)  # (B or 1, T, rope / 2)

    def __call__(self, tokens: Tensor) -> Tensor:
        """One token of each sequence: (B,) int64 -> logits (B, V)"""
        with vector_products(tokens, self.model.head.weight.dtype):
            return times(self.layers(tokens.unsqueeze(1)), self.model.head.weight)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads after each token: (B, S) int64 -> (B, S, D)"""
        with vector_products(tokens.flatten(), self.model.head.weight.dtype):
            return self.layers(tokens).view(*tokens.shape, -1)

    def layers(self, tokens: Tensor) -> Tensor:
        """(B, S) int64 -> (B * S, D)"""
        model = self.model
        place = self.place(self.cache, tokens.size(1))
        x = F.embedding(tokens.flatten(), model.embed.weight)  # (B * S, D)
        for block, folded in zip(model.layers, self.products, strict=True):
            x = self.block(block, folded, x, place)
        self.cache.length += tokens.size(1)
        return normalise(x, model.norm)

    def mtp(self, k: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """One MTP module further, as in `Steps`."""
        module, place = self.model.mtp[k], self.place(self.ahead, tokens.size(1))
        with vector_products(tokens.flatten(), self.model.head.weight.dtype):
            embedding = F.embedding(tokens, self.model.embed.weight)  # (B, S, D)
            joined = torch.cat([normalise(embedding, module.enorm),
                                normalise(hidden, module.hnorm)], dim=-1)
            x = times(joined.flatten(0, 1), module.eh_proj.weight)  # (B * S, D)
            x = self.block(module.block, self.mtp_products[k], x, place)
        return normalise(x, module.norm).view(hidden.shape)

    def block(self, block: Block, folded: "Folded", x: Tensor, place: Place) -> Tensor:
        """(B * S, D) -> (B * S, D)"""
        x = folded.attend(x, normalise(x, block.attn_norm), place)
        return feed(block.ffn, x, normalise(x, block.ffn_norm))

    def place(self, cache: LatentCache, count: int) -> Place:
        """Where the next `count` tokens of each sequence stand."""
        if count == 1 and cache.behind is None:
            end = cache.length + 1
            mask = None if self.mask is None else self.mask[..., :end]
            return Place(cache, self.rotations[:, cache.length:end], mask)
        slots, (_, visible) = cache.slots(count), cache.place(count)
        row = torch.arange(len(self.rotations))[:, None]
        rotation = self.rotations[row, slots]  # (B or 1, S, rope / 2)
        mask = torch.zeros(visible.shape, dtype=cache.latents.dtype)
        mask = mask.masked_fill_(~visible, float("-inf"))  # (B or 1, S, T)
        return Place(cache, rotation,
                     mask.repeat_interleave(self.model.args.n_heads, dim=1).unsqueeze(1))


@contextlib.contextmanager
def vector_products(tokens: Tensor, dtype: torch.dtype):
    """For a single sequence in BF16: torch's own kernel for a matrix and a vector.

    oneDNN, which torch takes otherwise, spends 18 of 20 microseconds on its way in, measured.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and not (len(tokens) == 1 and dtype == torch.bfloat16)
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class Folded:
    """The attention of one layer, its expansions multiplied into the matrices beside them.

    w_q: (H * width, D or q_lora_rank), from the input to the queries that latents are compared
        with, where width = kv_lora_rank + qk_rope_head_dim; without a query latent the matrix of
        the token's own latent follows, as one more head
    w_o: (D, H * kv_lora_rank), from the weighted latents to the output
    """

    def __init__(self, attn: MLA):
        args = self.args = attn.args
        self.attn = attn
        heads = args.n_heads
        w_uk, w_uv = attn.wkv_b.weight.unflatten(0, (heads, -1)).split(
            [args.qk_nope_head_dim, args.v_head_dim], dim=1)  # (H, .., kv_lora_rank)
        w_q = (attn.wq_b if args.q_lora_rank else attn.wq).weight.unflatten(0, (heads, -1))
        nope, pe = w_q.split([args.qk_nope_head_dim, args.qk_rope_head_dim], dim=1)
        rows = torch.cat([w_uk.transpose(1, 2) @ nope, pe], dim=1).flatten(0, 1)
        if not args.q_lora_rank:
            rows = torch.cat([rows, attn.wkv_a.weight])
        self.w_q = rows.contiguous()
        w_o = attn.wo.weight.unflatten(1, (heads, -1))  # (D, H, v_head_dim)
        self.w_o = torch.einsum("ihd,hdc->ihc", w_o, w_uv).flatten(1).contiguous()

    def attend(self, x: Tensor, n: Tensor, place: Place) -> Tensor:
        """x (B * S, D) plus the attention of n, which is x normalised."""
        args, attn, rank = self.args, self.attn, self.args.kv_lora_rank
        if args.q_lora_rank:
            q = times(normalise(times(n, attn.wq_a.weight), attn.q_norm), self.w_q)
            heads = torch.cat([q, times(n, attn.wkv_a.weight)], dim=-1)
        else:
            heads = times(n, self.w_q)
        batch, count = place.cache.latents.size(1), place.rotation.size(1)
        heads = heads.view(batch, count, args.n_heads + 1, -1)  # (B, S, H + 1, width)
        heads[..., rank:] = apply_rotary_emb(heads[..., rank:], place.rotation)
        q, latent = heads[:, :, :-1], heads[:, :, -1]
        latent[..., :rank] = normalise(latent[..., :rank], attn.kv_norm)
        # The heads are queries of one head. The value is the first part of the key; the rest of it
        # goes along, for the kernel wants keys and values of one width.
        key = place.cache.append(attn.layer, latent).unsqueeze(1)  # (B, 1, T, width)
        q = q.reshape(batch, 1, count * args.n_heads, -1)
        attend = attend_products if batch >= MANY and x.dtype != torch.bfloat16 else attend_fused
        z = attend(q, key, place.mask, attn.scale)
        return x + times(z[..., :rank].reshape(len(x), -1), self.w_o)


MANY = 16  # sequences for which two batched products beat the fused kernel, 1.2 to 3.5 times


def attend_fused(q: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Queries (B, 1, M, width) on keys that are values too, (B, 1, T, width): (B, 1, M, width)"""
    return F.scaled_dot_product_attention(q, key, key, mask, scale=scale)


def attend_products(q: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same as product, softmax, product."""
    q, key = q.squeeze(1) * scale, key.squeeze(1)
    scores = torch.bmm(q, key.mT)  # (B, M, T)
    scores = scores if mask is None else scores + mask.squeeze(1)
    return torch.bmm(scores.softmax(-1), key).unsqueeze(1)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of a few rows: (M, I), (O, I) -> (M, O)

    Of two rows and more W x^T takes a third to two thirds of the time of x W^T in FP32; measured on
    a CPU with weights from memory.
    """
    if len(x) == 1:
        return F.linear(x, weight)
    return (weight @ x.t()).t().contiguous()


def feed(ffn: MLP | MoE, x: Tensor, n: Tensor) -> Tensor:
    """x (B, D) plus the feed-forward layer of n, which is x normalised."""
    if type(ffn) is MLP:
        return add_mlp(ffn, x, n)
    weights, routing = ffn.gate(n)  # (B, K)
    if ffn.shared_experts is not None:
        x = add_mlp(ffn.shared_experts, x, n)
    return x + routed(ffn.experts, n, weights.to(n.dtype), routing.indices)


def routed(experts: Experts, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Send each token to its experts and add up what comes back.

    x: (B, D); weights, indices: (B, K) -> (B, D)
    """
    if len(x) == 1:
        out = [expert(experts, e, x) for e in indices[0].tolist()]
        return weights @ torch.cat(out)
    if len(x) <= FEW:
        share = torch.zeros(len(x), len(experts.w1), dtype=x.dtype).scatter_(1, indices, weights)
        out = [expert(experts, e, x) * share[:, e:e + 1] for e in set(indices.flatten().tolist())]
        return sum(out[1:], out[0])
    pairs = indices.flatten()  # (B*K,)
    place = F.one_hot(pairs, len(experts.w1)).cumsum(0)  # (B*K, E), pairs of each expert so far
    most = int(place[-1].max())
    even = most * len(experts.w1) <= PADDING * len(pairs)
    return (side_by_side if even else one_by_one)(experts, x, weights, indices, place)


FEW = 4      # tokens that every expert computes whom one of them chose; a row more costs nothing
PADDING = 2  # most rows that a pair may cost in a batched product; measured, 2 to 128 tokens


def side_by_side(experts: Experts, x: Tensor, weights: Tensor, indices: Tensor,
                 place: Tensor) -> Tensor:
    """`routed` in three batched products: each expert gets as many rows as the busiest."""
    pairs, most = indices.flatten(), int(place[-1].max())
    slot = pairs * most + place.gather(1, pairs.unsqueeze(1)).squeeze(1) - 1  # (B*K,)
    source = pairs.new_zeros(len(experts.w1) * most)
    source[slot] = torch.arange(len(pairs)) // indices.size(1)  # an empty row takes token 0
    rows = x[source].unflatten(0, (-1, most))  # (E, most, D)
    hidden = F.silu(rows @ experts.w1.mT).mul_(rows @ experts.w3.mT)
    out = (hidden @ experts.w2.mT).flatten(0, 1)[slot].view(*indices.shape, -1)  # (B, K, D)
    return (weights.unsqueeze(1) @ out).squeeze(1)


def one_by_one(experts: Experts, x: Tensor, weights: Tensor, indices: Tensor,
               place: Tensor) -> Tensor:
    """`routed` expert by expert: no row is wasted."""
    order = indices.flatten().argsort()  # (B*K,), pairs by expert
    source = order // indices.size(1)  # the token of each
    parts = x[source].split(place[-1].tolist())
    out = torch.cat([expert(experts, e, part) for e, part in enumerate(parts) if len(part)])
    return torch.zeros_like(x).index_add_(0, source, out * weights.flatten()[order].unsqueeze(-1))


def expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    """What expert e makes of its tokens: (M, D) -> (M, D)"""
    hidden = F.silu(times(x, experts.w1[e])) * times(x, experts.w3[e])
    return times(hidden, experts.w2[e])


def add_mlp(mlp: MLP, x: Tensor, n: Tensor) -> Tensor:
    """x + mlp(n)"""
    hidden = F.silu(times(n, mlp.w1.weight)) * times(n, mlp.w3.weight)
    return x + times(hidden, mlp.w2.weight)


def normalise(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm, in FP32 or wider."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
