"""FP8 on a GPU that has units for it: rounding, a linear layer's three products, all experts'.

The passes over memory of one layer, x (N, K) and w (M, K), where BF16 has its three products alone:

    forward    x -> tiles along its rows, and of what these leave tiles along the tokens, transposed
               w -> blocks, as it is and transposed;    y = x w^T
    backward   dy -> tiles along its rows, and tiles along the tokens, transposed
               dx = dy w;    dw = dy^T x

For the backward pass only the transposed copies are kept, one byte per number: the same bytes as
of the simulation in `minids.fp8`, whose rounded numbers these are bit for bit. Experts run as one
layer whose row tiles belong to one expert each (`fp8_layout.Groups`); no number of rows is asked of
the device. w1 and w3 are one matrix to them: x is rounded once, and dx is one sum. A token's row is
fetched for each of its experts while it is rounded, and so is its gradient: no copies of them are
written. Each direction is one operation for a compiler, which then compiles around it.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from minids.kernels.experts import sum_slots
from minids.kernels.fp8_layout import (
    BLOCK,
    LEAST,
    LEAST_GRADIENT,
    Groups,
    Slots,
    group_tiles,
    in_fours,
    in_gluon,
    on_hopper,
    whole,
)
from minids.kernels.precision import INTERPRETED, TRITON, compute_dtype
from minids.kernels.registry import body

OLDEST = 8, 9  # compute capability: Ada, the first with FP8 units
KINDS = torch.bfloat16, torch.float16, torch.float32


def capability(device: int) -> tuple[int, int]:
    """Return a GPU's compute capability; a compiler asks once."""
    return torch.cuda.get_device_capability(device)


def is_older(device: int) -> bool:
    """Return whether a GPU is older than the first with FP8 units; a compiler asks once."""
    return capability(device) < OLDEST


capability._dynamo_marked_constant = is_older._dynamo_marked_constant = True


def missing(device: torch.device) -> str:
    """Return what a device lacks for these kernels, or nothing."""
    if not TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return "only a GPU has units for it"
    if is_older(device.index or 0):
        return ("the card has compute capability {}.{}, and units for it come with {}.{}"
                .format(*capability(device.index or 0), *OLDEST))
    return ""


def run_on(device: torch.device) -> bool:
    """Return whether these kernels run on a device."""
    return not missing(device)


def takes(*inputs: Tensor) -> bool:
    """Return whether these kernels round the inputs."""
    return run_on(inputs[0].device) and all(x.dtype in KINDS and x.numel() > 0 for x in inputs)


@body(lambda x, ue8m0=False, least=LEAST: takes(x))
def tiles_in_one_pass(x: Tensor, ue8m0: bool = False,
                      least: float = LEAST) -> tuple[Tensor, Tensor]:
    """Run `quantize_activation`."""
    rows = x.reshape(-1, x.size(-1))
    q, scale = round_activation(rows, ue8m0, least)
    return (q[:len(rows), :x.size(-1)].reshape(x.shape),
            scale.t()[:len(rows)].reshape(*x.shape[:-1], len(scale)))


