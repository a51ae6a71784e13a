"""The shared parts against their plain formulas, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from small_models import gap
from torch import nn

from minids.kernels.norm import NormRows
from minids.kernels.precision import compute_dtype
from minids.model.layers import MLP, Linear, RMSNorm, rms_norm

EPS = 1e-6
# One rounding to BF16 is off by at most 2^-8 of the value; FP32 noise in front of it adds a little.
ONE_ROUNDING = 2 ** -8 * 1.01


def plain_norm(x, weight, eps=EPS):
    """x / sqrt(mean(x^2) + eps) w, as written."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x, weight):
    return plain_norm(x - x.mean(-1, keepdim=True), weight)


def eps_outside(x, weight):
    return x / ((x * x).mean(-1, keepdim=True).sqrt() + EPS) * weight


def eps_forgotten(x, weight):
    return plain_norm(x, weight, eps=0.0)


def sum_for_mean(x, weight):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + EPS) * weight


def our_norm(x, weight):
    norm = RMSNorm(weight.numel(), EPS)
    norm.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return norm(x)


def rows(dtype=torch.float64):
    """Rows with a mean away from zero, from 0.001 (where eps counts) to 1000, and a zero row."""
    torch.manual_seed(0)
    size = torch.tensor([0.0, 1e-3, 3e-3, 1.0, 1e3], dtype=torch.float64).view(5, 1, 1)
    return ((torch.randn(5, 4, 24, dtype=torch.float64) + 0.5) * size).to(dtype)


def norm_error(norm) -> float:
    """The worst row's distance from the formula, in FP64, of a norm (x, weight) -> y."""
    x, weight = rows(), torch.randn(24, dtype=torch.float64)
    return (norm(x, weight) - plain_norm(x, weight)).abs().max().item()


def test_rms_norm_is_the_formula_in_fp64():
    assert norm_error(our_norm) < 1e-13  # a few roundings of numbers below 10
    assert norm_error(lambda x, weight: rms_norm.plain(x, weight, EPS)) < 1e-13


@pytest.mark.parametrize("wrong", [layer_norm, eps_outside, eps_forgotten, sum_for_mean])
def test_a_wrong_norm_is_caught(wrong):
    x, weight = rows()[1:], torch.ones(24, dtype=torch.float64)
    assert (wrong(x, weight) - plain_norm(x, weight)).abs().max() > 1e-3


def norm_gradients(norm, x, weight, dy) -> tuple:
    """(dx, dw) of a norm."""
    x, weight = x.detach().requires_grad_(), nn.Parameter(weight.detach().clone())
    norm(x, weight).backward(dy)
    return x.grad, weight.grad


def test_rms_norm_gradient_is_the_derivative():
    x = rows()[3:].clone().requires_grad_()
    weight = torch.randn(24, dtype=torch.float64, requires_grad=True)
    unit = (x / x.detach().norm(dim=-1, keepdim=True)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: NormRows.apply(x, w, EPS, x.dtype),
                                    (unit, weight))
    dy = torch.randn_like(x)
    for ours, plain in zip(norm_gradients(our_norm, rows(), weight, torch.cat([dy, dy, dy[:1]])),
                           norm_gradients(plain_norm, rows(), weight, torch.cat([dy, dy, dy[:1]])),
                           strict=True):
        assert gap(ours, plain) < 1e-13


class ScaleHeldConstant(torch.autograd.Function):
    """The usual slip in a hand-written norm: rms(x) does not depend on x in the gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        return grad * weight * scale, (grad * x * scale).flatten(0, -2).sum(0)


def test_a_wrong_norm_gradient_is_caught():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian"):
        torch.autograd.gradcheck(ScaleHeldConstant.apply, (x, weight))


def bf16_norm_error(norm) -> float:
    """The worst relative error of a norm of BF16 rows against FP64 on the same numbers."""
    x = rows(torch.bfloat16)[1:]
    weight = torch.randn(24)
    y = norm(x, weight)
    exact = plain_norm(x.double(), weight.double())
    assert y.dtype == torch.bfloat16
    return ((y.double() - exact).abs() / exact.abs()).max().item()


def rounded_before_the_weight(x, weight):
    return weight.bfloat16() * plain_norm(x.float(), torch.ones(x.size(-1))).to(x.dtype)


def all_in_bf16(x, weight):
    return plain_norm(x, weight.to(x.dtype))


def test_rms_norm_rounds_once_in_bf16():
    assert bf16_norm_error(our_norm) <= ONE_ROUNDING
    for wrong in (rounded_before_the_weight, all_in_bf16):
        assert bf16_norm_error(wrong) > ONE_ROUNDING


def test_rms_norm_gradient_in_bf16():
    x, weight = rows(torch.bfloat16)[3:], torch.randn(24)
    dy = torch.randn(x.shape).bfloat16()
    dx, dw = norm_gradients(our_norm, x, weight, dy)
    exact = norm_gradients(plain_norm, x.double(), weight.double(), dy.double())
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    for row, true in zip(dx.flatten(0, 1), exact[0].flatten(0, 1), strict=True):
        assert gap(row, true) < ONE_ROUNDING
    assert gap(dw, exact[1]) < 1e-6  # FP32 sums of 8 rows


def test_autocast_decides_the_precision_of_products_and_norms():
    x = torch.randn(2, 3, 8)
    norm, linear = RMSNorm(8, EPS), Linear(8, 4)
    nn.init.ones_(norm.weight)
    nn.init.normal_(linear.weight)
    assert norm(x).dtype == linear(x).dtype == compute_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == linear(x).dtype == compute_dtype(x) == torch.bfloat16
    assert compute_dtype(x.double()) == torch.float64


def swiglu(x, mlp):
    """sum over hidden units of w2 (a sigmoid(a) b), a = w1 x, b = w3 x."""
    a, b = x @ mlp.w1.weight.T, x @ mlp.w3.weight.T
    return (a / (1 + torch.exp(-a)) * b) @ mlp.w2.weight.T


def mlp_error(forward) -> float:
    """Return how far a feed-forward layer (x, mlp) -> y is from SwiGLU, in FP64."""
    torch.manual_seed(0)
    mlp = MLP(8, 12).double()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    return gap(forward(x, mlp), swiglu(x, mlp))


def test_swiglu_is_the_formula():
    assert mlp_error(lambda x, mlp: mlp(x)) < 1e-13


@pytest.mark.parametrize("wrong", [
    lambda x, mlp: mlp.w2(F.silu(mlp.w3(x)) * mlp.w1(x)),  # the branches exchanged
    lambda x, mlp: mlp.w2(F.gelu(mlp.w1(x)) * mlp.w3(x)),
    lambda x, mlp: mlp.w2(F.silu(mlp.w1(x) * mlp.w3(x))),
])
def test_a_wrong_feed_forward_layer_is_caught(wrong):
    assert mlp_error(wrong) > 1e-2


def test_layers_have_no_bias():
    assert [name for name, _ in MLP(8, 12).named_parameters()] == [
        "w1.weight", "w2.weight", "w3.weight"]
