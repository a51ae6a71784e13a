"""The roofline counts bytes and FLOPs, and stops at a body that computes something else."""

from dataclasses import replace

import pytest
import torch

from minids.config import ModelArgs
from minids.kernels.registry import REGISTRY
from minids.lab import roofline
from minids.lab.bench_setup import Bench
from minids.lab.roofline import (
    Call,
    Peaks,
    attention_flops,
    body_row,
    require_equal,
    seconds_per_call,
)
from minids.model.moe import Routing

NANO = replace(ModelArgs.preset("nano"), n_mtp_layers=0)
LINEAR = REGISTRY["layers.linear"].plain


@pytest.fixture
def machine(monkeypatch):
    """A machine of a gigabyte and a gigaflop per second, on which a call takes a millisecond."""
    found = Peaks({torch.float32: 1e9, torch.bfloat16: 2e9}, 1e9)
    monkeypatch.setattr(roofline, "measure_peaks", lambda device: found)
    monkeypatch.setattr(roofline, "seconds_per_call", lambda *_: 1e-3)
    monkeypatch.setattr(roofline, "CACHES", {"cpu": 0})


def product(dtype: torch.dtype, learns: bool = False) -> Call:
    x, weight = (torch.randn(*shape).to(dtype).requires_grad_(learns)
                 for shape in ((10, 100), (200, 100)))
    return Call("layers.linear", LINEAR, dict(x=x, weight=weight))


@pytest.mark.parametrize("dtype, share", [(torch.float32, "40%"), (torch.bfloat16, "20%")])
def test_a_product_s_share_is_of_its_precision_s_peak(machine, dtype, share):
    name, shapes, ms, rate, moved, bound, found = body_row(product(dtype), "cpu", learns=False)
    assert (name, shapes) == ("layers.linear, plain", "10x100 200x100")
    assert (ms, bound, found) == ("1.0000", "products", share)  # 400,000 FLOPs in a millisecond


def test_memory_bounds_what_computes_little(machine):
    call = Call("moe.dispatch", REGISTRY["moe.dispatch"].plain,
                dict(x=torch.randn(1000, 25), source=torch.arange(1000), slot=torch.arange(1000)))
    *_, moved, bound, share = body_row(call, "cpu", learns=False)
    assert (bound, share) == ("memory", "22%")  # 2 x 100 kB, and two indices of 8 kB


def test_the_backward_pass_counts_twice_the_flops(machine):
    *_, bound, share = body_row(product(torch.float32, learns=True), "cpu", learns=True)
    assert (bound, share) == ("products", "120%")


def test_only_experts_with_rows_are_read():
    def read(counts: list[int]) -> float:
        x, weight = torch.randn(8, 4), torch.randn(4, 6, 4)
        return Call("moe.grouped_linear", LINEAR,
                    dict(x=x, weight=weight, counts=torch.tensor(counts))).read()
    assert read([2, 2, 2, 2]) - read([8, 0, 0, 0]) == 3 * 6 * 4 * 4


def test_a_causal_query_counts_the_keys_that_it_sees():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 7, 5, 8), torch.randn(2, 7, 5, 6)
    assert attention_flops(q, k, v, None, 1.0) == 2 * 2 * 5 * (5 + 6 + 7) * 14
    mask = torch.zeros(2, 3, 7, dtype=torch.bool)
    mask[0, 0, :4] = True
    assert attention_flops(q, k, v, mask, 1.0) == 2 * 2 * 5 * 2 * 14


def test_the_largest_call_of_each_body_is_kept(settings):
    calls, blocks = roofline.training_calls(Bench(settings, NANO))
    found = {call.name: call for call in calls}
    assert {"layers.rms_norm", "mla.attention", "moe.grouped_linear", "moe.combine"} <= set(found)
    assert not {"moe.MoE.routed", "transformer.Block.forward"} & set(found)  # made of the others
    assert blocks == []
    assert found["layers.rms_norm"].arguments["x"].size(-1) == NANO.dim  # and not a latent's norm
    x = found["layers.rms_norm"].arguments["x"]
    copy = found["layers.rms_norm"].copy()[0]
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr() and copy.requires_grad


