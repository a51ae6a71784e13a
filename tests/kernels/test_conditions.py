"""On which devices and for which types bodies run, asked with stand-ins for tensors, and what they
hand to a GPU's kernels."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_models import OnGpu

from minids import ModelArgs
from minids import kernels as package
from minids.kernels import (
    attention,
    cross_entropy,
    experts,
    few_tokens,
    fp8,
    fp8_layout,
    indexer,
    muon,
    norm,
    precision,
    routing,
    selected,
)
from minids.kernels.fp8_layout import group_tiles

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def tensor(device: str, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_cuda=device == "cuda")


@pytest.fixture
def card(monkeypatch):
    """Let a card of a compute capability be here, with or without Triton."""
    def put(capability: tuple[int, int] = (9, 0), triton: bool = True) -> None:
        for module in (cross_entropy, fp8, precision, routing):
            monkeypatch.setattr(module, "TRITON", triton)
        for module in (fp8, precision):
            monkeypatch.setattr(module, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return put


def test_the_gate_s_kernels_take_fp32_on_a_gpu(card):
    card()
    assert routing.takes_rows(tensor("cuda", F32))
    assert not routing.takes_rows(tensor("cuda", BF16))
    assert not routing.takes_rows(tensor("cpu", F32))
    card(triton=False)
    assert not routing.takes_rows(tensor("cuda", F32))


def test_kernels_that_fill_the_shared_memory_need_a_hopper_and_no_fp64(card):
    card()
    one = tensor("cuda", BF16)
    for dtype, taken in ((BF16, True), (F16, True), (F32, True), (F64, False)):
        assert precision.on_hopper(one, tensor("cuda", dtype)) == taken
    assert not precision.on_hopper(tensor("cpu", BF16))
    for capability, taken in (((8, 9), False), ((9, 0), True), ((10, 0), True)):
        card(capability)
        assert precision.on_hopper(one) == taken
    card(triton=False)
    assert not precision.on_hopper(one)


def test_kernels_in_fp32_take_what_is_no_wider(card):
    card()
    for dtype, taken in ((BF16, True), (F32, True), (F64, False)):
        assert precision.in_fp32(tensor("cuda", F32), tensor("cuda", dtype)) == taken
    assert not precision.in_fp32(tensor("cuda", F32), tensor("cpu", F32))
    assert [precision.in_triton(tensor("cuda", dtype)) for dtype in (F32, BF16)] == ["ieee", "tf32"]
    assert [precision.wide(tensor("cuda", dtype)) for dtype in (BF16, F32, F64)] == [F32, F32, F64]


def test_attention_to_selected_latents_takes_widths_that_are_powers_of_two(card):
    card()
    assert [width for width in range(1, 1025) if selected.is_tile(width)] == [
        16, 32, 64, 128, 256, 512]

    def takes(rank: int, rotated: int, dtype: torch.dtype = BF16) -> bool:
        latent = tensor("cuda", dtype)
        latent.size = (2, 7, rank + rotated).__getitem__
        return selected.takes(tensor("cuda", BF16), latent, rank)

    assert takes(512, 64) and takes(16, 16)
    assert not (takes(512, 24) or takes(96, 64) or takes(512, 64, F64))


def taken(condition, *changes: dict, **usual) -> list[bool]:
    """Return whether a condition holds for the usual tensors, and then with each of the changes.

    Tensors, without numbers, are given as their shapes; their type and device by these names;
    types: of some that have another one; learning: those that want a gradient
    """
    found = []
    for change in ({}, *changes):
        given = dict(dtype=BF16, device="cuda", types={}, learning=()) | usual | change
        dtype, device, types, learning = (
            given.pop(name) for name in ("dtype", "device", "types", "learning"))
        kind = type("There", (torch.Tensor,), dict(device=torch.device(device),
                                                   is_cuda=device == "cuda"))
        for name, value in given.items():
            if isinstance(value, tuple):
                own = torch.empty(value, dtype=types.get(name, dtype), device="meta")
                given[name] = own.as_subclass(kind).requires_grad_(name in learning)
        found.append(bool(condition(**given)))
    return found


def of_body(function, **usual) -> tuple:
    """Return when a body runs, for these arguments."""
    return function.when, usual


def indexer_of(heads: int, width: int) -> SimpleNamespace:
    return SimpleNamespace(args=SimpleNamespace(index_n_heads=heads, index_head_dim=width))


def session(**changed) -> SimpleNamespace:
    """A decoding step's context, whose cache holds folded weights."""
    cache = SimpleNamespace(folded=changed.pop("folded", {}))
    return SimpleNamespace(**dict(cache=cache, absorbed=True) | changed)


