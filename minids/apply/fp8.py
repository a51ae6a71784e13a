"""FP8 training from outside: other products in the blocks' layers, no other weights."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.fp8 import fp8_linear
from minids.kernels import fp8 as kernels
from minids.kernels.fp8_layout import BLOCK, Groups, Slots, group_tiles
from minids.kernels.registry import bodies
from minids.model.layers import Linear
from minids.model.moe import Experts, each_expert
from minids.model.transformer import Transformer


def use_fp8(model: Transformer) -> None:
    """Compute the products of the blocks' linear layers and experts in FP8 (V3 section 3.3).

    Embedding, head, gates, norms, the MTP modules' joins, the indexer's weights and attention's
    core stay as they are.
    """
    for block in model.blocks():
        use_fp8_within(block)


def use_fp8_within(part: nn.Module) -> None:
    """Do this to a part of a block."""
    for name, module in part.named_modules():
        if isinstance(module, Linear) and not name.endswith("weights_proj"):
            module.product = fp8_linear
        elif isinstance(module, Experts):
            module.product = fp8_grouped_linear
            if type(module) is Experts:  # ranks and stored weights have forms of their own
                module.__class__ = ExpertsInFP8


class StepRounding:
    """FP8 copies of the matrices in parts of a model, made once per optimizer step.

    As `minids.apply.precision.StepCopies` for BF16: `refresh` has to come before a step, and the
    copies serve passes with gradients only. For the kernels; one byte per parameter and layout.
    """

    def __init__(self, parts: Iterable[nn.Module]):
        self.pairs: list[tuple[tuple[nn.Parameter, ...], kernels.Rounded]] = []
        for module in (m for part in parts for m in part.modules()):
            if isinstance(module, Linear) and vars(module).get("product") is fp8_linear:
                module.product = RoundedProduct(self.copy(module.weight))
            elif isinstance(module, ExpertsInFP8) and module.w1.size(1) % BLOCK == 0:
                module.rounded = self.copy(module.w1, module.w3), self.copy(module.w2)

    def copy(self, *weights: nn.Parameter) -> kernels.Rounded:
        """Return a matrix, or stacks of them side by side, rounded."""
        rounded = kernels.Rounded(*kernels.round_weights(stacks(weights), True, False))
        self.pairs.append((weights, rounded))
        return rounded

    def refresh(self) -> None:
        """Round all weights anew, where the copies lie."""
        from minids.kernels.triton_fp8 import round_blocks
        for weights, rounded in self.pairs:
            round_blocks(stacks(weights), columns=True, out=rounded)


def stacks(weights: Iterable[Tensor]) -> list[Tensor]:
    """Return matrices as stacks (E, r, c), without gradients."""
    return [w.detach() if w.dim() == 3 else w.detach().unsqueeze(0) for w in weights]


class RoundedProduct:
    """x W^T with the copy of W where gradients are wanted, and with W itself elsewhere."""

    def __init__(self, rounded: kernels.Rounded):
        self.rounded = rounded

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return fp8_linear(x, weight)
        y = kernels.multiplied(x.flatten(0, -2), [weight.unsqueeze(0)], (), self.rounded)
        return y.view(*x.shape[:-1], len(weight))


class ExpertsInFP8(Experts):
    """The experts of one layer, with w1 and w3 side by side.

    rounded: copies of [w1; w3] and of w2 that belong to the optimizer's step, of `StepRounding`
    """

    rounded: tuple[kernels.Rounded, kernels.Rounded] | None = None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Run `Experts.forward` with one product for w1 and w3."""
        if self.rounded is None or not torch.is_grad_enabled():
            x1, x3 = fp8_grouped_pair(x, self.w1, self.w3, counts).chunk(2, dim=-1)
            return self.product(F.silu(x1) * x3, self.w2, counts)
        up, down = self.products(group_tiles(counts, len(x)))
        x1, x3 = up(x).chunk(2, dim=-1)
        return down(F.silu(x1) * x3)

    def products(self, groups: Groups, slots: Slots = (None, None)) -> tuple[Callable, Callable]:
        """Return how kernels multiply rows by [w1; w3], and by w2; slots: of `from_tokens`"""
        w13, w2 = self.rounded or (None, None)
        into, out_of = ("x", "y") if slots[0] is not None else ("", "")
        return (lambda x: kernels.multiplied(x, [self.w1, self.w3], groups, w13, into, slots),
                lambda x: kernels.multiplied(x, [self.w2], groups, w2, out_of, slots))

    def from_tokens(self, source: Tensor, slot: Tensor,
                    counts: Tensor) -> tuple[Callable, Callable]:
        """Return what `minids.kernels.experts.products` does, in kernels."""
        return self.products(group_tiles(counts, len(source)), Slots(source, slot))

    def in_kernels(self, x: Tensor) -> bool:
        """Return whether kernels multiply x by all of its matrices."""
        return kernels.pair_in_kernels.when(x, self.w1, self.w3, None) and kernels.takes(self.w2)


@bodies(kernels.grouped_in_kernels)
def fp8_grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Run `minids.model.moe.grouped_linear` in FP8, one product per expert."""
    return each_expert(x, weight, counts, fp8_linear)


@bodies(kernels.pair_in_kernels)
def fp8_grouped_pair(x: Tensor, first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Return the results of two matrices per expert side by side: (M, out) each -> (M, 2 out)"""
    return torch.cat([fp8_grouped_linear(x, w, counts) for w in (first, second)], dim=-1)
