"""The settings that every learning program shares, and pre-training's own."""

import math
from dataclasses import dataclass
from typing import ClassVar

from minids.base.fields import MOST, option, require
from minids.config import MODEL_PRESETS
from minids.runs.device import Machine
from minids.runs.presets import CONTEXT, CONTINUED, STAGE, TRAIN_PRESETS, WARMUP


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
    decay: str = option("cosine", "how lr falls in between; steps: to the square root of that share"
                        " at once, and at the end to it, as V2", ("cosine", "linear", "steps"))
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
                          " after; auto: on a GPU, in BF16 or FP8, without --dsa",
                          ("auto", "true", "false"), switch=("false", "true"))

    may_change: ClassVar[set[str]] = LearnArgs.may_change | {"compile"}


@dataclass(frozen=True)
class TrainArgs(EvenArgs):
    """The settings of one pre-training run.

    Defaults are V3's where the paper states them (section 4.2); `minids.runs.presets` has what
    other models need.
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
    context: int = option(0, "tokens to extend the context to, after --from, with YaRN", low=0)
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
        require(self, "context", not self.context or bool(self.from_run) and not self.dsa,
                "0 without --from, and with --dsa: a trained model learns longer sequences first")
        require(self, "seq_len", self.context in (0, self.seq_len), f"context = {self.context}")

    @classmethod
    def for_preset(cls, name: str, before: dict | None = None, **given) -> "TrainArgs":
        """Return the preset's settings, under those of the run `before`, the stage, and `given`."""
        settings = {"preset": name} | TRAIN_PRESETS.get(name, {}) | (before or {})
        if given.get("from_run"):
            if context := given.get("context"):
                stage = cls(**settings).longer(context) | CONTEXT.get(name, {})
            else:
                stage = (WARMUP if given.get("dsa") == "warmup" else CONTINUED).get(name, {})
            settings |= STAGE | stage
        return cls(**settings | given)

    def longer(self, context: int) -> dict:
        """Return what sequences of `context` tokens change: as many tokens in a batch as before,
        and the learning rate with which this run ended. V3's stages have just that (section 4.3).
        """
        batch = max(self.batch_size * self.seq_len // max(context, 1), 1)
        end = 1.0 if self.constant_until == 1 else self.final_lr or 0.1
        return dict(seq_len=context, batch_size=batch, grad_accum=math.gcd(self.grad_accum, batch),
                    lr=self.lr * end, muon_lr=self.muon_lr * end)
