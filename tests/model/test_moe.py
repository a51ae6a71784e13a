"""Routing against the paper's rules token by token, and experts against one expert at a time."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LITTLE, gap, random_tokens, scrambled

from minids import ModelArgs, Transformer
from minids.apply.recompute import recompute_blocks
from minids.kernels.experts import Combine, Dispatch, grouped_fused
from minids.model import moe
from minids.model.moe import (
    BALANCE_LOSSES,
    Gate,
    MoE,
    Routing,
    expert_balance_loss,
    grouped_linear,
    max_violation,
    sequence_balance_loss,
    sort_by_expert,
    update_bias,
)
from minids.model.objective import mtp_loss

grouped_loop = grouped_linear.plain

EXACT = 1e-12  # FP64 sums of a few dozen products in another order
V3_LIKE = replace(LITTLE, n_routed_experts=16, n_expert_groups=4, n_limited_groups=2,
                  n_activated_experts=4)
V2_LIKE = replace(V3_LIKE, score_func="softmax", gate_bias=False, route_scale=16.0)
KINDS = {
    "V3, groups": V3_LIKE,
    "V3, one group": replace(V3_LIKE, n_expert_groups=1, n_limited_groups=1),
    "V2, groups": V2_LIKE,
    "V2-Lite": replace(V2_LIKE, route_scale=1.0, n_expert_groups=1, n_limited_groups=1),
    "sigmoid without bias": replace(V3_LIKE, gate_bias=False),
    "softmax with bias": replace(V3_LIKE, score_func="softmax"),
    "no shared expert": replace(V3_LIKE, n_shared_experts=0),
    "two shared experts": replace(V3_LIKE, n_shared_experts=2),
}


def moe_layer(args: ModelArgs, kind: type = MoE) -> MoE:
    layer = scrambled(args).layers[1].ffn
    layer.__class__ = kind
    return layer


def gate_of(args: ModelArgs, kind: type = Gate) -> Gate:
    gate = moe_layer(args).gate
    gate.__class__ = kind
    return gate


def hidden(args: ModelArgs, batch: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, args.dim, generator=generator, dtype=torch.float64)


def route(gate: Gate, u: torch.Tensor) -> dict[int, float]:
    """Expert -> weight for one token u: (D,), by V3 equations 12 to 16 and V2's variant."""
    args = gate.args
    logits = [float(row @ u) for row in gate.weight]
    if args.score_func == "sigmoid":
        s = [1 / (1 + 2.718281828459045 ** -x) for x in logits]
    else:
        s = [2.718281828459045 ** x for x in logits]
        s = [x / sum(s) for x in s]
    choice = [x + (0.0 if gate.bias is None else float(gate.bias[i])) for i, x in enumerate(s)]
    size = args.n_routed_experts // args.n_expert_groups
    best = 1 if gate.bias is None else 2
    groups = [range(g * size, (g + 1) * size) for g in range(args.n_expert_groups)]
    groups.sort(key=lambda g: -sum(sorted((choice[i] for i in g), reverse=True)[:best]))
    reachable = [i for g in groups[:args.n_limited_groups] for i in g]
    chosen = sorted(reachable, key=lambda i: -choice[i])[:args.n_activated_experts]
    total = sum(s[i] for i in chosen) if args.score_func == "sigmoid" else 1.0
    return {i: s[i] / total * args.route_scale for i in chosen}


def routing_error(gate: Gate) -> float:
    """The worst weight's distance from the rules; 1 for another choice of experts."""
    x = hidden(gate.args)
    weights, routing = gate(x)
    worst = 0.0
    for u, w, indices in zip(x.flatten(0, 1), weights.flatten(0, 1),
                             routing.indices.flatten(0, 1).tolist(), strict=True):
        expected = route(gate, u)
        if set(indices) != set(expected):
            return 1.0
        worst = max(worst, *(abs(w[k].item() - expected[i]) for k, i in enumerate(indices)))
    return worst


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_gate_follows_the_papers_rules(kind):
    assert routing_error(gate_of(KINDS[kind])) < EXACT


