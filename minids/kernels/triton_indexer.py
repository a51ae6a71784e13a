"""The lightning indexer in Triton: scores, and their gradients.

A score sums over H heads, and a tensor of H x S x T numbers would be 64 times as large as the
result. Here the heads of one query are a tile of a matrix product, 64 x 128 numbers in V3.2, and
their sum is taken in registers before anything is stored. Sums are kept in FP32.

Letters: query s sees the keys t <= first + s. H heads of D numbers; HEADS and WIDTH are powers of
two not below them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids.kernels.precision import in_triton

QUERIES = 16  # that one program scores against its keys, which stay where they are


@triton.jit
def tile(start, rows: tl.constexpr, stop, base, D, WIDTH: tl.constexpr):
    """Load `rows` vectors of D numbers from `start` on, zeros from `stop` on: (rows, WIDTH)"""
    row, d = start + tl.arange(0, rows), tl.arange(0, WIDTH)
    return tl.load(base + row[:, None] * D + d[None, :],
                   mask=(row < stop)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def scores_kernel(q, weights, keys, scales, out, S, T, pitch, first, q_batch, weights_batch,
                  keys_batch, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                  WIDTH: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
                  PRECISION: tl.constexpr, SCALED: tl.constexpr):
    """Equation 1 of V3.2 for KEYS keys and QUERIES queries: out (B, S, pitch), the first T of it

    If SCALED, a key is its numbers times its scale: scales (B, T) FP32

    Not written to memory: the products of the heads, (B, S, H, T), and their ReLU. The keys are
    read once per QUERIES queries. Each query's product is (KEYS, D) x (D, H), so that a head is a
    column, and a thread adds up most of a row's columns in its own registers. Tiles that no
    query sees are neither computed nor written.
    """
    b, begin = tl.program_id(2).to(tl.int64), tl.program_id(0) * KEYS
    t, h = begin + tl.arange(0, KEYS), tl.arange(0, HEADS)
    key = tile(begin, KEYS, T, keys + b * keys_batch, D, WIDTH)
    start = tl.program_id(1) * QUERIES
    stop = tl.minimum(start + QUERIES, S)
    scale = tl.full((KEYS,), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(scales + b * T + t, mask=t < T, other=0.0)
    for s in range(tl.maximum(start, begin - first), stop):
        rows = tile(0, HEADS, H, q + b * q_batch + s * H * D, D, WIDTH)
        weight = tl.load(weights + b * weights_batch + s * H + h, mask=h < H, other=0.0)
        products = tl.dot(key, tl.trans(rows), input_precision=PRECISION)  # (KEYS, HEADS)
        score = tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1)
        tl.store(out + (b * S + s) * pitch + t, score * scale if SCALED else score, mask=t < T)


@triton.jit
def scores_query_grad_kernel(q, weights, keys, grad, dq, dweights, S, T, first, q_batch,
                             weights_batch, keys_batch, H: tl.constexpr, D: tl.constexpr,
                             HEADS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
                             PRECISION: tl.constexpr):
    """Gradients of one query and its head weights: grad (B, S, T) -> dq (B, S, H, D), dweights

    Not written: the products, which are computed again, and their gradients, (B, S, H, T).
    """
    s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    rows = tile(0, HEADS, H, q + b * q_batch + s * H * D, D, WIDTH)
    weight = tl.load(weights + b * weights_batch + s * H + h, mask=h < H, other=0.0)
    acc, mass = tl.zeros((HEADS, WIDTH), tl.float32), tl.zeros((HEADS,), tl.float32)
    for begin in range(0, tl.minimum(T, first + s + 1), KEYS):
        t = begin + tl.arange(0, KEYS)
        key = tile(begin, KEYS, T, keys + b * keys_batch, D, WIDTH)
        g = tl.load(grad + (b * S + s) * T + t, mask=t < T, other=0.0)
        products = tl.dot(rows, tl.trans(key), input_precision=PRECISION)  # (HEADS, KEYS)
        mass += tl.sum(tl.maximum(products, 0.0) * g[None, :], axis=1)
        back = tl.where(products > 0.0, g[None, :] * weight[:, None], 0.0)
        acc += tl.dot(back.to(key.dtype), key, input_precision=PRECISION)
    row = (b * S + s) * H + h
    tl.store(dq + row[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty),
             mask=(h < H)[:, None] & (d < D)[None, :])
    tl.store(dweights + row, mass, mask=h < H)


@triton.jit
def scores_key_grad_kernel(q, weights, keys, grad, dkeys, S, T, first, q_batch, weights_batch,
                           keys_batch, dkeys_batch, H: tl.constexpr, D: tl.constexpr,
                           HEADS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
                           PRECISION: tl.constexpr):
    """Add the gradients of KEYS keys to dkeys, (B, T, D) FP32: grad (B, S, T)

    Not written: the products and their gradients. One program goes through all queries that see
    its keys, so nobody else writes here, and the sum has one order.
    """
    begin, b = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    t, h, d = begin + tl.arange(0, KEYS), tl.arange(0, HEADS), tl.arange(0, WIDTH)
    key = tile(begin, KEYS, T, keys + b * keys_batch, D, WIDTH)
    acc = tl.zeros((KEYS, WIDTH), tl.float32)
    for s in range(tl.maximum(0, begin - first), S):
        rows = tile(0, HEADS, H, q + b * q_batch + s * H * D, D, WIDTH)
        weight = tl.load(weights + b * weights_batch + s * H + h, mask=h < H, other=0.0)
        g = tl.load(grad + (b * S + s) * T + t, mask=t < T, other=0.0)
        products = tl.dot(key, tl.trans(rows), input_precision=PRECISION)  # (KEYS, HEADS)
        back = tl.where(products > 0.0, g[:, None] * weight[None, :], 0.0)
        acc += tl.dot(back.to(rows.dtype), rows, input_precision=PRECISION)
    place = dkeys + b * dkeys_batch + t[:, None] * D + d[None, :]
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit
def prepare_index_kernel(q, k, x, rotation, slots, norm, bias, proj, out, weights, index_keys, S,
                         DIM, q_stride, k_stride, rotation_stride, slot_stride, keys_batch, eps,
                         factor, H, D, P: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Prepare one new token for the indexer: store its key, write its queries and head weights.

    q: (N, H * D), k: (N, D), rows of products; x: (N, DIM), for the weights' product, in FP32
    rotation: (B or 1, S, P / 2, 2); slots: (B or 1, S); the strides of one are 0
    out: (N, H, D); weights: (N, H) FP32; index_keys: (B, slots, D), one layer of the cache

    The first program stores the key, the second the queries, each other one ROWS of the weights.
    """
    n, part = tl.program_id(0), tl.program_id(1)
    b, s = n // S, n % S
    HALF: tl.constexpr = P // 2
    d = tl.arange(0, WIDTH)
    other = tl.where(d < HALF, d + HALF, d - HALF)  # its pair, of the first P numbers
    at = rotation + b * rotation_stride + s * P + d % HALF * 2
    cos = tl.load(at, mask=d < P, other=1.0)
    sin = tl.load(at + 1, mask=d < P, other=0.0)
    sin = tl.where(d < HALF, -sin, sin)
    if part == 0:
        own = k + n * k_stride
        value = tl.load(own + d, mask=d < D, other=0.0).to(tl.float32)
        pair = tl.load(own + other, mask=d < P, other=0.0).to(tl.float32)
        mean = tl.sum(value, axis=0) / D
        apart = tl.where(d < D, value - mean, 0.0)
        scale = tl.rsqrt(tl.sum(apart * apart, axis=0) / D + eps)
        value = (value - mean) * scale * tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        value += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
        pair = (pair - mean) * scale * tl.load(norm + other, mask=d < P, other=0.0).to(tl.float32)
        pair += tl.load(bias + other, mask=d < P, other=0.0).to(tl.float32)
        slot = tl.load(slots + b * slot_stride + s)
        place = index_keys + b.to(tl.int64) * keys_batch + slot * D + d
        tl.store(place, (value * cos + pair * sin).to(index_keys.dtype.element_ty), mask=d < D)
    elif part == 1:
        h = tl.arange(0, HEADS)[:, None]
        row = q + n * q_stride + h * D
        rows = tl.load(row + d[None, :], mask=(h < H) & (d < D)[None, :], other=0.0)
        pairs = tl.load(row + other[None, :], mask=(h < H) & (d < P)[None, :], other=0.0)
        rows = rows.to(tl.float32) * cos[None, :] + pairs.to(tl.float32) * sin[None, :]
        tl.store(out + (n * H + h) * D + d[None, :], rows.to(out.dtype.element_ty),
                 mask=(h < H) & (d < D)[None, :])
    else:
        e = (part - 2) * ROWS + tl.arange(0, ROWS)
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, DIM, BLOCK):
            i = start + tl.arange(0, BLOCK)
            w = tl.load(proj + e[:, None] * DIM + i[None, :],
                        mask=(e < H)[:, None] & (i < DIM)[None, :], other=0.0).to(tl.float32)
            acc += w * tl.load(x + n * DIM + i, mask=i < DIM, other=0.0).to(tl.float32)[None, :]
        tl.store(weights + n * H + e, tl.sum(acc, axis=1) * factor, mask=e < H)


