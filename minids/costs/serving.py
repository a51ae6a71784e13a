"""Count what a rank holds when released weights are used: FP8 blocks, and the latent cache.

Layers are spread over the ranks of a pipeline, a layer's routed experts over expert_parallel ranks;
each rank has the rest of its layers, embedding, norm and head. The format is that of
`minids.costs.parameters.stored_elements`.
"""

from typing import NamedTuple

from minids.config import ModelArgs
from minids.costs.decoding import cache_bytes_per_token
from minids.costs.parameters import block_parts, fp8_elements, mtp_join


class Held(NamedTuple):
    """Bytes that one rank holds."""

    weights: int
    cache: int  # per token, in BF16

    def tokens(self, memory: float) -> int:
        """Return the tokens of all requests together that find room beside the weights; 0: none."""
        return max(0, int((memory - self.weights) // max(self.cache, 1)))


def block_bytes(args: ModelArgs, layer: int, n_routed: int) -> int:
    """Return the bytes of block `layer` as V3's checkpoint stores it, with n_routed experts."""
    fp8, scales = fp8_elements(args, layer, n_routed)
    biases = args.is_moe_layer(layer) * args.gate_bias * args.n_routed_experts
    rest = sum(block_parts(args, layer, n_routed).values()) - fp8 - biases
    return fp8 + 4 * scales + 2 * rest + 4 * biases


def held(args: ModelArgs, layers: range, expert_parallel: int, last: bool) -> Held:
    """Return what a rank with these layers holds; last: it has the MTP modules, which share
    embedding and head with the model."""
    mine = [*layers, *(range(args.n_layers, args.n_layers + args.n_mtp_layers) if last else ())]
    weights = sum(block_bytes(args, layer, args.n_routed_experts // expert_parallel)
                  for layer in mine)
    weights += 2 * (2 * args.vocab_size * args.dim + args.dim)  # BF16, as all that is no block
    weights += 2 * args.n_mtp_layers * mtp_join(args) * last
    forms = cache_bytes_per_token(args)
    cache = (forms["mla"] + forms.get("indexer", 0)) // args.n_layers * len(mine)
    return Held(weights, cache)
