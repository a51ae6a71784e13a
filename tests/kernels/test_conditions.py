"""On which devices and for which types the GPU's bodies run, asked with stand-ins for tensors."""

from types import SimpleNamespace

import pytest
import torch

from minids.kernels import precision, routing

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
