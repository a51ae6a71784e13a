"""`attend_selected_kernel` and `attend_kernel` for Hopper, written in Gluon: one tile ahead.

Triton waits for each product before it goes on. Here the order is written out. Two tiles of latents
have room in shared memory. While tile i is multiplied, tile i + 1 is on its way:

    softmax of tile i    nothing else
    average of tile i    the tensor cores have it and, behind it, the scores of tile i + 1
    tile i + 2           fetched to where tile i was, as soon as that is averaged

A thread copies its part of a latent straight into shared memory, without registers in between.
Empty entries fetch the first latent, and count for nothing.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HEADS = gl.constexpr(64)  # rows of a program, and keys of a tile
WARPS = gl.constexpr(8)


@gluon.jit
def keys_at(tokens, n, K, start, stop, SELECTED: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the positions of the keys of a tile, -1 for none."""
    j = start + gl.arange(0, HEADS, LAYOUT)
    if SELECTED:
        return gl.load(tokens + n * K + j, mask=j < stop, other=-1)
    return gl.where(j < stop, j, -1)


@gluon.jit
def fetch(c, p, base, at_c, at_p, C: gl.constexpr, P: gl.constexpr):
    """Begin to copy vectors, c.shape[1] numbers and then p.shape[1], from rows of a matrix."""
    r = gl.arange(0, c.shape[1], gl.SliceLayout(0, C))
    width: gl.constexpr = c.shape[1] + p.shape[1]
    rows = base + gl.maximum(at_c, 0).to(gl.int64) * width
    async_copy.async_copy_global_to_shared(c, rows[:, None] + r[None, :])
    r = c.shape[1] + gl.arange(0, p.shape[1], gl.SliceLayout(0, P))
    rows = base + gl.maximum(at_p, 0).to(gl.int64) * width
    async_copy.async_copy_global_to_shared(p, rows[:, None] + r[None, :])
    async_copy.commit_group()


