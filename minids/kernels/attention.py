"""Softmax attention: batched products for short sequences on a CPU, torch's fused kernel elsewhere.

Of heads with keys and values of their own (the naive form), and of heads that share one latent key
(the absorbed form of decoding).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minids.kernels.precision import plain_inference
from minids.kernels.registry import body

SHORT = 512  # keys; beyond it the scores' memory grows past what a CPU's cache holds
FEW = 8  # queries per sequence; more are a prefill, and go the plain way
MANY = 16  # sequences for which two batched products beat the fused kernel, 1.2 to 3.5 times


def causal(queries: int, keys: int, device=None) -> Tensor:
    """Return (1, S, T) bool: the S queries are the last of the T positions and see up to theirs."""
    return torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


@body(lambda q, k, v, visible, scale: q.device.type == "cpu" and k.size(1) <= SHORT)
def products(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Run product, softmax, product: in BF16 2.5 times as fast as the fused kernel at 256 keys."""
    heads = q.size(2)
    visible = causal(q.size(1), k.size(1)) if visible is None else visible
    hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
    hidden = hidden.repeat_interleave(heads, dim=0) if len(hidden) > 1 else hidden
    q, v = (rearrange(t, "b s h d -> (b h) s d") for t in (q, v))
    k = rearrange(k, "b t h d -> (b h) d t")
    scores = torch.baddbmm(hidden, q, k, alpha=scale)  # (B*H, S, T)
    # Softmax works in FP32 inside and rounds its result only.
    out = torch.bmm(scores.softmax(dim=-1), v)  # (B*H, S, v_head_dim)
    return rearrange(out, "(b h) s d -> b s h d", h=heads)


def takes_unequal(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> bool:
    """Return whether cuDNN's kernel takes values narrower than keys, and these are wide enough.

    Measured on an H100: at 192 and 128 it is 1.4 times as fast as on padded values, at 96 and 64 as
    fast. Hopper is the first that has it, backward pass included.
    """
    return (q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
            and visible is None and q.size(1) == k.size(1) and v.size(-1) < k.size(-1)
            and 128 < k.size(-1) <= 256 and v.size(-1) % 8 == 0 and k.size(-1) % 8 == 0
            and is_hopper())


def is_hopper() -> bool:
    """Return whether the GPU is a Hopper or later, and torch's cuDNN knows what it can do."""
    return (torch.cuda.get_device_capability() >= (9, 0)
            and (torch.backends.cudnn.version() or 0) >= 91100)


is_hopper._dynamo_marked_constant = True  # a compiler asks once; see `registry.note`


@body(takes_unequal)
def unequal_widths(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None,
                   scale: float) -> Tensor:
    """Run cuDNN's kernel on values as they are."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S, ..)
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, torch.is_grad_enabled(), 0.0, True, False, scale=scale)[0]
    return out.transpose(1, 2)


@body(lambda q, k, v, visible, scale: v.size(-1) <= k.size(-1))
def fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Run torch's kernel on values padded to the keys' width, which leaves the result unchanged."""
    width = v.size(-1)
    v = F.pad(v, (0, k.size(-1) - width)) if k.size(-1) > width else v
    if visible is None and q.size(1) != k.size(1):
        visible = causal(q.size(1), k.size(1), q.device)
    mask = None if visible is None else visible.unsqueeze(1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S or T, ..)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return out[..., :width].transpose(1, 2)


def takes_parts(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> bool:
    """Return whether queries are a prefill's, and a kernel here also tells its sums.

    cuDNN's takes widths of whole 16 bytes, up to 256 on Hopper, 128 before.
    """
    if visible is not None or torch.is_grad_enabled() or q.size(1) <= FEW:
        return False
    if q.device.type == "cpu":
        return q.size(1) < k.size(1)
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    version = torch.cuda.get_device_capability(q.device)[0]
    widest = 256 if version >= 9 else 128 if version == 8 else 0
    return all(t.size(-1) % 8 == 0 and t.size(-1) <= widest for t in (k, v))


@body(takes_parts)
def in_parts(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attend to the keys before the first query, which all see, then to the queries' own, causally.

    No mask is made: (S, T) numbers of a long prompt's piece would take more memory than its keys.
    """
    past = k.size(1) - q.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S or T, ..)
    out, own = with_sums(q, k[:, :, past:], v[:, :, past:], True, scale)
    if past:
        before, rest = with_sums(q, k[:, :, :past], v[:, :, :past], False, scale)
        out = torch.lerp(before.to(own.dtype), out.to(own.dtype), (own - rest).sigmoid())
    return out.to(v.dtype).transpose(1, 2)


def with_sums(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
              ) -> tuple[Tensor, Tensor]:
    """Return attention's output, (B, H, S, v_head_dim), and log sum exp of its scores, (B, H, S, 1)

    cuDNN takes values of another width than the keys'; the CPU's kernel wants them padded.
    """
    if q.device.type == "cuda":
        out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False, scale=scale)
    else:
        width = v.size(-1)
        v = F.pad(v, (0, k.size(-1) - width)) if k.size(-1) > width else v
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, scale=scale)
        out = out[..., :width]
    return out, sums.reshape(*q.shape[:3], 1)


def one_key_for_all_heads(q: Tensor, latent: Tensor, visible: Tensor | None,
                          scale: float) -> Tensor:
    """Attend to latents that are keys and values at once, heads as queries of a single head:
    q (B, S, H, width), latent (B, T, width) -> (B, S, H, width). visible: None is causal"""
    batch, count, heads, _ = q.shape
    rows = q.reshape(batch, count * heads, -1)  # (B, S*H, width)
    if count > 1:
        visible = causal(count, latent.size(1)) if visible is None else visible
        visible = visible.repeat_interleave(heads, dim=1)  # (B or 1, S*H, T)
    if batch >= MANY and q.dtype != torch.bfloat16:
        scores = torch.bmm(rows * scale, latent.mT)  # (B, S*H, T)
        scores = scores if visible is None else torch.where(visible, scores, float("-inf"))
        return torch.bmm(scores.softmax(-1), latent).view(q.shape)
    key = latent.unsqueeze(1)  # (B, 1, T, width)
    mask = None if visible is None else visible.unsqueeze(1)
    out = F.scaled_dot_product_attention(rows.unsqueeze(1), key, key, mask, scale=scale)
    return out.reshape(q.shape)


@body(lambda q, latent, rank, visible, scale: plain_inference(q) and q.size(1) <= FEW)
def shared_key(q: Tensor, latent: Tensor, rank: int, visible: Tensor | None,
               scale: float) -> Tensor:
    """Attend to the latents as one head's keys and values, the rotated part going along."""
    return one_key_for_all_heads(q, latent, visible, scale)[..., :rank]
