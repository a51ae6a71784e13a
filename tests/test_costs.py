"""The counts against published integers, against the built model, and against a FLOP counter."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minids import ModelArgs, Transformer
from minids.costs import (
    cache_bytes_per_token,
    count_parameters,
    flops_per_token,
    format_table,
    forward_flops_per_token,
    main,
)
from minids.mla import LatentCache

# Total, active with embedding and head, active without the embedding: gate biases are counted.
RELEASED = {
    "v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "moonlight": (15_960_110_208, 2_914_776_192, 2_579_231_872),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
}
# Small shapes that switch each choice on and off.
NANO = ModelArgs.preset("nano")
SHAPES = {
    "query latent": replace(NANO, q_lora_rank=24),
    "no gate bias": replace(NANO, gate_bias=False),
    "no shared expert": replace(NANO, n_shared_experts=0),
    "two shared experts": replace(NANO, n_shared_experts=2),
    "no dense layer": replace(NANO, n_dense_layers=0),
    "dense only": replace(NANO, n_routed_experts=0),
    "two MTP modules": replace(NANO, n_mtp_layers=2),
    "no MTP module": replace(NANO, n_mtp_layers=0),
    "uneven heads": replace(NANO, n_heads=3, v_head_dim=20, qk_rope_head_dim=12),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_exact_sizes(name):
    count = count_parameters(ModelArgs.preset(name))
    assert (count.total, count.active, count.active_without_embedding) == RELEASED[name]


def test_v3_in_detail():
    count = count_parameters(ModelArgs.preset("v3"))
    assert count.active_without_both == 35_698_939_392
    assert count.mtp == 11_610_068_224
    assert count.mtp_stored == 13_463_426_304
    assert count.total + count.mtp_stored == 684_489_845_504
    two = count_parameters(replace(ModelArgs.preset("v3"), n_mtp_layers=2))
    assert (two.mtp, two.mtp_stored) == (2 * count.mtp, 2 * count.mtp_stored)
    assert count.parts["attention"] == 61 * 187_107_328
    assert count.parts["dense_ffn"] == 3 * 396_361_728
    assert count.parts["routed_experts"] == 58 * 256 * 44_040_192
    assert count.parts["shared_experts"] == 58 * 44_040_192
    assert count.parts["gate"] == 58 * (1_835_008 + 256)
    assert count.parts["embedding"] == count.parts["head"] == 926_679_040


def part_of(name: str) -> str:
    """The part that a tensor of the built model belongs to."""
    if name.startswith(("embed.", "head.")):
        return {"embed": "embedding", "head": "head"}[name.split(".")[0]]
    for word, part in [(".attn.", "attention"), (".experts.", "routed_experts"),
                       (".shared_experts.", "shared_experts"), (".gate.", "gate"),
                       (".ffn.", "dense_ffn"), ("norm.", "norms")]:
        if word in name:
            return part
    raise AssertionError(f"{name} belongs to no part")


def differences(count, args) -> list[str]:
    """Names of the figures of `count` that differ from the model built on the meta device."""
    with torch.device("meta"):
        tensors = Transformer(args).state_dict()
    built = dict.fromkeys(count.parts, 0)
    for name, tensor in tensors.items():
        if not name.startswith("mtp."):
            built[part_of(name)] += tensor.numel()
    share = args.n_activated_experts / args.n_routed_experts if args.has_moe else 0
    active = built | {"routed_experts": built["routed_experts"] * share}
    mtp = sum(t.numel() for name, t in tensors.items() if name.startswith("mtp."))
    return ([part for part in built if built[part] != count.parts[part]]
            + ["active " + part for part in active if active[part] != count.active_parts[part]]
            + ["mtp"] * (mtp != count.mtp)
            + ["total"] * (sum(built.values()) != count.total))


@pytest.mark.parametrize("name", ModelArgs.presets())
def test_formula_equals_the_built_model(name):
    args = ModelArgs.preset(name)
    assert differences(count_parameters(args), args) == []


@pytest.mark.parametrize("name", SHAPES)
def test_formula_equals_the_built_model_of_other_shapes(name):
    assert differences(count_parameters(SHAPES[name]), SHAPES[name]) == []


def test_wrong_counts_are_told_from_the_built_model():
    args = SHAPES["query latent"]
    right = count_parameters(args)
    without_bias = right.parts["gate"] - args.n_routed_experts
    wrong = {
        "gate": replace(right, parts=right.parts | {"gate": without_bias}),
        "attention": count_parameters(replace(args, q_lora_rank=0)),
        "active routed_experts": replace(right, active_parts=right.parts),
        "mtp": replace(right, mtp=right.mtp_stored),
        "routed_experts": count_parameters(replace(args, n_routed_experts=8)),
    }
    for figure, count in wrong.items():
        assert figure in differences(count, args)


def test_one_token_meets_all_only_if_it_visits_every_expert():
    count = count_parameters(replace(NANO, n_activated_experts=NANO.n_routed_experts))
    assert count.active_parts == count.parts
    assert count_parameters(NANO).active < count_parameters(NANO).total


@pytest.mark.parametrize("name, causal, gigaflops", [
    ("v3", True, 250.46), ("v2", True, 155.3), ("v3", False, 281.2)])
def test_training_flops_of_the_papers(name, causal, gigaflops):
    flops = flops_per_token(ModelArgs.preset(name), 4096, causal)
    digits = len(str(gigaflops).split(".")[1])  # as many as the source prints
    assert round(flops / 1e9, digits) == gigaflops


def test_forward_flops_equal_those_that_torch_counts():
    """On a dense model: values as wide as keys, because the attention pads them to that."""
    args = replace(NANO, n_routed_experts=0, n_mtp_layers=0, v_head_dim=NANO.qk_head_dim)
    tokens = torch.zeros(2, 48, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    # The counter knows plain products; fused attention on a CPU would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        Transformer(args)(tokens)
    counted = counter.get_total_flops() / tokens.numel()
    parts = count_parameters(args).parts
    norms = parts["norms"] + args.n_layers * args.kv_lora_rank  # weights, but no products
    full = forward_flops_per_token(args, 48, causal=False)
    assert counted == full - 2 * norms
    assert counted != forward_flops_per_token(args, 48, causal=True) - 2 * norms  # wrong variant


def test_training_is_three_forward_passes():
    assert flops_per_token(NANO, 100) == 3 * forward_flops_per_token(NANO, 100)


def test_causal_attention_sees_half_the_keys_and_one_more():
    """Mean over queries of the keys up to each: (T + 1) / 2, not T / 2."""
    attention = 2 * NANO.n_layers * NANO.n_heads * (NANO.qk_head_dim + NANO.v_head_dim)
    weights = 2 * count_parameters(NANO).active_without_embedding
    seen = sum(range(1, 8)) / 7
    assert forward_flops_per_token(NANO, 7) == weights + attention * seen
    assert forward_flops_per_token(NANO, 7) != weights + attention * 7 / 2


def test_cache_of_the_papers():
    cache = cache_bytes_per_token(ModelArgs.preset("v3"))
    assert cache == {"mla": 70_272, "mha": 3_997_696}
    assert round(cache["mha"] / cache["mla"], 2) == 56.89
    assert cache_bytes_per_token(ModelArgs.preset("v2"), 1)["mla"] == 34_560
    assert cache_bytes_per_token(ModelArgs.preset("v2-lite"), 1)["mla"] == 15_552


def test_cache_equals_the_one_that_decoding_allocates():
    cache = LatentCache(NANO, batch=1, max_len=1)
    allocated = cache.latents.numel() * cache.latents.element_size()
    assert allocated == cache_bytes_per_token(NANO, bytes_per_element=4)["mla"]
    assert allocated != cache_bytes_per_token(replace(NANO, n_layers=3), 4)["mla"]


def test_table_is_aligned_and_exact(capsys):
    main(["--preset", "v3"])
    text = capsys.readouterr().out
    for number in ("671,026,419,200", "37,552,297,472", "13,463,426,304", "684,489,845,504",
                   "70,272", "56.89", "at 4,096 tokens"):
        assert number in text
    table = format_table([("a", "total", "active"), ("long label", 1234567, ""), ("b", 1, 22)])
    assert table.splitlines() == ["a               total  active",
                                  "long label  1,234,567",
                                  "b                   1      22"]


def test_table_of_a_changed_preset(capsys):
    main(["--preset", "v3", "--n-layers", "62"])
    text = capsys.readouterr().out
    assert "v3, n_layers = 62" in text
    assert f"{671_026_419_200 + 11_507_286_272:,}" in text


@pytest.mark.parametrize("argv, complaint", [
    (["--preset", "v33"], "did you mean 'v3'?"),
    (["--seq-len", "-1"], "seq_len = -1 is not valid: it must be 0 or more"),
    (["--n-layers", "2"], "n_dense_layers = 3 is not valid"),
])
def test_bad_settings_are_named(argv, complaint):
    with pytest.raises(ValueError, match="n_dense_layers|v33|seq_len") as error:
        main(argv)
    assert complaint in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_program_needs_neither_torch_nor_memory_nor_time():
    """Two gigabytes of address space and five seconds for the largest model."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); "
            "import minids.costs; minids.costs.main(['--preset', 'kimi-k2']); "
            "sys.exit('torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5)
    assert run.returncode == 0, run.stderr
    assert "1,026,408,232,448" in run.stdout
