"""config.json of real folders: what has one reading is read, what has two is refused by its key."""

import json
from dataclasses import replace

import pytest
import torch
from hf_folders import KINDS, distance, edit, folder_of, from_pretrained, through_json
from safetensors.torch import load_file, save_file
from small_models import LITTLE, scrambled

from minids import ModelArgs
from minids.hf import args_from_config, config_from_args, load_hf
from minids.hf.names import CONFIG, MTP, WEIGHTS

YARN = KINDS["V3 with YaRN"]
ONE_GROUP = replace(LITTLE, n_expert_groups=1, n_limited_groups=1)
NO_LATENT = replace(LITTLE, q_lora_rank=0)
MANY_DENSE = replace(LITTLE, n_dense_layers=2, n_routed_experts=8)
ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}


def rope(**change) -> dict:
    """A change of config.json: YaRN's object with fields changed; ... removes one."""
    return {"rope_scaling": {k: v for k, v in (ROPE | change).items() if v is not ...}}


ONE_READING = {
    "sizes as floats": (LITTLE, {"hidden_size": 24.0, "num_attention_heads": 3.0,
                                 "max_position_embeddings": 48.0, "num_key_value_heads": 3.0}),
    "numbers as whole ones": (replace(LITTLE, route_scale=2.0), {"routed_scaling_factor": 2,
                                                                 "rope_theta": 10000}),
    "yarn's length as a float": (YARN, rope(original_max_position_embeddings=12.0)),
    "yarn's factor as a whole one": (YARN, rope(factor=4)),
    "nulls of switches": (LITTLE, dict.fromkeys(
        ["attention_bias", "mlp_bias", "moe_layer_freq", "tie_word_embeddings"])),
    "nulls of what the class fixes": (LITTLE, dict.fromkeys(
        ["architectures", "scoring_func", "topk_method"])),
    "nulls of V2's gate": (KINDS["V2"], dict.fromkeys(["scoring_func", "norm_topk_prob"])),
    "null query latent": (NO_LATENT, {"q_lora_rank": None}),
    "null of shared experts": (KINDS["no shared experts"], {"n_shared_experts": None}),
    "null of heads": (LITTLE, {"num_key_value_heads": None}),
    "null of MTP": (KINDS["no MTP"], {"num_nextn_predict_layers": None}),
    "null of FP8": (LITTLE, {"quantization_config": None}),
    "null limit of one group": (ONE_GROUP, {"n_group": 1, "topk_group": None}),
    "null of groups": (ONE_GROUP, {"n_group": None}),
    "nulls of both": (ONE_GROUP, {"n_group": None, "topk_group": None}),
    "dense beyond the layers": (MANY_DENSE, {"first_k_dense_replace": 61}),
    "swish": (LITTLE, {"hidden_act": "swish"}),
    "MTP by its newer name": (LITTLE, {"num_nextn_predict_layers": None, "num_mtp_layers": 1}),
    "experts by a newer name": (LITTLE, {"n_routed_experts": None, "num_local_experts": 8}),
    "experts by two names": (LITTLE, {"num_experts": 8}),
    "dtype by its newer name": (LITTLE, {"torch_dtype": None, "dtype": "bfloat16"}),
    "rope_scaling that scales nothing": (LITTLE, {"rope_scaling": {"type": "default"}}),
    "rope_scaling with a null type": (LITTLE, {"rope_scaling": {"rope_type": None}}),
    "rope_scaling that is empty": (LITTLE, {"rope_scaling": {}}),
    "rope_parameters alone": (LITTLE, {"rope_scaling": None, "rope_theta": None, "rope_parameters":
                                       {"rope_theta": 10000.0, "rope_type": "default"}}),
    "both, alike": (YARN, rope() | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}),
    "rope_type": (YARN, rope(type=..., rope_type="yarn")),
    "rope_type and type": (YARN, rope(rope_type="yarn")),
    "rope_type null beside type": (YARN, rope(rope_type=None)),
    "yarn's length outside": (YARN, rope(original_max_position_embeddings=...)
                              | {"original_max_position_embeddings": 12}),
    "yarn's factor by the lengths": (YARN, rope(factor=None)),
    "yarn's betas null": (YARN, rope(beta_fast=None, beta_slow=None)),
    "no factor on rotations": (YARN, rope(attention_factor=1.0)),
    "a null factor on rotations": (YARN, rope(attention_factor=None, truncate=None)),
}


