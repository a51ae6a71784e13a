"""config.json: released configurations are the presets, any settings return, and
transformers reads the same rotations."""

from dataclasses import replace

import pytest
from hf_folders import KINDS, RELEASED_CONFIGS, V32, theirs_of, through_json
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LITTLE, gap
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from minids import ModelArgs, hf
from minids.hf import args_from_config, config_from_args, save_hf
from minids.model.rope import rotary_frequencies, softmax_scale

RELEASED = ("v2-lite", "v2", "v3", "v3.2", "moonlight", "kimi-k2")


@pytest.mark.parametrize("name", RELEASED_CONFIGS)
def test_a_released_configuration_is_the_preset(name, monkeypatch):
    config = RELEASED_CONFIGS[name]
    expected = replace(ModelArgs.preset(name), init_std=0.02)
    if not expected.yarn:
        expected = replace(expected, mscale=1.0)  # a released file has no word for it
    assert args_from_config(config) == expected
    written = config_from_args(expected)
    model_type = {"model_type": hf.settings.ALIASES.get(config["model_type"], config["model_type"])}
    for field in written.keys() & config.keys():
        assert written[field] == (config | model_type)[field], field
    # wrong: two fields taken for each other, which no round trip would notice
    monkeypatch.setitem(hf.settings.FIELDS, "moe_inter_dim", "intermediate_size")
    monkeypatch.setitem(hf.settings.FIELDS, "inter_dim", "moe_intermediate_size")
    assert args_from_config(config) != expected


@pytest.mark.parametrize("preset", ModelArgs.presets())
def test_every_preset_returns(preset):
    args = ModelArgs.preset(preset)
    assert args_from_config(through_json(config_from_args(args))) == args
    beyond_transformers = {"tiny", "deep", "nano", "micro", "moonlight"}
    assert (hf.settings.OWN_KEY in config_from_args(args)) == (preset in beyond_transformers)


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
        rope_factor=draw(st.floats(1, 64)), mscale=draw(st.just(0.0) | st.floats(0.1, 2)),
        attention_factor=draw(st.just(1.0) | st.floats(0.5, 2)),
        beta_fast=draw(st.floats(4, 40)), n_mtp_layers=draw(st.integers(0, 2)),
        init_std=draw(st.floats(1e-4, 1)), route_scale=draw(st.floats(0.1, 20)))


@settings(max_examples=150, deadline=None)
@given(drawn())
def test_any_settings_return(args):
    assert args_from_config(through_json(config_from_args(args))) == args


def test_a_return_without_what_only_we_know_is_another_model():
    args = replace(V32, index_fp8=True)
    config = config_from_args(args)
    assert config[hf.settings.OWN_KEY] == {"index_fp8": True, "original_seq_len": 4096}
    del config[hf.settings.OWN_KEY]
    assert args_from_config(config) == replace(V32, original_seq_len=LITTLE.max_seq_len)


@pytest.mark.parametrize("own", [["index_fp8"], "index_fp8", {"dim": 8}, {"unknown": 1},
                                 {"index_fp8": True, "dim": 8}], ids=str)
def test_our_own_key_holds_our_own_fields_alone(own):
    config = config_from_args(LITTLE)
    assert args_from_config(config | {hf.settings.OWN_KEY: {}}).dim == LITTLE.dim
    with pytest.raises(ValueError, match="is not valid: it must be an object whose fields are"):
        args_from_config(config | {hf.settings.OWN_KEY: own})


@pytest.mark.parametrize("theirs, ours, default", [
    ("rms_norm_eps", "norm_eps", 1e-6), ("initializer_range", "init_std", 0.02),
    ("num_nextn_predict_layers", "n_mtp_layers", 0), ("rope_theta", "rope_theta", 10000.0),
    ("beta_fast", "beta_fast", 32.0), ("beta_slow", "beta_slow", 1.0)])
def test_an_absent_field_has_transformers_default(theirs, ours, default):
    other = dict(norm_eps=1e-5, init_std=0.01, n_mtp_layers=1, rope_theta=500.0, beta_fast=16.0,
                 beta_slow=2.0)
    args = replace(LITTLE, original_seq_len=12, **other)
    config = config_from_args(args)
    assert args_from_config(config) == args
    for fields in (config, config["rope_scaling"]):
        fields.pop(theirs, None)
    assert args_from_config(config) == replace(args, **{ours: default})
    for fields in (config, config["rope_scaling"]):
        fields |= {theirs: None}
    assert args_from_config(config) == replace(args, **{ours: default})


def test_null_groups_are_one_group():
    args = replace(LITTLE, n_expert_groups=1, n_limited_groups=1)
    config = config_from_args(args)
    for nulls in (["n_group"], ["topk_group"], ["n_group", "topk_group"]):
        assert args_from_config(config | dict.fromkeys(nulls)) == args


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
    (dict(score_func="softmax", gate_bias=False, n_heads=5), "dim = 24")])
def test_what_transformers_has_no_class_for_is_refused_by_name(change, named, tmp_path):
    model = hf.names.skeleton(replace(LITTLE, **change))
    with pytest.raises(ValueError, match=named):
        save_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