def experts_of(dim: int = 64, inside: int = 32, **more) -> SimpleNamespace:
    """A MoE layer's experts."""
    return SimpleNamespace(experts=SimpleNamespace(
        w1=torch.empty(2, inside, dim), w2=torch.empty(2, dim, inside), **more))


INDEXED = dict(index_q=(1, 8, 128, 128), weights=(1, 8, 128), index_k=(1, 9, 128),
               q=(1, 8, 2, 256), types=dict(weights=F32), scale=1.0)
ROUTED = dict(moe=experts_of(), x=(512, 64), weights=None, indices=None)
# When a body runs, or another condition, and its usual arguments; changes with which it holds, and
# those with which it does not. Each bound stands here as the last number and the next one.
ON_A_GPU = {
    "cross entropy": (
        *of_body(cross_entropy.chunked_on_gpu, x=(2, 4, 8), weight=(9, 8), targets=(2, 4),
                 count=8),
        [dict(dtype=F16), dict(dtype=F32)], [dict(dtype=F64), dict(device="cpu")]),
    "experts": (
        *of_body(experts.weighted_inside, **ROUTED), [],
        [dict(device="cpu"), dict(dtype=F32), dict(moe=experts_of(product=None)),
         dict(moe=experts_of(60)), dict(moe=experts_of(inside=28)),
         dict(moe=experts_of(from_tokens=None, in_kernels=lambda x: False))]),
    "experts in FP8": (
        *of_body(experts.weighted_inside, **ROUTED | dict(
            moe=experts_of(from_tokens=None, in_kernels=lambda x: True, product=None))), [],
        [dict(device="cpu"), dict(dtype=F32)]),
    "a pair in FP8": (
        *of_body(fp8.pair_in_kernels, x=(5, 64), first=(2, 128, 64), second=(2, 64, 64),
                 counts=None),
        [dict(dtype=F16), dict(dtype=F32), dict(first=(2, 256, 64))],
        [dict(first=(2, 127, 64)), dict(first=(2, 64, 64)), dict(x=(0, 64)),
         dict(second=(2, 0, 64)), dict(dtype=F64), dict(device="cpu")]),
    "latents of many rows": (
        lambda rows, **given: precision.gluon_attends(rows=rows, **given),
        dict(q=(1, 8, 2, 576), rank=512, rows=33),
        [dict(dtype=F16), dict(q=(1, 8, 2, 544)), dict(q=(1, 8, 2, 320), rank=256)],
        [dict(rows=32), dict(dtype=F32), dict(q=(1, 8, 2, 528)), dict(q=(1, 8, 2, 192), rank=128),
         dict(device="cpu")]),
    "Muon": (
        muon.is_mirrored, dict(x=(2, 5, 8)), [dict(dtype=F16), dict(x=(2, 5, 16))],
        [dict(dtype=F32), dict(x=(2, 5, 7)), dict(x=(2, 5, 12)), dict(device="cpu")]),
    "Muon, turned": (
        lambda x: muon.is_mirrored(x.mT), dict(x=(2, 5, 8)), [], [dict(x=(2, 8, 5))]),
    "Muon, every other column": (
        lambda x: not muon.is_mirrored(x[..., ::2]), dict(x=(2, 5, 16)), [], []),
    "an indexer's scores": (
        *of_body(indexer.scores_in_one_kernel, q=(1, 8, 128, 128), weights=(1, 8, 128),
                 keys=(1, 9, 128), types=dict(weights=F32)),
        [dict(types=dict(weights=F32, q=F16, keys=F16))],
        [dict(types={}), dict(types=dict(weights=F32, q=F16)), dict(q=(1, 8, 129, 128)),
         dict(q=(1, 8, 128, 129)), dict(device="cpu"), dict(learning=("q",)),
         dict(learning=("weights",)), dict(learning=("keys",))]),
    "an indexer's loss": (
        *of_body(indexer.loss_over_all, **INDEXED, k=(1, 9, 2, 256), seen=None), [],
        [dict(seen=(1, 8, 9)), dict(q=(1, 8, 2, 257)), dict(types={}), dict(device="cpu"),
         dict(types=dict(weights=F32, k=F64)), dict(index_q=(1, 8, 129, 128)),
         dict(index_q=(1, 8, 128, 129))]),
    "an indexer's loss over its choice": (
        *of_body(indexer.loss_over_selection, **INDEXED, latent=(1, 9, 576), indices=None,
                 seen=None), [dict(q=(1, 8, 2, 576))],
        [dict(types={}), dict(types=dict(weights=F32, latent=F64)), dict(index_q=(1, 8, 129, 128)),
         dict(device="cpu")]),
    "a norm": (
        *of_body(norm.fused_on_gpu, x=(4, 64), weight=(64,), eps=1e-6), [], [dict(device="cpu")]),
}
DECODING = {
    "an indexer's choice, on a GPU": (
        *of_body(indexer.select_in_pieces, indexer=indexer_of(128, 128), x=(1, 8, 64), c_q=None,
                 keys=(1, 9, 128), rotation=None, visible=None, k=4), [],
        [dict(indexer=indexer_of(129, 128)), dict(indexer=indexer_of(128, 129)),
         dict(types=dict(keys=F64)), dict(device="cpu")]),
    "a norm": (
        *of_body(norm.fused, device="cpu", x=(512, 64), weight=(64,), eps=1e-6),
        [dict(dtype=F32)], [dict(x=(513, 64)), dict(types=dict(weight=F32)), dict(device="cuda")]),
    "a product": (
        few_tokens.is_few_rows, dict(device="cpu", x=(1, 2, 64), weight=(2 ** 19 + 1, 64)),
        [dict(x=(4, 8, 64)), dict(x=(1, 64), weight=(2 ** 13, 64))],
        [dict(x=(33, 64)), dict(x=(1, 64), weight=(2 ** 13 + 1, 64)), dict(dtype=F32),
         dict(device="cuda")]),
    "a folded block": (
        *of_body(few_tokens.folded_block, device="cpu", block=None, x=(1, 2, 64),
                 context=session()), [],
        [dict(context=session(cache=None)), dict(context=session(folded=None)),
         dict(context=session(absorbed=False)), dict(device="cuda")]),
    "experts": (
        *of_body(few_tokens.routed, device="cpu", **ROUTED), [],
        [dict(x=(513, 64)), dict(moe=experts_of(product=None)), dict(device="cuda")]),
    "attention to latents": (
        *of_body(attention.shared_key, device="cpu", q=(1, 8, 2, 64), latent=(1, 9, 64), rank=48,
                 visible=None, scale=1.0), [], [dict(q=(1, 9, 2, 64)), dict(device="cuda")]),
}
ANYWHERE = {
    "attention": (
        *of_body(attention.products, device="cpu", q=(1, 9, 2, 64), k=(1, 512, 2, 64),
                 v=(1, 512, 2, 64), visible=None, scale=1.0), [],
        [dict(k=(1, 513, 2, 64)), dict(device="cuda")]),
    "torch's attention": (
        *of_body(attention.fused, q=(1, 9, 2, 64), k=(1, 9, 2, 64), v=(1, 9, 2, 64), visible=None,
                 scale=1.0), [dict(v=(1, 9, 2, 48))], [dict(v=(1, 9, 2, 65))]),
    "an indexer's scores in pieces": (
        *of_body(indexer.scores_in_pieces, q=(2, 2 ** 10, 2 ** 6, 8), weights=(2, 2 ** 10, 2 ** 6),
                 keys=(2, 2 ** 7 + 1, 8)), [], [dict(keys=(2, 2 ** 7, 8))]),
    "tokens to their slots": (
        *of_body(experts.dispatch_by_slot, x=(4, 8), source=None, slot=None, learning=("x",)), [],
        [dict(learning=())]),
}


