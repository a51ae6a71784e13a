"""Rounding to E4M3 in one pass over memory, in Triton: tiles of 1 x 128 and blocks of 128 x 128.

A program holds 128 x 128 numbers in registers. From there it can round them along their rows and,
transposed, along their columns, as the weight gradient needs them; in PyTorch operations a matrix
is read or written some twenty times for that. Neither absolute values, nor quotients, nor the
rounded numbers in FP32, nor a transposed copy in BF16 are written to memory.

What is written is laid out as products read it, in whole tiles filled up with zeros: numbers row by
row, and scales tile by tile, one for each row of a tile side by side.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids.kernels.fp8_layout import BLOCK, LEAST, Groups, in_fours, in_gluon, whole
from minids.kernels.triton_e4m3 import scale_of, to_e4m3

NOT, OF_X, OF_ROUNDED = 0, 1, 2  # what the columns are rounded from


@triton.jit
def tiles_kernel(x, source, q, scale, q_t, scale_t, first, end, rows, width, q_rows, tokens,
                 least, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UE8M0: tl.constexpr,
                 GROUPED: tl.constexpr, FETCHED: tl.constexpr, SHORT: tl.constexpr,
                 BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Round 128 x 128 numbers along the rows, along the columns, or both; columns go transposed.

    source: the row of x that each row is, if FETCHED; q_rows: rows of q and of a tile's scales
    tokens: columns of q_t, whole tiles
    """
    tile, column = tl.program_id(1).to(tl.int64), tl.program_id(0)
    last = rows
    start = tile * BLOCK
    if GROUPED:
        start, last = tl.load(first + tile).to(tl.int64), tl.load(end + tile)
        if start >= last:
            return
    at = start + tl.arange(0, BLOCK)
    along = column * BLOCK + tl.arange(0, BLOCK)
    padded = tl.num_programs(0) * BLOCK
    inside = (at < last)[:, None] & (along < width)[None, :]
    row = at
    if FETCHED:
        row = tl.load(source + at, mask=at < last, other=0)
    value = tl.load(x + row[:, None] * width + along[None, :], mask=inside, other=0.0)
    if ROWS or COLUMNS == 2:
        value = value.to(tl.float32)
        own = scale_of(tl.max(tl.abs(value), 1), least, UE8M0)  # (BLOCK,)
        rounded = to_e4m3(value, own[:, None], SHORT)
        if ROWS:
            here = at < (last if GROUPED else q_rows)  # else the next expert's rows
            tl.store(q + at[:, None] * padded + along[None, :], rounded, mask=here[:, None])
            tl.store(scale + column.to(tl.int64) * q_rows + at, own, mask=here)
        if COLUMNS == 2:
            value = rounded.to(tl.float32) * own[:, None]
    if COLUMNS > 0:
        value = value.to(tl.float32)
        own = scale_of(tl.max(tl.abs(value), 0), least, UE8M0)
        rounded = to_e4m3(value, own[None, :], SHORT and COLUMNS == 1)
        across = tile * BLOCK + tl.arange(0, BLOCK)
        tl.store(q_t + along.to(tl.int64)[:, None] * tokens + across[None, :], tl.trans(rounded))
        tl.store(scale_t + tile * padded + along, own)


@triton.jit
def blocks_kernel(w, q, scale, q_t, scale_t, height, width, stride, first, high, scale_width,
                  scale_height, least, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  UE8M0: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr,
                  WARPS: tl.constexpr):
    """Round a block of 128 x 128 numbers with one scale, and store it as it is, transposed, or
    both: a block's scale serves its rows and its columns alike.

    stride: numbers from a matrix of w to the next; first, high: rows of q before these, and of all,
    in blocks; scale_width, scale_height: numbers in a row of scale and of scale_t
    """
    column, row, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = row * BLOCK + tl.arange(0, BLOCK)
    along = column * BLOCK + tl.arange(0, BLOCK)
    wide = tl.num_programs(0)  # in blocks
    inside = (at < height)[:, None] & (along < width)[None, :]
    value = tl.load(w + matrix * stride + at.to(tl.int64)[:, None] * width + along[None, :],
                    mask=inside, other=0.0).to(tl.float32)
    own = scale_of(tl.max(tl.max(tl.abs(value), 1), 0), least, UE8M0)
    rounded = to_e4m3(value, own, SHORT)
    numbers = matrix * wide * high * BLOCK * BLOCK
    row += first
    at += first * BLOCK
    if ROWS:
        tl.store(q + numbers + at.to(tl.int64)[:, None] * (wide * BLOCK) + along[None, :], rounded)
        tl.store(scale + (matrix * high + row) * scale_width + column, own)
    if COLUMNS:
        # Not `rounded` transposed: where the same numbers are packed in two ways, ptxas 12.8 loses
        # some. The scale is the same, but a compiler does not know that.
        value = tl.trans(value)
        own = scale_of(tl.max(tl.max(tl.abs(value), 1), 0), least, UE8M0)
        tl.store(q_t + numbers + along.to(tl.int64)[:, None] * (high * BLOCK) + at[None, :],
                 to_e4m3(value, own, SHORT))
        tl.store(scale_t + (matrix * wide + column) * scale_height + row, own)


