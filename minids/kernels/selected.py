"""Attention over the latents that an indexer selected, as one kernel in the absorbed form.

On a GPU it stands for both forms, in prefill, in decoding and in training: with heads folded onto
one shared key, a query's work is k latents wide, and no mask of S x T is made.
"""

import torch
from torch import Tensor

from minids.kernels.indexer import WIDEST
from minids.kernels.precision import HOPPER, TRITON, compute_dtype, on_hopper
from minids.kernels.registry import body


def is_tile(width: int) -> bool:
    """Return whether a kernel's tile can be so wide: a power of two, up to V3.2's latent."""
    return 16 <= width <= 512 and width & (width - 1) == 0


def takes(q: Tensor, latent: Tensor, rank: int) -> bool:
    """Return whether the kernels take these widths and this type; q: (B, S, H, width)"""
    return on_hopper(q, latent) and is_tile(rank) and is_tile(latent.size(-1) - rank)


def missing(args, device: torch.device) -> str:
    """Return why a GPU runs a model's sparse attention in PyTorch operations, or nothing."""
    if device.type != "cuda" or not args.has_indexer:
        return ""
    if not TRITON:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < HOPPER:
        return "the card is older than Hopper, compute capability 9.0"
    for name in ("kv_lora_rank", "qk_rope_head_dim"):
        if not is_tile(getattr(args, name)):
            return f"{name} = {getattr(args, name)} is no power of two from 16 to 512"
    for name in ("index_n_heads", "index_head_dim"):
        if getattr(args, name) > WIDEST:
            return f"{name} = {getattr(args, name)} is above {WIDEST}"
    return ""


@body(lambda q, latent, rank, indices, seen, scale: takes(q, latent, rank))
def attend_selected(q: Tensor, latent: Tensor, rank: int, indices: Tensor, seen: Tensor,
                    scale: float) -> Tensor:
    """Fetch each query's own latents inside the kernel: (B, S, H, width) -> (B, S, H, rank)"""
    from minids.kernels.triton_selected import Selected
    kind = compute_dtype(q)
    return Selected.apply(q.to(kind), latent.to(kind), indices, seen, rank, scale)


@body(lambda attn, q_nope, q_pe, latent, chosen: takes(q_pe, latent, attn.args.kv_lora_rank))
def absorbed_for_naive(attn, q_nope: Tensor, q_pe: Tensor, latent: Tensor, chosen) -> Tensor:
    """Take the absorbed form, which computes the selected pairs alone."""
    return attn.absorbed_sparse(q_nope, q_pe, latent, chosen)
