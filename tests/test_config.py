"""Settings: presets are the published models, and every mistake is told in one useful line."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from minids.config import ModelArgs
from minids.costs import count_parameters

NAMES = ("vocab_size dim n_layers n_dense_layers inter_dim moe_inter_dim n_routed_experts "
         "n_shared_experts n_activated_experts n_expert_groups n_limited_groups score_func "
         "route_scale gate_bias n_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
         "qk_rope_head_dim v_head_dim rope_theta norm_eps n_mtp_layers max_seq_len "
         "index_n_heads index_head_dim index_topk").split()
DENSE = (0, 32, 128)  # no indexer; the other two then have no meaning
# As published: V2 (arXiv 2405.04434) section 3.1 and appendix B, V3 (arXiv 2412.19437) section
# 4.2, and the configuration files of the released weights.
PUBLISHED = {
    "v2-lite": (102400, 2048, 27, 1, 10944, 1408, 64, 2, 6, 1, 1, "softmax", 1.0, False, 16, 0,
                512, 128, 64, 128, 10000.0, 1e-6, 0, 163840, *DENSE),
    "v2": (102400, 5120, 60, 1, 12288, 1536, 160, 2, 6, 8, 3, "softmax", 16.0, False, 128, 1536,
           512, 128, 64, 128, 10000.0, 1e-6, 0, 163840, *DENSE),
    "v3": (129280, 7168, 61, 3, 18432, 2048, 256, 1, 8, 8, 4, "sigmoid", 2.5, True, 128, 1536,
           512, 128, 64, 128, 10000.0, 1e-6, 1, 163840, *DENSE),
    "v3.2": (129280, 7168, 61, 3, 18432, 2048, 256, 1, 8, 8, 4, "sigmoid", 2.5, True, 128, 1536,
             512, 128, 64, 128, 10000.0, 1e-6, 1, 163840, 64, 128, 2048),
    "moonlight": (163840, 2048, 27, 1, 11264, 1408, 64, 2, 6, 1, 1, "sigmoid", 2.446, True, 16, 0,
                  512, 128, 64, 128, 50000.0, 1e-5, 0, 8192, *DENSE),
    "kimi-k2": (163840, 7168, 61, 1, 18432, 2048, 384, 1, 8, 1, 1, "sigmoid", 2.827, True, 64,
                1536, 512, 128, 64, 128, 50000.0, 1e-6, 0, 131072, *DENSE),
}
# preset: (YaRN on, rope_factor, original_seq_len, mscale); the last three matter where it is on
STRETCHED = {"v2-lite": (True, 40.0, 4096, 0.707), "v2": (True, 40.0, 4096, 0.707),
             "v3": (True, 40.0, 4096, 1.0), "v3.2": (True, 40.0, 4096, 1.0),
             "kimi-k2": (True, 32.0, 4096, 1.0),
             "moonlight": (False,)}


def deviations(args: ModelArgs, published: tuple) -> list[str]:
    """The fields in which a configuration is not the published one."""
    return [name for name, value in zip(NAMES, published, strict=True)
            if getattr(args, name) != value]


@pytest.mark.parametrize("name", ModelArgs.presets())
def test_every_preset_builds_and_survives_a_change(name):
    args = ModelArgs.preset(name)
    assert replace(args, n_mtp_layers=0).dim == args.dim
    assert all(type(getattr(args, f.name)) is f.type for f in fields(args))


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_presets_have_the_published_dimensions(name):
    args = ModelArgs.preset(name)
    assert deviations(args, PUBLISHED[name]) == []
    stretch = (args.yarn, args.rope_factor, args.original_seq_len, args.mscale)
    assert stretch[:len(STRETCHED[name])] == STRETCHED[name]


def test_every_released_preset_is_in_the_table_and_a_wrong_one_is_caught():
    assert set(PUBLISHED) == set(STRETCHED) == set(ModelArgs.presets()) - set(OURS)
    wrong = replace(ModelArgs.preset("v3"), route_scale=1.0, n_limited_groups=3)
    assert deviations(wrong, PUBLISHED["v3"]) == ["n_limited_groups", "route_scale"]


OURS = {  # parameters in all, of a token, of MTP; longest sequence, slowest rotation, first weights
    "tiny": (5_628_440, 3_858_968, 1_137_992, 1024, 1e4, 0.006),
    "deep": (17_702_264, 8_854_904, 1_137_992, 1024, 1e4, 0.006),
    "nano": (595_556, 583_268, 47_188, 256, 1e4, 0.006),
    "micro": (226_184, 152_456, 0, 256, 100, 0.1),
    "small": (1_040_330_208, 214_576_608, 69_867_168, 4096, 1e4, 0.006),
    "gpu-24gb": (706_293_936, 221_851_824, 0, 4096, 1e4, 0.006),
    "gpu-80gb": (3_194_216_800, 772_006_240, 0, 4096, 1e4, 0.006)}


@pytest.mark.parametrize("name", OURS)
def test_our_own_presets_have_the_sizes_that_runs_and_pages_rest_on(name):
    args = ModelArgs.preset(name)
    count = count_parameters(args)
    assert (count.total, count.active, count.mtp, args.max_seq_len, args.rope_theta,
            args.init_std) == OURS[name]


def test_layers_and_yarn_follow_from_the_fields():
    args = ModelArgs.preset("v3")
    assert [args.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert not replace(args, n_routed_experts=0).is_moe_layer(60)
    assert args.qk_head_dim == 192
    lengths = (4095, 4096, 4097)  # on exactly above original_seq_len
    assert [replace(args, max_seq_len=n).yarn for n in lengths] == [False, False, True]


# changes to the default configuration, the field to blame, what the message must say is valid
MISTAKES = [
    (dict(qk_rope_head_dim=7), "qk_rope_head_dim", "even"),
    (dict(n_dense_layers=5), "n_dense_layers", "at most n_layers = 4"),
    (dict(n_layers=4.0), "n_layers", "of type int"),
    (dict(dim="wide"), "dim", "of type int"),
    (dict(dim=True), "dim", "of type int"),
    (dict(gate_bias=1), "gate_bias", "of type bool"),
    (dict(score_func="tanh"), "score_func", "one of sigmoid, softmax"),
    (dict(moe_inter_dim=0), "moe_inter_dim", "at least 1"),
    (dict(n_expert_groups=3), "n_expert_groups", "a divisor of n_routed_experts = 8"),
    (dict(n_expert_groups=0), "n_expert_groups", "a divisor of n_routed_experts = 8"),
    (dict(n_limited_groups=2), "n_limited_groups", "between 1 and n_expert_groups = 1"),
    (dict(n_activated_experts=9), "n_activated_experts", "between 1 and 8"),
    (dict(n_activated_experts=0), "n_activated_experts", "between 1 and 8"),
    # Two experts live in one of four groups: the third can never be chosen.
    (dict(n_expert_groups=4, n_activated_experts=3), "n_activated_experts", "between 1 and 2"),
    # V3 scores a group by its best two experts, so a group of one has no score.
    (dict(n_expert_groups=8, n_limited_groups=2), "n_expert_groups", "two experts or more"),
    (dict(index_n_heads=4, index_head_dim=8), "index_head_dim", "qk_rope_head_dim = 16 or more"),
    (dict(index_n_heads=4, index_head_dim=24, index_hadamard=True), "index_head_dim", "power of"),
]


def says_all(message: str, field: str, value, valid: str) -> bool:
    """One line that names the field, its value and what is valid."""
    return message.startswith(f"{field} = {value!r} ") and valid in message and "\n" not in message


@pytest.mark.parametrize("changes, field, valid", MISTAKES)
def test_a_mistake_names_field_value_and_what_is_valid(changes, field, valid):
    with pytest.raises(ValueError) as caught:
        replace(ModelArgs(), **changes)
    value = changes.get(field, getattr(ModelArgs(), field))
    assert says_all(str(caught.value), field, value, valid)


def test_a_message_that_leaves_something_out_is_caught():
    told = "n_heads = 0 is not valid: it must be at least 1"
    assert says_all(told, "n_heads", 0, "at least 1")
    for wrong in ("n_heads is not valid", "n_heads = 0 is bad", "it must be at least 1",
                  told.replace(":", ":\n")):
        assert not says_all(wrong, "n_heads", 0, "at least 1")


def test_valid_corners_are_accepted():
    replace(ModelArgs(), n_expert_groups=4, n_limited_groups=2, n_activated_experts=4)
    replace(ModelArgs(), n_expert_groups=8, n_limited_groups=2, gate_bias=False)  # groups of one
    replace(ModelArgs(), n_routed_experts=0, n_activated_experts=9)  # dense: experts unread
    assert replace(ModelArgs(), rope_theta=50000).rope_theta == 50000.0  # an int is a float too
    replace(ModelArgs(), moe_inter_dim=1, n_expert_groups=1, n_activated_experts=8)
    replace(ModelArgs(), n_routed_experts=0, moe_inter_dim=0)  # dense: no expert's width is read
    replace(ModelArgs(), n_dense_layers=4)  # as many as there are


def test_the_indexers_width():
    """A power of two where there is a Hadamard transform; at least the rotated part."""
    sparse = replace(ModelArgs(), index_n_heads=4)
    replace(sparse, index_head_dim=24)  # without the transform any width
    replace(sparse, index_head_dim=16)  # exactly the rotated part
    for width in (16, 32, 64):
        replace(sparse, index_head_dim=width, index_hadamard=True)
    for width in (17, 24, 48, 63):
        with pytest.raises(ValueError, match=f"index_head_dim = {width} .* power of two"):
            replace(sparse, index_head_dim=width, index_hadamard=True)
    replace(ModelArgs(), index_head_dim=8)  # no indexer: the width is not read


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        ModelArgs().dim = 3


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError) as caught:
        ModelArgs.preset("tinny")
    message = str(caught.value)
    assert "'tinny'" in message and "did you mean 'tiny'?" in message and "\n" not in message
    assert all(name in message for name in ModelArgs.presets())
    with pytest.raises(ValueError, match="preset 'qwertyuiop' is unknown: valid are"):
        ModelArgs.preset("qwertyuiop")
