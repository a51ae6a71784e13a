"""The lightning indexer's scores and loss, few queries at a time: no tensor of S x T x heads."""

import torch
from torch import Tensor

from minids.kernels.precision import wide
from minids.kernels.registry import body

SCORES = 2 ** 24  # numbers that all heads together may hold at a time


def few_queries(queries: int, keys: Tensor, heads: int) -> list[slice]:
    """Return pieces of the S queries, so small that `heads` scores per pair are at most SCORES.

    keys: (B, T, ..)
    """
    step = max(SCORES // (len(keys) * keys.size(1) * heads), 1)
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


@body(lambda q, weights, keys: len(q) * q.size(1) * q.size(2) * keys.size(1) > SCORES)
def scores_in_pieces(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Score few queries at a time: (B, S, H, d), (B, S, H), (B, T, d) -> (B, S, T)"""
    return torch.cat([piece_of_scores(q[:, part], weights[:, part], keys)
                      for part in few_queries(q.size(1), keys, q.size(2))], dim=1)


def piece_of_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Return the heads' weighted sum of ReLU(q . k) for some queries, in FP32 or wider."""
    with torch.autocast(q.device.type, enabled=False):
        products = torch.einsum("bshd,btd->bsht", q.to(weights.dtype), keys.to(weights.dtype))
        return torch.einsum("bsht,bsh->bst", products.relu(), weights)


@body(lambda index_q, weights, index_k, q, k, seen, scale: True)
def loss_in_pieces(index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                   seen: Tensor, scale: float) -> Tensor:
    """Go through forward and backward at once, few queries at a time."""
    return LossInPieces.apply(index_q, weights, index_k, q, k, seen, scale)


class LossInPieces(torch.autograd.Function):
    """Mean over queries of KL(p || softmax(I)), few queries at a time, FP32 or wider.

    The gradient with respect to the scores is known as soon as they are. So each piece goes through
    forward and backward at once, and nothing with S, T and heads in its shape is stored.
    """

    @staticmethod
    def forward(ctx, index_q: Tensor, weights: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
                seen: Tensor, scale: float) -> Tensor:
        ctx.dtypes = [t.dtype for t in (index_q, weights, index_k)]
        index_q, index_k = index_q.to(weights.dtype), index_k.to(weights.dtype)
        grads = [torch.zeros_like(t) for t in (index_q, weights, index_k)]
        total, queries = weights.new_zeros(()), q.size(0) * q.size(1)
        for part in few_queries(q.size(1), k, max(q.size(2), index_q.size(2))):
            end = k.size(1) - q.size(1) + part.stop  # no query of these sees further
            visible = seen[:, part, :end]
            p = attention_mass(q[:, part], k[:, :end], visible, scale)  # (B, s, end)
            own = index_q[:, part], weights[:, part], index_k[:, :end]
            loss, d_scores = divergence(p, piece_of_scores(*own), visible)
            total += loss.sum()
            for grad, piece, where in zip(grads, score_gradients(d_scores / queries, *own),
                                          (part, part, slice(end)), strict=True):
                grad[:, where] += piece
        ctx.save_for_backward(*grads)
        return total / queries

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        own = ((grad * t).to(dtype) for t, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *own, None, None, None, None


def attention_mass(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Return attention's probabilities of some queries, the mean over its heads: (B, s, T)"""
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bshd,bthd->bsht", q.to(wide(q)), k.to(wide(q))) * scale
    return scores.masked_fill(~seen.unsqueeze(2), float("-inf")).softmax(-1).mean(2)


def divergence(p: Tensor, scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || softmax(I)) over what each query attends to, nats, and its gradient.

    p, scores: (B, s, T); seen: (B or 1, s, T) bool; p is 0 where it is False
    Returns (B, s), and softmax(I) - p, (B, s, T).
    """
    log_probs = scores.masked_fill(~seen, float("-inf")).log_softmax(-1)
    surprise = p * log_probs.masked_fill(~seen, 0.0)  # no 0 times infinity
    return (torch.xlogy(p, p) - surprise).sum(-1), log_probs.exp_() - p


def score_gradients(grad: Tensor, q: Tensor, weights: Tensor, keys: Tensor) -> list[Tensor]:
    """Differentiate `piece_of_scores`: grad (B, s, T) -> gradients of its three arguments."""
    with torch.autocast(q.device.type, enabled=False):
        products = torch.einsum("bshd,btd->bsht", q, keys)
        d_weights = torch.einsum("bst,bsht->bsh", grad, products.relu())
        d_products = torch.einsum("bst,bsh->bsht", grad, weights).mul_(products > 0)
        return [torch.einsum("bsht,btd->bshd", d_products, keys), d_weights,
                torch.einsum("bsht,bshd->btd", d_products, q)]
