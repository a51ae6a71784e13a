"""Hugging Face folders: the same model in transformers, the same bytes back, damage named.

transformers reads what `save_hf` writes and `load_hf` reads what transformers writes; both then
give the same logits and the same greedy tokens. Numbers that the released files are known by
(settings, how many weights they hold in each precision) stand here as such.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import LITTLE, gap, random_tokens, scrambled
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from minids import ModelArgs, hf
from minids.base.command_line import run_program
from minids.costs import count_parameters
from minids.evaluate import main as evaluate_program
from minids.fp8 import dequantize, quantize_weight
from minids.generate import generate
from minids.generate import main as generate_program
from minids.hf import (
    args_from_config,
    config_from_args,
    load_hf,
    open_model,
    save_hf,
    to_hf,
)
from minids.hf.__main__ import HfArgs, convert, describe
from minids.hf.__main__ import main as hf_program
from minids.hf.names import CONFIG, INDEX, MTP, WEIGHTS
from minids.model.rope import rotary_frequencies, softmax_scale
from minids.runs.checkpoints import save_checkpoint
from minids.tokenizer import Tokenizer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

TINY = replace(LITTLE, dim=12, inter_dim=16, moe_inter_dim=8, n_heads=2, n_routed_experts=4,
               n_activated_experts=2, n_expert_groups=2, n_limited_groups=1, q_lora_rank=8,
               kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6)
V2 = replace(LITTLE, score_func="softmax", gate_bias=False)
V32 = replace(LITTLE, index_n_heads=2, index_head_dim=12, index_topk=7)
KINDS = {
    "V3": LITTLE,
    "V3 without query latent, one group": replace(LITTLE, q_lora_rank=0, n_expert_groups=1,
                                                  n_limited_groups=1),
    "V3 with YaRN": replace(LITTLE, original_seq_len=12, rope_factor=4.0, mscale=0.707),
    "V2": V2,
    "V2-Lite": replace(V2, n_expert_groups=1, n_limited_groups=1, q_lora_rank=0,
                       original_seq_len=12),
    "V3.2": V32,
    "no bias": replace(LITTLE, gate_bias=False, n_expert_groups=1, n_limited_groups=1),
    "no shared experts": replace(LITTLE, n_shared_experts=0),
    "dense": replace(LITTLE, n_routed_experts=0),
    "no MTP": replace(LITTLE, n_mtp_layers=0),
}
RELEASED = ("v2-lite", "v2", "v3", "v3.2", "moonlight", "kimi-k2")
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(),
         "error_msgs": []}


def folder_of(args: ModelArgs, folder: Path, dtype=torch.float32, **options) -> Path:
    """A saved model with every part awake."""
    save_hf(scrambled(args, dtype=dtype), folder, **options)
    return folder


def all_equal(a: dict, b: dict) -> bool:
    """The same names, precisions and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def edit(file: Path, change: dict) -> None:
    """Change fields of a JSON file; a value of ... removes the field."""
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not ...}))


# Settings.

V3_CONFIG = {  # the fields of the released file that decide anything
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "ep_size": 1,
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280}
LITE = {"first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 2048,
        "moe_intermediate_size": 1408, "q_lora_rank": None, "num_nextn_predict_layers": 0}