@gluon.jit
def hopper_attend_kernel(q, latents, tokens, slots, out, sums, ROWS, K, per, piece, latent_batch,
                         slot_stride, scale, H: gl.constexpr, R: gl.constexpr, P: gl.constexpr,
                         SELECTED: gl.constexpr):
    """Attend with 64 of a unit's ROWS queries to one piece of its keys.

    A unit is a token, with its heads and its selection, `tokens` (N, K) int32; or, if not SELECTED,
    all queries of a sequence, which see its slots up to `slots`, (B or 1, S), below K.
    q: (units, ROWS, R + P); latents: (B, T, R + P), one matrix for `per` units
    out: (pieces, units, ROWS, R), the piece's softmax average; sums: (pieces, units, ROWS) FP32,
        log2 of the sum of its exp2(score)
    """
    KIND: gl.constexpr = latents.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEADS // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])
    ALONG_C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    ALONG_P: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, R], KIND)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, P], KIND)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, HEADS], KIND)
    groups = gl.cdiv(ROWS, HEADS)
    n, part = (gl.program_id(0) // groups).to(gl.int64), gl.program_id(1)
    first = gl.program_id(0) % groups * HEADS
    own = latents + n // per * latent_batch
    begin = part * piece
    stop = gl.minimum(begin + piece, K)
    row = first + gl.arange(0, HEADS, ROW)
    if not SELECTED:
        stop = gl.minimum(stop, gl.load(slots + n * slot_stride + ROWS // H - 1).to(gl.int32) + 1)
        slot = gl.load(slots + n * slot_stride + gl.minimum(row, ROWS - 1) // H).to(gl.int32)

    q_c = gl.allocate_shared_memory(KIND, [HEADS, R], WIDE)
    q_p = gl.allocate_shared_memory(KIND, [HEADS, P], NARROW)
    k_c = gl.allocate_shared_memory(KIND, [2, HEADS, R], WIDE)
    k_p = gl.allocate_shared_memory(KIND, [2, HEADS, P], NARROW)
    shares = gl.allocate_shared_memory(KIND, [HEADS, HEADS], SQUARE)
    at_c = gl.minimum(first + gl.arange(0, HEADS, gl.SliceLayout(1, ALONG_C)), ROWS - 1)
    at_p = gl.minimum(first + gl.arange(0, HEADS, gl.SliceLayout(1, ALONG_P)), ROWS - 1)
    fetch(q_c, q_p, q + n * ROWS * (R + P), at_c, at_p, ALONG_C, ALONG_P)
    for i in gl.static_range(2):
        at_c = keys_at(tokens, n, K, begin + i * HEADS, stop, SELECTED, gl.SliceLayout(1, ALONG_C))
        at_p = keys_at(tokens, n, K, begin + i * HEADS, stop, SELECTED, gl.SliceLayout(1, ALONG_P))
        fetch(k_c.index(i), k_p.index(i), own, at_c, at_p, ALONG_C, ALONG_P)
    async_copy.wait_group(1)
    fence_async_shared()
    none = gl.zeros((HEADS, HEADS), gl.float32, SCORES)
    score = warpgroup_mma(q_c, k_c.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    score = warpgroup_mma(q_p, k_p.index(0).permute((1, 0)), score, is_async=True)
    high = gl.full((HEADS,), float("-inf"), gl.float32, ROW)
    mass = gl.zeros((HEADS,), gl.float32, ROW)
    acc = gl.zeros((HEADS, R), gl.float32, SUMS)
    score = warpgroup_mma_wait(0, [score])
    for start in range(begin, stop, HEADS):
        stage = (start - begin) // HEADS % 2
        t = keys_at(tokens, n, K, start, stop, SELECTED, gl.SliceLayout(0, SCORES))
        after = start + 2 * HEADS
        at_c = keys_at(tokens, n, K, after, stop, SELECTED, gl.SliceLayout(1, ALONG_C))
        at_p = keys_at(tokens, n, K, after, stop, SELECTED, gl.SliceLayout(1, ALONG_P))
        seen = (t >= 0)[None, :]
        if not SELECTED:
            seen = seen & (t[None, :] <= slot[:, None])
        score = gl.where(seen, score, float("-inf"))
        higher = gl.maximum(high, gl.max(score, 1) * scale)
        finite = gl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        weight = gl.exp2(score * scale - finite[:, None])
        shrink = gl.exp2(high - finite)
        shares.store(weight.to(KIND))
        fence_async_shared()
        mass = mass * shrink + gl.sum(weight, 1)
        high = higher
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        acc = warpgroup_mma(shares, k_c.index(stage), acc, is_async=True)
        async_copy.wait_group(0)
        fence_async_shared()
        score = warpgroup_mma(q_c, k_c.index(1 - stage).permute((1, 0)), none, use_acc=False,
                              is_async=True)
        score = warpgroup_mma(q_p, k_p.index(1 - stage).permute((1, 0)), score, is_async=True)
        acc = warpgroup_mma_wait(2, [acc])
        fetch(k_c.index(stage), k_p.index(stage), own, at_c, at_p, ALONG_C, ALONG_P)
        score = warpgroup_mma_wait(0, [score])
    async_copy.wait_group(0)
    units = gl.num_programs(0) // groups
    place = (part * units + n) * ROWS
    total = gl.where(mass == 0.0, float("-inf"), high + gl.log2(mass))
    gl.store(sums + place + row, total, mask=row < ROWS)
    some = gl.convert_layout(gl.where(mass == 0.0, 1.0, mass), gl.SliceLayout(1, SUMS))
    acc = acc / some[:, None]
    row = first + gl.arange(0, HEADS, gl.SliceLayout(1, ALONG_C))
    r = gl.arange(0, R, gl.SliceLayout(0, ALONG_C))
    gl.store(out + (place + row)[:, None] * R + r[None, :],
             gl.convert_layout(acc.to(out.dtype.element_ty), ALONG_C), mask=(row < ROWS)[:, None])


def attend(q: Tensor, latents: Tensor, tokens: Tensor | None, slots: Tensor, out: Tensor,
           sums: Tensor, keys: int, piece: int, scale: float, heads: int) -> None:
    """Fill out and sums; q: (units, ROWS, W), out: (pieces, units, ROWS, R); the rest as above."""
    (units, rows, width), rank = q.shape, out.size(-1)
    hopper_attend_kernel[units * -(-rows // 64), len(out)](
        q, latents, slots if tokens is None else tokens, slots, out, sums, rows, keys,
        units // len(latents), piece, latents.stride(0),
        slots.stride(0) if len(slots) > 1 else 0, scale, H=heads, R=rank, P=width - rank,
        SELECTED=tokens is not None, num_warps=8)
