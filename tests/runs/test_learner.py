"""What every learning run shares."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from minids.runs.learner import Stopped, pick_dtype

FROM = ["--from", str(Path(__file__).parents[2] / "data" / "r1" / "base")]
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


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize("program, learns, flags", [
    ("train", "train", []), ("sft", "sft", FROM), ("grpo", "grpo", FROM), ("r1", "r1", []),
    ("distill", "sft", [*FROM, "--teacher", FROM[1], "--corpus", __file__])])
def test_a_stopped_program_ends_as_its_signal_says(program, learns, flags, number, capsys,
                                                   monkeypatch, tmp_path):
    def stop(*_):
        raise Stopped(number)

    module = importlib.import_module(f"minids.{program}")
    monkeypatch.setattr(module, learns, stop)
    monkeypatch.setattr(sys, "argv", [program, "--out", str(tmp_path / "run"), *flags])
    assert module.main() == 128 + number
    assert f"python -m minids.{program}" in capsys.readouterr().out
