"""Settings: the model's dimensions, the programs' flags, and the presets that name both.

`ModelArgs` carries the field names of DeepSeek's own inference code, so that a reader can lay the
two side by side. Every program's flags are the fields of a dataclass too: `parse` turns such a
class into a command line whose help states each flag's meaning, unit and default, and whose
errors are one line.

The legend for shape comments, used in every file of the package:
    B batch   S query positions   T key positions   H heads   D = dim, the residual width
    E routed experts   K activated experts   N tokens (B*S)   G groups   V = vocab_size
Widths appear under their field name, e.g. (B, S, kv_lora_rank).

Source of the released dimensions: DeepSeek-V2 (arXiv 2405.04434) section 3.1 and appendix B,
DeepSeek-V3 (arXiv 2412.19437) section 4.2, DeepSeek-V3.2 (arXiv 2512.02556) section 2, and the
published configuration files.
"""

from dataclasses import dataclass

from minids.base.fields import check_types, nearest, option, require


@dataclass(frozen=True)
class ModelArgs:
    """The dimensions of one model of the DeepSeek family.

    Raises `ValueError` naming the field, its value and what is valid.
    """

    vocab_size: int = option(4096, "rows of the embedding and the head, tokens")
    max_seq_len: int = option(1024, "longest sequence, tokens; above original_seq_len YaRN is on")
    dim: int = option(256, "width of the residual stream")
    inter_dim: int = option(512, "hidden width of the dense feed-forward layers")
    moe_inter_dim: int = option(128, "hidden width of one expert")
    n_layers: int = option(4, "transformer blocks, without the MTP module")
    n_dense_layers: int = option(1, "leading blocks with a dense feed-forward layer")
    n_heads: int = option(4, "attention heads")
    n_routed_experts: int = option(8, "routed experts in one MoE layer; 0 makes every layer dense")
    n_shared_experts: int = option(1, "shared experts in one MoE layer")
    n_activated_experts: int = option(2, "routed experts that one token visits")
    n_expert_groups: int = option(1, "groups that the routed experts are split into")
    n_limited_groups: int = option(1, "groups that one token may visit")
    score_func: str = option("sigmoid", "gate's score: V3 sigmoid, V2 softmax",
                             ("sigmoid", "softmax"))
    route_scale: float = option(1.0, "factor on the routed experts' output")
    gate_bias: bool = option(True, "selection bias of the gate (V3), absent in V2")
    q_lora_rank: int = option(0, "width of the query latent; 0 leaves queries uncompressed")
    kv_lora_rank: int = option(64, "width of the key-value latent that the cache holds")
    qk_nope_head_dim: int = option(32, "width of a head's key without position")
    qk_rope_head_dim: int = option(16, "width of the rotated key that all heads share; even")
    v_head_dim: int = option(32, "width of a head's value")
    norm_eps: float = option(1e-6, "epsilon of RMSNorm")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    rope_factor: float = option(40.0, "YaRN: stretch of the context")
    original_seq_len: int = option(4096, "YaRN: context before stretching, tokens")
    beta_fast: float = option(32.0, "YaRN: rotations above which a pair is left alone")
    beta_slow: float = option(1.0, "YaRN: rotations below which a pair is fully stretched")
    mscale: float = option(1.0, "YaRN: weight of the softmax-scale correction")
    index_n_heads: int = option(0, "heads of the lightning indexer (V3.2); 0: dense attention")
    index_head_dim: int = option(32, "width of the indexer's key, its rotated part included")
    index_topk: int = option(128, "tokens that the indexer lets a query attend to")
    index_hadamard: bool = option(False, "turn the indexer's queries and keys by a Hadamard matrix")
    index_fp8: bool = option(False, "round the indexer's queries and keys to FP8, as deployed")
    n_mtp_layers: int = option(1, "multi-token prediction modules")
    init_std: float = option(0.006, "standard deviation of the initial weights")

    def __post_init__(self):
        check_types(self)
        for name in ("vocab_size max_seq_len dim inter_dim n_layers n_heads kv_lora_rank "
                     "qk_nope_head_dim qk_rope_head_dim v_head_dim original_seq_len").split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("n_routed_experts n_shared_experts n_mtp_layers q_lora_rank "
                     "index_n_heads").split():
            require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in "norm_eps rope_theta rope_factor init_std route_scale".split():
            require(self, name, getattr(self, name) > 0, "above 0")
        require(self, "qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even (rotary pairs)")
        require(self, "n_dense_layers", 0 <= self.n_dense_layers <= self.n_layers,
                f"between 0 and n_layers = {self.n_layers}")
        if self.has_moe:
            self._check_experts()
        self._check_indexer()

    def _check_experts(self):
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

    def _check_indexer(self):
        require(self, "index_topk", self.index_topk >= 1,
                "at least 1 (index_n_heads = 0 turns the indexer off)")
        if self.has_indexer:
            require(self, "index_head_dim", self.index_head_dim >= self.qk_rope_head_dim,
                    f"qk_rope_head_dim = {self.qk_rope_head_dim} or more")
        width = self.index_head_dim
        require(self, "index_head_dim", not self.index_hadamard or width & (width - 1) == 0,
                "a power of two where index_hadamard is on")

    @property
    def has_indexer(self) -> bool:
        """Whether attention is sparse: over the tokens that a lightning indexer selects (V3.2)."""
        return self.index_n_heads > 0

    @property
    def has_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return self.n_routed_experts > 0

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's whole query and key: the part without position and the rotated."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def yarn(self) -> bool:
        """Whether YaRN is on: exactly when the official code has it on."""
        return self.max_seq_len > self.original_seq_len

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (the MTP modules count on from n_layers) has experts."""
        return self.has_moe and layer >= self.n_dense_layers

    @classmethod
    def preset(cls, name: str) -> "ModelArgs":
        """The named configuration; `ModelArgs.presets()` lists the names."""
        if name not in MODEL_PRESETS:
            raise ValueError(f"preset {name!r} is unknown: {nearest(name, MODEL_PRESETS)}"
                             f"valid are {', '.join(MODEL_PRESETS)}")
        return cls(**MODEL_PRESETS[name])

    @staticmethod
    def presets() -> list[str]:
        """The names that `preset` takes: first those to train, then the released models."""
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
    "v2-lite": V2_LITE_ARGS,
    "v2": V2_ARGS,
    "v3": V3_ARGS,
    "v3.2": V3_ARGS | dict(index_n_heads=64, index_head_dim=128, index_topk=2048),
    "moonlight": V2_LITE_ARGS | dict(
        vocab_size=163840, max_seq_len=8192, original_seq_len=8192, inter_dim=11264,
        score_func="sigmoid", gate_bias=True, route_scale=2.446, rope_theta=50000.0,
        norm_eps=1e-5),
    "kimi-k2": V3_ARGS | dict(
        vocab_size=163840, max_seq_len=131072, n_dense_layers=1, n_heads=64, n_routed_experts=384,
        n_expert_groups=1, n_limited_groups=1, route_scale=2.827, rope_theta=50000.0,
        rope_factor=32.0, n_mtp_layers=0),
}


@dataclass(frozen=True)
class TrainArgs:
    """The settings of one pre-training run.

    Defaults are V3's where the paper states them (section 4.2); `TRAIN_PRESETS` has what a model
    of another size needs. Raises `ValueError` naming the field, its value and what is valid.
    """

    preset: str = option("tiny", "model and settings to train: " + ", ".join(MODEL_PRESETS))
    data: str = option("pystdlib", "text: pystdlib, text:PATH, hf:NAME[:CONFIG[:COLUMN]] or"
                                     " task:NAME")
    tokenizer: str = option("", "folder of the tokenizer, or bytes: one token a byte; none is the"
                                " one in data/tokenizer")
    out: str = option("", "run folder; none is the first free of runs/PRESET, runs/PRESET-2, ..")
    resume: bool = option(False, "go on with the run in --out, or with the newest one")
    from_run: str = option("", "run, or checkpoint, whose weights and settings to begin with",
                           flag="from")
    dsa: str = option("", "sparse attention, after --from: the indexers learn alone (warmup), or"
                          " with the model (sparse)", ("", "warmup", "sparse"))
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(8, "sequences in an optimizer step")
    batch_start: int = option(0, "sequences in the first step, growing to batch_size; 0: no ramp")
    batch_ramp_steps: int = option(0, "steps over which the batch grows")
    grad_accum: int = option(1, "micro-batches that an optimizer step is split into")
    seq_len: int = option(256, "tokens in a training sequence")
    optimizer: str = option("adamw", "adamw, or muon for the matrices inside the blocks",
                            ("adamw", "muon"))
    lr: float = option(2.2e-4, "peak learning rate of AdamW")
    muon_lr: float = option(3e-3, "peak learning rate of Muon")
    indexer_lr: float = option(1e-3, "peak learning rate of the indexers, by AdamW")
    weight_decay: float = option(0.1, "decoupled weight decay")
    beta1: float = option(0.9, "AdamW: decay of the mean gradient")
    beta2: float = option(0.95, "AdamW: decay of the mean squared gradient")
    clip: float = option(1.0, "largest gradient norm; longer ones are scaled down")
    warmup_steps: int = option(2000, "steps in which the learning rate rises to its peak")
    constant_until: float = option(0.68, "share of the run after which the learning rate falls")
    decay_until: float = option(0.966, "share of the run at which it has reached its floor")
    final_lr: float = option(0.1, "floor of the learning rate, as a share of the peak")
    mtp_weight: float = option(0.3, "weight of the multi-token prediction loss")
    mtp_weight_late: float = option(0.1, "the same for the last part of the run")
    mtp_switch: float = option(0.68, "share of the run at which that part begins")
    balance_weight: float = option(1e-4, "weight of the balance loss")
    balance_loss: str = option("sequence", "balance loss: V3's of each sequence, V2's of experts",
                               ("sequence", "expert"))
    indexer_weight: float = option(1.0, "weight of the indexers' loss")
    bias_speed: float = option(0.001, "step of the gate biases, once an optimizer step")
    bias_until: float = option(0.966, "share of the run after which the biases rest")
    separate: bool = option(False, "documents of a window do not see each other; in V3 they do")
    fim_rate: float = option(0.0, "share of documents cut for fill-in-the-middle; V3: 0.1")
    dtype: str = option("auto", "precision of products; auto: bf16 where the hardware has it",
                        ("auto", "bf16", "fp32"))
    fp8: bool = option(False, "products of linear layers and experts in FP8, AdamW's moments in"
                              " BF16")
    compile: bool = option(False, "compile the model: a minute at the start, faster steps after")
    recompute: bool = option(False, "keep less for the backward pass and compute blocks twice")
    spike_factor: float = option(0.0, "skip a step whose loss is this many times the recent mean;"
                                      " 0: never")
    eval_every: int = option(100, "steps between validations; 0: only at the end")
    eval_tokens: int = option(32768, "validation tokens in between; the end uses all")
    log_experts_every: int = option(10, "steps between lines of metrics with the load and the bias"
                                        " of every expert; 0: never")
    sample_every: int = option(0, "steps between samples of text; 0: only at the end")
    prompt: str = option("def", "text that a sample goes on from; best without a space at the end")
    save_every: int = option(100, "steps between checkpoints")
    keep_last: int = option(2, "newest checkpoints kept, beside the best; 0: all")
    seed: int = option(0, "decides weights, data order and samples")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice, one a core")

    def __post_init__(self):
        check_types(self)
        for name in "steps batch_size grad_accum seq_len save_every".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("batch_start batch_ramp_steps warmup_steps weight_decay mtp_weight "
                     "mtp_weight_late balance_weight bias_speed spike_factor eval_every "
                     "sample_every log_experts_every keep_last threads seed").split():
            require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in "lr muon_lr indexer_lr indexer_weight clip eval_tokens".split():
            require(self, name, getattr(self, name) > 0, "above 0")
        for name in ("constant_until decay_until final_lr mtp_switch bias_until fim_rate "
                     "beta1 beta2").split():
            require(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        require(self, "seed", self.seed < 2 ** 32, "below 2^32")
        require(self, "threads", self.threads <= 1024, "at most 1024")
        require(self, "decay_until", self.decay_until >= self.constant_until,
                f"constant_until = {self.constant_until} or more")
        require(self, "grad_accum", self.batch_size % self.grad_accum == 0,
                f"a divisor of batch_size = {self.batch_size}")
        require(self, "batch_start", self.batch_start <= self.batch_size,
                f"at most batch_size = {self.batch_size}")
        require(self, "dsa", not self.dsa or bool(self.from_run),
                "none without --from: an indexer learns from a trained model's attention")

    @classmethod
    def for_preset(cls, name: str, before: dict | None = None, **given) -> "TrainArgs":
        """The preset's settings, varied by those that are given.

        before: settings of the run that this one begins with (`from_run`); they stay as they are,
            but for those of the stage
        """
        settings = {"preset": name} | TRAIN_PRESETS.get(name, {}) | (before or {})
        if given.get("from_run"):
            stage = WARMUP if given.get("dsa") == "warmup" else CONTINUED
            settings |= STAGE | stage.get(name, {})
        return cls(**settings | given)


TINY_RUN = dict(steps=800, optimizer="muon", lr=1e-2, muon_lr=3e-3, warmup_steps=20,
                constant_until=0.5, decay_until=1.0, final_lr=0.05, bias_speed=0.005)
TRAIN_PRESETS = {
    "tiny": TINY_RUN,
    "nano": dict(steps=60, batch_size=4, seq_len=128, optimizer="muon", lr=5e-3, muon_lr=5e-3,
                 warmup_steps=5, constant_until=0.5, decay_until=1.0, bias_speed=0.01,
                 eval_every=20, eval_tokens=8192, save_every=20),
    "micro": dict(data="task:calculator", tokenizer="bytes", steps=600, batch_size=16, seq_len=256,
                  separate=True, optimizer="muon", lr=4e-3, muon_lr=4e-3, weight_decay=0.0,
                  warmup_steps=20, constant_until=0.5, decay_until=1.0, final_lr=0.05,
                  bias_speed=0.005, dtype="fp32", save_every=100, prompt="3*7+5-2*4+6-8"),
    "deep": TINY_RUN,
    "small": dict(steps=20000, batch_size=64, batch_start=16, batch_ramp_steps=1000, grad_accum=1,
                  seq_len=2048, optimizer="muon", lr=1e-3, muon_lr=1e-3, warmup_steps=500,
                  fim_rate=0.1, recompute=True, eval_every=500, eval_tokens=262144,
                  sample_every=500, save_every=500),
    "v3": dict(steps=235_000, batch_size=15360, batch_start=3072, batch_ramp_steps=12_400,
               seq_len=4096, fim_rate=0.1, recompute=True),
}

# Of a run that goes on from another: a constant learning rate, and MTP's weight as it was last.
# V3.2 (section 2.1.1) gives learning rates, steps and batches, and no more; the values for the
# small models were found by trial.
STAGE = dict(batch_start=0, batch_ramp_steps=0, warmup_steps=0, constant_until=1.0,
             decay_until=1.0, mtp_weight=0.1, indexer_lr=3e-3, steps=100)
V32_WARMUP = dict(indexer_lr=1e-3, steps=1000, batch_size=16, seq_len=131072)
V32_SPARSE = dict(lr=7.3e-6, indexer_lr=7.3e-6, steps=15_000, batch_size=480, seq_len=131072)
WARMUP = {"v3": V32_WARMUP, "v3.2": V32_WARMUP}
# These are for dense attention too: the model that a sparse one is compared with.
CONTINUED = {"v3": V32_SPARSE, "v3.2": V32_SPARSE,
             "tiny": dict(lr=5e-4, muon_lr=1.5e-4, indexer_lr=1e-3, steps=200),
             "nano": dict(lr=2.5e-4, muon_lr=2.5e-4, indexer_lr=1e-3, steps=60)}


