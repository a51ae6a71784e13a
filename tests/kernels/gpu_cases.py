"""Examples of the bodies that a GPU or a compiler chooses, on any device."""

from collections.abc import Callable
from dataclasses import replace

import torch
from small_models import LITTLE
from torch import Tensor

from minids import Transformer
from minids.model.moe import Gate, Routing

BF16, F32 = torch.bfloat16, torch.float32


def drawn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def norm(dtype: torch.dtype, device: str) -> tuple:
    return (drawn(3, 50, 64, dtype=dtype, device=device),
            drawn(64, dtype=dtype, device=device), 1e-6)


def rotation(dtype: torch.dtype, device: str) -> tuple:
    angle = torch.rand(1, 50, 8, device=device) * 6
    turn = torch.polar(torch.ones_like(angle), angle)
    return drawn(2, 50, 3, 16, dtype=dtype, device=device), turn


def moe(dtype: torch.dtype, device: str) -> tuple:
    """Expert 3 gets nobody; there are tokens enough that experts' rows are aligned."""
    model = Transformer(replace(LITTLE, dim=64, moe_inter_dim=32)).to(device, dtype)
    layer = next(block.ffn for block in model.layers if block.is_moe)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scores = torch.rand(400, layer.args.n_routed_experts, device=device)
    scores[:, 3] = -1
    indices = scores.topk(layer.args.n_activated_experts).indices
    weights = torch.rand(indices.shape, device=device).requires_grad_()
    return layer, drawn(400, 64, dtype=dtype, device=device), weights, indices


def gate(dtype: torch.dtype, device: str) -> tuple:
    """Choices of equal sets are equal once they are sorted; FP32, as the gate computes."""
    args = replace(LITTLE, n_routed_experts=16, n_expert_groups=4, n_limited_groups=2)
    layer = Gate(args).to(device)
    layer.bias.copy_(torch.rand(16))
    return layer, torch.rand(2, 70, 16, device=device)


def routed(dtype: torch.dtype, device: str) -> tuple:
    scores = torch.rand(2, 70, LITTLE.n_routed_experts, device=device).requires_grad_()
    return Routing(scores, scores.topk(LITTLE.n_activated_experts).indices), LITTLE


def attention(dtype: torch.dtype, device: str) -> tuple:
    q, k = (drawn(2, 256, 4, 192, dtype=dtype, device=device) for _ in range(2))
    return q, k, drawn(2, 256, 4, 128, dtype=dtype, device=device), None, 0.07


def entropy(dtype: torch.dtype, device: str) -> tuple:
    """Several chunks are left to the test of `chunked`: on a GPU one holds 2^27 logits."""
    return (drawn(2, 300, 64, dtype=dtype, device=device),
            drawn(9000, 64, dtype=dtype, device=device),
            torch.randint(9000, (2, 300), device=device), 321)


CASES: dict[tuple[str, str], Callable[[torch.dtype, str], tuple]] = {
    ("layers.rms_norm", "traced"): norm,
    ("layers.rms_norm", "fused_on_gpu"): norm,
    ("rope.apply_rotary_emb", "real_pairs"): rotation,
    ("moe.MoE.routed", "weighted_inside"): moe,
    ("moe.Gate.choose", "choose_in_one_kernel"): gate,
    ("moe.sequence_balance_loss", "balance_in_one_pass"): routed,
    ("mla.attention", "unequal_widths"): attention,
    ("objective.linear_cross_entropy", "chunked_on_gpu"): entropy,
}
BY_A_COMPILER = {"traced", "real_pairs"}  # chosen while it traces
# The others' code runs on a CPU too.
GPU_ONLY = {"unequal_widths", "chunked_on_gpu", "choose_in_one_kernel", "balance_in_one_pass"}
