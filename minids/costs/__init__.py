"""Costs: what a model weighs, what one token costs, and what its training costs, by arithmetic.

    python -m minids.costs --preset v3
    python -m minids.costs --preset v3.2 --seq-len 131072
    python -m minids.costs --preset v3 --tokens 1e12 --gpus 512 --gpu-memory 141 --gpu-price 3.5
    python -m minids.costs --preset v3.2 --prompt-tokens 100000 --output-tokens 2000
    python -m minids.costs --preset v3 --n-routed-experts 384 --n-expert-groups 1 \\
        --n-limited-groups 1

Nothing is built and torch is not imported, so that the 671B model is counted in a blink on any
machine. The counts are exact and include norm weights and the gates' selection biases; the FLOPs
follow the usual rule of two per weight and token forward and twice that backward. Training is
spread as V3's was where that fits the GPUs, else in the first way that does; a flag fixes any of
it, such as --pipeline.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1 and table 1 for the cache, DeepSeek-V3
(arXiv 2412.19437) sections 2 and 4.2 for the shapes, section 3 for the training recipe and table 1
for the bill, "Insights into DeepSeek-V3" (arXiv 2505.09343) tables 1 and 2, whose cache bytes and
FLOPs per token come out here, and DeepSeek-V3.2 (arXiv 2512.02556) section 2 for the indexer.
Simplified: FLOPs leave out softmax, norms as such, the MTP modules and recomputation;
`training_memory` says what it leaves out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from minids.base.command_line import parse
from minids.base.fields import check_types, option, require
from minids.base.tables import format_table
from minids.config import ModelArgs

BLOCK = 128  # rows and columns that share one scale in an FP8 weight, numbers in an FP8 vector
DTYPE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}  # by the names that safetensors has for them
V3_GPU_HOURS = {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}
# What R1 added, on 512 H800, as reported beside the Nature version (645:633).
R1_GPU_HOURS = {"R1-Zero": 101_000, "R1": 41_000, "data for fine-tuning": 5_000}
V3_TOKENS = 14.8e12  # of pre-training


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, and how many of them one token meets.

    parts: part -> parameters of the main model, without MTP; the parts add up to `total`
    active_parts: part -> those that one token meets; they add up to `active`
    mtp: parameters that only the MTP modules have; embedding and head are the main model's
    mtp_stored: the same as a released checkpoint stores it, with its copies of both
    """

    parts: dict[str, int]
    active_parts: dict[str, int]
    mtp: int
    mtp_stored: int

    @property
    def total(self) -> int:
        """The main model, with norms and gate biases."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """What one token meets, embedding and head included."""
        return sum(self.active_parts.values())

    @property
    def active_without_embedding(self) -> int:
        """The head counted (it is multiplied), the embedding not (it is looked up)."""
        return self.active - self.active_parts["embedding"]

    @property
    def active_without_both(self) -> int:
        """The blocks and the final norm."""
        return self.active_without_embedding - self.active_parts["head"]


Shapes = dict[str, tuple[int, int]]  # matrix -> (out, in)


def attention_matrices(args: ModelArgs) -> Shapes:
    """The matrices of one MLA layer (V3 equations 1 to 11)."""
    query_width = args.n_heads * args.qk_head_dim
    queries = {"wq": (query_width, args.dim)}
    if args.q_lora_rank:
        queries = {"wq_a": (args.q_lora_rank, args.dim), "wq_b": (query_width, args.q_lora_rank)}
    return queries | {
        "wkv_a": (args.kv_lora_rank + args.qk_rope_head_dim, args.dim),
        "wkv_b": (args.n_heads * (args.qk_nope_head_dim + args.v_head_dim), args.kv_lora_rank),
        "wo": (args.dim, args.n_heads * args.v_head_dim)}


def indexer_matrices(args: ModelArgs) -> Shapes:
    """The matrices of one layer's lightning indexer (V3.2 equation 1); none without one."""
    if not args.has_indexer:
        return {}
    return {"wq_b": (args.index_n_heads * args.index_head_dim, args.q_lora_rank or args.dim),
            "wk": (args.index_head_dim, args.dim), "weights_proj": (args.index_n_heads, args.dim)}


def mlp_matrices(args: ModelArgs, width: int) -> Shapes:
    """The matrices of a SwiGLU layer with `width` hidden numbers."""
    return {"w1": (width, args.dim), "w2": (args.dim, width), "w3": (width, args.dim)}


def size(shapes: Shapes) -> int:
    """Parameters of some matrices."""
    return sum(rows * columns for rows, columns in shapes.values())


def block_parts(args: ModelArgs, layer: int, n_routed: int) -> dict[str, int]:
    """Parameters of block `layer` by part, with `n_routed` routed experts counted in it."""
    latent_norms = args.q_lora_rank + args.kv_lora_rank
    k_norm = 2 * args.index_head_dim if args.has_indexer else 0  # a LayerNorm: weight and bias
    parts = {"attention": size(attention_matrices(args)) + latent_norms, "norms": 2 * args.dim,
             "indexer": size(indexer_matrices(args)) + k_norm}
    if not args.is_moe_layer(layer):
        return parts | {"dense_ffn": size(mlp_matrices(args, args.inter_dim))}
    expert = size(mlp_matrices(args, args.moe_inter_dim))
    gate = args.n_routed_experts * (args.dim + args.gate_bias)
    return parts | {"routed_experts": n_routed * expert,
                    "shared_experts": args.n_shared_experts * expert, "gate": gate}


