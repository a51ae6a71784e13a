"""Muon's two passes over its numbers, and its symmetric products, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 2048
TILE, DEEP = 128, 64  # of results, and of what is multiplied at a time


@triton.jit
def look_ahead_kernel(grad, mean, out, momentum, size, BLOCK: tl.constexpr):
    """Update BLOCK numbers of the mean, and write where it leads, in FP32 inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    m = tl.load(mean + at, mask=inside).to(tl.float32)
    m += (g - m) * (1 - momentum)
    tl.store(mean + at, m.to(mean.dtype.element_ty), mask=inside)
    tl.store(out + at, (g + (m - g) * momentum).to(out.dtype.element_ty), mask=inside)


@triton.jit
def move_kernel(weight, step, decay, length, size, BLOCK: tl.constexpr):
    """Shrink BLOCK numbers of a weight and move them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    w = tl.load(weight + at, mask=inside).to(tl.float32)
    s = tl.load(step + at, mask=inside).to(tl.float32)
    tl.store(weight + at, (w * decay - length * s).to(weight.dtype.element_ty), mask=inside)


@triton.jit
def mirrored_kernel(x, old, out, rows, columns, tiles, scale, more, TALL: tl.constexpr,
                    MORE: tl.constexpr, TILE: tl.constexpr, DEEP: tl.constexpr):
    """Compute a tile of scale x x^T + more old, on or below the diagonal, and write it twice.

    x: (n, rows, columns) in memory, or (n, columns, rows) if TALL; old, out: (n, rows, rows)
    The tiles of a matrix are counted row by row: i (i + 1) / 2 of them stand above row i.
    """
    n, number = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)  # a root may be rounded either way
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in tl.range(0, columns, DEEP, num_stages=3):
        if TALL:
            left = x.load([n, k, i * TILE]).reshape(DEEP, TILE).T
            right = x.load([n, k, j * TILE]).reshape(DEEP, TILE)
        else:
            left = x.load([n, i * TILE, k]).reshape(TILE, DEEP)
            right = x.load([n, j * TILE, k]).reshape(TILE, DEEP).T
        sums = tl.dot(left, right, sums)
    row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    start = n.to(tl.int64) * rows * rows
    place = start + row[:, None] * rows + column[None, :]
    sums *= scale
    if MORE:
        sums += more * tl.load(old + place, mask=inside).to(tl.float32)
    found = sums.to(out.dtype.element_ty)
    tl.store(out + place, found, mask=inside)
    if i > j:
        tl.store(out + start + column[:, None] * rows + row[None, :], found.T, mask=inside.T)


def look_ahead(grad: Tensor, mean: Tensor, momentum: float, out: Tensor) -> None:
    """Run `minids.kernels.muon.look_ahead`."""
    assert mean.is_contiguous() and out.is_contiguous()
    size = grad.numel()
    look_ahead_kernel[triton.cdiv(size, BLOCK),](grad.contiguous(), mean, out, momentum, size,
                                                 BLOCK=BLOCK)


def move(weight: Tensor, step: Tensor, decay: float, length: float) -> None:
    """Run `minids.kernels.muon.move`."""
    assert weight.is_contiguous()
    size = weight.numel()
    move_kernel[triton.cdiv(size, BLOCK),](weight, step.contiguous(), decay, length, size,
                                           BLOCK=BLOCK)
    torch.autograd.graph.increment_version(weight)  # as an operation of torch does


def mirrored(x: Tensor, scale: float, more: float) -> Tensor:
    """Return scale x x^T + more x, (n, r, c) -> (n, r, r), of which x is symmetric if `more`.

    x: in memory as it is, or transposed; its stored rows are whole multiples of 16 bytes
    The tiles above the diagonal are those below it, mirrored.
    """
    n, rows, columns = x.shape
    out = x.new_empty(n, rows, rows)
    tall = not x.is_contiguous()
    tile = TensorDescriptor.from_tensor(x.mT if tall else x,
                                        [1, DEEP, TILE] if tall else [1, TILE, DEEP])
    side = triton.cdiv(rows, TILE)
    tiles = side * (side + 1) // 2
    mirrored_kernel[n * tiles,](tile, x, out, rows, columns, tiles, scale, more, TALL=tall,
                                MORE=more != 0, TILE=TILE, DEEP=DEEP, num_warps=8)
    return out
