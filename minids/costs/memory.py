"""Estimate the GPU memory of training: how a model is sharded, and what each GPU then holds.

Source: DeepSeek-V3 (arXiv 2412.19437) section 3, whose recipe is the default.
"""

from dataclasses import dataclass
from typing import NamedTuple

from minids.base.fields import Settings, option, require
from minids.config import ModelArgs
from minids.costs.parameters import block_parts, mtp_join


@dataclass(frozen=True)
class Sharding(Settings):
    """Layout of training over GPUs, and bytes per element; the default is V3's recipe.

    The GPUs form `pipeline` ranks. The GPUs of a rank see different tokens; groups of
    expert_parallel share each layer's routed experts and replicate the rest (V3 section 3).
    """

    gpus: int = option(2048, "GPUs of the run", low=1)
    pipeline: int = option(16, "pipeline ranks", low=1)
    dualpipe: bool = option(True, "each rank holds two stages, one from either end (V3 3.2.1)")
    expert_parallel: int = option(64, "GPUs that share the routed experts of a layer", low=1)
    zero: int = option(1, "what replicas share: 0 nothing, 1 optimizer state, 2 gradients too, "
                          "3 weights too (FSDP)", (0, 1, 2, 3))
    micro_batch_tokens: int = option(4096, "tokens of a micro-batch on one GPU", low=1)
    recompute: str = option("v3", "what is computed twice: none; v3: norms, MLA's up-projections "
                                  "and SwiGLU (V3 3.2.3); block: all of a block",
                            ("none", "v3", "block"))
    weight_bytes: int = option(2, "bytes per weight; BF16 2, FP32 4", low=0)
    grad_bytes: int = option(4, "bytes per gradient", low=0)
    master_bytes: int = option(4, "bytes per weight of the optimizer's own copy; 0: none", low=0)
    moment_bytes: int = option(2, "bytes per element of each of AdamW's two moments", low=0)
    activation_bytes: int = option(2, "bytes per element saved for the backward pass", low=0)
    expert_input_bytes: int = option(1, "the same, with recompute = v3, for the inputs of experts "
                                        "and of SwiGLU; FP8 1", low=0)

    def __post_init__(self):
        super().__post_init__()
        require(self, "pipeline", self.gpus % self.pipeline == 0, f"a divisor of {self.gpus} GPUs")
        in_rank = self.gpus // self.pipeline
        require(self, "expert_parallel", in_rank % self.expert_parallel == 0,
                f"a divisor of the {in_rank} GPUs of a pipeline rank")
        require(self, "dualpipe", not self.dualpipe or self.pipeline % 2 == 0,
                f"false where pipeline = {self.pipeline} is odd")

    def check(self, args: ModelArgs) -> None:
        """Raise ValueError if the model cannot be split this way."""
        pieces = len(pipeline_pieces(args))
        require(self, "pipeline", self.pipeline <= pieces,
                f"at most {pieces}, for embedding, blocks and head")
        require(self, "expert_parallel", args.n_routed_experts % self.expert_parallel == 0,
                f"a divisor of n_routed_experts = {args.n_routed_experts}")

    def share(self, level: int, own: int, experts: int) -> int:
        """Return the elements on one GPU of a state that ZeRO splits from `level` on.

        own: elements that every replica has; experts: those of this GPU's routed experts
        """
        if self.zero < level:
            return own + experts
        replicas = self.gpus // self.pipeline * (2 if self.dualpipe else 1)
        return -(-own // replicas) + -(-experts * self.expert_parallel // replicas)


class Piece(NamedTuple):
    """Unit that a pipeline distributes: the embedding, a block, an MTP module or the head."""

    name: str
    own: int  # trained parameters outside the routed experts
    experts: int  # and inside
    layer: int | None = None  # index of the block, MTP modules continuing from n_layers


def pipeline_pieces(args: ModelArgs) -> list[Piece]:
    """Return the model's pieces in the order of the forward pass; gate biases are not trained."""
    table = args.vocab_size * args.dim
    names = [f"layer {n}" for n in range(args.n_layers)]
    names += [f"MTP {n + 1}" for n in range(args.n_mtp_layers)]
    pieces = [Piece("embedding", table, 0)]
    for layer, name in enumerate(names):
        parts = block_parts(args, layer, args.n_routed_experts)
        experts = parts.get("routed_experts", 0)
        biases = args.n_routed_experts * args.gate_bias * args.is_moe_layer(layer)
        join = mtp_join(args) if layer >= args.n_layers else 0
        pieces.append(Piece(name, sum(parts.values()) - experts - biases + join, experts, layer))
    return [*pieces, Piece("head", table + args.dim, 0)]


def saved_bytes(args: ModelArgs, layer: int, sharding: Sharding, recompute: str) -> int:
    """Return the bytes that block `layer` saves for the backward pass, per token.

    recompute: "none": inputs and outputs of both norms and of the norms on the latents, queries,
        keys, values, attention's output, the gate's scores, four elements per hidden unit of
        SwiGLU, and each activated expert's input and output
        "v3": the residual stream twice, the latents before their norms, attention's output, the
        gate's scores, two elements per hidden unit, and each expert's input (its gate's weight
        can scale the input of w2); "block": the block's input
    """
    if recompute == "block":
        return args.dim * sharding.activation_bytes
    latents = args.q_lora_rank + args.kv_lora_rank + args.qk_rope_head_dim
    values = args.n_heads * args.v_head_dim
    hidden, visits, scores = args.inter_dim, 0, 0
    if args.is_moe_layer(layer):
        hidden = args.moe_inter_dim * (args.n_shared_experts + args.n_activated_experts)
        visits, scores = args.n_activated_experts * args.dim, args.n_routed_experts
    if recompute == "v3":
        return (sharding.activation_bytes * (2 * args.dim + latents + values + scores)
                + sharding.expert_input_bytes * (2 * hidden + visits))
    heads = 2 * args.n_heads * args.qk_head_dim + 2 * values
    return sharding.activation_bytes * (4 * args.dim + 2 * latents + heads + scores
                                        + 4 * hidden + 2 * visits)


class Memory(NamedTuple):
    """Memory that training takes on one GPU, bytes."""

    rank: int  # pipeline rank, from 0
    holds: str  # the pieces of the model on that rank, in words
    parameters: int  # that this GPU computes with
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum of the four, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(args: ModelArgs, sharding: Sharding) -> Memory:
    """Return the training memory of a GPU of the fullest pipeline rank.

    Pieces go to the stages in order, in equal numbers where possible; a rank with an MTP module but
    without embedding or head has a copy. A rank holds the activations of pipeline - rank
    micro-batches (1F1B), or with DualPipe of pipeline + 1, half of them for each of its stages (V3
    table 2). Experts are assumed to be balanced.
    Left out: gate biases, FP8 scales, activations of embedding and head (logits, their gradient),
    attention scores, the indexer's activations, gradients before ZeRO splits them, communication
    buffers and other workspace, fragmentation, and the framework's own memory.
    Raises ValueError if the model cannot be split this way.
    """
    sharding.check(args)
    return max((rank_memory(args, sharding, rank) for rank in range(sharding.pipeline)),
               key=lambda memory: memory.total)


def stages_of(args: ModelArgs, sharding: Sharding, rank: int) -> list[list[Piece]]:
    """Return the stage of one pipeline rank, or with DualPipe its two stages."""
    pieces, count = pipeline_pieces(args), sharding.pipeline
    stages = [rank, count - 1 - rank] if sharding.dualpipe else [rank]
    return [pieces[len(pieces) * i // count:len(pieces) * (i + 1) // count] for i in stages]


def rank_memory(args: ModelArgs, sharding: Sharding, rank: int) -> Memory:
    """Return the memory of each GPU of one pipeline rank."""
    stages = stages_of(args, sharding, rank)
    pieces = [piece for stage in stages for piece in stage]
    names = {piece.name for piece in pieces}
    copies = len({"embedding", "head"} - names) if any("MTP" in name for name in names) else 0
    own = sum(piece.own for piece in pieces) + copies * args.vocab_size * args.dim
    experts = sum(piece.experts for piece in pieces) // sharding.expert_parallel
    weights = sharding.share(3, own, experts)
    if sharding.zero == 3:  # the piece at work is gathered
        weights += max(p.own + p.experts // sharding.expert_parallel for p in pieces)
    state = sharding.master_bytes + 2 * sharding.moment_bytes
    ends = [dict.fromkeys((stage[0].name, stage[-1].name)) for stage in stages]

    layers = [piece.layer for piece in pieces if piece.layer is not None]
    saved = sum(saved_bytes(args, layer, sharding, sharding.recompute) for layer in layers)
    saved = (saved * (sharding.pipeline + 1) // 2 if sharding.dualpipe
             else saved * (sharding.pipeline - rank))  # of all micro-batches in flight
    if sharding.recompute == "block":  # the block at work is whole
        saved += max((saved_bytes(args, layer, sharding, "none") for layer in layers), default=0)
    return Memory(
        rank, " and ".join(map(" to ".join, ends)), own + experts,
        sharding.weight_bytes * weights, sharding.grad_bytes * sharding.share(2, own, experts),
        state * sharding.share(1, own, experts), sharding.micro_batch_tokens * saved)
