"""FP8 as DeepSeek stores and computes it: E4M3 numbers, one scale for each small block.

E4M3 has 4 bits of exponent and 3 of mantissa: it reaches from 2^-9 to 448 and keeps two digits at
best. A tensor fits into it only if it is scaled, and one scale for a whole tensor lets a single
outlier push the small values below the reach. So each scale serves few numbers (V3 section 3.3.2):
    activations  one for each token and 128 channels (tiles of 1 x 128)
    weights      one for each block of 128 x 128
The scale that is kept is the factor to multiply by on the way back ("scale_inv" in released files).
DeepSeek-V3 keeps scales in FP32; V3.1 and V3.2 round them up to powers of two (UE8M0: eight bits of
exponent and nothing else), so that scaling itself rounds nothing.

The arithmetic is that of DeepSeek's inference kernels. Products in FP8 are not here yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # channels in a tile, rows and columns in a block
E4M3_MAX = 448.0
LEAST = 1e-4  # taken for the largest value of a block that holds nothing larger


def quantize_activation(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Round to E4M3 with a scale for every 128 numbers of the last dimension.

    x: (.., n) -> (.., n) float8_e4m3fn, and the scales (.., ceil(n / 128)) FP32
    ue8m0: round the scales up to powers of two
    """
    tiles = padded(x.float(), x.size(-1)).unflatten(-1, (-1, BLOCK))  # (.., blocks, 128)
    scale = block_scale(tiles.abs().amax(-1), ue8m0)  # (.., blocks)
    return to_e4m3(tiles / scale.unsqueeze(-1)).flatten(-2)[..., :x.size(-1)], scale


def quantize_weight(w: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Round to E4M3 with a scale for every block of 128 rows and 128 columns.

    w: (r, c) -> (r, c) float8_e4m3fn, and the scales (ceil(r / 128), ceil(c / 128)) FP32; 576 rows
    make five rows of blocks
    ue8m0: round the scales up to powers of two
    """
    wide = padded(w.float(), *w.shape)
    blocks = wide.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (R, 128, C, 128)
    scale = block_scale(blocks.abs().amax((1, 3)), ue8m0)  # (R, C)
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


def padded(x: Tensor, *sizes: int) -> Tensor:
    """Zeros after the last dimensions, of these sizes, up to whole blocks."""
    pads = [(0, -size % BLOCK) for size in reversed(sizes)]
    return F.pad(x, [n for pad in pads for n in pad])


def block_scale(largest: Tensor, ue8m0: bool) -> Tensor:
    """The scale that brings a block's largest value to 448, or, if a power of two, to 224 at least.

    largest: FP32, of any shape
    """
    # Divided by a tensor, for a GPU multiplies by a rounded reciprocal of a plain number.
    scale = largest.clamp(min=LEAST) / largest.new_tensor(E4M3_MAX)
    return next_power_of_two(scale) if ue8m0 else scale


def next_power_of_two(x: Tensor) -> Tensor:
    """2^ceil(log2 x), exactly: taken from the exponent, for a rounded logarithm can miss by one."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def to_e4m3(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 number, ties to even, at most 448 in size."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
