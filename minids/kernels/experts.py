"""The routed experts: dispatch, combine and grouped products, each in one pass over its rows.

On a GPU a layer in training is one body, `weighted_inside`, with fewer passes: w1 and w3 are one
product, and a pair's weight goes to its hidden vector, since w (W2 h) = W2 (w h). What comes out of
the experts is then only added up, so that its gradient is a copy of the tokens' gradients.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from minids.kernels.precision import compute_dtype, in_fp32, wide
from minids.kernels.registry import REGISTRY, body


@body(lambda x, source, slot: torch.is_grad_enabled() and x.requires_grad)
def dispatch_by_slot(x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
    """Copy tokens to their slots by `Dispatch`."""
    return Dispatch.apply(x, source, slot)


@body(lambda rows, slot, weights: True)
def combine_in_one_pass(rows: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
    """Sum each token's slots by `Combine`."""
    return Combine.apply(rows, slot, weights)


class Dispatch(torch.autograd.Function):
    """Copy tokens to their slots: (N, D) -> (M, D). The gradient adds up each token's slots,
    which is faster than adding into the tokens, and on a GPU adds in the same order every time."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_slots(grad, ctx.saved_tensors[0]), None, None


class Combine(torch.autograd.Function):
    """Each token's weighted sum over its slots: rows (M, D), slot and weights (N, K) -> (N, D)."""

    @staticmethod
    def forward(ctx, rows: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slot, weights)
        return sum_slots(rows, slot, weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, slot, weights = ctx.saved_tensors
        slots, each = slot.flatten(), grad.unsqueeze(1)  # (N*K,), (N, 1, D)
        d_rows = torch.zeros_like(rows)
        d_rows.index_copy_(0, slots, (each * weights.unsqueeze(-1)).flatten(0, 1))
        out = rows.index_select(0, slots).view(*slot.shape, rows.size(1))  # (N, K, D)
        return d_rows, None, (out * each).sum(-1)


class SumSlots(torch.autograd.Function):
    """Each token's sum over its slots, (M, D) -> (N, D). The gradient copies each token's to its
    slots; a slot without a pair gets some token's, and has to be multiplied by zero elsewhere."""

    @staticmethod
    def forward(ctx, rows: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return sum_slots(rows, slot)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def sum_slots(rows: Tensor, slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows, weighted or not: rows (M, D), slot and weights (N, K) -> (N, D)"""
    if rows.device.type == "cpu":  # one pass, measured five times as fast as gather and sum
        return F.embedding_bag(slot, rows, mode="sum", per_sample_weights=weights)
    if in_fp32(rows) and not is_compiling():  # a compiler makes such a kernel itself
        from minids.kernels import triton_experts
        return triton_experts.sum_slots(rows, slot, weights)
    parts = [rows[own].to(wide(rows)) for own in slot.unbind(1)]  # one pass to a compiler
    if weights is not None:
        parts = [part * own.unsqueeze(-1) for part, own
                 in zip(parts, weights.unbind(1), strict=True)]
    return sum(parts).to(rows.dtype)


def takes_grouped(x: Tensor, weight: Tensor, counts: Tensor) -> bool:
    """Return whether torch's kernel takes this precision on this device, and rows of this width."""
    dtype = compute_dtype(x)
    on_cpu = x.device.type == "cpu" and not is_compiling()  # a compiler knows BF16 only
    known = dtype == torch.bfloat16 or (dtype == torch.float32 and on_cpu)
    return known and all(width * dtype.itemsize % 16 == 0 for width in weight.shape[1:])


@body(takes_grouped)
def grouped_fused(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply all experts' rows in one kernel: BF16 anywhere, FP32 on a CPU."""
    dtype = compute_dtype(x)
    offsets = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x.to(dtype), weight.to(dtype).transpose(1, 2), offs=offsets)


def trains_on_gpu(moe, x: Tensor, weights: Tensor, indices: Tensor) -> bool:
    """Return whether a GPU trains these experts in BF16 or FP8, one process's and not a rank's."""
    experts = moe.experts
    if x.device.type != "cuda" or not torch.is_grad_enabled() or compute_dtype(x) != torch.bfloat16:
        return False
    if in_fp8(experts):
        return experts.in_kernels(x)
    return "product" not in vars(experts) and all(
        takes_grouped(x, w, indices) for w in (experts.w1, experts.w2))


@body(trains_on_gpu)
def weighted_inside(moe, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Run `MoE.routed` for training on a GPU: x (N, D), weights and indices (N, K) -> (N, D)"""
    dtype = compute_dtype(x)
    source, slot, counts = REGISTRY["moe.sort_by_expert"](indices, len(moe.experts.w2))
    up, down = products(moe.experts, dtype, source, slot, counts)
    x1, x3 = up(x.to(dtype)).chunk(2, dim=-1)  # (M, moe_inter_dim)
    share = weights.new_zeros(len(source)).scatter(0, slot.flatten(), weights.flatten())  # (M,)
    return down(weighed(x1, x3, share))  # 0 in a slot without a pair


def products(experts, dtype: torch.dtype, source: Tensor, slot: Tensor,
             counts: Tensor) -> tuple[Callable, Callable]:
    """Return how experts multiply tokens, dispatched, by [w1; w3], and rows by w2, added up for
    each token: their own way, or in BF16."""
    if in_fp8(experts):
        return experts.from_tokens(source, slot, counts)
    w13, w2 = matrices(experts, dtype)
    return (lambda x: grouped_fused(Dispatch.apply(x, source, slot), w13, counts),
            lambda x: SumSlots.apply(grouped_fused(x, w2, counts), source, slot))


def in_fp8(experts) -> bool:
    """Return whether these are `minids.apply.fp8.ExpertsInFP8`."""
    return hasattr(experts, "from_tokens")


def weighed(x1: Tensor, x3: Tensor, share: Tensor) -> Tensor:
    """Return SwiGLU's hidden vectors (M, moe_inter_dim), each times its weight; share: (M,)"""
    return (F.silu(x1.to(wide(x1))) * x3 * share.unsqueeze(-1)).to(x1.dtype)


def matrices(experts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return [w1; w3], (E, 2 moe_inter_dim, D), and w2: copies that belong to the optimizer's step
    (`minids.apply.precision`), or made here."""
    copies = getattr(experts, "copies", None)
    if copies is not None:
        return copies
    return torch.cat([experts.w1.to(dtype), experts.w3.to(dtype)], dim=1), experts.w2.to(dtype)
