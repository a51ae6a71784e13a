"""The products of `triton_fp8_products` for Hopper, written in Gluon: all experts' at once.

Triton decides by itself which warps do what, and waits for a product before it adds it up. Here
that is written out. A program has 128 x 256 results under way, and three parts:
    one warp   copies the factors' next 128 columns into shared memory, up to four steps ahead
    four warps and four more    multiply 64 rows each
A part of the latter two lets the tensor cores add up 128 products, then multiplies this partial sum
by its scales and adds it in FP32. While it does so, the other part has the tensor cores. Twice as
many columns as in `triton_fp8_products` mean that each row of A is read half as often: copying from
the cache is what limits that kernel. As many programs as the card has multiprocessors take one tile
of results after the other, so that writing a tile overlaps with multiplying the next.

Barriers say who may go on: `full` that a step's factors have arrived, `empty` that both parts have
multiplied them. Each is used once in STAGES steps, and its phase flips each time.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minids.kernels.fp8_layout import BLOCK, Groups

# Row tiles that are computed side by side, and find each other's columns in a cache.
TOGETHER, TOGETHER_OVER_TOKENS = 8, 32
REGISTERS = gl.constexpr([240, 24])  # of a thread that multiplies, and of one that copies
E4M3 = gl.constexpr(gl.float8e4nv)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))  # of 64 x 128 numbers
STORED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def place(number, row_tiles, column_tiles, TOGETHER: gl.constexpr):
    """Return row and column of a tile: all columns of TOGETHER rows, then the next rows."""
    first = number // (TOGETHER * column_tiles) * TOGETHER
    count = gl.minimum(row_tiles - first, TOGETHER)
    within = number % (TOGETHER * column_tiles)
    return first + within % count, within // count


@gluon.jit
def rows_of(number, sizes, groups, GROUPED: gl.constexpr, TOGETHER: gl.constexpr):
    """Return a tile's first row, the row after its expert's last, its expert and its column."""
    rows, row_tiles, column_tiles, steps = sizes
    tile, column = place(number, row_tiles, column_tiles, TOGETHER)
    start, last, e = tile * 128, rows, 0
    if GROUPED:
        expert, first, end = groups
        start, last, e = gl.load(first + tile), gl.load(end + tile), gl.load(expert + tile)
    return start, last, e, column


@gluon.jit
def tokens_of(number, sizes, starts, GROUPED: gl.constexpr, TOGETHER: gl.constexpr):
    """Return a tile's expert, row and column, and the first and last tile of its tokens."""
    steps, row_tiles, column_tiles, experts = sizes
    e = number // (row_tiles * column_tiles)
    row, column = place(number % (row_tiles * column_tiles), row_tiles, column_tiles, TOGETHER)
    start, last = 0, steps
    if GROUPED:
        start, last = gl.load(starts + e), gl.load(starts + e + 1)
    return e, row, column, start, last


