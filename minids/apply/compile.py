"""Compile a model's blocks one by one, from outside, for training steps only.

Blocks of one kind share their compiled code, so that a model of 60 layers compiles two or three
graphs: on 16 cores within half a minute, where the loss as a whole took 140 s and ran slower.
Validation and sampling, which come in many shapes, run as they are, and so do smaller batches of a
ramp. Parameters keep their names.
"""

import types
import warnings
from collections.abc import Callable

import torch
from torch import nn

from minids.model.moe import Experts
from minids.model.transformer import Transformer


class Compiled:
    """The compiled forward that all blocks of a model share, until compiling fails.

    sequences: of a batch that the compiled code is for; 0: of any, each compiled anew
    tell: prints a line
    """

    def __init__(self, sequences: int, tell: Callable[[str], None]):
        from torch._dynamo.exc import TorchDynamoException  # a second, for those who compile

        for known in ("Torchinductor does not support code generation for complex",
                      "TensorFloat32 tensor cores"):
            warnings.filterwarnings("ignore", known)  # small products, which are FP32 on purpose
        self.run: Callable | None = torch.compile(own_forward, dynamic=False)
        self.sequences, self.tell, self.failure = sequences, tell, TorchDynamoException

    def __call__(self, module: nn.Module, x: torch.Tensor, *inputs):
        known = x.size(0) == self.sequences or not self.sequences
        if self.run is None or not torch.is_grad_enabled() or not known:
            return own_forward(module, x, *inputs)
        try:
            return self.run(module, x, *inputs)
        except self.failure as error:
            self.run = None
            self.tell(f"compile: {reason(error)}; the run goes on without")
        return own_forward(module, x, *inputs)


def compile_blocks(model: Transformer, dtype: torch.dtype = torch.bfloat16, sequences: int = 0,
                   tell: Callable[[str], None] = print) -> None:
    """Compile the blocks and MTP modules, each at its first training step.

    dtype: of products; the compiler knows the experts' in BF16, and in others leaves them out
    sequences, tell: as in `Compiled`

    To be called after `minids.apply.recompute`, so that what is recomputed is compiled too. Where
    that fails, as without a C compiler, one line says so and the model runs as it is.
    """
    shared = Compiled(sequences, tell)
    for module in model.modules() if dtype != torch.bfloat16 else ():
        if isinstance(module, Experts):
            module.product = torch.compiler.disable(module.product)
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
