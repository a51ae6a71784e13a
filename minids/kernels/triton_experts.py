"""Combine, and dispatch's gradient, as one pass in Triton: what torch does in three on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sum_slots_kernel(rows, slot, weights, out, width, K: tl.constexpr, WEIGHTED: tl.constexpr,
                     BLOCK: tl.constexpr):
    """Add up one token's K rows, BLOCK columns of them, in FP32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        at = tl.load(slot + token * K + k)
        row = tl.load(rows + at * width + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights + token * K + k).to(tl.float32)
        total += row
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


def sum_slots(rows: Tensor, slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows, weighted or not: rows (M, D), slot and weights (N, K) -> (N, D)"""
    rows, (tokens, k), width = rows.contiguous(), slot.shape, rows.size(1)
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    block = min(triton.next_power_of_2(width), 1024)
    sum_slots_kernel[tokens, triton.cdiv(width, block)](
        rows, slot.contiguous(), rows if weights is None else weights.contiguous(), out, width,
        K=k, WEIGHTED=weights is not None, BLOCK=block)
    return out