@pytest.mark.parametrize("condition, usual, holds, fails", ON_A_GPU.values(), ids=ON_A_GPU)
def test_a_gpu_s_bodies_run_for(condition, usual, holds, fails, card, monkeypatch):
    card()
    monkeypatch.setattr(fp8_layout, "find_spec", lambda name: name)
    assert taken(condition, *holds, **usual) == [True] * (1 + len(holds))
    assert taken(condition, *fails, **usual) == [True] + [False] * len(fails)


@pytest.mark.parametrize("condition, usual, holds, fails", DECODING.values(), ids=DECODING)
def test_bodies_of_decoding_run_for(condition, usual, holds, fails, card):
    card()
    with torch.inference_mode():
        assert taken(condition, *holds, **usual) == [True] * (1 + len(holds))
        assert taken(condition, *fails, **usual) == [True] + [False] * len(fails)
    assert taken(condition, **usual) == [False]  # of a step that may learn


@pytest.mark.parametrize("condition, usual, holds, fails", ANYWHERE.values(), ids=ANYWHERE)
def test_other_bodies_run_for(condition, usual, holds, fails):
    assert taken(condition, *holds, **usual) == [True] * (1 + len(holds))
    assert taken(condition, *fails, **usual) == [True] + [False] * len(fails)


def test_attention_s_kernels_take_these_widths_and_lengths(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91100)
    usual = dict(q=(1, 8, 2, 192), k=(1, 8, 2, 192), v=(1, 8, 2, 128), visible=None, scale=1.0)
    yes = (dict(dtype=F16), dict(k=(1, 8, 2, 256)), dict(k=(1, 8, 2, 136)), dict(v=(1, 8, 2, 184)))
    no = (dict(dtype=F32), dict(device="cpu"), dict(visible=(1, 8, 8)), dict(q=(1, 7, 2, 192)),
          dict(v=(1, 8, 2, 192)), dict(k=(1, 8, 2, 128), v=(1, 8, 2, 64)), dict(k=(1, 8, 2, 264)),
          dict(v=(1, 8, 2, 124)), dict(k=(1, 8, 2, 196)))
    assert taken(attention.takes_unequal, *yes, **usual) == [True] * 5
    assert taken(attention.takes_unequal, *no, **usual) == [True] + [False] * 9
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91099)
    assert taken(attention.takes_unequal, **usual) == [False]

    prefill = usual | dict(q=(1, 9, 2, 64), k=(1, 12, 2, 64))
    yes = (dict(dtype=F16), dict(k=(1, 9, 2, 64)), dict(device="cpu"), dict(k=(1, 12, 2, 256)),
           dict(device="cpu", k=(1, 12, 2, 69)))
    no = (dict(dtype=F32), dict(visible=(1, 9, 12)), dict(q=(1, 8, 2, 64)),
          dict(device="cpu", k=(1, 9, 2, 64)), dict(k=(1, 12, 2, 69)), dict(v=(1, 12, 2, 20)),
          dict(k=(1, 12, 2, 264)), dict(v=(1, 12, 2, 264)))
    with torch.no_grad():
        assert taken(attention.takes_parts, *yes, **prefill) == [True] * 6
        assert taken(attention.takes_parts, *no, **prefill) == [True] + [False] * 8
    assert taken(attention.takes_parts, **prefill) == [False]
    for capability, wide, fits in (((8, 0), 64, True), ((8, 9), 128, True), ((8, 0), 136, False),
                                   ((9, 0), 136, True), ((7, 5), 64, False)):
        card(capability)
        with torch.no_grad():
            assert taken(attention.takes_parts, **prefill | dict(k=(1, 12, 2, wide))) == [fits]


