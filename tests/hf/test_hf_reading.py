"""Damaged folders are refused by one line that names file and field, before a weight is read."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_folders import RAGGED, call, edit, folder_of
from safetensors.torch import load_file, save_file
from small_models import LITTLE

from minids import hf
from minids.costs import count_parameters
from minids.hf import load_hf, reading
from minids.hf.__main__ import describe
from minids.hf.names import CONFIG, INDEX, MTP, WEIGHTS


def config_with(**change):
    return lambda folder: edit(folder / CONFIG, change)


def rope_with(**change):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12,
               "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0} | change
    scaling = {name: v for name, v in scaling.items() if v is not ...}
    return config_with(rope_scaling=scaling, minids=...)


def tensors_with(change, file: str = WEIGHTS):
    """Change the dict of a file's tensors."""
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return damage


def cut(file: str, size: int):
    return lambda folder: os.truncate(folder / file, size)


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


WO, EXPERT = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
SCALE = f"{EXPERT}_scale_inv"
CONFIGS = {
    "a million layers": (config_with(num_hidden_layers=10**6), "num_hidden_layers = 1000000"),
    "a billion experts": (config_with(n_routed_experts=10**9), "n_routed_experts = 1000000000"),
    "a million MTP": (config_with(num_nextn_predict_layers=10**6), "predict_layers = 1000000"),
    "many of both": (config_with(num_hidden_layers=1000, n_routed_experts=60_000),
                     " parameters, and the files have "),
    **{f"wide {name}": (config_with(**{name: 10**15}), " parameters, and the files have ") for name
       in ("hidden_size", "vocab_size", "intermediate_size", "v_head_dim", "kv_lora_rank")},
    "nested": (lambda folder: (folder / CONFIG).write_bytes(b"[" * 10**6), "is not JSON"),
    "unknown type": (config_with(model_type="deepseek_v4"), "model_type = 'deepseek_v4'"),
    "near type": (config_with(model_type="deepseek-v3"), "did you mean 'deepseek_v3'?"),
    "no type": (config_with(model_type=...), "model_type = None"),
    "other class": (config_with(architectures=["DeepseekV3ForSequenceClassification"]),
                    "architectures = ['DeepseekV3ForSequenceClassification']"),
    "topk 0": (config_with(model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"],
                           index_n_heads=2, index_head_dim=12, index_topk=0), "index_topk = 0"),
    "no indexer": (config_with(model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"],
                               index_n_heads=0, index_head_dim=12, index_topk=5),
                   "index_n_heads = 0"),
    "indexer's fields": (config_with(model_type="deepseek_v32",
                                     architectures=["DeepseekV32ForCausalLM"]),
                         "index_n_heads is missing"),
    "V3.2 without latent": (config_with(
        model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"], index_n_heads=2,
        index_head_dim=12, index_topk=5, q_lora_rank=None), "q_lora_rank = 0"),
    "heads": (config_with(num_key_value_heads=2), "num_key_value_heads = 2"),
    "heads of V2": (config_with(model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"],
                                scoring_func="softmax", norm_topk_prob=False, topk_method="greedy",
                                num_attention_heads=5, num_key_value_heads=5),
                    "hidden_size = 24 is not valid: it must be a multiple of"),
    "odd rotated part": (config_with(qk_rope_head_dim=5), "qk_rope_head_dim = 5"),
    "more limited groups": (config_with(topk_group=5), "topk_group = 5"),
    "groups": (config_with(n_group=3), "n_group = 3"),
    "experts a token": (config_with(num_experts_per_tok=99), "num_experts_per_tok = 99"),
    "missing field": (config_with(kv_lora_rank=...), "kv_lora_rank is missing"),
    "null": (config_with(kv_lora_rank=None), "kv_lora_rank = None"),
    "text for a number": (config_with(hidden_size="24"), "hidden_size = '24'"),
    "activation": (config_with(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "biases": (config_with(attention_bias=True), "attention_bias = True"),
    "tied": (config_with(tie_word_embeddings=True), "tie_word_embeddings = True"),
    "some layers dense": (config_with(moe_layer_freq=2), "moe_layer_freq = 2"),
    "half-split": (config_with(rope_interleave=False), "rope_interleave = False"),
    "not normalised": (config_with(norm_topk_prob=False), "norm_topk_prob = False"),
    "softmax in V3": (config_with(scoring_func="softmax"), "scoring_func = 'softmax'"),
    "greedy in V3": (config_with(topk_method="greedy"), "topk_method = 'greedy'"),
    "rope": (rope_with(type="linear"), "rope_scaling.type = 'linear'"),
    "rope is no object": (config_with(rope_scaling="yarn"), "rope_scaling = 'yarn'"),
    "rope without factor": (rope_with(factor=...), "rope_scaling.factor is missing"),
    "bad factor": (rope_with(factor=-1), "rope_scaling.factor = -1"),
    "angles scaled": (rope_with(mscale=0.7, mscale_all_dim=None), "rope_scaling.mscale = 0.7"),
    "angles scaled by a factor": (rope_with(attention_factor=1.2), "attention_factor = 1.2"),
    "YaRN without need": (rope_with(original_max_position_embeddings=48),
                          "max_position_embeddings = 48"),
    "ours": (config_with(minids={"dim": 8}), "minids = {'dim': 8}"),
    "ours contradicts": (config_with(minids={"original_seq_len": 10}), "minids = "),
    "no JSON": (text(CONFIG, '{"model_type": '), "config.json is not JSON"),
    "no object": (text(CONFIG, "[1]"), "config.json holds list"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "config.json is missing"),
    "other quantisation": (config_with(quantization_config={"quant_method": "awq"}),
                           "quantization_config.quant_method = 'awq'"),
    "other blocks": (config_with(quantization_config={
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}),
        "quantization_config.weight_block_size = [64, 64]"),
}
TENSORS = {
    "missing": (tensors_with(lambda t: t.pop(WO)), WEIGHTS, f"{WO} is missing"),
    "missing expert": (tensors_with(lambda t: t.pop(EXPERT)), WEIGHTS, f"{EXPERT} is missing"),
    "several missing": (tensors_with(lambda t: [t.pop(WO), t.pop(EXPERT)]), WEIGHTS, "and 1 more"),
    "extra": (tensors_with(lambda t: t.update(odd=torch.ones(2))), WEIGHTS, "odd is extra"),
    "extra and empty": (tensors_with(lambda t: t.update(odd=torch.ones(2, 0))), WEIGHTS,
                        "odd is extra"),
    "shared experts in a dense layer": (tensors_with(lambda t: t.update({
        "model.layers.0.mlp.shared_experts.up_proj.weight": torch.ones(2, 2)})), WEIGHTS,
        "shared_experts.up_proj.weight is extra"),
    "a copy in a layer of the model": (tensors_with(lambda t: t.update({
        "model.layers.1.embed_tokens.weight": torch.ones(2, 2)})), WEIGHTS,
        "layers.1.embed_tokens.weight is extra"),
    "a layer too many": (config_with(num_hidden_layers=1), WEIGHTS, "layers.1."),
    "an expert too many": (config_with(n_routed_experts=7, n_group=1, topk_group=1), WEIGHTS,
                           "experts.7."),
    "wrong shape": (tensors_with(lambda t: t.update({WO: t[WO].T.contiguous()})), WEIGHTS,
                    f"{WO} has shape [42, 24], and config.json asks for [24, 42]"),
    "wrong width": (config_with(intermediate_size=41), WEIGHTS, "config.json asks for [41, 24]"),
    "integers": (tensors_with(lambda t: t.update({WO: t[WO].int()})), WEIGHTS,
                 f"{WO} has dtype I32"),
    "FP8 unannounced": (tensors_with(lambda t: t.update({
        WO: t[WO].to(torch.float8_e4m3fn), f"{WO}_scale_inv": torch.ones(1, 1)})), WEIGHTS,
        f"{WO} has dtype F8_E4M3"),
    "scale of nothing": (tensors_with(lambda t: t.update({SCALE: torch.ones(1, 1)})), WEIGHTS,
                         f"{SCALE} is extra"),
    "cut": (cut(WEIGHTS, 5000), WEIGHTS, "not a whole safetensors file, 5,000 bytes"),
    "cut at the end": (lambda folder: os.truncate(
        folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1), WEIGHTS, "not a whole"),
    "empty": (cut(WEIGHTS, 0), WEIGHTS, "not a whole safetensors file, 0 bytes"),
    "cut MTP": (cut(MTP, 300), MTP, "not a whole"),
    "half an MTP module": (tensors_with(lambda t: t.pop("model.layers.2.eh_proj.weight"), MTP),
                           WEIGHTS, "model.layers.2.eh_proj.weight is missing"),
    "a layer not announced": (config_with(num_hidden_layers=1, num_nextn_predict_layers=0), WEIGHTS,
                              "is extra"),
    "MTP stored twice": (lambda folder: shutil.copy(folder / WEIGHTS, folder / MTP), MTP,
                         "is in another file too"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "", "has neither"),
}
FP8_TENSORS = {
    "no scale": (tensors_with(lambda t: t.pop(SCALE)), f"{SCALE} is missing"),
    "scale's shape": (tensors_with(lambda t: t.update({SCALE: torch.ones(1, 2)})),
                      f"{SCALE} has shape [1, 2], and config.json asks for [2, 2]"),
    "scale's precision": (tensors_with(lambda t: t.update({SCALE: t[SCALE].half()})),
                          f"{SCALE} has dtype F16"),
    "a norm in FP8": (tensors_with(lambda t: t.update(
        {"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)})),
        "model.norm.weight_scale_inv is missing"),
}
SHARDS = {
    "missing shard": (lambda folder: (folder / "model-00002-of-00005.safetensors").unlink(),
                      "model-00002-of-00005.safetensors is missing"),
    "cut shard": (cut("model-00003-of-00005.safetensors", 3000),
                  "model-00003-of-00005.safetensors is not a whole safetensors file"),
    "index is no JSON": (text(INDEX, "{"), f"{INDEX} is not JSON"),
    "index without a map": (text(INDEX, "{}"), f"{INDEX}: weight_map"),
    "index leads outside": (text(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'),
                            f"{INDEX}: weight_map"),
    "shards exchanged": (lambda folder: os.replace(
        folder / "model-00001-of-00005.safetensors", folder / "model-00002-of-00005.safetensors"),
        "model-00001-of-00005.safetensors is missing"),
    "another's shard": (lambda folder: shutil.copy(
        folder / "model-00001-of-00005.safetensors", folder / "model-00002-of-00005.safetensors"),
        "model-00002-of-00005.safetensors: tensor"),
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("healthy")
    return {"plain": folder_of(LITTLE, folder / "plain"),
            "fp8": folder_of(replace(RAGGED, index_n_heads=0, n_routed_experts=8), folder / "fp8",
                             quantize="fp8"),
            "shards": folder_of(LITTLE, folder / "shards", shard_bytes=26_000)}


CASES = [("plain", name, damage, CONFIG, words) for name, (damage, words) in CONFIGS.items()]
CASES += [("plain", name, *case) for name, case in TENSORS.items()]
CASES += [("fp8", name, damage, WEIGHTS, words) for name, (damage, words) in FP8_TENSORS.items()]
CASES += [("shards", name, damage, "", words) for name, (damage, words) in SHARDS.items()]


@pytest.mark.parametrize("kind, name, damage, file, words", CASES, ids=[c[1] for c in CASES])
def test_damage_is_one_line_and_nothing_is_written(kind, name, damage, file, words, healthy,
                                                   tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(healthy[kind], folder)
    damage(folder)
    monkeypatch.setattr(hf.reading, "read_into", lambda *_: pytest.fail("a weight was read"))
    status, said, err = call(capsys, monkeypatch, "--folder", folder, "--out", out)
    assert (status, said, err.count("\n")) == (2, "", 1), err
    assert words in err and str(folder / file) in err
    assert not out.exists() and list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ValueError, match=re.escape(words)):
        load_hf(folder)


def test_healthy_folders_pass(healthy, capsys, monkeypatch):
    for folder in healthy.values():
        status, out, err = call(capsys, monkeypatch, "--folder", folder)
        assert (status, err) == (0, "") and "DeepseekV3ForCausalLM" in out
        load_hf(folder)


def test_the_description_is_right_and_reads_no_weight(healthy, monkeypatch):
    monkeypatch.setattr(hf.reading, "read_into", lambda *_: pytest.fail("a weight was read"))
    count = count_parameters(LITTLE)
    said = describe(healthy["shards"])
    assert "DeepseekV3ForCausalLM, 2 layers, 48 positions (no YaRN)" in said
    assert "MTP modules: 1; FP8: no; tokenizer: none" in said
    for number in (count.total, count.active, count.mtp):
        assert f" {number:,}" in said
    assert re.search(rf"^F32 +{count.total + count.mtp:,}$", said, re.MULTILINE)
    assert "F8_E4M3" in describe(healthy["fp8"])


@pytest.mark.parametrize("listed, told", [
    (["a", "b", "c"], "c is missing, and the index lists it"),
    (["a"], "b is not one that the index lists there")])
def test_a_shard_holds_what_the_index_lists(listed, told, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "read_header", lambda file: dict(a=None, b=None))
    (tmp_path / INDEX).write_text(json.dumps(dict(weight_map=dict.fromkeys(listed, "f"))))
    with pytest.raises(ValueError, match=f"tensor {told}"):
        reading.read_headers(tmp_path)