RELEASED_CONFIGS = {
    "v3": V3_CONFIG,
    "v3.2": V3_CONFIG | {"architectures": ["DeepseekV32ForCausalLM"], "index_head_dim": 128,
                         "model_type": "deepseek_v32", "index_n_heads": 64, "index_topk": 2048},
    "v2-lite": V3_CONFIG | LITE | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "vocab_size": 102400, "intermediate_size": 10944, "norm_topk_prob": False,
        "scoring_func": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0,
        "rope_scaling": V3_CONFIG["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "moonlight": V3_CONFIG | LITE | {
        "vocab_size": 163840, "intermediate_size": 11264, "max_position_embeddings": 8192,
        "rope_scaling": None, "rope_theta": 50000.0, "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446},
    "kimi-k2": V3_CONFIG | {
        "model_type": "kimi_k2", "vocab_size": 163840, "max_position_embeddings": 131072,
        "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0,
        "rope_scaling": V3_CONFIG["rope_scaling"] | {"factor": 32.0}}}


@pytest.mark.parametrize("name", RELEASED_CONFIGS)
def test_a_released_configuration_is_the_preset(name, monkeypatch):
    config = RELEASED_CONFIGS[name]
    expected = replace(ModelArgs.preset(name), init_std=0.02)
    if not expected.yarn:
        expected = replace(expected, mscale=1.0)  # a released file has no word for it
    assert args_from_config(config) == expected
    # wrong: two fields taken for each other, which no round trip would notice
    monkeypatch.setitem(hf.settings.FIELDS, "moe_inter_dim", "intermediate_size")
    monkeypatch.setitem(hf.settings.FIELDS, "inter_dim", "moe_intermediate_size")
    assert args_from_config(config) != expected


def through_json(config: dict) -> dict:
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("preset", ModelArgs.presets())
def test_every_preset_returns(preset):
    args = ModelArgs.preset(preset)
    assert args_from_config(through_json(config_from_args(args))) == args
    beyond_transformers = {"tiny", "deep", "nano", "micro", "moonlight"}
    assert (hf.settings.OURS in config_from_args(args)) == (preset in beyond_transformers)


@st.composite
def drawn(draw) -> ModelArgs:
    """Any settings that a class of transformers can express."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    limited = draw(st.integers(1, groups))
    v32, softmax = draw(st.booleans()), draw(st.booleans())
    heads, original = draw(st.integers(1, 4)), draw(st.integers(1, 100))
    return ModelArgs(
        vocab_size=draw(st.integers(1, 200)), dim=heads * draw(st.integers(1, 40)), n_heads=heads,
        n_layers=3, n_dense_layers=draw(st.integers(0, 3)), n_routed_experts=groups * per_group,
        n_shared_experts=draw(st.integers(0, 3)), n_expert_groups=groups, n_limited_groups=limited,
        n_activated_experts=draw(st.integers(1, limited * per_group)), index_hadamard=v32,
        score_func="softmax" if softmax and not v32 else "sigmoid", index_n_heads=3 * v32,
        gate_bias=not softmax or v32, q_lora_rank=draw(st.integers(v32, 9)),
        norm_eps=draw(st.floats(1e-9, 1e-2)), rope_theta=draw(st.floats(2, 1e6)),
        max_seq_len=draw(st.integers(1, 200)), original_seq_len=original,
        rope_factor=draw(st.floats(1, 64)), mscale=draw(st.floats(0.1, 2)),
        beta_fast=draw(st.floats(4, 40)), n_mtp_layers=draw(st.integers(0, 2)),
        init_std=draw(st.floats(1e-4, 1)), route_scale=draw(st.floats(0.1, 20)))


@settings(max_examples=150, deadline=None)
@given(drawn())
def test_any_settings_return(args):
    assert args_from_config(through_json(config_from_args(args))) == args


def test_a_return_without_what_only_we_know_is_another_model():
    args = replace(V32, index_fp8=True)
    config = config_from_args(args)
    assert config[hf.settings.OURS] == {"index_fp8": True, "original_seq_len": 4096}
    del config[hf.settings.OURS]
    assert args_from_config(config) == replace(V32, original_seq_len=LITTLE.max_seq_len)


def theirs_of(config: dict):
    """transformers' own; it writes into the dict that it is given."""
    return AutoConfig.for_model(**through_json(config))


@pytest.mark.parametrize("preset", [*RELEASED, "tiny"])
def test_transformers_reads_the_same_rotations(preset):
    def same(config: dict) -> bool:
        theirs = theirs_of(config)
        rotary = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(theirs)
        scale = modeling_deepseek_v3.yarn_apply_mscale(theirs.rope_parameters,
                                                       args.qk_head_dim ** -0.5)
        return (gap(rotary.inv_freq, rotary_frequencies(args)) < 1e-7  # FP32, in another order
                and scale == pytest.approx(softmax_scale(args), rel=1e-15)
                and rotary.attention_scaling == 1)

    args = ModelArgs.preset(preset)
    config = config_from_args(args)
    assert same(config)
    if preset == "v3":
        assert softmax_scale(args) == 0.1352337788608801  # V3's, with YaRN
    scaling = config["rope_scaling"]
    wrong = [{"mscale_all_dim": 0.5}, {"original_max_position_embeddings": 8192}, {"factor": 20.0}]
    for change in wrong if scaling else []:
        assert not same(config | {"rope_scaling": scaling | change})
    assert not same(config | {"rope_theta": 20000.0})


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_of_transformers_5_is_read(kind):
    args = KINDS[kind]
    config = theirs_of(config_from_args(args)).to_dict()
    assert "rope_scaling" not in config and "rope_parameters" in config
    assert args_from_config(config) == args_from_config(config_from_args(args))


@pytest.mark.parametrize("change, named", [
    (dict(index_n_heads=2, index_head_dim=12, q_lora_rank=0), "q_lora_rank = 0"),
    (dict(score_func="softmax", gate_bias=True), "gate_bias = True"),
    (dict(score_func="softmax", index_n_heads=2, index_head_dim=12), "score_func = 'softmax'"),
    (dict(gate_bias=False), "gate_bias = False"),
    (dict(n_routed_experts=1, n_activated_experts=1, n_expert_groups=1, n_limited_groups=1),
     "n_routed_experts = 1"),
    (dict(score_func="softmax", gate_bias=False, n_heads=5), "dim = 24"),
    (dict(mscale=0.0, original_seq_len=10), "mscale = 0.0")])
def test_what_transformers_has_no_class_for_is_refused_by_name(change, named, tmp_path):
    model = hf.names.skeleton(replace(LITTLE, **change))
    with pytest.raises(ValueError, match=named):
        save_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Names.


def released_numbers(preset: str) -> dict[str, int]:
    """How many numbers of each precision a released FP8 checkpoint has, by our tables."""
    args, sizes = ModelArgs.preset(preset), {"F8": 0, "BF16": 0, "F32": 0}
    state = hf.names.skeleton(args).state_dict()
    shapes = {name: slot.shape for name, slot in hf.names.slots(args).items()}
    shapes |= {name: list(tensor.shape) for name, tensor in hf.names.mtp_copies(args, state)}
    assert hf.names.mtp_among_others(args)
    for name, shape in shapes.items():
        if hf.names.goes_to_fp8(name, shape):
            sizes["F8"] += shape[0] * shape[1]
            sizes["F32"] += -(-shape[0] // 128) * -(-shape[1] // 128)
        else:
            wide = hf.names.own_dtype(name, torch.bfloat16) == torch.float32
            sizes["F32" if wide else "BF16"] += torch.Size(shape).numel()
    return sizes


def test_the_released_precisions_are_reproduced_to_the_number(monkeypatch):
    released = {"F8": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert released_numbers("v3") == released
    assert sum(released_numbers("v3.2").values()) == 685_396_921_376
    wide = hf.names.KEPT_WIDE
    for kept in (wide[:3], (*wide, "o_proj")):  # wrong: eh_proj in FP8; wo not
        monkeypatch.setattr(hf.names, "KEPT_WIDE", kept)
        assert released_numbers("v3") != released


def test_gradients_are_named_as_the_weights_are():
    model = scrambled(LITTLE)
    tokens = random_tokens(LITTLE, 3, 21)
    model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    grads = dict(to_hf(LITTLE, {name: p.grad for name, p in model.named_parameters()}))
    biases = {name for name in hf.names.slots(LITTLE) if name.endswith("e_score_correction_bias")}
    assert grads.keys() | biases == hf.names.slots(LITTLE).keys() and len(biases) == 2
    own = model.layers[1].ffn.experts.w2.grad[5]
    assert torch.equal(grads["model.layers.1.mlp.experts.5.down_proj.weight"], own)
    assert not torch.equal(grads["model.layers.1.mlp.experts.4.down_proj.weight"], own)
    own = model.mtp[0].block.attn.wo.weight.grad
    assert torch.equal(grads["model.layers.2.self_attn.o_proj.weight"], own)


# In and out.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_model_returns_bit_for_bit(kind, dtype, tmp_path, monkeypatch):
    args = KINDS[kind]
    model = scrambled(args, dtype=dtype)
    for bias in model.gate_biases():  # as every program of ours keeps them
        bias.data = bias.to(torch.promote_types(dtype, torch.float32))
    save_hf(model, tmp_path / "one")
    back = load_hf(tmp_path / "one", dtype)
    expected = model.state_dict()
    if kind == "no bias":
        expected |= {name: torch.zeros_like(bias) for name, bias in back.state_dict().items()
                     if name.endswith("gate.bias")}
    assert all_equal(back.state_dict(), expected)
    assert back.args == replace(args, gate_bias=args.gate_bias or kind == "no bias")
    save_hf(back, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    # wrong: gate and up projections exchanged on the way in
    names = hf.names.NAMES | {"ffn.w1.weight": hf.names.NAMES["ffn.w3.weight"],
                        "ffn.w3.weight": hf.names.NAMES["ffn.w1.weight"]}
    monkeypatch.setattr(hf.names, "NAMES", names)
    assert not all_equal(load_hf(tmp_path / "one", dtype).state_dict(), expected)


def test_a_gate_bias_is_never_rounded_to_bf16(tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out", dtype=torch.float32)
    biases = scrambled(LITTLE, dtype=torch.float32).gate_biases()
    loaded = load_hf(folder, torch.bfloat16)
    assert loaded.head.weight.dtype == torch.bfloat16
    assert all(map(torch.equal, loaded.gate_biases(), biases))
    assert not torch.equal(biases[0].bfloat16().float(), biases[0])
    save_hf(scrambled(LITTLE, dtype=torch.float32), tmp_path / "bf16", dtype=torch.bfloat16)
    assert all(map(torch.equal, load_hf(tmp_path / "bf16").gate_biases(), biases))


def from_pretrained(folder: Path):
    """transformers' model, and what it says of the loading."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@torch.no_grad()
def distance(ours, theirs) -> float:
    """The relative distance of the logits."""
    tokens = random_tokens(ours.args, 2, 21)
    return gap(ours(tokens), theirs(tokens, use_cache=False).logits)


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
    (True, {}), (True, dict(index_n_heads=1, index_head_dim=4)), (False, dict(n_mtp_layers=2)),
    (False, dict(score_func="softmax", gate_bias=False))], ids=["V3", "V3.2", "two", "V2"])
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


@pytest.mark.parametrize("kind", ["V3", "V2", "V3.2"])
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


# Shards, memory.


def test_shards_are_below_the_limit_and_the_index_says_where_all_is(tmp_path):
    folder, limit = folder_of(LITTLE, tmp_path / "out", shard_bytes=20_000), 20_000
    index = json.loads((folder / INDEX).read_text())
    files = sorted(folder.glob("model-*"))
    held = {file.name: load_file(file) for file in files}
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= limit and sum(sizes) == index["metadata"]["total_size"]
    assert index["weight_map"] == {name: file for file in held for name in held[file]} | {}
    assert not (folder / WEIGHTS).exists()
    assert all_equal(load_hf(folder).state_dict(),
                     scrambled(LITTLE, dtype=torch.float32).state_dict())
    assert from_pretrained(folder)[1] == CLEAN


MEASURE = """
import contextlib, json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from safetensors.torch import load_file
from minids import hf
from minids import ModelArgs, Transformer

args = ModelArgs(vocab_size=1024, dim=512, inter_dim=512, moe_inter_dim=512, n_layers=3, n_heads=2,
                 n_dense_layers=0, n_routed_experts=16, n_mtp_layers=0)
folder, mb = {folder!r}, 2 ** 20

def status(field):
    [line] = [line for line in open("/proc/self/status") if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024

def growth(function, prepare=lambda: None):
    \"\"\"MiB by which a fresh process that runs it grows at most, after preparing.\"\"\"
    read, write = os.pipe()
    if os.fork() == 0:
        hf.save_hf(Transformer(ModelArgs.preset("nano")), folder + "-small", overwrite=True)
        hf.load_hf(folder + "-small")  # the code of both directions is in memory now
        prepared = prepare()
        before = status("VmRSS")
        kept = function(prepared)
        os.write(write, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    found = int(os.read(read, 100))
    os.wait()
    return found / mb

def made():
    model = hf.names.skeleton(args).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model

def load_all(_):
    held = load_file(folder + "/model.safetensors")
    return hf.load_hf(folder), {{name: tensor.clone() for name, tensor in held.items()}}

def load_mapped(_):
    \"\"\"The file stays open while its tensors are read.\"\"\"
    with hf.reading.safe_open(folder + "/model.safetensors", "pt") as stream:
        hf.reading.opened = lambda source, name: contextlib.nullcontext(stream.get_tensor(name))
        return hf.load_hf(folder)

def save(shard_bytes):
    return lambda model: hf.save_hf(model, folder, overwrite=True, shard_bytes=shard_bytes)

shapes = hf.names.skeleton(args).state_dict().values()
grown = dict(size=sum(4 * t.numel() for t in shapes) / mb, save=growth(save(8 * mb), made),
             save_whole=growth(save(10**9), made), load=growth(lambda _: hf.load_hf(folder)),
             mapped=growth(load_mapped), all=growth(load_all))
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
def test_memory_stays_below_the_model_and_a_tensor(tmp_path):
    tests = Path(__file__).resolve().parents[1]
    source = MEASURE.format(root=str(tests.parent), tests=str(tests), folder=str(tmp_path / "m"))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    largest, other = 2, 6  # MiB: the embedding; what else a process needs
    assert 120 < grown["size"] < 200
    assert grown["load"] < grown["size"] + largest + other, grown
    assert grown["mapped"] > 1.5 * grown["size"] and grown["all"] > 1.5 * grown["size"], grown
    # A shard of 8, and what the allocator does not give back between two; all at once is the model.
    assert grown["save"] < 8 + 2 * other < grown["size"] - other < grown["save_whole"], grown


# FP8.

RAGGED = replace(LITTLE, dim=144, inter_dim=200, moe_inter_dim=136, kv_lora_rank=300,
                 n_routed_experts=2, n_activated_experts=2, n_expert_groups=1, n_limited_groups=1,
                 index_n_heads=12, index_head_dim=12, vocab_size=130)
FORMS = ["fp8", "fp8-ue8m0"]


def rounded(model, ue8m0: bool, back=dequantize) -> dict:
    """The weights as FP8 leaves them, matrix by matrix, under released names."""
    return {name: back(*quantize_weight(tensor, ue8m0)) if hf.names.goes_to_fp8(name, tensor.shape)
            else tensor for name, tensor in to_hf(model.args, model.state_dict())}


def transposed(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Wrong: rows of blocks taken for columns."""
    flipped = scale.T if scale.shape[0] == scale.shape[1] else scale.flatten().view_as(scale.T).T
    return dequantize(q, flipped.reshape(scale.shape))


def without_ragged(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Wrong: the last, partial blocks take the scales of the whole ones before them."""
    rows, columns = (torch.arange(n).clamp(max=max(size // 128, 1) - 1)
                     for n, size in zip(scale.shape, q.shape, strict=True))
    return dequantize(q, scale[rows][:, columns])


@pytest.mark.parametrize("form", FORMS)
def test_fp8_files_hold_what_our_rounding_gives(form, tmp_path, monkeypatch):
    model = scrambled(RAGGED, dtype=torch.float32)
    model.layers[0].ffn.w1.weight.data *= torch.linspace(0.1, 9, RAGGED.inter_dim)[:, None]
    monkeypatch.setattr(hf.reading, "BAND", 128)  # small matrices too take several bands
    save_hf(model, tmp_path / "out", quantize=form)
    stored = load_file(tmp_path / "out" / WEIGHTS) | load_file(tmp_path / "out" / MTP)
    kinds = {tensor.dtype for name, tensor in stored.items() if "scale" not in name}
    assert kinds == {torch.float8_e4m3fn, torch.float32}
    for name, tensor in stored.items():
        wide = name.endswith(("norm.weight", "bias")) or any(
            part in name for part in ("embed", "lm_head", "mlp.gate.", "eh_proj", "weights_proj"))
        assert (tensor.dtype == torch.float8_e4m3fn) == (not wide and "scale" not in name), name
    loaded = dict(to_hf(RAGGED, load_hf(tmp_path / "out").state_dict()))
    assert all_equal(loaded, rounded(model, form == "fp8-ue8m0"))
    for wrong in (transposed, without_ragged):
        assert not all_equal(loaded, rounded(model, form == "fp8-ue8m0", wrong))
    assert not all_equal(loaded, rounded(model, form == "fp8"))


def test_fp8_of_more_rows_than_a_band(tmp_path):
    args = replace(TINY, inter_dim=2 * hf.reading.BAND + 70, n_routed_experts=0)
    model = scrambled(args, dtype=torch.float32)
    model.layers[0].ffn.w1.weight.data *= torch.linspace(0.1, 3, args.inter_dim)[:, None]
    save_hf(model, tmp_path / "out", quantize="fp8")
    loaded = load_hf(tmp_path / "out").layers[0].ffn.w1.weight
    own = model.layers[0].ffn.w1.weight
    assert torch.equal(loaded, dequantize(*quantize_weight(own)))
    q, scale = quantize_weight(own)
    assert not torch.equal(loaded, dequantize(q, scale.roll(1, 0)))  # wrong: a band too late


def test_scales_may_be_stored_as_exponents(tmp_path):
    folder = folder_of(RAGGED, tmp_path / "out", quantize="fp8-ue8m0")
    expected = load_hf(folder).state_dict()
    stored = load_file(folder / WEIGHTS)
    scales = {name for name in stored if name.endswith("_scale_inv")}
    narrow = {name: stored[name].to(torch.float8_e8m0fnu) for name in scales}
    assert all(torch.equal(narrow[name].float(), stored[name]) for name in scales)
    save_file(stored | narrow, folder / WEIGHTS, metadata={"format": "pt"})
    assert all_equal(load_hf(folder).state_dict(), expected)
    # wrong: scales that are no powers of two do not survive this
    stored = load_file(folder_of(RAGGED, tmp_path / "fp32", quantize="fp8") / WEIGHTS)
    assert not all(torch.equal(stored[name].to(torch.float8_e8m0fnu).float(), stored[name])
                   for name in scales)


def test_transformers_undoes_fp8_alike():
    """Its rule for whole blocks; it refuses the ragged ones that released files have."""
    torch.manual_seed(0)
    q, scale = quantize_weight(torch.randn(256, 384))
    theirs = Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    assert torch.equal(theirs, dequantize(q, scale))
    assert not torch.equal(theirs, dequantize(q, scale.roll(1, 1)))


def test_a_released_v3_folder_is_read_as_it_is(tmp_path):
    """Kimi K2's model_type, FP8 with BF16, an MTP layer with its copies, tables of angles."""
    args = replace(RAGGED, index_n_heads=0)
    model = scrambled(args, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.writing, "mtp_among_others", lambda args: True)
        save_hf(model, tmp_path / "out", quantize="fp8", shard_bytes=100_000)
    edit(tmp_path / "out" / CONFIG, {"model_type": "kimi_k2", "minids": ..., "mlp_bias": ...})
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    angles = "model.layers.0.self_attn.rotary_emb.inv_freq"
    index["weight_map"][angles] = "angles.safetensors"
    save_file({angles: torch.ones(3)}, tmp_path / "out" / "angles.safetensors")
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    back = load_hf(tmp_path / "out", torch.bfloat16)
    assert len(back.mtp) == 1 and "model.layers.2.embed_tokens.weight" in index["weight_map"]
    expected = {name: t.to(hf.names.own_dtype(name, torch.bfloat16))
                for name, t in rounded(model, False).items()}
    for name, bias in expected.items():
        if name.endswith("correction_bias"):  # this model's were BF16 before they were saved
            expected[name] = bias.float()
    assert all_equal(dict(to_hf(args, back.state_dict())), expected)


# Bad input.


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
    "angles scaled": (rope_with(mscale_all_dim=0.7), "rope_scaling.mscale = 1.0"),
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
    "MTP not announced": (config_with(num_nextn_predict_layers=0), MTP, "is extra"),
    "MTP stored twice": (lambda folder: shutil.copy(folder / WEIGHTS, folder / MTP), MTP,
                         "stands in another file too"),
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


def call(capsys, monkeypatch, *words) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["minids.hf", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_program("minids.hf", hf_program)
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err


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


@pytest.mark.parametrize("words, named", [
    ([], "give either --run"), (["--run", "a", "--folder", "b"], "give either --run"),
    (["--run", "a"], "name the folder to write"), (["--folder", "nowhere"], "nowhere is not a"),
    (["--folder", "a", "--dtype", "bf16"], "out = ''"), (["--foldr", "a"], "--folder"),
    (["--run", "a", "--out", "b", "--quantize", "int4"], "int4"),
    (["--run", "a", "--out", "b", "--shard-bytes", "0"], "shard_bytes = 0"),
    (["--run", "nowhere", "--out", "b"], "nowhere is not a folder")])
def test_a_mistake_on_the_command_line_is_one_line(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, monkeypatch, *words)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_argument_of_save_is_named(tmp_path):
    model = scrambled(LITTLE)
    with pytest.raises(ValueError, match="quantize = 'fp4' is not valid"):
        save_hf(model, tmp_path / "out", quantize="fp4")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is not valid: it is a file"):
        save_hf(model, tmp_path / "file", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Whole or not at all.


def test_other_files_are_never_lost(tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out", shard_bytes=60_000)
    (folder / "README.md").write_text("mine")
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "a.txt").write_text("mine too")
    (folder / "link").symlink_to("notes")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="it holds files already"):
        folder_of(V2, folder)
    assert sorted(p.name for p in folder.iterdir()) == before
    folder_of(replace(V2, n_mtp_layers=0), folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", CONFIG, "link", WEIGHTS, "notes"]
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "link" / "deep" / "a.txt").read_text() == "mine too"
    assert load_hf(folder).args == replace(V2, n_mtp_layers=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken_and_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    folder_of(LITTLE, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_hf(tmp_path / "real").args == LITTLE


def test_a_folder_that_looks_put_aside_is_never_removed(tmp_path):
    folder_of(LITTLE, tmp_path / "out")
    mine = folder_of(V2, tmp_path / "out.replaced")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match="out.replaced is in the way|holds files"):
            folder_of(V32, tmp_path / "out", overwrite=overwrite)
    assert load_hf(mine).args == V2 and load_hf(tmp_path / "out").args == LITTLE


def save_in_place(model, folder: Path) -> None:
    """The wrong variant."""
    hf.writing.write_weights(model, folder, None, 60_000, None)
    (folder / CONFIG).write_text(json.dumps(config_from_args(model.args)))


def save_over(model, folder: Path) -> None:
    save_hf(model, folder, overwrite=True, shard_bytes=60_000)


CALLS = [(os, "rename"), (os, "fsync"), (os, "link"), (shutil, "rmtree"), (hf.writing, "save_file"),
         (Path, "write_text"), (Path, "mkdir")]


def stopped(save, folder: Path, stop_at: int, killed: bool) -> bool:
    """Run a save that stops before its call number `stop_at`; whether it came that far.

    killed: the process ends there and cleans up nothing; else the call raises
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    counter, once = iter(range(10**6)), []
    def stopping(function):
        def call(*args, **kwargs):
            if next(counter) == stop_at and not once:
                once.append(True)
                if killed:
                    os._exit(9)
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        return call
    for module, name in CALLS:
        setattr(module, name, stopping(getattr(module, name)))
    status = 1
    with contextlib.suppress(BaseException):
        try:
            save(scrambled(V2, dtype=torch.float32), folder)
            status = 0
        except KeyboardInterrupt:
            status = 9
    os._exit(status)


def torn(save, folder: Path, killed: bool) -> list[str]:
    """Stop a save that replaces a V3 by a V2 before each of its calls; what a reader then misses.

    Read is the old model or the new one, whole, with the other file; and a save of the next minute
    works unless one must be asked what to do with the folder put aside.
    """
    both = {args.score_func: scrambled(args, dtype=torch.float32).state_dict()
            for args in (LITTLE, V2)}
    lost, seen, start = [], set(), folder.with_name("start")
    folder_of(LITTLE, start)
    (start / "README.md").write_text("mine")
    for stop_at in range(80):
        for left in folder.parent.iterdir():
            if left != start:
                shutil.rmtree(left)
        shutil.copytree(start, folder)
        if not stopped(save, folder, stop_at, killed):
            assert seen == {"sigmoid", "softmax"} or save is save_in_place
            return lost
        try:
            found = load_hf(folder)
            seen.add(found.args.score_func)
            whole = all_equal(found.state_dict(), both[found.args.score_func])
            readme = (hf.reading.checked_folder(folder) / "README.md").read_text()
            if not whole or readme != "mine":
                lost.append(f"call {stop_at}: not whole")
            if not hf.reading.aside_of(folder).exists():
                save_over(scrambled(V2, dtype=torch.float32), folder)
                assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, "start"]
            elif not killed:
                lost.append(f"call {stop_at}: {hf.reading.aside_of(folder)} is left behind")
        except ValueError as error:
            lost.append(f"call {stop_at}: {error}")
    raise AssertionError("the save did not end within 80 calls")


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "interrupted"])
def test_an_interrupted_save_leaves_the_old_folder_or_the_new(killed, tmp_path):
    assert torn(save_over, tmp_path / "out", killed) == []


def test_the_check_notices_a_save_in_place(tmp_path):
    assert torn(save_in_place, tmp_path / "out", killed=True)


def test_a_disk_that_refuses_leaves_the_old_folder(tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written, and nothing there was changed"):
            save_over(scrambled(V2), folder)
        with pytest.raises(OSError, match="could not be written"):
            folder_of(V2, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_hf(folder).args == LITTLE and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(os.fstat(handle).st_ino),
                                                     fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    def unflushed() -> set[str]:
        order.clear()
        folder = folder_of(LITTLE, tmp_path / f"out{len(list(tmp_path.iterdir()))}",
                           shard_bytes=60_000)
        last = len(order) - order[::-1].index("rename")
        return {path.name for path in (folder, *folder.iterdir())
                if path.stat().st_ino not in order[:last]}
    assert unflushed() == set()
    monkeypatch.setattr(hf.writing, "flush", lambda path: None)  # wrong
    assert CONFIG in unflushed()


# Programs.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder whose model has learnt nothing, but is sure of what it says."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    tokenizer = Tokenizer.load()
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size)
    save_checkpoint(folder, 7, scrambled(args, dtype=torch.float32).state_dict(), {"step": 7})
    tokenizer.save(folder / "tokenizer")
    config = {"model": asdict(args), "tokenizer": tokenizer.fingerprint}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """That run as a Hugging Face folder."""
    out = tmp_path_factory.mktemp("exported") / "nano"
    convert(HfArgs(run=str(run), out=str(out)))
    return out


def test_an_exported_run_is_the_same_model_with_the_same_tokenizer(run, exported):
    mine, theirs = open_model(run), open_model(exported)
    assert all_equal(mine.model.state_dict(), theirs.model.state_dict())
    assert mine.model.args == theirs.model.args and theirs.checkpoint == exported
    text = "def read_file(path):\n    return 'naïve'  # 12345\n"
    ids = mine.tokenizer.encode(text)
    assert theirs.tokenizer.encode(text) == ids
    assert AutoTokenizer.from_pretrained(exported)(text)["input_ids"] == ids
    config = json.loads((exported / CONFIG).read_text())
    for name, id in (("bos", mine.tokenizer.bos_id), ("eos", mine.tokenizer.eos_id)):
        assert config[f"{name}_token_id"] == getattr(theirs.tokenizer, f"{name}_id") == id
    assert from_pretrained(exported)[1] == CLEAN


def test_generate_takes_either_folder(run, exported, capsys, monkeypatch):
    said = []
    for folder, seed in ((run, 5), (exported, 5), (exported, 6)):
        words = ["--run", folder, "--prompt", "def ", "--max-new-tokens", 20, "--seed", seed]
        monkeypatch.setattr(sys, "argv", ["minids.generate", *map(str, words)])
        generate_program()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_evaluate_takes_either_folder(run, exported, tmp_path, capsys, monkeypatch):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"This is text number {i}, and it is not long.\n" * 4)
    said = []
    for folder, seq_len in ((run, 32), (exported, 32), (exported, 16)):
        words = ["--run", folder, "--data", f"text:{tmp_path}", "--seq-len", seq_len,
                 "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["minids.evaluate", *map(str, words)])
        evaluate_program()
        said.append(capsys.readouterr().out.split("\n", 1)[1])
    assert said[0] == said[1] != said[2] and "bits per byte" in said[0]


def test_a_folder_without_a_tokenizer_is_named(healthy, exported, tmp_path):
    with pytest.raises(ValueError, match="plain.*tokenizer.json"):
        open_model(healthy["plain"])
    folder_of(LITTLE, tmp_path / "small", tokenizer=exported)
    with pytest.raises(ValueError, match="its tokenizer has [0-9]+ tokens and its model only 64"):
        open_model(tmp_path / "small")
    with pytest.raises(ValueError, match="tokenizer has .* at most vocab_size = 64"):
        save_hf(scrambled(LITTLE), tmp_path / "out", tokenizer=Tokenizer.load())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_model(tmp_path)


def test_fp8_is_made_wide_and_the_tokenizer_copied(run, exported, tmp_path, capsys, monkeypatch):
    status, out, _ = call(capsys, monkeypatch, "--run", run, "--out", tmp_path / "fp8",
                          "--dtype", "bf16", "--quantize", "fp8")
    assert status == 0 and "FP8: yes" in out
    status, out, _ = call(capsys, monkeypatch, "--folder", tmp_path / "fp8",
                          "--out", tmp_path / "wide")
    assert status == 0 and "FP8: no" in out and "BF16" in out
    expected = load_hf(tmp_path / "fp8", torch.bfloat16)
    assert all_equal(load_hf(tmp_path / "wide", torch.bfloat16).state_dict(),
                     expected.state_dict())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy, original = tmp_path / "wide" / name, exported / name
        assert copy.read_bytes() == original.read_bytes()
        assert copy.stat().st_ino != (tmp_path / "fp8" / name).stat().st_ino
    ends = [{end: json.loads((folder / CONFIG).read_text())[end] for end in
             ("bos_token_id", "eos_token_id")} for folder in (exported, tmp_path / "wide")]
    assert ends[0] == ends[1]
    assert open_model(tmp_path / "wide").model.head.weight.dtype == torch.float32
    assert open_model(tmp_path / "wide", dtype=torch.bfloat16).model.head.weight.dtype \
        == torch.bfloat16


def test_a_new_tokenizer_replaces_the_old_one_whole(exported, tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out", tokenizer=exported)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    folder_of(LITTLE, folder, overwrite=True)
    assert (folder / "tokenizer.json").exists() and (folder / "generation_config.json").exists()
    folder_of(LITTLE, folder, overwrite=True, tokenizer=exported)
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "generation_config.json").exists()


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


def test_the_command_itself(exported, tmp_path):
    root = Path(__file__).resolve().parents[2]
    def command(*words):
        return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True,
                              text=True, cwd=root)
    done = command("minids.hf", "--folder", exported)
    assert done.returncode == 0 and "DeepseekV3ForCausalLM" in done.stdout and not done.stderr
    (tmp_path / CONFIG).write_text(json.dumps(V3_CONFIG | {"index_topk": 0, "topk_group": 9}))
    done = command("minids.hf", "--folder", tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == (
        f"python -m minids.hf: {tmp_path / CONFIG}: topk_group = 9 is not valid: it must be "
        "between 1 and n_group = 8\n")
    assert "minids.hf" in command("minids").stdout
