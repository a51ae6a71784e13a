"""The layer of experts against one expert at a time: sorting, products, dispatch and combine."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LITTLE, gap, random_tokens
from test_gate import EXACT, KINDS, V3_LIKE, hidden, moe_layer

from minids import Transformer
from minids.kernels.experts import Combine, Dispatch, grouped_fused
from minids.model import moe
from minids.model.moe import (
    MoE,
    grouped_linear,
    sort_by_expert,
)

grouped_loop = grouped_linear.plain


def one_token_at_a_time(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """V3 equation 12: for each token, each of its experts in turn, and the shared ones."""
    weights, routing = layer.gate(x)
    rows = []
    for u, w, indices in zip(x.flatten(0, 1), weights.flatten(0, 1),
                             routing.indices.flatten(0, 1).tolist(), strict=True):
        y = torch.zeros_like(u)
        for k, i in enumerate(indices):
            a, b = layer.experts.w1[i] @ u, layer.experts.w3[i] @ u
            y = y + w[k] * (layer.experts.w2[i] @ (a * torch.sigmoid(a) * b))
        if layer.shared_experts is not None:
            a, b = layer.shared_experts.w1.weight @ u, layer.shared_experts.w3.weight @ u
            y = y + layer.shared_experts.w2.weight @ (a * torch.sigmoid(a) * b)
        rows += [y]
    return torch.stack(rows).view_as(x)


def layer_error(layer: MoE, dtype: torch.dtype = torch.float64, shape=(2, 40)) -> float:
    """Return how far a layer's output and gradients are from one token at a time in FP64."""
    results = []
    for forward, precision in ((layer.__class__.__call__, dtype),
                               (one_token_at_a_time, torch.float64)):
        mine = copy.deepcopy(layer).to(precision)
        x = hidden(layer.args, *shape).to(precision).requires_grad_()
        out = forward(mine, x)
        y = out if isinstance(out, torch.Tensor) else out[0]
        (y * hidden(layer.args, *shape, seed=1).to(precision)).sum().backward()
        results += [[y, x.grad] + [p.grad for p in mine.parameters()]]
    return max(gap(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_dropped(kind):
    assert layer_error(moe_layer(KINDS[kind])) < EXACT


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 150)], ids=str)
def test_few_tokens_and_padded_places_alike(shape):
    """300 tokens of 4 experts each fill places in multiples of ALIGN, 1 and 3 do not."""
    layer = moe_layer(V3_LIKE)
    assert layer_error(layer, shape=shape) < EXACT
    assert layer_error(layer, torch.float32, shape) < 1e-5  # FP32, the fused product


def test_idle_experts_and_one_that_gets_everything():
    layer = moe_layer(V3_LIKE)
    layer.gate.bias.copy_(torch.tensor([9.0, 8, 7, 6] + [-9.0] * 12))  # four experts get all
    _, routing = layer(hidden(V3_LIKE))
    assert routing.load().tolist() == [64] * 4 + [0] * 12
    assert layer_error(layer) < EXACT
    assert layer_error(layer, torch.float32) < 1e-5


class CapacityDrop(MoE):
    """Each expert takes its fair share of tokens and no more; the rest of the pairs are lost."""

    def routed(self, x, weights, indices):
        capacity = indices.numel() // self.args.n_routed_experts
        rank = F.one_hot(indices.flatten(), self.args.n_routed_experts).cumsum(0)
        rank = rank.gather(1, indices.flatten()[:, None]).view_as(indices)
        return super().routed(x, weights * (rank <= capacity), indices)


class UnweightedSum(MoE):
    """Experts' outputs added up with equal weights."""

    def routed(self, x, weights, indices):
        return super().routed(x, 0 * weights + weights.mean(), indices)


class ScaledSharedExpert(MoE):
    """route_scale on the shared expert too."""

    def forward(self, x):
        y, routing = super().forward(x)
        return y + (self.args.route_scale - 1) * self.shared_experts(x), routing


@pytest.mark.parametrize("wrong", [CapacityDrop, UnweightedSum, ScaledSharedExpert])
def test_a_wrong_layer_is_caught(wrong):
    assert layer_error(moe_layer(V3_LIKE, wrong)) > 1e-2


def renumbering_gap(layer: MoE, order: list[int], parts: set[str]) -> float:
    """Return how much the output moves when `parts` of a layer have their experts renumbered."""
    x, other = hidden(layer.args), copy.deepcopy(layer)
    tensors = {"gate": other.gate.weight, "bias": other.gate.bias, "w1": other.experts.w1,
               "w2": other.experts.w2, "w3": other.experts.w3}
    for name in parts:
        tensors[name].copy_(tensors[name][order].clone())
    return gap(other(x)[0], layer(x)[0])


