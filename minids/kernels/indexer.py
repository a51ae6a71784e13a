"""The lightning indexer's scores, choice and loss: no tensor of S x T x heads.

On a CPU few queries at a time. On a GPU in Triton, heads summed inside a kernel, and only a piece
of the scores, (S, T), in memory at a time.
"""

import torch
from torch import Tensor

from minids.kernels.attention import causal
from minids.kernels.precision import compute_dtype, on_hopper
from minids.kernels.registry import REGISTRY, body

SCORES = 2 ** 24  # numbers that all heads together may hold at a time
PIECE = 2 ** 27  # scores in memory at a time, where heads are summed before they are stored
WIDEST = 128  # heads of a query, and numbers of a key, that a tile holds: V3.2 has 64 and 128


def few_queries(queries: int, keys: Tensor, heads: int) -> list[slice]:
    """Return pieces of the queries, so small that all heads' scores of keys (B, T, ..) are few."""
    step = max(SCORES // (len(keys) * keys.size(1) * heads), 1)
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def pieces(batch: int, queries: int, keys: int) -> list[slice]:
    """Return pieces of the queries whose scores, with heads summed, are PIECE numbers or fewer."""
    step = max(PIECE // (batch * keys), 1)
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def fits(heads: int, width: int) -> bool:
    """Return whether a tile holds all heads of a query."""
    return heads <= WIDEST and width <= WIDEST


def learns(*tensors: Tensor) -> bool:
    """Return whether a gradient may be asked of any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@body(lambda q, weights, keys: not learns(q, weights, keys) and on_hopper(q, keys)
      and q.dtype == keys.dtype and weights.dtype == torch.float32 and fits(*q.shape[2:]))
def scores_in_one_kernel(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Score with products, ReLU and the heads' sum in one kernel."""
    from minids.kernels import triton_indexer
    return triton_indexer.scores(q, weights, keys, keys.size(1))


@body(lambda indexer, x, c_q, keys, rotation, visible, k: not torch.is_grad_enabled()
      and on_hopper(x, keys) and fits(indexer.args.index_n_heads, indexer.args.index_head_dim))
def select_in_pieces(indexer, x: Tensor, c_q: Tensor, keys: Tensor, rotation: Tensor,
                     visible: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Score few queries against the keys that they see, choose, and forget the scores."""
    kind, q, weights = compute_dtype(x), indexer.queries(c_q, rotation), indexer.weights(x)
    return best_in_pieces(q.to(kind), weights, keys.to(kind), visible, k,
                          indexer.args.index_fp8)


def in_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors of an indexer, (.., d), as E4M3 numbers, as deployed, and their scales, (..).

    A vector has 128 numbers or fewer, so one scale, a power of two. What the indexer has rounded
    before comes out as it is.
    """
    rounded, scale = REGISTRY["fp8.quantize_activation"](x, True)
    return rounded, scale.squeeze(-1)


def scored(q: Tensor, weights: Tensor, keys: Tensor, first: int, scales: Tensor | None) -> Tensor:
    """Return (B, S, T) scores in FP32; scales: (B, T), of keys in E4M3, and then q is rounded too.

    Scales are powers of two, so it makes no difference where they are multiplied in.
    """
    from minids.kernels import triton_indexer
    if scales is not None:
        q, scale = in_e4m3(q)
        weights, scales = weights * scale, scales.contiguous()
    return triton_indexer.scores(q, weights, keys, first, scales, padded=True)


def best_in_pieces(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor | None, k: int,
                   fp8: bool = False) -> tuple[Tensor, Tensor]:
    """Return each query's k best keys: indices int64, seen bool, (B, S, k)"""
    tokens = best_tokens(q, weights, keys, visible, k, fp8)
    return (tokens ^ (tokens >> 31)).long(), tokens >= 0


def best_tokens(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor | None, k: int,
                fp8: bool = False) -> Tensor:
    """Return each query's k best keys, (B, S, k) int32: t, and -1 - t of one that it does not see.

    visible: (B or 1, S, T) bool, or (B or 1, S) int64, the last key that each query sees; None: the
        queries are the last of the T positions; fp8: multiply E4M3 numbers
    In memory stand PIECE scores, whatever S is, and no mask where queries see all before them.
    """
    from minids.kernels import triton_choice
    (batch, count), total = q.shape[:2], keys.size(1)
    tokens = torch.empty(batch, count, k, dtype=torch.int32, device=q.device)
    keys, scales = in_e4m3(keys) if fp8 else (keys, None)
    for part in pieces(batch, count, total):
        first = total - count + part.start
        end = total if visible is not None else max(total - count + part.stop, k)
        own = None if scales is None else scales[:, :end]
        scores = scored(q[:, part], weights[:, part], keys[:, :end],
                        first if visible is None else end, own)
        seen = visible if visible is None else visible[:, part]
        triton_choice.select(scores, seen, first, tokens[:, part])
    return tokens


@body(lambda q, weights, keys: len(q) * q.size(1) * q.size(2) * keys.size(1) > SCORES)
def scores_in_pieces(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Score few queries at a time: (B, S, H, d), (B, S, H), (B, T, d) -> (B, S, T)"""
    plain = REGISTRY["sparse_attention.index_scores"].plain
    return torch.cat([plain(q[:, part], weights[:, part], keys)
                      for part in few_queries(q.size(1), keys, q.size(2))], dim=1)


def learns_in_triton(index_q: Tensor, weights: Tensor, *attention: Tensor) -> bool:
    """Return whether the loss's kernels take these tensors."""
    return (on_hopper(index_q, *attention) and weights.dtype == torch.float32
            and fits(*index_q.shape[2:]))


@body(lambda index_q, weights, index_k, q, k, seen, scale: seen is None
      and learns_in_triton(index_q, weights, q, k) and q.size(-1) <= 256)
def loss_over_all(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                  seen: None, scale: float) -> Tensor:
    """Go through forward and backward at once, PIECE pairs of query and key at a time."""
    kind = compute_dtype(q)
    return LossInKernels.apply(all_pairs, index_q, weights, index_k, q.to(kind), k.to(kind), scale)


@body(lambda index_q, weights, index_k, q, latent, indices, seen, scale:
      learns_in_triton(index_q, weights, q, latent))
def loss_over_selection(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor,
                        latent: Tensor, indices: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Fetch each query's own latents and keys inside the kernels, forward and backward at once."""
    from minids.kernels.triton_index_loss import over_selection
    kind = compute_dtype(q)
    return LossInKernels.apply(over_selection, index_q, weights, index_k, q.to(kind),
                               latent.to(kind), indices, seen, scale)


class LossInKernels(torch.autograd.Function):
    """A loss whose kernels return its gradients with it; those are all that is stored."""

    @staticmethod
    def forward(ctx, work, index_q: Tensor, weights: Tensor, index_k: Tensor, *rest) -> Tensor:
        kind = compute_dtype(index_q)
        loss, *grads = work(index_q.to(kind), weights, index_k.to(kind), *rest)
        own, ctx.others = (index_q, weights, index_k), len(rest)
        ctx.save_for_backward(*(g.to(t.dtype) for g, t in zip(grads, own, strict=True)))
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return None, *((grad * t).to(t.dtype) for t in ctx.saved_tensors), *[None] * ctx.others


def all_pairs(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
              scale: float) -> tuple[Tensor, ...]:
    """Return the warm-up's loss and its gradients; the S queries are the last of T positions."""
    from minids.kernels import triton_index_loss, triton_indexer
    (batch, count), total = index_q.shape[:2], index_k.size(1)
    loss = weights.new_zeros(())
    dq, dweights = torch.empty_like(index_q), torch.empty_like(weights)
    dkeys = torch.zeros(index_k.shape, dtype=torch.float32, device=index_k.device)
    for part in pieces(2 * batch, count, total):  # p beside the scores
        end = total - count + part.stop  # no query of these sees further
        own = index_q[:, part], weights[:, part], index_k[:, :end]
        wanted = triton_index_loss.attention_mass(q[:, part], k[:, :end], scale)
        scores = triton_indexer.scores(*own, total - count + part.start)
        loss += triton_index_loss.divergence(scores, wanted, None, total - count + part.start,
                                             1 / (batch * count))
        dq[:, part], dweights[:, part] = triton_indexer.add_gradients(*own, scores, dkeys)
    return loss, dq, dweights, dkeys


@body(lambda index_q, weights, index_k, q, k, seen, scale: True)
def loss_in_pieces(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                   seen: Tensor | None, scale: float) -> Tensor:
    """Go through forward and backward at once, few queries at a time."""
    index_q, index_k = index_q.to(weights.dtype), index_k.to(weights.dtype)
    seen = causal(q.size(1), k.size(1), q.device) if seen is None else seen
    return LossInPieces.apply(index_q, weights, index_k, q, k, seen, scale)


class LossInPieces(torch.autograd.Function):
    """The plain loss of a few queries, differentiated before the next few: what is stored for one
    piece ends with it, and gradients of the indexer's own tensors remain."""

    @staticmethod
    def forward(ctx, index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                seen: Tensor, scale: float) -> Tensor:
        plain = REGISTRY["sparse_attention.indexer_loss"].plain
        own, total = (index_q, weights, index_k), weights.new_zeros(())
        grads = [torch.zeros_like(t) for t in own]
        for part in few_queries(q.size(1), k, max(q.size(2), index_q.size(2))):
            keys = slice(k.size(1) - q.size(1) + part.stop)  # no query of these sees further
            where, share = (part, part, keys), (part.stop - part.start) / q.size(1)
            with torch.enable_grad():
                piece = [t[:, at].detach().requires_grad_()
                         for t, at in zip(own, where, strict=True)]
                loss = share * plain(*piece, q[:, part], k[:, keys], seen[:, part, keys], scale)
            for grad, at, more in zip(grads, where, torch.autograd.grad(loss, piece), strict=True):
                grad[:, at] += more
            total += loss.detach()
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return *(grad * t for t in ctx.saved_tensors), None, None, None, None
