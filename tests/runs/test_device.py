"""Where a program runs: the precision that "auto" picks."""

import pytest
import torch

from minids.runs.device import pick_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("avx512, amx, dtype", [
    (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_auto_is_bf16_only_where_a_cpu_multiplies_it(monkeypatch, avx512, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert pick_dtype("auto", CPU) == dtype


@pytest.mark.parametrize("able, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_is_bf16_only_where_a_gpu_multiplies_it(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    assert pick_dtype("auto", CUDA) == dtype


def test_a_named_precision_is_taken_as_named():
    assert pick_dtype("fp32", CUDA) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
