"""Rotary position against literal rotations, and YaRN against its published numbers."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import gap

from minids import ModelArgs, Transformer
from minids.model.rope import (
    apply_rotary_emb,
    rotary_frequencies,
    rotations,
    softmax_scale,
    yarn_ramp,
)

V3 = ModelArgs.preset("v3")
SHORT = replace(V3, max_seq_len=4096)  # the same model before its context was stretched


def literal_rotation(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Pair i of the vector at position p turned by p theta^(-2i/width), number by number."""
    y = torch.zeros_like(x)
    width = x.size(-1)
    for b, p, h in ((b, p, h) for b in range(len(x)) for p in range(x.size(1))
                    for h in range(x.size(2))):
        for i in range(width // 2):
            angle = p * theta ** (-2 * i / width)
            a, c = x[b, p, h, 2 * i].item(), x[b, p, h, 2 * i + 1].item()
            y[b, p, h, 2 * i] = a * math.cos(angle) - c * math.sin(angle)
            y[b, p, h, 2 * i + 1] = a * math.sin(angle) + c * math.cos(angle)
    return y


def half_split(x, rotation):
    """The layout of other model families: pairs (x_i, x_{i + width/2})."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rotation.real.unsqueeze(-2), rotation.imag.unsqueeze(-2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def turned_back(x, rotation):
    return apply_rotary_emb(x, rotation.conj())


def rotation_error(rotate) -> float:
    """Return how far rotate(x, rotation) is from the literal rotation."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 3, 64, dtype=torch.float64)
    return gap(rotate(x, rotations(torch.arange(40)[None], SHORT)), literal_rotation(x, 10000.0))


def test_rotations_have_the_length_that_yarn_gives_them():
    positions = torch.arange(0, 5000, 7)
    for args, length in ((V3, 1.0), (replace(V3, attention_factor=1.5), 1.5),
                         (replace(SHORT, attention_factor=1.5), 1.0)):
        lengths = rotations(positions, args).abs()
        assert torch.allclose(lengths, torch.full_like(lengths, length), atol=1e-6)  # FP32


def test_interleaved_pairs_turn_by_the_literal_angle():
    # The angle is FP32: at position 39 it is off by at most 39 * 2^-23 = 5e-6.
    assert rotation_error(apply_rotary_emb) < 5e-6


@pytest.mark.parametrize("wrong", [half_split, turned_back])
def test_another_layout_or_direction_is_caught(wrong):
    assert rotation_error(wrong) > 0.1


def score_drift(rotate_q, rotate_k) -> float:
    """Return how much the score of two tokens changes when both move by the same distance."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)

    def score(m, n):
        at = [rotations(torch.tensor([[p]]), SHORT) for p in (m, n)]
        return (rotate_q(q, at[0]) * rotate_k(k, at[1])).sum().item()

    return max(abs(score(m + s, n + s) - score(m, n))
               for m, n in ((5, 2), (9, 9), (40, 0)) for s in (1, 17, 100))


def test_scores_depend_on_the_distance_only():
    # Scores are around 8 and angles below 140 are off by at most 140 * 2^-23 = 2e-5 each.
    assert score_drift(apply_rotary_emb, apply_rotary_emb) < 5e-4


@pytest.mark.parametrize("wrong", [
    (apply_rotary_emb, lambda k, rotation: k),  # the key stays where it is
    (apply_rotary_emb, turned_back),
    (half_split, apply_rotary_emb),  # query and key in different layouts
])
def test_absolute_positions_are_caught(wrong):
    assert score_drift(*wrong) > 0.1


@pytest.mark.parametrize("begin, end, width", [(0, 8, 9), (1, 9, 9), (1, 9, 10), (3, 11, 13)])
@pytest.mark.parametrize("batch, length", [(1, 1), (2, 3)])
def test_a_slice_beside_an_odd_width_is_rotated_alike(begin, end, width, batch, length):
    rotation = rotations(torch.arange(length)[None], replace(SHORT, qk_rope_head_dim=8))
    x = torch.randn(batch, length, 2, width)[..., begin:end]
    assert torch.equal(apply_rotary_emb(x, rotation), apply_rotary_emb(x.clone(
        memory_format=torch.contiguous_format), rotation))


def test_rotation_keeps_lengths_shape_and_precision():
    rotation = rotations(torch.arange(7).expand(2, 7), SHORT)  # (B, S, ..): one row a sequence
    for dtype, error in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2 ** -8)):
        x = torch.randn(2, 7, 3, 64).to(dtype)
        y = apply_rotary_emb(x, rotation)
        assert y.shape == x.shape and y.dtype == dtype
        # Computed in FP32 and rounded once: BF16 is off by half a unit in the last place.
        exact = apply_rotary_emb(x.double(), rotation)
        assert ((y.double() - exact).abs() <= error * 1.01 * exact.abs() + 1e-6).all()


# Pair: frequency, for width 64, base 10000, 4096 tokens stretched 40 times (arXiv 2309.00071).
YARN = {0: 1.0, 10: 0.0562341, 16: 0.0055, 23: 3.33380e-5, 31: 3.33380e-6}


def yarn_misses(freqs: torch.Tensor) -> list[int]:
    """The pairs whose frequency is not the published one (six digits are given)."""
    return [i for i, f in YARN.items() if abs(freqs[i].item() / f - 1) > 2e-6]


def test_yarn_has_the_published_frequencies():
    assert yarn_misses(rotary_frequencies(V3)) == []
    ramp = yarn_ramp(V3)
    assert (ramp[:11] == 0).all() and (ramp[23:] == 1).all()  # low 10, high 23
    blended = (torch.arange(11, 23) - 10) / 13
    torch.testing.assert_close(ramp[11:23], blended)  # FP32 division on both sides


def test_the_softmax_is_sharpened_from_any_stretch_on():
    scales = [softmax_scale(replace(V3, rope_factor=factor)) for factor in (1.0, 1.5, 2.0, 4.0)]
    assert scales == sorted(set(scales))
    assert scales[1] / scales[0] == pytest.approx((0.1 * V3.mscale * math.log(1.5) + 1) ** 2)


def test_a_ramp_without_width_is_a_step():
    """With so short an original context both ends of the ramp fall on pair 0: no 0 / 0."""
    args = replace(V3, original_seq_len=6)
    assert yarn_ramp(args).tolist() == [0.0] + [1.0] * (V3.qk_rope_head_dim // 2 - 1)



def test_wrong_stretching_is_caught():
    plain = rotary_frequencies(SHORT)
    assert yarn_misses(plain) == [16, 23, 31]  # not stretched
    assert yarn_misses(plain / 40) == [0, 10, 16]  # linear interpolation
    swapped = yarn_ramp(V3).flip(0)
    assert yarn_misses(plain / 40 * swapped + plain * (1 - swapped)) == [0, 10, 16, 23, 31]
    assert yarn_misses(rotary_frequencies(replace(V3, beta_fast=16.0))) == [16]


def test_softmax_scale_has_the_published_values():
    # 192^-0.5 (0.1 mscale ln 40 + 1)^2, in double precision.
    assert softmax_scale(V3) == pytest.approx(0.1352337788608801, rel=1e-15)
    assert softmax_scale(replace(V3, mscale=0.707)) == pytest.approx(0.1147213868, abs=5e-11)
    assert softmax_scale(ModelArgs.preset("v2")) == pytest.approx(0.1147213868, abs=5e-11)
    assert softmax_scale(SHORT) == 192 ** -0.5
    assert softmax_scale(replace(V3, rope_factor=1.0)) == 192 ** -0.5
    not_squared = 192 ** -0.5 * (0.1 * math.log(40) + 1)
    assert not_squared != pytest.approx(0.1352337788608801, rel=1e-2)


def stretches(frequencies, scale, args: ModelArgs) -> bool:
    """Return whether YaRN does anything to a model of these settings."""
    plain = 1.0 / args.rope_theta ** (torch.arange(0, 64, 2) / 64)
    return not torch.allclose(frequencies(args), plain) or scale(args) != 192 ** -0.5


@pytest.mark.parametrize("length, on", [(64, False), (4095, False), (4096, False), (4097, True)])
def test_yarn_is_on_exactly_above_the_original_length(length, on):
    assert stretches(rotary_frequencies, softmax_scale, replace(V3, max_seq_len=length)) == on


def test_yarn_that_is_always_on_is_caught():
    def always(args):
        return rotary_frequencies(replace(args, max_seq_len=args.original_seq_len + 1))

    def scale_always(args):
        return softmax_scale(replace(args, max_seq_len=args.original_seq_len + 1))

    assert stretches(always, softmax_scale, SHORT)
    assert stretches(rotary_frequencies, scale_always, SHORT)


def angle_error(rotation: torch.Tensor, args: ModelArgs) -> float:
    """The worst distance of unit numbers for positions 0, 1, .. from their exact place."""
    width = args.qk_rope_head_dim
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    positions = torch.arange(rotation.size(-2), dtype=torch.float64)
    angles = positions[:, None] * args.rope_theta ** (-pairs / width)
    return (rotation - torch.polar(torch.ones_like(angles), angles)).abs().max().item()


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_angles_survive_a_cast_of_the_model(cast):
    args = ModelArgs.preset("nano")
    model = Transformer(args).to(cast)
    rotation = model.context(torch.zeros(1, 256, dtype=torch.int64)).rotation
    assert angle_error(rotation, args) < 256 * 2 ** -23  # FP32 angles up to 255
    assert not [name for name, _ in model.named_buffers() if "gate.bias" not in name]


def test_a_table_that_was_cast_is_caught():
    args = ModelArgs.preset("nano")
    freqs = rotary_frequencies(args).bfloat16().float()
    angles = torch.arange(256)[:, None] * freqs
    assert angle_error(torch.polar(torch.ones_like(angles), angles), args) > 0.01


def test_the_default_precision_does_not_move_the_frequencies():
    expected = rotary_frequencies(V3)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(rotary_frequencies(V3), expected)
        assert rotations(torch.arange(3)[None], V3).dtype == torch.complex64
    finally:
        torch.set_default_dtype(torch.float32)