@torch.no_grad()
def test_renumbering_the_experts_changes_nothing():
    everything = {"gate", "bias", "w1", "w2", "w3"}
    within_groups = [4 * g + i for g in (2, 0, 3, 1) for i in (1, 3, 0, 2)]
    any_order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    layer, ungrouped = moe_layer(V3_LIKE), moe_layer(KINDS["V3, one group"])
    assert renumbering_gap(layer, within_groups, everything) < EXACT
    assert renumbering_gap(ungrouped, any_order, everything) < EXACT
    for forgotten in sorted(everything):
        assert renumbering_gap(ungrouped, any_order, everything - {forgotten}) > 1e-2, forgotten
    assert renumbering_gap(layer, any_order, everything) > 1e-2  # tears the groups apart


# rows of each expert, rows behind the last one's
COUNTS = [([5, 0, 3, 8], 0), ([0, 0, 16, 0], 0), ([1, 2, 3, 0], 10), ([0, 0, 0, 0], 4),
          ([32, 64, 0, 32], 96)]


def product_gap(body, counts: list[int], spare: int, dtype: torch.dtype) -> float:
    """The worst of output and gradients of a grouped product, against row by row in FP64."""
    torch.manual_seed(0)
    rows = sum(counts)
    x = torch.randn(rows + spare, 24, dtype=torch.float64)
    weight = torch.randn(4, 16, 24, dtype=torch.float64)
    weigh = torch.randn(rows, 16, dtype=torch.float64)

    def row_by_row(x, weight, counts):
        expert = torch.repeat_interleave(torch.arange(4), counts)
        return torch.einsum("ri,roi->ro", x[:len(expert)], weight[expert])

    def results(body, dtype):
        given = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = body(*given, torch.tensor(counts))[:rows]
        dx, dw = torch.autograd.grad((y * weigh.to(dtype)).sum(), given)
        return y, dx[:rows], dw

    pairs = zip(results(body, dtype), results(row_by_row, torch.float64), strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
               for a, b in pairs if b.numel())


# FP32: sums of 24 products. BF16: inputs and result are rounded to 8 bits each.
BODIES = [(grouped_loop, torch.float64, 1e-13), (grouped_loop, torch.float32, 2e-6),
          (grouped_fused, torch.float32, 2e-6), (grouped_loop, torch.bfloat16, 2e-2),
          (grouped_fused, torch.bfloat16, 2e-2), (grouped_linear, torch.float32, 2e-6),
          (grouped_linear, torch.float64, 1e-13)]


@pytest.mark.parametrize("body, dtype, error", BODIES)
@pytest.mark.parametrize("counts, spare", COUNTS, ids=str)
def test_every_body_of_the_grouped_product_agrees(body, dtype, error, counts, spare):
    assert product_gap(body, counts, spare, dtype) < error


def test_rows_past_the_last_experts_have_a_place_in_the_result():
    x, weight = torch.randn(9, 3), torch.randn(2, 4, 3)
    assert grouped_loop(x, weight, torch.tensor([2, 4])).shape == (9, 4)


def next_expert(x, weight, counts):
    return grouped_loop(x, weight.roll(1, 0), counts)


def reversed_counts(x, weight, counts):
    return grouped_loop(x, weight, counts.flip(0))


@pytest.mark.parametrize("wrong", [next_expert, reversed_counts])
def test_a_wrong_grouped_product_is_caught(wrong):
    assert product_gap(wrong, [5, 0, 3, 8], 0, torch.float64) > 0.1


def sorting_faults(indices: torch.Tensor, n_experts: int, slots: tuple) -> list[str]:
    """What is wrong with (source, slot, counts) for these pairs of token and expert."""
    source, slot, counts = slots
    ends = counts.cumsum(0)
    flat, pairs = slot.flatten(), indices.flatten()
    tokens = torch.arange(len(indices)).repeat_interleave(indices.size(1))
    checks = {
        "a slot is used twice": len(flat.unique()) == len(flat),
        "a pair lies outside its expert's slots": bool(
            ((flat >= ends[pairs] - counts[pairs]) & (flat < ends[pairs])).all()),
        "another token stands in a slot": torch.equal(source[flat], tokens),
        "more slots than rows": int(ends[-1]) <= len(source),
        "a source that is no token": bool(((source >= 0) & (source < len(indices))).all()),
    }
    return [fault for fault, fine in checks.items() if not fine]