@body(lambda w, ue8m0=False: takes(w))
def blocks_in_one_pass(w: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Run `quantize_weight`."""
    q, scale = (t[0] for t in round_weights([w[None]], False, ue8m0)[:2])
    return q[:w.size(0), :w.size(1)], scale[:, :-(-w.size(1) // BLOCK)]


@body(lambda x, weight: takes(x, weight))
def linear_in_kernels(x: Tensor, weight: Tensor) -> Tensor:
    """Run `fp8_linear`."""
    y = multiplied(x.flatten(0, -2), [weight.unsqueeze(0)], ())
    return y.view(*x.shape[:-1], len(weight))


@body(lambda x, weight, counts: takes(x, weight))
def grouped_in_kernels(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Run `fp8_grouped_linear`; rows past the last expert's hold nothing of meaning."""
    return multiplied(x, [weight], group_tiles(counts, len(x)))


@body(lambda x, first, second, counts: takes(x, first, second) and first.size(1) % BLOCK == 0)
def pair_in_kernels(x: Tensor, first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Run `fp8_grouped_pair`."""
    return multiplied(x, [first, second], group_tiles(counts, len(x)))


class Rounded(NamedTuple):
    """Stacks of matrices (E, M, K) side by side, in blocks, as products read them."""

    q: Tensor  # (E, M, K) in whole blocks
    scale: Tensor  # (E, M / 128, K / 128 in fours)
    q_t: Tensor  # (E, K, M), for the input's gradient; empty where none follows
    scale_t: Tensor


def multiplied(x: Tensor, weights: list[Tensor], groups: Sequence[Tensor],
               rounded: Rounded | None = None, tokens: str = "",
               slots: Slots = (None, None)) -> Tensor:
    """Multiply rows, in the type that a product has here, by matrices side by side.

    rounded: the weights, if they are rounded already
    tokens: what has a row per token, where everything else has one per slot: "x", whose rows are
        fetched, or "y", the result, whose rows are added up; slots: of these tokens
    """
    learns = torch.is_grad_enabled() and (x.requires_grad or weights[0].requires_grad)
    if rounded is None:
        rounded = round_weights([w.detach() for w in weights], learns, False)
    height = sum(w.size(1) for w in weights)
    return InKernels.apply(x.to(compute_dtype(x)), learns, height, len(weights), tokens, *slots,
                           *rounded, *weights, *groups)


class InKernels(torch.autograd.Function):
    """Rows by matrices, x (N, K) and stacks of weights (E, M, K) -> (N, M each), with gradients.

    keep: whether a backward pass follows; height: M of all stacks; tokens: of `multiplied`, and its
    slots; then `Rounded`, the stacks that were rounded, and groups of `group_tiles` or none
    """

    @staticmethod
    def forward(ctx, x: Tensor, keep: bool, height: int, stacks: int, tokens: str,
                source: Tensor | None, slot: Tensor | None, q: Tensor, scale: Tensor, q_t: Tensor,
                scale_t: Tensor, *tensors: Tensor) -> Tensor:
        weights, groups = tensors[:stacks], list(tensors[stacks:])
        y, *kept = forward(x, q, scale, height, keep, groups, source if tokens == "x" else None)
        other_way = {"": [], "x": [slot], "y": [source]}[tokens]
        ctx.save_for_backward(*kept, q_t, scale_t, *groups, *other_way)
        ctx.stacks, ctx.width, ctx.dtype, ctx.tokens = stacks, x.size(1), weights[0].dtype, tokens
        return sum_slots(y, slot) if tokens == "y" else y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, groups = ctx.saved_tensors[:4], list(ctx.saved_tensors[4:])
        place = groups.pop() if ctx.tokens else None
        for_x, for_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[11]
        found = backward(grad, *kept, ctx.stacks, ctx.width, ctx.dtype, for_x, for_weight, groups,
                         place if ctx.tokens == "y" else None)
        dx, *dw = found if for_x else [None, *found]
        if for_x and ctx.tokens == "x":
            dx = sum_slots(dx, place)
        return (dx, *[None] * 10, *(dw if for_weight else [None] * ctx.stacks),
                *[None] * len(groups))


@custom_op("minids::fp8_tiles", mutates_args=())
def round_activation(x: Tensor, ue8m0: bool, least: float) -> tuple[Tensor, Tensor]:
    """Round x (N, D) along its rows: q (N, D) and scales (D / 128, N), in whole tiles."""
    from minids.kernels.triton_fp8 import round_tiles
    return round_tiles(x, True, ue8m0=ue8m0, least=least)[:2]


@custom_op("minids::fp8_blocks", mutates_args=())
def round_weights(weights: Sequence[Tensor], transposed: bool, ue8m0: bool
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return stacks of matrices (E, M, K), M in whole blocks if there are several, as `Rounded`."""
    from minids.kernels.triton_fp8 import round_blocks
    return round_blocks(weights, columns=transposed, ue8m0=ue8m0)


@custom_op("minids::fp8_forward", mutates_args=())
def forward(x: Tensor, w: Tensor, w_scale: Tensor, height: int, keep: bool,
            groups: Sequence[Tensor], source: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's products (N, height) in x's type, and x for `backward`, as it reads it.

    source: (N,), the row of x that each row is
    """
    from minids.kernels.triton_fp8 import NOT, OF_ROUNDED, round_tiles
    own, rows = Groups(*groups) if groups else None, len(x) if source is None else len(source)
    q, scale, *kept = round_tiles(x, True, OF_ROUNDED if keep else NOT, groups=own, source=source)
    return multiply(q, scale, w, w_scale, rows, height, x.dtype, own), *kept


@custom_op("minids::fp8_backward", mutates_args=())
def backward(grad: Tensor, x_t: Tensor, x_scale: Tensor, w_t: Tensor, w_scale: Tensor, stacks: int,
             width: int, dtype: torch.dtype, for_x: bool, for_weight: bool,
             groups: Sequence[Tensor], source: Tensor | None) -> list[Tensor]:
    """Return the gradients that are wanted: of x (N, width), and of each stack, of a type.

    source: (N,), the row of grad that each row is
    """
    from minids.kernels.triton_fp8 import NOT, OF_X, round_tiles
    own, found = Groups(*groups) if groups else None, []
    rows = len(grad) if source is None else len(source)
    q, scale, q_t, scale_t = round_tiles(grad, for_x, OF_X if for_weight else NOT,
                                         least=LEAST_GRADIENT, groups=own, source=source)
    if for_x:
        found.append(multiply(q, scale, w_t, w_scale, rows, width, grad.dtype, own))
    height = grad.size(1) // stacks
    for first in range(0, grad.size(1), height) if for_weight else ():
        part = slice(first, first + whole(height))
        found.append(multiply_over_tokens(q_t[part], scale_t[:, part], x_t, x_scale, height, width,
                                          dtype, own))
    return found


def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int, width: int,
             dtype: torch.dtype, groups: Groups | None) -> Tensor:
    """Multiply rows in tiles by matrices in blocks: by torch's kernel on Hopper, if by one matrix.
    """
    if groups is None and on_hopper(a):
        return scaled_mm(a, a_scale, b[0], b_scale[0], F.ScalingType.BlockWise128x128, rows, width,
                         dtype)
    return products(a).product(a, a_scale, b, b_scale, rows, width, dtype, groups)


def multiply_over_tokens(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, height: int,
                         width: int, dtype: torch.dtype, groups: Groups | None) -> Tensor:
    """Multiply two matrices in tiles along tokens, the same way: (E, height, width)"""
    if groups is None and on_hopper(a):
        kind = F.ScalingType.BlockWise1x128
        return scaled_mm(a, a_scale, b, b_scale, kind, height, width, dtype).unsqueeze(0)
    return products(a).over_tokens(a, a_scale, b, b_scale, height, width, dtype, groups)


def products(x: Tensor) -> ModuleType:
    """Return the kernels that multiply on a tensor's device."""
    kind = "hopper" if in_gluon(x) else "products"
    return importlib.import_module(f"minids.kernels.triton_fp8_{kind}")


def scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, kind: "F.ScalingType",
              rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return A B^T by torch's kernel, whose results are BF16 or FP32."""
    own = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    out = F.scaled_mm(a, b.t(), a_scale.t(), F.ScalingType.BlockWise1x128, b_scale.t(), kind,
                      output_dtype=own)
    return out[:rows, :width].to(dtype).contiguous()


# What a compiler has to know of each operation: shapes and types.

def numbers(like: Tensor, *shape: int) -> Tensor:
    """Return E4M3 numbers of a shape."""
    return like.new_empty(shape, dtype=torch.float8_e4m3fn)


def scales(like: Tensor, *shape: int) -> Tensor:
    """Return scales of a shape."""
    return like.new_empty(shape, dtype=torch.float32)


@round_activation.register_fake
def _(x, ue8m0, least):
    rows, width = (whole(size) for size in x.shape)
    return numbers(x, rows, width), scales(x, width // BLOCK, rows)


@round_weights.register_fake
def _(weights, transposed, ue8m0):
    experts, _, width = weights[0].shape
    high, wide = sum(whole(w.size(1)) for w in weights), whole(width)
    turned, w = experts * transposed, weights[0]
    return (numbers(w, experts, high, wide), scales(w, experts, high // BLOCK, in_fours(wide)),
            numbers(w, turned, wide, high), scales(w, turned, wide // BLOCK, in_fours(high)))


@forward.register_fake
def _(x, w, w_scale, height, keep, groups, source):
    wide, rows = whole(x.size(1)), len(x) if source is None else len(source)
    tiles = keep * (len(groups[0]) if groups else whole(rows) // BLOCK)
    return x.new_empty(rows, height), numbers(x, wide, tiles * BLOCK), scales(x, tiles, wide)


@backward.register_fake
def _(grad, x_t, x_scale, w_t, w_scale, stacks, width, dtype, for_x, for_weight, groups, source):
    shape, rows = (len(w_t), grad.size(1) // stacks, width), len(grad if source is None else source)
    dw = [grad.new_empty(shape, dtype=dtype) for _ in range(stacks * for_weight)]
    return [grad.new_empty(rows, width)] * for_x + dw
