"""The experts' products of `triton_fp8_products` for Hopper, written in Gluon.

Triton decides by itself which warps do what, and waits for a product before it adds it up. Here
that is written out. A program has 128 x 256 results under way, and three parts:
    one warp   copies the factors' next 128 columns into shared memory, up to three steps ahead
    four warps and four more    multiply 64 rows each
A part of the latter two lets the tensor cores add up 128 products, then multiplies this partial sum
by its scales and adds it in FP32. While it does so, the other part has the tensor cores. Twice as
many columns as in `triton_fp8_products` mean that each row of A is read half as often: copying from
the cache is what limits that kernel. As many programs as the card has multiprocessors take one tile
of results after the other, and no part waits for memory: results are left in shared memory, from
where they are written while the next tile is multiplied, and scales are there before they are used.

Barriers say who may go on: `full` that a step's factors have arrived, `empty` that both parts have
multiplied them. Each is used once in STAGES steps, and its phase flips each time.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minids.kernels import triton_fp8_products
from minids.kernels.fp8_layout import BLOCK, Groups, whole

place = gluon.jit(triton_fp8_products.place.fn)
# Row tiles that are computed side by side, and find each other's columns in a cache.
TOGETHER, TOGETHER_OVER_TOKENS = 8, 32
STAGES = gl.constexpr(3)
REGISTERS = gl.constexpr([240, 24])  # of a thread that multiplies, and of one that copies
E4M3 = gl.constexpr(gl.float8e4nv)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))  # of 64 x 128 numbers
STORED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32,
         torch.float8_e4m3fn: gl.float8e4nv}


@gluon.jit
def rows_of(number, sizes, groups, TOGETHER: gl.constexpr):
    """Return a tile's first row, the row after its expert's last, its expert and its column."""
    row_tiles, column_tiles, steps = sizes
    expert, first, end = groups
    tile, column = place(number, column_tiles, row_tiles, TOGETHER)
    return gl.load(first + tile), gl.load(end + tile), gl.load(expert + tile), column


@gluon.jit
def tokens_of(number, sizes, starts, TOGETHER: gl.constexpr):
    """Return a tile's expert, row and column, and the first and last tile of its tokens."""
    row_tiles, column_tiles, experts = sizes
    e = number // (row_tiles * column_tiles)
    row, column = place(number % (row_tiles * column_tiles), column_tiles, row_tiles, TOGETHER)
    return e, row, column, gl.load(starts + e), gl.load(starts + e + 1)


