"""The gate's choice of experts as one kernel in Triton: bias, groups and all."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def in_best_groups(x, e, E: tl.constexpr, GROUPS: tl.constexpr, LIMIT: tl.constexpr,
                   COUNTED: tl.constexpr, GROUPS_BLOCK: tl.constexpr):
    """Return x, what one token's experts e are chosen by, with -inf outside its LIMIT best groups.

    A group counts by the sum of its COUNTED largest, 1 or 2.
    """
    if GROUPS > 1:
        nothing, g = float("-inf"), tl.arange(0, GROUPS_BLOCK)
        group, counts = e // (E // GROUPS), tl.full((GROUPS_BLOCK,), nothing, x.dtype)
        for i in tl.static_range(GROUPS):
            own = tl.where(group == i, x, nothing)
            total = tl.max(own, 0)
            if COUNTED == 2:
                total += tl.max(tl.where(e == tl.argmax(own, 0), nothing, own), 0)
            counts = tl.where(g == i, total, counts)
        kept = e < 0
        for _ in tl.static_range(LIMIT):
            best = tl.argmax(counts, 0)
            kept, counts = kept | (group == best), tl.where(g == best, nothing, counts)
        x = tl.where(kept, x, nothing)
    return x


@triton.jit
def choose_kernel(scores, bias, chosen, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
                  LIMIT: tl.constexpr, COUNTED: tl.constexpr, HAS_BIAS: tl.constexpr,
                  BLOCK: tl.constexpr, GROUPS_BLOCK: tl.constexpr):
    """Choose one token's K experts, the largest first, in its best groups."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    nothing = float("-inf")
    x = tl.load(scores + token * E + e, mask=e < E, other=nothing)
    if HAS_BIAS:
        x += tl.load(bias + e, mask=e < E, other=0.0)
    x = in_best_groups(x, e, E, GROUPS, LIMIT, COUNTED, GROUPS_BLOCK)
    for k in tl.static_range(K):
        best = tl.argmax(x, 0)
        tl.store(chosen + token * K + k, best.to(tl.int64))
        x = tl.where(e == best, nothing, x)


def choose(scores: Tensor, bias: Tensor | None, k: int, groups: int, limit: int) -> Tensor:
    """Run `Gate.choose`: (.., E) -> (.., k) int64; groups: how many, limit: how many to visit"""
    scores, experts = scores.contiguous(), scores.size(-1)
    chosen = torch.empty(*scores.shape[:-1], k, dtype=torch.int64, device=scores.device)
    choose_kernel[scores.numel() // experts,](
        scores, scores if bias is None else bias, chosen, E=experts, K=k, GROUPS=groups,
        LIMIT=limit, COUNTED=1 if bias is None else 2, HAS_BIAS=bias is not None,
        BLOCK=triton.next_power_of_2(experts), GROUPS_BLOCK=triton.next_power_of_2(groups),
        num_warps=1)
    return chosen
