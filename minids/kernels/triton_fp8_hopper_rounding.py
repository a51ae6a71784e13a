"""The kernels of `triton_fp8` for Hopper, in Gluon: what is transposed crosses as 16-bit numbers.

Triton moves a transposed copy between threads at the end, as E4M3 numbers, for which shared memory
has no instruction: each byte is loaded by itself, and each thread computes the scales of 16
columns. Here the numbers that columns are rounded from change hands, in BF16, or those rounded
once in FP16, which holds what E4M3 does. That takes two thirds of the instructions, whose number
limits these kernels, and half of the registers, so that twice as many programs share a
multiprocessor.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from minids.kernels import triton_e4m3

scale_of, to_e4m3 = (gluon.jit(f.fn) for f in (triton_e4m3.scale_of, triton_e4m3.to_e4m3))


@gluon.jit
def hopper_tiles_kernel(x, source, q, scale, q_t, scale_t, first, end, rows, width, q_rows, tokens,
                        least, ROWS: gl.constexpr, COLUMNS: gl.constexpr, UE8M0: gl.constexpr,
                        GROUPED: gl.constexpr, FETCHED: gl.constexpr, SHORT: gl.constexpr,
                        BLOCK: gl.constexpr, WARPS: gl.constexpr):
    """As `tiles_kernel`."""
    ALONG: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])  # 16 of a row each
    ACROSS: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, WARPS], [0, 1])  # and of a column
    tile, column = gl.program_id(1).to(gl.int64), gl.program_id(0)
    last = rows
    start = tile * BLOCK
    if GROUPED:
        start, last = gl.load(first + tile).to(gl.int64), gl.load(end + tile)
        if start >= last:
            return
    at = start + gl.arange(0, BLOCK, gl.SliceLayout(1, ALONG))
    along = column * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, ALONG))
    padded = gl.num_programs(0) * BLOCK
    inside = (at < last)[:, None] & (along < width)[None, :]
    row = at
    if FETCHED:
        row = gl.load(source + at, mask=at < last, other=0)
    value = gl.load(x + row[:, None] * width + along[None, :], mask=inside, other=0.0)
    if ROWS or COLUMNS == 2:
        number = value.to(gl.float32)
        own = scale_of(gl.max(gl.abs(number), 1), least, UE8M0)  # (BLOCK,)
        rounded = to_e4m3(number, own[:, None], SHORT)
        if ROWS:
            here = at < (last if GROUPED else q_rows)  # else the next expert's rows
            gl.store(q + at[:, None] * padded + along[None, :], rounded, mask=here[:, None])
            gl.store(scale + column.to(gl.int64) * q_rows + at, own, mask=here)
    if COLUMNS == 1:
        number = gl.convert_layout(value, ACROSS).to(gl.float32)
    if COLUMNS == 2:
        own = gl.convert_layout(own, gl.SliceLayout(1, ACROSS))
        number = gl.convert_layout(rounded.to(gl.float16), ACROSS).to(gl.float32) * own[:, None]
    if COLUMNS > 0:
        own = scale_of(gl.max(gl.abs(number), 0), least, UE8M0)
        rounded = to_e4m3(number, own[None, :], SHORT and COLUMNS == 1)
        at = tile * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, ACROSS))
        along = column * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, ACROSS))
        gl.store(q_t + along.to(gl.int64)[None, :] * tokens + at[:, None], rounded)
        gl.store(scale_t + tile * padded + along, own)


@gluon.jit
def hopper_blocks_kernel(w, q, scale, q_t, scale_t, height, width, stride, first, high, scale_width,
                         scale_height, least, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
                         UE8M0: gl.constexpr, SHORT: gl.constexpr, BLOCK: gl.constexpr,
                         WARPS: gl.constexpr):
    """As `blocks_kernel`."""
    ALONG: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])  # 16 of a row each
    ACROSS: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, WARPS], [0, 1])  # and of a column
    column, row, matrix = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    at = row * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, ALONG))
    along = column * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, ALONG))
    wide = gl.num_programs(0)  # in blocks
    inside = (at < height)[:, None] & (along < width)[None, :]
    value = gl.load(w + matrix * stride + at.to(gl.int64)[:, None] * width + along[None, :],
                    mask=inside, other=0.0).to(gl.float32)
    own = scale_of(gl.max(gl.max(gl.abs(value), 1), 0), least, UE8M0)
    rounded = to_e4m3(value, gl.full([1, 1], own, gl.float32, ALONG), SHORT)
    numbers = matrix * wide * high * BLOCK * BLOCK
    if ROWS:
        down = at + first * BLOCK
        gl.store(q + numbers + down.to(gl.int64)[:, None] * (wide * BLOCK) + along[None, :],
                 rounded)
        gl.store(scale + (matrix * high + row + first) * scale_width + column, own)
    if COLUMNS:
        rounded = gl.convert_layout(rounded.to(gl.float16), ACROSS).to(gl.float8e4nv)
        down = (first + row) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, ACROSS))
        along = column * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, ACROSS))
        gl.store(q_t + numbers + along.to(gl.int64)[None, :] * (high * BLOCK) + down[:, None],
                 rounded)
        gl.store(scale_t + (matrix * wide + column) * scale_height + row + first, own)
