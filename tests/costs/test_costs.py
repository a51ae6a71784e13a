"""Costs against published integers, the built model, a FLOP counter and the tensors of a step."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minids import ModelArgs, Transformer, costs
from minids.base.tables import format_table
from minids.costs import (
    SERVING_128K,
    Bill,
    Prices,
    Rental,
    Sharding,
    api_price,
    attention_flops,
    cache_bytes_per_token,
    choose_sharding,
    count_parameters,
    flops_per_token,
    forward_flops_per_token,
    fp8_cache_bytes_per_layer,
    layouts,
    main,
    mean_keys,
    pair_flops,
    pipeline_pieces,
    plan,
    rank_memory,
    stages_of,
    stored_elements,
    teraflops,
    training_bill,
    training_memory,
)
from minids.model.mla import LatentCache
from minids.runs.optimizers import build_optimizers
from minids.runs.settings import TrainArgs

# Total, active with embedding and head, active without the embedding: gate biases are counted.
RELEASED = {
    "v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "v3.2": (671_877_944_064, 38_403_822_336, 37_477_143_296),
    "moonlight": (15_960_110_208, 2_914_776_192, 2_579_231_872),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
}
# Small shapes that switch each choice on and off.
NANO, TINY = ModelArgs.preset("nano"), ModelArgs.preset("tiny")
V2, V3, V32 = map(ModelArgs.preset, ("v2", "v3", "v3.2"))
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
    "indexer": replace(NANO, index_n_heads=3, index_head_dim=24, index_topk=16, q_lora_rank=24),
    "indexer without query latent": replace(NANO, index_n_heads=3, index_head_dim=24),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_exact_sizes(name):
    count = count_parameters(ModelArgs.preset(name))
    assert (count.total, count.active, count.active_without_embedding) == RELEASED[name]


def test_v3_in_detail():
    count = count_parameters(V3)
    assert count.active_without_both == 35_698_939_392
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
    layer = [sum(costs.block_parts(V3, i, n).values()) for i, n in [(0, 256), (3, 256), (3, 8)]]
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
    parts = costs.block_parts(args, args.n_dense_layers, args.n_routed_experts)
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
    """The part that a tensor of the built model belongs to."""
    if name.startswith(("embed.", "head.")):
        return {"embed": "embedding", "head": "head"}[name.split(".")[0]]
    for word, part in [(".indexer.", "indexer"), (".attn.", "attention"),
                       (".experts.", "routed_experts"), (".shared_experts.", "shared_experts"),
                       (".gate.", "gate"), (".ffn.", "dense_ffn"), ("norm.", "norms")]:
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
        "indexer": count_parameters(SHAPES["indexer"]),
    }
    for figure, count in wrong.items():
        assert figure in differences(count, args)


def test_one_token_meets_all_only_if_it_visits_every_expert():
    count = count_parameters(replace(NANO, n_activated_experts=NANO.n_routed_experts))
    assert count.active_parts == count.parts
    assert count_parameters(NANO).active < count_parameters(NANO).total


def hub_of(args) -> tuple:
    """Numbers by dtype, scales and total of the released FP8 checkpoint."""
    stored = stored_elements(args)
    return *stored.elements.values(), stored.scales, stored.total


V3_HUB = 680_571_043_840, 3_918_786_560, 41_555_600, 41_540_496, 684_531_386_000


def test_released_checkpoint_of_v3(monkeypatch):
    assert hub_of(V3) == V3_HUB
    assert list(stored_elements(V3).elements) == ["F8_E4M3", "BF16", "F32"]
    assert stored_elements(V3).bytes == 680_571_043_840 + 2 * 3_918_786_560 + 4 * 41_555_600
    layer = [shape for i in (0, 3) for shape in costs.fp8_matrices(V3, i)]
    assert [sum(costs.scale_blocks(*shape) for shape in shapes) for shapes in (
        layer[:5], layer[5:8], layer[-3:])] == [11_448, 24_192, 2_688]
    monkeypatch.setattr(costs, "scale_blocks", lambda r, c: r // 128 * (c // 128))  # floor
    assert hub_of(V3) != V3_HUB


def test_released_checkpoint_of_v32(monkeypatch):
    assert stored_elements(V32).total == 685_396_921_376
    assert stored_elements(V32).scales == 41_540_496 + 62 * 824
    no_copies = replace(count_parameters(V32), mtp_stored=count_parameters(V32).mtp)
    monkeypatch.setattr(costs, "count_parameters", lambda args: no_copies)  # wrong variant
    assert stored_elements(V32).total == 685_396_921_376 - 1_853_358_080


def stored_by_the_built_model(args) -> tuple:
    """FP8 numbers, scales and gate biases, from the names and shapes of its tensors."""
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
    stored = stored_elements(args)
    fp8, scales, biases = stored_by_the_built_model(args)
    assert (stored.elements["F8_E4M3"], stored.scales) == (fp8, scales)
    assert stored.elements["F32"] == scales + biases


PAPER_FLOPS = [("v3", True, 250.46), ("v2", True, 155.3), ("v3", False, 281.2)]


def prints(gigaflops: float, flops: float) -> bool:
    """Whether FLOPs agree with a figure in as many digits as its source prints."""
    return round(flops / 1e9, len(str(gigaflops).split(".")[1])) == gigaflops


@pytest.mark.parametrize("name, causal, gigaflops", PAPER_FLOPS)
def test_training_flops_of_the_papers(name, causal, gigaflops):
    args = ModelArgs.preset(name)
    assert prints(gigaflops, flops_per_token(args, 4096, causal))
    assert not prints(gigaflops, flops_per_token(args, 4096, not causal))
    embedding = 6 * count_parameters(args).parts["embedding"]
    assert not prints(gigaflops, flops_per_token(args, 4096, causal) + embedding)


def test_training_flops_exactly():
    weights = 6 * 36_625_618_432
    assert flops_per_token(V3, 4096) == weights + 3 * 81_920 * 61 * 4097 / 2 == 250_463_511_552
    assert flops_per_token(V3, 4096, causal=False) == weights + 3 * 81_920 * 61 * 4096


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


@pytest.mark.parametrize("seq_len", [1, 5, 16, 17, 100])
def test_mean_keys_under_a_limit(seq_len):
    counted = sum(min(16, t) for t in range(1, seq_len + 1)) / seq_len
    assert mean_keys(seq_len, True, 16) == pytest.approx(counted, rel=1e-14)  # two roundings
    assert mean_keys(seq_len, False, 16) == min(16, seq_len)
    limited_mean = min(16, (seq_len + 1) / 2)  # wrong variant: the limit after the mean
    assert (limited_mean == pytest.approx(counted)) == (seq_len <= 16)


def test_sparse_attention_costs_what_the_paper_says():
    assert pair_flops(V32) == {"mha": 81_920, "mqa": 278_528, "indexer": 16_384}
    assert pair_flops(V3)["indexer"] == 0
    assert attention_flops(V3, 1000) == {"mha": 61 * 81_920_000, "mqa": 61 * 278_528_000}
    short, long, longer = (attention_flops(V32, 2 ** n)["dsa"] for n in (11, 16, 17))
    assert short == attention_flops(V32, 2048)["mqa"] + 61 * 2048 * 16_384
    assert longer - long == 61 * 2 ** 16 * 16_384  # the indexer alone grows
    assert attention_flops(V32, 2 ** 17)["mqa"] / longer > 13


def test_v32_is_v3_and_an_indexer_until_there_are_more_than_k_keys():
    def extra(seq_len: int) -> float:
        return forward_flops_per_token(V32, seq_len) - forward_flops_per_token(V3, seq_len)
    indexer = 2 * 61 * 13_959_424
    assert extra(2048) == indexer + 61 * 16_384 * 2049 / 2
    assert extra(2049) == pytest.approx(indexer + 61 * (16_384 * 1025 - 81_920 / 2049), rel=1e-12)
    assert extra(131_072) < 0


def decoding_flops(args, context: int) -> int:
    """FLOPs that torch counts in one decoding step, the token being the `context`-th."""
    model, cache = Transformer(args), LatentCache(args, batch=1, max_len=context)
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        model(torch.zeros(1, context - 1, dtype=torch.int64), cache, absorbed=True)
        with counter:
            model(torch.zeros(1, 1, dtype=torch.int64), cache, absorbed=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["query latent", "indexer"])
def test_attention_flops_grow_as_those_that_torch_counts(name):
    args = replace(SHAPES[name], kv_lora_rank=20)
    form = "dsa" if args.has_indexer else "mqa"
    counted = decoding_flops(args, 96) - decoding_flops(args, 32)
    expected = attention_flops(args, 96)[form] - attention_flops(args, 32)[form]
    # The sum over the indexer's heads, two operations each, is not in the paper's count.
    expected += 64 * args.n_layers * 2 * args.index_n_heads
    assert counted == expected
    naive = attention_flops(args, 96)["mha"] - attention_flops(args, 32)["mha"]
    assert counted != naive  # wrong variant: the other form


def cache_is_that_of_the_papers(cache_of) -> bool:
    """V3's bytes, and the elements of V2 and V2-Lite, from `cache_of(args, bytes_per_element)`."""
    cache = cache_of(V3, 2)
    return (cache["mla"], cache["mha"]) == (70_272, 3_997_696) and [
        cache_of(ModelArgs.preset(name), 1)["mla"] for name in ("v2", "v2-lite")
    ] == [34_560, 15_552]