@gluon.jit
def copy_step(a, b, x, y, full, empty, a_row, b_row, k, done, STAGES: gl.constexpr):
    """Begin to copy 128 rows of a and 256 of b, 128 columns each, once their place is free."""
    stage = done % STAGES
    mbarrier.wait(empty.index(stage), done // STAGES & 1 ^ 1)
    mbarrier.expect(full.index(stage), 3 * 128 * 128)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(a, [a_row + 64 * i, k * 128], full.index(stage),
                                        x.index(2 * stage + i))
        tma.async_copy_global_to_shared(b, [b_row + 128 * i, k * 128], full.index(stage),
                                        y.index(2 * stage + i))


@gluon.jit
def store(out, total, row, last, column, width):
    """Write 64 x 128 sums, rows before `last` and columns before `width`."""
    at = row + gl.arange(0, 64, gl.SliceLayout(1, STORED))
    along = column + gl.arange(0, 128, gl.SliceLayout(0, STORED))
    gl.store(out + at.to(gl.int64)[:, None] * width + along[None, :],
             gl.convert_layout(total.to(out.dtype.element_ty), STORED),
             mask=(at < last)[:, None] & (along < width)[None, :])


@gluon.jit
def copy_rows(a, b, x, y, full, empty, sizes, groups, high, GROUPED: gl.constexpr,
              TOGETHER: gl.constexpr, STAGES: gl.constexpr):
    """Copy what `multiply_rows` reads."""
    rows, row_tiles, column_tiles, steps = sizes
    done = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        start, last, e, column = rows_of(number, sizes, groups, GROUPED, TOGETHER)
        if start < last:
            for k in range(steps):
                copy_step(a, b, x, y, full, empty, start, e * high + column * 256, k, done, STAGES)
                done += 1


@gluon.jit
def multiply_rows(common, PART: gl.constexpr, GROUPED: gl.constexpr, TOGETHER: gl.constexpr,
                  STAGES: gl.constexpr):
    """Multiply 64 rows in tiles by 256 rows of their expert's matrix in blocks."""
    (a_scale, b_scale, out, x, y, full, empty, sizes, groups, high, width, a_rows,
     scale_width) = common
    rows, row_tiles, column_tiles, steps = sizes
    done = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        start, last, e, column = rows_of(number, sizes, groups, GROUPED, TOGETHER)
        if start < last:
            start += PART * 64
            at = start + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
            own_at = a_scale + gl.minimum(at, a_rows - 1)
            blocks = high // 128
            left_at = b_scale + (e * blocks + column * 2) * scale_width
            right_at = b_scale + (e * blocks + gl.minimum(column * 2 + 1, blocks - 1)) * scale_width
            left = gl.zeros((64, 128), gl.float32, SUMS)
            right = gl.zeros((64, 128), gl.float32, SUMS)
            partial = gl.zeros((64, 128), gl.float32, SUMS)
            for k in range(steps):
                stage = done % STAGES
                mbarrier.wait(full.index(stage), done // STAGES & 1)
                mine = x.index(2 * stage + PART)
                partial = warpgroup_mma(mine, y.index(2 * stage).permute((1, 0)), partial,
                                        use_acc=False, is_async=True)
                own = gl.load(own_at + k * a_rows)
                factor = gl.load(left_at + k)
                partial = warpgroup_mma_wait(0, [partial])
                left += partial * (own * factor)[:, None]
                left = warpgroup_mma_wait(0, [left])  # added before the next product begins
                partial = warpgroup_mma(mine, y.index(2 * stage + 1).permute((1, 0)), partial,
                                        use_acc=False, is_async=True)
                factor = gl.load(right_at + k)
                partial = warpgroup_mma_wait(0, [partial])
                mbarrier.arrive(empty.index(stage))
                right += partial * (own * factor)[:, None]
                done += 1
            store(out, left, start, last, column * 256, width)
            store(out, right, start, last, column * 256 + 128, width)


@gluon.jit
def copy_tokens(a, b, x, y, full, empty, sizes, starts, GROUPED: gl.constexpr,
                TOGETHER: gl.constexpr, STAGES: gl.constexpr):
    """Copy what `multiply_tokens` reads."""
    steps, row_tiles, column_tiles, experts = sizes
    done = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles * experts, gl.num_programs(0)):
        e, row, column, start, last = tokens_of(number, sizes, starts, GROUPED, TOGETHER)
        for k in range(start, last):
            copy_step(a, b, x, y, full, empty, row * 128, column * 256, k, done, STAGES)
            done += 1


@gluon.jit
def multiply_tokens(common, PART: gl.constexpr, GROUPED: gl.constexpr, TOGETHER: gl.constexpr,
                    STAGES: gl.constexpr):
    """Multiply 64 rows by 256 rows, both in tiles along an expert's tokens: weight gradients."""
    (a_scale, b_scale, out, x, y, full, empty, sizes, starts, height, width, a_wide,
     b_wide) = common
    steps, row_tiles, column_tiles, experts = sizes
    done = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles * experts, gl.num_programs(0)):
        e, row, column, start, last = tokens_of(number, sizes, starts, GROUPED, TOGETHER)
        row = row * 128 + PART * 64
        own_at = a_scale + row + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        other_at = b_scale + column * 256 + gl.arange(0, 128, gl.SliceLayout(0, SUMS))
        beside = gl.minimum(128, b_wide - 128 - column * 256)  # 0 in an odd last column
        left = gl.zeros((64, 128), gl.float32, SUMS)
        right = gl.zeros((64, 128), gl.float32, SUMS)
        zero = gl.zeros((64, 128), gl.float32, SUMS)
        for k in range(start, last):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            mine = x.index(2 * stage + PART)
            partial = warpgroup_mma(mine, y.index(2 * stage).permute((1, 0)), zero, use_acc=False,
                                    is_async=True)
            own = gl.load(own_at + k * a_wide)
            other = gl.load(other_at + k * b_wide)
            partial = warpgroup_mma_wait(0, [partial])
            left += partial * own[:, None] * other[None, :]
            left = warpgroup_mma_wait(0, [left])  # added before the next product begins
            partial = warpgroup_mma(mine, y.index(2 * stage + 1).permute((1, 0)), zero,
                                    use_acc=False, is_async=True)
            other = gl.load(other_at + (k * b_wide + beside))
            partial = warpgroup_mma_wait(0, [partial])
            mbarrier.arrive(empty.index(stage))
            right += partial * own[:, None] * other[None, :]
            done += 1
        to = out + e.to(gl.int64) * height * width
        store(to, left, row, height, column * 256, width)
        store(to, right, row, height, column * 256 + 128, width)


