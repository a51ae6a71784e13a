"""The settings that every learning program shares, and pre-training's own with its presets."""

from dataclasses import dataclass
from typing import ClassVar

from minids.base.fields import MOST, option, require
from minids.config import MODEL_PRESETS
from minids.runs.device import Machine


@dataclass(frozen=True)
class Logged(Machine):
    """The machine, and a second place for the metrics."""

    log: str = option("", "mirror metrics.jsonl in tensorboard or wandb (pip install it)",
                      ("", "tensorboard", "wandb"))


@dataclass(frozen=True)
class LearnArgs(Logged):
    """The settings of a run that trains a model."""

    from_run: str = option("", "run, checkpoint or Hugging Face folder to begin with", flag="from")
    out: str = option("", "run folder; none is named after the run before", folder=True)
    resume: bool = option(False, "continue the run in --out, or the newest one")
    steps: int = option(100, "optimizer steps", low=1)
    optimizer: str = option("adamw", "muon: for the matrices inside the blocks", ("adamw", "muon"))
    lr: float = option(1e-3, "peak learning rate of AdamW", above=0)
    muon_lr: float = option(1e-3, "peak learning rate of Muon", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay", low=0)
    beta1: float = option(0.9, "AdamW: decay of the mean gradient", low=0, high=1)
    beta2: float = option(0.95, "AdamW: decay of the mean squared gradient", low=0, high=1)
    clip: float = option(1.0, "largest gradient norm; longer gradients are scaled down", above=0)
    warmup_steps: int = option(5, "steps in which the learning rate rises to its peak", low=0)
    constant_until: float = option(1.0, "share of the run after which lr falls", low=0, high=1)
    decay_until: float = option(1.0, "share of the run until lr is at its floor", low=0, high=1)
    final_lr: float = option(0.1, "floor of the learning rate, a share of the peak", low=0, high=1)
    dtype: str = option("auto", "precision of products; auto: bf16 where the hardware has it, fp16 "
                                "on older GPUs", ("auto", "bf16", "fp16", "fp32"))
    save_every: int = option(50, "steps between checkpoints", low=1)
    keep_last: int = option(2, "newest checkpoints to keep, beside the best; 0: all", low=0)
    seed: int = option(0, "decides weights, data order and samples", low=0, high=2 ** 32 - 1)

    # What a resumed run may be given anew; any other setting would make it another run.
    may_change: ClassVar[set[str]] = {"out", "resume", "steps", "device", "threads", "bodies",
                                      "log", "save_every", "keep_last", "lr", "muon_lr", "clip"}

    def __post_init__(self):
        super().__post_init__()
        require(self, "decay_until", self.decay_until >= self.constant_until,
                f"constant_until = {self.constant_until} or more")


@dataclass(frozen=True)
class EvenArgs(LearnArgs):
    """The settings of a run whose batches keep their shape, so that compiling them pays."""

    compile: str = option("auto", "compile the blocks: half a minute at the start, faster steps"
                          " after; auto: on a GPU, in BF16, without --fp8 and --dsa",
                          ("auto", "true", "false"), switch=("false", "true"))

    may_change: ClassVar[set[str]] = LearnArgs.may_change | {"compile"}


@dataclass(frozen=True)
class TrainArgs(EvenArgs):
    """The settings of one pre-training run.

    Defaults are V3's where the paper states them (section 4.2); `TRAIN_PRESETS` has what a model
    of another size needs.
    """

    preset: str = option("tiny", "model and settings to train: " + ", ".join(MODEL_PRESETS))
    data: str = option("pystdlib", "pystdlib, text:PATH, hf:NAME[:CONFIG[:COLUMN]] or task:NAME")
    tokenizer: str = option("", "its folder, or bytes: one token per byte; none is data/tokenizer")
    out: str = option("", "run folder; none: the first free runs/PRESET, PRESET-2, ..", folder=True)
    from_run: str = option("", "run or checkpoint to begin with: weights and settings", flag="from")
    merge: bool = option(False, "with --resume: write the newest checkpoint of many ranks again as "
                                "one process does, and end")
    dsa: str = option("", "sparse attention, after --from: the indexers learn alone (warmup), or"
                          " with the model (sparse)", ("", "warmup", "sparse"))
    steps: int = option(1000, "optimizer steps", low=1)
    batch_size: int = option(8, "sequences in an optimizer step", low=1, high=MOST)
    batch_start: int = option(0, "sequences in step 1, growing to batch_size; 0: no ramp", low=0)
    batch_ramp_steps: int = option(0, "steps over which the batch grows", low=0)
    grad_accum: int = option(1, "micro-batches that an optimizer step is split into", low=1)
    seq_len: int = option(256, "tokens in a training sequence", low=1)
    lr: float = option(2.2e-4, "peak learning rate of AdamW", above=0)
    muon_lr: float = option(3e-3, "peak learning rate of Muon", above=0)
    indexer_lr: float = option(1e-3, "peak learning rate of the indexers, by AdamW", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay", low=0)
    warmup_steps: int = option(2000, "steps in which the learning rate rises to its peak", low=0)
    constant_until: float = option(0.68, "share of the run after which lr falls", low=0, high=1)
    decay_until: float = option(0.966, "share of the run until lr is at its floor", low=0, high=1)
    mtp_weight: float = option(0.3, "weight of the multi-token prediction loss", low=0)
    mtp_weight_late: float = option(0.1, "the same for the last part of the run", low=0)
    mtp_switch: float = option(0.68, "share of the run at which that part begins", low=0, high=1)
    balance_weight: float = option(1e-4, "weight of the balance loss", low=0)
    balance_loss: str = option("sequence", "balance loss: V3's per sequence, V2's per expert",
                               ("sequence", "expert"))
    indexer_weight: float = option(1.0, "weight of the indexers' loss", above=0)
    bias_speed: float = option(0.001, "step of the gate biases, once per optimizer step", low=0)
    bias_until: float = option(0.966, "share of the run after which the biases rest", low=0, high=1)
    separate: bool = option(False, "documents of a window do not see each other; in V3 they do")
    fim_rate: float = option(0.0, "share of fill-in-the-middle documents; V3: 0.1", low=0, high=1)
    fp8: bool = option(False, "FP8 products in linear layers and experts, BF16 moments in AdamW")
    recompute: str = option("none", "what is computed twice, to store less for the backward pass:"
                            " all of the blocks, or selective: not attention, not grouped products",
                            ("none", "blocks", "selective"), switch=("none", "blocks"))
    spike_factor: float = option(0.0, "skip steps at this many times the mean loss; 0: none", low=0)
    eval_every: int = option(100, "steps between validations; 0: only at the end", low=0)
    eval_tokens: int = option(32768, "validation tokens in between; the end uses all", low=1)
    log_experts_every: int = option(10, "steps between all experts' load and bias; 0: never", low=0)
    sample_every: int = option(0, "steps between samples of text; 0: only at the end", low=0)
    prompt: str = option("def", "text that a sample continues; best without a space at the end",
                         utf8=True)
    save_every: int = option(100, "steps between checkpoints", low=1)

    may_change = EvenArgs.may_change | {  # grad_accum: of the same batch, split in another way
        "grad_accum", "recompute", "eval_every", "eval_tokens", "sample_every", "prompt",
        "indexer_lr", "spike_factor", "merge"}

    def __post_init__(self):
        super().__post_init__()
        require(self, "grad_accum", self.batch_size % self.grad_accum == 0,
                f"a divisor of batch_size = {self.batch_size}")
        require(self, "batch_start", self.batch_start <= self.batch_size,
                f"at most batch_size = {self.batch_size}")
        require(self, "dsa", not self.dsa or bool(self.from_run),
                "none without --from: an indexer learns from a trained model's attention")

    @classmethod
    def for_preset(cls, name: str, before: dict | None = None, **given) -> "TrainArgs":
        """Return the preset's settings, under those of the run `before`, the stage, and `given`."""
        settings = {"preset": name} | TRAIN_PRESETS.get(name, {}) | (before or {})
        if given.get("from_run"):
            stage = WARMUP if given.get("dsa") == "warmup" else CONTINUED
            settings |= STAGE | stage.get(name, {})
        return cls(**settings | given)


TINY_RUN = dict(steps=800, optimizer="muon", lr=1e-2, muon_lr=3e-3, warmup_steps=20,
                constant_until=0.5, decay_until=1.0, final_lr=0.05, bias_speed=0.005)
# Twenty tokens for each parameter that one token uses (`python -m minids.costs --what cards`). No
# ramp, whose first steps would have micro-batches too small for the card.
GPU_80GB_RUN = dict(steps=27_000, batch_size=256, grad_accum=32, seq_len=2048, optimizer="muon",
                    lr=1e-3, muon_lr=1e-3, warmup_steps=500, fim_rate=0.1, eval_every=500,
                    eval_tokens=262144, sample_every=500, save_every=500)
TRAIN_PRESETS = {
    "tiny": TINY_RUN,
    "nano": TINY_RUN | dict(
        steps=60, batch_size=4, seq_len=128, lr=5e-3, muon_lr=5e-3, warmup_steps=5, final_lr=0.1,
        bias_speed=0.01, eval_every=20, eval_tokens=8192, save_every=20),
    "micro": TINY_RUN | dict(
        data="task:calculator", tokenizer="bytes", steps=600, batch_size=16, separate=True,
        lr=4e-3, muon_lr=4e-3, weight_decay=0.0, dtype="fp32", prompt="3*7+5-2*4+6-8"),
    "deep": TINY_RUN,
    "small": dict(steps=20000, batch_size=64, batch_start=16, batch_ramp_steps=1000, seq_len=2048,
                  optimizer="muon", lr=1e-3, muon_lr=1e-3, warmup_steps=500, fim_rate=0.1,
                  recompute="blocks", eval_every=500, eval_tokens=262144, sample_every=500,
                  save_every=500),
    "gpu-24gb": GPU_80GB_RUN | dict(steps=14_400, batch_size=128),
    "gpu-80gb": GPU_80GB_RUN,
    "v3": dict(steps=235_000, batch_size=15360, batch_start=3072, batch_ramp_steps=12_400,
               seq_len=4096, fim_rate=0.1, recompute="blocks"),
}

# A run that begins with another one's weights: a constant learning rate, and the late MTP weight.
# V3.2 (section 2.1.1) states learning rates, steps and batch sizes only; the values for the small
# models were found by trial.
STAGE = dict(batch_start=0, batch_ramp_steps=0, warmup_steps=0, constant_until=1.0,
             decay_until=1.0, mtp_weight=0.1, indexer_lr=3e-3, steps=100)
V32_WARMUP = dict(indexer_lr=1e-3, steps=1000, batch_size=16, seq_len=131072)
V32_SPARSE = dict(lr=7.3e-6, indexer_lr=7.3e-6, steps=15_000, batch_size=480, seq_len=131072)
WARMUP = {"v3": V32_WARMUP, "v3.2": V32_WARMUP}
# For dense attention too: it trains the model that the sparse one is compared with.
CONTINUED = {"v3": V32_SPARSE, "v3.2": V32_SPARSE,
             "tiny": dict(lr=5e-4, muon_lr=1.5e-4, indexer_lr=1e-3, steps=200),
             "nano": dict(lr=2.5e-4, muon_lr=2.5e-4, indexer_lr=1e-3, steps=60)}