def test_cache_of_the_papers():
    assert cache_is_that_of_the_papers(cache_bytes_per_token)
    cache = cache_bytes_per_token(V3)
    assert cache == {"mla": 70_272, "mha": 3_997_696, "gqa": 249_856, "mqa": 31_232}
    assert f"{cache['mha'] / cache['mla']:.2f}" == "56.89"
    assert cache["mla"] == 2.25 * cache["mqa"]  # GQA with 2.25 groups (V2 table 1)
    assert cache_bytes_per_token(ModelArgs.preset("v2-lite"), 1)["mha"] == 110_592

    def a_rotated_key_for_each_head(args, width):  # wrong variant
        extra = (args.n_heads - 1) * args.qk_rope_head_dim * args.n_layers * width
        cache = cache_bytes_per_token(args, width)
        return cache | {"mla": cache["mla"] + extra}

    def all_dimensions_for_each_head(args, width):  # wrong variant: keys of 192
        return cache_bytes_per_token(replace(args, qk_nope_head_dim=args.qk_head_dim), width)
    assert not cache_is_that_of_the_papers(a_rotated_key_for_each_head)
    assert not cache_is_that_of_the_papers(all_dimensions_for_each_head)


@pytest.mark.parametrize("layers, heads, size", [(80, 64, 327_680), (126, 128, 516_096)])
def test_grouped_cache_of_other_models(layers, heads, size):
    """Qwen2.5-72B and Llama-3.1-405B: eight groups with heads of 128."""
    args = replace(V3, n_layers=layers, n_heads=heads)
    assert cache_bytes_per_token(args, n_groups=8)["gqa"] == size
    assert cache_bytes_per_token(args, n_groups=heads)["gqa"] == cache_bytes_per_token(args)["mha"]
    assert cache_bytes_per_token(args, n_groups=1)["gqa"] == cache_bytes_per_token(args)["mqa"]
    assert cache_bytes_per_token(args, n_groups=4)["gqa"] != size
    assert cache_bytes_per_token(NANO)["gqa"] == cache_bytes_per_token(NANO)["mha"]  # two heads