def model_parts(args: ModelArgs, n_routed: int) -> dict[str, int]:
    """Parameters of the main model by part, with `n_routed` routed experts counted in a layer."""
    table = args.vocab_size * args.dim
    parts = dict(embedding=table, head=table, attention=0, indexer=0, dense_ffn=0,
                 routed_experts=0, shared_experts=0, gate=0, norms=args.dim)  # the final norm
    for layer in range(args.n_layers):
        for part, count in block_parts(args, layer, n_routed).items():
            parts[part] += count
    return parts


def mtp_join(args: ModelArgs) -> int:
    """What an MTP module has beside its block: eh_proj, enorm, hnorm and norm (V3 equation 21)."""
    return 2 * args.dim * args.dim + 3 * args.dim


def count_parameters(args: ModelArgs) -> ParameterCount:
    """Count the parameters of a configuration.

    For the preset "v3": total 671,026,419,200, active 37,552,297,472.
    """
    block = block_parts(args, args.n_layers, args.n_routed_experts)
    mtp = args.n_mtp_layers * (sum(block.values()) + mtp_join(args))
    copies = args.n_mtp_layers * 2 * args.vocab_size * args.dim
    return ParameterCount(parts=model_parts(args, args.n_routed_experts),
                          active_parts=model_parts(args, args.n_activated_experts),
                          mtp=mtp, mtp_stored=mtp + copies)


@dataclass(frozen=True)
class Stored:
    """What a checkpoint in the released FP8 format holds.

    elements: F8_E4M3, BF16 and F32 -> numbers stored in it; the scales are among F32
    scales: one FP32 number for each block of 128 x 128 of an FP8 matrix
    """

    elements: dict[str, int]
    scales: int

    @property
    def total(self) -> int:
        """Everything stored; for "v3" 684,531,386,000."""
        return sum(self.elements.values())

    @property
    def bytes(self) -> int:
        """Size of the tensors, bytes."""
        return sum(DTYPE_BYTES[dtype] * count for dtype, count in self.elements.items())


def fp8_matrices(args: ModelArgs, layer: int) -> list[tuple[int, int]]:
    """(out, in) of each FP8 matrix of block `layer`: all but the gate and weights_proj."""
    indexer = indexer_matrices(args)
    indexer.pop("weights_proj", None)
    shapes = [*attention_matrices(args).values(), *indexer.values()]
    if not args.is_moe_layer(layer):
        return shapes + [*mlp_matrices(args, args.inter_dim).values()]
    shared = mlp_matrices(args, args.n_shared_experts * args.moe_inter_dim)
    expert = mlp_matrices(args, args.moe_inter_dim)
    return shapes + [*shared.values()] + [*expert.values()] * args.n_routed_experts