def test_grouped_products_take_rows_of_whole_sixteen_bytes():
    grouped = dict(x=(4, 64), weight=(2, 32, 64), counts=None)
    changes = (dict(weight=(2, 8, 64)), dict(weight=(2, 4, 64)), dict(weight=(2, 32, 60)),
               dict(dtype=F32), dict(dtype=F16), dict(device="cpu"))
    assert taken(experts.takes_grouped, *changes, **grouped) == [
        True, True, False, False, False, False, True]
    on_cpu = grouped | dict(device="cpu", dtype=F32)
    changes = (dict(weight=(2, 4, 64)), dict(weight=(2, 2, 64)), dict(dtype=F64))
    assert taken(experts.takes_grouped, *changes, **on_cpu) == [True, True, False, False]


def test_rows_are_cut_into_tiles_of_one_expert_each():
    """As many tiles as the rows could need; those of no expert begin behind its rows."""
    groups = group_tiles(torch.tensor([129, 0, 128, 3]), 260)
    assert groups.starts.tolist() == [0, 2, 2, 3, 4] and groups.expert.tolist() == [
        0, 0, 2, 3, 3, 3, 3]
    assert groups.first.tolist() == [0, 128, 129, 257, 385, 513, 641]
    assert groups.end.tolist() == [129, 129, 257, 260, 260, 260, 260]
    assert {t.dtype for t in groups} == {torch.int32}


