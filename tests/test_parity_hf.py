"""The same weights in transformers' DeepseekV3ForCausalLM: the same logits and gradients.

That model is a real implementation which nobody here wrote. Configurations are drawn by seed:
groups or none, query latent or none, gate biases of either sign. The weights are copied over by a
table in this file.

Three things of transformers are set from outside, none of which changes what it computes:
    precision   its norms, gate and softmax are written in FP32 whatever the model's precision; for
                FP64 the module's name `torch.float32` is made to mean FP64. Its angles stay FP32,
                as ours do.
    kernels     attention and experts run in their plain form ("eager").
    layout      it returns rotated evens then odds where ours stay interleaved; scores agree, so
                logits are compared and never the cached keys.

Compared here: the V3 family at its original context. Not compared yet, and listed in `LATER` so
that nobody takes it for done: YaRN, MTP, V2's softmax gate, Moonlight and K2, sparse attention, and
checkpoint files; they come with `minids/hf.py`.
"""

import importlib.util
import random
from dataclasses import replace

import pytest
import torch
from small_models import gap, random_tokens, scrambled
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from minids import ModelArgs, Transformer

SEEDS = (0, 1, 2)
LATER = ("YaRN", "MTP", "V2", "Moonlight", "Kimi K2", "sparse attention", "checkpoint files")


def drawn(seed: int) -> ModelArgs:
    """A small V3 configuration; the seeds alternate between a query latent and none.

    At least two experts a token: a single one weighs 1 after renormalising, and its gate has no
    gradient to compare.
    """
    rng = random.Random(seed)
    groups = rng.choice([2, 4]) if seed % 3 else 1
    experts = groups * rng.choice([3, 4]) if groups > 1 else rng.choice([4, 8])
    limited = rng.randint(1, groups)
    return ModelArgs(
        vocab_size=rng.choice([64, 96]), max_seq_len=32, dim=rng.choice([24, 32, 40]),
        inter_dim=rng.choice([40, 48]), moe_inter_dim=rng.choice([16, 20]), n_layers=3,
        n_dense_layers=rng.choice([0, 1]), n_heads=rng.choice([2, 3, 4]),
        n_routed_experts=experts, n_shared_experts=rng.choice([1, 2]),
        n_activated_experts=rng.randint(2, experts // groups * limited),
        n_expert_groups=groups, n_limited_groups=limited, route_scale=rng.choice([1.0, 2.5]),
        q_lora_rank=0 if seed % 2 else rng.choice([12, 20]), kv_lora_rank=rng.choice([16, 28]),
        qk_nope_head_dim=rng.choice([8, 12]), qk_rope_head_dim=rng.choice([4, 8]),
        v_head_dim=rng.choice([8, 14, 24]), rope_theta=rng.choice([10000.0, 500.0]),
        n_mtp_layers=0)


def their_config(args: ModelArgs) -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.inter_dim,
        moe_intermediate_size=args.moe_inter_dim, num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads, num_key_value_heads=args.n_heads,
        n_shared_experts=args.n_shared_experts, n_routed_experts=args.n_routed_experts,
        routed_scaling_factor=args.route_scale, kv_lora_rank=args.kv_lora_rank,
        q_lora_rank=args.q_lora_rank or None, qk_rope_head_dim=args.qk_rope_head_dim,
        v_head_dim=args.v_head_dim, qk_nope_head_dim=args.qk_nope_head_dim,
        n_group=args.n_expert_groups, topk_group=args.n_limited_groups,
        num_experts_per_tok=args.n_activated_experts, first_k_dense_replace=args.n_dense_layers,
        norm_topk_prob=True, max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps, num_mtp_layers=0, rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        attn_implementation="eager", experts_implementation="eager")


NAMES = {  # ours -> theirs, inside a block
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj", "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm", "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa", "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj", "attn.wo": "self_attn.o_proj",
    "ffn.w1": "mlp.gate_proj", "ffn.w3": "mlp.up_proj", "ffn.w2": "mlp.down_proj",
    "ffn.gate": "mlp.gate", "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
}
TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
       "head.weight": "lm_head.weight"}


