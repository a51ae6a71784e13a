"""FP8 training from outside: other products in the blocks' layers, no other weights."""

from functools import partial

from minids.fp8 import fp8_linear
from minids.model.layers import Linear
from minids.model.moe import Experts, each_expert
from minids.model.transformer import Transformer


def use_fp8(model: Transformer) -> None:
    """Compute the products of the blocks' linear layers and experts in FP8 (V3 section 3.3).

    Embedding, head, gates, norms, the MTP modules' joins, the indexer's weights and attention's
    core stay as they are.
    """
    for block in model.blocks():
        for name, module in block.named_modules():
            if isinstance(module, Linear) and not name.endswith("weights_proj"):
                module.product = fp8_linear
            elif isinstance(module, Experts):
                module.product = partial(each_expert, product=fp8_linear)