def test_one_line_says_why_a_card_runs_sparse_attention_without_kernels(card, monkeypatch):
    v32 = ModelArgs.preset("v3.2")
    args = replace(v32, index_n_heads=selected.WIDEST, index_head_dim=selected.WIDEST)
    monkeypatch.setattr(selected, "TRITON", True)

    def missing(device: str = "cuda", **fields) -> str:
        return selected.missing(replace(args, **fields), torch.device(device))

    card()
    assert missing() == missing("cpu", kv_lora_rank=96) == missing(
        index_n_heads=0, kv_lora_rank=96) == ""
    assert missing(kv_lora_rank=96).startswith("kv_lora_rank = 96 is no power")
    assert missing(qk_rope_head_dim=24).startswith("qk_rope_head_dim = 24 is no power")
    wider = 2 * selected.WIDEST
    for name in ("index_n_heads", "index_head_dim"):
        assert missing(**{name: wider}) == f"{name} = {wider} is above {selected.WIDEST}"
    card((8, 9))
    assert "older than Hopper" in missing()
    monkeypatch.setattr(selected, "TRITON", False)
    assert missing() == "Triton is not installed"


def test_scaled_products_need_a_hopper_itself(card):
    for capability, taken in (((9, 0), True), ((8, 9), False), ((10, 0), False)):
        card(capability)
        assert fp8_layout.on_hopper(tensor("cuda", BF16)) == taken
        assert not fp8_layout.on_hopper(tensor("cpu", BF16))


def handed(monkeypatch, kernels: str) -> list:
    """Let a module of kernels note what it is handed: its function's name, and the arguments."""
    noted = []

    def note(name: str):
        return lambda *given: noted.append((name, *given))

    stub = SimpleNamespace(Balance=SimpleNamespace(apply=note("Balance")), **{name: note(name) for (
        name) in ("choose", "look_ahead", "mirrored", "move", "scores", "sum_slots")})
    monkeypatch.setitem(sys.modules, f"minids.kernels.{kernels}", stub)
    monkeypatch.setattr(package, kernels, stub, raising=False)
    return noted


A, B, C = (torch.full((2, 2), float(n)) for n in range(3))
KEYS = torch.full((3, 5, 2), 3.0)
GATE = SimpleNamespace(bias=B, args=SimpleNamespace(
    n_activated_experts=3, n_expert_groups=5, n_limited_groups=2))
