"""Parameter counts against published integers and the built model."""

from dataclasses import replace

import pytest
import torch
from cost_shapes import NANO, SHAPES, V3, V32

from minids import ModelArgs, Transformer
from minids.costs import parameters
from minids.costs.parameters import (
    block_matrices,
    block_parts,
    count_parameters,
    scale_blocks,
    stored_elements,
)

# Total, active with embedding and head, active without the embedding: gate biases are counted.
RELEASED = {
    "v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "v3.2": (671_877_944_064, 38_403_822_336, 37_477_143_296),
    "moonlight": (15_960_110_208, 2_914_776_192, 2_579_231_872),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_exact_sizes(name):
    count = count_parameters(ModelArgs.preset(name))
    assert (count.total, count.active, count.active_without_embedding) == RELEASED[name]


def test_v3_in_detail():
    count = count_parameters(V3)
    assert count.active_without_embedding - count.active_parts["head"] == 35_698_939_392
    assert count.mtp == 11_610_068_224
    assert count.mtp_stored == 13_463_426_304
    assert count.total + count.mtp_stored == 684_489_845_504
    two = count_parameters(replace(V3, n_mtp_layers=2))
    assert (two.mtp, two.mtp_stored) == (2 * count.mtp, 2 * count.mtp_stored)
    assert count.parts["attention"] == 61 * 187_107_328
    assert count.parts["dense_ffn"] == 3 * 396_361_728
    assert count.parts["routed_experts"] == 58 * 256 * 44_040_192
    assert count.parts["shared_experts"] == 58 * 44_040_192
    assert count.parts["gate"] == 58 * (1_835_008 + 256)
    assert count.parts["embedding"] == count.parts["head"] == 926_679_040
    assert count.parts["indexer"] == 0
    layer = [sum(block_parts(V3, i, n).values()) for i, n in [(0, 256), (3, 256), (3, 8)]]
    assert layer == [583_483_392, 11_507_286_272, 585_318_656]


# Attention of a layer with its indexer, a MoE layer, an expert.
LAYERS = {
    "v2-lite": (13_763_072, 584_847_872, 8_650_752),
    "v2": (149_227_520, 3_972_116_480, 23_592_960),
    "v3": (187_107_328, 11_507_286_272, 44_040_192),
    "v3.2": (201_066_752, 11_521_245_696, 44_040_192),
    "moonlight": (13_763_072, 584_847_936, 8_650_752),
    "kimi-k2": (101_124_096, 17_059_365_248, 44_040_192),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_released_models(name):
    args = ModelArgs.preset(name)
    parts = block_parts(args, args.n_dense_layers, args.n_routed_experts)
    found = (parts["attention"] + parts["indexer"], sum(parts.values()),
             parts["routed_experts"] // args.n_routed_experts)
    assert found == LAYERS[name]


def test_v32_has_an_indexer_in_every_layer_and_in_its_mtp_module():
    count = count_parameters(V32)
    assert count.parts["indexer"] == 61 * 13_959_424
    assert count.parts | {"indexer": 0} == count_parameters(V3).parts
    assert count.mtp - count_parameters(V3).mtp == 13_959_424
    assert count.total + count.mtp_stored == 685_355_329_792
    assert count.total + count.mtp != 685_355_329_792  # wrong variant: no copies


def part_of(name: str) -> str:
    """Return the part that a tensor of the built model belongs to."""
    if name.startswith(("embed.", "head.")):
        return {"embed": "embedding", "head": "head"}[name.split(".")[0]]
    for word, part in [(".indexer.", "indexer"), (".attn.", "attention"),
                       (".experts.", "routed_experts"), (".shared_experts.", "shared_experts"),
                       (".gate.", "gate"), (".ffn.", "dense_ffn"), ("norm.", "norms")]:
        if word in name:
            return part
    raise AssertionError(f"{name} belongs to no part")


def differences(count, args) -> list[str]:
    """Return the names of the counts that differ from the model built on the meta device."""
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
        "indexer": count_parameters(SHAPES["indexer"]),
    }
    for figure, count in wrong.items():
        assert figure in differences(count, args)


def test_one_token_meets_all_only_if_it_visits_every_expert():
    count = count_parameters(replace(NANO, n_activated_experts=NANO.n_routed_experts))
    assert count.active_parts == count.parts
    assert count_parameters(NANO).active < count_parameters(NANO).total


def hub_of(args) -> tuple:
    """Return elements by dtype, scales and total of the released FP8 checkpoint."""
    elements, scales = stored_elements(args)
    return *elements.values(), scales, sum(elements.values())


V3_HUB = 680_571_043_840, 3_918_786_560, 41_555_600, 41_540_496, 684_531_386_000


def test_released_checkpoint_of_v3(monkeypatch):
    assert hub_of(V3) == V3_HUB
    assert list(stored_elements(V3)[0]) == ["F8_E4M3", "BF16", "F32"]
    dense, moe = (block_matrices(V3, layer) for layer in (0, 3))
    assert [sum(scale_blocks(*shape) for shape in shapes.values()) for shapes in (
        dense["attention"], dense["dense_ffn"], moe["routed_experts"])] == [11_448, 24_192, 2_688]
    monkeypatch.setattr(parameters, "scale_blocks", lambda r, c: r // 128 * (c // 128))  # floor
    assert hub_of(V3) != V3_HUB


def test_released_checkpoint_of_v32(monkeypatch):
    *_, scales, total = hub_of(V32)
    assert (scales, total) == (41_540_496 + 62 * 824, 685_396_921_376)
    no_copies = replace(count_parameters(V32), mtp_stored=count_parameters(V32).mtp)
    monkeypatch.setattr(parameters, "count_parameters", lambda args: no_copies)  # wrong variant
    assert hub_of(V32)[-1] == 685_396_921_376 - 1_853_358_080


def stored_by_the_built_model(args) -> tuple:
    """Count FP8 elements, scales and gate biases from the names and shapes of its tensors."""
    with torch.device("meta"):
        tensors = Transformer(args).state_dict()
    fp8 = scales = biases = 0
    for name, tensor in tensors.items():
        if name.endswith("gate.bias"):
            biases += tensor.numel()
        elif tensor.ndim > 1 and not any(word in name for word in (
                "embed.", "head.", "gate.", "eh_proj", "weights_proj")):
            *copies, rows, columns = tensor.shape
            fp8 += tensor.numel()
            scales += sum(copies or [1]) * len(range(0, rows, 128)) * len(range(0, columns, 128))
    return fp8, scales, biases


@pytest.mark.parametrize("name", [*SHAPES, "tiny", "small", "v2-lite", "v3.2"])
def test_stored_elements_equal_those_of_the_built_model(name):
    args = SHAPES.get(name) or ModelArgs.preset(name)
    elements, counted = stored_elements(args)
    fp8, scales, biases = stored_by_the_built_model(args)
    assert (elements["F8_E4M3"], counted) == (fp8, scales)
    assert elements["F32"] == scales + biases
