"""Models, folders and transformers' view of them, for the tests of this folder."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from small_models import LITTLE, gap, random_tokens, scrambled
from transformers import AutoConfig, AutoModelForCausalLM

from minids import ModelArgs, hf
from minids.base.command_line import run_program
from minids.fp8 import dequantize, quantize_weight
from minids.hf import save_hf, to_hf
from minids.hf.__main__ import main as hf_program

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

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
RAGGED = replace(LITTLE, dim=144, inter_dim=200, moe_inter_dim=136, kv_lora_rank=300,
                 n_routed_experts=2, n_activated_experts=2, n_expert_groups=1, n_limited_groups=1,
                 index_n_heads=12, index_head_dim=12, vocab_size=130)
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(),
         "error_msgs": []}
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


def through_json(config: dict) -> dict:
    return json.loads(json.dumps(config))


def theirs_of(config: dict):
    """transformers' own; it writes into the dict that it is given."""
    return AutoConfig.for_model(**through_json(config))


def from_pretrained(folder: Path):
    """transformers' model, and what it says of the loading."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@torch.no_grad()
def distance(ours, theirs) -> float:
    """The relative distance of the logits."""
    tokens = random_tokens(ours.args, 2, 21)
    return gap(ours(tokens), theirs(tokens, use_cache=False).logits)


def rounded(model, ue8m0: bool, back=dequantize) -> dict:
    """The weights as FP8 leaves them, matrix by matrix, under released names."""
    return {name: back(*quantize_weight(tensor, ue8m0)) if hf.names.goes_to_fp8(name, tensor.shape)
            else tensor for name, tensor in to_hf(model.args, model.state_dict())}


def call(capsys, monkeypatch, *words) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["minids.hf", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_program("minids.hf", hf_program)
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err
