"""A few tokens of every sequence, for small models on a CPU: the decoding step in few operations.

A decoding step of a small model on a CPU spends its time between the products, calling some hundred
little operations a layer. These bodies compute the same with fewer:

    In BF16 weights come first in a product of few rows, W x^T, which is quicker.
    W_UK is multiplied into W_Q and W_UV into W_O beforehand (`minids.apply.folded`; V2, arXiv
    2405.04434, section 2.1.2 and appendix C); the token's own latent is then one more head.
    The experts' tokens are few: they go side by side into batched products, or one expert after the
    other, whichever was measured faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels import norm
from minids.kernels.attention import one_key_for_all_heads
from minids.kernels.precision import plain_inference, wide
from minids.kernels.registry import body

ROWS = 512  # tokens that count as few where experts are concerned
FEW_ROWS = 32  # rows up to which W x^T is quicker than x W^T in BF16
SMALL = 2 ** 19  # numbers of a matrix up to which oneDNN's way in outweighs its work
FEW = 4  # tokens that every expert computes whom one of them chose; a row more costs nothing
PADDING = 2  # most rows that a pair may cost in a batched product; measured, 2 to 128 tokens


def is_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Return whether x has few rows in BF16; a single one only meets a small matrix."""
    if x.dtype != torch.bfloat16 or not plain_inference(x):
        return False
    rows = x.numel() // x.size(-1)
    return 1 < rows <= FEW_ROWS or rows == 1 and weight.numel() <= SMALL


@body(is_few_rows)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply few rows in BF16: (.., I), (O, I) -> (.., O)"""
    rows = x.flatten(0, -2)
    with own_products(rows):
        return multiply(rows, weight).view(*x.shape[:-1], -1)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T, in BF16 as W x^T if x has few rows: (M, I), (O, I) -> (M, O)

    That takes 0.7 to 0.9 of the time, measured with weights from memory (in FP32 it takes longer).
    """
    if x.dtype == torch.bfloat16 and 1 < x.size(0) <= FEW_ROWS:
        return (weight @ x.t()).t().contiguous()
    return F.linear(x, weight)


class own_products:
    """A context in which torch's own kernel multiplies a single row x in BF16, not oneDNN's.

    oneDNN spends 18 of 20 microseconds on its way in. A class enters in a quarter of the time of a
    generator, which a decoding step would notice.
    """

    def __init__(self, x: Tensor):
        one = x.size(0) == 1 and x.dtype == torch.bfloat16
        self.switch = one and torch.backends.mkldnn.enabled

    def __enter__(self):
        if self.switch:
            torch.backends.mkldnn.enabled = False

    def __exit__(self, *error):
        if self.switch:
            torch.backends.mkldnn.enabled = True


def is_folded(block, x: Tensor, context) -> bool:
    """Return whether the decoding session that owns the cache has folded this block's weights."""
    return (context.cache is not None and context.cache.folded is not None and context.absorbed
            and plain_inference(x))


@body(is_folded)
def folded_block(block, x: Tensor, context) -> tuple:
    """Run `Block.forward` on folded weights, without the modules' own calls.

    This repeats the walk through a block because a decoding step is bound by such calls: with
    attention and MLP as bodies of their own under the plain block, a token took 1.07 times as long
    in BF16 and 1.12 in FP32 (preset tiny, batch 1, one thread, medians of nine pairs).
    """
    ffn, rows, routing = block.ffn, x.flatten(0, 1), None  # (N, D)
    with own_products(rows):
        rows = rows + folded_attention(block.attn, normalise(rows, block.attn_norm), context)
        n = normalise(rows, block.ffn_norm)
        if not block.is_moe:
            return (rows + mlp(ffn, n)).view_as(x), None, None
        routes = None if context.routes is None else context.routes[block.layer]
        weights, routing = ffn.gate(n.view_as(x), routes)
        send = routed if len(n) <= ROWS else ffn.routed.plain
        y = send(ffn, n, weights.flatten(0, 1), routing.indices.flatten(0, 1))
        y = y if ffn.shared_experts is None else y + mlp(ffn.shared_experts, n)
    return (rows + y).view_as(x), routing, None