class BiasedWeights(Gate):
    """Weights taken from the scores with the bias."""

    def forward(self, x):
        args, scores = self.args, self.scores(x)
        weights, indices = self.limit_groups(scores + self.bias).topk(args.n_activated_experts)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights * args.route_scale, Routing(scores, indices)


class ZeroMask(Gate):
    """Experts of other groups set to 0, which beats every negative choice."""

    def limit_groups(self, choice):
        limited = super().limit_groups(choice)
        return limited.masked_fill(limited.isinf(), 0.0)


class BestExpertOfGroup(Gate):
    """V2's group score in a V3 gate."""

    def limit_groups(self, choice):
        bias, self.bias = self.bias, None
        limited = super().limit_groups(choice)
        self.bias = bias
        return limited


class BestPairOfGroup(Gate):
    """V3's group score in a V2 gate."""

    def limit_groups(self, choice):
        self.bias = choice
        limited = super().limit_groups(choice)
        self.bias = None
        return limited


class NotRenormalised(Gate):
    """Sigmoid scores as they are."""

    def forward(self, x):
        weights, routing = super().forward(x)
        return routing.scores.gather(-1, routing.indices) * self.args.route_scale, routing


class Renormalised(Gate):
    """Softmax scores divided by their sum over the chosen."""

    def forward(self, x):
        weights, routing = super().forward(x)
        return weights / weights.sum(-1, keepdim=True) * self.args.route_scale, routing


class NotScaled(Gate):
    """No route_scale."""

    def forward(self, x):
        weights, routing = super().forward(x)
        return weights / self.args.route_scale, routing


@pytest.mark.parametrize("wrong, kind", [
    (BiasedWeights, "V3, groups"), (BiasedWeights, "V3, one group"), (ZeroMask, "V3, groups"),
    (BestExpertOfGroup, "V3, groups"), (BestPairOfGroup, "V2, groups"),
    (NotRenormalised, "V3, groups"), (Renormalised, "V2, groups"), (NotScaled, "V3, groups")])
@torch.no_grad()
def test_a_wrong_gate_is_caught(wrong, kind):
    gate = gate_of(KINDS[kind], wrong)
    if wrong is ZeroMask:
        gate.bias -= 1.0  # every choice is negative now
    assert routing_error(gate) > 1e-3


@torch.no_grad()
def test_negative_biases_leave_the_groups_alone():
    gate = gate_of(V3_LIKE)
    x = hidden(V3_LIKE)
    before = gate(x)[1].indices.sort(-1).values
    gate.bias -= 5.0
    assert routing_error(gate) < EXACT
    assert torch.equal(gate(x)[1].indices.sort(-1).values, before)


def bias_in_weights(gate: Gate) -> float:
    """Return how far the weights of chosen experts are from a function of their scores alone."""
    weights, routing = gate(hidden(gate.args))
    scores = routing.scores.gather(-1, routing.indices)
    return gap(weights, scores / scores.sum(-1, keepdim=True) * gate.args.route_scale)


@torch.no_grad()
def test_the_bias_changes_the_choice_and_never_the_weights():
    gate, x = gate_of(V3_LIKE), hidden(V3_LIKE)
    choices = []
    for size in (0.0, 0.3, 3.0):
        gate.bias.copy_(torch.linspace(-size, size, 16))
        assert bias_in_weights(gate) < EXACT
        choices += [gate(x)[1].indices.sort(-1).values]
    assert not torch.equal(choices[0], choices[1]) and not torch.equal(choices[1], choices[2])
    gate.__class__ = BiasedWeights
    assert bias_in_weights(gate) > 1e-2


