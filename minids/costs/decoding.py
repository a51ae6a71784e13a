"""Count what decoding reads from memory: the key-value cache, and weights with MTP drafts.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1 and table 1; "Insights into DeepSeek-V3"
(arXiv 2505.09343) table 1, whose bytes per token come out here; V3 section 5.4.3 for drafts.
"""

from typing import NamedTuple

from minids.base.fields import demand
from minids.config import ModelArgs
from minids.costs.parameters import BLOCK, block_parts, model_parts, mtp_join


def cache_bytes_per_token(args: ModelArgs, bytes_per_element: int = 2,
                          n_groups: int = 8) -> dict[str, int]:
    """Return the bytes of key-value cache per token over all layers, by form of attention.

    bytes_per_element: BF16 is 2; n_groups: key/value heads of GQA, capped at n_heads
    Returns "mla" (latent and shared rotated key); "mha", "gqa" and "mqa" (a key and a value of
    widths qk_nope_head_dim and v_head_dim per head, per group, once); and with an indexer
    "indexer" (its keys, in addition to "mla"). For "v3": mla 70272, mha 3997696.
    Raises ValueError if n_groups is below 1.
    """
    demand("n_groups", n_groups, n_groups >= 1, "at least 1")
    pair = args.qk_nope_head_dim + args.v_head_dim
    widths = {"mla": args.kv_lora_rank + args.qk_rope_head_dim, "mha": args.n_heads * pair,
              "gqa": min(n_groups, args.n_heads) * pair, "mqa": pair}
    if args.has_indexer:
        widths["indexer"] = args.index_head_dim
    return {form: width * args.n_layers * bytes_per_element for form, width in widths.items()}


def fp8_cache_bytes_per_layer(args: ModelArgs) -> dict[str, int]:
    """Return the bytes per token per layer of the caches as DeepSeek deploys them.

    The latent and the indexer's key are FP8 with an FP32 scale per 128 elements, the rotated key
    is BF16. For "v3.2": mla 656, indexer 132.
    """
    def fp8(width: int) -> int:
        return width + 4 * -(-width // BLOCK)
    cache = {"mla": fp8(args.kv_lora_rank) + 2 * args.qk_rope_head_dim}
    return cache | ({"indexer": fp8(args.index_head_dim)} if args.has_indexer else {})


class Drafting(NamedTuple):
    """Yield and cost of one round of speculative decoding."""

    tokens: float  # mean tokens that a sequence gains
    check: float  # weights read to check the drafts
    draft: float  # and to make them
    plain: float  # weights read to decode one token of each sequence without drafts

    @property
    def speedup(self) -> float:
        """Return the factor on tokens per second where reading weights takes all the time."""
        return self.tokens * self.plain / (self.check + self.draft)


def drafting(args: ModelArgs, acceptance: float, drafts: int = 1, batch: int = 1,
             call: float = 0, row: float = 0) -> Drafting:
    """Return the yield and cost of decoding with an MTP module's drafts.

    acceptance: share of drafts accepted, among those whose predecessors were accepted
    drafts: tokens drafted in a round; batch: sequences decoded together
    call, row: time to launch the operations of one block, and time that each further token of a
        pass adds there, as weights that could be read meanwhile; 0 for a large model
    Reading weights takes the rest of the time, until a batch is large enough to be compute-bound.
    An expert is read if at least one token visits it, as if tokens chose independently and evenly.
    For "v3" and 0.85: 1.16 times as fast alone, 1.82 times in a batch of 256.
    """
    model = model_parts(args, args.n_routed_experts)
    block = block_parts(args, args.n_layers, args.n_routed_experts)
    module = block | {"join": mtp_join(args), "head": model["head"]}

    def read(parts: dict[str, int], blocks: int, tokens: int) -> float:
        """Return the mean number of weights that a pass reads; the embedding is looked up."""
        visited = 1 - (1 - args.n_activated_experts / max(args.n_routed_experts, 1)) ** tokens
        shares = {"routed_experts": visited, "embedding": 0}
        weights = sum(count * shares.get(part, 1) for part, count in parts.items())
        return weights + blocks * (call + row * (tokens - 1))

    checked = batch * (drafts + 1)
    draft = read(module, 1, checked) + (drafts - 1) * read(module, 1, batch)
    return Drafting(sum(acceptance ** k for k in range(drafts + 1)),
                    read(model, args.n_layers, checked), draft, read(model, args.n_layers, batch))
