"""FP8 rounding against arithmetic written out here, number by number, and bit for bit.

`round_e4m3` knows the format from its definition (one sign, four exponent and three mantissa bits,
bias 7, no infinity) and not from torch's cast.
"""

import math

import numpy as np
import pytest
import torch
from small_models import gap

from minids import fp8
from minids.fp8 import (
    E4M3_MAX,
    as_hopper_wants,
    dequantize,
    fp8_gemm,
    fp8_linear,
    gemm_on_hopper,
    has_fp8_units,
    limited_sum,
    next_power_of_two,
    quantize_activation,
    quantize_weight,
    truncated,
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


# The three products. x: tokens x channels, w: outputs x channels, dy: tokens x outputs; ragged.

TOKENS, IN, OUT = 200, 300, 150


def factors(outliers: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    x, w, dy = torch.randn(TOKENS, IN), torch.randn(OUT, IN), torch.randn(TOKENS, OUT)
    if outliers:
        for t in (x, w, dy):  # one number in a thousand, a hundred thousand times as large
            t[torch.rand(t.shape) < 1e-3] *= 1e5
    return x, w, dy


def products(product, x, w, dy) -> dict:
    """What a linear layer computes forward and backward."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = product(x, w)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dw": w.grad}


def exact_products(x, w, dy) -> dict:
    x, w, dy = x.double(), w.double(), dy.double()
    return {"y": x @ w.T, "dx": dy @ w, "dw": dy.T @ x}


def rounding(x: torch.Tensor, scale: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """Bound how far rounding may move a number: half the last of four binary digits, 2^-4 of it;
    below the smallest normal number half of the smallest step, 2^-10 scales."""
    scale = scale.repeat_interleave(rows, 0)[:len(x)].repeat_interleave(128, 1)[:, :x.size(1)]
    return x.abs().double() * 2 ** -4 + scale.double() * 2 ** -10


def bound(a, b, e_a, e_b) -> torch.Tensor:
    """Return how far A B^T may be off if A is off by e_a and B by e_b."""
    a, b = a.abs().double(), b.abs().double()
    return e_a @ b.T + a @ e_b.T + e_a @ e_b.T


def bounds(x, w, dy) -> dict:
    e_x, e_w = (rounding(t, quantize(t)[1], ROWS[quantize])
                for t, quantize in ((x, quantize_activation), (w, quantize_weight)))
    e_dy = rounding(dy, quantize_activation(dy)[1])
    across = rounding(dy.T, quantize_activation(dy.T.contiguous())[1])
    twice = x.abs() + e_x  # x is rounded along its channels, then along the tokens
    e_twice = e_x.T + rounding(twice.T, quantize_activation(twice.T.float())[1])
    return {"y": bound(x, w, e_x, e_w), "dx": bound(dy, w.T, e_dy, e_w.T),
            "dw": bound(dy.T, x.T, across, e_twice)}


@pytest.mark.parametrize("outliers", [False, True])
def test_each_product_is_within_what_rounding_may_do(outliers):
    inputs = factors(outliers)
    mine, exact, allowed = products(fp8_linear, *inputs), exact_products(*inputs), bounds(*inputs)
    for name in exact:
        error = (mine[name].double() - exact[name]).abs()
        assert (error <= allowed[name] * 1.001).all(), name  # FP32 adds up what is left
        assert error.max() > allowed[name].max() / 1000  # and something was rounded
    wrong = products(fp8_linear, inputs[0], inputs[1].roll(1, 0), inputs[2])
    for name in ("y", "dx"):
        assert ((wrong[name].double() - exact[name]).abs() > allowed[name]).any()


def norm_error(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return ((mine.double() - exact).norm() / exact.norm()).item()


def one_scale(x: torch.Tensor) -> torch.Tensor:
    """Rounded with a single scale for the whole tensor."""
    scale = x.abs().max() / E4M3_MAX
    return fp8.to_e4m3(x / scale).float() * scale


def one_scale_linear(x, w):
    return one_scale(x) @ one_scale(w).T


def small_rows(mine: dict, exact: dict) -> float:
    """The error of y in the half of the tokens that has no outlier."""
    calm = exact["y"].norm(dim=1) < exact["y"].norm(dim=1).median()
    return norm_error(mine["y"][calm], exact["y"][calm])


def test_one_scale_for_a_tensor_is_visibly_worse_where_there_are_outliers():
    for outliers, worse in ((False, 0.9), (True, 3.0)):
        x, w, dy = factors(outliers)
        w = factors(False)[1]  # outliers in the activations alone
        exact = exact_products(x, w, dy)
        tiles = small_rows(products(fp8_linear, x, w, dy), exact)
        tensor = small_rows({"y": one_scale_linear(x, w)}, exact)
        assert tiles < 0.05 and tensor > worse * tiles


def eight_bit_integers(x, w):
    """What a project had that called it FP8: 255 evenly spaced steps."""
    def rounded(t):
        scale = t.abs().max() / 127
        return (t / scale).round() * scale
    return rounded(x) @ rounded(w).T


def test_integers_are_not_fp8():
    x, w, dy = factors(False)
    grid = (x / x.abs().max() * 127).round()
    assert not torch.equal(fp8.to_e4m3(grid).float(), grid)  # E4M3 has no 255 even steps
    x = factors(True)[0]
    exact = exact_products(x, w, dy)
    assert small_rows({"y": eight_bit_integers(x, w)}, exact) > 0.9  # all rounded to 0


def test_a_matrix_in_fp8_is_multiplied_as_stored():
    x, w, _ = factors(False)
    a, b = quantize_activation(x), quantize_weight(w)
    assert fp8_gemm(*a, *b).dtype == torch.float32
    exact = dequantize(*a).double() @ dequantize(*b).double().T
    assert norm_error(fp8_gemm(*a, *b), exact) < 1e-6  # FP32 sums of 300
    assert norm_error(fp8_gemm(a[0], a[1].flip(1), *b), exact) > 1e-3


def test_truncation_keeps_so_many_digits():
    x = torch.tensor([1.0, -1.0, 0.0, 1 + 2 ** -13, 1 + 2 ** -14, -(1 + 2 ** -14), 4097.0])
    assert truncated(x, 14).tolist() == [1.0, -1.0, 0.0, 1 + 2 ** -13, 1.0, -1.0, 4097.0]
    assert truncated(x, 4).tolist() == [1.0, -1.0, 0.0, 1.0, 1.0, -1.0, 4096.0]


def test_a_sum_of_4096_loses_two_percent_and_the_promotion_mends_it():
    """V3 section 3.3.2: near 2 % at K = 4096, at most."""
    torch.manual_seed(0)
    a, b = (fp8.to_e4m3(torch.randn(64, 4096)).float() for _ in range(2))
    exact = a.double() @ b.double().T
    typical = exact.abs().median()

    def worst(bits, promote):
        error = (limited_sum(a, b, bits, promote).double() - exact).abs()
        return (error / exact.abs().clamp(min=typical)).max().item()

    assert 5e-3 < worst(14, 4096) < 5e-2
    assert worst(14, 128) < worst(14, 4096) / 3
    assert worst(24, 4096) < 1e-5  # as many digits as FP32 has


def test_what_is_kept_for_the_backward_pass_is_half_of_bf16():
    x, w, _ = (t.bfloat16() for t in factors(False))

    def kept(product):
        bytes_of = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: bytes_of.append(t.numel() * t.element_size()) or t, lambda t: t):
            product(x.clone().requires_grad_(), w.clone().requires_grad_())
        return sum(bytes_of)

    plain = kept(torch.nn.functional.linear)
    assert plain == 2 * (x.numel() + w.numel())
    scales = 4 * (TOKENS * 3 + 2 * 3)
    assert kept(fp8_linear) == plain // 2 + scales


def test_a_gpu_without_the_units_simulates():
    assert not has_fp8_units(torch.device("cpu"))


@pytest.mark.skipif(not (torch.cuda.is_available() and has_fp8_units(torch.device("cuda"))),
                    reason="no Hopper GPU")
@pytest.mark.parametrize("shape", [(200, 300, 150), (1, 128, 128), (96, 128, 128), (576, 640, 512)],
                         ids=str)
def test_hopper_multiplies_the_same_numbers(shape):
    torch.manual_seed(0)
    n, k, m = shape
    x, w, dy = (torch.randn(s, device="cuda") for s in ((n, k), (m, k), (n, m)))
    pairs = [(quantize_activation(x), quantize_weight(w)),
             (quantize_activation(dy), tuple(t.T for t in quantize_weight(w))),
             (quantize_activation(dy.T), quantize_activation(x.T))]
    for a, b in pairs:
        # 14 bits of a sum within 128 numbers: 2^-13 at each of four steps, of the largest sum.
        assert gap(gemm_on_hopper(*a, *b), dequantize(*a) @ dequantize(*b).T) < 4 * 2 ** -12


@pytest.mark.parametrize("shape", [(128, 96), (5, 100), (300, 500)])
def test_scales_stand_by_columns_for_hopper_also_where_a_row_has_one(shape):
    q, scale, _ = as_hopper_wants(*quantize_activation(torch.randn(shape)))
    assert scale.shape == (len(q), math.ceil(shape[1] / 128))
    assert scale.stride() == (1, len(q))


@pytest.mark.parametrize("size", [2.0 ** -27, 2.0 ** -60])
def test_small_gradients_lose_no_more_than_large_ones(size, monkeypatch):
    """Of a mean over many tokens they are far below the floor of activations, 1e-4."""
    x, w, dy = factors(outliers=False)

    def alike():
        large, small = (products(fp8_linear, x, w, t) for t in (dy, size * dy))
        return [torch.equal(small[name], size * large[name]) for name in ("dx", "dw")]

    assert all(alike())  # a power of two changes no digit
    monkeypatch.setattr(fp8, "LEAST_GRADIENT", fp8.LEAST)
    assert not any(alike())


def test_under_autocast_inputs_and_results_are_in_its_type_and_sums_are_not():
    x, w, dy = factors(outliers=False)
    exact = products(fp8_linear, x.bfloat16(), w, dy.bfloat16())
    factors_in_fp8 = quantize_activation(x), quantize_weight(w)
    plain = fp8_gemm(*factors_in_fp8[0], *factors_in_fp8[1])
    with torch.autocast("cpu", torch.bfloat16):
        mine = products(fp8_linear, x, w, dy.bfloat16())
        assert torch.equal(fp8_gemm(*factors_in_fp8[0], *factors_in_fp8[1]), plain)
    assert mine["y"].dtype == torch.bfloat16 and mine["dw"].dtype == torch.float32
    for name in exact:
        assert torch.equal(mine[name].float(), exact[name].float()), name
