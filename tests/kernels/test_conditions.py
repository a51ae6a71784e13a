"""On which devices and for which types the GPU's bodies run, asked with stand-ins for tensors."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minids import ModelArgs
from minids.kernels import attention, experts, fp8_layout, precision, routing, selected
from minids.kernels.fp8_layout import group_tiles

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def tensor(device: str, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_cuda=device == "cuda")


@pytest.fixture
def card(monkeypatch):
    """Let a card of a compute capability be here, with or without Triton."""
    def put(capability: tuple[int, int] = (9, 0), triton: bool = True) -> None:
        for module in (precision, routing):
            monkeypatch.setattr(module, "TRITON", triton)
        monkeypatch.setattr(precision, "INTERPRETED", False)
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

    Tensors, without numbers, are given as their shapes; their type and device by these names.
    """
    found = []
    for change in ({}, *changes):
        given = dict(dtype=BF16, device="cuda") | usual | change
        dtype, there = given.pop("dtype"), dict(device=torch.device(given.pop("device")))
        kind = type("There", (torch.Tensor,), there)
        found.append(bool(condition(**{
            name: torch.empty(value, dtype=dtype, device="meta").as_subclass(kind)
            if isinstance(value, tuple) else value for name, value in given.items()})))
    return found


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
    yes = (dict(dtype=F16), dict(k=(1, 9, 2, 64)), dict(device="cpu"))
    no = (dict(dtype=F32), dict(visible=(1, 9, 12)), dict(q=(1, 8, 2, 64)),
          dict(device="cpu", k=(1, 9, 2, 64)))
    with torch.no_grad():
        assert taken(attention.takes_parts, *yes, **prefill) == [True] * 4
        assert taken(attention.takes_parts, *no, **prefill) == [True] + [False] * 4
    assert taken(attention.takes_parts, **prefill) == [False]
    for capability, fits in (((8, 0), True), ((7, 5), False)):
        card(capability)
        with torch.no_grad():
            assert taken(attention.takes_parts, **prefill) == [fits]


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