HANDED = {
    "look ahead": (lambda: muon.look_ahead(A, B, 0.9, C), "triton_muon",
                   ("look_ahead", A, B, 0.9, C)),
    "move": (lambda: muon.move(A, B, 0.9, 0.1), "triton_muon", ("move", A, B, 0.9, 0.1)),
    "gram": (lambda: muon.gram(A), "triton_muon", ("mirrored", A, 1.0, 0.0)),
    "polynomial": (lambda: muon.polynomial(A, 2.0, 3.0), "triton_muon", ("mirrored", A, 3.0, 2.0)),
    "slots": (lambda: experts.sum_slots(A.as_subclass(OnGpu), B, C), "triton_experts",
              ("sum_slots", A, B, C)),
    "gate": (lambda: routing.choose_in_one_kernel(GATE, A), "triton_routing",
             ("choose", A, B, 3, 5, 2)),
    "balance": (lambda: routing.balance_in_one_pass(SimpleNamespace(scores=A), GATE.args),
                "triton_balance", ("Balance", A, 3)),
    "scores": (lambda: indexer.scores_in_one_kernel(A, B, KEYS), "triton_indexer",
               ("scores", A, B, KEYS, 5)),
}


@pytest.mark.parametrize("call, kernels, wanted", HANDED.values(), ids=HANDED)
def test_a_kernel_is_handed(call, kernels, wanted, monkeypatch):
    monkeypatch.setattr(muon, "is_mirrored", lambda x: True)
    for module in (muon, experts):
        monkeypatch.setattr(module, "in_fp32", lambda *tensors: True)
    noted = handed(monkeypatch, kernels)
    call()
    [given] = noted
    assert len(given) == len(wanted)
    for mine, due in zip(given, wanted, strict=True):
        assert torch.equal(mine, due) if isinstance(due, torch.Tensor) else mine == due


@pytest.mark.parametrize("groups", [None, "groups"])
@pytest.mark.parametrize("function, form, kind", [
    (fp8.multiply, "product", "BlockWise128x128"),
    (fp8.multiply_over_tokens, "over_tokens", "BlockWise1x128")])
def test_one_matrix_in_fp8_goes_to_torch_s_kernel_and_several_to_ours(function, form, kind, groups,
                                                                     monkeypatch):
    """On Hopper; torch's takes the matrix out of its stack, where it is one."""
    def note(name: str):
        return lambda *given: (noted.append((name, *given)), A)[1]

    noted, matrix, scale = [], (B, "no more"), (C, "no more")
    monkeypatch.setattr(fp8, "on_hopper", lambda x: x is A)
    monkeypatch.setattr(fp8, "scaled_mm", note("torch"))
    monkeypatch.setattr(fp8, "products", lambda x: SimpleNamespace(**{form: note("ours")}))
    function(A, "scale", matrix, scale, 3, 5, BF16, groups)
    if groups:
        assert noted == [("ours", A, "scale", matrix, scale, 3, 5, BF16, groups)]
    elif form == "product":
        [(name, *given)] = noted
        assert (name, given[4]) == ("torch", getattr(torch.nn.functional.ScalingType, kind))
        assert given[0] is A and given[2] is B and given[3] is C
        assert (given[1], *given[5:]) == ("scale", 3, 5, BF16)
    else:
        wanted = getattr(torch.nn.functional.ScalingType, kind)
        assert noted == [("torch", A, "scale", matrix, scale, wanted, 3, 5, BF16)]


@pytest.mark.parametrize("rows, dtype, off", [(1, BF16, True), (2, BF16, False), (1, F32, False)])
def test_onednn_has_no_part_in_a_product_of_a_single_row(rows, dtype, off):
    before = torch.backends.mkldnn.enabled
    with few_tokens.own_products(torch.empty(rows, 4, dtype=dtype)):
        assert torch.backends.mkldnn.enabled == (before and not off)
    assert torch.backends.mkldnn.enabled == before
