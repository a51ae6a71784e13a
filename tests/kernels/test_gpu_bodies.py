"""Bodies that run on a GPU or in compiled code: equal to their plain definitions, and chosen there.

On a CPU those that are made of torch's operations run here too; the rest is skipped without a GPU,
and kernels in Triton run by its interpreter (`test_triton.py`).
"""

import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from gpu_cases import BF16, BY_A_COMPILER, CASES, F32, GPU_ONLY
from small_models import OnGpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minids import kernels
from minids.kernels import attention, cross_entropy, experts, muon, precision
from minids.kernels.registry import REGISTRY, recorded, using
from minids.model import moe as plain
from minids.model.mla import attention as plain_attention
from minids.runs.optimizers import Muon, orthogonalise

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Norm of the difference over the norm. FP32: sums in another order. BF16: both sides round to 8
# bits, in a chain of up to four products, against the plain definition in FP32.
TOLERANCE = {F32: 1e-5, BF16: 1.5e-2}


def leaves(arguments: tuple) -> list[Tensor]:
    """Return what learns: tensors, and the experts' matrices of a layer."""
    found = []
    for a in arguments:
        found += [a] if isinstance(a, Tensor) and a.requires_grad else []
        found += [a.scores] if isinstance(a, plain.Routing) else []
        found += a.experts.parameters() if isinstance(a, plain.MoE) else []
    return found


def results(function, arguments: tuple) -> list[Tensor]:
    """Return a function's output and the gradients of what learns, in FP64."""
    out = function(*arguments)
    if not out.is_floating_point():  # experts chosen, in no order
        return [out.sort(-1).values.double()]
    weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    learning = leaves(arguments)
    grads = torch.autograd.grad((out * weigh).sum(), learning) if learning else []
    return [t.detach().double() for t in (out, *grads)]


def widened(arguments: tuple) -> tuple:
    """Return the same numbers in FP32; a layer is changed in place."""
    return tuple(a.float() if isinstance(a, torch.nn.Module) else
                 a.detach().float().requires_grad_() if isinstance(a, Tensor) and a.requires_grad
                 else a for a in arguments)


def in_fp64(argument):
    """Return an argument with all its numbers in FP64; a layer is changed in place."""
    if isinstance(argument, torch.nn.Module):
        return argument.double()
    if isinstance(argument, plain.Routing):
        return plain.Routing(in_fp64(argument.scores), argument.indices)
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.detach().double().requires_grad_(argument.requires_grad)
    return argument


def largest_gap(function, body, arguments: tuple) -> float:
    mine = results(body, arguments)
    with using("off"):
        exact = results(function, widened(arguments))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(mine, exact, strict=True))


def body_of(key: tuple[str, str]):
    return next(b for b in REGISTRY[key[0]].bodies if b.__name__ == key[1])


@pytest.mark.parametrize("key", [k for k in CASES if k[1] not in GPU_ONLY], ids="-".join)
def test_on_a_cpu_the_body_equals_the_plain_definition(key):
    torch.manual_seed(0)
    body = body_of(key)
    assert largest_gap(REGISTRY[key[0]], body, CASES[key](F32, "cpu")) < TOLERANCE[F32]

    def wrong(*arguments):
        first, *rest = arguments
        return body(first * 1.001 if isinstance(first, Tensor) else first,
                    *[1.001 * a if isinstance(a, Tensor) and a.is_floating_point() else a
                      for a in rest])

    assert largest_gap(REGISTRY[key[0]], wrong, CASES[key](F32, "cpu")) > TOLERANCE[F32]


@needs_gpu
@pytest.mark.parametrize("key", CASES, ids="-".join)
def test_on_a_gpu_the_body_runs_and_equals_the_plain_definition(key):
    torch.manual_seed(0)
    function, arguments = REGISTRY[key[0]], CASES[key](BF16, "cuda")
    if key[1] in BY_A_COMPILER:
        torch.compiler.reset()
        call = torch.compile(lambda *given: function(*given))  # a function of its own each time
    else:
        call = function
    with recorded() as record:
        gap = largest_gap(function, call, arguments)
    assert record[key] == 1 and gap < TOLERANCE[BF16], (gap, dict(record))


