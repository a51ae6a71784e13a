"""Small models for the tests, with every part awake.

At its initial values a model hardly attends and its experts hardly differ, so that a wrong part
moves nothing a test could see. `scrambled` gives every matrix unit gain, every norm a weight away
from one and every gate a bias of either sign.
"""

from dataclasses import replace

import torch

from minids import ModelArgs, Transformer

LITTLE = ModelArgs(
    vocab_size=64, max_seq_len=48, dim=24, inter_dim=40, moe_inter_dim=16, n_layers=2, n_heads=3,
    n_routed_experts=8, n_activated_experts=3, n_expert_groups=4, n_limited_groups=2,
    route_scale=1.7, q_lora_rank=16, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6,
    v_head_dim=14)

SHAPES = {
    "query latent": LITTLE,
    "no query latent": replace(LITTLE, q_lora_rank=0),
    "values wider than keys": replace(LITTLE, v_head_dim=20),
    "values as wide as keys": replace(LITTLE, v_head_dim=16),
    "odd widths": replace(LITTLE, q_lora_rank=11, kv_lora_rank=7, qk_nope_head_dim=5, v_head_dim=3),
}


def scrambled(args: ModelArgs, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model whose every weight matters; the same numbers in every precision."""
    torch.manual_seed(seed)
    return scramble(Transformer(args).double()).to(dtype)


def scramble(model: Transformer) -> Transformer:
    """Draw every weight and selection bias anew."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            fan_in = 1 if name == "embed.weight" else parameter.size(-1)
            torch.nn.init.normal_(parameter, std=fan_in ** -0.5)
    for bias in model.gate_biases():
        torch.nn.init.normal_(bias, mean=-0.2, std=0.3)
    return model


def random_tokens(args: ModelArgs, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """(batch, length) int64, uniform."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(args.vocab_size, (batch, length), generator=generator)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    device, is_cuda = torch.device("cuda"), True
