"""A decoding step's block in Triton: norms, rotation, attention over latents, gate, experts.

Each kernel takes the few tokens of a step, N = B*S, together, so that weights are read once. Sums
are kept in FP32. Letters as in `minids.config`; R = kv_lora_rank, P = qk_rope_head_dim, and
W = R + P, the width of a latent with its rotated key. Widths that name a range of numbers inside a
kernel are powers of two.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minids.kernels.triton_routing import in_best_groups
from minids.kernels.triton_selected import scaled

power = triton.next_power_of_2


@triton.jit
def follow(EARLY: tl.constexpr):
    """With EARLY, a kernel is launched while the one before it runs, and waits for it here."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def normalise_kernel(x, more, weight, total, out, x_stride, eps, D, ADD: tl.constexpr,
                     BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """RMSNorm of one row, (N, D); with ADD of x + more, which is stored as `total`."""
    follow(EARLY)
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    v = tl.load(x + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(more + row * D + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * D + d, v.to(total.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / D + eps)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, (v * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def prepare_kernel(q, kv, wkv_b, kv_norm, rotation, slots, out, latents, N, S, q_stride, kv_stride,
                   rotation_stride, slot_stride, latent_stride, eps, H: tl.constexpr,
                   NOPE: tl.constexpr, P: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
                   TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
                   EARLY: tl.constexpr):
    """Fold W_UK into the queries, rotate their other part; the last head stores the new latents.

    q: (N, H * (NOPE + P)), kv: (N, W), rows of a joined product; wkv_b: (H, NOPE + V, R)
    rotation: (B or 1, S, P / 2, 2); slots: (B or 1, S); the strides of one are 0
    out: (N, H, W); latents: (B, slots, W), one layer of the cache
    """
    follow(EARLY)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    h = tl.program_id(1)
    part = tl.program_id(2)
    there = n < N
    b, s = n // S, n % S
    pair = tl.arange(0, P // 2)
    turn = rotation + (b * rotation_stride + s * P)[:, None] + 2 * pair[None, :]
    cos = tl.load(turn, mask=there[:, None], other=0.0)
    sin = tl.load(turn + 1, mask=there[:, None], other=0.0)
    if h < H:
        i = tl.arange(0, NOPE)
        r = part * BLOCK + tl.arange(0, BLOCK)
        query = q + n[:, None] * q_stride + h * (NOPE + P)
        nope = tl.load(query + i[None, :], mask=there[:, None], other=0.0)
        w_uk = tl.load(wkv_b + (h * (NOPE + V) + i[:, None]) * R + r[None, :])  # (NOPE, BLOCK)
        folded = tl.dot(nope, w_uk, input_precision=PRECISION)
        head = out + (n[:, None] * H + h) * (R + P)
        tl.store(head + r[None, :], folded.to(out.dtype.element_ty), mask=there[:, None])
        if part == 0:
            even = tl.load(query + NOPE + 2 * pair[None, :], mask=there[:, None], other=0.0)
            odd = tl.load(query + NOPE + 2 * pair[None, :] + 1, mask=there[:, None], other=0.0)
            even, odd = even.to(tl.float32), odd.to(tl.float32)
            place = head + R + 2 * pair[None, :]
            tl.store(place, (even * cos - odd * sin).to(out.dtype.element_ty), mask=there[:, None])
            tl.store(place + 1, (even * sin + odd * cos).to(out.dtype.element_ty),
                     mask=there[:, None])
    elif part == 0:
        r = tl.arange(0, R)
        source = kv + n[:, None] * kv_stride
        c = tl.load(source + r[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(c * c, axis=1) / R + eps)
        c = c * scale[:, None] * tl.load(kv_norm + r).to(tl.float32)[None, :]
        even = tl.load(source + R + 2 * pair[None, :], mask=there[:, None], other=0.0)
        odd = tl.load(source + R + 2 * pair[None, :] + 1, mask=there[:, None], other=0.0)
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        slot = tl.load(slots + b * slot_stride + s, mask=there, other=0)
        own = latents + b.to(tl.int64)[:, None] * latent_stride + (slot * (R + P))[:, None]
        kind = latents.dtype.element_ty
        tl.store(own + r[None, :], c.to(kind), mask=there[:, None])
        tl.store(own + R + 2 * pair[None, :], (even * cos - odd * sin).to(kind),
                 mask=there[:, None])
        tl.store(own + R + 2 * pair[None, :] + 1, (even * sin + odd * cos).to(kind),
                 mask=there[:, None])


@triton.jit
def attend_kernel(q, latents, slots, out, sums, slot_stride, latent_stride, scale, ROWS, piece,
                  H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
                  KEYS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr):
    """Attend to a piece of the slots: of one sequence, HEADS of its S*H = ROWS queries.

    q: (B, ROWS, W); slots: (B or 1, S), the last slot that each query sees
    out: (pieces, B, ROWS, R) FP32, a piece's softmax average; sums: (pieces, B, ROWS), log2 of the
        sum of its exp2(score)
    """
    follow(EARLY)
    b, part = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = row < ROWS
    slot = tl.load(slots + b * slot_stride + row // H, mask=there, other=-1).to(tl.int32)
    r, p = tl.arange(0, R), tl.arange(0, P)
    first = (b * ROWS + row)[:, None] * (R + P)
    q_c = tl.load(q + first + r[None, :], mask=there[:, None], other=0.0)
    q_p = tl.load(q + first + R + p[None, :], mask=there[:, None], other=0.0)
    own = latents + b.to(tl.int64) * latent_stride
    high = tl.full((HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, R), tl.float32)
    end = tl.minimum((part + 1) * piece, tl.max(slot, axis=0) + 1)
    for start in range(part * piece, end, KEYS):
        t = start + tl.arange(0, KEYS)
        key = own + t[:, None] * (R + P)
        k_c = tl.load(key + r[None, :], mask=(t < end)[:, None], other=0.0)
        k_p = tl.load(key + R + p[None, :], mask=(t < end)[:, None], other=0.0)
        score = scaled(tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION), scale, start, end)
        score += scaled(tl.dot(q_p, tl.trans(k_p), input_precision=PRECISION), scale, start, end)
        seen = (t[None, :] <= slot[:, None]) & (t < end)[None, :]
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(high, tl.max(score, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - finite[:, None])
        shrink = tl.exp2(high - finite)
        mass = mass * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(k_c.dtype), k_c, acc, input_precision=PRECISION)
        high = higher
    place = (part * tl.num_programs(0) + b) * ROWS + row
    some = tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + place[:, None] * R + r[None, :], acc / some[:, None], mask=there[:, None])
    tl.store(sums + place, tl.where(mass == 0.0, float("-inf"), high + tl.log2(some)), mask=there)


@triton.jit
def merge_kernel(parts, sums, wkv_b, out, N, pieces, H: tl.constexpr, NOPE: tl.constexpr,
                 V: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                 ALL: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr):
    """Average the pieces by their sums, and fold W_UV in: (pieces, N, H, R) -> out (N, H, V)

    ALL: a power of two not below the number of pieces
    """
    follow(EARLY)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    h = tl.program_id(1)
    there = n < N
    v = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, R)
    row = n * H + h
    every = tl.arange(0, ALL)
    inside = there[:, None] & (every < pieces)[None, :]
    total = tl.load(sums + every[None, :] * N * H + row[:, None], mask=inside, other=float("-inf"))
    high = tl.where(there, tl.max(total, axis=1), 0.0)
    mass = tl.where(there, tl.sum(tl.exp2(total - high[:, None]), axis=1), 1.0)
    z = tl.zeros((TOKENS, R), tl.float32)
    for part in range(pieces):
        place = part * N * H + row
        weight = tl.exp2(tl.load(sums + place, mask=there, other=0.0) - high)
        z += weight[:, None] * tl.load(parts + place[:, None] * R + r[None, :],
                                       mask=there[:, None], other=0.0).to(tl.float32)
    z = z / mass[:, None]
    w_uv = tl.load(wkv_b + (h * (NOPE + V) + NOPE + v[:, None]) * R + r[None, :])  # (BLOCK, R)
    head = tl.dot(z.to(w_uv.dtype), tl.trans(w_uv), input_precision=PRECISION)
    tl.store(out + row[:, None] * V + v[None, :], head.to(out.dtype.element_ty),
             mask=there[:, None])


@triton.jit
def gate_kernel(x, weight, out, D, E, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
                EARLY: tl.constexpr):
    """Products with a few experts' rows in FP32, a token at a time: (N, D), (E, D) -> (N, E)"""
    follow(EARLY)
    n = tl.program_id(0)
    e = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    acc = tl.zeros((EXPERTS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = (e < E)[:, None] & (d < D)[None, :]
        w = tl.load(weight + e[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += w * tl.load(x + n * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out + n * E + e, tl.sum(acc, axis=1), mask=e < E)


@triton.jit
def choose_kernel(logits, bias, scores, indices, weights, factor, E: tl.constexpr, K: tl.constexpr,
                  GROUPS: tl.constexpr, LIMITED: tl.constexpr, SIGMOID: tl.constexpr,
                  BIAS: tl.constexpr, ALL: tl.constexpr, FEW: tl.constexpr,
                  GROUPS_BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Score and choose the experts of one token: `Gate.forward` after the product.

    ALL, FEW, GROUPS_BLOCK: powers of two not below E, K and GROUPS
    """
    follow(EARLY)
    n = tl.program_id(0)
    e = tl.arange(0, ALL)
    logit = tl.load(logits + n * E + e, mask=e < E, other=float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = tl.exp(logit - tl.max(logit, axis=0))
        score = score / tl.sum(score, axis=0)
    tl.store(scores + n * E + e, score, mask=e < E)
    choice = score
    if BIAS:
        choice += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    choice = tl.where(e < E, choice, float("-inf"))
    choice = in_best_groups(choice, e, E, GROUPS, LIMITED, 2 if BIAS else 1,
                            GROUPS_BLOCK)
    k = tl.arange(0, FEW)
    chosen = tl.zeros((FEW,), tl.int32)
    weight = tl.zeros((FEW,), tl.float32)
    for i in tl.static_range(K):
        here = tl.argmax(choice, axis=0)
        chosen = tl.where(k == i, here, chosen)
        weight = tl.where(k == i, tl.sum(tl.where(e == here, score, 0.0), axis=0), weight)
        choice = tl.where(e == here, float("-inf"), choice)
    if SIGMOID:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    tl.store(indices + n * K + k, chosen.to(tl.int64), mask=k < K)
    tl.store(weights + n * K + k, weight * factor, mask=k < K)


@triton.jit
def list_kernel(indices, pairs, counts, NK, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """List the pairs of token and expert of one expert, in order: pairs (E, NK), counts (E,)"""
    follow(EARLY)
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    own = tl.load(indices + i, mask=i < NK, other=-1) == e
    place = tl.cumsum(own.to(tl.int32), axis=0) - 1
    tl.store(pairs + e * NK + place, i, mask=own)
    tl.store(counts + e, tl.sum(own.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["N"])  # 1 would be another type
def up_kernel(x, w1, w3, s1, s3, pairs, counts, out, N, K, D, INNER, E, ROWS: tl.constexpr,
              COLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
              EARLY: tl.constexpr):
    """silu(w1 x) * w3 x for the tokens of one expert, COLS numbers of each.

    w1, w3: (E, INNER, D); s1, s3: the shared experts' (shared * INNER, D), expert E and on
    out: (N*K + shared * N, INNER), a row for each pair, then for each shared expert and token
    """
    follow(EARLY)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    e = tl.program_id(1)
    if e < E:
        size = tl.load(counts + e)
        a, b = w1 + e.to(tl.int64) * INNER * D, w3 + e.to(tl.int64) * INNER * D
    else:
        size = N
        a, b = s1 + (e - E).to(tl.int64) * INNER * D, s3 + (e - E).to(tl.int64) * INNER * D
    for start in range(0, size, ROWS):
        m = start + tl.arange(0, ROWS)
        there = m < size
        if e < E:
            row = tl.load(pairs + e * N * K + m, mask=there, other=0)
            token = row // K
        else:
            row = N * K + (e - E) * N + m
            token = m
        up = tl.zeros((ROWS, COLS), tl.float32)
        gate = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, D, BLOCK):
            d = k + tl.arange(0, BLOCK)
            ok = (cols < INNER)[:, None] & (d < D)[None, :]
            at = cols[:, None] * D + d[None, :]
            tokens = tl.load(x + token[:, None] * D + d[None, :],
                             mask=there[:, None] & (d < D)[None, :], other=0.0)
            gate = tl.dot(tokens, tl.trans(tl.load(a + at, mask=ok, other=0.0)), gate,
                          input_precision=PRECISION)
            up = tl.dot(tokens, tl.trans(tl.load(b + at, mask=ok, other=0.0)), up,
                        input_precision=PRECISION)
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + row[:, None] * INNER + cols[None, :], hidden.to(out.dtype.element_ty),
                 mask=there[:, None] & (cols < INNER)[None, :])


@triton.jit(do_not_specialize=["N"])  # 1 would be another type
def down_kernel(hidden, w2, s2, pairs, counts, out, N, K, D, INNER, E, SHARED, ROWS: tl.constexpr,
                COLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
                EARLY: tl.constexpr):
    """w2 of each hidden row, COLS numbers of the result: (.., INNER) -> out (.., D), rows as above

    w2: (E, D, INNER); s2: (D, SHARED * INNER)
    """
    follow(EARLY)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    e = tl.program_id(1)
    if e < E:
        size, width = tl.load(counts + e), INNER
        w = w2 + e.to(tl.int64) * D * INNER
    else:
        size, width = N, SHARED * INNER
        w = s2 + (e - E) * INNER
    for start in range(0, size, ROWS):
        m = start + tl.arange(0, ROWS)
        there = m < size
        if e < E:
            row = tl.load(pairs + e * N * K + m, mask=there, other=0)
        else:
            row = N * K + (e - E) * N + m
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, INNER, BLOCK):
            i = k + tl.arange(0, BLOCK)
            ok = (cols < D)[:, None] & (i < INNER)[None, :]
            rows = tl.load(hidden + row[:, None] * INNER + i[None, :],
                           mask=there[:, None] & (i < INNER)[None, :], other=0.0)
            matrix = tl.load(w + cols[:, None] * width + i[None, :], mask=ok, other=0.0)
            acc = tl.dot(rows, tl.trans(matrix), acc, input_precision=PRECISION)
        tl.store(out + row[:, None] * D + cols[None, :], acc.to(out.dtype.element_ty),
                 mask=there[:, None] & (cols < D)[None, :])


@triton.jit
def combine_kernel(x, rows, weights, out, N, D, K: tl.constexpr, SHARED: tl.constexpr,
                   BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """x plus a token's weighted rows plus its shared experts': (N, D)"""
    follow(EARLY)
    n = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + (n * K + k) * D + d, mask=inside, other=0.0).to(tl.float32)
        acc += row * tl.load(weights + n * K + k)
    for s in tl.static_range(SHARED):
        acc += tl.load(rows + (N * K + s * N + n) * D + d, mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(x + n * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * D + d, acc.to(out.dtype.element_ty), mask=inside)