def test_no_gradient_reaches_the_bias_and_every_chosen_score_has_one():
    gate = gate_of(V3_LIKE)
    weights, routing = gate(hidden(V3_LIKE))
    assert not gate.bias.requires_grad and "bias" in dict(gate.named_buffers())
    (weights * torch.randn_like(weights)).sum().backward()
    used = routing.load() > 0
    assert torch.equal(gate.weight.grad.abs().sum(-1) > 0, used)


def test_the_gate_computes_in_fp32_under_autocast_and_in_a_bf16_model():
    gate, x = gate_of(V3_LIKE).float(), hidden(V3_LIKE).float()
    scores = gate.scores(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.scores(x), scores)
    weights, routing = gate.bfloat16()(x.bfloat16())
    assert weights.dtype == routing.scores.dtype == torch.float32


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


def update_is_right(update) -> bool:
    """Return whether an update moves each bias by exactly `speed` against its load."""
    bias = torch.tensor([0.5, -0.5, 0.0, 1.0, 0.0])
    expected = bias + 0.01 * torch.tensor([-1.0, 1.0, 0.0, -1.0, 1.0])
    update(bias, torch.tensor([10, 0, 5, 6, 4]), 0.01)
    return torch.equal(bias, expected)


def test_the_bias_moves_one_step_against_the_load():
    def with_the_load(bias, load, speed):
        bias += speed * torch.sign(load - load.float().mean())

    def proportional(bias, load, speed):
        bias += speed * (load.float().mean() - load)

    def not_in_place(bias, load, speed):
        bias = bias + speed * torch.sign(load.float().mean() - load)

    assert update_is_right(update_bias)
    for wrong in (with_the_load, proportional, not_in_place):
        assert not update_is_right(wrong)


@torch.no_grad()
def test_updates_even_out_the_load():
    gate, x = gate_of(KINDS["V3, one group"]), hidden(V3_LIKE, 8, 32)
    x += 2 * x[0, 0]  # all tokens lean to the same experts
    gate.bias.zero_()
    before = max_violation(gate(x)[1].load())
    for _ in range(100):
        update_bias(gate.bias, gate(x)[1].load(), 0.01)
    # 256 tokens x 4 over 16 experts: 64 each; a step of 0.01 moves a few tokens at a time.
    assert before > 1 and max_violation(gate(x)[1].load()) < 0.2


def loop_balance(scores, k: int) -> torch.Tensor:
    """V3 equations 17 to 20 with alpha = 1, averaged over sequences, in loops."""
    per_sequence = []
    for s in scores:  # (T, E)
        n_tokens, n_experts = s.shape
        counts = [0] * n_experts
        for row in s.tolist():
            for i in sorted(range(n_experts), key=lambda i, row=row: -row[i])[:k]:
                counts[i] += 1
        total = 0
        for i in range(n_experts):
            f = n_experts / (k * n_tokens) * counts[i]
            p = sum(s[t, i] / s[t].sum() for t in range(n_tokens)) / n_tokens
            total = total + f * p
        per_sequence += [total]
    return sum(per_sequence) / len(per_sequence)


def balance_errors(loss) -> tuple[float, float]:
    """Return how far a balance loss is from the loops: its value, its gradient."""
    gate, x = gate_of(V3_LIKE), hidden(V3_LIKE, 2, 8)

    def results(value):
        weights, routing = gate(x)
        out = value(routing)
        grad = torch.autograd.grad(out, gate.weight, allow_unused=True)[0] \
            if out.requires_grad else None
        return out, torch.zeros_like(gate.weight) if grad is None else grad

    mine = results(lambda routing: loss(routing, V3_LIKE))
    exact = results(lambda routing: loop_balance(routing.scores, V3_LIKE.n_activated_experts))
    return gap(mine[0], exact[0]), gap(mine[1], exact[1])


def test_the_balance_loss_is_the_papers_sum_with_a_gradient_through_the_scores_only():
    assert max(balance_errors(sequence_balance_loss)) < EXACT


