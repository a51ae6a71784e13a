"""The same model in transformers: every key loads, and logits and greedy tokens are the same."""

import json
from dataclasses import replace

import pytest
import torch
from hf_folders import CLEAN, KINDS, all_equal, distance, folder_of, from_pretrained, theirs_of
from safetensors.torch import load_file
from small_models import LITTLE, scrambled
from transformers import AutoModelForCausalLM

from minids import hf
from minids.generate import generate
from minids.hf import config_from_args, load_hf, save_hf
from minids.hf.names import INDEX, MTP

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

TINY = replace(LITTLE, dim=12, inter_dim=16, moe_inter_dim=8, n_heads=2, n_routed_experts=4,
               n_activated_experts=2, n_expert_groups=2, n_limited_groups=1, q_lora_rank=8,
               kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_every_key_and_computes_the_same(kind, tmp_path, monkeypatch):
    model = scrambled(KINDS[kind], dtype=torch.float32)
    save_hf(model, tmp_path / "right")
    theirs, said = from_pretrained(tmp_path / "right")
    assert said == CLEAN and theirs.dtype == torch.float32
    # FP32 rounds at 6e-8; some 50 products and sums follow each other, no expert's choice flips.
    assert distance(model, theirs) < 1e-5
    # wrong: gate and up projections exchanged on the way out
    names = hf.names.NAMES | {"ffn.w1.weight": hf.names.NAMES["ffn.w3.weight"],
                        "ffn.w3.weight": hf.names.NAMES["ffn.w1.weight"]}
    monkeypatch.setattr(hf.names, "NAMES", names)
    save_hf(model, tmp_path / "wrong")
    assert distance(model, from_pretrained(tmp_path / "wrong")[0]) > 1e-3


def test_an_mtp_module_among_the_weights_would_be_unexpected(tmp_path, monkeypatch):
    assert (folder_of(LITTLE, tmp_path / "right") / MTP).is_file()
    monkeypatch.setattr(hf.writing, "mtp_among_others", lambda args: True)
    wrong = folder_of(LITTLE, tmp_path / "wrong")
    assert not (wrong / MTP).exists()
    assert from_pretrained(wrong)[1]["unexpected_keys"]


@pytest.mark.parametrize("among, change", [
    pytest.param(True, {}, id="V3"), pytest.param(False, dict(n_mtp_layers=2), id="two"),
    pytest.param(True, dict(index_n_heads=1, index_head_dim=4), id="V3.2", marks=pytest.mark.slow),
    pytest.param(False, dict(score_func="softmax", gate_bias=False), id="V2",
                 marks=pytest.mark.slow)])
def test_layer_61_stands_where_the_released_one_does(among, change, tmp_path):
    args = replace(TINY, n_layers=61, n_dense_layers=60, **change)
    model = scrambled(args, dtype=torch.float32)
    save_hf(model, tmp_path / "out", shard_bytes=100_000)
    assert from_pretrained(tmp_path / "out")[1] == CLEAN
    places = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert (tmp_path / "out" / MTP).exists() != among
    assert ("model.layers.61.shared_head.norm.weight" in places) == among
    for theirs, ours in {"embed_tokens": model.embed, "shared_head.head": model.head}.items():
        name = f"model.layers.61.{theirs}.weight"
        assert (name in places) == among
        if among:
            stored = load_file(tmp_path / "out" / places[name])[name]
            assert torch.equal(stored, ours.weight)
    assert all_equal(load_hf(tmp_path / "out").state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["V3", "V3 without query latent, one group", "V2", "V3.2"])
def test_what_transformers_writes_is_read(kind, tmp_path):
    config = theirs_of(config_from_args(replace(KINDS[kind], n_mtp_layers=1)))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    theirs.save_pretrained(tmp_path / "out")
    ours = load_hf(tmp_path / "out")
    assert ours.args.n_mtp_layers == 0  # its configuration promises one, its files have none
    assert distance(ours, theirs) < 1e-5


def greedy(ours, theirs, prompt: list[int]) -> tuple[list[int], list[int], float]:
    """64 tokens from both, with a cache; how sure transformers was of its least sure one."""
    mine = generate(ours, [prompt], 64).tokens[0]
    done = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False,
                           use_cache=True, output_logits=True, return_dict_in_generate=True)
    best = torch.cat(done.logits).topk(2).values  # (64, 2)
    return mine, done.sequences[0, len(prompt):].tolist(), (best[:, 0] - best[:, 1]).min().item()


@pytest.mark.parametrize("kind", [
    "V3", pytest.param("V2", marks=pytest.mark.slow), "V3.2"])  # test_parity_hf.py has all
def test_both_generate_the_same_tokens(kind, tmp_path):
    args = replace(KINDS[kind], max_seq_len=80)
    model = scrambled(args, dtype=torch.float32)
    save_hf(model, tmp_path / "out")
    theirs = from_pretrained(tmp_path / "out")[0]
    mine, expected, margin = greedy(load_hf(tmp_path / "out"), theirs, [5, 9, 2, 33])
    assert mine == expected and len(mine) == 64
    assert margin > 1e-4  # no near tie: FP32 logits of size one differ by some 1e-6
    model.layers[1].attn.scale *= 2  # wrong
    assert greedy(model, theirs, [5, 9, 2, 33])[0] != expected
