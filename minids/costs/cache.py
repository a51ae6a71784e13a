"""Count the bytes of the key-value cache.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1 and table 1; "Insights into DeepSeek-V3"
(arXiv 2505.09343) table 1, whose bytes per token come out here.
"""

from minids.config import ModelArgs
from minids.costs.parameters import BLOCK


def cache_bytes_per_token(args: ModelArgs, bytes_per_element: int = 2,
                          n_groups: int = 8) -> dict[str, int]:
    """Return the bytes of key-value cache per token over all layers, by form of attention.

    bytes_per_element: width of a stored element, bytes; BF16 is 2
    n_groups: key/value heads of GQA, capped at n_heads
    Returns "mla" (latent and shared rotated key); "mha", "gqa" and "mqa" (a key and a value of
    widths qk_nope_head_dim and v_head_dim per head, per group, once); and with an indexer
    "indexer" (its keys, in addition to "mla"). For "v3": mla 70272, mha 3997696.
    Raises ValueError if n_groups is below 1.
    """
    if n_groups < 1:
        raise ValueError(f"n_groups = {n_groups} is not valid: it must be at least 1")
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
