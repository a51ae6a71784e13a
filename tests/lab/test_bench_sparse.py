"""The table of one sparse layer: its rows on a small layer, kernels by Triton's interpreter."""

import re
from dataclasses import replace

import pytest
import torch
import triton_interpreter

from minids.config import ModelArgs
from minids.kernels.registry import recorded
from minids.lab import bench_sparse
from minids.lab.bench_sparse import Layer, decode_rows, prefill_rows, training_rows

INTERPRETED = triton_interpreter.running()
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's subprocess")
LITTLE = replace(ModelArgs.preset("nano"), dim=32, kv_lora_rank=32, qk_rope_head_dim=16,
                 q_lora_rank=16, index_n_heads=16, index_head_dim=16, index_topk=6)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the subprocess")
def test_by_the_interpreter():
    triton_interpreter.run(__file__)


@pytest.fixture
def layer(monkeypatch) -> Layer:
    monkeypatch.setattr(bench_sparse, "STEPS", 1)
    monkeypatch.setattr(bench_sparse, "BATCH", 2)
    monkeypatch.setattr("minids.lab.roofline.SIDE", {"cpu": 64})
    return Layer(LITTLE, "cpu", torch.float32, 1)


def require_row(row: list[str], name: str, *parts: str) -> None:
    """Assert a row's title, that its ratio is that of its times, and what its last cell tells."""
    assert row[0] == name
    dense, sparse, ratio = map(float, row[1:4])
    assert ratio == pytest.approx(dense / sparse, rel=0.1, abs=0.02)  # all three are rounded
    assert all(re.search(part, row[4]) for part in parts), row[4]


@inside
def test_the_rows_come_from_the_kernels(layer):
    with recorded() as ran:
        plain, rounded = prefill_rows(layer, 20)
        whole, alone = decode_rows(layer, 30)
        warm, sparse = training_rows(layer, 12)
    require_row(plain, "prefill, 20 tokens", "scores .* of the peak", "choice")
    require_row(rounded, "prefill, 20 tokens, FP8 indexer", "scores")
    require_row(whole, "decode, 30 tokens, the layer", "of its floor")
    require_row(alone, "decode, 30 tokens, attention alone", "by the sparse kernel", "choice")
    require_row(warm, "train, 12 tokens, warmup", "GiB")
    require_row(sparse, "train, 12 tokens, sparse", "GiB")
    assert {body for name, body in ran if "sparse" in name or "selected" in name} == {
        "attend_selected", "absorbed_for_naive", "select_in_pieces", "loss_over_all",
        "loss_over_selection"}
