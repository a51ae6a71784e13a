"""Compilation from outside: blocks one by one, for the steps of training and nothing else.

Blocks of one kind share their compiled code, so that a model of 60 layers compiles two or three
graphs: on 16 cores within half a minute, where the loss as a whole took 140 s and ran slower.
Validation and sampling, which come in many shapes, run as they are. Parameters keep their names.
"""

import types
from collections.abc import Callable

import torch
from torch import nn

from minids.model.transformer import Transformer


class Compiled:
    """What the compiled blocks of a model share: `run`, until it fails.

    changing: whether the batch will have another number of sequences later, which one graph takes
    tell: prints a line
    """

    def __init__(self, changing: bool, tell: Callable[[str], None]):
        from torch._dynamo import exc, maybe_mark_dynamic  # a second, for those who compile

        self.run: Callable | None = torch.compile(own_forward, dynamic=False)
        self.changing, self.tell = changing, tell
        self.failure, self.mark = exc.TorchDynamoException, maybe_mark_dynamic

    def __call__(self, module: nn.Module, *inputs):
        if self.run is None or not torch.is_grad_enabled():
            return own_forward(module, *inputs)
        for x in (x for x in inputs if self.changing and isinstance(x, torch.Tensor)):
            self.mark(x, 0)  # (B, S, D)
        try:
            return self.run(module, *inputs)
        except self.failure as error:
            self.run = None
            self.tell(f"compile: {reason(error)}; the run goes on without")
        return own_forward(module, *inputs)


def compile_blocks(model: Transformer, changing: bool = False,
                   tell: Callable[[str], None] = print) -> None:
    """Compile the blocks and MTP modules, each at its first training step.

    To be called after `minids.apply.recompute`, so that what is recomputed is compiled too. Where
    that fails, as without a C compiler, one line says so and the model runs as it is.
    """
    shared = Compiled(changing, tell)
    for module in [*model.layers, *model.mtp]:
        module.uncompiled = module.forward
        module.forward = types.MethodType(shared, module)


def own_forward(module: nn.Module, *inputs):
    """Run a module's forward as it was before it was compiled."""
    return module.uncompiled(*inputs)


def reason(error: Exception) -> str:
    """Return the innermost cause of a compiler's error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__