def folded_attention(attn, x: Tensor, context) -> Tensor:
    """Run `MLA.forward` on folded weights: (N, D) -> (N, D)"""
    args, cache, rank = attn.args, context.cache, attn.args.kv_lora_rank
    w_q, w_o = cache.folded[attn.layer]
    if args.q_lora_rank:
        c_q = normalise(multiply(x, attn.wq_a.weight), attn.q_norm)
        heads = torch.cat([multiply(c_q, w_q), multiply(x, attn.wkv_a.weight)], dim=-1)
    else:
        heads = multiply(x, w_q)
    count = context.rotation.size(1)
    heads = heads.view(-1, count, args.n_heads + 1, cache.latents.size(-1))  # (B, S, H + 1, width)
    turned = torch.view_as_complex(heads[..., rank:].to(wide(x)).unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(turned * context.rotation.unsqueeze(-2)).flatten(-2)
    heads[..., rank:] = turned
    latent = heads[:, :, -1]  # (B, S, width)
    latent[..., :rank] = normalise(latent[..., :rank], attn.kv_norm)
    latent = cache.append(attn.layer, latent)  # (B, T, width)
    z = one_key_for_all_heads(heads[:, :, :-1], latent, context.visible, attn.scale)
    return multiply(z[..., :rank].reshape(len(x), -1), w_o)


def normalise(x: Tensor, module) -> Tensor:
    """Run an RMSNorm."""
    return norm.fused(x, module.weight, module.eps)


def mlp(module, x: Tensor) -> Tensor:
    """Run an MLP: (N, D) -> (N, D)"""
    return swiglu(x, module.w1.weight, module.w2.weight, module.w3.weight)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Return w2(silu(w1 x) * w3 x)."""
    return multiply(F.silu(multiply(x, w1)).mul_(multiply(x, w3)), w2)


def expert(experts, e: int, x: Tensor) -> Tensor:
    """Run expert e on its tokens: (M, D) -> (M, D)"""
    return swiglu(x, experts.w1[e], experts.w2[e], experts.w3[e])


@body(lambda moe, x, weights, indices: plain_inference(x) and len(x) <= ROWS
      and "product" not in vars(moe.experts))
def routed(moe, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Run `MoE.routed` for few tokens: x (N, D), weights and indices (N, K) -> (N, D)"""
    experts, weights = moe.experts, weights.to(x.dtype)
    if len(x) == 1:
        with own_products(x):
            return weights @ torch.cat([expert(experts, e, x) for e in indices[0].tolist()])
    if len(x) <= FEW:
        share = x.new_zeros(len(x), len(experts.w1)).scatter_(1, indices, weights)
        out = [expert(experts, e, x) * share[:, e:e + 1] for e in set(indices.flatten().tolist())]
        return sum(out[1:], out[0])
    pairs = indices.flatten()  # (N*K,)
    nth = F.one_hot(pairs, len(experts.w1)).cumsum(0)  # (N*K, E), pairs of each expert so far
    most = int(nth[-1].max())
    even = most * len(experts.w1) <= PADDING * len(pairs)
    return (side_by_side if even else one_by_one)(experts, x, weights, indices, nth)


def side_by_side(experts, x: Tensor, weights: Tensor, indices: Tensor, nth: Tensor) -> Tensor:
    """Run three batched products: each expert gets as many rows as the busiest."""
    pairs, most = indices.flatten(), int(nth[-1].max())
    slot = pairs * most + nth.gather(1, pairs.unsqueeze(1)).squeeze(1) - 1  # (N*K,)
    source = pairs.new_zeros(len(experts.w1) * most)
    source[slot] = torch.arange(len(pairs)) // indices.size(1)  # an empty slot takes token 0
    rows = x[source].unflatten(0, (-1, most))  # (E, most, D)
    hidden = F.silu(rows @ experts.w1.mT).mul_(rows @ experts.w3.mT)
    out = (hidden @ experts.w2.mT).flatten(0, 1)[slot].view(*indices.shape, -1)  # (N, K, D)
    return (weights.unsqueeze(1) @ out).squeeze(1)


def one_by_one(experts, x: Tensor, weights: Tensor, indices: Tensor, nth: Tensor) -> Tensor:
    """Run expert by expert: no row is wasted."""
    order = indices.flatten().argsort()  # (N*K,), pairs by expert
    source = order // indices.size(1)  # the token of each
    parts = x[source].split(nth[-1].tolist())
    out = torch.cat([expert(experts, e, part) for e, part in enumerate(parts) if len(part)])
    return torch.zeros_like(x).index_add_(0, source, out * weights.flatten()[order].unsqueeze(-1))
