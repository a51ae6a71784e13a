"""Cross-entropy of a linear layer's output that never holds all logits at once."""

import torch
from torch import Tensor

from minids.kernels.precision import TRITON, compute_dtype, wide
from minids.kernels.registry import body

LOGITS = {"cpu": 2 ** 21, "cuda": 2 ** 27}  # at a time: what a cache, or a GPU, has room for


@body(lambda x, weight, targets, count: TRITON and x.device.type == "cuda"
      and compute_dtype(x) != torch.float64)
def chunked_on_gpu(x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
    """Do the same with one kernel between the products, which reads and writes logits in place."""
    from minids.kernels import triton_cross_entropy
    return Chunked.apply(x.flatten(0, -2), weight, targets.flatten(), count,
                         triton_cross_entropy.loss_and_gradient)


@body(lambda x, weight, targets, count: True)
def chunked(x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
    """Go through forward and backward in chunks of rows."""
    return Chunked.apply(x.flatten(0, -2), weight, targets.flatten(), count, loss_and_gradient)


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows' losses, and its gradient: (R, V), (R,) -> (), (R, V)"""
    target = targets.unsqueeze(1)
    log_probs = logits.to(wide(logits)).log_softmax(-1)  # (R, V)
    loss = -log_probs.gather(1, target).sum()
    grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(log_probs[:, :1]))
    return loss, grad.to(logits.dtype)


class Chunked(torch.autograd.Function):
    """The gradient with respect to the logits is softmax minus one-hot, known as soon as they are:
    a chunk of rows goes through forward and backward at once, for as many products as ever."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, count: int,
                middle=loss_and_gradient) -> Tensor:
        dtype = compute_dtype(x)
        w, total = weight.to(dtype), 0.0
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        chunk = max(LOGITS.get(x.device.type, 2 ** 21) // len(weight), 1)
        chunk = min(chunk, 4096) if dtype == torch.float16 else chunk  # dw sums them, unscaled
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            x_rows = x[rows].to(dtype)
            loss, grad = middle(x_rows @ w.T, targets[rows])  # (), (rows, vocab_size)
            total = total + loss
            dx[rows] = grad @ w
            dw += grad.T @ x_rows
        ctx.save_for_backward(dx, dw)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dw = ctx.saved_tensors
        scale = grad / ctx.count
        return dx * scale, dw * scale, None, None, None