@needs_gpu
@pytest.mark.parametrize("key", [k for k in CASES if k[1] not in BY_A_COMPILER], ids="-".join)
def test_on_a_gpu_fp64_stays_fp64(key):
    """Layouts of ranks are held to one GPU by 1e-12, which a body that adds up in FP32 is not."""
    torch.manual_seed(0)
    function, arguments = REGISTRY[key[0]], tuple(map(in_fp64, CASES[key](F32, "cuda")))
    mine = results(function, arguments)
    with using("off"):
        exact = results(function, arguments)
    for a, b in zip(mine, exact, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm(), key


def test_kernels_that_compute_in_fp32_take_no_fp64(monkeypatch):
    """The numbers are fake: a CPU decides as a GPU would, and runs no kernel."""
    monkeypatch.setattr(precision, "TRITON", True)
    taken = []
    for name in ("triton_experts", "triton_muon"):
        stub = SimpleNamespace(**dict.fromkeys(("sum_slots", "look_ahead", "move"),
                                               lambda x, *rest: taken.append(x.dtype)))
        monkeypatch.setitem(sys.modules, f"minids.kernels.{name}", stub)
        monkeypatch.setattr(kernels, name, stub, raising=False)
    for dtype in (F32, BF16, torch.float64):
        with FakeTensorMode(), torch.device("cuda"):
            rows = torch.empty(6, 4, dtype=dtype)
            slot = torch.empty(3, 2, dtype=torch.int64)
            for call in (lambda r, slot=slot: experts.sum_slots(r, slot),
                         lambda r: muon.look_ahead(r, r, 0.9, r),
                         lambda r: muon.move(r, r, 0.9, 0.1)):
                with suppress(RuntimeError):  # what is left without a kernel needs a GPU
                    call(rows)
    assert taken == 3 * [F32] + 3 * [BF16]


@needs_gpu
def test_a_wrong_result_is_noticed_on_a_gpu():
    for key in CASES:
        torch.manual_seed(0)
        body = body_of(key)
        gap = largest_gap(REGISTRY[key[0]], lambda *a, body=body: body(*a).roll(1, 0)
                          if body(*a).ndim else 1.02 * body(*a), CASES[key](BF16, "cuda"))
        assert gap > TOLERANCE[BF16], key


@needs_gpu
@pytest.mark.parametrize("dtype, error", [(F32, 1e-5), (BF16, 2e-2)])
def test_muon_steps_on_a_gpu_as_on_a_cpu(dtype, error):
    """In BF16 the iteration rounds in other places; the copies of the weights see the change."""
    shapes, ends = [(24, 40), (40, 24), (3, 24, 40)], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]
        muon, before = Muon(weights, lr=0.1, dtype=dtype), [w._version for w in weights]
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn(w.shape).to(device)
            muon.step()
        assert all(w._version > old for w, old in zip(weights, before, strict=True))
        ends.append([w.detach().cpu() for w in weights])
    for a, b in zip(*ends, strict=True):
        assert (a - b).norm() / a.norm() < error


@needs_gpu
@pytest.mark.parametrize("weighted", [False, True])
def test_triton_adds_up_slots(weighted):
    torch.manual_seed(0)
    indices = torch.rand(500, 8, device="cuda").topk(3).indices
    _, slot, _ = plain.sort_by_expert(indices, 8)
    rows = torch.randn(int(slot.max()) + 1, 1500, device="cuda")
    weights = torch.rand(500, 3, device="cuda") if weighted else None
    exact = rows[slot] if weights is None else rows[slot] * weights.unsqueeze(-1)
    found = experts.sum_slots(rows, slot, weights)
    assert torch.allclose(found, exact.sum(1), rtol=1e-5, atol=1e-5)