def test_caches_of_sparse_attention_and_of_deployment():
    cache = cache_bytes_per_token(V32)
    assert {form: n for form, n in cache.items() if form != "indexer"} == cache_bytes_per_token(V3)
    assert cache["indexer"] == 61 * 128 * 2
    assert fp8_cache_bytes_per_layer(V3) == {"mla": 656}
    assert fp8_cache_bytes_per_layer(V32) == {"mla": 656, "indexer": 132}
    assert fp8_cache_bytes_per_layer(SHAPES["indexer"]) == {"mla": 16 + 4 + 16, "indexer": 24 + 4}


def test_cache_needs_a_group():
    with pytest.raises(ValueError, match="n_groups = 0 is not valid: it must be at least 1"):
        cache_bytes_per_token(V3, n_groups=0)


def test_cache_equals_the_one_that_decoding_allocates():
    cache = LatentCache(NANO, batch=1, max_len=1)
    allocated = cache.latents.numel() * cache.latents.element_size()
    assert allocated == cache_bytes_per_token(NANO, bytes_per_element=4)["mla"]
    assert allocated != cache_bytes_per_token(replace(NANO, n_layers=3), 4)["mla"]
    cache = LatentCache(SHAPES["indexer"], batch=1, max_len=1)
    allocated = cache.index_keys.numel() * cache.index_keys.element_size()
    assert allocated == cache_bytes_per_token(SHAPES["indexer"], 4)["indexer"]


# One GPU that holds everything in FP32, as training on one machine does.
ALONE = Sharding(gpus=1, pipeline=1, dualpipe=False, expert_parallel=1, zero=0, weight_bytes=4,
                 grad_bytes=4, master_bytes=0, moment_bytes=4, activation_bytes=4,
                 recompute="none")