def test_a_whole_block_reads_its_weights_and_the_latents(settings, machine, monkeypatch):
    monkeypatch.setattr(roofline, "seconds_per_call", lambda *_: 1e-9)  # every byte is seen
    bench = Bench(replace(settings, prompt=8), replace(NANO, n_layers=4))
    _, blocks = roofline.decoding_calls(bench, 1)
    assert [call.arguments["self"].layer for call in blocks] == [1, 2, 3]  # those with experts
    *_, rate, bound, share = roofline.block_row(blocks, "cpu")
    experts = 4 * 3 * NANO.dim * NANO.moe_inter_dim  # of each, bytes
    weights = 4 * sum(p.numel() for p in blocks[0].arguments["self"].parameters())
    visited = weights - experts * (NANO.n_routed_experts - NANO.n_activated_experts)
    latents = 4 * 9 * (NANO.kv_lora_rank + NANO.qk_rope_head_dim)  # of nine tokens
    moved = visited + latents + 2 * 4 * NANO.dim
    assert (rate, bound, share) == (f"{moved:,.0f}", "memory", f"{moved:.0%}")


def test_tensors_in_a_tuple_are_arguments_too(machine):
    """Such as a routing; and results may be several, such as a sorting."""
    scores = torch.rand(2, 10, 4, requires_grad=True)
    routing = Routing(scores, torch.zeros(2, 10, 2, dtype=torch.int64))
    call = Call("moe.BALANCE", LINEAR, dict(routing=routing, args=NANO))
    assert call.read() == 4 * 80 + 8 * 40
    [copy, same] = call.copy()
    assert isinstance(copy, Routing) and same is NANO and copy.scores.requires_grad
    assert torch.equal(copy.scores, scores) and copy.scores.data_ptr() != scores.data_ptr()
    require_equal(call, (scores, scores + 1), (scores, scores + 1))
    with pytest.raises(AssertionError, match="from the plain definition"):
        require_equal(call, (scores, scores + 1), (scores, scores + 1.1))


def test_a_body_that_computes_something_else_stops_the_table(machine):
    for factor, wrong in ((1.0, False), (1.001, True)):
        def body(x, weight, factor=factor):
            return factor * LINEAR(x, weight)
        call = replace(product(torch.float32), body=body)
        if wrong:
            with pytest.raises(AssertionError, match="from the plain definition"):
                body_row(call, "cpu", learns=False)
        else:
            body_row(call, "cpu", learns=False)


def test_rows_without_meaning_are_not_compared(machine):
    x, weight = torch.randn(9, 4), torch.randn(2, 8, 4)
    plain = REGISTRY["moe.grouped_linear"].plain

    def body(x, weight, counts):
        out = plain(x, weight, counts)
        out[7:] = 100.0
        return out
    body_row(Call("moe.grouped_linear", body,
                  dict(x=x, weight=weight, counts=torch.tensor([3, 4]))), "cpu", learns=False)
    with pytest.raises(AssertionError):
        body_row(Call("moe.grouped_linear", body,
                      dict(x=x, weight=weight, counts=torch.tensor([3, 5]))), "cpu", learns=False)


def test_every_input_is_called_in_turn():
    seen = []
    seconds_per_call(seen.append, [(1,), (2,), (3,)], "cpu")
    assert seen == [1, 2, 3] * (2 + roofline.ROUNDS["cpu"])


def test_roofline_table(settings, monkeypatch):
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 2 ** 16})
    monkeypatch.setattr(roofline, "CACHES", {"cpu": 2 ** 16})
    roofline.measure_peaks.cache_clear()
    head, *rows = roofline.roofline_table(Bench(settings, NANO))
    roofline.measure_peaks.cache_clear()
    names = [row[0] for row in rows]
    assert all(len(row) == len(head) for row in rows)
    assert names[:3] == ["peak: product, bfloat16", "peak: product, float32", "peak: copy"]
    assert [name for name in names if name.startswith(("training", "decoding"))] == [
        "training", "decoding, batch 1", "decoding, batch 3"]
    assert any(name.startswith("mla.attention, ") for name in names)
