"""Attention over the latents that an indexer selected, as one kernel in the absorbed form.

On a GPU it stands for both forms, in prefill, in decoding and in training: with heads folded onto
one shared key, a query's work is k latents wide, and no mask of S x T is made.
"""

from torch import Tensor

from minids.kernels.precision import compute_dtype, on_hopper
from minids.kernels.registry import body


def takes(q: Tensor, latent: Tensor, rank: int) -> bool:
    """Return whether the kernels take these widths and this type; q: (B, S, H, width)"""
    widths = rank, latent.size(-1) - rank
    return (on_hopper(q, latent) and rank <= 512
            and all(width >= 16 and width & (width - 1) == 0 for width in widths))


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
