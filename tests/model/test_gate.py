"""Routing against the paper's rules, token by token."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, gap, scrambled

from minids import ModelArgs
from minids.model.moe import (
    Gate,
    MoE,
    Routing,
)

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
