"""Attention over the latents that each query selected, in Triton: forward and backward.

In MLA's absorbed form all heads of a query share one key per token, its latent. Those that a query
selected are one matrix for all its heads: (HEADS, W) x (W, KEYS), a product for tensor cores,
although no two queries select the same. In PyTorch operations a query's selection is first copied
together, k x W numbers per query, 309 GB for 131,072 queries of V3.2; here the gather goes straight
into shared memory, and neither the copy, nor scores, nor probabilities are written.

Letters: N = B*S queries, H heads, R = kv_lora_rank, P = qk_rope_head_dim, W = R + P, K selected.
Scores are in units of log 2: `scale` has log2(e) in it. Sums are kept in FP32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids.kernels.precision import LOG2_E, gluon_attends, in_triton

MULTIPROCESSORS = 132  # of a large GPU, a program for each; with fewer, selections are cut up


@triton.jit
def scaled(product, scale, start, stop):
    """Scale a product within a branch that is always taken, start < stop, so that it stands alone.

    Triton lays a product out for the one that its result enters: then both halves of eight warps
    compute all of 64 rows. It does not look through a branch, and each half computes one part.
    """
    out = product
    if start < stop:
        out = product * scale
    return out


@triton.jit
def attend_selected_kernel(q, latents, tokens, out, sums, S, K, piece, latent_batch,
                           scale, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                           HEADS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Attend with HEADS heads of one query to one piece of its selection.

    q: (N, H, W); latents: (B, T, W); tokens: (N, K) int32, -1 for none
    out: (pieces, N, H, R), the piece's own softmax average; sums: (pieces, N, H) FP32, log2 of the
        sum of its exp2(score)

    Not written: the gathered latents (N, K, W) and the scores (N, H, K). A tile of latents is
    fetched once for both of its uses, as keys and as values.
    """
    # A query's groups of heads run at once, and share what the cache holds of its latents.
    GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    n, part = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) % GROUPS * HEADS + tl.arange(0, HEADS)
    r, p = tl.arange(0, R), tl.arange(0, P)
    heads = (h < H)[:, None]
    row = q + (n * H + h)[:, None] * (R + P)
    q_c = tl.load(row + r[None, :], mask=heads, other=0.0)
    q_p = tl.load(row + R + p[None, :], mask=heads, other=0.0)
    own = latents + n // S * latent_batch
    high = tl.full((HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, R), tl.float32)
    begin = tl.program_id(1) * piece
    stop = tl.minimum(begin + piece, K)
    for start in range(begin, stop, KEYS):
        j = start + tl.arange(0, KEYS)
        t = tl.load(tokens + n * K + j, mask=j < K, other=-1)
        there = t >= 0
        key = own + t[:, None] * (R + P)
        k_c = tl.load(key + r[None, :], mask=there[:, None], other=0.0)
        k_p = tl.load(key + R + p[None, :], mask=there[:, None], other=0.0)
        score = scaled(tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION), scale, start, stop)
        score += scaled(tl.dot(q_p, tl.trans(k_p), input_precision=PRECISION), scale, start, stop)
        score = tl.where(there[None, :], score, float("-inf"))  # (HEADS, KEYS)
        higher = tl.maximum(high, tl.max(score, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        weight = tl.exp2(score - finite[:, None])
        shrink = tl.exp2(high - finite)
        mass = mass * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(k_c.dtype), k_c, acc, input_precision=PRECISION)
        high = higher
    place = (part * (tl.num_programs(0) // GROUPS) + n) * H + h
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + place[:, None] * R + r[None, :], acc.to(out.dtype.element_ty), mask=heads)
    tl.store(sums + place, tl.where(mass == 0.0, float("-inf"), high + tl.log2(mass)), mask=h < H)


@triton.jit
def join_pieces_kernel(parts, sums, out, rows, pieces, R: tl.constexpr, ALL: tl.constexpr):
    """Average one head's pieces by their sums: (pieces, rows, R) -> (rows, R)

    ALL: a power of two not below the number of pieces
    """
    row, r, i = tl.program_id(0).to(tl.int64), tl.arange(0, R), tl.arange(0, ALL)
    total = tl.load(sums + i * rows + row, mask=i < pieces, other=float("-inf"))
    high = tl.max(total, axis=0)
    weight = tl.exp2(total - tl.where(high == float("-inf"), 0.0, high))
    mass = tl.sum(weight, axis=0)
    tile = tl.load(parts + (i[:, None] * rows + row) * R + r[None, :], mask=(i < pieces)[:, None],
                   other=0.0)
    joined = tl.sum(tile * weight[:, None], axis=0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + row * R + r, joined.to(out.dtype.element_ty))


@triton.jit
def selected_query_grad_kernel(q, latents, tokens, grad, sums, delta, average, dq, S, K,
                               latent_batch, scale, back, H: tl.constexpr, R: tl.constexpr,
                               P: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
                               PRECISION: tl.constexpr):
    """Gradient of HEADS heads' queries: grad (N, H, R) -> dq (N, H, W)

    delta: (N, H) FP32, the inner product of the output, `average`, and its gradient, times `back`,
    the scale without log2(e); stored for the keys. Not written: probabilities, which are computed
    again from the sums, and their gradients, both (N, H, K).
    """
    GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    n = (tl.program_id(0) // GROUPS).to(tl.int64)
    h = tl.program_id(0) % GROUPS * HEADS + tl.arange(0, HEADS)
    r, p = tl.arange(0, R), tl.arange(0, P)
    heads = (h < H)[:, None]
    head = n * H + h
    row = head[:, None] * (R + P)
    q_c = tl.load(q + row + r[None, :], mask=heads, other=0.0)
    q_p = tl.load(q + row + R + p[None, :], mask=heads, other=0.0)
    out = tl.load(grad + head[:, None] * R + r[None, :], mask=heads, other=0.0)
    total = tl.load(sums + head, mask=h < H, other=float("inf"))
    inner = tl.load(average + head[:, None] * R + r[None, :], mask=heads, other=0.0).to(tl.float32)
    inner = tl.sum(inner * out.to(tl.float32), axis=1) * back
    tl.store(delta + head, inner, mask=h < H)
    own = latents + n // S * latent_batch
    d_c, d_p = tl.zeros((HEADS, R), tl.float32), tl.zeros((HEADS, P), tl.float32)
    for start in range(0, K, KEYS):
        j = start + tl.arange(0, KEYS)
        t = tl.load(tokens + n * K + j, mask=j < K, other=-1)
        there = t >= 0
        key = own + t[:, None] * (R + P)
        k_c = tl.load(key + r[None, :], mask=there[:, None], other=0.0)
        k_p = tl.load(key + R + p[None, :], mask=there[:, None], other=0.0)
        score = scaled(tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION), scale, start, K)
        score += scaled(tl.dot(q_p, tl.trans(k_p), input_precision=PRECISION), scale, start, K)
        prob = tl.where(there[None, :], tl.exp2(score - total[:, None]), 0.0)
        towards = scaled(tl.dot(out, tl.trans(k_c), input_precision=PRECISION), back, start, K)
        d_score = (prob * (towards - inner[:, None])).to(k_c.dtype)  # (HEADS, KEYS)
        d_c = tl.dot(d_score, k_c, d_c, input_precision=PRECISION)
        d_p = tl.dot(d_score, k_p, d_p, input_precision=PRECISION)
    tl.store(dq + row + r[None, :], d_c.to(dq.dtype.element_ty), mask=heads)
    tl.store(dq + row + R + p[None, :], d_p.to(dq.dtype.element_ty), mask=heads)


@triton.jit
def selected_key_grad_kernel(q, latents, tokens, grad, sums, delta, dlatents, S, K, T,
                             tiles, latent_batch, scale, back, H: tl.constexpr, R: tl.constexpr,
                             P: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
                             PRECISION: tl.constexpr):
    """Add what one query's heads together ask of KEYS latents: dlatents (B, T, W) FP32

    Heads are summed in registers, so that memory sees one addition per query and selected latent.
    Queries select in any order: additions are atomic, and the last bits differ from run to run.
    Not written: gradients of the gathered latents, (N, K, W), and anything of H x K numbers.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    j, r, p = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS), tl.arange(0, R), tl.arange(0, P)
    t = tl.load(tokens + n * K + j, mask=j < K, other=-1)
    there = t >= 0
    key = latents + n // S * latent_batch + t[:, None] * (R + P)
    k_c = tl.load(key + r[None, :], mask=there[:, None], other=0.0)
    k_p = tl.load(key + R + p[None, :], mask=there[:, None], other=0.0)
    d_c, d_p = tl.zeros((KEYS, R), tl.float32), tl.zeros((KEYS, P), tl.float32)
    i = tl.arange(0, 2 * HEADS)
    for start in range(0, H, HEADS):
        h = start + tl.arange(0, HEADS)
        head = n * H + h
        q_p = tl.load(q + head[:, None] * (R + P) + R + p[None, :], mask=(h < H)[:, None],
                      other=0.0)
        total = tl.load(sums + head, mask=h < H, other=float("inf"))
        inner = tl.load(delta + head, mask=h < H, other=0.0)
        # A head's gradient and its query, row by row: one tile for two products, each of both.
        own = n * H + start + i // 2
        row = tl.where(i % 2 == 0, grad + own * R, q + own * (R + P))
        both = tl.load(row[:, None] + r[None, :], mask=(start + i // 2 < H)[:, None], other=0.0)
        product = tl.dot(k_c, tl.trans(both), input_precision=PRECISION)  # (KEYS, 2 HEADS)
        product = scaled(product, back, start, H)
        towards, score = tl.split(tl.reshape(product, (KEYS, HEADS, 2)))
        rest = scaled(tl.dot(k_p, tl.trans(q_p), input_precision=PRECISION), back, start, H)
        prob = tl.exp2((score + rest) * (scale / back) - total[None, :])
        prob = tl.where(there[:, None], prob, 0.0)
        d_score = prob * (towards - inner[None, :])
        shares = tl.reshape(tl.join(prob, d_score), (KEYS, 2 * HEADS)).to(both.dtype)
        d_c = tl.dot(shares, both, d_c, input_precision=PRECISION)
        d_p = tl.dot(d_score.to(q_p.dtype), q_p, d_p, input_precision=PRECISION)
    place = dlatents + (n // S * T + t)[:, None] * (R + P)
    tl.atomic_add(place + r[None, :], d_c, mask=there[:, None], sem="relaxed")
    tl.atomic_add(place + R + p[None, :], d_p, mask=there[:, None], sem="relaxed")


def tile(heads: int, half: bool) -> int:
    """Return the heads of a program: 64 fill a tensor core's tile; FP32 has none to fill."""
    return max(16, min(triton.next_power_of_2(heads), 64 if half else 16))


def selected(indices: Tensor, seen: Tensor) -> Tensor:
    """Return the tokens of a selection, (B, S, K) int32, -1 where an entry is empty."""
    return torch.where(seen, indices.int(), -1)


def attend_in_pieces(q: Tensor, latent: Tensor, tokens: Tensor, rank: int, scale: float,
                     in_pieces: bool = True) -> tuple[Tensor, Tensor]:
    """Return averages over pieces of selections, (pieces, B*S, H, R), and sums, (pieces, B*S, H)

    in_pieces: cut the selections of few queries, so that all of a GPU works. One piece has q's
    type, several have FP32.
    """
    (batch, count, heads, width), k = q.shape, tokens.size(2)
    half, rows = q.element_size() == 2, batch * count
    together, keys = tile(heads, half), 64 if half else 32
    groups = triton.cdiv(heads, together)
    pieces = min(MULTIPROCESSORS // (rows * groups), triton.cdiv(k, keys)) if in_pieces else 1
    piece = triton.cdiv(triton.cdiv(k, max(pieces, 1)), keys) * keys
    pieces = triton.cdiv(k, piece)
    sums = torch.empty(pieces, rows, heads, dtype=torch.float32, device=q.device)
    parts = torch.empty(pieces, rows, heads, rank, device=q.device,
                        dtype=q.dtype if pieces == 1 else torch.float32)
    if gluon_attends(q, rank, heads):
        from minids.kernels import triton_selected_hopper
        triton_selected_hopper.attend(q.flatten(0, 1), latent, tokens, tokens, parts, sums, k,
                                      piece, scale * LOG2_E, heads)
    else:
        attend_selected_kernel[(rows * groups, pieces)](
            q, latent, tokens, parts, sums, count, k, piece, latent.stride(0), scale * LOG2_E,
            H=heads, R=rank, P=width - rank, HEADS=together, KEYS=keys, num_stages=2,
            num_warps=8 if together == 64 else 4, PRECISION=in_triton(q))
    return parts, sums


def attend(q: Tensor, latent: Tensor, tokens: Tensor, rank: int, scale: float,
           in_pieces: bool = True) -> tuple[Tensor, Tensor]:
    """Return the average of the selected latents, (B, S, H, R), and the sums of their pieces."""
    parts, sums = attend_in_pieces(q, latent, tokens, rank, scale, in_pieces)
    (pieces, rows, heads), shape = sums.shape, (*q.shape[:3], rank)
    if pieces == 1:
        return parts.view(shape), sums
    out = q.new_empty(shape)
    join_pieces_kernel[(rows * heads,)](parts, sums, out, rows * heads, pieces, R=rank,
                                        ALL=triton.next_power_of_2(pieces))
    return out, sums


class Selected(torch.autograd.Function):
    """Attention over selected latents; keeps its inputs, its output and (B, S, H) sums."""

    @staticmethod
    def forward(ctx, q: Tensor, latent: Tensor, indices: Tensor, seen: Tensor, rank: int,
                scale: float) -> Tensor:
        q = q.contiguous()
        latent = latent if latent[0].is_contiguous() else latent.contiguous()
        tokens, learns = selected(indices, seen).contiguous(), any(ctx.needs_input_grad)
        out, sums = attend(q, latent, tokens, rank, scale, in_pieces=not learns)
        if learns:
            ctx.save_for_backward(q, latent, tokens, out, sums)
            ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        q, latent, tokens, out, sums = ctx.saved_tensors
        (batch, count, heads, width), rank, total = q.shape, out.size(3), latent.size(1)
        grad = grad.contiguous()
        delta = torch.empty_like(sums)
        half, rows, k = q.element_size() == 2, batch * count, tokens.size(2)
        dq, dlatent = torch.empty_like(q), latent.new_zeros(latent.shape, dtype=torch.float32)
        given = q, latent, tokens, grad, sums, delta
        widths = dict(H=heads, R=rank, P=width - rank, PRECISION=in_triton(q))
        scales = latent.stride(0), ctx.scale * LOG2_E, ctx.scale
        together, keys = tile(heads, half), 64 if half else 32
        groups = triton.cdiv(heads, together)
        selected_query_grad_kernel[(rows * groups,)](
            *given, out, dq, count, k, *scales, HEADS=together, KEYS=keys, num_stages=1,
            num_warps=8 if together == 64 else 4, **widths)
        keys, together = 64 if half else 16, 16
        tiles = triton.cdiv(k, keys)
        selected_key_grad_kernel[(rows * tiles,)](
            *given, dlatent, count, k, total, tiles, *scales, HEADS=together, KEYS=keys,
            num_stages=3, num_warps=8 if keys == 64 else 4, **widths)
        return dq, dlatent.to(latent.dtype), None, None, None, None