def over_the_batch(routing, args):
    whole = Routing(routing.scores.flatten(0, 1)[None], routing.indices.flatten(0, 1)[None])
    return sequence_balance_loss(whole, args)


def counts_with_bias(routing, args):
    """The experts actually visited instead of those that the scores alone would choose."""
    counts = torch.zeros_like(routing.scores).scatter_(-1, routing.indices, 1.0).mean(1)
    p = (routing.scores / routing.scores.sum(-1, keepdim=True)).mean(1)
    f = counts * args.n_routed_experts / args.n_activated_experts
    return (f * p).sum(-1).mean()


def scores_not_normalised(routing, args):
    spread = torch.nn.functional.pad(routing.scores, (0, 1))  # an idle expert takes the rest
    spread[..., -1] = 1 - routing.scores.sum(-1)
    return sequence_balance_loss(routing._replace(scores=spread),
                                 replace(args, n_routed_experts=16))


def detached(routing, args):
    return sequence_balance_loss(routing._replace(scores=routing.scores.detach()), args)


@pytest.mark.parametrize("wrong", [over_the_batch, counts_with_bias, scores_not_normalised])
def test_a_wrong_balance_loss_is_caught(wrong):
    assert balance_errors(wrong)[0] > 1e-4


def test_a_balance_loss_that_teaches_the_gate_nothing_is_caught():
    value, gradient = balance_errors(detached)
    assert value < EXACT and gradient == 1.0


def loop_expert_balance(routing: Routing) -> torch.Tensor:
    """V2 equations 23 to 25 with alpha_1 = 1, over all tokens of the batch, in loops."""
    scores, indices = routing.scores.flatten(0, 1), routing.indices.flatten(0, 1).tolist()
    n_tokens, n_experts = scores.shape
    total = 0
    for i in range(n_experts):
        selected = sum(i in experts for experts in indices)
        p = sum(scores[t, i] for t in range(n_tokens)) / n_tokens
        total = total + n_experts / (len(indices[0]) * n_tokens) * selected * p
    return total


def expert_balance_errors(loss) -> tuple[float, float]:
    """Return how far a loss is from the loops on V2's gate: its value, its gradient."""
    gate, x = gate_of(V2_LIKE), hidden(V2_LIKE, 2, 8)

    def results(value):
        out = value(gate(x)[1])
        return out, torch.autograd.grad(out, gate.weight)[0]

    pairs = zip(results(lambda r: loss(r, V2_LIKE)), results(loop_expert_balance), strict=True)
    return tuple(gap(mine, exact) for mine, exact in pairs)


def test_v2s_balance_loss_is_the_papers_sum():
    assert max(expert_balance_errors(expert_balance_loss)) < EXACT


def through_the_counts(routing, args):
    """Soft counts in place of counted tokens: the gradient flows through both factors."""
    p = routing.scores.mean(dim=(0, 1))
    return (args.n_routed_experts * p * p).sum()


@pytest.mark.parametrize("wrong", [sequence_balance_loss, through_the_counts])
def test_a_wrong_v2_loss_is_caught(wrong):
    assert max(expert_balance_errors(wrong)) > 1e-4


def test_the_model_adds_up_the_balance_loss_that_is_asked_for():
    model = scrambled(LITTLE)
    tokens = random_tokens(LITTLE, 2, 12)
    routings = model.hidden(tokens).routings
    routings += mtp_loss(model, model.hidden(tokens).states, tokens)[1]
    for name, loss in BALANCE_LOSSES.items():
        expected = sum(loss(routing, LITTLE) for routing in routings)
        assert gap(model.loss(tokens, tokens, balance_loss=name).balance, expected) < EXACT


