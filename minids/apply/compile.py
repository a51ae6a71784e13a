"""Compile a model's blocks one by one, from outside, for training steps only.

Blocks of one kind share their compiled code, so that a model of 60 layers compiles two or three
graphs: on 16 cores within half a minute, where the loss as a whole took 140 s and ran slower.
Validation and sampling, which come in many shapes, run as they are, and so do smaller batches of a
ramp. Parameters keep their names. Where ranks exchange tokens, a block is several graphs, with the
exchange between them (`minids.parallel.experts`).
"""

import functools
import types
import warnings
from collections.abc import Callable

import torch
from torch import nn

from minids.model.mla import MLA
from minids.model.moe import Experts
from minids.model.transformer import Transformer


class Compiled:
    """A function and its compiled form, which runs in training until compiling fails.

    plain: of a module or nothing, then tensors; sequences: of a batch that the compiled code is
        for; 0: of any, each compiled anew
    tell: prints a line; varied: number of leading inputs whose number of rows varies
    """

    def __init__(self, plain: Callable, tell: Callable[[str], None], sequences: int = 0,
                 varied: int = 0):
        from torch._dynamo.exc import TorchDynamoException  # a second, for those who compile

        for known in ("Torchinductor does not support code generation for complex",
                      "TensorFloat32 tensor cores"):
            warnings.filterwarnings("ignore", known)  # small products, which are FP32 on purpose
        mend_compiler()
        self.plain, self.sequences, self.tell, self.varied = plain, sequences, tell, varied
        self.run: Callable | None = torch.compile(plain, dynamic=False)
        self.failure = TorchDynamoException

    def __call__(self, *inputs):
        first = next(x for x in inputs if isinstance(x, torch.Tensor))
        known = first.size(0) == self.sequences or not self.sequences
        if self.run is None or not torch.is_grad_enabled() or not known:
            return self.plain(*inputs)
        for x in inputs[:self.varied]:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            return self.run(*inputs)
        except self.failure as error:
            self.run = None
            self.tell(f"compile: {reason(error)}; the run goes on without")
        return self.plain(*inputs)


def compile_blocks(model: Transformer, dtype: torch.dtype = torch.bfloat16, sequences: int = 0,
                   tell: Callable[[str], None] = print) -> None:
    """Compile the blocks and MTP modules, each at its first training step.

    dtype: of products; the compiler knows the experts' in BF16, and in others leaves them out
    sequences, tell: as in `Compiled`

    To be called after `minids.apply.recompute`, so that what is recomputed is compiled too. Where
    that fails, as without a C compiler, one line says so and the model runs as it is.
    """
    shared = Compiled(own_forward, tell, sequences)
    for module in model.modules() if dtype != torch.bfloat16 else ():
        if isinstance(module, Experts):
            module.product = torch.compiler.disable(module.product)
    for module in model.modules():  # kernels that fetch what an indexer selects stay as they are
        if isinstance(module, MLA) and module.indexer is not None:
            module.forward = torch.compiler.disable(module.forward)
    for module in [*model.layers, *model.mtp]:
        module.uncompiled = module.forward
        module.forward = types.MethodType(shared, module)


def is_compiled(model: Transformer) -> bool:
    """Return whether `compile_blocks` was called with this model."""
    return any(hasattr(block, "uncompiled") for block in model.modules())


def own_forward(module: nn.Module, *inputs):
    """Run a module's forward as it was before it was compiled."""
    return module.uncompiled(*inputs)


def reason(error: Exception) -> str:
    """Return the innermost cause of a compiler's error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__


def mend_compiler() -> None:
    """Make compiled gradients those of the code as it is written, where torch up to 2.13 does not.

    It runs the backward pass under the forward's autocast too, and so the gate's, whose products
    are in FP32, in BF16. It pads strides, and reads by padded ones what a reduction stored by those
    that it was told not to pad (as in pytorch pull request 180197): where MTP leaves an odd number
    of tokens, a rotated key's gradient was read from memory that nobody had written. And see
    `wait_for_stores` and `return_results_once`.
    """
    import torch._dynamo.variables.higher_order_ops as tracing
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.codegen.triton import TritonKernel

    functorch.backward_pass_autocast = "off"
    inductor.comprehensive_padding = False
    inductor.triton.autotune_pointwise = False  # trying shapes takes 10 s, and gains nothing
    if not hasattr(TritonKernel, "mended"):
        wait_for_stores(TritonKernel)
        return_results_once(tracing)
        inductor.kernel_name_max_ops += 1  # a setting that its cache's keys hold: no kernel of old


def wait_for_stores(kernel_class: type) -> None:
    """Have a generated kernel's threads wait for each other before they read what they stored.

    A reduction that does not fit into registers goes over its columns twice, and in the second
    pass reads back what it stored in the first. Triton may give a store and its load to different
    threads (triton issue 10924), and torch up to 2.13 puts no barrier between them (pytorch pull
    request 190519): on an H100 gradients behind a layer of experts were ten thousand times too
    long, and others in each run.
    """
    plain_load, plain_store = kernel_class.load, kernel_class.store

    @functools.wraps(plain_store)
    def store(kernel, name, *args, **named):
        vars(kernel).setdefault("stored_names", set()).add(name)
        return plain_store(kernel, name, *args, **named)

    @functools.wraps(plain_load)
    def load(kernel, name, index):
        places = kernel.loads, kernel.body  # a load is written inside the loop, or before it
        ends = [len(place._lines) for place in places]
        value = plain_load(kernel, name, index)
        if name in vars(kernel).get("stored_names", ()):
            for place, end in zip(places, ends, strict=True):
                if len(place._lines) > end:
                    place._lines.insert(end, "tl.debug_barrier()")
        return value

    kernel_class.load, kernel_class.store, kernel_class.mended = load, store, True


def return_results_once(tracing: types.ModuleType) -> None:
    """Have a compiler return the results of an `autograd.Function`, and nothing that is the same.

    In torch 2.11 the traced forward also returns all that it computes on the way. Where some of it
    is the result under another name, as before a cast to its own type or a change in place, the
    gradient goes there, and that of the inputs is zero, in silence (pytorch issue 180642; torch
    2.13 leaves such names out by itself). So it was with FP32 experts on a GPU.
    """
    name = "speculate_subgraph_with_auto_output_flattening"
    traced = functools.partial(getattr(tracing, name), filter_aliased_intermediates=True)
    setattr(tracing, name, traced)
