"""Activation checkpointing from outside: store blocks' inputs, and run them again for gradients."""

import types

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minids.model.transformer import Transformer


def recompute_blocks(model: Transformer) -> None:
    """Store only the inputs of blocks and MTP modules for the backward pass."""
    for module in [*model.layers, *model.mtp]:
        module.forward = types.MethodType(run_again, module)


def run_again(module: nn.Module, *inputs):
    """Run a module's own forward, a second time when its gradient is wanted."""
    forward = types.MethodType(type(module).forward, module)
    if torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)
