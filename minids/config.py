"""The dimensions of a model, the presets that name them, and the legend of shapes.

Fields have the names of DeepSeek's own inference code, so that you can read the two side by side.

The legend for shape comments, used in every file of the package:
    B batch   S query positions   T key positions   H heads   D = dim, the residual width
    E routed experts   K activated experts   N tokens (B*S)   G groups   V = vocab_size
Widths appear under their field name, e.g. (B, S, kv_lora_rank).

Sources of the released dimensions: DeepSeek-V2 (arXiv 2405.04434) section 3.1 and appendix B,
DeepSeek-V3 (arXiv 2412.19437) section 4.2, DeepSeek-V3.2 (arXiv 2512.02556) section 2, and the
published configuration files.
"""

from dataclasses import dataclass

from minids.base.fields import Settings, nearest, option, require


@dataclass(frozen=True)
class ModelArgs(Settings):
    """The dimensions of one model of the DeepSeek family, checked on construction."""

    vocab_size: int = option(4096, "rows of the embedding and the head, tokens", low=1)
    max_seq_len: int = option(1024, "longest sequence, tokens; YaRN above original_seq_len", low=1)
    dim: int = option(256, "width of the residual stream", low=1)
    inter_dim: int = option(512, "hidden width of the dense feed-forward layers", low=1)
    moe_inter_dim: int = option(128, "hidden width of one expert")
    n_layers: int = option(4, "transformer blocks, without the MTP module", low=1, high=1024)
    n_dense_layers: int = option(1, "leading blocks with a dense feed-forward layer", low=0)
    n_heads: int = option(4, "attention heads", low=1)
    n_routed_experts: int = option(8, "routed experts in one MoE layer; 0: no layer has any", low=0,
                                   high=2 ** 16)
    n_shared_experts: int = option(1, "shared experts in one MoE layer", low=0)
    n_activated_experts: int = option(2, "routed experts that one token visits")
    n_expert_groups: int = option(1, "groups that the routed experts are split into")
    n_limited_groups: int = option(1, "groups that one token may visit")
    score_func: str = option("sigmoid", "gate's score; V2 has softmax", ("sigmoid", "softmax"))
    route_scale: float = option(1.0, "factor on the routed experts' output", above=0)
    gate_bias: bool = option(True, "selection bias of the gate (V3), absent in V2")
    q_lora_rank: int = option(0, "width of the query latent; 0 leaves queries uncompressed", low=0)
    kv_lora_rank: int = option(64, "width of the key-value latent that the cache holds", low=1)
    qk_nope_head_dim: int = option(32, "width of a head's key without position", low=1)
    qk_rope_head_dim: int = option(16, "width of the rotated key that all heads share; even", low=1)
    v_head_dim: int = option(32, "width of a head's value", low=1)
    norm_eps: float = option(1e-6, "epsilon of RMSNorm", above=0)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0)
    rope_factor: float = option(40.0, "YaRN: stretch of the context", above=0)
    original_seq_len: int = option(4096, "YaRN: context before stretching, tokens", low=1)
    beta_fast: float = option(32.0, "YaRN: rotations above which a pair is left alone")
    beta_slow: float = option(1.0, "YaRN: rotations below which a pair is fully stretched")
    mscale: float = option(1.0, "YaRN: weight of the softmax-scale correction", low=0)
    attention_factor: float = option(1.0, "YaRN: factor on rotated queries and keys", above=0)
    index_n_heads: int = option(0, "heads of V3.2's lightning indexer; 0: dense attention", low=0)
    index_head_dim: int = option(32, "width of the indexer's key, its rotated part included")
    index_topk: int = option(128, "tokens that the indexer lets a query attend to", low=1)
    index_hadamard: bool = option(False, "Hadamard transform of the indexer's queries and keys")
    index_fp8: bool = option(False, "round the indexer's queries and keys to FP8, as deployed")
    n_mtp_layers: int = option(1, "multi-token prediction modules", low=0, high=64)
    init_std: float = option(0.006, "standard deviation of the initial weights", above=0)

    def __post_init__(self):
        super().__post_init__()
        require(self, "qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even (rotary pairs)")
        require(self, "n_dense_layers", self.n_dense_layers <= self.n_layers,
                f"at most n_layers = {self.n_layers}")
        width = self.index_head_dim
        require(self, "index_head_dim", not self.has_indexer or width >= self.qk_rope_head_dim,
                f"qk_rope_head_dim = {self.qk_rope_head_dim} or more")
        require(self, "index_head_dim", not self.index_hadamard or width & (width - 1) == 0,
                "a power of two where index_hadamard is on")
        if not self.has_moe:
            return
        groups = self.n_expert_groups
        require(self, "moe_inter_dim", self.moe_inter_dim >= 1, "at least 1")
        require(self, "n_expert_groups", groups >= 1 and self.n_routed_experts % groups == 0,
                f"a divisor of n_routed_experts = {self.n_routed_experts}")
        require(self, "n_limited_groups", 1 <= self.n_limited_groups <= groups,
                f"between 1 and n_expert_groups = {groups}")
        reachable = self.n_routed_experts // groups * self.n_limited_groups
        require(self, "n_activated_experts", 1 <= self.n_activated_experts <= reachable,
                f"between 1 and {reachable}, the experts in n_limited_groups groups")
        scores_pairs = self.gate_bias and groups > 1
        require(self, "n_expert_groups", not scores_pairs or self.n_routed_experts // groups >= 2,
                "groups of two experts or more (V3 scores a group by its best two)")

    @property
    def has_indexer(self) -> bool:
        """Return whether attention is limited to tokens that a lightning indexer selects (V3.2)."""
        return self.index_n_heads > 0

    @property
    def has_moe(self) -> bool:
        """Return whether any layer has routed experts."""
        return self.n_routed_experts > 0

    @property
    def qk_head_dim(self) -> int:
        """Return the width of a head's query and key: the plain and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def yarn(self) -> bool:
        """Return whether YaRN is on: exactly when the official code has it on."""
        return self.max_seq_len > self.original_seq_len

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether block `layer` has experts; MTP modules are numbered from n_layers on."""
        return self.has_moe and layer >= self.n_dense_layers

    @classmethod
    def preset(cls, name: str) -> "ModelArgs":
        """Return the configuration called `name`; `ModelArgs.presets()` lists the names."""
        if name not in MODEL_PRESETS:
            raise ValueError(f"preset {name!r} is unknown: {nearest(name, MODEL_PRESETS)}"
                             f"valid are {', '.join(MODEL_PRESETS)}")
        return cls(**MODEL_PRESETS[name])

    @staticmethod
    def presets() -> list[str]:
        """Return the names that `preset` takes: models to train, then the released ones."""
        return list(MODEL_PRESETS)


