"""The lightning indexer's scores and loss, few queries at a time: no tensor of S x T x heads."""

import torch
from torch import Tensor

from minids.kernels.registry import REGISTRY, body

SCORES = 2 ** 24  # numbers that all heads together may hold at a time


def few_queries(queries: int, keys: Tensor, heads: int) -> list[slice]:
    """Return pieces of the queries, so small that all heads' scores of keys (B, T, ..) are few."""
    step = max(SCORES // (len(keys) * keys.size(1) * heads), 1)
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


@body(lambda q, weights, keys: len(q) * q.size(1) * q.size(2) * keys.size(1) > SCORES)
def scores_in_pieces(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Score few queries at a time: (B, S, H, d), (B, S, H), (B, T, d) -> (B, S, T)"""
    plain = REGISTRY["sparse_attention.index_scores"].plain
    return torch.cat([plain(q[:, part], weights[:, part], keys)
                      for part in few_queries(q.size(1), keys, q.size(2))], dim=1)


@body(lambda index_q, weights, index_k, q, k, seen, scale: True)
def loss_in_pieces(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                   seen: Tensor, scale: float) -> Tensor:
    """Go through forward and backward at once, few queries at a time."""
    index_q, index_k = index_q.to(weights.dtype), index_k.to(weights.dtype)
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