def random_indices(n_tokens: int, k: int, n_experts: int, seed: int) -> torch.Tensor:
    """(n_tokens, k), the experts of a token distinct and the low ones busier."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n_tokens, n_experts, generator=generator)
    return (scores - torch.linspace(0, 0.7, n_experts)).topk(k).indices


@given(n_tokens=st.integers(0, 60), k=st.integers(1, 4), n_experts=st.integers(4, 9),
       align=st.sampled_from([1, 4, 32]), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_sorting_gives_each_pair_its_own_slot_with_its_expert(n_tokens, k, n_experts, align,
                                                               seed):
    indices = random_indices(n_tokens, k, n_experts, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "ALIGN", align)
        places = sort_by_expert(indices, n_experts)
    assert sorting_faults(indices, n_experts, places) == []
    source, _, counts = places
    load = torch.bincount(indices.flatten(), minlength=n_experts)
    if n_tokens * k >= align * n_experts:  # worth padding: M depends on the shape alone
        assert (counts % align == 0).all() and (counts - load < align).all()
        assert len(source) == n_tokens * k + n_experts * (align - 1)
    else:
        assert torch.equal(counts, load) and len(source) == n_tokens * k


def test_slots_are_aligned_from_32_pairs_an_expert_on():
    for n_tokens, aligned in ((63, False), (64, True)):  # of 2 experts each, among 4
        source, _, counts = sort_by_expert(random_indices(n_tokens, 2, 4, seed=0), 4)
        assert len(source) == 2 * n_tokens + 4 * 31 * aligned
        assert bool((counts % 32 == 0).all()) == aligned


def test_sorting_example_of_the_docstring():
    source, slot, counts = sort_by_expert(torch.tensor([[0, 2], [2, 0], [2, 1]]), 3)
    assert source.tolist() == [0, 1, 2, 0, 1, 2]
    assert slot.tolist() == [[0, 3], [4, 1], [5, 2]]
    assert counts.tolist() == [2, 1, 3]


def test_wrong_slots_are_caught():
    indices = random_indices(40, 3, 4, seed=0)
    source, slot, counts = sort_by_expert(indices, 4)
    load = torch.bincount(indices.flatten(), minlength=4)
    order = indices.flatten().argsort(stable=True)
    unpadded = order.argsort().view_as(slot)  # slots without the gaps, counts with them
    counts32 = (load + 31) // 32 * 32
    spare = torch.zeros(200, dtype=torch.int64)
    wrong = {
        "a slot is used twice": (source, slot * 0, counts),
        "a pair lies outside its expert's slots": (source, unpadded, counts32),
        "another token stands in a slot": (source.roll(1), slot, counts),
        "more slots than rows": (source, slot, counts + 32),
        "a source that is no token": (torch.cat([source, spare + 40]), slot, counts),
    }
    for fault, places in wrong.items():
        assert fault in sorting_faults(indices, 4, places)


class OneGradient(Dispatch):
    """Dispatch whose gradient takes the first of a token's K places and forgets the others."""

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]][:, 0], None, None


def there_and_back(dispatch, align: int):
    """x -> its rows in their places -> the weighted sum of each token's rows."""
    indices = random_indices(9, 2, 4, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "ALIGN", align)
        source, slot, _ = sort_by_expert(indices, 4)
    weights = torch.tensor([0.25, 2.0], dtype=torch.float64).expand(9, 2).contiguous()
    return lambda x: Combine.apply(dispatch.apply(x, source, slot), slot, weights)


@pytest.mark.parametrize("align", [1, 4])
def test_dispatch_and_combine_have_the_gradient_of_what_they_do(align):
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    forward = there_and_back(Dispatch, align)
    torch.testing.assert_close(forward(x), 2.25 * x)
    assert torch.autograd.gradcheck(forward, x)
    with pytest.raises(RuntimeError, match="Jacobian"):
        torch.autograd.gradcheck(there_and_back(OneGradient, align), x)


def test_each_alone_has_the_gradient_of_what_it_does():
    source, slot, _ = sort_by_expert(random_indices(9, 2, 4, seed=0), 4)
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(18, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Dispatch.apply(x, source, slot), x)
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: Combine.apply(r, slot, w), (rows, weights))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_trains_under_autocast():
    """Where sums are FP32 under autocast, and what is gathered is BF16."""
    layer, x = moe_layer(V3_LIKE).float().cuda(), hidden(V3_LIKE).float().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(x)[0]
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_any_valid_width_runs():
    args = replace(LITTLE, dim=22, moe_inter_dim=10)
    Transformer(args)(random_tokens(args, 1, 4))