def tensors_after_a_step(args) -> tuple:
    """Bytes of weights, gradients and AdamW's moments after one real optimizer step."""
    model = Transformer(args)
    (optimizer,) = build_optimizers(model, TrainArgs(optimizer="adamw"), torch.float32)
    tokens = torch.randint(args.vocab_size, (2, 9))
    model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    optimizer.step()
    weights = list(model.parameters())
    moments = [state[name] for state in optimizer.state.values()
               for name in ("exp_avg", "exp_avg_sq")]
    return tuple(sum(t.nbytes for t in tensors)
                 for tensors in (weights, [w.grad for w in weights], moments))


@pytest.mark.parametrize("name", ["query latent", "dense only", "two MTP modules", "no MTP module"])
def test_training_state_equals_the_tensors_of_a_real_step(name):
    def predicted(args, sharding):
        memory = training_memory(args, sharding)
        return memory.weights, memory.gradients, memory.optimizer
    args = SHAPES[name]
    real = tensors_after_a_step(args)
    assert predicted(args, ALONE) == real
    assert predicted(args, replace(ALONE, master_bytes=4)) != real  # wrong variants
    assert predicted(replace(args, n_mtp_layers=3), ALONE) != real
    count = count_parameters(args)
    assert 4 * (count.total + count.mtp) - real[0] == 4 * sum(
        args.n_routed_experts * args.is_moe_layer(i)
        for i in range(args.n_layers + args.n_mtp_layers))  # the gate's biases are not trained


def bytes_kept(args, batch: int, length: int) -> int:
    """Bytes that the blocks' forward pass keeps for its backward pass, the weights aside."""
    model, kept, alive = Transformer(args), {}, []
    weights = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def pack(tensor):
        alive.append(tensor)  # or its place would be given to another
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.zeros(batch, length, dtype=torch.int64))
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("changes", [
    {}, dict(q_lora_rank=96, n_activated_experts=4), dict(n_routed_experts=0)], ids=str)
def test_activations_are_nearly_those_that_autograd_keeps(changes):
    """The formula leaves out small things (the final norm, rotations, the places that pad an
    expert's rows, values padded to the keys' width): measured, autograd keeps 8 to 15 % more."""
    args = replace(TINY, n_mtp_layers=0, **changes)
    measured = bytes_kept(args, 2, 600)  # longer than 512: no attention scores are kept

    def ratio(args, **settings):
        return measured / training_memory(
            args, replace(ALONE, micro_batch_tokens=1200, **settings)).activations
    assert 1 < ratio(args) < 1.2
    assert not 1 < ratio(args, recompute="v3") < 1.2  # wrong variants
    assert not 1 < ratio(args, activation_bytes=2) < 1.2
    assert not 1 < ratio(replace(args, n_layers=3)) < 1.2


def test_recomputing_keeps_less():
    kept = [training_memory(V3, replace(Sharding(), recompute=how)).activations
            for how in ("none", "v3", "block")]
    assert kept[0] > 3 * kept[1] > 3 * kept[2]
    assert costs.kept_bytes(V3, 0, Sharding(), "block") == 2 * 7168
    attention = 2 * (2 * 7168 + 1536 + 576 + 16_384)
    assert costs.kept_bytes(V3, 0, Sharding(), "v3") == attention + 2 * 18_432
    moe = 2 * 256 + 2 * 9 * 2048 + 8 * 7168  # the gate's scores, SwiGLU's inputs, the experts'
    assert costs.kept_bytes(V3, 3, Sharding(), "v3") == attention + moe


@pytest.mark.parametrize("sharding", [
    Sharding(dualpipe=False), Sharding(), Sharding(zero=3), Sharding(zero=2, pipeline=4)], ids=str)
