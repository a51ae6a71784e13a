"""Which models decode with folded weights: small ones of V3's own parts, on a CPU."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE

from minids import Transformer
from minids.apply.folded import fold
from minids.infer.decoding import new_cache

AS_WIDE = replace(LITTLE, n_heads=2, kv_lora_rank=24, n_mtp_layers=2)  # heads x latent: 2 dim


def folded(args=AS_WIDE, change=lambda model: None, mtp: bool = False) -> list[int] | None:
    """Return the layers whose weights are folded for a cache, if any are."""
    change(model := Transformer(args))
    cache = new_cache(model, 1, 4, mtp=mtp)
    fold(model, cache)
    return cache.folded and [*cache.folded]


def test_a_cache_has_those_of_the_layers_that_it_serves():
    assert folded() == [0, 1] and folded(mtp=True) == [2, 3]
    assert folded(replace(AS_WIDE, q_lora_rank=0)) == [0, 1]


@pytest.mark.parametrize("fields", [
    dict(kv_lora_rank=26), dict(n_heads=3), dict(kv_lora_rank=23),
    dict(index_n_heads=4, index_head_dim=16, index_topk=4)])
def test_wide_latents_odd_ones_and_indexers_keep_their_matrices(fields):
    assert folded(replace(AS_WIDE, **fields)) is None


class Other(torch.nn.Module):
    """A part that V3 has not."""


@pytest.mark.parametrize("change", [
    lambda model: setattr(model.layers[1].attn.wo, "product", print),
    lambda model: setattr(model.layers[1].attn, "selection", print),
    lambda model: model.layers[1].attn.add_module("more", Other())],
    ids=["product", "selection", "part"])
def test_what_was_replaced_or_added_is_not_folded_away(change):
    assert folded(change=change) is None and folded(change=change, mtp=True) == [2, 3]


def test_products_of_another_type_are_not_folded():
    with torch.autocast("cpu", torch.bfloat16):
        assert folded() is None
