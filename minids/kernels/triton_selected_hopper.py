"""`attend_selected_kernel` and `attend_kernel` for Hopper, written in Gluon: warps with own parts.

Triton lets all warps do everything in turn: while they take a softmax, the tensor cores wait. Here
a program has four parts of four warps, and each goes on as soon as it has what it needs:

    fetches   copies the next tile of latents into shared memory, straight, not through registers
    scores    multiplies queries with a tile's keys, and takes the softmax
    averages  two parts: each multiplies the shares of a tile with half of its columns

So the tensor cores average tile i while the scores of tile i + 1 become shares. Shared memory has
room for two tiles. Barriers say who may go on: a tile is there, or no longer needed; shares are
there, or no longer needed. Each is used again and again, and its phase flips each time.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILE = gl.constexpr(64)  # rows of queries in a program, and keys in a tile
REGISTERS = gl.constexpr([168, 120, 48])  # of a thread that averages, scores, fetches


@gluon.jit
def keys_at(keys, start, SELECTED: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the positions of a tile's keys, -1 for none."""
    tokens, stop = keys
    j = start + gl.arange(0, TILE, LAYOUT)
    if SELECTED:
        return gl.load(tokens + j, mask=j < stop, other=-1)
    return gl.where(j < stop, j, -1)


@gluon.jit
def fetch(c, p, base, at_c, at_p, C: gl.constexpr, P: gl.constexpr):
    """Begin to copy rows of a matrix, c.shape[1] numbers to c and then p.shape[1] to p.

    An entry without a key fetches the first one, which counts for nothing.
    """
    r = gl.arange(0, c.shape[1], gl.SliceLayout(0, C))
    width: gl.constexpr = c.shape[1] + p.shape[1]
    rows = base + gl.maximum(at_c, 0).to(gl.int64) * width
    async_copy.async_copy_global_to_shared(c, rows[:, None] + r[None, :])
    r = c.shape[1] + gl.arange(0, p.shape[1], gl.SliceLayout(0, P))
    rows = base + gl.maximum(at_p, 0).to(gl.int64) * width
    async_copy.async_copy_global_to_shared(p, rows[:, None] + r[None, :])