@pytest.mark.parametrize("kind", ONE_READING)
def test_a_spelling_with_one_reading_is_read(kind):
    args, change = ONE_READING[kind]
    config = config_from_args(args)
    assert args_from_config(through_json(config | change)) == args


TWO_READINGS = {
    "null limit of several groups": ({"topk_group": None}, "topk_group = None"),
    "no groups": ({"n_group": ...}, "n_group is missing"),
    "null that unscales": ({"norm_topk_prob": None}, "norm_topk_prob = None"),
    "null that splits pairs": ({"rope_interleave": None}, "rope_interleave = None"),
    "null of dense layers": ({"first_k_dense_replace": None}, "first_k_dense_replace = None"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5"),
    "a number as text": ({"hidden_size": "24"}, "hidden_size = '24'"),
    "a truth as number": ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta = inf"),
    "beyond floats": ({"routed_scaling_factor": 10 ** 400}, "routed_scaling_factor = 1000"),
    "two MTP counts": ({"num_mtp_layers": 3}, "num_mtp_layers = 3 is not valid: it must be equal "
                       "to num_nextn_predict_layers = 1"),
    "two counts of experts": ({"num_local_experts": 4}, "num_local_experts = 4"),
    "two bases": ({"rope_parameters": {"rope_theta": 5e4}}, "rope_parameters.rope_theta = 50000.0"),
    "two types": (rope(rope_type="default"), "rope_scaling.rope_type = 'default'"),
    "two lengths": (rope() | {"original_max_position_embeddings": 24},
                    "original_max_position_embeddings = 12 is not valid: it must be equal to"),
    "two ropes": (rope() | {"rope_parameters": {"factor": 8.0}}, "rope_parameters.factor = 8.0"),
    "ropes by layer": ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
                       "rope_parameters.full_attention = "),
    "a key of another scaling": (rope(low_freq_factor=1.0), "rope_scaling.low_freq_factor = 1.0"),
    "a misspelt key": (rope(mscale_all_dims=1.0), "did you mean 'mscale_all_dim'?"),
    "another scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type = 'linear'"),
    "a part rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "mscale alone": (rope(mscale_all_dim=...), "rope_scaling.mscale = 0.707"),
    "mscale_all_dim alone": (rope(mscale=...), "rope_scaling.mscale = None"),
    "mscale zero": (rope(mscale=0.0, mscale_all_dim=0.0), "rope_scaling.mscale = 0.0"),
    "a factor against mscale": (rope(attention_factor=1.5), "rope_scaling.attention_factor = 1.5"),
    "a factor without yarn": ({"rope_scaling": {"type": "default", "attention_factor": 2.0}},
                              "attention_factor = 2.0"),
    "mscale as text": (rope(mscale="1"), "rope_scaling.mscale = '1'"),
    "a factor not finite": (rope(factor=float("nan")), "rope_scaling.factor = nan"),
    "length as text": (rope(original_max_position_embeddings="12"), "original_max_position"),
    "tied by name": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
}


@pytest.mark.parametrize("kind", TWO_READINGS)
def test_what_has_two_readings_is_refused_by_its_key(kind):
    change, named = TWO_READINGS[kind]
    config = {k: v for k, v in (config_from_args(LITTLE) | change).items() if v is not ...}
    with pytest.raises(ValueError) as refused:
        args_from_config(config)
    assert named in str(refused.value) and "\n" not in str(refused.value)


UNSCALED = {
    "no mscale": rope(mscale=..., mscale_all_dim=...),
    "nulls": rope(mscale=None, mscale_all_dim=None),
    "mscale 1 alone": rope(mscale=1.0, mscale_all_dim=...),
    "two weights": rope(mscale=0.5, mscale_all_dim=1.0),
    "a larger one": rope(mscale=2.0, mscale_all_dim=0.3),
    "a factor alone": rope(mscale=..., mscale_all_dim=..., attention_factor=1.25),
    "a factor and a weight": rope(mscale=..., mscale_all_dim=0.5, attention_factor=0.8),
    "mscale zero and no factor": rope(mscale=..., mscale_all_dim=0.0, attention_factor=1.0),
}