def scale_blocks(rows: int, columns: int) -> int:
    """Scales of an FP8 matrix; a ragged edge has its own (wkv_a of V3: 576 rows, 5 blocks)."""
    return -(-rows // BLOCK) * -(-columns // BLOCK)


def stored_elements(args: ModelArgs) -> Stored:
    """What a checkpoint stores in V3's format, MTP modules and their copies included.

    Embedding, head, gate weights, norms, eh_proj and the indexer's weights_proj are BF16, gate
    biases and scales FP32, every other matrix FP8. Where the indexer's k_norm is stored is not
    documented: it is counted with the other norms, which changes no total.
    """
    blocks = range(args.n_layers + args.n_mtp_layers)
    shapes = [shape for layer in blocks for shape in fp8_matrices(args, layer)]
    fp8 = sum(rows * columns for rows, columns in shapes)
    scales = sum(scale_blocks(*shape) for shape in shapes)
    biases = args.gate_bias * args.n_routed_experts * sum(map(args.is_moe_layer, blocks))
    count = count_parameters(args)
    bf16 = count.total + count.mtp_stored - fp8 - biases
    return Stored({"F8_E4M3": fp8, "BF16": bf16, "F32": biases + scales}, scales)


def pair_flops(args: ModelArgs) -> dict[str, int]:
    """FLOPs that one query spends on one key in one layer, by form of attention.

    Returns "mha" (naive: each head its key and value), "mqa" (absorbed: each head the latent) and
    "indexer" (0 without one). For "v3.2": 81,920, 278,528 and 16,384.
    """
    latent = args.kv_lora_rank + args.qk_rope_head_dim
    return {"mha": 2 * args.n_heads * (args.qk_head_dim + args.v_head_dim),
            "mqa": 2 * args.n_heads * (latent + args.kv_lora_rank),
            "indexer": 2 * args.index_n_heads * args.index_head_dim}


def attention_flops(args: ModelArgs, context: int) -> dict[str, int]:
    """FLOPs of attention for one query that sees `context` keys, over all layers.

    Returns "mha" and "mqa", the two forms of dense attention, and with an indexer "dsa": every key
    through the indexer, the index_topk best through absorbed attention. Projections not included.
    """
    pair = pair_flops(args)
    flops = {"mha": pair["mha"] * context, "mqa": pair["mqa"] * context}
    if args.has_indexer:
        flops["dsa"] = pair["indexer"] * context + pair["mqa"] * min(args.index_topk, context)
    return {form: args.n_layers * count for form, count in flops.items()}


def mean_keys(seq_len: int, causal: bool, limit: int) -> float:
    """Keys that a query attends to, the mean over a sequence; at most `limit` of those it sees."""
    most = min(limit, seq_len)
    return most - most * (most - 1) / (2 * seq_len) if causal else most


def forward_flops_per_token(args: ModelArgs, seq_len: int, causal: bool = True) -> float:
    """Floating-point operations of one forward pass of the main model, per token.

    seq_len: context, tokens
    causal: count the keys that a token may see, (seq_len + 1) / 2 on average; else all of them
    Attention is counted in its naive form; with an indexer over index_topk keys at most, and the
    indexer over all of them.
    """
    pair = pair_flops(args)
    limit = args.index_topk if args.has_indexer else seq_len
    attention = (pair["mha"] * mean_keys(seq_len, causal, limit)
                 + pair["indexer"] * mean_keys(seq_len, causal, seq_len))
    return 2 * count_parameters(args).active_without_embedding + args.n_layers * attention


def flops_per_token(args: ModelArgs, seq_len: int, causal: bool = True) -> float:
    """Training FLOPs per token: forward, and twice that backward (arguments as for forward)."""
    return 3 * forward_flops_per_token(args, seq_len, causal)


def cache_bytes_per_token(args: ModelArgs, bytes_per_element: int = 2,
                          n_groups: int = 8) -> dict[str, int]:
    """Bytes of key-value cache per token over all layers, by form of attention.

    bytes_per_element: width of a stored number, bytes; BF16 is 2
    n_groups: key-value heads of GQA; n_heads at most are counted
    Returns "mla" (latent and shared rotated key), "mha", "gqa" and "mqa" (every head's, every
    group's, one key and value, of widths qk_nope_head_dim and v_head_dim), and with an indexer
    "indexer" (its keys, beside those of "mla"). For "v3": mla 70272, mha 3997696.
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
    """Bytes per token and layer of the caches as DeepSeek deploys them.

    The latent and the indexer's key are FP8 with an FP32 scale for 128 numbers, the rotated key
    BF16. For "v3.2": mla 656, indexer 132.
    """
    def fp8(width: int) -> int:
        return width + 4 * -(-width // BLOCK)
    cache = {"mla": fp8(args.kv_lora_rank) + 2 * args.qk_rope_head_dim}
    return cache | ({"indexer": fp8(args.index_head_dim)} if args.has_indexer else {})


class Drafting(NamedTuple):
    """What a round of speculative decoding yields and costs (V3 section 5.4.3).

    tokens: of each sequence, the mean
    check, draft: weights that the model reads to check the drafts, and the modules to make them
    plain: weights that the model reads for a token of each sequence without drafts
    """

    tokens: float
    check: float
    draft: float
    plain: float

    @property
    def speedup(self) -> float:
        """How many times as many tokens a second, where reading weights takes all the time."""
        return self.tokens * self.plain / (self.check + self.draft)


def weights_read(parts: dict[str, int], args: ModelArgs, tokens: int) -> float:
    """Weights that a pass over so many tokens reads, given the parts with all experts counted.

    Of the experts those that at least one token visits, as if tokens chose independently and
    evenly; the embedding is looked up.
    """
    visited = 1 - (1 - args.n_activated_experts / max(args.n_routed_experts, 1)) ** tokens
    shares = {"routed_experts": visited, "embedding": 0}
    return sum(count * shares.get(part, 1) for part, count in parts.items())


def drafting(args: ModelArgs, acceptance: float, drafts: int = 1, batch: int = 1,
             call: float = 0, row: float = 0) -> Drafting:
    """The cost of decoding with an MTP module's drafts: depth, draft block, head, experts read.

    acceptance: share of the drafts that pass, each of those whose predecessors have passed
    drafts: tokens drafted in a round; batch: sequences decoded together
    call, row: what it takes to start the operations of one block, and what each further token of a
        pass adds there, as weights that could be read in the meantime; 0 for a large model
    Beyond that, reading weights is what takes the time, as it is until a batch is large enough to
    keep the arithmetic busy. For "v3" and 0.85: 1.16 times as fast alone, 1.82 in a batch of 256.
    """
    model = model_parts(args, args.n_routed_experts)
    block = block_parts(args, args.n_layers, args.n_routed_experts)
    module = block | {"join": mtp_join(args), "head": model["head"]}

    def blocks(tokens: int) -> float:
        return call + row * (tokens - 1)

    def whole(tokens: int) -> float:
        return weights_read(model, args, tokens) + args.n_layers * blocks(tokens)

    first, further = (weights_read(module, args, tokens) + blocks(tokens)
                      for tokens in (batch * (drafts + 1), batch))
    return Drafting(sum(acceptance ** k for k in range(drafts + 1)), whole(batch * (drafts + 1)),
                    first + (drafts - 1) * further, whole(batch))


@dataclass(frozen=True)
class Sharding:
    """How training is spread over GPUs, and the bytes of what they hold; V3's recipe by default.

    The GPUs form `pipeline` ranks. Those of one rank see different tokens; expert_parallel of them
    share each layer's routed experts between them, and all else they hold alike (V3 section 3).
    """

    gpus: int = option(2048, "GPUs of the run")
    pipeline: int = option(16, "pipeline ranks")
    dualpipe: bool = option(True, "each rank holds two stages, one from either end (V3 3.2.1)")
    expert_parallel: int = option(64, "GPUs that share the routed experts of a layer")
    zero: int = option(1, "what replicas share: 0 nothing, 1 optimizer state, 2 gradients too, "
                          "3 weights too (FSDP)", (0, 1, 2, 3))
    micro_batch_tokens: int = option(4096, "tokens of a micro-batch on one GPU")
    recompute: str = option("v3", "what is computed twice: none; v3: norms, MLA's up-projections "
                                  "and SwiGLU (V3 3.2.3); block: all of a block",
                            ("none", "v3", "block"))
    weight_bytes: int = option(2, "bytes of a weight; BF16 2, FP32 4")
    grad_bytes: int = option(4, "bytes of a gradient")
    master_bytes: int = option(4, "bytes of the optimizer's own copy of a weight; 0: none")
    moment_bytes: int = option(2, "bytes of each of AdamW's two moments")
    activation_bytes: int = option(2, "bytes of a number kept for the backward pass")
    expert_input_bytes: int = option(1, "the same, with recompute = v3, for the inputs of experts "
                                        "and of SwiGLU; FP8 1")

    def __post_init__(self):
        check_types(self)
        for name in "gpus pipeline expert_parallel micro_batch_tokens".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("weight_bytes grad_bytes master_bytes moment_bytes activation_bytes "
                     "expert_input_bytes").split():
            require(self, name, getattr(self, name) >= 0, "0 or more")
        require(self, "pipeline", self.gpus % self.pipeline == 0, f"a divisor of {self.gpus} GPUs")
        in_rank = self.gpus // self.pipeline
        require(self, "expert_parallel", in_rank % self.expert_parallel == 0,
                f"a divisor of the {in_rank} GPUs of a pipeline rank")
        require(self, "dualpipe", not self.dualpipe or self.pipeline % 2 == 0,
                f"false where pipeline = {self.pipeline} is odd")

    def check(self, args: ModelArgs) -> None:
        """Raise ValueError if a model cannot be split so."""
        pieces = len(pipeline_pieces(args))
        require(self, "pipeline", self.pipeline <= pieces,
                f"at most {pieces}, for embedding, blocks and head")
        require(self, "expert_parallel", args.n_routed_experts % self.expert_parallel == 0,
                f"a divisor of n_routed_experts = {args.n_routed_experts}")

    @property
    def replicas(self) -> int:
        """GPUs that hold the same stage."""
        return self.gpus // self.pipeline * (2 if self.dualpipe else 1)

    def share(self, level: int, own: int, experts: int) -> int:
        """Numbers on one GPU of what ZeRO splits at `level`.

        own: of what every replica holds; experts: of this GPU's routed experts
        """
        if self.zero < level:
            return own + experts
        return -(-own // self.replicas) + -(-experts * self.expert_parallel // self.replicas)


class Piece(NamedTuple):
    """What a pipeline deals out: the embedding, a block, an MTP module, the head.

    own, experts: trained parameters outside and inside the routed experts
    layer: the block's number, MTP modules counting on from n_layers; None for embedding and head
    """

    name: str
    own: int
    experts: int
    layer: int | None = None


def pipeline_pieces(args: ModelArgs) -> list[Piece]:
    """The model in the order of the forward pass; gate biases are not trained and not in it."""
    table = args.vocab_size * args.dim
    blocks = [block_piece(args, layer) for layer in range(args.n_layers + args.n_mtp_layers)]
    return [Piece("embedding", table, 0), *blocks, Piece("head", table + args.dim, 0)]


def block_piece(args: ModelArgs, layer: int) -> Piece:
    """Block `layer`, or the MTP module that it belongs to."""
    parts = block_parts(args, layer, args.n_routed_experts)
    experts = parts.get("routed_experts", 0)
    biases = args.n_routed_experts * args.gate_bias * args.is_moe_layer(layer)
    own = sum(parts.values()) - experts - biases
    if layer < args.n_layers:
        return Piece(f"layer {layer}", own, experts, layer)
    return Piece(f"MTP {layer - args.n_layers + 1}", own + mtp_join(args), experts, layer)


def kept_bytes(args: ModelArgs, layer: int, sharding: Sharding, recompute: str) -> int:
    """Bytes that one token leaves in block `layer` for the backward pass.

    none: inputs and outputs of both norms, both sides of the norms on the latents, queries, keys,
        values, attention's output, the gate's scores, four numbers for each hidden one of SwiGLU,
        and for each activated expert its input and its output
    v3: of these the residual stream twice, the latents before their norms, attention's output, the
        gate's scores, two numbers for each hidden one of SwiGLU, and each expert's input; what an
        expert gives is not kept (its gate's weight can multiply what goes into w2)
    block: the block's input
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


@dataclass(frozen=True)
class Memory:
    """What training takes on one GPU, bytes.

    rank: its place in the pipeline, from 0; holds: what lies there, in words
    parameters: how many of the model's this GPU computes with
    """

    rank: int
    holds: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All four together, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(args: ModelArgs, sharding: Sharding) -> Memory:
    """Memory of a GPU of the fullest pipeline rank while the model trains.

    Pieces (embedding, blocks, MTP modules, head) go to the stages in order, as evenly as their
    number allows; a rank with an MTP module but without embedding or head has a copy. A rank keeps
    the activations of pipeline - rank micro-batches (1F1B), or with DualPipe of pipeline + 1, half
    of them of either stage (V3 table 2). Experts are taken to be balanced.
    Left out: gate biases, FP8 scales, what embedding and head keep (logits, their gradient),
    attention scores, the indexer's activations, gradients before ZeRO splits them, communication
    buffers and other workspace, fragmentation, and what the framework itself takes.
    Raises ValueError where the model cannot be split so.
    """
    sharding.check(args)
    return max((rank_memory(args, sharding, rank) for rank in range(sharding.pipeline)),
               key=lambda memory: memory.total)


def stages_of(args: ModelArgs, sharding: Sharding, rank: int) -> list[list[Piece]]:
    """The stage of one rank, or with DualPipe its two."""
    pieces, count = pipeline_pieces(args), sharding.pipeline
    bounds = [len(pieces) * i // count for i in range(count + 1)]
    stages = [pieces[start:end] for start, end in pairwise(bounds)]
    return [stages[rank]] + ([stages[-1 - rank]] if sharding.dualpipe else [])


def rank_memory(args: ModelArgs, sharding: Sharding, rank: int) -> Memory:
    """Memory of each GPU of one pipeline rank (see `training_memory`)."""
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
    return Memory(
        rank, " and ".join(describe(stage) for stage in stages), own + experts,
        sharding.weight_bytes * weights, sharding.grad_bytes * sharding.share(2, own, experts),
        state * sharding.share(1, own, experts), activation_bytes(args, sharding, rank, pieces))


def activation_bytes(args: ModelArgs, sharding: Sharding, rank: int, pieces: list[Piece]) -> int:
    """What the micro-batches in flight keep on one GPU, and the block that is computed again."""
    layers = [piece.layer for piece in pieces if piece.layer is not None]

    def kept(recompute: str) -> list[int]:
        return [kept_bytes(args, layer, sharding, recompute) for layer in layers]
    per_token = sum(kept(sharding.recompute))
    if sharding.dualpipe:
        per_token = per_token * (sharding.pipeline + 1) // 2
    else:
        per_token *= sharding.pipeline - rank
    again = max(kept("none"), default=0) if sharding.recompute == "block" else 0
    return sharding.micro_batch_tokens * (per_token + again)


def describe(stage: list[Piece]) -> str:
    """A stage by its first and last piece."""
    first, last = stage[0].name, stage[-1].name
    return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class Rental:
    """GPUs rented by the hour."""

    gpu: str = option("H800", "name of the GPU")
    gpu_memory: float = option(80.0, "memory of one, GB of 10^9 bytes")
    gpu_peak: float = option(989.5, "peak in BF16 of one, TFLOPS")
    gpu_price: float = option(2.0, "price of one, USD an hour")
    mfu: float = option(0.39, "share of the peak that training reaches")

    def __post_init__(self):
        check_types(self)
        for name in "gpu_memory gpu_peak".split():
            require(self, name, getattr(self, name) > 0, "above 0")
        require(self, "gpu_price", self.gpu_price >= 0, "0 or more")
        require(self, "mfu", 0 < self.mfu <= 1, "above 0 and at most 1")


@dataclass(frozen=True)
class Bill:
    """Time and money.

    gpu_hours: one GPU's hours that the work takes; gpus: how many share it; price: USD an hour
    """

    gpu_hours: float
    gpus: int
    price: float

    @property
    def days(self) -> float:
        """From start to end, if no GPU ever waits."""
        return self.gpu_hours / self.gpus / 24

    @property
    def dollars(self) -> float:
        """USD."""
        return self.gpu_hours * self.price


def training_bill(work: float, tokens: float, gpus: int, rental: Rental) -> Bill:
    """The bill for a number of tokens; `work` is `flops_per_token`, in FLOPs."""
    hours = tokens * work / (rental.gpu_peak * 1e12 * rental.mfu * 3600)
    return Bill(hours, gpus, rental.gpu_price)


def teraflops(work: float, tokens: float, gpu_hours: float) -> float:
    """What one GPU achieved, TFLOPS; divided by the peak it is the MFU (arguments as above)."""
    return work * tokens / (gpu_hours * 3600) / 1e12


@dataclass(frozen=True)
class Prices:
    """What a service asks for a million tokens."""

    prompt_price: float = option(0.0, "prompt, USD per million tokens")
    cached_price: float = option(0.0, "prompt that the cache holds already, USD per million tokens")
    output_price: float = option(0.0, "output, USD per million tokens")

    def __post_init__(self):
        check_types(self)
        for name in "prompt_price cached_price output_price".split():
            require(self, name, getattr(self, name) >= 0, "0 or more")


# What serving costs at position 128K on rented H800 at 2 USD an hour: V3.2-Exp report, figure 3,
# read off the plot. It does not say what a cached prompt costs: taken as any other.
SERVING_128K = {"dense (V3.1-Terminus)": Prices(0.66, 0.66, 2.15),
                "DSA (V3.2-Exp)": Prices(0.19, 0.19, 0.25)}


def api_price(prompt_tokens: int, cached_tokens: int, output_tokens: int, prices: Prices) -> float:
    """What a workload costs, USD.

    prompt_tokens: of all prompts; cached_tokens: how many of these the service had in its cache
    output_tokens: of all answers, thoughts included
    """
    if not 0 <= cached_tokens <= prompt_tokens:
        raise ValueError(f"cached_tokens = {cached_tokens} is not valid: it must be between 0 and "
                         f"prompt_tokens = {prompt_tokens}")
    if output_tokens < 0:
        raise ValueError(f"output_tokens = {output_tokens} is not valid: it must be 0 or more")
    return ((prompt_tokens - cached_tokens) * prices.prompt_price
            + cached_tokens * prices.cached_price + output_tokens * prices.output_price) / 1e6


@dataclass(frozen=True)
class Plan:
    """Whether a training run fits on rented GPUs, how long it takes and what it costs.

    fits: without what `training_memory` leaves out, so leave some room
    """

    sharding: Sharding
    memory: Memory
    fits: bool
    bill: Bill


def plan(args: ModelArgs, tokens: float, rental: Rental, sharding: Sharding,
         seq_len: int = 4096) -> Plan:
    """Plan a training run of `tokens` tokens in sequences of seq_len, FLOPs counted causally."""
    memory = training_memory(args, sharding)
    bill = training_bill(flops_per_token(args, seq_len), tokens, sharding.gpus, rental)
    return Plan(sharding, memory, memory.total <= rental.gpu_memory * 1e9, bill)


def layouts(args: ModelArgs, gpus: int, given: dict) -> Iterator[Sharding]:
    """The valid ways to spread a model: V3's own, then from few splits to many.

    given: fields of Sharding that are fixed
    """
    plain = [dict(pipeline=pipeline, expert_parallel=experts, zero=zero, dualpipe=False)
             for zero in (1, 3)
             for pipeline in divisors(gpus, len(pipeline_pieces(args)))
             for experts in divisors(gpus // pipeline, max(args.n_routed_experts, 1))]
    for choice in [{}, *plain]:
        try:
            sharding = Sharding(**choice | {"gpus": gpus} | given)
            sharding.check(args)
        except ValueError:
            continue
        yield sharding


def divisors(number: int, most: int) -> Iterable[int]:
    """Divisors of a number up to `most`."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def choose_sharding(args: ModelArgs, gpus: int, rental: Rental, **given) -> Sharding:
    """The first of `layouts` that fits into the rented GPUs, or else the one that needs least.

    given: fields of Sharding that are fixed. Raises ValueError where no layout has them.
    """
    best = None
    for sharding in layouts(args, gpus, given):
        need = training_memory(args, sharding).total
        if need <= rental.gpu_memory * 1e9:
            return sharding
        if best is None or need < best[0]:
            best = need, sharding
    if best is None:
        one = dict(gpus=gpus, pipeline=1, expert_parallel=1, dualpipe=False)
        Sharding(**one | given).check(args)  # says what is wrong with them
    return best[1]


@dataclass(frozen=True)
class CostArgs:
    """What to count."""

    preset: str = option("v3", "model: " + ", ".join(ModelArgs.presets()))
    seq_len: int = option(0, "context, tokens; 0 takes the trained one, before YaRN stretches it")
    n_groups: int = option(8, "key-value heads of the GQA that the cache is compared with")
    acceptance: float = option(0.85, "share of the MTP module's drafts that pass; V3: 0.85 to 0.9")
    tokens: float = option(V3_TOKENS, "tokens to train on; V3 had 14.8e12")
    prompt_tokens: int = option(0, "an API workload to price: tokens of all prompts")
    cached_tokens: int = option(0, "of these, tokens that the service has in its cache")
    output_tokens: int = option(0, "the same workload: tokens of all answers")

    def __post_init__(self):
        check_types(self)
        require(self, "seq_len", self.seq_len >= 0, "0 or more")
        require(self, "n_groups", self.n_groups >= 1, "at least 1")
        require(self, "acceptance", 0 <= self.acceptance <= 1, "between 0 and 1")
        require(self, "tokens", self.tokens > 0, "above 0")


BLANK = ("",) * 4  # an empty row of the table


def section(title: str, columns: tuple, rows: list) -> list:
    """A blank row, a heading with the columns' titles, and the rows, indented and filled up."""
    def fill(cells: tuple) -> tuple:
        return (*cells, *BLANK[len(cells):])
    return [BLANK, fill((title, *columns)),
            *("  " + row if isinstance(row, str) else fill(("  " + row[0], *row[1:]))
              for row in rows)]


def scaled(amount: float, unit: str, step: int = 1000) -> str:
    """An amount of "B", say, with a prefix: 70272 -> '70.27 KB', with step 1024 '68.62 KiB'."""
    prefixes = ["", "K", "M", "G", "T", "P"]
    while amount >= step and len(prefixes) > 1:
        amount, prefixes = amount / step, prefixes[1:]
    return f"{amount:.2f} {prefixes[0]}{'i' if prefixes[0] and step == 1024 else ''}{unit}"


def parameter_rows(args: ModelArgs) -> list:
    """What the model consists of."""
    count = count_parameters(args)
    parts = [(part.replace("_", " "), n, count.active_parts[part],
              f"{count.active_parts[part] / count.active:.1%}")
             for part, n in count.parts.items() if n]
    mtp = [("",), ("MTP modules", count.mtp),
           ("MTP as stored, with copies of both", count.mtp_stored),
           ("main model and MTP as stored", count.total + count.mtp_stored)]
    return section("Parameters", ("total", "active", "of the active"), [
        *parts, ("",), ("all", count.total, count.active, "100.0%"),
        ("all without embedding", "", count.active_without_embedding),
        ("all without embedding and head", "", count.active_without_both),
        *(mtp if args.n_mtp_layers else [])])


def checkpoint_rows(args: ModelArgs) -> list:
    """What a checkpoint in the released format holds."""
    stored = stored_elements(args)
    what = {"F8_E4M3": "F8_E4M3: most matrices", "BF16": "BF16: embedding, head, gates, norms",
            "F32": f"F32: {stored.scales:,} scales, gate biases"}
    rows = [(what[dtype], n, scaled(DTYPE_BYTES[dtype] * n, "B"))
            for dtype, n in stored.elements.items()]
    return section("Checkpoint in FP8" + ", MTP included" * (args.n_mtp_layers > 0),
                   ("numbers", "size"), [*rows, ("all", stored.total, scaled(stored.bytes, "B"))])


def flops_rows(args: ModelArgs, seq_len: int) -> list:
    """Arithmetic of one token: of the model, and of attention as the context grows."""
    forms = {"mha": "dense, naive", "mqa": "dense, absorbed", "dsa": "DSA"}
    longest = max(args.max_seq_len, seq_len)
    contexts = sorted({seq_len, *(2 ** n for n in range(11, 18, 2) if 2 ** n <= longest)})
    used = tuple(forms[form] for form in attention_flops(args, seq_len))
    growth = [(f"{context:,} keys, all layers", *attention_flops(args, context).values())
              for context in contexts]
    each = ("one key in one layer" + "; DSA: the indexer" * args.has_indexer,
            *(flops for flops in pair_flops(args).values() if flops))
    return [
        *section(f"FLOPs per token, {seq_len:,} tokens", ("causal", "non-causal"), [
            (name, round(f(args, seq_len)), round(f(args, seq_len, causal=False)))
            for name, f in [("training", flops_per_token), ("forward", forward_flops_per_token)]]),
        *section("FLOPs of attention, one query", used, [each, *growth])]


def cache_rows(args: ModelArgs, seq_len: int, n_groups: int) -> list:
    """What one token leaves in the cache, and a long request."""
    length = max(seq_len, min(args.max_seq_len, 131072))
    cache, fp8 = cache_bytes_per_token(args, n_groups=n_groups), fp8_cache_bytes_per_layer(args)

    def row(label: str, size: int) -> tuple:
        return label, size, f"{size / cache['mla']:.2f}", scaled(size * length, "B", 1024)
    names = {"mla": "MLA", "mha": "MHA, as many heads", "mqa": "MQA", "indexer": "DSA's indexer",
             "gqa": f"GQA, {min(n_groups, args.n_heads)} groups"}
    layers = args.n_layers + args.n_mtp_layers
    rows = [row(f"{names[form]}, BF16", size) for form, size in cache.items()]
    if args.n_mtp_layers:
        rows.append(row(f"MLA, BF16, {layers} layers with MTP",
                        cache["mla"] // args.n_layers * layers))
    rows += [row(f"{names[form]}, FP8, {size} a layer", size * args.n_layers)
             for form, size in fp8.items()]
    return section("Cache", ("bytes per token", "times MLA", f"{length:,} tokens"), rows)


def drafting_rows(args: ModelArgs, acceptance: float) -> list:
    """What drafts of the MTP module buy, where reading weights takes all the time."""
    def row(batch: int, drafts: int) -> tuple:
        d = drafting(args, acceptance, drafts, batch)
        return (f"{drafts} draft{'s' * (drafts > 1)}, batch {batch}", f"{d.tokens:.2f}",
                f"{d.check / d.plain:.2f} + {d.draft / d.plain:.2f}", f"{d.speedup:.2f}")
    return section(f"Drafts, {acceptance:.0%} accepted",
                   ("tokens a pass", "weights read", "times as fast"),
                   [row(batch, drafts) for drafts in (1, 2) for batch in (1, 8, 64, 256)])


def memory_rows(run: Plan, rental: Rental) -> list:
    """Whether a training run fits."""
    s, memory = run.sharding, run.memory
    state = [(name, scaled(getattr(memory, name), "B"))
             for name in ("weights", "gradients", "optimizer")]
    return section("Training memory of one GPU, without workspace", ("size",), [
        f"{s.gpus:,} {rental.gpu}: pipeline {s.pipeline}{' (DualPipe)' * s.dualpipe}, "
        f"expert-parallel {s.expert_parallel}, ZeRO {s.zero}, recompute {s.recompute}",
        f"fullest is rank {memory.rank}: {memory.holds}; {memory.parameters:,} parameters", *state,
        (f"activations, {s.micro_batch_tokens:,} tokens at a time",
         scaled(memory.activations, "B")),
        ("all", scaled(memory.total, "B"),
         "fits into" if run.fits else "does not fit into", f"{rental.gpu_memory:g} GB")])


def money_row(label: str, bill: Bill) -> tuple:
    """GPU-hours, dollars and days."""
    return label, round(bill.gpu_hours), round(bill.dollars), f"{bill.days:,.1f}"


def bill_rows(run: Plan, rental: Rental, tokens: float, work: float) -> list:
    """How long a training run takes and what it costs."""
    each = replace(run.bill, gpu_hours=run.bill.gpu_hours * 1e12 / tokens)
    return section("Training bill", ("GPU-hours", "USD", "days"), [
        f"{scaled(work, 'FLOPs')} a token; {rental.mfu:.1%} of {rental.gpu_peak:g} TFLOPS; "
        f"{rental.gpu_price:g} USD an hour for each of {run.bill.gpus:,} {rental.gpu}",
        money_row(f"{tokens:,.0f} tokens", run.bill), money_row("each 1T of tokens", each)])


def paper_rows(args: ModelArgs) -> list:
    """V3's own bill (V3 table 1), and the MFU that it amounts to."""
    rental, hours = Rental(), V3_GPU_HOURS["pre-training"]
    bills = V3_GPU_HOURS | {"all": sum(V3_GPU_HOURS.values())}
    rows = [money_row(name, Bill(count, 2048, rental.gpu_price))[:3]
            for name, count in bills.items()]
    each = Bill(hours * 1e12 / V3_TOKENS, 2048, rental.gpu_price)
    works = {"as counted here": flops_per_token(args, 4096), "at the paper's 250 GFLOPs": 250e9}
    speeds = [f"{got:.1f} TFLOPS, {got / rental.gpu_peak:.1%} of the peak, {name}"
              for name, work in works.items() for got in [teraflops(work, V3_TOKENS, hours)]]
    return section("V3's bill as published", ("GPU-hours", "USD", "days"), [
        *rows, money_row("pre-training, each 1T of tokens", each),
        "pre-training ran at", *("  " + speed for speed in speeds)])


def price_rows(settings: CostArgs, prices: Prices) -> list:
    """What a workload costs: at the given prices, or else at what serving was measured to cost."""
    own = {"at the given prices": prices} if prices != Prices() else {
        f"{name}, cost at position 128K": price for name, price in SERVING_128K.items()}
    workload = settings.prompt_tokens, settings.cached_tokens, settings.output_tokens
    return section("API workload", ("USD",), [
        "{:,} prompt tokens, {:,} of them cached, {:,} output tokens".format(*workload),
        *((name, f"{api_price(*workload, price):,.4f}") for name, price in own.items())])


def main(argv: list[str] | None = None) -> None:
    """Print the tables of one configuration."""
    given, rented, spread, price, changes = parse(
        "minids.costs", __doc__, CostArgs, Rental, Sharding, Prices, ModelArgs, argv=argv)
    settings, rental, prices = CostArgs(**given), Rental(**rented), Prices(**price)
    args = replace(ModelArgs.preset(settings.preset), **changes)
    seq_len = settings.seq_len or min(args.max_seq_len, args.original_seq_len)
    sharding = choose_sharding(args, spread.pop("gpus", Sharding.gpus), rental, **spread)
    run = plan(args, settings.tokens, rental, sharding, seq_len)
    work = flops_per_token(args, seq_len)
    changed = "".join(f", {name} = {value}" for name, value in changes.items())
    rows = [settings.preset + changed, *parameter_rows(args), *checkpoint_rows(args),
            *flops_rows(args, seq_len), *cache_rows(args, seq_len, settings.n_groups),
            *(drafting_rows(args, settings.acceptance) if args.n_mtp_layers else []),
            *memory_rows(run, rental), *bill_rows(run, rental, settings.tokens, work)]
    if args == ModelArgs.preset("v3"):
        rows += paper_rows(args)
    if settings.prompt_tokens or settings.cached_tokens or settings.output_tokens:
        rows += price_rows(settings, prices)
    print(format_table(rows))
