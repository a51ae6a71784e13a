"""The lightning indexer's KL loss in Triton (V3.2 section 2.1.1): the wanted distribution p, the
scores of a selection, and from both the loss and its gradient.

p is attention's, the mean over H heads. Its sums come first, one number per query and head; then
each probability is computed again where it is added to the others, so that one number per pair of
query and key is written and not H. Over all keys (the warm-up) the caller takes few queries at a
time; over a selection there are S x K numbers.

Letters as in `triton_selected`; q and keys of all heads have WIDE + REST numbers, D of which exist.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids.kernels.precision import LOG2_E, in_triton
from minids.kernels.triton_indexer import rows, sizes, tile
from minids.kernels.triton_selected import selected

power = triton.next_power_of_2


@triton.jit
def part(base, exists, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Load SIZE numbers of vectors, from number FIRST on, zeros from D on: (N, SIZE)

    base: (N,) pointers to the vectors' first numbers; exists: (N,), which of them there are
    """
    i = FIRST + tl.arange(0, SIZE)
    return tl.load(base[:, None] + i[None, :], mask=exists[:, None] & (i < D)[None, :], other=0.0)


@triton.jit
def products(wide, rest, base, exists, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
             PRECISION: tl.constexpr):
    """Multiply vectors, (N, WIDE) and (N, REST), with those at base: (N, M)"""
    out = tl.dot(wide, tl.trans(part(base, exists, D, 0, WIDE)), input_precision=PRECISION)
    other = part(base, exists, D, WIDE, REST)
    return tl.dot(rest, tl.trans(other), out, input_precision=PRECISION)