@pytest.mark.parametrize("kind, how", [
    pytest.param(kind, how, marks=() if kind == "V3" or how == "two weights" else pytest.mark.slow)
    for kind in ("V3", "V2", "V3.2") for how in UNSCALED])
def test_yarn_means_what_transformers_takes_it_for(kind, how, tmp_path):
    args = replace(KINDS[kind], original_seq_len=12, rope_factor=4.0, mscale=0.707)
    folder = folder_of(args, tmp_path / "in")
    edit(folder / CONFIG, UNSCALED[how])
    ours, theirs = load_hf(folder), from_pretrained(folder)[0]
    assert distance(ours, theirs) < 1e-5
    again = args_from_config(through_json(config_from_args(ours.args)))
    assert again == ours.args != args
    # wrong: the factor on what is rotated, or the weight in the softmax, as in a released file
    for wrong in (replace(ours.args, attention_factor=1.05 * ours.args.attention_factor),
                  replace(ours.args, mscale=ours.args.mscale + 0.1)):
        model = scrambled(wrong, dtype=torch.float32)
        assert distance(model, theirs) > 1e-4


@pytest.mark.parametrize("promised, there, read", [
    (0, 1, 0), (0, 2, 0), (1, 2, 1), (1, 0, 0), (2, 1, 1), (3, 1, 1)])
def test_as_many_mtp_modules_are_read_as_settings_and_files_have(promised, there, read, tmp_path,
                                                                 capsys):
    whole = replace(LITTLE, n_mtp_layers=there)
    folder = folder_of(whole, tmp_path / "in")
    edit(folder / CONFIG, {"num_nextn_predict_layers": promised})
    model, told = load_hf(folder), capsys.readouterr().err
    assert model.args == replace(whole, n_mtp_layers=read)
    assert told.count("\n") == (there > promised)
    assert not told or f"{folder}: MTP modules beyond those in config.json" in told
    expected = scrambled(whole, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_half_spare_module_is_still_refused(tmp_path):
    folder = folder_of(replace(LITTLE, n_mtp_layers=2), tmp_path / "in")
    edit(folder / CONFIG, {"num_nextn_predict_layers": 1})
    kept = {k: v for k, v in load_file(folder / MTP).items() if not k.endswith("3.eh_proj.weight")}
    save_file(kept, folder / MTP)
    with pytest.raises(ValueError, match=r"model\.layers\.3\..* is extra"):
        load_hf(folder)


def harmed(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("dropped", ["lm_head.weight", "", None])
def test_a_tied_head_is_the_embedding(dropped, tmp_path):
    """Absent, stored as a copy, or with an MTP module beside it."""
    args = LITTLE if dropped is None else replace(LITTLE, n_mtp_layers=0)
    folder = folder_of(args, tmp_path / "in")
    edit(folder / CONFIG, {"tie_word_embeddings": True})
    if dropped == "":
        harmed(folder, lambda t: t.update({
            "lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    else:
        harmed(folder, lambda t: t.pop("lm_head.weight"))
    ours = load_hf(folder)
    assert torch.equal(ours.head.weight, ours.embed.weight)
    assert distance(ours, from_pretrained(folder)[0]) < 1e-5


def test_a_head_that_is_tied_and_differs_is_refused(tmp_path):
    folder = folder_of(LITTLE, tmp_path / "in")
    edit(folder / CONFIG, {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="tie_word_embeddings = True is not valid: .* differ"):
        load_hf(folder)
    edit(folder / CONFIG, {"tie_word_embeddings": False})
    harmed(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        load_hf(folder)


@pytest.mark.parametrize("preset", ["v3", "v2-lite", "kimi-k2"])
def test_released_settings_without_a_factor_stay_without(preset):
    args = ModelArgs.preset(preset)
    assert args.attention_factor == 1.0
    assert "attention_factor" not in json.dumps(config_from_args(args))