V3_ARGS = dict(
    vocab_size=129280, max_seq_len=163840, dim=7168, inter_dim=18432, moe_inter_dim=2048,
    n_layers=61, n_dense_layers=3, n_heads=128, n_routed_experts=256, n_shared_experts=1,
    n_activated_experts=8, n_expert_groups=8, n_limited_groups=4, route_scale=2.5,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
V2_ARGS = V3_ARGS | dict(
    vocab_size=102400, dim=5120, inter_dim=12288, moe_inter_dim=1536, n_layers=60,
    n_dense_layers=1, n_routed_experts=160, n_shared_experts=2, n_activated_experts=6,
    n_limited_groups=3, score_func="softmax", gate_bias=False, route_scale=16.0, mscale=0.707,
    n_mtp_layers=0)
V2_LITE_ARGS = V2_ARGS | dict(
    dim=2048, inter_dim=10944, moe_inter_dim=1408, n_layers=27, n_heads=16, n_routed_experts=64,
    n_expert_groups=1, n_limited_groups=1, route_scale=1.0, q_lora_rank=0)
# Made for one card. Widths are multiples of 128, which tensor cores take whole; experts are few and
# wide, so that each product has a thousand rows or more. No MTP module: it would take the time of
# one more block and the head again (`--n-mtp-layers 1` adds it).
# 80 GB: a layer like Moonlight's, whose products come near an H100's peak, with half the experts.
# 24 GB, BF16 and no FP8 units (RTX 3090, 4090): before Hopper, experts' products run one by one.
GPU_80GB_ARGS = V2_LITE_ARGS | dict(
    vocab_size=32768, max_seq_len=4096, inter_dim=6400, moe_inter_dim=1280, n_layers=12,
    n_routed_experts=32, n_shared_experts=1, n_activated_experts=4, score_func="sigmoid",
    gate_bias=True, mscale=1.0)
GPU_24GB_ARGS = GPU_80GB_ARGS | dict(
    dim=1024, inter_dim=3072, moe_inter_dim=1024, n_routed_experts=16, n_activated_experts=2,
    kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)

MODEL_PRESETS = {
    "tiny": {},
    "deep": dict(n_layers=16),
    "nano": dict(vocab_size=4096, max_seq_len=256, dim=64, inter_dim=128, moe_inter_dim=32,
                 n_layers=2, n_heads=2, n_routed_experts=4, kv_lora_rank=16, qk_nope_head_dim=16,
                 qk_rope_head_dim=8, v_head_dim=16),
    "micro": dict(vocab_size=320, max_seq_len=256, dim=64, inter_dim=128, moe_inter_dim=64,
                  n_layers=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=32,
                  v_head_dim=16, rope_theta=100.0, n_mtp_layers=0, init_std=0.1),
    "small": dict(vocab_size=4096, max_seq_len=4096, dim=1024, inter_dim=4096, moe_inter_dim=640,
                  n_layers=16, n_heads=16, n_routed_experts=32, n_activated_experts=4,
                  n_expert_groups=4, n_limited_groups=2, route_scale=1.0, q_lora_rank=384,
                  kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
    "gpu-24gb": GPU_24GB_ARGS,
    "gpu-80gb": GPU_80GB_ARGS,
    "v2-lite": V2_LITE_ARGS,
    "v2": V2_ARGS,
    "v3": V3_ARGS,
    "v3.2": V3_ARGS | dict(index_n_heads=64, index_head_dim=128, index_topk=2048),
    "moonlight": V2_LITE_ARGS | dict(
        vocab_size=163840, max_seq_len=8192, original_seq_len=8192, inter_dim=11264, norm_eps=1e-5,
        score_func="sigmoid", gate_bias=True, route_scale=2.446, rope_theta=50000.0),
    "kimi-k2": V3_ARGS | dict(
        vocab_size=163840, max_seq_len=131072, n_dense_layers=1, n_heads=64, n_routed_experts=384,
        n_expert_groups=1, n_limited_groups=1, route_scale=2.827, rope_theta=50000.0,
        rope_factor=32.0, n_mtp_layers=0),
}
