"""The whole family against transformers, by the comparison of `parity_hf.py`.

Each family is drawn several times; a damaged model and a damaged configuration must be noticed.
"""

import json
from dataclasses import replace

import pytest
import torch
from parity_hf import (
    DEEP,
    FAMILIES,
    LENGTH,
    differences,
    draft_gap,
    drawn,
    in_fp64,
    read_by_transformers,
    same_tokens,
    theirs_of,
    v2,
    v32,
)
from small_models import scrambled

from minids import Transformer
from minids.hf import save_hf
from minids.model.layers import Linear

SEEDS = (0, 1, 2, 3)
FEW = 20  # tokens, past all that YaRN and the indexer count; the program generates 64
CASES = [(family, seed) for family in FAMILIES for seed in SEEDS]


def test_the_seeds_draw_every_kind():
    args = [drawn(seed) for seed in SEEDS]
    assert {a.q_lora_rank > 0 for a in args} == {a.n_expert_groups > 1 for a in args} \
        == {a.yarn for a in args} == {True, False}
    assert all(a.has_moe and a.is_moe_layer(2) for a in args)
    assert {v2(seed).n_expert_groups > 1 for seed in SEEDS} == {True, False}
    assert all(v32(seed).index_topk < LENGTH / 2 for seed in SEEDS)  # most tokens are left out
    for seed, a in zip(SEEDS, args, strict=True):
        bias = torch.cat(scrambled(a, seed).gate_biases())
        assert (bias < 0).any() and (bias > 0).any()


@pytest.mark.parametrize("family, seed", CASES)
def test_equal_in_fp64(family, seed):
    with in_fp64():
        ours = scrambled(FAMILIES[family](seed), seed)
        logits, gradients = differences(ours, theirs_of(ours))
    assert logits < 1e-12  # FP64 sums in another order, through three layers
    assert gradients < 1e-12  # the same, and through their backward


@pytest.mark.parametrize("family, seed", [
    pytest.param(*case, marks=pytest.mark.slow if case[1] > 1 else ()) for case in CASES])
def test_equal_in_fp32(family, seed):
    """And the tokens written; FP64 has all seeds in every run."""
    ours = scrambled(FAMILIES[family](seed), seed, torch.float32)
    theirs = theirs_of(ours)
    logits, gradients = differences(ours, theirs)
    # FP32 rounds at 6e-8; some 50 products and sums follow each other, no expert's choice flips.
    assert logits < 1e-5 and gradients < 1e-5
    assert same_tokens(ours, theirs, FEW) == FEW


def with_zero_bias(ours: Transformer) -> None:
    for bias in ours.gate_biases():
        bias.zero_()


def with_w1_and_w3_exchanged(ours: Transformer) -> None:
    experts = ours.layers[2].ffn.experts
    experts.w1.data, experts.w3.data = experts.w3.data, experts.w1.data


def with_another_scale(ours: Transformer) -> None:
    for layer in ours.layers:
        layer.attn.scale = ours.args.qk_nope_head_dim ** -0.5


def with_half_split_keys(ours: Transformer) -> None:
    """The rotated key's rows as another family lays them out."""
    rank = ours.args.kv_lora_rank
    rows = ours.layers[0].attn.wkv_a.weight.data[rank:]
    rows.copy_(torch.cat([rows[0::2], rows[1::2]]).clone())


def with_blind_indexer(ours: Transformer) -> None:
    for layer in ours.layers:
        layer.attn.indexer.weights_proj.weight.data.abs_()


def changed(ours: Transformer, **changes) -> Transformer:
    """The same weights under other settings."""
    other = Transformer(replace(ours.args, **changes)).to(ours.head.weight.dtype)
    other.load_state_dict(ours.state_dict())
    return other


WRONG = {
    "zero bias": (drawn(2), with_zero_bias),
    "w1 and w3": (drawn(2), with_w1_and_w3_exchanged),
    "softmax scale": (drawn(2), with_another_scale),
    "half-split keys": (drawn(2), with_half_split_keys),
    "indexer's weights": (v32(2), with_blind_indexer),
}
CHANGES = {
    "YaRN off": (drawn(2), dict(original_seq_len=128)),
    "YaRN's factor": (drawn(2), dict(rope_factor=8.0)),
    "mscale": (v2(2), dict(mscale=1.0)),
    "V2's gate renormalised": (v2(2), dict(score_func="sigmoid")),
    "one token more": (v32(2), dict(index_topk=v32(2).index_topk + 1)),
    "route_scale": (drawn(2), dict(route_scale=1.3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_caught(name):
    args, damage = WRONG[name]
    with in_fp64():
        ours = scrambled(args, 2)
        theirs = theirs_of(ours)
        damage(ours)
        assert differences(ours, theirs)[0] > 1e-3


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_settings_are_caught(name):
    args, changes = CHANGES[name]
    with in_fp64():
        ours = scrambled(args, 2)
        theirs = theirs_of(ours)
        assert differences(changed(ours, **changes), theirs)[0] > 1e-4


@pytest.mark.parametrize("change", [dict(rope_interleave=False), dict(norm_topk_prob=False),
                                    dict(routed_scaling_factor=1.3)], ids=str)
def test_a_wrong_file_of_settings_is_caught(change, tmp_path):
    with in_fp64():
        ours = scrambled(drawn(2), 2)
        save_hf(ours, tmp_path / "model", dtype=torch.float64)
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        theirs = read_by_transformers(tmp_path / "model", torch.float64)
        assert differences(ours, theirs)[0] > 1e-3


@torch.no_grad()
def test_drafts_equal_those_of_transformers():
    with in_fp64():
        assert draft_gap(scrambled(DEEP)) < 1e-12
        # Counted from 1 all angles shift alike, and their differences not at all.
        assert draft_gap(scrambled(DEEP), first=1) < 1e-12


class HiddenFirst(Linear):
    """The paper's order of the join, [hidden ; embedding]."""

    def forward(self, x):
        return super().forward(x.roll(x.size(-1) // 2, -1))


@torch.no_grad()
def test_wrong_drafts_are_caught():
    with in_fp64():
        ours = scrambled(DEEP)
        ours.mtp[0].eh_proj.__class__ = HiddenFirst
        assert draft_gap(ours) > 1e-2
