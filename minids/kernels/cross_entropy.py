"""Cross-entropy of a linear layer's output that never holds all logits at once."""

import torch
from torch import Tensor

from minids.kernels.precision import compute_dtype, wide
from minids.kernels.registry import body

LOGITS = {"cpu": 2 ** 21, "cuda": 2 ** 27}  # at a time: what a cache, or a GPU, has room for


@body(lambda x, weight, targets, count: True)
def chunked(x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
    """Go through forward and backward in chunks of rows."""
    return Chunked.apply(x.flatten(0, -2), weight, targets.flatten(), count)


class Chunked(torch.autograd.Function):
    """The gradient with respect to the logits is softmax minus one-hot, known as soon as they are:
    a chunk of rows goes through forward and backward at once, for as many products as ever."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
        dtype = compute_dtype(x)
        w, total = weight.to(dtype), 0.0
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        chunk = max(LOGITS.get(x.device.type, 2 ** 21) // len(weight), 1)
        chunk = min(chunk, 4096) if dtype == torch.float16 else chunk  # dw sums them, unscaled
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            x_rows, target = x[rows].to(dtype), targets[rows].unsqueeze(1)
            logits = (x_rows @ w.T).to(wide(x_rows))
            log_probs = logits.log_softmax(-1)  # (rows, vocab_size)
            total = total - log_probs.gather(1, target).sum()
            grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(log_probs[:, :1]))
            grad = grad.to(dtype)
            dx[rows] = grad @ w
            dw += grad.T @ x_rows
        ctx.save_for_backward(dx, dw)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        scale = grad / ctx.count
        return dx * scale, dw * scale, None, None