def test_nothing_is_lost_between_the_ranks(sharding):
    """What the ranks hold adds up to the model, and the optimizer's shares to one state of it."""
    pieces = pipeline_pieces(V3)
    stages = [stage for rank in range(sharding.pipeline)
              for stage in stages_of(V3, sharding, rank)]
    times = 2 if sharding.dualpipe else 1
    assert sorted(p for stage in stages for p in stage) == sorted(pieces * times)
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    ranks = [rank_memory(V3, sharding, rank) for rank in range(sharding.pipeline)]
    copies = 0 if sharding.dualpipe else 926_679_040  # the MTP module's embedding
    trained = 671_026_404_352 + 11_610_068_224 - 256 + copies
    own = sum(piece.own for piece in pieces)
    experts = sum(piece.experts for piece in pieces)
    assert own + experts + copies == trained
    held = times * (own + experts // sharding.expert_parallel) + copies
    assert sum(rank.parameters for rank in ranks) == held
    optimizer = sum(rank.optimizer for rank in ranks) * sharding.gpus // sharding.pipeline
    # Each rank rounds its share up, by less than one number of 8 bytes, of each of two kinds.
    assert 0 <= optimizer - 8 * trained < 16 * sharding.gpus
    if sharding.zero == 1:
        whole = sum(rank.gradients for rank in ranks)
        assert whole == 4 * held


def test_v3_trains_on_gpus_of_80_gb():
    memory = training_memory(V3, Sharding())
    assert (memory.rank, memory.parameters) == (1, 3_273_261_056)
    assert memory.holds == "layer 3 to layer 6 and layer 55 to layer 58"
    own = 8 * (187_107_328 + 14_336 + 44_040_192 + 1_835_008)
    experts = 8 * 4 * 44_040_192
    assert memory.parameters == own + experts
    assert (memory.weights, memory.gradients) == (2 * memory.parameters, 4 * memory.parameters)
    assert memory.optimizer == 8 * (-(-own // 256) + experts // 4)
    per_token = 8 * costs.kept_bytes(V3, 3, Sharding(), "v3")
    assert memory.activations == 4096 * per_token * 17 // 2
    assert memory.total == 67_187_822_592 < 80e9
    assert memory.total == max(rank_memory(V3, Sharding(), rank).total for rank in range(16))
    without = replace(Sharding(), recompute="none", expert_input_bytes=2)
    assert training_memory(V3, without).total > 80e9
    assert training_memory(V3, replace(Sharding(), zero=0)).total > memory.total


def test_micro_batches_in_flight():
    """1F1B keeps as many as there are ranks from here on, DualPipe one more than the ranks."""
    kept = costs.kept_bytes(V3, 3, Sharding(), "v3") * 4096
    for rank in (3, 11):
        one_way = rank_memory(V3, Sharding(dualpipe=False), rank)
        assert one_way.activations == 4 * kept * (16 - rank)  # four layers in a stage
        assert rank_memory(V3, Sharding(), rank).activations == 8 * kept * 17 // 2


def test_a_block_that_is_computed_again_and_weights_that_are_gathered_take_room():
    settings = replace(Sharding(), dualpipe=False, recompute="block")
    memory, block = rank_memory(V3, settings, 3), costs.kept_bytes(V3, 3, settings, "none")
    assert memory.activations == 4096 * (4 * 13 * 2 * 7168 + block)
    gathered = rank_memory(V3, replace(settings, zero=3), 3)
    layer = 187_107_328 + 14_336 + 44_040_192 + 1_835_008, 4 * 44_040_192
    shares = -(-4 * layer[0] // 128) + 4 * layer[1] // 2
    assert gathered.weights == 2 * (shares + sum(layer))


def test_sharing_more_needs_less():
    fsdp = [training_memory(V3, Sharding(gpus=512, pipeline=1, dualpipe=False, zero=zero,
                                         expert_parallel=8)).total for zero in range(4)]
    assert sorted(fsdp, reverse=True) == fsdp and len(set(fsdp)) == 4
    alone = [training_memory(TINY, replace(ALONE, zero=zero)) for zero in (0, 1, 2)]
    assert alone[0] == alone[1] == alone[2]  # one replica has nobody to share with


@pytest.mark.parametrize("changes, complaint", [
    (dict(gpus=0), "gpus = 0 is not valid: it must be at least 1"),
    (dict(pipeline=3), "pipeline = 3 is not valid: it must be a divisor of 2048 GPUs"),
    (dict(expert_parallel=100), "must be a divisor of the 128 GPUs of a pipeline rank"),
    (dict(pipeline=1), "dualpipe = True is not valid: it must be false"),
    (dict(zero=4), "zero = 4 is not valid: it must be one of 0, 1, 2, 3"),
    (dict(moment_bytes=-1), "moment_bytes = -1 is not valid: it must be 0 or more"),
    (dict(pipeline=128, expert_parallel=1), "at most 64, for embedding, blocks and head"),
])
def test_impossible_shardings_are_refused(changes, complaint):
    with pytest.raises(ValueError) as error:
        training_memory(V3, replace(Sharding(), **changes))
    assert complaint in str(error.value)
    with pytest.raises(ValueError, match="divisor of n_routed_experts = 8"):
        training_memory(TINY, Sharding(gpus=16, pipeline=1, expert_parallel=16, dualpipe=False))


def test_bill_of_v3():
    bill = training_bill(flops_per_token(V3, 4096), 14.8e12, 2048, Rental())
    assert round(bill.gpu_hours) == 2_668_230
    assert bill.gpu_hours == pytest.approx(2_664_000, rel=0.002)  # the paper's, MFU in two digits
    assert bill.dollars == 2 * bill.gpu_hours and bill.days == bill.gpu_hours / 2048 / 24
    wrong = training_bill(flops_per_token(V3, 4096, causal=False), 14.8e12, 2048, Rental())
    assert wrong.gpu_hours != pytest.approx(2_664_000, rel=0.1)
    assert sum(costs.V3_GPU_HOURS.values()) == 2_788_000
    assert Bill(2_788_000, 2048, 2.0).dollars == 5_576_000
    per_trillion = Bill(2_664_000 / 14.8, 2048, 2.0)
    assert round(per_trillion.gpu_hours) == 180_000 and f"{per_trillion.days:.1f}" == "3.7"


def test_mfu_from_hours():
    assert f"{teraflops(250e9, 14.8e12, 2_664_000):.1f}" == "385.8"
    assert f"{teraflops(250e9, 14.8e12, 2_664_000) / 989.5:.1%}" == "39.0%"
    work, rental = flops_per_token(V3, 4096), Rental(mfu=0.25)
    hours = training_bill(work, 1e12, 64, rental).gpu_hours
    # A product undone by a division: a few roundings in FP64.
    assert teraflops(work, 1e12, hours) / rental.gpu_peak == pytest.approx(0.25, rel=1e-12)


def test_price_of_a_workload():
    prices = Prices(prompt_price=2.0, cached_price=0.5, output_price=8.0)
    # 1M tokens read anew, 3M from the cache, 0.5M written.
    assert api_price(4_000_000, 3_000_000, 500_000, prices) == 2 + 1.5 + 4
    assert api_price(4_000_000, 0, 500_000, prices) == 8 + 4
    both_paid = 4 * 2.0 + 3 * 0.5 + 0.5 * 8.0  # wrong variant: cached tokens paid twice
    assert api_price(4_000_000, 3_000_000, 500_000, prices) != both_paid
    dense, sparse = SERVING_128K.values()
    assert api_price(1_000_000, 1_000_000, 1_000_000, dense) == pytest.approx(0.66 + 2.15)
    assert api_price(1_000_000, 0, 1_000_000, sparse) == pytest.approx(0.19 + 0.25)


@pytest.mark.parametrize("tokens, complaint", [
    ((10, 11, 0), "cached_tokens = 11 is not valid: it must be between 0 and prompt_tokens = 10"),
    ((10, -1, 0), "cached_tokens = -1 is not valid"),
    ((10, 0, -1), "output_tokens = -1 is not valid: it must be 0 or more")])
def test_impossible_workloads_are_refused(tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        api_price(*tokens, Prices())


def test_plan_puts_memory_and_bill_together():
    run = plan(V3, 14.8e12, Rental(), Sharding())
    assert run.fits and run.memory == training_memory(V3, Sharding())
    assert round(run.bill.gpu_hours) == 2_668_230 and f"{run.bill.days:.1f}" == "54.3"
    tight = Rental(gpu_memory=run.memory.total / 1e9 - 1e-6)
    assert not plan(V3, 14.8e12, tight, Sharding()).fits
    longer = plan(V3, 14.8e12, Rental(), Sharding(), seq_len=32_768)
    assert longer.bill.gpu_hours > run.bill.gpu_hours


def test_layout_is_v3s_own_where_it_fits_and_else_the_first_that_does():
    rental = Rental()
    assert choose_sharding(V3, 2048, rental) == Sharding()
    assert choose_sharding(TINY, 1, rental) == Sharding(gpus=1, pipeline=1, expert_parallel=1,
                                                        dualpipe=False)
    large = Rental(gpu_memory=141.0)
    chosen = choose_sharding(V3, 512, large)
    assert plan(V3, 1e12, large, chosen).fits
    fewer = [s for s in layouts(V3, 512, {}) if s.pipeline < chosen.pipeline and s.zero == 1]
    assert fewer and not any(plan(V3, 1e12, large, s).fits for s in fewer)
    assert choose_sharding(V3, 512, large, pipeline=8).pipeline == 8


def test_layout_that_needs_least_where_none_fits():
    rental = Rental()
    chosen = choose_sharding(V3, 8, rental)
    needs = {training_memory(V3, s).total for s in layouts(V3, 8, {})}
    assert training_memory(V3, chosen).total == min(needs) > 80e9
    assert len(needs) > 1
    with pytest.raises(ValueError, match="pipeline = 3 is not valid: it must be a divisor of 8"):
        choose_sharding(V3, 8, rental, pipeline=3)


def printed(capsys, *argv: str) -> str:
    main(list(argv))
    return capsys.readouterr().out


# What the papers, the hub and the exact arithmetic say, as the program must print it.
FIGURES = {
    "v3": """671,026,419,200 37,552,297,472 36,625,618,432 35,698,939,392 11,610,068,224
        13,463,426,304 684,489,845,504 684,531,386,000 680,571,043,840 3,918,786,560 41,555,600
        41,540,496 250,463,511,552 250.46 81,920 278,528 70,272 3,997,696 56.89 656 2,048
        2,668,230 54.3 2,664,000 119,000 5,000 2,788,000 5,328,000 238,000 10,000 5,576,000
        180,000 3.7 385.8 39.0% 3,273,261,056""",
    "v3.2": """671,877,944,064 38,403,822,336 37,477,143,296 685,355,329,792 685,396,921,376
        851,524,864 16,384 70,272 15,616 656 132""",
    "v2": "235,741,434,880 21,375,800,320 20,851,512,320 69,120",
    "v2-lite": "15,706,484,224 2,661,150,208 2,451,435,008 31,104",
    "moonlight": "15,960,110,208 2,914,776,192 2,579,231,872",
    "kimi-k2": "1,026,408,232,448 32,861,500,928 31,687,095,808",
}


@pytest.mark.parametrize("name", FIGURES)
def test_published_figures_are_printed(name, capsys):
    words = printed(capsys, "--preset", name).replace(";", " ").split()
    assert [figure for figure in FIGURES[name].split() if figure not in words] == []


def test_long_request_is_printed_in_gib(capsys):
    assert 576 * 2 * 62 * 131_072 / 2 ** 30 == pytest.approx(8.72, abs=0.005)
    row, = (line for line in printed(capsys, "--preset", "v3").splitlines() if "62 layers" in line)
    assert row.split()[-3:] == ["1.02", "8.72", "GiB"]


def test_flags_change_the_plan(capsys):
    text = printed(capsys, "--preset", "v3.2", "--seq-len", "131072", "--gpus", "8", "--gpu", "X9",
                   "--gpu-memory", "141", "--gpu-price", "3.5", "--mfu", "0.3", "--tokens", "1e9")
    for words in ("FLOPs per token, 131,072 tokens", "8 X9: pipeline", "does not fit into",
                  "141 GB", "30.0% of 989.5 TFLOPS", "3.5 USD an hour", "1,000,000,000 tokens"):
        assert words in text
    assert "as published" not in text and "API workload" not in text


def test_workload_is_priced_at_given_prices_or_at_the_measured_cost(capsys):
    workload = ["--prompt-tokens", "1000000", "--cached-tokens", "500000", "--output-tokens", "10"]
    text = printed(capsys, "--preset", "v3.2", *workload)
    assert "DSA (V3.2-Exp), cost at position 128K" in text and "0.1900" in text
    text = printed(capsys, "--preset", "v3.2", *workload, "--prompt-price", "3")
    assert "at the given prices" in text and "1.5000" in text and "V3.2-Exp" not in text


@pytest.mark.parametrize("name", ModelArgs.presets())
def test_every_preset_has_a_table_that_fits_the_page(name, capsys):
    lines = printed(capsys, "--preset", name).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)
    assert any("  indexer" in line for line in lines) == ModelArgs.preset(name).has_indexer


def test_table_is_aligned_and_exact():
    table = format_table([("a", "total", "active"), ("long label", 1234567, ""), ("b", 1, 22)])
    assert table.splitlines() == ["a               total  active",
                                  "long label  1,234,567",
                                  "b                   1      22"]
    noted = format_table([("a", 1), "a line that is longer than the table", ("b", 2000)])
    assert noted.splitlines() == ["a      1", "a line that is longer than the table", "b  2,000"]


@pytest.mark.parametrize("amount, step, text", [
    (640, 1000, "640.00 B"), (70_272, 1000, "70.27 KB"), (9_361_686_528, 1024, "8.72 GiB"),
    (1, 1024, "1.00 B"), (2e21, 1000, "2000000.00 PB")])
def test_scaled_amounts(amount, step, text):
    assert costs.scaled(amount, "B", step) == text


def test_table_of_a_changed_preset(capsys):
    main(["--preset", "v3", "--n-layers", "62"])
    text = capsys.readouterr().out
    assert "v3, n_layers = 62" in text
    assert f"{671_026_419_200 + 11_507_286_272:,}" in text


@pytest.mark.parametrize("argv, complaint", [
    (["--preset", "v33"], "did you mean 'v3'?"),
    (["--seq-len", "-1"], "seq_len = -1 is not valid: it must be 0 or more"),
    (["--n-layers", "2"], "n_dense_layers = 3 is not valid"),
    (["--tokens", "0"], "tokens = 0.0 is not valid: it must be above 0"),
    (["--mfu", "39"], "mfu = 39.0 is not valid: it must be above 0 and at most 1"),
    (["--gpu-memory", "0"], "gpu_memory = 0.0 is not valid: it must be above 0"),
    (["--gpu-price", "-1"], "gpu_price = -1.0 is not valid: it must be 0 or more"),
    (["--output-price", "-1"], "output_price = -1.0 is not valid: it must be 0 or more"),
    (["--cached-tokens", "1"], "cached_tokens = 1 is not valid"),
    (["--gpus", "0"], "gpus = 0 is not valid: it must be at least 1"),
    (["--pipeline", "7"], "pipeline = 7 is not valid: it must be a divisor of 2048 GPUs"),
])
def test_bad_settings_are_named(argv, complaint, capsys):
    with pytest.raises(ValueError) as error:
        main(argv)
    assert complaint in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
@pytest.mark.parametrize("name, total", [
    ("v3", "671,026,419,200"), ("v3.2", "671,877,944,064"), ("kimi-k2", "1,026,408,232,448")])
def test_program_needs_neither_torch_nor_memory_nor_time(name, total):
    """Two gigabytes of address space and five seconds for the largest models."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); "
            f"import minids.costs; minids.costs.main(['--preset', '{name}']); "
            "sys.exit('torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5)
    assert run.returncode == 0, run.stderr
    assert total in run.stdout


def test_a_round_of_drafts_by_hand():
    args = ModelArgs.preset("v3")
    each = count_parameters(args)
    alone = costs.drafting(args, 0.85)
    assert alone.tokens == 1.85
    # One token reads what it activates, without the embedding; checking two of them, in each of 58
    # layers, 15.75 experts of 44,040,192 weights in place of 8.
    assert alone.plain == pytest.approx(each.active_without_embedding)
    assert alone.check - alone.plain == pytest.approx(58 * 7.75 * 44_040_192)
    # A module: a MoE layer with 15.75 experts, the join and two norms, and the head.
    layer = 187_107_328 + 14_336 + 1_835_264 + 16.75 * 44_040_192
    assert alone.draft == pytest.approx(layer + 102_760_448 + 3 * 7_168 + 926_679_040)
    assert alone.speedup == pytest.approx(1.85 * alone.plain / (alone.check + alone.draft))
    crowd = costs.drafting(args, 0.85, batch=256)  # nearly all experts are read anyway
    assert 1.15 < alone.speedup < 1.2 < 1.8 < crowd.speedup < 1.85  # the paper: 1.8
    two = costs.drafting(args, 0.5, drafts=2)
    assert two.tokens == 1.75 and two.draft > alone.draft and two.check > alone.check


def test_depth_and_calls_decide_whether_drafts_pay():
    shallow, deep = (replace(ModelArgs.preset("tiny"), n_layers=n) for n in (2, 32))
    assert costs.drafting(shallow, 0.8).speedup < costs.drafting(deep, 0.8).speedup
    free, slow = (costs.drafting(deep, 0.8, row=row) for row in (0, 1e6))
    assert slow.speedup < free.speedup
    assert costs.drafting(deep, 0.8, call=1e9).speedup == pytest.approx(1.8 * 32 / 33, rel=0.01)


def test_models_without_modules_have_no_table_of_drafts(capsys):
    main(["--preset", "moonlight"])
    assert "Drafts" not in capsys.readouterr().out
    main(["--preset", "v3", "--acceptance", "0.9"])
    assert "Drafts, 90% accepted" in capsys.readouterr().out
    with pytest.raises(ValueError, match="acceptance = 1.5"):
        main(["--acceptance", "1.5"])
