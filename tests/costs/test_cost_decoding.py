"""Cache bytes against the papers and the cache that decoding allocates; MTP drafts by hand."""

from dataclasses import replace

import pytest
from cost_shapes import NANO, SHAPES, V3, V32

from minids import ModelArgs
from minids.costs.decoding import cache_bytes_per_token, drafting, fp8_cache_bytes_per_layer
from minids.costs.parameters import count_parameters
from minids.model.cache import LatentCache


def cache_is_that_of_the_papers(cache_of) -> bool:
    """Check V3's bytes, and V2's and V2-Lite's elements; `cache_of(args, bytes_per_element)`."""
    cache = cache_of(V3, 2)
    return (cache["mla"], cache["mha"]) == (70_272, 3_997_696) and [
        cache_of(ModelArgs.preset(name), 1)["mla"] for name in ("v2", "v2-lite")
    ] == [34_560, 15_552]


def test_cache_of_the_papers():
    assert cache_is_that_of_the_papers(cache_bytes_per_token)
    cache = cache_bytes_per_token(V3)
    assert cache == {"mla": 70_272, "mha": 3_997_696, "gqa": 249_856, "mqa": 31_232}
    assert f"{cache['mha'] / cache['mla']:.2f}" == "56.89"
    assert cache["mla"] == 2.25 * cache["mqa"]  # GQA with 2.25 groups (V2 table 1)
    assert cache_bytes_per_token(ModelArgs.preset("v2-lite"), 1)["mha"] == 110_592

    def a_rotated_key_for_each_head(args, width):  # wrong variant
        extra = (args.n_heads - 1) * args.qk_rope_head_dim * args.n_layers * width
        cache = cache_bytes_per_token(args, width)
        return cache | {"mla": cache["mla"] + extra}

    def all_dimensions_for_each_head(args, width):  # wrong variant: keys of 192
        return cache_bytes_per_token(replace(args, qk_nope_head_dim=args.qk_head_dim), width)
    assert not cache_is_that_of_the_papers(a_rotated_key_for_each_head)
    assert not cache_is_that_of_the_papers(all_dimensions_for_each_head)


@pytest.mark.parametrize("layers, heads, size", [(80, 64, 327_680), (126, 128, 516_096)])
def test_grouped_cache_of_other_models(layers, heads, size):
    """Qwen2.5-72B and Llama-3.1-405B: eight groups with heads of 128."""
    args = replace(V3, n_layers=layers, n_heads=heads)
    assert cache_bytes_per_token(args, n_groups=8)["gqa"] == size
    assert cache_bytes_per_token(args, n_groups=heads)["gqa"] == cache_bytes_per_token(args)["mha"]
    assert cache_bytes_per_token(args, n_groups=1)["gqa"] == cache_bytes_per_token(args)["mqa"]
    assert cache_bytes_per_token(args, n_groups=4)["gqa"] != size
    assert cache_bytes_per_token(NANO)["gqa"] == cache_bytes_per_token(NANO)["mha"]  # two heads


def test_caches_of_sparse_attention_and_of_deployment():
    cache = cache_bytes_per_token(V32)
    assert {form: n for form, n in cache.items() if form != "indexer"} == cache_bytes_per_token(V3)
    assert cache["indexer"] == 61 * 128 * 2
    assert fp8_cache_bytes_per_layer(V3) == {"mla": 656}
    assert fp8_cache_bytes_per_layer(V32) == {"mla": 656, "indexer": 132}
    assert fp8_cache_bytes_per_layer(SHAPES["indexer"]) == {"mla": 16 + 4 + 16, "indexer": 24 + 4}


def test_cache_needs_a_group():
    with pytest.raises(ValueError, match="n_groups = 0 is not valid: it must be at least 1"):
        cache_bytes_per_token(V3, n_groups=0)


def test_cache_equals_the_one_that_decoding_allocates():
    cache = LatentCache(NANO, batch=1, max_len=1)
    allocated = cache.latents.numel() * cache.latents.element_size()
    assert allocated == cache_bytes_per_token(NANO, bytes_per_element=4)["mla"]
    assert allocated != cache_bytes_per_token(replace(NANO, n_layers=3), 4)["mla"]
    cache = LatentCache(SHAPES["indexer"], batch=1, max_len=1)
    allocated = cache.index_keys.numel() * cache.index_keys.element_size()
    assert allocated == cache_bytes_per_token(SHAPES["indexer"], 4)["indexer"]


def test_a_round_of_drafts_by_hand():
    args = ModelArgs.preset("v3")
    each = count_parameters(args)
    alone = drafting(args, 0.85)
    assert alone.tokens == 1.85 and alone == drafting(args, 0.85, call=0, row=0)
    # One token reads what it activates, without the embedding; checking two of them, in each of 58
    # layers, 15.75 experts of 44,040,192 weights in place of 8.
    assert alone.plain == pytest.approx(each.active_without_embedding)
    assert alone.check - alone.plain == pytest.approx(58 * 7.75 * 44_040_192)
    # A module: a MoE layer with 15.75 experts, the join and two norms, and the head.
    layer = 187_107_328 + 14_336 + 1_835_264 + 16.75 * 44_040_192
    assert alone.draft == pytest.approx(layer + 102_760_448 + 3 * 7_168 + 926_679_040)
    assert alone.speedup == pytest.approx(1.85 * alone.plain / (alone.check + alone.draft))
    crowd = drafting(args, 0.85, batch=256)  # nearly all experts are read anyway
    assert 1.15 < alone.speedup < 1.2 < 1.8 < crowd.speedup < 1.85  # the paper: 1.8
    two = drafting(args, 0.5, drafts=2)
    assert two.tokens == 1.75 and two.draft > alone.draft and two.check > alone.check


def test_depth_and_calls_decide_whether_drafts_pay():
    shallow, deep = (replace(ModelArgs.preset("tiny"), n_layers=n) for n in (2, 32))
    assert drafting(shallow, 0.8).speedup < drafting(deep, 0.8).speedup
    free, slow = (drafting(deep, 0.8, row=row) for row in (0, 1e6))
    assert slow.speedup < free.speedup
    assert drafting(deep, 0.8, call=1e9).speedup == pytest.approx(1.8 * 32 / 33, rel=0.01)
