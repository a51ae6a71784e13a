"""FP8 rounding against arithmetic written out here, number by number, and bit for bit.

`round_e4m3` knows the format from its definition (one sign, four exponent and three mantissa bits,
bias 7, no infinity) and not from torch's cast.
"""

import math

import numpy as np
import pytest
import torch

from minids.fp8 import (
    E4M3_MAX,
    dequantize,
    next_power_of_two,
    quantize_activation,
    quantize_weight,
)

CODES = np.arange(127)  # 127 would be the format's NaN
EXPONENT, MANTISSA = CODES // 8, CODES % 8
VALUES = np.where(EXPONENT == 0, MANTISSA / 8 * 2.0 ** -6,
                  (1 + MANTISSA / 8) * 2.0 ** (EXPONENT - 7.0))  # ascending, 0 to 448


def round_e4m3(x: float) -> float:
    """The nearest E4M3 number; of two equally near the one with an even mantissa."""
    size = min(abs(x), 448.0)
    above = int(np.searchsorted(VALUES, size))
    if above == 0 or VALUES[above] == size:
        nearest = above
    else:
        down, up = size - VALUES[above - 1], VALUES[above] - size
        nearest = above - 1 if down < up or (down == up and (above - 1) % 2 == 0) else above
    return math.copysign(VALUES[nearest], x)


def literal_block(block: np.ndarray, ue8m0: bool) -> tuple[np.ndarray, np.float32]:
    """One tile or block: a = max(max|x|, 1e-4), s = a / 448, y = e4m3(x / s), all in FP32."""
    scale = np.maximum(np.abs(block).max(), np.float32(1e-4)) / np.float32(448)
    if ue8m0:
        scale = np.float32(2.0 ** smallest_exponent(float(scale)))
    return np.array([[round_e4m3(float(v / scale)) for v in row] for row in block]), scale


def smallest_exponent(x: float) -> int:
    """The least n with 2^n >= x, found by trying."""
    return next(n for n in range(-60, 60) if 2.0 ** n >= x)


def literal(x: torch.Tensor, rows: int, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in blocks of `rows` x 128, ragged at the edges."""
    x = x.float().numpy()
    q, scales = np.zeros_like(x, dtype=np.float64), []
    for r in range(0, x.shape[0], rows):
        scales.append([])
        for c in range(0, x.shape[1], 128):
            part = np.s_[r:r + rows, c:c + 128]
            q[part], scale = literal_block(x[part], ue8m0)
            scales[-1].append(scale)
    return torch.from_numpy(q), torch.tensor(np.array(scales))


def sample(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of very different sizes: outliers, a block of zeros, one of tiny numbers."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[1])[torch.randperm(shape[1])]
    x[0, 0] = 5000.0
    x[-2:, 128:] = 0.0
    x[-1:, :128] = 1e-6
    return x.to(dtype)


ROWS = {quantize_activation: 1, quantize_weight: 128}


@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32 scales", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ROWS)
def test_values_and_scales_are_the_references_bit_for_bit(quantize, dtype, ue8m0):
    x = sample((150, 300), dtype)  # ragged in both directions
    q, scale = quantize(x, ue8m0)
    expected_q, expected_scale = literal(x, ROWS[quantize], ue8m0)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert torch.equal(q.double(), expected_q)
    assert torch.equal(scale, expected_scale)


def rounded_logarithm(x):
    return torch.exp2(torch.ceil(torch.log2(x)))


def test_a_power_of_two_is_the_next_one_even_where_a_logarithm_rounds():
    just_above = 2.0 ** torch.arange(-20.0, 10.0) * (1 + 2 ** -23)
    x = torch.cat([torch.tensor([2.0 ** -20, 1.0, 3.0, 2 - 2 ** -23, 2.0]), just_above])
    exact = [2.0 ** smallest_exponent(v) for v in x.tolist()]
    assert next_power_of_two(x).tolist() == exact
    assert rounded_logarithm(x).tolist() != exact


def test_576_rows_have_five_rows_of_blocks():
    q, scale = quantize_weight(sample((576, 7 * 128)))
    assert q.shape == (576, 896) and scale.shape == (5, 7)


@pytest.mark.parametrize("shape", [(2, 3, 200), (5, 128), (1, 1), (130,)], ids=str)
def test_activations_of_any_shape(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    q, scale = quantize_activation(x)
    assert q.shape == x.shape and scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    # Half a step of a three-bit mantissa for normal numbers, half of 2^-9 for those below them.
    least = scale.repeat_interleave(128, -1)[..., :shape[-1]] * 2 ** -10
    step = torch.maximum(x.abs() * 2 ** -4, least)
    assert ((dequantize(q, scale) - x).abs() <= step * 1.0001).all()


def relative_error(x, q, scale) -> float:
    return ((dequantize(q, scale) - x).norm() / x.norm()).item()


@pytest.mark.parametrize("quantize", ROWS)
def test_the_way_back_undoes_the_way_there(quantize):
    torch.manual_seed(0)
    x = torch.randn(576, 320)
    q, scale = quantize(x)
    assert relative_error(x, q, scale) < 2 ** -4
    again, same = quantize(dequantize(q, scale))
    assert torch.equal(dequantize(again, same), dequantize(q, scale))  # nothing more is lost
    # Scales of a neighbour, and turned the other way.
    assert relative_error(x, q, scale.flip(-1)) > relative_error(x, q, scale)
    with pytest.raises(ValueError, match=r"scale of shape \[3, \d+\] does not .* \[576, 320\]"):
        dequantize(q, scale.T.contiguous())


def test_scales_stored_as_eight_bit_exponents():
    w = sample((130, 260))
    q, scale = quantize_weight(w, ue8m0=True)
    stored = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(stored.float(), scale)
    assert torch.equal(dequantize(q, stored), dequantize(q, scale))


def test_a_power_of_two_scale_rounds_nothing_and_uses_half_the_reach_at_least():
    x = sample((64, 256))
    q, scale = quantize_activation(x, ue8m0=True)
    exact = x[:, :128] / scale[:, :1]
    assert torch.equal(exact.double() * scale[:, :1].double(), x[:, :128].double())
    largest = q.float().unflatten(-1, (2, 128)).abs().amax(-1)
    used = largest[x.unflatten(-1, (2, 128)).abs().amax(-1) > 1e-4]
    assert used.min() >= E4M3_MAX / 2 - 16 and used.max() <= E4M3_MAX  # 16: half a step there


def test_nothing_overflows_and_zeros_stay():
    x = torch.tensor([[0.0, -0.0, 1e-30, 3e38, -3e38] + [0.0] * 123])
    q, scale = quantize_activation(x)
    assert q.float().isfinite().all() and q.float().abs().max() == E4M3_MAX
    assert dequantize(*quantize_activation(torch.zeros(2, 128))).abs().max() == 0
