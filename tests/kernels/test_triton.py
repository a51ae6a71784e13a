"""Kernels in Triton, by its interpreter: indexing and masks, in a process of its own, which needs
no GPU. What they compute on one is `test_gpu_bodies.py`'s."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install 'triton==3.6.*'")

SUMS = """
import torch
from minids.kernels.triton_experts import sum_slots
torch.manual_seed(0)
for width in (1, 16, 1500):  # one block, a whole one, and one and a half
    rows, slot, weights = torch.randn(13, width), torch.randint(13, (5, 3)), torch.rand(5, 3)
    for w in (None, weights):
        plain = (rows[slot] * (1 if w is None else w.unsqueeze(-1))).sum(1)
        assert torch.allclose(sum_slots(rows, slot, w), plain, rtol=1e-6, atol=1e-6), width
        assert not torch.allclose(sum_slots(rows, slot.flip(0), w), plain, rtol=1e-3), width
"""
ENTROPY = """
import torch
from minids.kernels.cross_entropy import loss_and_gradient as plain
from minids.kernels.triton_cross_entropy import loss_and_gradient
torch.manual_seed(0)
for vocab_size in (1, 11, 64, 8200):  # masked, whole, and more than one block
    logits, targets = 3 * torch.randn(4, vocab_size), torch.randint(vocab_size, (4,))
    loss, grad = plain(logits.clone(), targets)
    mine = loss_and_gradient(logits.clone(), targets)
    assert torch.allclose(mine[0], loss, rtol=1e-6, atol=1e-6), vocab_size
    assert torch.allclose(mine[1], grad, atol=1e-6), vocab_size
    other = loss_and_gradient(logits.clone(), (targets + 1) % vocab_size)
    assert vocab_size == 1 or not torch.allclose(other[1], grad, atol=1e-3)
"""
MUON = """
import torch
import triton_interpreter
assert triton_interpreter.running()  # a loop's bound is a kernel's argument
from minids.kernels import muon, triton_muon
torch.manual_seed(0)
for size in (1, 2048, 3000):  # a masked block, a whole one, and one and a half
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

for rows, columns in ((8, 64), (136, 72), (264, 40)):  # a tile of 128, and more with a rest
    for tall in (False, True):
        x = torch.randn(2, *((columns, rows) if tall else (rows, columns))).half()
        x = x.mT if tall else x
        assert muon.is_mirrored(x)
        g = muon.gram(x)
        exact, wide = x.double() @ x.double().mT, g.double()
        for mine, right in ((g, exact), (muon.and_square(g, -4.5, 0.01),
                                         0.01 * wide @ wide - 4.5 * wide)):
            assert (mine - right).norm() < 5e-4 * right.norm(), (rows, tall)  # rounded by 2^-11
            assert (mine - 1.001 * right).norm() > 5e-4 * right.norm(), (rows, tall)
"""
ADAMW = """
import torch
import triton_interpreter
assert triton_interpreter.running()  # which then rounds to BF16 as a GPU does
from minids.runs.optimizers import AdamWInBF16
for size in (1, 2048, 3000):  # a masked block, a whole one, and one and a half
    torch.manual_seed(0)
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
    for a, b in zip(plain[1:], mine[1:]):
        assert torch.allclose(a, b, rtol=2 ** -7, atol=1e-6), size  # BF16: the other neighbour
    # Such a neighbour in the moments moves the next step, of length 0.1, by 2^-9 of it.
    assert torch.allclose(plain[0], mine[0], rtol=0, atol=0.1 * 2 ** -7), size
    assert not torch.allclose(plain[2], other[2], rtol=0.1), size
"""
GATE = """
from dataclasses import replace
import torch
from minids import ModelArgs
from minids.kernels.triton_balance import Balance
from minids.kernels.triton_routing import choose
from minids.model.moe import Gate, Routing, sequence_balance_loss
torch.manual_seed(0)
for E, K, G, L, bias, S in (
        (8, 2, 1, 1, True, 7), (12, 3, 3, 2, True, 40), (12, 3, 3, 2, False, 64)):
    args = replace(ModelArgs.preset("nano"), n_routed_experts=E, n_activated_experts=K,
                   n_expert_groups=G, n_limited_groups=L, gate_bias=bias)
    gate, scores = Gate(args), torch.rand(2, S, E)
    if bias:
        gate.bias.copy_(torch.rand(E))
    wanted = gate.choose(scores).sort(-1).values
    assert torch.equal(choose(scores, gate.bias, K, G, L).sort(-1).values, wanted)
    assert not torch.equal(choose(1 - scores, gate.bias, K, G, L).sort(-1).values, wanted)
    a, b = (scores.clone().requires_grad_() for _ in range(2))
    plain = sequence_balance_loss(Routing(a, wanted), args)
    mine = Balance.apply(b, K)
    (3 * plain).backward()
    (3 * mine).backward()
    assert torch.allclose(mine, plain, rtol=1e-6) and torch.allclose(a.grad, b.grad, atol=1e-6)
    assert a.grad.abs().max() > 1e-3
"""


SOURCES = dict(sum_slots=SUMS, cross_entropy=ENTROPY, muon=MUON, gate=GATE, adamw=ADAMW)
RUN = """
import json, sys, traceback
faults = {}
for name, source in json.load(sys.stdin).items():
    try:
        exec(source, {})
    except Exception:
        faults[name] = traceback.format_exc()
print(json.dumps(faults))
"""


@pytest.fixture(scope="module")
def faults() -> dict[str, str]:
    """Find what is wrong with each in one process, since importing torch takes seconds."""
    done = subprocess.run([sys.executable, "-c", RUN], input=json.dumps(SOURCES), text=True,
                          capture_output=True, timeout=300, env=os.environ | {
                              "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SOURCES)
def test_by_the_interpreter(name, faults):
    assert faults.get(name, "") == ""
