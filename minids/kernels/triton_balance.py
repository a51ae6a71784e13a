"""The sequence-wise balance loss and its gradient in Triton: one pass over the scores each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # of a program


@triton.jit
def sums_kernel(scores, counts, shares, S, PARTS, E: tl.constexpr, K: tl.constexpr,
                TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up, over TOKENS tokens of a sequence, who is among the K largest, and the shares."""
    part, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, e = part * TOKENS + tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (t < S) & (e < E)
    x = tl.load(scores + (sequence * S + t) * E + e, mask=inside, other=0.0)  # (TOKENS, E)
    total = tl.sum(x, 1)[:, None]
    share = tl.where(inside, x / tl.where(total > 0, total, 1.0), 0.0)
    left, count = tl.where(inside, x, float("-inf")), tl.zeros((TOKENS, BLOCK), tl.float32)
    for _ in tl.static_range(K):
        best = e == tl.argmax(left, 1)[:, None]
        count, left = count + tl.where(best & inside, 1.0, 0.0), tl.where(best, float("-inf"), left)
    to = (sequence * PARTS + part) * E + tl.arange(0, BLOCK)
    tl.store(counts + to, tl.sum(count, 0), mask=tl.arange(0, BLOCK) < E)
    tl.store(shares + to, tl.sum(share, 0), mask=tl.arange(0, BLOCK) < E)


@triton.jit
def gradient_kernel(scores, f, grad, scale, S, E: tl.constexpr, TOKENS: tl.constexpr,
                    BLOCK: tl.constexpr):
    """With p = s / sum(s): d/ds_i of sum f_i p_i is (f_i - sum f_j p_j) / sum(s)."""
    part, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, e = part * TOKENS + tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (t < S) & (e < E)
    at = (sequence * S + t) * E + e
    x = tl.load(scores + at, mask=inside, other=0.0)
    weight = tl.load(f + sequence * E + e, mask=e < E, other=0.0)  # (1, E)
    total = tl.sum(x, 1)[:, None]
    total = tl.where(total > 0, total, 1.0)
    mean = tl.sum(x * weight, 1)[:, None] / total
    tl.store(grad + at, (weight - mean) / total * tl.load(scale), mask=inside)


class Balance(torch.autograd.Function):
    """scores (B, S, E) FP32 -> the mean over sequences of sum f_i P_i; see `moe`."""

    @staticmethod
    def forward(ctx, scores: Tensor, k: int) -> Tensor:
        scores = scores.contiguous()
        (batch, length, experts), parts = scores.shape, triton.cdiv(scores.size(1), TOKENS)
        counts, shares = scores.new_empty(2, batch, parts, experts)
        block = triton.next_power_of_2(experts)
        sums_kernel[parts, batch](scores, counts, shares, length, E=experts, K=k, PARTS=parts,
                                  TOKENS=TOKENS, BLOCK=block)
        f = counts.sum(1) * (experts / k / length)  # (B, E)
        ctx.save_for_backward(scores, f)
        return (f * shares.sum(1)).sum() / (batch * length)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        scores, f = ctx.saved_tensors
        batch, length, experts = scores.shape
        out = torch.empty_like(scores)
        gradient_kernel[triton.cdiv(length, TOKENS), batch](
            scores, f, out, grad / (batch * length), length, E=experts, TOKENS=TOKENS,
            BLOCK=triton.next_power_of_2(experts))
        return out, None
