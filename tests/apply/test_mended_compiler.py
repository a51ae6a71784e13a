"""What `minids.apply.compile` mends in torch's compiler: gradients as the code is written."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minids.apply.compile import (
    Compiled,
    compile_blocks,
    mend_compiler,
    own_forward,
    return_results_once,
    wait_for_stores,
)
from minids.apply.precision import StepCopies
from minids.config import ModelArgs
from minids.kernels.registry import using
from minids.model.moe import Gate
from minids.model.transformer import Transformer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16


def written() -> type:
    """Return a class that writes lines as the compiler's does, a load in the loop or before it."""
    class Kernel:
        def __init__(self):
            self.loads, self.body = SimpleNamespace(_lines=[]), SimpleNamespace(_lines=[])

        def load(self, name, index):
            (self.body if index == 0 else self.loads)._lines.append(f"load {name}")

        def store(self, name, index, value, mode=None):
            self.loads._lines.append(f"store {name}")

    wait_for_stores(Kernel)
    return Kernel


def test_a_barrier_stands_before_a_load_of_what_was_stored():
    kernel = written()()
    kernel.load("a", 1)
    kernel.store("b", 1, None, mode="atomic_add")
    kernel.load("a", 1)
    kernel.load("b", 1)
    kernel.load("b", 0)
    assert kernel.loads._lines == ["load a", "store b", "load a", "tl.debug_barrier()", "load b"]
    assert kernel.body._lines == ["tl.debug_barrier()", "load b"]


def test_another_kernel_has_not_stored_it():
    kernels = written()
    kernels().store("b", 1, None)
    fresh = kernels()
    fresh.load("b", 1)
    assert fresh.loads._lines == ["load b"]


class Doubled(torch.autograd.Function):
    """2 x, which a cast to its own type returns under another name."""

    @staticmethod
    def forward(ctx, x):
        return (2 * x).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_the_gradient_of_a_result_with_two_names_arrives():
    """It was zero in torch 2.11."""
    mend_compiler()
    x = torch.ones(3, requires_grad=True)
    doubled = torch.compile(lambda x: Doubled.apply(x), backend="aot_eager", fullgraph=True)
    doubled(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_a_traced_forward_returns_no_result_twice():
    """Unless a caller says otherwise, as those do which have no gradients."""
    tracing = SimpleNamespace(speculate_subgraph_with_auto_output_flattening=lambda **named: named)
    return_results_once(tracing)
    trace = tracing.speculate_subgraph_with_auto_output_flattening
    assert trace(tracer=1) == dict(tracer=1, filter_aliased_intermediates=True)
    assert trace(filter_aliased_intermediates=False) == dict(filter_aliased_intermediates=False)


def test_the_compiler_is_mended_once(monkeypatch):
    import torch._dynamo.variables.higher_order_ops as tracing
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.codegen.triton import TritonKernel

    traced = "speculate_subgraph_with_auto_output_flattening"
    for owner, name in ((TritonKernel, "load"), (TritonKernel, "store"), (tracing, traced)):
        monkeypatch.setattr(owner, name, print)
    monkeypatch.delattr(TritonKernel, "mended", raising=False)
    monkeypatch.setattr(inductor, "kernel_name_max_ops", 10)
    found = []
    for _ in range(2):
        mend_compiler()
        found.append((TritonKernel.load, TritonKernel.store, getattr(tracing, traced)))
    assert found[0] == found[1] and print not in found[0]
    assert inductor.kernel_name_max_ops == 11
    assert functorch.backward_pass_autocast == "off"
    assert not inductor.comprehensive_padding and not inductor.triton.autotune_pointwise


@pytest.mark.slow  # the compiler takes half a minute
def test_the_compiled_gate_has_its_gradient_in_fp32():
    """A gradient by way of BF16 is off by 2e-3; FP32 sums of 512 products in another order 1e-6."""
    torch.manual_seed(0)
    gate = Gate(ModelArgs.preset("nano"))
    torch.nn.init.normal_(gate.weight)
    x, weigh = torch.randn(4, 128, gate.weight.size(1)), torch.randn(4, 128, 2)

    def gradient(forward, dtype):
        gate.to(dtype).weight.grad = None
        weights = forward(x.to(dtype))[0]
        (weights * weigh.to(dtype)).sum().backward()
        return gate.weight.grad.double()

    exact = gradient(gate, torch.float64)
    gate.uncompiled, compiled = gate.forward, Compiled(own_forward, print)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient(lambda x: compiled(gate, x), torch.float32)
    assert (found - exact).norm() <= 1e-5 * exact.norm()


def leave_no_numbers():
    """Fill memory that the GPU's allocator will hand out again with NaN."""
    for size, count in (2**27, 6), (2**22, 50), (2**20, 100), (2**17, 200), (2**10, 300):
        kept = [torch.full((size,), float("nan"), device="cuda") for _ in range(count)]
        del kept


@needs_gpu
@pytest.mark.parametrize("preset, cut, batch, length, dtype", [
    ("tiny", {}, 8, 256, BF16), ("small", dict(n_layers=4), 4, 1024, BF16),
    ("gpu-80gb", dict(n_layers=3), 2, 1024, BF16), ("micro", {}, 16, 64, BF16),
    ("moonlight", dict(n_layers=2, vocab_size=8192), 2, 1024, BF16),
    ("micro", {}, 16, 64, torch.float32)])
def test_compiled_gradients_on_a_gpu_are_the_plain_ones(preset, cut, batch, length, dtype):
    """BF16 products over FP32 weights beside FP32 ones, and these compiled: a BF16 forward pass
    alone is off by up to 0.2 at a gate, whose choices rounding changes. A gradient that got lost is
    off by 1, a read of what was not yet written by 1e4, one of what nobody writes is NaN."""
    args = replace(ModelArgs.preset(preset), **cut)
    tokens = torch.randint(args.vocab_size, (batch, length + 1),
                           generator=torch.Generator().manual_seed(1)).cuda()

    def gradients(setting, fast):
        torch.manual_seed(0)
        model = Transformer(args).cuda()
        copies = StepCopies(model) if fast and dtype == BF16 else None
        if fast:
            compile_blocks(model, dtype, batch)
        for _ in range(2):  # the second pass finds memory that has been used
            model.zero_grad()
            leave_no_numbers()
            if copies:
                copies.refresh()
            with using(setting), torch.autocast("cuda", BF16, fast and dtype == BF16):
                model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).total.backward()
        return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}

    exact, found = gradients("off", False), gradients("auto", True)
    gaps = {n: ((found[n] - g).norm() / g.norm().clamp(1e-12)).item() for n, g in exact.items()}
    assert max(gaps.values()) < 0.4, sorted(gaps.items(), key=lambda pair: -pair[1])[:5]
