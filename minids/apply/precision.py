"""BF16 copies of the blocks' matrices, made once per optimizer step and not at each use.

Products run in BF16 over FP32 weights. Autocast casts a weight in every micro-batch, and the
experts' once more where they are recomputed; here a step casts each once, and w1 and w3 of the
experts side by side, as one product takes them. The copies collect the gradients of a micro-batch
and hand them on to the parameters, which keep their names, their FP32 and all else; `state_dict`
shows no copy. Over ranks FSDP2 gathers a block's weights for each pass and frees them after it:
nothing could last for a step, and each use casts what was gathered.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.model.layers import Linear
from minids.model.moe import Experts
from minids.model.transformer import Transformer


class StepCopies:
    """The copies of one model; `refresh` brings them up to date, and has to come before a step.

    They serve forward passes with gradients only: all others read the parameters themselves.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.bfloat16):
        self.pairs: list[tuple[nn.Parameter, Tensor]] = []  # a parameter and its (part of a) copy
        for module in (m for part in (model.layers, model.mtp) for m in part.modules()):
            if type(module) is Linear:
                module.product = ProductOfCopy(self.copy(dtype, module.weight), module.product)
            elif type(module) is Experts:
                w13 = self.copy(dtype, module.w1, module.w3)
                module.copies = w13, self.copy(dtype, module.w2)

    def copy(self, dtype: torch.dtype, *parameters: nn.Parameter) -> Tensor:
        """Return an empty copy of a matrix, or of several stacks of them joined row by row."""
        first, rows = parameters[0], [p.size(-2) for p in parameters]
        copy = first.new_empty(*first.shape[:-2], sum(rows), first.size(-1), dtype=dtype)
        self.pairs += zip(parameters, copy.detach().split(rows, dim=-2), strict=True)
        if first.requires_grad:
            copy.requires_grad_()
            copy.register_post_accumulate_grad_hook(functools.partial(hand_on, parameters, rows))
        return copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast all parameters anew: a fused optimizer's step leaves no mark that one changed."""
        parameters, copies = zip(*self.pairs, strict=True)
        copy_matrices(copies, parameters)


class ProductOfCopy:
    """x W^T with the copy of W where gradients are wanted, and with W itself elsewhere."""

    def __init__(self, copy: Tensor, product):
        self.copy, self.product = copy, product

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x.to(self.copy.dtype), self.copy)
        return self.product(x, weight)


def copy_matrices(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy matrices and stacks of them, matrix by matrix: a stack of parts takes twice as long."""
    def apart(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [matrix for t in tensors for matrix in (t if t.ndim == 3 else t[None])]

    torch._foreach_copy_(apart(targets), apart(sources))


@torch.no_grad()
def hand_on(parameters: tuple[nn.Parameter, ...], rows: list[int], copy: Tensor) -> None:
    """Add a copy's gradient to its parameters' and forget it."""
    grads = copy.grad.split(rows, dim=-2)
    if parameters[0].grad is None:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        copy_matrices([parameter.grad for parameter in parameters], grads)
    else:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad.add_(grad)
    copy.grad = None
