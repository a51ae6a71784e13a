"""The bias update and the balance losses against the papers' sums, and where loads are counted."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, gap, random_tokens, scrambled
from test_gate import EXACT, KINDS, V2_LIKE, V3_LIKE, gate_of, hidden

from minids import Transformer
from minids.apply.recompute import recompute_blocks
from minids.model.moe import (
    BALANCE_LOSSES,
    Routing,
    expert_balance_loss,
    max_violation,
    sequence_balance_loss,
    update_bias,
)
from minids.model.objective import mtp_loss


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