@gluon.jit
def copy_step(a, b, x, y, full, empty, a_row, b_row, k, done, more: gl.constexpr):
    """Begin to copy 128 rows of a and 256 of b, 128 columns each, once their place is free.

    more: bytes of the same step that the caller copies
    """
    stage = done % STAGES
    mbarrier.wait(empty.index(stage), done // STAGES & 1 ^ 1)
    mbarrier.expect(full.index(stage), 3 * 128 * 128 + more)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(a, [a_row + 64 * i, k * 128], full.index(stage),
                                        x.index(2 * stage + i))
        tma.async_copy_global_to_shared(b, [b_row + 128 * i, k * 128], full.index(stage),
                                        y.index(2 * stage + i))


@gluon.jit
def leave(total, room, to, row, column):
    """Leave 64 x 128 sums in shared memory, to be written from there; nobody waits for that."""
    room.store(total.to(room.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(to, [row, column], room)


@gluon.jit
def leave_rows(total, room, to, out, row, last, column, width):
    """The same, unless rows from `last` on are another expert's: then threads write those before.
    """
    if row + 64 <= last:
        leave(total, room, to, row, column)
    else:
        room.store(total.to(room.dtype))
        at = row + gl.arange(0, 64, gl.SliceLayout(1, STORED))
        along = column + gl.arange(0, 128, gl.SliceLayout(0, STORED))
        gl.store(out + at.to(gl.int64)[:, None] * width + along[None, :], room.load(STORED),
                 mask=(at < last)[:, None] & (along < width)[None, :])


@gluon.jit
def copy_rows(a, b, x, y, full, empty, sizes, groups, high, TOGETHER: gl.constexpr):
    """Copy what `multiply_rows` reads."""
    row_tiles, column_tiles, steps = sizes
    done = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        start, last, e, column = rows_of(number, sizes, groups, TOGETHER)
        if start < last:
            for k in range(steps):
                copy_step(a, b, x, y, full, empty, start, e * high + column * 256, k, done, 0)
                done += 1


@gluon.jit
def multiply_rows(common, PART: gl.constexpr, TOGETHER: gl.constexpr, PLACES: gl.constexpr):
    """Multiply 64 rows in tiles by 256 rows of their expert's matrix in blocks."""
    (a_scale, b_scale, to, out, x, y, z, full, empty, sizes, groups, high, width, a_rows,
     scale_width) = common
    row_tiles, column_tiles, steps = sizes
    blocks, done = high // 128, 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        start, last, e, column = rows_of(number, sizes, groups, TOGETHER)
        if start < last:
            start += PART * 64
            at = start + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
            own_at = a_scale + gl.minimum(at, a_rows - 1)
            left_at = b_scale + (e * blocks + column * 2) * scale_width
            right_at = b_scale + (e * blocks + gl.minimum(column * 2 + 1, blocks - 1)) * scale_width
            own, of_left, of_right = gl.load(own_at), gl.load(left_at), gl.load(right_at)
            left = gl.zeros((64, 128), gl.float32, SUMS)
            right = gl.zeros((64, 128), gl.float32, SUMS)
            partial = gl.zeros((64, 128), gl.float32, SUMS)
            for k in range(steps):
                stage = done % STAGES
                mbarrier.wait(full.index(stage), done // STAGES & 1)
                mine = x.index(2 * stage + PART)
                partial = warpgroup_mma(mine, y.index(2 * stage).permute((1, 0)), partial,
                                        use_acc=False, is_async=True)
                for_left, for_right = own * of_left, own * of_right
                then = gl.minimum(k + 1, steps - 1)  # its scales arrive during this step
                own = gl.load(own_at + then * a_rows)
                of_left, of_right = gl.load(left_at + then), gl.load(right_at + then)
                partial = warpgroup_mma_wait(0, [partial])
                left += partial * for_left[:, None]
                left = warpgroup_mma_wait(0, [left])  # added before the next product begins
                partial = warpgroup_mma(mine, y.index(2 * stage + 1).permute((1, 0)), partial,
                                        use_acc=False, is_async=True)
                partial = warpgroup_mma_wait(0, [partial])
                mbarrier.arrive(empty.index(stage))
                right += partial * for_right[:, None]
                done += 1
            tma.store_wait(0)  # the tile before is read
            leave_rows(left, z.index(PART * PLACES), to, out, start, last, column * 256, width)
            if PLACES == 1:
                tma.store_wait(0)
            leave_rows(right, z.index(PART * PLACES + PLACES - 1), to, out, start, last,
                       column * 256 + 128, width)
    tma.store_wait(0)


@gluon.jit
def copy_tokens(a, b, a_scale, b_scale, x, y, own, other, full, empty, sizes, starts,
                TOGETHER: gl.constexpr):
    """Copy what `multiply_tokens` reads."""
    row_tiles, column_tiles, experts = sizes
    done = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles * experts, gl.num_programs(0)):
        e, row, column, start, last = tokens_of(number, sizes, starts, TOGETHER)
        for k in range(start, last):
            copy_step(a, b, x, y, full, empty, row * 128, column * 256, k, done, 3 * 128 * 4)
            stage = done % STAGES
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(a_scale, [k, row * 128 + 64 * i],
                                                full.index(stage), own.index(2 * stage + i))
                tma.async_copy_global_to_shared(b_scale, [k, column * 256 + 128 * i],
                                                full.index(stage), other.index(2 * stage + i))
            done += 1


@gluon.jit
def vector(room, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Load 1 x SIZE scales from shared memory."""
    flat = room._reinterpret(gl.float32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return flat.load(LAYOUT)


@gluon.jit
def multiply_tokens(common, PART: gl.constexpr, TOGETHER: gl.constexpr, PLACES: gl.constexpr):
    """Multiply 64 rows by 256 rows, both in tiles along an expert's tokens: weight gradients."""
    to, x, y, z, owns, others, full, empty, sizes, starts, height = common
    row_tiles, column_tiles, experts = sizes
    done = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles * experts, gl.num_programs(0)):
        e, row, column, start, last = tokens_of(number, sizes, starts, TOGETHER)
        left = gl.zeros((64, 128), gl.float32, SUMS)
        right = gl.zeros((64, 128), gl.float32, SUMS)
        partial = gl.zeros((64, 128), gl.float32, SUMS)
        for _ in range(start, last):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            mine = x.index(2 * stage + PART)
            partial = warpgroup_mma(mine, y.index(2 * stage).permute((1, 0)), partial,
                                    use_acc=False, is_async=True)
            own = vector(owns.index(2 * stage + PART), 64, gl.SliceLayout(1, SUMS))
            other = vector(others.index(2 * stage), 128, gl.SliceLayout(0, SUMS))
            partial = warpgroup_mma_wait(0, [partial])
            left += partial * own[:, None] * other[None, :]
            left = warpgroup_mma_wait(0, [left])  # added before the next product begins
            partial = warpgroup_mma(mine, y.index(2 * stage + 1).permute((1, 0)), partial,
                                    use_acc=False, is_async=True)
            other = vector(others.index(2 * stage + 1), 128, gl.SliceLayout(0, SUMS))
            partial = warpgroup_mma_wait(0, [partial])
            mbarrier.arrive(empty.index(stage))
            right += partial * own[:, None] * other[None, :]
            done += 1
        row = e * height + row * 128 + PART * 64
        tma.store_wait(0)  # the tile before is read
        leave(left, z.index(PART * PLACES), to, row, column * 256)
        if PLACES == 1:
            tma.store_wait(0)
        leave(right, z.index(PART * PLACES + PLACES - 1), to, row, column * 256 + 128)
    tma.store_wait(0)


@gluon.jit
def places(a, b, to, PLACES: gl.constexpr):
    """Return shared memory for STAGES steps of two factors and for results, and barriers."""
    x = gl.allocate_shared_memory(E4M3, [2 * STAGES, 64, 128], a.layout)
    y = gl.allocate_shared_memory(E4M3, [2 * STAGES, 128, 128], b.layout)
    z = gl.allocate_shared_memory(to.dtype, [2 * PLACES, 64, 128], to.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return x, y, z, full, empty


@gluon.jit
def hopper_product_kernel(a, a_scale, b, b_scale, to, out, expert, first, end, row_tiles,
                          column_tiles, steps, high, width, a_rows, scale_width,
                          TOGETHER: gl.constexpr, PLACES: gl.constexpr):
    """Multiply rows in tiles by their expert's matrix in blocks; see `product_kernel`.

    to: out, as the unit that copies sees it; width: of a row of out in memory
    """
    x, y, z, full, empty = places(a, b, to, PLACES)
    sizes, groups = (row_tiles, column_tiles, steps), (expert, first, end)
    common = (a_scale, b_scale, to, out, x, y, z, full, empty, sizes, groups, high, width, a_rows,
              scale_width)
    gl.warp_specialize([
        (multiply_rows, (common, 0, TOGETHER, PLACES)),
        (multiply_rows, (common, 1, TOGETHER, PLACES)),
        (copy_rows, (a, b, x, y, full, empty, sizes, groups, high, TOGETHER))],
        [4, 1], REGISTERS)


@gluon.jit
def hopper_tokens_kernel(a, a_scale, b, b_scale, to, starts, row_tiles, column_tiles, experts,
                         height, TOGETHER: gl.constexpr, PLACES: gl.constexpr):
    """Multiply two matrices in tiles along each expert's tokens; see `tokens_kernel`.

    height: rows of an expert's result in memory
    """
    x, y, z, full, empty = places(a, b, to, PLACES)
    own = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 64], a_scale.layout)
    other = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 128], b_scale.layout)
    sizes = (row_tiles, column_tiles, experts)
    common = (to, x, y, z, own, other, full, empty, sizes, starts, height)
    gl.warp_specialize([
        (multiply_tokens, (common, 0, TOGETHER, PLACES)),
        (multiply_tokens, (common, 1, TOGETHER, PLACES)),
        (copy_tokens, (a, b, a_scale, b_scale, x, y, own, other, full, empty, sizes, starts,
                       TOGETHER))],
        [4, 1], REGISTERS)