def test_a_gpu_s_forms_in_torch_s_operations_are_the_cpu_s(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(precision, "TRITON", False)
    rows, slot, weights = torch.randn(7, 5), torch.randint(7, (4, 3)), torch.rand(4, 3)
    x, poly = torch.randn(2, 3, 5), torch.randn(2, 3, 3)
    for form in (torch.Tensor, OnGpu):
        here = rows.as_subclass(form)
        for w in (None, weights):
            wanted = (rows[slot] * (1 if w is None else w.unsqueeze(-1))).sum(1)
            torch.testing.assert_close(experts.sum_slots(here, slot, w).as_subclass(Tensor), wanted)
        own = poly.clone()
        found = muon.times_and_more(x.as_subclass(form), own, 1.7).as_subclass(Tensor)
        torch.testing.assert_close(found, 1.7 * x + poly @ x)
        assert torch.equal(own, poly) == (form is Tensor)  # which of the two forms it was


@pytest.mark.parametrize("body, queries", [
    (attention.unequal_widths, 12), (attention.in_parts, 9), (attention.in_parts, 12)])
def test_what_a_gpu_s_attention_is_asked_for_is_attention(body, queries, monkeypatch):
    """cuDNN's kernel stands here in the words of its documentation."""
    def cudnn(q, k, v, bias, with_sums, dropout, causal, debug, *, scale):
        assert (bias, dropout, debug) == (None, 0.0, False)
        scores = q @ k.mT * scale
        if causal:
            scores = scores.masked_fill(~attention.causal(q.size(2), k.size(2)), float("-inf"))
        return scores.softmax(-1) @ v, scores.logsumexp(-1) if with_sums else None

    torch.manual_seed(0)
    ops = SimpleNamespace(aten=SimpleNamespace(_scaled_dot_product_cudnn_attention=cudnn))
    monkeypatch.setattr(attention, "torch", SimpleNamespace(**vars(torch) | dict(ops=ops)))
    q, k, v = (torch.randn(2, n, 3, width, dtype=torch.float64)
               for n, width in ((queries, 16), (12, 16), (12, 8)))
    found = body(*(t.as_subclass(OnGpu) for t in (q, k, v)), None, 0.3).as_subclass(Tensor)
    torch.testing.assert_close(found, plain_attention.plain(q, k, v, None, 0.3))


def test_a_gpu_s_kernel_stands_between_the_head_s_products(monkeypatch):
    def louder(logits, targets):
        loss, grad = cross_entropy.loss_and_gradient(logits, targets)
        return 3 * loss, 5 * grad

    stub = SimpleNamespace(loss_and_gradient=louder)
    monkeypatch.setitem(sys.modules, "minids.kernels.triton_cross_entropy", stub)
    monkeypatch.setattr(kernels, "triton_cross_entropy", stub, raising=False)
    torch.manual_seed(0)
    x, weight = (torch.randn(*size, requires_grad=True) for size in ((2, 3, 4), (7, 4)))
    targets, found = torch.randint(7, (2, 3)), []
    for body in (cross_entropy.chunked, cross_entropy.chunked_on_gpu):
        loss = body(x, weight, targets, 5)
        found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for own, theirs, times in zip(*found, (3, 5, 5), strict=True):
        torch.testing.assert_close(theirs, times * own)


def test_a_slot_without_a_pair_changes_nothing(monkeypatch):
    """`SumSlots` sends gradients into empty slots; weights of zero keep them from the matrices."""
    torch.manual_seed(0)
    layer, *rest = CASES["moe.MoE.routed", "weighted_inside"](F32, "cpu")
    found = []
    for align in (1, 32):
        monkeypatch.setattr(plain, "ALIGN", align)
        found.append(results(experts.weighted_inside, (layer, *rest)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_ones)  # empty slots weigh
    wrong = results(experts.weighted_inside, (layer, *rest))
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4)
                   for a, b in zip(found[0], wrong, strict=True))


@needs_gpu
@pytest.mark.parametrize("rows, columns", [(136, 264), (264, 136), (36, 50)])
def test_on_a_gpu_muons_step_is_that_of_fp64(rows, columns):
    """Products of half the tiles, wide and tall; the last shape goes by torch's own products."""
    torch.manual_seed(0)
    x = torch.randn(3, rows, columns, device="cuda", dtype=BF16)
    assert muon.is_mirrored(x) == (columns != 50)
    mine, exact = orthogonalise(x), orthogonalise(x.double())
    # Five rounds in BF16's 8 bits come to 1.5 % on a CPU; a round less differs by 35 %.
    assert (mine - exact).norm() < 0.03 * exact.norm()
    assert (mine - orthogonalise(x.double(), steps=4)).norm() > 0.03 * exact.norm()
    assert mine.is_contiguous()  # as x is: the weights' move copies nothing