@gluon.jit
def places(a, b, STAGES: gl.constexpr):
    """Return shared memory for STAGES steps of two factors, and their barriers."""
    x = gl.allocate_shared_memory(E4M3, [2 * STAGES, 64, 128], a.layout)
    y = gl.allocate_shared_memory(E4M3, [2 * STAGES, 128, 128], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return x, y, full, empty


@gluon.jit
def hopper_product_kernel(a, a_scale, b, b_scale, out, expert, first, end, rows, row_tiles,
                          column_tiles, steps, high, width, a_rows, scale_width,
                          GROUPED: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr):
    """Multiply rows in tiles by their expert's matrix in blocks; see `product_kernel`."""
    x, y, full, empty = places(a, b, STAGES)
    sizes, groups = (rows, row_tiles, column_tiles, steps), (expert, first, end)
    common = (a_scale, b_scale, out, x, y, full, empty, sizes, groups, high, width, a_rows,
              scale_width)
    gl.warp_specialize([
        (multiply_rows, (common, 0, GROUPED, TOGETHER, STAGES)),
        (multiply_rows, (common, 1, GROUPED, TOGETHER, STAGES)),
        (copy_rows, (a, b, x, y, full, empty, sizes, groups, high, GROUPED, TOGETHER, STAGES))],
        [4, 1], REGISTERS)


@gluon.jit
def hopper_tokens_kernel(a, a_scale, b, b_scale, out, starts, steps, row_tiles, column_tiles,
                         experts, height, width, a_wide, b_wide,
                         GROUPED: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr):
    """Multiply two matrices in tiles along each expert's tokens; see `tokens_kernel`."""
    x, y, full, empty = places(a, b, STAGES)
    sizes = (steps, row_tiles, column_tiles, experts)
    common = (a_scale, b_scale, out, x, y, full, empty, sizes, starts, height, width, a_wide,
              b_wide)
    gl.warp_specialize([
        (multiply_tokens, (common, 0, GROUPED, TOGETHER, STAGES)),
        (multiply_tokens, (common, 1, GROUPED, TOGETHER, STAGES)),
        (copy_tokens, (a, b, x, y, full, empty, sizes, starts, GROUPED, TOGETHER, STAGES))],
        [4, 1], REGISTERS)


def described(t: Tensor, rows: int) -> TensorDescriptor:
    """Describe a matrix to the unit that copies `rows` x 128 of its numbers."""
    shape = [rows, BLOCK]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.float8e4nv)
    return TensorDescriptor.from_tensor(t, shape, layout)


def launch(out: Tensor, tiles: int, together: int) -> tuple[tuple[int], dict]:
    """Return how many programs compute so many tiles of results, and with what."""
    many = torch.cuda.get_device_properties(out.device).multi_processor_count if out.is_cuda else 1
    stages = 4 if out.element_size() == 2 else 3  # FP32 needs more memory on its way out
    return (min(many, tiles),), dict(TOGETHER=together, STAGES=stages, num_warps=4)


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int, width: int,
            dtype: torch.dtype, groups: Groups | None = None) -> Tensor:
    """As `triton_fp8_products.product`."""
    n, depth = a.shape
    out = torch.empty(rows, width, dtype=dtype, device=a.device)
    row_tiles = n // BLOCK if groups is None else len(groups.first)
    column_tiles = -(-b.size(1) // (2 * BLOCK))
    if rows:
        grid, settings = launch(out, row_tiles * column_tiles, TOGETHER)
        hopper_product_kernel[grid](
            described(a, 64), a_scale, described(b.flatten(0, 1), 128), b_scale, out,
            *((a, a, a) if groups is None else groups[:3]), rows, row_tiles, column_tiles,
            depth // BLOCK, b.size(1), width, n, b_scale.size(2), GROUPED=groups is not None,
            **settings)
    return out


def over_tokens(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, height: int, width: int,
                dtype: torch.dtype, groups: Groups | None = None) -> Tensor:
    """As `triton_fp8_products.over_tokens`."""
    experts = 1 if groups is None else len(groups.starts) - 1
    out = torch.empty(experts, height, width, dtype=dtype, device=a.device)
    row_tiles, column_tiles = a.size(0) // BLOCK, -(-b.size(0) // (2 * BLOCK))
    grid, settings = launch(out, row_tiles * column_tiles * experts, TOGETHER_OVER_TOKENS)
    hopper_tokens_kernel[grid](
        described(a, 64), a_scale, described(b, 128), b_scale, out,
        a if groups is None else groups.starts, a.size(1) // BLOCK, row_tiles, column_tiles,
        experts, height, width, a_scale.stride(0), b_scale.stride(0), GROUPED=groups is not None,
        **settings)
    return out