def described(t: Tensor, rows: int) -> TensorDescriptor:
    """Describe a matrix to the unit that copies `rows` x 128 of its numbers."""
    shape = [rows, BLOCK]
    layout = gl.NVMMASharedLayout.get_default_for(shape, KINDS[t.dtype])
    return TensorDescriptor.from_tensor(t, shape, layout)


def described_scales(t: Tensor, columns: int) -> TensorDescriptor:
    """Describe scales to the unit that copies 1 x `columns` of them."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor.from_tensor(t, [1, columns], layout)


def launch(out: Tensor, tiles: int, together: int) -> tuple[tuple[int], dict]:
    """Return how many programs compute so many tiles of results, and with what."""
    many = torch.cuda.get_device_properties(out.device).multi_processor_count if out.is_cuda else 1
    places = 2 if out.element_size() == 2 else 1  # where a part leaves 64 x 128 results
    return (min(many, tiles),), dict(TOGETHER=together, PLACES=places, num_warps=4)


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int, width: int,
            dtype: torch.dtype, groups: Groups) -> Tensor:
    """As `triton_fp8_products.product`."""
    n, depth = a.shape
    out = torch.empty(rows, whole(width), dtype=dtype, device=a.device)
    row_tiles, column_tiles = len(groups.first), -(-b.size(1) // (2 * BLOCK))
    if rows:
        grid, settings = launch(out, row_tiles * column_tiles, TOGETHER)
        hopper_product_kernel[grid](
            described(a, 64), a_scale, described(b.flatten(0, 1), 128), b_scale, described(out, 64),
            out, *groups[:3], row_tiles, column_tiles, depth // BLOCK, b.size(1), out.size(1), n,
            b_scale.size(2), **settings)
    return out[:, :width].contiguous()


def over_tokens(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, height: int, width: int,
                dtype: torch.dtype, groups: Groups) -> Tensor:
    """As `triton_fp8_products.over_tokens`."""
    experts = len(groups.starts) - 1
    out = torch.empty(experts, whole(height), whole(width), dtype=dtype, device=a.device)
    row_tiles, column_tiles = a.size(0) // BLOCK, -(-b.size(0) // (2 * BLOCK))
    grid, settings = launch(out, row_tiles * column_tiles * experts, TOGETHER_OVER_TOKENS)
    hopper_tokens_kernel[grid](
        described(a, 64), described_scales(a_scale, 64), described(b, 128),
        described_scales(b_scale, 128), described(out.flatten(0, 1), 64), groups.starts, row_tiles,
        column_tiles, experts, out.size(1), **settings)
    return out[:, :height, :width].contiguous()
