"""Attention's bodies against loops over heads, queries and keys."""

import pytest
import torch
from small_models import gap

from minids.kernels.attention import fused, products
from minids.model.mla import attention, causal


def loop_attention(q, k, v, visible, scale):
    """softmax(q k^T scale) v for each sequence, head and query, over the visible keys only."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen = causal(q.size(2), k.size(2)) if visible is None else visible
    seen = seen.expand(q.size(0), -1, -1)
    out = q.new_zeros(*q.shape[:3], v.size(-1))
    for b, h, s in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = seen[b, s].nonzero().flatten()
        scores = k[b, h, keys] @ q[b, h, s] * scale
        probs = (scores - scores.max()).exp()
        out[b, h, s] = probs / probs.sum() @ v[b, h, keys]
    return out.transpose(1, 2)


def masks() -> dict:
    """Name -> (queries, keys, visible)."""
    pad = torch.tensor([3, 0])
    keys, queries = torch.arange(9), torch.arange(9)[:, None]
    padded = (keys <= queries) & (keys >= pad[:, None, None]) | (keys == queries)
    return {"training": (9, 9, None), "cached": (4, 9, causal(4, 9)), "one query": (1, 9, None),
            "padded": (9, 9, padded), "padded, cached": (3, 9, padded[:, 6:])}


def kernel_gap(kernel, mask: str, width: int, dtype: torch.dtype) -> float:
    """The worst of output and three gradients against the loops in FP64, values `width` wide."""
    queries, keys, visible = masks()[mask]
    if mask == "one query":
        visible = causal(1, 9)
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 3, w, dtype=torch.float64)
              for n, w in ((queries, 12), (keys, 12), (keys, width))]
    weigh = torch.randn(2, queries, 3, width, dtype=torch.float64)

    def results(body, dtype):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        out = body(*given, visible, 0.3)
        return [out, *torch.autograd.grad((out * weigh.to(dtype)).sum(), given)]

    return max(gap(mine, exact) for mine, exact in
               zip(results(kernel, dtype), results(loop_attention, torch.float64), strict=True))


# FP64: another order of sums. FP32: rounding of 12 products, then of 9.
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize("kernel", [attention.plain, products, fused])
@pytest.mark.parametrize("mask", masks())
def test_both_kernels_equal_the_loops_forward_and_backward(kernel, mask, dtype, error):
    for width in (8, 12, 20)[:3 if kernel is not fused else 2]:  # narrower, as wide, wider
        assert kernel_gap(kernel, mask, width, dtype) < error


def unscaled(q, k, v, visible, scale):
    return products(q, k, v, visible, 1.0)


def default_scale(q, k, v, visible, scale):
    return fused(q, k, v, visible, q.size(-1) ** -0.5)


def unmasked(q, k, v, visible, scale):
    return products(q, k, v, torch.ones(1, q.size(1), k.size(1), dtype=torch.bool), scale)


def first_row_for_all(q, k, v, visible, scale):
    return products(q, k, v, None if visible is None else visible[:1], scale)


@pytest.mark.parametrize("wrong, mask", [(unscaled, "training"), (default_scale, "training"),
                                         (unmasked, "training"), (unmasked, "cached"),
                                         (first_row_for_all, "padded")])
def test_a_wrong_kernel_is_caught(wrong, mask):
    assert kernel_gap(wrong, mask, 8, torch.float64) > 1e-2


@pytest.mark.parametrize("length", [1, 512, 513])
def test_attention_of_any_length_equals_the_loops(length):
    """The kernel depends on the length and on the device; the result does not."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, 1, width) for width in (8, 8, 6))
    expected = loop_attention(q.double(), k.double(), v.double(), None, 0.4)
    assert gap(attention(q, k, v, None, 0.4), expected) < 5e-6