def their_tensors(ours: dict) -> dict:
    """Our tensors (weights, or gradients) under their names, w1 and w3 of the experts stacked."""
    theirs = {}
    for name, tensor in ours.items():
        if name in TOP:
            theirs[TOP[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if rest == "ffn.experts.w1":
            w3 = ours[name[:-1] + "3"]
            theirs[prefix + "mlp.experts.gate_up_proj"] = torch.cat([tensor, w3], dim=1)
        elif rest == "ffn.experts.w2":
            theirs[prefix + "mlp.experts.down_proj"] = tensor
        elif rest == "ffn.gate.bias":
            theirs[prefix + "mlp.gate.e_score_correction_bias"] = tensor
        elif rest != "ffn.experts.w3":
            theirs[prefix + NAMES[rest.removesuffix(".weight")] + ".weight"] = tensor
    return theirs


class WideTorch:
    """The name `torch` inside their module, with FP64 where it says float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def in_fp64(monkeypatch):
    """Lets their norms, gate and softmax work in FP64."""
    monkeypatch.setattr(modeling_deepseek_v3, "torch", WideTorch())


def their_model(ours: Transformer, config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM(config).to(ours.embed.weight.dtype).eval()
    model.load_state_dict(their_tensors(ours.state_dict()), strict=True)
    return model


def differences(ours: Transformer, theirs: DeepseekV3ForCausalLM) -> tuple[float, float]:
    """The relative distance of the logits, and the worst one of a parameter's gradient."""
    tokens = random_tokens(ours.args, 3, 21)
    torch.manual_seed(0)
    logits, expected = ours(tokens), theirs(tokens, use_cache=False).logits
    weigh = torch.randn_like(logits) / logits.numel() ** 0.5  # a loss that every logit is in
    (logits * weigh).sum().backward()
    (expected * weigh).sum().backward()
    grads = their_tensors({name: p.grad for name, p in ours.named_parameters()})
    exact = {name: p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == exact.keys()
    return gap(logits, expected), max(gap(grads[name], exact[name]) for name in exact)


def test_the_seeds_draw_every_kind():
    args = [drawn(seed) for seed in SEEDS]
    assert {a.q_lora_rank > 0 for a in args} == {a.n_expert_groups > 1 for a in args} \
        == {True, False}
    assert all(a.has_moe and a.is_moe_layer(2) for a in args)
    for seed, a in zip(SEEDS, args, strict=True):
        bias = torch.cat(scrambled(a, seed).gate_biases())
        assert (bias < 0).any() and (bias > 0).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_in_fp64(seed, in_fp64):
    ours = scrambled(drawn(seed), seed)
    logits, gradients = differences(ours, their_model(ours, their_config(ours.args)))
    assert logits < 1e-12  # FP64 sums in another order, through three layers
    assert gradients < 1e-10  # the same, and through their backward


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_in_fp32(seed):
    ours = scrambled(drawn(seed), seed, torch.float32)
    logits, gradients = differences(ours, their_model(ours, their_config(ours.args)))
    # FP32 rounds at 6e-8; some 50 products and sums follow each other, no expert's choice flips.
    assert logits < 1e-5 and gradients < 1e-5


def with_zero_bias(ours: Transformer) -> None:
    for bias in ours.gate_biases():
        bias.zero_()


def with_w1_and_w3_exchanged(ours: Transformer) -> None:
    experts = ours.layers[2].ffn.experts
    experts.w1.data, experts.w3.data = experts.w3.data, experts.w1.data


def with_another_scale(ours: Transformer) -> None:
    for layer in ours.layers:
        layer.attn.scale = ours.args.qk_nope_head_dim ** -0.5


def with_half_split_keys(ours: Transformer) -> None:
    """The rotated key's rows as another family lays them out."""
    rank = ours.args.kv_lora_rank
    rows = ours.layers[0].attn.wkv_a.weight.data[rank:]
    rows.copy_(torch.cat([rows[0::2], rows[1::2]]).clone())


@pytest.mark.parametrize("damage", [with_zero_bias, with_w1_and_w3_exchanged, with_another_scale,
                                    with_half_split_keys])
def test_a_wrong_model_is_caught(damage, in_fp64):
    ours = scrambled(drawn(2), 2)
    theirs = their_model(ours, their_config(ours.args))
    damage(ours)
    assert differences(ours, theirs)[0] > 1e-3


@pytest.mark.parametrize("change", [dict(rope_interleave=False), dict(norm_topk_prob=False),
                                    dict(routed_scaling_factor=1.3)], ids=str)
def test_a_wrong_configuration_is_caught(change, in_fp64):
    ours, config = scrambled(drawn(2), 2), their_config(drawn(2))
    for name, value in change.items():
        setattr(config, name, value)
    assert differences(ours, their_model(ours, config))[0] > 1e-3


def test_equal_at_moonlights_norm_eps(in_fp64):
    ours = scrambled(replace(drawn(0), norm_eps=1e-5))
    assert differences(ours, their_model(ours, their_config(ours.args)))[0] < 1e-12


@pytest.mark.xfail(strict=True, reason="not compared yet: " + ", ".join(LATER))
def test_what_is_not_compared_yet():
    """Passes, and so fails as a strict expectation, once the loader is there: compare these."""
    assert importlib.util.find_spec("minids.hf") is not None
