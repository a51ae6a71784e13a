"""Count floating-point operations: of attention, of a forward pass, of training.

A weight costs two FLOPs per token in the forward pass and twice that in the backward pass.
Softmax, norms as such, the MTP modules and recomputation are left out.
Source: DeepSeek-V3.2 (arXiv 2512.02556) section 2 for sparse attention; "Insights into DeepSeek-V3"
(arXiv 2505.09343) table 2, whose FLOPs per token come out here.
"""

from minids.config import ModelArgs
from minids.costs.parameters import count_parameters


def pair_flops(args: ModelArgs) -> dict[str, int]:
    """Return the FLOPs that one query spends on one key in one layer, by form of attention.

    Returns "mha" (naive: each head has its key and value), "mqa" (absorbed: the heads share the
    latent) and "indexer" (0 without one). For "v3.2": 81,920, 278,528 and 16,384.
    """
    latent = args.kv_lora_rank + args.qk_rope_head_dim
    return {"mha": 2 * args.n_heads * (args.qk_head_dim + args.v_head_dim),
            "mqa": 2 * args.n_heads * (latent + args.kv_lora_rank),
            "indexer": 2 * args.index_n_heads * args.index_head_dim}


def attention_flops(args: ModelArgs, context: int) -> dict[str, int]:
    """Return the FLOPs of attention for one query on `context` keys, in all layers.

    Returns "mha" and "mqa", the two forms of dense attention, and with an indexer "dsa": the
    indexer over every key, absorbed attention over the best index_topk. Projections are left out.
    """
    pair = pair_flops(args)
    flops = {"mha": pair["mha"] * context, "mqa": pair["mqa"] * context}
    if args.has_indexer:
        flops["dsa"] = pair["indexer"] * context + pair["mqa"] * min(args.index_topk, context)
    return {form: args.n_layers * count for form, count in flops.items()}


def mean_keys(seq_len: int, causal: bool, limit: int) -> float:
    """Return the mean number of keys that a query of a sequence attends to, at most `limit`."""
    most = min(limit, seq_len)
    return most - most * (most - 1) / (2 * seq_len) if causal else most


def forward_flops_per_token(args: ModelArgs, seq_len: int, causal: bool = True) -> float:
    """Return the FLOPs of one forward pass of the main model over seq_len tokens, per token.

    causal: count only the keys that a token may see, (seq_len + 1) / 2 on average; else all
    Attention is counted in its naive form; an indexer reads all keys, attention index_topk of them.
    """
    pair = pair_flops(args)
    limit = args.index_topk if args.has_indexer else seq_len
    attention = (pair["mha"] * mean_keys(seq_len, causal, limit)
                 + pair["indexer"] * mean_keys(seq_len, causal, seq_len))
    return 2 * count_parameters(args).active_without_embedding + args.n_layers * attention


def flops_per_token(args: ModelArgs, seq_len: int, causal: bool = True) -> float:
    """Return the training FLOPs per token, forward and backward."""
    return 3 * forward_flops_per_token(args, seq_len, causal)
