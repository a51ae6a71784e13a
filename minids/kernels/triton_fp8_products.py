"""Products of E4M3 numbers with scales, in Triton: a linear layer's, and all experts' at once.

A program computes 128 x 128 results. The tensor cores add up 128 products, in registers and with
some 14 bits; then the partial sum is multiplied by its scales and added in FP32, as V3 does it
(section 3.3.2). Neither factors in BF16, nor partial sums, nor results in FP32 are written to
memory. Both factors lie with the summed dimension last, which Hopper's FP8 units ask for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids.kernels.fp8_layout import BLOCK, Groups

TOGETHER = 8  # row tiles whose programs run side by side, and find each other's columns in a cache
# Steps whose factors are under way: four fill what a large card has of shared memory, 128 KB; cards
# for games have 99 KB.
STAGES, STAGES_OF_SMALL = 4, 2


@triton.jit
def place(tile, column_tiles, row_tiles, TOGETHER: tl.constexpr):
    """Return row and column of a tile: all columns of TOGETHER rows, then the next rows."""
    first = tile // (TOGETHER * column_tiles) * TOGETHER
    count = tl.minimum(row_tiles - first, TOGETHER)
    within = tile % (TOGETHER * column_tiles)
    return first + within % count, within // count


@triton.jit
def product_kernel(a, a_scale, b, b_scale, out, expert, first, end, rows, width, a_rows, depth,
                   row_tiles, column_tiles, scale_width, GROUPED: tl.constexpr,
                   BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """Multiply 128 rows in tiles by 128 rows of their expert's matrix in blocks.

    rows, width: of out; a_rows: of a, and scales of a tile; depth: numbers in a row of a and b
    scale_width: scales in a row of b_scale
    """
    tile, column = place(tl.program_id(0), column_tiles, row_tiles, TOGETHER)
    start, last, e = tile.to(tl.int64) * BLOCK, rows, 0
    if GROUPED:
        start, last = tl.load(first + tile).to(tl.int64), tl.load(end + tile)
        e = tl.load(expert + tile).to(tl.int64)
        if start >= last:
            return
    at = start + tl.arange(0, BLOCK)
    known = tl.minimum(at, a_rows - 1)  # the next expert's rows are multiplied too, and not stored
    along, k = column * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    a_at = a + known[:, None] * depth + k[None, :]
    b_row = e * (column_tiles * BLOCK) + along
    b_at = b + b_row.to(tl.int64)[None, :] * depth + k[:, None]
    a_scale_at = a_scale + known
    b_scale_at = b_scale + (e * column_tiles + column) * scale_width
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(depth // BLOCK):
        both = tl.load(a_scale_at) * tl.load(b_scale_at + step)  # arrives while numbers multiply
        partial = tl.dot(tl.load(a_at), tl.load(b_at))
        total += partial * both[:, None]
        a_at += BLOCK
        b_at += BLOCK
        a_scale_at += a_rows
    inside = (at < last)[:, None] & (along < width)[None, :]
    tl.store(out + at[:, None] * width + along[None, :], total.to(out.dtype.element_ty),
             mask=inside)


@triton.jit
def tokens_kernel(a, a_scale, b, b_scale, out, starts, height, width, tokens, a_wide,
                  row_tiles, column_tiles, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
                  TOGETHER: tl.constexpr):
    """Multiply 128 rows by 128 rows, both in tiles along an expert's tokens: weight gradients.

    height, width: of an expert's result; tokens: numbers in a row of a and b, whole tiles;
    a_wide: scales from a tile of a to the next
    An expert without tokens gets zeros.
    """
    row, column = place(tl.program_id(0), column_tiles, row_tiles, TOGETHER)
    e = tl.program_id(1).to(tl.int64)
    start, last = 0, tokens // BLOCK
    if GROUPED:
        start, last = tl.load(starts + e), tl.load(starts + e + 1)
    at = row * BLOCK + tl.arange(0, BLOCK)
    along, k = column * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    a_at = a + at.to(tl.int64)[:, None] * tokens + k[None, :]
    b_at = b + along.to(tl.int64)[None, :] * tokens + k[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for tile in range(start, last):
        own = tl.load(a_scale + tile * a_wide + at)
        other = tl.load(b_scale + tile * (column_tiles * BLOCK) + along)
        partial = tl.dot(tl.load(a_at + tile * BLOCK), tl.load(b_at + tile * BLOCK))
        total += partial * own[:, None] * other[None, :]
    inside = (at < height)[:, None] & (along < width)[None, :]
    tl.store(out + (e * height + at[:, None]) * width + along[None, :],
             total.to(out.dtype.element_ty), mask=inside)


def stages(a: Tensor) -> int:
    """Return how many steps are under way on the device of a tensor."""
    if a.device.type != "cuda":
        return STAGES
    shared = torch.cuda.get_device_properties(a.device).shared_memory_per_block_optin
    return STAGES if shared > 160 << 10 else STAGES_OF_SMALL


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int, width: int,
            dtype: torch.dtype, groups: Groups | None = None) -> Tensor:
    """Return A B^T, each row of A with its expert's B: (rows, width) of a type.

    a, a_scale: as `round_tiles` returns them; b, b_scale: as `round_blocks` does
    """
    n, depth = a.shape
    out = torch.empty(rows, width, dtype=dtype, device=a.device)
    column_tiles = b.size(1) // BLOCK
    row_tiles = n // BLOCK if groups is None else len(groups.first)
    expert, first, end = (a, a, a) if groups is None else groups[:3]
    if rows:
        product_kernel[row_tiles * column_tiles,](
            a, a_scale, b, b_scale, out, expert, first, end, rows, width, n, depth, row_tiles,
            column_tiles, b_scale.size(2), GROUPED=groups is not None, BLOCK=BLOCK,
            TOGETHER=TOGETHER, num_warps=8, num_stages=stages(a))
    return out


def over_tokens(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, height: int, width: int,
                dtype: torch.dtype, groups: Groups | None = None) -> Tensor:
    """Return A B^T, summed over each expert's tokens: (E, height, width) of a type.

    a, b and their scales: q_t and scale_t as `round_tiles` returns them; of a, whole tiles of rows
    """
    experts = 1 if groups is None else len(groups.starts) - 1
    out = torch.empty(experts, height, width, dtype=dtype, device=a.device)
    row_tiles, column_tiles = a.size(0) // BLOCK, b.size(0) // BLOCK
    tokens_kernel[row_tiles * column_tiles, experts](
        a, a_scale, b, b_scale, out, a if groups is None else groups.starts, height, width,
        a.size(1), a_scale.stride(0), row_tiles, column_tiles, GROUPED=groups is not None,
        BLOCK=BLOCK, TOGETHER=TOGETHER, num_warps=8, num_stages=stages(a))
    return out
