"""Activation checkpointing from outside: what is not stored is computed again for gradients.

    blocks     only the inputs of blocks are stored
    selective  the outputs of attention and of the experts' first product as well: the products
               that cost most do not run twice; projections, norms, SwiGLU and dispatch do, as V3
               recomputes its norms and up-projections (arXiv 2412.19437, section 3.2.3)
"""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from minids.model.transformer import Transformer

HOW = "none", "blocks", "selective"  # of `TrainArgs.recompute`
# Of `torch.ops.aten`: attention's kernels, of a GPU and a CPU, and grouped products.
STORED = {"_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention",
          "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu",
          "bmm", "_grouped_mm"}


def recompute_blocks(model: Transformer, how: str = "blocks") -> None:
    """Store little of blocks and MTP modules for the backward pass; how: of `HOW`"""
    assert how in HOW, how
    if how == "none":
        return
    again = {"context_fn": what_is_stored} if how == "selective" else {}
    run = functools.partial(checkpoint, use_reentrant=False, **again)
    for module in [*model.layers, *model.mtp]:
        module.forward = functools.partial(run_again, run, module)


def run_again(run, module: nn.Module, *inputs):
    """Run a module's own forward, a second time when its gradient is wanted."""
    forward = type(module).forward
    if torch.is_grad_enabled():
        return run(forward, module, *inputs)
    return forward(module, *inputs)


def what_is_stored() -> tuple:
    """Return the contexts of the first and the second run: what the first stores, and its use."""
    return create_selective_checkpoint_contexts(policy)


def policy(context, operation, *inputs, **named) -> CheckpointPolicy:
    """Return whether an operation's output is stored."""
    stored = operation.__name__.partition(".")[0] in STORED
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE
