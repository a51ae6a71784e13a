"""Rotary position: pairs of a vector rotate by an angle that grows with their position.

Angles are computed in FP32, as in the official code, and never stored with the model: a table that
is cast along with the weights would rotate by the wrong angle.

YaRN (arXiv 2309.00071, section 3; V3 section 4.3) stretches the slow pairs to a longer context. It
is on exactly when the official code has it on: when max_seq_len exceeds original_seq_len.
"""

import math

import torch
from torch import Tensor

from minids.config import ModelArgs
from minids.kernels import rotary
from minids.kernels.registry import bodies


def rotary_frequencies(args: ModelArgs, device=None) -> Tensor:
    """Return the radians per position of each rotary pair: (qk_rope_head_dim / 2,) FP32."""
    width = args.qk_rope_head_dim
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / args.rope_theta ** (pairs / width)  # (qk_rope_head_dim / 2,)
    if not args.yarn:
        return freqs
    stretched = yarn_ramp(args, device)
    return freqs / args.rope_factor * stretched + freqs * (1 - stretched)


def yarn_ramp(args: ModelArgs, device=None) -> Tensor:
    """Return the share of each pair's frequency that rope_factor divides, 0 if fast, 1 if slow.

    A pair that rotates beta_fast times or more within the original context is left alone; one that
    rotates beta_slow times or less is stretched whole; between them the share rises linearly.
    """
    width = args.qk_rope_head_dim

    def pair_of(rotations: float) -> float:
        wavelengths = args.original_seq_len / (rotations * 2 * math.pi)
        return width * math.log(wavelengths) / (2 * math.log(args.rope_theta))

    low = max(math.floor(pair_of(args.beta_fast)), 0)
    high = min(math.ceil(pair_of(args.beta_slow)), width - 1)
    high = high + 0.001 if low == high else high
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    return ((pairs - low) / (high - low)).clamp(0, 1)


def softmax_scale(args: ModelArgs) -> float:
    """Return 1 / sqrt(query width), times YaRN's mscale^2 where YaRN is on (V3 section 4.3)."""
    scale = args.qk_head_dim ** -0.5
    if args.yarn and args.rope_factor > 1:
        scale *= (0.1 * args.mscale * math.log(args.rope_factor) + 1) ** 2
    return scale


def rotations(positions: Tensor, args: ModelArgs) -> Tensor:
    """Return the complex numbers that rotate each pair to its position, of YaRN's length or 1.

    positions: (.., S) int64, of tokens in their sequences -> (.., S, qk_rope_head_dim / 2)
    """
    freqs = rotary_frequencies(args, positions.device)
    angles = positions.unsqueeze(-1).float() * freqs  # (.., S, qk_rope_head_dim / 2)
    length = args.attention_factor if args.yarn else 1.0
    return torch.complex(length * angles.cos(), length * angles.sin())


@bodies(rotary.real_pairs)
def apply_rotary_emb(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), .. of every head, in FP32 or wider.

    x: (B, S, H, qk_rope_head_dim); rotation: (B or 1, S, qk_rope_head_dim / 2) complex
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if any(step % 2 for step in (wide.storage_offset(), *wide.stride()[:-1])):
        wide = wide.clone(memory_format=torch.contiguous_format)  # a slice beside an odd width
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (B, S, H, rope / 2)
    return torch.view_as_real(pairs * rotation.unsqueeze(-2)).flatten(-2).to(x.dtype)


def apply_rotary_emb_half(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (x_0, x_r/2), (x_1, x_r/2+1), .. instead: only V3.2's indexer does so."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = torch.complex(*wide.chunk(2, dim=-1)) * rotation.unsqueeze(-2)  # (B, S, H, rope / 2)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
