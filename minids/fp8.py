"""FP8 as DeepSeek stores and computes it: E4M3 numbers, one scale for each small block.

E4M3 has 4 bits of exponent and 3 of mantissa: it spans 2^-9 to 448, to little more than one digit.
A tensor must be scaled to fit, and with one scale for a whole tensor a single outlier pushes the
small values below the range. So each scale serves few numbers (V3 section 3.3.2):
    activations  one scale per token and 128 channels (tiles of 1 x 128)
    weights      one scale per block of 128 x 128
The stored scale is the factor that restores the values ("scale_inv" in released files). DeepSeek-V3
stores scales in FP32; V3.1 and V3.2 round them up to powers of two (UE8M0: eight bits of exponent
and nothing else), so that scaling itself rounds nothing.

A linear layer has three products (V3 section 3.3.1), and each takes both of its factors in FP8:
    forward          y  = x W^T     x in tiles along its channels, W in blocks
    input gradient   dx = dy W      dy in tiles along its channels, W in the same blocks
    weight gradient  dW = dy^T x    both in tiles along the tokens; x is rounded a second time
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels import fp8 as kernels
from minids.kernels.fp8_layout import BLOCK, LEAST, LEAST_GRADIENT
from minids.kernels.precision import compute_dtype, without_autocast
from minids.kernels.registry import bodies

BAND = 8 * BLOCK  # rows of a matrix that are dequantized at a time
STEP = 32  # numbers that Hopper's FP8 units multiply and add at once
E4M3_MAX = 448.0


@bodies(kernels.tiles_in_one_pass)
def quantize_activation(x: Tensor, ue8m0: bool = False,
                        least: float = LEAST) -> tuple[Tensor, Tensor]:
    """Round to E4M3 with a scale for every 128 numbers of the last dimension.

    x: (.., n) -> (.., n) float8_e4m3fn, and the scales (.., ceil(n / 128)) FP32
    ue8m0: round the scales up to powers of two
    least: floor on a tile's largest absolute value; of gradients LEAST_GRADIENT
    """
    tiles = padded(x.float(), x.size(-1)).unflatten(-1, (-1, BLOCK))  # (.., blocks, 128)
    scale = block_scale(tiles.abs().amax(-1), ue8m0, least)  # (.., blocks)
    return to_e4m3(tiles / scale.unsqueeze(-1)).flatten(-2)[..., :x.size(-1)], scale


@bodies(kernels.blocks_in_one_pass)
def quantize_weight(w: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Round to E4M3 with a scale for every block of 128 rows and 128 columns.

    w: (r, c) -> (r, c) float8_e4m3fn, and the scales (ceil(r / 128), ceil(c / 128)) FP32
    ue8m0: as in `quantize_activation`
    """
    wide = padded(w.float(), *w.shape)
    blocks = wide.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (R, 128, C, 128)
    scale = block_scale(blocks.abs().amax((1, 3)), ue8m0, LEAST)  # (R, C)
    q = to_e4m3(blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return q[:w.size(0), :w.size(1)], scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Undo `quantize_activation` or `quantize_weight`, whichever the shape of `scale` fits.

    q: (.., n) float8_e4m3fn; scale: FP32 or float8_e8m0fnu, (.., ceil(n / 128)) for tiles or
        (ceil(r / 128), ceil(c / 128)) for blocks
    Returns FP32 of q's shape. Raises ValueError if the shapes do not belong together.
    """
    tiles = -(-q.size(-1) // BLOCK)
    if scale.shape == (*q.shape[:-1], tiles):
        rows = scale.float()
    elif q.dim() == 2 and scale.shape == (-(-q.size(0) // BLOCK), tiles):
        rows = scale.float().repeat_interleave(BLOCK, dim=0)[:q.size(0)]  # (r, C)
    else:
        raise ValueError(f"scale of shape {list(scale.shape)} does not belong to values of shape "
                         f"{list(q.shape)} in tiles of 1 x {BLOCK} or blocks of {BLOCK} x {BLOCK}")
    return q.float() * rows.repeat_interleave(BLOCK, dim=-1)[..., :q.size(-1)]


def dequantize_into(target: Tensor, q: Tensor, scale: Tensor) -> None:
    """Dequantize a matrix with scales for blocks into `target`, (r, c), in the target's precision.

    Band by band: FP32 copies of the whole matrix would take five times its memory.
    """
    for own, rows, blocks in zip(target.split(BAND), q.split(BAND), scale.split(BAND // BLOCK),
                                 strict=True):
        own.copy_(dequantize(rows, blocks))


def padded(x: Tensor, *sizes: int) -> Tensor:
    """Pad the last dimensions, of these sizes, with zeros up to whole blocks."""
    pads = [(0, -size % BLOCK) for size in reversed(sizes)]
    return F.pad(x, [n for pad in pads for n in pad])


def block_scale(largest: Tensor, ue8m0: bool, least: float) -> Tensor:
    """Return the scale that brings a block's largest value to 448, or to 224 at least if UE8M0."""
    # Divide by a tensor: a GPU would multiply by a rounded reciprocal of a plain number.
    scale = largest.clamp(min=least) / largest.new_tensor(E4M3_MAX)
    return next_power_of_two(scale) if ue8m0 else scale


def next_power_of_two(x: Tensor) -> Tensor:
    """Return 2^ceil(log2 x) exactly, from the exponent: a rounded logarithm can miss by one."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def to_e4m3(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 number, ties to even, at most 448 in size."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Return A B^T of two matrices in FP8, added up in FP32: (n, m).

    a: (n, k) and b: (m, k) float8_e4m3fn, each with the scales of its tiles or blocks
    A Hopper GPU multiplies in FP8; anywhere else the product of the same rounded numbers is taken
    in FP32, which holds the product of two E4M3 numbers exactly. The results differ by what the
    GPU's adders round away within 128 numbers, see `limited_sum`.
    """
    if has_fp8_units(a.device):
        return gemm_on_hopper(a, a_scale, b, b_scale)
    with without_autocast(a):
        return dequantize(a, a_scale) @ dequantize(b, b_scale).T


@functools.cache
def has_fp8_units(device: torch.device) -> bool:
    """Return whether the GPU multiplies FP8 with scales for tiles and blocks: Hopper does."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def gemm_on_hopper(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Compute `fp8_gemm` by the GPU's FP8 units, which move sums to FP32 every 128 numbers."""
    n, m = len(a), len(b)
    a, a_scale, a_kind = as_hopper_wants(a, a_scale)
    b, b_scale, b_kind = as_hopper_wants(b, b_scale)
    return F.scaled_mm(a, b.t(), a_scale, a_kind, b_scale, b_kind,
                       output_dtype=torch.float32)[:n, :m]


def as_hopper_wants(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, F.ScalingType]:
    """Return whole blocks of values, the scales in the kernel's order, and their kind."""
    is_tiles = len(scale) == len(q)
    q = padded(q.contiguous().view(torch.uint8), *q.shape).view(q.dtype)  # byte 0 is the number 0
    if is_tiles:
        scale = F.pad(scale, (0, 0, 0, len(q) - len(scale)))
        columns = scale.new_empty(scale.size(1), len(q)).copy_(scale.t())  # also of one tile
        return q, columns.t(), F.ScalingType.BlockWise1x128
    return q, F.pad(scale, (0, -scale.size(1) % 4)).contiguous().t(), F.ScalingType.BlockWise128x128


def limited_sum(a: Tensor, b: Tensor, bits: int = 14, promote: int = BLOCK) -> Tensor:
    """Return A B^T as Hopper's FP8 units add it up, with DeepSeek's remedy (V3 section 3.3.2).

    The units multiply exactly but hold only about 14 bits of a sum: an addend that is small beside
    the sum so far is lost. Moved to FP32 every `promote` numbers, a sum never grows large.

    a: (n, k), b: (m, k), the values without scales -> (n, m) FP32
    promote: numbers after which a partial sum is added to an FP32 one; k or more: never
    """
    total = partial = torch.zeros(len(a), len(b), device=a.device)
    for start in range(0, a.size(1), STEP):
        part = slice(start, start + STEP)
        partial = truncated(partial + a[:, part].float() @ b[:, part].float().T, bits)
        if (start + STEP) % promote == 0:
            total, partial = total + partial, torch.zeros_like(total)
    return total + partial


def truncated(x: Tensor, bits: int) -> Tensor:
    """Truncate x to its first `bits` significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2 ** bits), exponent - bits)


class FP8Linear(torch.autograd.Function):
    """x W^T with all three products in FP8; what it saves for the backward pass is FP8 too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.dtypes = x.dtype, weight.dtype
        rows, blocks = quantize_activation(x.flatten(0, -2)), quantize_weight(weight)
        ctx.save_for_backward(*rows, *blocks)
        return fp8_gemm(*rows, *blocks).to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        dy, least = grad.flatten(0, -2), LEAST_GRADIENT
        dx = fp8_gemm(*quantize_activation(dy, least=least), w.T, w_scale.T)
        along_tokens = quantize_activation(dequantize(x, x_scale).T)
        dw = fp8_gemm(*quantize_activation(dy.T, least=least), *along_tokens)
        return dx.to(ctx.dtypes[0]).view(*grad.shape[:-1], w.size(1)), dw.to(ctx.dtypes[1])


@bodies(kernels.linear_in_kernels)
def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in FP8, forward and backward. x: (.., k), weight: (m, k) -> (.., m)

    Under autocast x comes in its type and y goes out in it, as with any product.
    """
    return FP8Linear.apply(x.to(compute_dtype(x)), weight)


def rounded_to_fp8(x: Tensor) -> Tensor:
    """Round each 128 numbers to E4M3 and back, scaled by powers of two; the gradient passes."""
    rounded = dequantize(*quantize_activation(x.detach(), ue8m0=True)).to(x.dtype)
    return x + (rounded - x).detach()  # exactly `rounded`, as it lies within a factor of 2, or is 0