def sizes(q: Tensor) -> dict:
    """Return the constants of a tile of heads: q (B, S, H, D)"""
    return dict(HEADS=max(16, triton.next_power_of_2(q.size(2))),
                WIDTH=max(16, triton.next_power_of_2(q.size(3))),
                PRECISION=in_triton(q))


def rows(x: Tensor) -> Tensor:
    """Return x with everything but the first dimension contiguous, as slices of a batch are not."""
    return x if x[0].is_contiguous() else x.contiguous()


def prepare(indexer, x: Tensor, k: Tensor, q: Tensor | None, turn: Tensor, slots: Tensor,
            index_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Store new tokens' keys; return their queries (N, H, D) and weights (N, H), unless q = None

    x: (N, dim); k: (N, D), q: (N, H * D), products; turn, slots, index_keys: as in the kernel
    """
    args, new = indexer.args, dict(device=x.device)
    heads, width = args.index_n_heads, args.index_head_dim
    out = torch.empty(len(x), heads, width, dtype=index_keys.dtype, **new)
    weights = torch.empty(len(x), heads, dtype=torch.float32, **new)
    norm, more = indexer.k_norm, 0 if q is None else 1 + triton.cdiv(heads, 2)
    q = k if q is None else q
    prepare_index_kernel[(len(x), 1 + more)](
        q, k, x, turn, slots, norm.weight, norm.bias, indexer.weights_proj.weight, out, weights,
        index_keys, turn.size(1), x.size(1), q.stride(0), k.stride(0),
        turn.stride(0) if len(turn) > 1 else 0, slots.stride(0) if len(slots) > 1 else 0,
        index_keys.stride(0), norm.eps, (heads * width) ** -0.5, heads, width,
        P=args.qk_rope_head_dim, HEADS=max(16, triton.next_power_of_2(heads)),
        WIDTH=max(16, triton.next_power_of_2(width)), ROWS=2,
        BLOCK=min(triton.next_power_of_2(x.size(1)), 4096))
    return out, weights


def scores(q: Tensor, weights: Tensor, keys: Tensor, first: int, scales: Tensor | None = None,
           padded: bool = False) -> Tensor:
    """Return (B, S, T) FP32; query s sees keys up to first + s, and the rest may be unwritten.

    scales: (B, T) FP32, of keys in E4M3; those of the queries are in the weights
    padded: whether each row begins at a multiple of 64 bytes, and is then read faster
    """
    (batch, count, heads, width), total = q.shape, keys.size(1)
    q, weights, keys = rows(q), rows(weights), rows(keys)
    half = q.element_size() < 4
    block = (256 if count > QUERIES else 128) if half else 32
    pitch = -(-total // 16) * 16 if padded else total
    out = torch.empty(batch, count, pitch, dtype=torch.float32, device=q.device)
    scores_kernel[(triton.cdiv(total, block), triton.cdiv(count, QUERIES), batch)](
        q, weights, keys, weights if scales is None else scales, out, count, total, pitch,
        first, q.stride(0), weights.stride(0), keys.stride(0), heads, width, KEYS=block,
        QUERIES=QUERIES, SCALED=scales is not None, num_warps=8 if block == 256 else 4,
        num_stages=3 if half else 1, **sizes(q))
    return out[..., :total]


def add_gradients(q: Tensor, weights: Tensor, keys: Tensor, grad: Tensor, dkeys: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """Return dq and dweights, and add to dkeys (B, T, D) FP32; grad (B, S, T) is 0 past the edge.

    The S queries are the last of the T positions.
    """
    (batch, count, heads, width), total = q.shape, keys.size(1)
    q, weights, keys = rows(q), rows(weights), rows(keys)
    half = q.element_size() == 2
    dq, dweights = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty(
        weights.shape, dtype=torch.float32, device=q.device)
    shapes = (count, total, total - count, q.stride(0), weights.stride(0), keys.stride(0))
    how = dict(KEYS=64 if half else 16, num_warps=4, num_stages=3 if half else 1, **sizes(q))
    scores_query_grad_kernel[(count, batch)](
        q, weights, keys, grad, dq, dweights, *shapes, heads, width, **how)
    scores_key_grad_kernel[(triton.cdiv(total, how["KEYS"]), batch)](
        q, weights, keys, grad, dkeys, *shapes, dkeys.stride(0), heads, width, **how)
    return dq, dweights


