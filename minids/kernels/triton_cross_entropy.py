"""Cross-entropy and its gradient as one kernel in Triton, the gradient in place of the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def loss_and_gradient_kernel(logits, targets, losses, vocab_size: tl.constexpr,
                             BLOCK: tl.constexpr):
    """Replace a row of logits by softmax minus one-hot; its loss is log sum exp less the target's.

    The sum is taken on the way, relative to the largest logit so far (as in online softmax).
    """
    row = tl.program_id(0).to(tl.int64)
    start, target = logits + row * vocab_size, tl.load(targets + row)
    wanted = tl.load(start + target).to(tl.float32)  # before anything is written over it
    columns = tl.arange(0, BLOCK)
    largest, total = -float("inf"), 0.0
    for first in range(0, vocab_size, BLOCK):
        inside = first + columns < vocab_size
        x = tl.load(start + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
    log_sum = largest + tl.log(total)
    tl.store(losses + row, log_sum - wanted)
    for first in range(0, vocab_size, BLOCK):
        at = first + columns
        x = tl.load(start + at, mask=at < vocab_size, other=0.0).to(tl.float32)
        grad = tl.exp(x - log_sum) - tl.where(at == target, 1.0, 0.0)
        tl.store(start + at, grad.to(logits.dtype.element_ty), mask=at < vocab_size)


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows' losses, and its gradient in the memory of the logits.

    logits: (R, V), contiguous, written over; targets: (R,) int64 -> () FP32, (R, V)
    """
    rows, vocab_size = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(vocab_size), 8192)
    loss_and_gradient_kernel[rows,](logits, targets.contiguous(), losses, vocab_size, BLOCK=block,
                                    num_warps=8)
    return losses.sum(), logits