@gluon.jit
def fetch_keys(places, bars, begin, keys, own, SELECTED: gl.constexpr, C: gl.constexpr,
               P: gl.constexpr):
    """Copy one tile after the other, each once its place is free."""
    q_c, q_p, k_c, k_p, shares, factor = places
    k_full, k_empty, p_full, p_empty = bars
    i = 0
    for start in range(begin, keys[1], TILE):
        at_c = keys_at(keys, start, SELECTED, gl.SliceLayout(1, C))
        at_p = keys_at(keys, start, SELECTED, gl.SliceLayout(1, P))
        mbarrier.wait(k_empty.index(i % 2), i // 2 & 1 ^ 1)
        fetch(k_c.index(i % 2), k_p.index(i % 2), own, at_c, at_p, C, P)
        async_copy.mbarrier_arrive(k_full.index(i % 2), increment_count=False)
        i += 1


@gluon.jit
def score_keys(places, bars, begin, keys, q, slots, sums, first, ROWS, H, scale,
               SELECTED: gl.constexpr, C: gl.constexpr, P: gl.constexpr):
    """Turn each tile into shares, not yet divided by their sum, and a factor on those before."""
    q_c, q_p, k_c, k_p, shares, factor = places
    k_full, k_empty, p_full, p_empty = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    at_c = gl.minimum(first + gl.arange(0, TILE, gl.SliceLayout(1, C)), ROWS - 1)
    at_p = gl.minimum(first + gl.arange(0, TILE, gl.SliceLayout(1, P)), ROWS - 1)
    fetch(q_c, q_p, q, at_c, at_p, C, P)
    async_copy.commit_group()
    row = first + gl.arange(0, TILE, ROW)
    if not SELECTED:
        slot = gl.load(slots + gl.minimum(row, ROWS - 1) // H).to(gl.int32)
    none = gl.zeros((TILE, TILE), gl.float32, SCORES)
    high = gl.full((TILE,), float("-inf"), gl.float32, ROW)
    mass = gl.zeros((TILE,), gl.float32, ROW)
    async_copy.wait_group(0)
    gl.thread_barrier()
    i = 0
    for start in range(begin, keys[1], TILE):
        t = keys_at(keys, start, SELECTED, gl.SliceLayout(0, SCORES))
        mbarrier.wait(k_full.index(i % 2), i // 2 & 1)
        fence_async_shared()
        score = warpgroup_mma(q_c, k_c.index(i % 2).permute((1, 0)), none, use_acc=False,
                              is_async=True)
        score = warpgroup_mma(q_p, k_p.index(i % 2).permute((1, 0)), score, is_async=True)
        seen = (t >= 0)[None, :]
        if not SELECTED:
            seen = seen & (t[None, :] <= slot[:, None])
        score = warpgroup_mma_wait(0, [score])
        score = gl.where(seen, score, float("-inf"))
        higher = gl.maximum(high, gl.max(score, 1) * scale)
        finite = gl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        share = gl.exp2(score * scale - finite[:, None])
        shrink = gl.exp2(high - finite)
        mbarrier.wait(p_empty, i & 1 ^ 1)
        shares.store(share.to(shares.dtype))
        factor.store(shrink)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(p_full)
        mass = mass * shrink + gl.sum(share, 1)
        high = higher
        i += 1
    mbarrier.wait(p_empty, i & 1 ^ 1)
    factor.store(1.0 / gl.where(mass == 0.0, 1.0, mass))
    gl.thread_barrier()
    mbarrier.arrive(p_full)
    total = gl.where(mass == 0.0, float("-inf"), high + gl.log2(mass))
    gl.store(sums + row, total, mask=row < ROWS)


@gluon.jit
def average(places, bars, begin, keys, out, first, ROWS, PART: gl.constexpr, C: gl.constexpr):
    """Add up half of the columns, weighed by the shares, and write them."""
    q_c, q_p, k_c, k_p, shares, factor = places
    k_full, k_empty, p_full, p_empty = bars
    R: gl.constexpr = q_c.shape[1]
    HALF: gl.constexpr = R // 2
    # With 512 threads a program may have 128 registers each when it starts, and an instruction for
    # 256 columns has as many results alone: so 128 columns.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    acc = gl.zeros((TILE, HALF), gl.float32, SUMS)
    i = 0
    for _ in range(begin, keys[1], TILE):
        mbarrier.wait(p_full, i & 1)
        fence_async_shared()
        acc = acc * factor.load(gl.SliceLayout(1, SUMS))[:, None]
        mine = k_c.index(i % 2).slice(PART * HALF, HALF, dim=1)
        acc = warpgroup_mma(shares, mine, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(i % 2))
        mbarrier.arrive(p_empty)
        i += 1
    mbarrier.wait(p_full, i & 1)
    acc = acc * factor.load(gl.SliceLayout(1, SUMS))[:, None]
    if out.dtype.element_ty == q_c.dtype:
        mine = k_c.index(0).slice(PART * HALF, HALF, dim=1)  # nobody else reads these any more
        mine.store(acc.to(q_c.dtype))
        gl.thread_barrier()
        row = first + gl.arange(0, TILE, gl.SliceLayout(1, C))
        r = PART * HALF + gl.arange(0, HALF, gl.SliceLayout(0, C))
        gl.store(out + row[:, None] * R + r[None, :], mine.load(C), mask=(row < ROWS)[:, None])
    else:
        row = first + gl.arange(0, TILE, gl.SliceLayout(1, SUMS))
        r = PART * HALF + gl.arange(0, HALF, gl.SliceLayout(0, SUMS))
        gl.store(out + row[:, None] * R + r[None, :], acc, mask=(row < ROWS)[:, None])


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
    ALONG_C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    ALONG_P: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [4, 1], [1, 0])
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, R], KIND)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, P], KIND)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE], KIND)
    groups = gl.cdiv(ROWS, TILE)
    n, part = (gl.program_id(0) // groups).to(gl.int64), gl.program_id(1)
    first = gl.program_id(0) % groups * TILE
    begin = part * piece
    stop = gl.minimum(begin + piece, K)
    slots += n * slot_stride
    if SELECTED:
        tokens += n * K
    else:
        stop = gl.minimum(stop, gl.load(slots + ROWS // H - 1).to(gl.int32) + 1)
    places = (gl.allocate_shared_memory(KIND, [TILE, R], WIDE),
              gl.allocate_shared_memory(KIND, [TILE, P], NARROW),
              gl.allocate_shared_memory(KIND, [2, TILE, R], WIDE),
              gl.allocate_shared_memory(KIND, [2, TILE, P], NARROW),
              gl.allocate_shared_memory(KIND, [TILE, TILE], SQUARE),
              gl.allocate_shared_memory(gl.float32, [TILE], gl.SwizzledSharedLayout(1, 1, 1, [0])))
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=128)  # each thread says when its copies are there
        mbarrier.init(k_empty.index(i), count=2)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=2)
    place = (part * (gl.num_programs(0) // groups) + n) * ROWS
    out += place * R
    bars, keys = (k_full, k_empty, p_full, p_empty), (tokens, stop)
    gl.warp_specialize([
        (average, (places, bars, begin, keys, out, first, ROWS, 0, ALONG_C)),
        (average, (places, bars, begin, keys, out, first, ROWS, 1, ALONG_C)),
        (score_keys, (places, bars, begin, keys, q + n * ROWS * (R + P), slots, sums + place, first,
                      ROWS, H, scale, SELECTED, ALONG_C, ALONG_P)),
        (fetch_keys, (places, bars, begin, keys, latents + n // per * latent_batch, SELECTED,
                      ALONG_C, ALONG_P))],
        [4, 4, 4], REGISTERS)


def attend(q: Tensor, latents: Tensor, tokens: Tensor | None, slots: Tensor, out: Tensor,
           sums: Tensor, keys: int, piece: int, scale: float, heads: int) -> None:
    """Fill out and sums; q: (units, ROWS, W), out: (pieces, units, ROWS, R); the rest as above."""
    (units, rows, width), rank = q.shape, out.size(-1)
    hopper_attend_kernel[units * -(-rows // 64), len(out)](
        q, latents, slots if tokens is None else tokens, slots, out, sums, rows, keys,
        units // len(latents), piece, latents.stride(0),
        slots.stride(0) if len(slots) > 1 else 0, scale, H=heads, R=rank, P=width - rank,
        SELECTED=tokens is not None, num_warps=4)
