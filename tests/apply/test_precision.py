"""BF16 copies of the weights: the products of autocast, cast once per step, and seen by nobody."""

import copy

import pytest
import torch
from small_models import LITTLE, random_tokens, scrambled

from minids.apply.precision import StepCopies
from minids.apply.recompute import recompute_blocks

BF16 = torch.bfloat16


def gradients(model, steps: int = 2, copies: StepCopies | None = None) -> tuple[float, dict]:
    """Return the last loss and the sum of some micro-batches' gradients, under autocast."""
    tokens = random_tokens(LITTLE, 4, 32)
    model.zero_grad()
    for _ in range(steps):
        if copies:
            copies.refresh()
        with torch.autocast("cpu", BF16):
            total = model.loss(tokens, tokens.roll(-1, 1)).total
        total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def gap(a: dict, b: dict) -> float:
    return max(((a[n] - b[n]).norm() / a[n].norm()).item() for n in a)


@pytest.mark.parametrize("how", ["none", "blocks", "selective"])
def test_copies_give_the_gradients_of_autocast(how):
    plain = scrambled(LITTLE, dtype=torch.float32)
    model = copy.deepcopy(plain)
    recompute_blocks(model, how)
    names, loss_and_grads = list(model.state_dict()), gradients(plain)
    copies = StepCopies(model)
    assert list(model.state_dict()) == names
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with_copies = gradients(model, copies=copies)
    assert with_copies[0] == loss_and_grads[0]  # the same products of the same numbers
    assert gap(loss_and_grads[1], with_copies[1]) < 1e-2  # gradients are rounded to BF16 once


def test_a_joined_copy_holds_w1_and_w3_and_hands_each_its_own_gradient():
    """On a GPU one product takes both; here nothing does, and a stand-in asks for the gradient."""
    model = scrambled(LITTLE, dtype=torch.float32)
    copies, experts = StepCopies(model), model.layers[1].ffn.experts
    copies.refresh()
    w13, w2 = experts.copies
    assert torch.equal(w13, torch.cat([experts.w1, experts.w3], dim=1).to(BF16))
    assert torch.equal(w2, experts.w2.to(BF16))
    grad = torch.randn(w13.shape).to(BF16)
    for times in (1, 2):  # the second micro-batch adds
        w13.backward(grad)
        assert torch.equal(torch.cat([experts.w1.grad, experts.w3.grad], dim=1), times * grad)
        assert {p.grad.dtype for p in (experts.w1, experts.w3)} == {torch.float32}
        assert w13.grad is None and experts.w2.grad is None


def test_a_changed_weight_reaches_its_copy_and_a_stale_one_is_noticed():
    model = scrambled(LITTLE, dtype=torch.float32)
    copies = StepCopies(model)
    before = gradients(model, 1, copies)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    stale = gradients(model, 1)
    after = gradients(model, 1, copies)
    plain = scrambled(LITTLE, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    right = gradients(plain, 1)
    assert right[0] == after[0] != stale[0] and before[0] != after[0]
    assert gap(right[1], after[1]) < 1e-2 < gap(right[1], stale[1])


def test_a_fused_optimizer_s_step_reaches_the_copies():
    """It changes parameters without raising the version that torch counts for each."""
    model = scrambled(LITTLE, dtype=torch.float32)
    copies, optimizer = StepCopies(model), torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    gradients(model, 1, copies)
    optimizer.step()
    copies.refresh()
    assert all(torch.equal(made, p.detach().bfloat16()) for p, made in copies.pairs)


def test_without_gradients_the_parameters_are_read():
    model = scrambled(LITTLE, dtype=torch.float32)
    tokens = random_tokens(LITTLE, 2, 16)
    with torch.no_grad():
        before = model(tokens)
        StepCopies(model)  # never refreshed
        assert torch.equal(model(tokens), before)
