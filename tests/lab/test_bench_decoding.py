"""The counted FLOPs of dense and sparse attention are those of the formulas."""

from dataclasses import replace

import pytest
import torch

from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.costs.flops import pair_flops
from minids.kernels.registry import using
from minids.lab import bench_decoding
from minids.lab.bench_decoding import Sparse, count_flops
from minids.lab.bench_setup import Bench

NANO = replace(ModelArgs.preset("nano"), n_mtp_layers=0)
SPARSE = replace(NANO, index_n_heads=3, index_head_dim=16, index_topk=24)


def costs_at(settings, *lengths: int, **changes) -> dict[int, dict[str, list[int]]]:
    """FLOPs at each length: of prefill dense and sparse, of decoding also outside the indexer."""
    both = Sparse(Bench(replace(settings, context=max(lengths)), replace(SPARSE, **changes)))
    return {n: {"prefill": [count_flops(work) for work in both.prefills(n)],
                "decode": [count_flops(work) for work in both.decodings(n)]}
            for n in lengths}


@pytest.mark.parametrize("bodies, rotated", [("off", 0), ("auto", SPARSE.qk_rope_head_dim)])
def test_decoding_grows_by_the_pairs_and_outside_the_indexer_not_at_all(settings, bodies, rotated):
    """A body for few tokens multiplies the probabilities with the rotated keys too."""
    with using(bodies):
        costs, pair = costs_at(settings, 64, 128), pair_flops(SPARSE)
    growth = [b - a for a, b in zip(costs[64]["decode"], costs[128]["decode"], strict=True)]
    weighing = 2 * SPARSE.index_n_heads  # the sum over the indexer's heads
    dense = pair["mqa"] + 2 * SPARSE.n_heads * rotated
    expected = dense, pair["indexer"] + weighing, 0
    assert growth == [64 * SPARSE.n_layers * flops for flops in expected]


def test_the_experts_are_counted(settings):
    """A step takes two operations per parameter, norms apart, and those on the keys."""
    with using("off"):
        dense, _, outside = costs_at(settings, 64)[64]["decode"]
    pair, args = pair_flops(SPARSE), replace(SPARSE, index_n_heads=0)
    active = count_parameters(args).active_without_embedding
    assert dense - outside == SPARSE.n_layers * pair["mqa"] * (65 - SPARSE.index_topk)
    attention = SPARSE.n_layers * pair["mqa"] * 65
    assert 0.97 < (dense - attention) / (2 * active) <= 1
    experts = 2 * 6 * SPARSE.dim * SPARSE.moe_inter_dim  # two experts' three matrices, one layer
    assert (dense - attention - experts) / (2 * active) < 0.97


def test_prefill_counts_all_pairs(settings, monkeypatch):
    """What is not in proportion to the tokens, 128 against twice 64."""
    monkeypatch.setattr(bench_decoding, "PIECE", 32)
    one = dict(n_routed_experts=1, n_activated_experts=1)  # its load is every token
    costs, pair = costs_at(settings, 64, 128, **one), pair_flops(SPARSE)
    dense, sparse = (b - 2 * a for a, b in zip(costs[64]["prefill"], costs[128]["prefill"],
                                               strict=True))
    head = 2 * SPARSE.dim * SPARSE.vocab_size  # of the last token alone
    # Below 512 tokens attention's plain products take in all pairs.
    assert dense == SPARSE.n_layers * pair["mha"] * (128 ** 2 - 2 * 64 ** 2) - head
    seen = 32 * (32 + 64 + 96 + 128) - 2 * 32 * (32 + 64)  # pairs of a piece and all keys so far
    weighing = 2 * SPARSE.index_n_heads
    assert sparse == SPARSE.n_layers * (pair["indexer"] + weighing) * seen - head


def test_causal_kernels_count_for_what_their_queries_see():
    q, k, v = (torch.randn(2, 3, 600, 16) for _ in range(3))

    def work(causal: bool, queries: int = 600):
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q[:, :, :queries], k, v, is_causal=causal)

    assert count_flops(work(True)) == 2 * 2 * 3 * (600 * 601 // 2) * 32
    assert count_flops(work(False, 7)) == 2 * 2 * 3 * (7 * 600) * 32
    with torch.utils.flop_counter.FlopCounterMode(display=False) as plain:
        work(True)()
    assert plain.get_total_flops() != count_flops(work(True))  # not counted on a CPU


def test_both_models_are_one_model(settings):
    both = Sparse(Bench(replace(settings, context=40), SPARSE))
    dense, sparse = both.prefill_dense(20), both.prefill_sparse(20)  # k = 24 leaves nothing out
    assert (dense - sparse).abs().max() < 1e-5 * dense.abs().max()  # FP32, another order
    dense, sparse = both.prefill_dense(40), both.prefill_sparse(40)
    assert (dense - sparse).abs().max() > 1e-4 * dense.abs().max()