@triton.jit
def attention_sums_kernel(q, keys, sums, S, T, first, q_batch, keys_batch, scale,
                          H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
                          QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """log2 of the sum of exp2(score) of each query and head over the keys before: (B, S, H)

    Not written: the scores, (B, S, H, T).
    """
    b, h, begin = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0) * QUERIES
    s = begin + tl.arange(0, QUERIES)
    row = q + b * q_batch + (s.to(tl.int64) * H + h) * D
    wide, rest = part(row, s < S, D, 0, WIDE), part(row, s < S, D, WIDE, REST)
    high = tl.full((QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, tl.minimum(T, first + begin + QUERIES), KEYS):
        t = start + tl.arange(0, KEYS)
        column = keys + b * keys_batch + (t.to(tl.int64) * H + h) * D
        score = products(wide, rest, column, t < T, D, WIDE, REST, PRECISION) * scale
        score = tl.where((t[None, :] <= first + s[:, None]) & (t < T)[None, :], score,
                         float("-inf"))
        higher = tl.maximum(high, tl.max(score, axis=1))
        mass = mass * tl.exp2(high - higher) + tl.sum(tl.exp2(score - higher[:, None]), axis=1)
        high = higher
    tl.store(sums + (b * S + s) * H + h, high + tl.log2(mass), mask=s < S)


@triton.jit
def attention_mass_kernel(q, keys, sums, out, S, T, first, q_batch, keys_batch, scale,
                          H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
                          QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """p of QUERIES queries and KEYS keys, the heads' mean: out (B, S, T) FP32

    Not written: any head's own probabilities, (B, S, H, T). Tiles that no query sees stay as they
    are.
    """
    b, begin, start = tl.program_id(2).to(tl.int64), tl.program_id(1) * QUERIES, tl.program_id(0)
    s, t = begin + tl.arange(0, QUERIES), start * KEYS + tl.arange(0, KEYS)
    if start * KEYS <= first + begin + QUERIES - 1:
        row = q + b * q_batch + s.to(tl.int64) * H * D
        column = keys + b * keys_batch + t.to(tl.int64) * H * D
        acc = tl.zeros((QUERIES, KEYS), tl.float32)
        for h in range(0, H):
            total = tl.load(sums + (b * S + s) * H + h, mask=s < S, other=0.0)
            wide = part(row + h * D, s < S, D, 0, WIDE)
            rest = part(row + h * D, s < S, D, WIDE, REST)
            score = products(wide, rest, column + h * D, t < T, D, WIDE, REST, PRECISION)
            acc += tl.exp2(score * scale - total[:, None])
        acc = tl.where(t[None, :] <= first + s[:, None], acc / H, 0.0)
        tl.store(out + (b * S + s)[:, None] * T + t[None, :], acc,
                 mask=(s < S)[:, None] & (t < T)[None, :])


@triton.jit
def selected_mass_kernel(q, latents, tokens, out, S, K, latent_batch, scale,
                         H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
                         HEADS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """p over one query's own latents, one key for all heads, the heads' mean: out (N, K) FP32

    q: (N, H, D); latents: (B, T, D); tokens: (N, K) int32, -1 for none. The queries of HEADS heads
    stay where they are while the latents pass twice. Not written: scores, (N, H, K), and the
    latents fetched.
    """
    n = tl.program_id(0).to(tl.int64)
    own = latents + n // S * latent_batch
    for first in range(0, H, HEADS):
        h = first + tl.arange(0, HEADS)
        row = q + (n * H + h) * D
        wide, rest = part(row, h < H, D, 0, WIDE), part(row, h < H, D, WIDE, REST)
        high = tl.full((HEADS,), float("-inf"), tl.float32)
        mass = tl.zeros((HEADS,), tl.float32)
        for start in range(0, K, KEYS):
            j = start + tl.arange(0, KEYS)
            t = tl.load(tokens + n * K + j, mask=j < K, other=-1)
            there = t >= 0
            score = products(wide, rest, own + t * D, there, D, WIDE, REST, PRECISION) * scale
            score = tl.where(there[None, :], score, float("-inf"))
            higher = tl.maximum(high, tl.max(score, axis=1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
            mass = mass * tl.exp2(high - finite) + tl.sum(tl.exp2(score - finite[:, None]), axis=1)
            high = higher
        total = tl.where(h < H, high + tl.log2(mass), float("inf"))  # 0 for a head too many
        for start in range(0, K, KEYS):
            j = start + tl.arange(0, KEYS)
            t = tl.load(tokens + n * K + j, mask=j < K, other=-1)
            there = t >= 0
            score = products(wide, rest, own + t * D, there, D, WIDE, REST, PRECISION) * scale
            share = tl.where(there, tl.sum(tl.exp2(score - total[:, None]), axis=0) / H, 0.0)
            share += tl.load(out + n * K + j, mask=(j < K) & (first > 0), other=0.0)
            tl.store(out + n * K + j, share, mask=j < K)


@triton.jit
def selected_scores_kernel(q, weights, keys, tokens, out, S, K, tiles, keys_batch,
                           H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                           WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Equation 1 of V3.2 for KEYS of one query's own tokens: out (N, K) FP32"""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    j = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    d, h = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    t = tl.load(tokens + n * K + j, mask=j < K, other=-1)
    there = t >= 0
    key = tl.load(keys + n // S * keys_batch + t[:, None] * D + d[None, :],
                  mask=there[:, None] & (d < D)[None, :], other=0.0)
    query = tile(0, HEADS, H, q + n * H * D, D, WIDTH)
    weight = tl.load(weights + n * H + h, mask=h < H, other=0.0)
    products = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (KEYS, HEADS)
    score = tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1)
    tl.store(out + n * K + j, score, mask=j < K)


@triton.jit
def selected_scores_grad_kernel(q, weights, keys, tokens, grad, dq, dweights, dkeys, S, K, T,
                                keys_batch, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                                WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of one query, its head weights and its own keys: grad (N, K) -> dq, dweights, dkeys

    dkeys: (B, T, D) FP32, added to. Queries select in any order: additions are atomic, and the last
    bits differ from run to run.
    """
    n = tl.program_id(0).to(tl.int64)
    d, h = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    query = tile(0, HEADS, H, q + n * H * D, D, WIDTH)
    weight = tl.load(weights + n * H + h, mask=h < H, other=0.0)
    acc, mass = tl.zeros((HEADS, WIDTH), tl.float32), tl.zeros((HEADS,), tl.float32)
    for start in range(0, K, KEYS):
        j = start + tl.arange(0, KEYS)
        t = tl.load(tokens + n * K + j, mask=j < K, other=-1)
        there = t >= 0
        inside = there[:, None] & (d < D)[None, :]
        key = tl.load(keys + n // S * keys_batch + t[:, None] * D + d[None, :], mask=inside,
                      other=0.0)
        g = tl.load(grad + n * K + j, mask=j < K, other=0.0)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (HEADS, KEYS)
        mass += tl.sum(tl.maximum(products, 0.0) * g[None, :], axis=1)
        back = tl.where(products > 0.0, g[None, :] * weight[:, None], 0.0).to(key.dtype)
        acc += tl.dot(back, key, input_precision=PRECISION)
        more = tl.dot(tl.trans(back), query, input_precision=PRECISION)  # (KEYS, WIDTH)
        tl.atomic_add(dkeys + (n // S * T + t)[:, None] * D + d[None, :], more, mask=inside,
                      sem="relaxed")
    row = n * H + h
    tl.store(dq + row[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty),
             mask=(h < H)[:, None] & (d < D)[None, :])
    tl.store(dweights + row, mass, mask=h < H)


@triton.jit
def divergence_kernel(scores, wanted, seen, loss, S, T, first, scale, SELECTED: tl.constexpr,
                      BLOCK: tl.constexpr):
    """KL(p || softmax(I)) of one row, and its gradient in place of the scores I, times `scale`.

    scores, wanted: (N, T), I and p. SELECTED: those with `seen` (N, T) count; else query s sees
    the keys t <= first + s. Gradients of all others are 0.
    """
    n = tl.program_id(0).to(tl.int64)
    row, p, own = scores + n * T, wanted + n * T, seen + n * T
    stop = T if SELECTED else tl.minimum(T, first + (n % S).to(tl.int32) + 1)
    high = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    entropy = tl.full((), 0.0, tl.float32)
    agreement = tl.full((), 0.0, tl.float32)
    for start in range(0, stop, BLOCK):
        t = start + tl.arange(0, BLOCK)
        there = t < stop
        if SELECTED:
            there = there & (tl.load(own + t, mask=there, other=0) != 0)
        score = tl.load(row + t, mask=there, other=float("-inf"))
        share = tl.load(p + t, mask=there, other=0.0)
        higher = tl.maximum(high, tl.max(score, axis=0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(high - finite) + tl.sum(tl.exp(score - finite), axis=0)
        high = higher
        entropy += tl.sum(tl.where(share > 0.0, share * tl.log(share), 0.0), axis=0)
        agreement += tl.sum(tl.where(there, share * score, 0.0), axis=0)
    total = high + tl.log(mass)
    tl.store(loss + n, (entropy - agreement + total) * scale)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        there = t < stop
        if SELECTED:
            there = there & (tl.load(own + t, mask=there, other=0) != 0)
        score = tl.load(row + t, mask=there, other=float("-inf"))
        share = tl.load(p + t, mask=there, other=0.0)
        tl.store(row + t, tl.where(there, tl.exp(score - total) - share, 0.0) * scale, mask=t < T)


def widths(width: int) -> dict:
    """Return D numbers as a power of two and another: 192 is 128 and 64."""
    wide = max(16, power(width + 1) // 2)
    return dict(D=width, WIDE=wide, REST=max(16, power(max(width - wide, 1))))


def attention_mass(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return p, (B, S, T) FP32; what a query does not see may be unwritten.

    q: (B, S, H, D); keys: (B, T, H, D); the S queries are the last of the T positions
    """
    (batch, count, heads, width), total = q.shape, keys.size(1)
    q, keys, half = rows(q), rows(keys), q.element_size() == 2
    block = 128 if half else 32
    sums = torch.empty(batch, count, heads, dtype=torch.float32, device=q.device)
    out = sums.new_empty(batch, count, total)
    shapes = count, total, total - count, q.stride(0), keys.stride(0), scale * LOG2_E
    how = dict(H=heads, QUERIES=block, KEYS=block, PRECISION=in_triton(q), **widths(width),
               num_warps=8 if half else 4, num_stages=2)
    parts = triton.cdiv(count, block)
    attention_sums_kernel[(parts, heads, batch)](q, keys, sums, *shapes, **how)
    attention_mass_kernel[(triton.cdiv(total, block), parts, batch)](q, keys, sums, out, *shapes,
                                                                     **how)
    return out


def selected_mass(q: Tensor, latent: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Return p over each query's own latents: q (B, S, H, D), latent (B, T, D) -> (B, S, K) FP32"""
    (batch, count, heads, width), k = q.shape, tokens.size(2)
    half, n = q.element_size() == 2, batch * count
    out = torch.empty(batch, count, k, dtype=torch.float32, device=q.device)
    selected_mass_kernel[(n,)](
        q, latent, tokens, out, count, k, latent.stride(0), scale * LOG2_E, H=heads,
        HEADS=max(16, min(power(heads), 128 if half else 16)), KEYS=64 if half else 16,
        PRECISION=in_triton(q), num_warps=8 if half else 4, num_stages=1, **widths(width))
    return out


def divergence(scores: Tensor, wanted: Tensor, seen: Tensor | None, first: int, scale: float
               ) -> Tensor:
    """Return the sum of the rows' losses times `scale`; scores (B, S, T) become its gradient.

    seen: which numbers count, (B, S, T) uint8; None: query s sees those up to first + s
    """
    batch, count, total = scores.shape
    loss = scores.new_empty(batch, count)
    divergence_kernel[(batch * count,)](
        scores, wanted, scores if seen is None else seen, loss, count, total, first, scale,
        SELECTED=seen is not None, BLOCK=min(2048, power(total)), num_warps=8)
    return loss.sum()


def over_selection(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, latent: Tensor,
                   indices: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return the loss over each query's own tokens, and its gradients, dkeys in FP32."""
    (batch, count, heads, width), k = index_q.shape, indices.size(2)
    index_q, weights, q, seen = (t.contiguous() for t in (index_q, weights, q, seen))
    index_k, latent, n = rows(index_k), rows(latent), batch * count
    tokens, seen = selected(indices, seen).contiguous(), seen.view(torch.uint8)
    wanted = selected_mass(q, latent, tokens, scale)
    half = index_q.element_size() == 2
    scores, how = torch.empty_like(wanted), dict(
        H=heads, D=width, KEYS=64 if half else 16, num_warps=4, **sizes(index_q))
    given = index_q, weights, index_k, tokens
    tiles = triton.cdiv(k, how["KEYS"])
    selected_scores_kernel[(n * tiles,)](
        *given, scores, count, k, tiles, index_k.stride(0), **how)
    loss = divergence(scores, wanted, seen, 0, 1 / n)
    dq, dweights = torch.empty_like(index_q), torch.empty_like(weights)
    dkeys = torch.zeros_like(index_k, dtype=torch.float32, memory_format=torch.contiguous_format)
    selected_scores_grad_kernel[(n,)](*given, scores, dq, dweights, dkeys, count, k,
                                      index_k.size(1), index_k.stride(0), **how)
    return loss, dq, dweights, dkeys
