"""Examples of the bodies that a GPU or a compiler chooses, on any device."""

from collections.abc import Callable
from dataclasses import replace

import torch
from small_models import LITTLE
from torch import Tensor

from minids import Transformer
from minids.kernels.attention import causal
from minids.model.moe import Gate, Routing
from minids.model.sparse_attention import Selection, select

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


def index(dtype: torch.dtype, device: str, tokens: int = 700, heads: int = 64) -> tuple:
    """An indexer of V3.2's widths; its weights stay in FP32."""
    weights = torch.randn(2, tokens, heads, device=device) * (heads * 128) ** -0.5
    return (drawn(2, tokens, heads, 128, dtype=dtype, device=device), weights.requires_grad_(),
            drawn(2, tokens, 128, dtype=dtype, device=device))


def index_scores(dtype: torch.dtype, device: str) -> tuple:
    return tuple(t.detach() for t in index(dtype, device))


def chosen(device: str, tokens: int = 700, k: int = 200) -> tuple:
    return select(torch.randn(2, tokens, tokens, device=device),
                  causal(tokens, tokens, device), k)


def selected(dtype: torch.dtype, device: str) -> tuple:
    """V3.2's widths: 128 heads, 512 and 64 numbers."""
    return (drawn(2, 700, 128, 576, dtype=dtype, device=device),
            drawn(2, 700, 576, dtype=dtype, device=device), 512, *chosen(device), 192 ** -0.5)


def naive_sparse(dtype: torch.dtype, device: str) -> tuple:
    args = replace(LITTLE, dim=64, n_heads=8, kv_lora_rank=64, qk_nope_head_dim=32,
                   qk_rope_head_dim=16, v_head_dim=32)
    attn = Transformer(args).to(device, dtype).layers[0].attn.requires_grad_(False)
    torch.nn.init.normal_(attn.wkv_b.weight, std=0.2)
    return (attn, drawn(2, 700, 8, 32, dtype=dtype, device=device),
            drawn(2, 700, 8, 16, dtype=dtype, device=device),
            drawn(2, 700, 80, dtype=dtype, device=device), Selection(*chosen(device)))


def loss_over_all(dtype: torch.dtype, device: str) -> tuple:
    q, k = (drawn(2, 700, 16, 192, dtype=dtype, device=device).detach() for _ in range(2))
    return *index(dtype, device), q, k, None, 192 ** -0.5


def loss_over_selection(dtype: torch.dtype, device: str) -> tuple:
    q, latent, _, *rest = selected(dtype, device)
    return *index(dtype, device), q.detach(), latent.detach(), *rest


CASES: dict[tuple[str, str], Callable[[torch.dtype, str], tuple]] = {
    ("layers.rms_norm", "traced"): norm,
    ("layers.rms_norm", "fused_on_gpu"): norm,
    ("rope.apply_rotary_emb", "real_pairs"): rotation,
    ("moe.MoE.routed", "weighted_inside"): moe,
    ("moe.Gate.choose", "choose_in_one_kernel"): gate,
    ("moe.sequence_balance_loss", "balance_in_one_pass"): routed,
    ("mla.attention", "unequal_widths"): attention,
    ("objective.linear_cross_entropy", "chunked_on_gpu"): entropy,
    ("sparse_attention.index_scores", "scores_in_one_kernel"): index_scores,
    ("mla.selected_attention", "attend_selected"): selected,
    ("mla.MLA.naive_sparse", "absorbed_for_naive"): naive_sparse,
    ("sparse_attention.indexer_loss", "loss_over_all"): loss_over_all,
    ("sparse_attention.selected_indexer_loss", "loss_over_selection"): loss_over_selection,
}
BY_A_COMPILER = {"traced", "real_pairs"}  # chosen while it traces
# The others' code runs on a CPU too.
GPU_ONLY = {"unequal_widths", "chunked_on_gpu", "choose_in_one_kernel", "balance_in_one_pass",
            "scores_in_one_kernel", "attend_selected", "absorbed_for_naive", "loss_over_all",
            "loss_over_selection"}