def test_the_balance_loss_is_one_at_equal_scores_and_largest_when_all_agree():
    even = Routing(torch.full((2, 8, 16), 0.3), torch.zeros(2, 8, 4, dtype=torch.int64))
    # Ties may fall on any expert: with equal P the sum of f, which is E, is all that counts.
    assert sequence_balance_loss(even, V3_LIKE).item() == pytest.approx(1.0, rel=1e-6)
    scores = torch.full((2, 8, 16), 1e-9)
    scores[..., :4] = 1.0
    assert sequence_balance_loss(even._replace(scores=scores), V3_LIKE).item() == pytest.approx(4)


def test_max_violation_is_0_when_balanced_and_its_most_when_k_experts_get_all():
    assert max_violation(torch.full((16,), 7)) == 0
    assert max_violation(torch.tensor([10] * 4 + [0] * 12)) == 16 / 4 - 1
    layers = torch.tensor([[3, 1], [2, 2], [0, 4]])
    assert max_violation(layers).tolist() == [0.5, 0.0, 1.0]


MODEL_ARGS = replace(LITTLE, n_layers=3, n_dense_layers=1, n_mtp_layers=1)


class Counter:
    """Counts in the forward pass itself, as a buffer of the gate would."""

    def __init__(self, model: Transformer):
        self.load = torch.zeros(MODEL_ARGS.n_routed_experts, dtype=torch.int64)
        model.layers[1].ffn.gate.register_forward_hook(self)

    def __call__(self, gate, inputs, outputs):
        self.load += outputs[1].load()


@pytest.mark.parametrize("recompute", [False, True])
def test_loads_count_each_token_once(recompute):
    model, tokens = scrambled(MODEL_ARGS), random_tokens(MODEL_ARGS, 2, 10)
    counter = Counter(model)
    if recompute:
        recompute_blocks(model)
    losses = model.loss(tokens, tokens.roll(-1, 1))
    losses.total.backward()
    k = MODEL_ARGS.n_activated_experts
    assert losses.loads.sum(1).tolist() == [20 * k, 20 * k, 18 * k]  # MTP: one position less
    # The same check finds the wrong variant: with recomputation a counter inside counts twice.
    assert counter.load.sum() == 20 * k * (2 if recompute else 1)


def test_the_mtp_modules_gate_is_in_loads_and_biases():
    model, tokens = scrambled(MODEL_ARGS), random_tokens(MODEL_ARGS, 2, 10)
    for bias in model.gate_biases():
        bias.zero_()
    loads = model.loss(tokens, tokens.roll(-1, 1)).loads
    biases = model.gate_biases()
    assert len(loads) == len(biases) == 3
    assert biases[2] is model.mtp[0].block.ffn.gate.bias
    model.update_gate_bias(loads, 0.01)
    for bias, load in zip(biases, loads, strict=True):
        expected = 0.01 * torch.sign(load.double().mean() - load)
        assert torch.equal(bias, expected)
    without = model.loss(tokens, tokens.roll(-1, 1), mtp_weight=0).loads
    last = biases[2].clone()
    model.update_gate_bias(without, 0.01)
    assert len(without) == 2 and torch.equal(biases[2], last)


def moved(model: Transformer, action) -> list[str]:
    """The names of tensors that an action changes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    action(model)
    return [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]


def test_only_the_update_moves_a_bias():
    model, tokens = scrambled(MODEL_ARGS), random_tokens(MODEL_ARGS, 2, 10)
    loads = model.loss(tokens, tokens).loads
    assert moved(model, lambda m: m.loss(tokens, tokens).total.backward()) == []
    assert moved(model, lambda m: m.eval()(tokens)) == []
    assert moved(model, lambda m: m.train()(tokens)) == []
    names = ["layers.1.ffn.gate.bias", "layers.2.ffn.gate.bias", "mtp.0.block.ffn.gate.bias"]
    assert moved(model, lambda m: m.update_gate_bias(loads, 0.01)) == names


def test_any_valid_width_runs():
    args = replace(LITTLE, dim=22, moe_inter_dim=10)
    Transformer(args)(random_tokens(args, 1, 4))
