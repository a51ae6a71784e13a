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
def scores_kernel(q, weights, keys, out, S, T, first, q_batch, weights_batch, keys_batch,
                  H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                  KEYS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr):
    """Equation 1 of V3.2 for KEYS keys and QUERIES queries: out (B, S, T)

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
    for s in range(tl.maximum(start, begin - first), stop):
        rows = tile(0, HEADS, H, q + b * q_batch + s * H * D, D, WIDTH)
        weight = tl.load(weights + b * weights_batch + s * H + h, mask=h < H, other=0.0)
        products = tl.dot(key, tl.trans(rows), input_precision=PRECISION)  # (KEYS, HEADS)
        score = tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1)
        tl.store(out + (b * S + s) * T + t, score, mask=t < T)


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


def sizes(q: Tensor) -> dict:
    """Return the constants of a tile of heads: q (B, S, H, D)"""
    return dict(HEADS=max(16, triton.next_power_of_2(q.size(2))),
                WIDTH=max(16, triton.next_power_of_2(q.size(3))),
                PRECISION=in_triton(q))


def rows(x: Tensor) -> Tensor:
    """Return x with everything but the first dimension contiguous, as slices of a batch are not."""
    return x if x[0].is_contiguous() else x.contiguous()


def scores(q: Tensor, weights: Tensor, keys: Tensor, first: int) -> Tensor:
    """Return (B, S, T) FP32; query s sees keys up to first + s, and the rest may be unwritten."""
    (batch, count, heads, width), total = q.shape, keys.size(1)
    q, weights, keys = rows(q), rows(weights), rows(keys)
    half = q.element_size() == 2
    block = (256 if count > QUERIES else 128) if half else 32
    out = torch.empty(batch, count, total, dtype=torch.float32, device=q.device)
    scores_kernel[(triton.cdiv(total, block), triton.cdiv(count, QUERIES), batch)](
        q, weights, keys, out, count, total, first, q.stride(0), weights.stride(0), keys.stride(0),
        heads, width, KEYS=block, QUERIES=QUERIES, num_warps=8 if block == 256 else 4,
        num_stages=3 if half else 1, **sizes(q))
    return out


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