def chosen(x: Tensor, name: str) -> triton.JITFunction:
    """Return the kernel of a name for a tensor's device."""
    if not in_gluon(x):
        return globals()[name]
    from minids.kernels import triton_fp8_hopper_rounding
    return getattr(triton_fp8_hopper_rounding, f"hopper_{name}")


def round_tiles(x: Tensor, rows: bool, columns: int = NOT, ue8m0: bool = False,
                least: float = LEAST, groups: Groups | None = None, source: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round x (N, D) to tiles along its rows, along its columns, or both.

    rows: whether to round along rows; columns: of `NOT`, `OF_X`, `OF_ROUNDED`
    groups: columns' tiles are those of each expert, the first of which starts at its first row
    source: (N,) int64, the row of x that each row is; x then has a row per token, and N is a
        number of slots

    Returns, with all sizes in whole tiles except N if there are groups, and empty if not asked for,
        q: (N, D), scale: (D / 128, N);    q_t: (D, 128 T), scale_t: (T, D)
    """
    (n, d), x = x.shape, x.contiguous()
    n, wide = n if source is None else len(source), whole(d)
    tiles = whole(n) // BLOCK if groups is None else len(groups.first)
    q_rows = whole(n) if groups is None else n
    e4m3, fp32 = (dict(device=x.device, dtype=t) for t in (torch.float8_e4m3fn, torch.float32))
    high, across = q_rows * rows, tiles * (columns != NOT)
    q, scale = torch.empty(high, wide, **e4m3), torch.empty(wide // BLOCK, high, **fp32)
    q_t, scale_t = torch.empty(wide, across * BLOCK, **e4m3), torch.empty(across, wide, **fp32)
    first, end = (x, x) if groups is None else (groups.first, groups.end)
    warps = 4 if columns == OF_X and in_gluon(x) else 8  # measured on an H200, and for blocks
    if n:
        chosen(x, "tiles_kernel")[wide // BLOCK, tiles](
            x, x if source is None else source, q, scale, q_t, scale_t, first, end, n, d, q_rows,
            tiles * BLOCK, least, ROWS=rows, COLUMNS=columns, UE8M0=ue8m0,
            GROUPED=groups is not None, FETCHED=source is not None,
            SHORT=x.element_size() == 2, BLOCK=BLOCK, WARPS=warps, num_warps=warps)
    return q, scale, q_t, scale_t


def round_blocks(weights: Sequence[Tensor], rows: bool = True, columns: bool = False,
                 ue8m0: bool = False, out: Sequence[Tensor] = ()
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round stacks of matrices (E, R, C), side by side, to blocks; several have R in whole blocks.

    rows: as they are; columns: transposed; out: where to, if it is there already
    Returns, R and C in whole blocks, rows of scales in fours, and empty if not asked for,
        q: (E, R, C), scale: (E, R / 128, C / 128)
        q_t: (E, C, R), scale_t: (E, C / 128, R / 128)
    """
    e, _, c = weights[0].shape
    blocks = [whole(w.size(1)) // BLOCK for w in weights]
    wide, high, like = whole(c), sum(blocks) * BLOCK, weights[0]
    row, row_t = in_fours(wide), in_fours(high)
    e4m3, fp32 = (dict(device=like.device, dtype=t) for t in (torch.float8_e4m3fn, torch.float32))
    q, scale, q_t, scale_t = out or (
        torch.empty(e * rows, high, wide, **e4m3),
        torch.zeros(e * rows, high // BLOCK, row, **fp32),
        torch.empty(e * columns, wide, high, **e4m3),
        torch.zeros(e * columns, wide // BLOCK, row_t, **fp32))
    first, warps = 0, 4 if in_gluon(like) else 8
    for w, count in zip(weights, blocks, strict=True):
        w = w if w.stride()[1:] == (c, 1) else w.contiguous()
        chosen(w, "blocks_kernel")[wide // BLOCK, count, e](
            w, q, scale, q_t, scale_t, w.size(1), c, w.stride(0), first, high // BLOCK, row, row_t,
            LEAST, ROWS=rows, COLUMNS=columns, UE8M0=ue8m0, SHORT=w.element_size() == 2,
            BLOCK=BLOCK, WARPS=warps, num_warps=warps)
        first += count
    return q, scale, q_t, scale_t
