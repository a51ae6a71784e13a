"""Count parameters: of a model, of the part that one token uses, of a released checkpoint.

Every count is exact and includes norm weights and the gates' selection biases. Source: DeepSeek-V3
(arXiv 2412.19437) sections 2 and 4.2, DeepSeek-V3.2 (arXiv 2512.02556) section 2 for the indexer.
"""

import math
from dataclasses import dataclass

from minids.config import ModelArgs

BLOCK = 128  # rows and columns of an FP8 weight that share one scale; elements of an FP8 vector
Shapes = dict[str, tuple[int, int]]  # matrix -> (out, in)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, and how many of them one token uses."""

    parts: dict[str, int]  # part -> parameters of the main model, without MTP
    active_parts: dict[str, int]  # part -> parameters that one token uses
    mtp: int  # that only the MTP modules have; they share embedding and head with the model
    mtp_stored: int  # as a released checkpoint stores them, with copies of embedding and head

    @property
    def total(self) -> int:
        """Return the sum of `parts`."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Return the sum of `active_parts`."""
        return sum(self.active_parts.values())

    @property
    def active_without_embedding(self) -> int:
        """Return `active` without the embedding, which is looked up and not multiplied."""
        return self.active - self.active_parts["embedding"]


def mlp_matrices(args: ModelArgs, width: int) -> Shapes:
    """Return the matrices of a SwiGLU layer with `width` hidden units."""
    return {"w1": (width, args.dim), "w2": (args.dim, width), "w3": (width, args.dim)}


def block_matrices(args: ModelArgs, layer: int) -> dict[str, Shapes]:
    """Return the matrices of block `layer` by part; of the routed experts, those of one.

    layer: index of the block; MTP modules continue from n_layers
    """
    query_width = args.n_heads * args.qk_head_dim
    queries = {"wq": (query_width, args.dim)}
    if args.q_lora_rank:
        queries = {"wq_a": (args.q_lora_rank, args.dim), "wq_b": (query_width, args.q_lora_rank)}
    parts = {"indexer": {}, "attention": queries | {  # V3 equations 1 to 11
        "wkv_a": (args.kv_lora_rank + args.qk_rope_head_dim, args.dim),
        "wkv_b": (args.n_heads * (args.qk_nope_head_dim + args.v_head_dim), args.kv_lora_rank),
        "wo": (args.dim, args.n_heads * args.v_head_dim)}}
    if args.has_indexer:  # V3.2 equation 1
        parts["indexer"] = {
            "wq_b": (args.index_n_heads * args.index_head_dim, args.q_lora_rank or args.dim),
            "wk": (args.index_head_dim, args.dim), "weights_proj": (args.index_n_heads, args.dim)}
    if not args.is_moe_layer(layer):
        return parts | {"dense_ffn": mlp_matrices(args, args.inter_dim)}
    return parts | {
        "routed_experts": mlp_matrices(args, args.moe_inter_dim),
        "shared_experts": mlp_matrices(args, args.n_shared_experts * args.moe_inter_dim),
        "gate": {"gate": (args.n_routed_experts, args.dim)}}


def block_parts(args: ModelArgs, layer: int, n_routed: int) -> dict[str, int]:
    """Return the parameters of block `layer` by part, counting `n_routed` of its routed experts."""
    parts = {part: sum(map(math.prod, shapes.values()))
             for part, shapes in block_matrices(args, layer).items()}
    parts["attention"] += args.q_lora_rank + args.kv_lora_rank  # norms of the latents
    parts["norms"] = 2 * args.dim
    if args.has_indexer:
        parts["indexer"] += 2 * args.index_head_dim  # a LayerNorm: weight and bias
    if args.is_moe_layer(layer):
        parts["routed_experts"] *= n_routed
        parts["gate"] += args.n_routed_experts * args.gate_bias
    return parts


def model_parts(args: ModelArgs, n_routed: int) -> dict[str, int]:
    """Return the main model's parameters by part, counting `n_routed` routed experts per layer."""
    table = args.vocab_size * args.dim
    parts = dict(embedding=table, head=table, attention=0, indexer=0, dense_ffn=0,
                 routed_experts=0, shared_experts=0, gate=0, norms=args.dim)  # the final norm
    for layer in range(args.n_layers):
        for part, count in block_parts(args, layer, n_routed).items():
            parts[part] += count
    return parts


def mtp_join(args: ModelArgs) -> int:
    """Return an MTP module's parameters outside its block: eh_proj and three norms (V3 eq. 21)."""
    return 2 * args.dim * args.dim + 3 * args.dim


def count_parameters(args: ModelArgs) -> ParameterCount:
    """Count parameters; for the preset "v3": total 671,026,419,200, active 37,552,297,472."""
    block = block_parts(args, args.n_layers, args.n_routed_experts)
    mtp = args.n_mtp_layers * (sum(block.values()) + mtp_join(args))
    copies = args.n_mtp_layers * 2 * args.vocab_size * args.dim
    return ParameterCount(parts=model_parts(args, args.n_routed_experts),
                          active_parts=model_parts(args, args.n_activated_experts),
                          mtp=mtp, mtp_stored=mtp + copies)


def scale_blocks(rows: int, columns: int) -> int:
    """Return the scales of an FP8 matrix; a partial block has its own (576 rows make 5 blocks)."""
    return -(-rows // BLOCK) * -(-columns // BLOCK)


def fp8_elements(args: ModelArgs, layer: int, n_routed: int) -> tuple[int, int]:
    """Count a block's elements in FP8 in V3's format, and their scales, with n_routed experts."""
    fp8 = scales = 0
    for part, shapes in block_matrices(args, layer).items():
        copies = n_routed if part == "routed_experts" else 1
        for name in shapes.keys() - {"gate", "weights_proj"}:
            fp8 += copies * math.prod(shapes[name])
            scales += copies * scale_blocks(*shapes[name])
    return fp8, scales


def stored_elements(args: ModelArgs) -> tuple[dict[str, int], int]:
    """Count what a checkpoint stores in V3's format, MTP modules and their copies included.

    Returns type, as safetensors names it -> elements, and how many of them are scales; for "v3"
    684,531,386,000 in all. All matrices are FP8 with an FP32 scale per 128 x 128 block, except
    embedding, head, gate weights, eh_proj and weights_proj: these and the norms are BF16, gate
    biases FP32. The type of the indexer's k_norm is not documented; taken as that of a norm.
    """
    fp8 = scales = biases = 0
    for layer in range(args.n_layers + args.n_mtp_layers):
        biases += args.is_moe_layer(layer) * args.gate_bias * args.n_routed_experts
        for_block = fp8_elements(args, layer, args.n_routed_experts)
        fp8, scales = fp8 + for_block[0], scales + for_block[1]
    count = count_parameters(args)
    bf16 = count.total + count.mtp_stored - fp8 - biases
    return {"F8_E4M3": fp8, "BF16": bf16, "F32": biases + scales}, scales
