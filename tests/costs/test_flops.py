"""FLOPs against the papers and a FLOP counter."""

from dataclasses import replace

import pytest
import torch
from cost_shapes import NANO, SHAPES, V3, V32
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minids import ModelArgs, Transformer
from minids.costs.flops import (
    attention_flops,
    flops_per_token,
    forward_flops_per_token,
    mean_keys,
    pair_flops,
)
from minids.costs.parameters import count_parameters
from minids.kernels.registry import using
from minids.model.cache import LatentCache

PAPER_FLOPS = [("v3", True, 250.46), ("v2", True, 155.3), ("v3", False, 281.2)]


def prints(gigaflops: float, flops: float) -> bool:
    """Return whether FLOPs agree with a figure in as many digits as its source prints."""
    return round(flops / 1e9, len(str(gigaflops).split(".")[1])) == gigaflops


@pytest.mark.parametrize("name, causal, gigaflops", PAPER_FLOPS)
def test_training_flops_of_the_papers(name, causal, gigaflops):
    args = ModelArgs.preset(name)
    assert prints(gigaflops, flops_per_token(args, 4096, causal))
    assert not prints(gigaflops, flops_per_token(args, 4096, not causal))
    embedding = 6 * count_parameters(args).parts["embedding"]
    assert not prints(gigaflops, flops_per_token(args, 4096, causal) + embedding)


def test_training_flops_exactly():
    weights = 6 * 36_625_618_432
    assert flops_per_token(V3, 4096) == weights + 3 * 81_920 * 61 * 4097 / 2 == 250_463_511_552
    assert flops_per_token(V3, 4096, causal=False) == weights + 3 * 81_920 * 61 * 4096


def test_forward_flops_equal_those_that_torch_counts():
    """On a dense model: values as wide as keys, because the attention pads them to that."""
    args = replace(NANO, n_routed_experts=0, n_mtp_layers=0, v_head_dim=NANO.qk_head_dim)
    tokens = torch.zeros(2, 48, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    # The counter knows plain products; fused attention on a CPU would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        Transformer(args)(tokens)
    counted = counter.get_total_flops() / tokens.numel()
    parts = count_parameters(args).parts
    norms = parts["norms"] + args.n_layers * args.kv_lora_rank  # weights, but no products
    full = forward_flops_per_token(args, 48, causal=False)
    assert counted == full - 2 * norms
    assert counted != forward_flops_per_token(args, 48, causal=True) - 2 * norms  # wrong variant


def test_training_is_three_forward_passes():
    assert flops_per_token(NANO, 100) == 3 * forward_flops_per_token(NANO, 100)


def test_causal_attention_sees_half_the_keys_and_one_more():
    """Mean over queries of the keys up to each: (T + 1) / 2, not T / 2."""
    attention = 2 * NANO.n_layers * NANO.n_heads * (NANO.qk_head_dim + NANO.v_head_dim)
    weights = 2 * count_parameters(NANO).active_without_embedding
    seen = sum(range(1, 8)) / 7
    assert forward_flops_per_token(NANO, 7) == weights + attention * seen
    assert forward_flops_per_token(NANO, 7) != weights + attention * 7 / 2


@pytest.mark.parametrize("seq_len", [1, 5, 16, 17, 100])
def test_mean_keys_under_a_limit(seq_len):
    counted = sum(min(16, t) for t in range(1, seq_len + 1)) / seq_len
    assert mean_keys(seq_len, True, 16) == pytest.approx(counted, rel=1e-14)  # two roundings
    assert mean_keys(seq_len, False, 16) == min(16, seq_len)
    limited_mean = min(16, (seq_len + 1) / 2)  # wrong variant: the limit after the mean
    assert (limited_mean == pytest.approx(counted)) == (seq_len <= 16)


def test_sparse_attention_costs_what_the_paper_says():
    assert pair_flops(V32) == {"mha": 81_920, "mqa": 278_528, "indexer": 16_384}
    assert pair_flops(V3)["indexer"] == 0
    assert attention_flops(V3, 1000) == {"mha": 61 * 81_920_000, "mqa": 61 * 278_528_000}
    short, long, longer = (attention_flops(V32, 2 ** n)["dsa"] for n in (11, 16, 17))
    assert short == attention_flops(V32, 2048)["mqa"] + 61 * 2048 * 16_384
    assert longer - long == 61 * 2 ** 16 * 16_384  # the indexer alone grows
    assert attention_flops(V32, 2 ** 17)["mqa"] / longer > 13


def test_v32_is_v3_and_an_indexer_until_there_are_more_than_k_keys():
    def extra(seq_len: int) -> float:
        return forward_flops_per_token(V32, seq_len) - forward_flops_per_token(V3, seq_len)
    indexer = 2 * 61 * 13_959_424
    assert extra(2048) == indexer + 61 * 16_384 * 2049 / 2
    assert extra(2049) == pytest.approx(indexer + 61 * (16_384 * 1025 - 81_920 / 2049), rel=1e-12)
    assert extra(131_072) < 0


def decoding_flops(args, context: int) -> int:
    """Return the FLOPs that torch counts in the decoding step of the `context`-th token."""
    model, cache = Transformer(args), LatentCache(args, batch=1, max_len=context)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), using("off"):  # the counter knows plain products only
        model(torch.zeros(1, context - 1, dtype=torch.int64), cache, absorbed=True)
        with counter:
            model(torch.zeros(1, 1, dtype=torch.int64), cache, absorbed=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["query latent", "indexer"])
def test_attention_flops_grow_as_those_that_torch_counts(name):
    args = replace(SHAPES[name], kv_lora_rank=20)
    form = "dsa" if args.has_indexer else "mqa"
    counted = decoding_flops(args, 96) - decoding_flops(args, 32)
    expected = attention_flops(args, 96)[form] - attention_flops(args, 32)[form]
    # The sum over the indexer's heads, two operations each, is not in the paper's count.
    expected += 64 * args.n_layers * 2 * args.index_n_heads
    assert counted == expected
    naive = attention_flops(args, 96)["mha"] - attention_flops(args, 32)["mha"]
    assert counted != naive  # wrong variant: the other form
