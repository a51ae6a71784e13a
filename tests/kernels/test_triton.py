"""Kernels in Triton, by its interpreter: indexing and masks; `test_interpreted.py` starts them.

What they compute on a GPU is `test_gpu_bodies.py`'s.
"""

from dataclasses import replace

import pytest
import torch
import triton_interpreter

from minids import ModelArgs
from minids.kernels import cross_entropy, muon
from minids.model.moe import Gate, Routing, sequence_balance_loss
from minids.runs.optimizers import AdamWInBF16

pytestmark = pytest.mark.skipif(not triton_interpreter.running(),
                                reason="runs in the interpreter's subprocess")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_rows_of_a_token_are_added_up():
    from minids.kernels.triton_experts import sum_slots
    for width in (1, 16, 1500):  # one block, a whole one, and one and a half
        rows, slot, weights = torch.randn(13, width), torch.randint(13, (5, 3)), torch.rand(5, 3)
        for w in (None, weights):
            plain = (rows[slot] * (1 if w is None else w.unsqueeze(-1))).sum(1)
            assert torch.allclose(sum_slots(rows, slot, w), plain, rtol=1e-6, atol=1e-6), width
            assert not torch.allclose(sum_slots(rows, slot.flip(0), w), plain, rtol=1e-3), width


def test_cross_entropy():
    from minids.kernels.triton_cross_entropy import loss_and_gradient
    for vocab_size in (1, 11, 64, 8200):  # masked, whole, and more than one block
        logits, targets = 3 * torch.randn(4, vocab_size), torch.randint(vocab_size, (4,))
        targets[0] = vocab_size - 1  # in the last block
        loss, grad = cross_entropy.loss_and_gradient(logits.clone(), targets)
        mine = loss_and_gradient(logits.clone(), targets)
        assert torch.allclose(mine[0], loss, rtol=1e-6, atol=1e-6), vocab_size
        assert torch.allclose(mine[1], grad, atol=1e-6), vocab_size
        other = loss_and_gradient(logits.clone(), (targets + 1) % vocab_size)
        assert vocab_size == 1 or not torch.allclose(other[1], grad, atol=1e-3)


SIZES = 1, 2048, 3000  # a masked block, a whole one, and one and a half


def test_muon():
    from minids.kernels import triton_muon
    for size in SIZES:
        grad, mean, weight, step = (torch.randn(1, size) for _ in range(4))
        found = []
        for kernels in (muon, triton_muon):
            m, w, out = mean.clone(), weight.clone(), torch.empty(1, 1, size)
            kernels.look_ahead(grad, m, 0.95, out)
            before = w._version
            kernels.move(w, step, 0.9, 0.02)
            assert w._version > before  # copies of the weight notice
            found.append((m, w, out))
        for plain, mine in zip(*found, strict=True):
            assert torch.allclose(mine, plain, rtol=1e-5, atol=1e-6), size
        other = weight.clone()
        triton_muon.move(other, step, 0.9, 0.03)
        assert not torch.allclose(other, found[0][1], rtol=1e-3), size


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("rows, columns", [
    (8, 64), (136, 72), pytest.param(264, 40, marks=pytest.mark.slow)])
def test_symmetric_products(rows, columns, tall):
    """A tile of 128, and more with a rest."""
    x = torch.randn(2, *((columns, rows) if tall else (rows, columns))).half()
    x = x.mT if tall else x
    assert muon.is_mirrored(x)
    g = muon.gram(x)
    exact, wide = x.double() @ x.double().mT, g.double()
    for mine, right in ((g, exact), (muon.polynomial(g, -4.5, 0.01),
                                     0.01 * wide @ wide - 4.5 * wide)):
        assert (mine - right).norm() < 5e-4 * right.norm()  # rounded by 2^-11
        assert (mine - 1.001 * right).norm() > 5e-4 * right.norm()


def test_adamw():
    for size in SIZES:
        start, grads, found = torch.randn(size), torch.randn(3, size), []
        for how, beta in (("step", 0.999), ("in_one_pass", 0.999), ("in_one_pass", 0.9)):
            p = torch.nn.Parameter(start.clone())
            own = AdamWInBF16([p], lr=0.1, betas=(0.9, beta), weight_decay=0.2)
            before = p._version
            for grad in grads:
                p.grad = grad.clone()
                with torch.no_grad():
                    getattr(own, how)()
                own.load_state_dict(own.state_dict())  # which widens the moments
            assert p._version > before  # copies of the weight notice
            moments = (own.state[p][name].float() for name in ("exp_avg", "exp_avg_sq"))
            found.append((p.detach(), *moments))
        plain, mine, other = found
        for a, b in zip(plain[1:], mine[1:], strict=True):
            assert torch.allclose(a, b, rtol=2 ** -7, atol=1e-6), size  # BF16: the other neighbour
        # Such a neighbour in the moments moves the next step, of length 0.1, by 2^-9 of it.
        assert torch.allclose(plain[0], mine[0], rtol=0, atol=0.1 * 2 ** -7), size
        assert not torch.allclose(plain[2], other[2], rtol=0.1), size


@pytest.mark.parametrize("E, K, G, L, bias, S", [
    (8, 2, 1, 1, True, 7), (12, 3, 3, 2, True, 40), (12, 3, 3, 2, False, 64)])
def test_routing_and_balance(E, K, G, L, bias, S):
    """A program chooses for one token, so that few stand for many; the loss takes all in blocks."""
    from minids.kernels.triton_balance import Balance
    from minids.kernels.triton_routing import choose
    args = replace(ModelArgs.preset("nano"), n_routed_experts=E, n_activated_experts=K,
                   n_expert_groups=G, n_limited_groups=L, gate_bias=bias)
    gate, scores = Gate(args), torch.rand(2, S, E)
    if bias:
        gate.bias.copy_(torch.rand(E))
    wanted, few = gate.choose(scores).sort(-1).values, scores[:, -6:].contiguous()
    assert torch.equal(choose(few, gate.bias, K, G, L).sort(-1).values, wanted[:, -6:])
    assert not torch.equal(choose(1 - few, gate.bias, K, G, L).sort(-1).values, wanted[:, -6:])
    a, b = (scores.clone().requires_grad_() for _ in range(2))
    plain = sequence_balance_loss(Routing(a, wanted), args)
    mine = Balance.apply(b, K)
    (3 * plain).backward()
    (3 * mine).backward()
    assert torch.allclose(mine, plain, rtol=1e-6) and torch.allclose(a.grad, b.grad, atol=1e-6)
    assert a.grad.abs().max() > 1e-3
