"""Settings, models, text and one training step, for all tables of `minids.lab.bench`."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minids.apply.compile import compile_blocks
from minids.apply.precision import StepCopies
from minids.base.fields import Settings, option, require
from minids.config import ModelArgs
from minids.lab.timing import in_turn, speed_cells
from minids.model.transformer import Transformer
from minids.parallel.team import Team, world_size
from minids.runs.settings import TrainArgs
from minids.text.loaders import open_data
from minids.text.tokenizer import Tokenizer

DTYPES = {"bf16-weights": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
BOTH = {"cpu": ("bf16", "fp32"), "cuda": ("bf16-weights", "bf16")}  # what --dtype both means
DEFAULT_TABLES = ("train", "decode", "memory", "dense")  # what "all" means
TABLES = (*DEFAULT_TABLES, "moe-vs-dense", "sparse", "speculative", "rollout", "serve", "batching",
          "program", "step", "prompt", "roofline", "profile", "fp8")
ALONE = ("serve", "batching", "step", "prompt", "roofline")  # decode only: no gradients to store
WARM_UP = 2           # training steps before the timings; the first ones compile kernels
LEARNING_RATE = 1e-3  # of the timed steps


@dataclass(frozen=True)
class BenchArgs(Settings):
    """Tables, models and sizes."""

    preset: str = option("tiny", "model: " + ", ".join(ModelArgs.presets()))
    what: str = option("all", f"tables, with commas between; all: {', '.join(DEFAULT_TABLES)}")
    command: str = option("", "program, profile: flags of minids.train, as one text; program: "
                              "or several, with semicolons between")
    pairs: int = option(7, "timings of each side", low=1)
    steps_per_timing: int = option(8, "training steps in one timing", low=1)
    batch_size: int = option(8, "training: sequences per step", low=1)
    seq_len: int = option(256, "training: tokens per sequence", low=1)
    decode_batch: int = option(64, "decoding: sequences in the larger batch", low=1)
    prompt: int = option(64, "decoding: tokens in each prompt", low=1)
    new_tokens: int = option(128, "decoding: tokens to generate after each prompt", low=1)
    dtype: str = option("both", "bf16: autocast with FP32 weights to train, BF16 weights to decode;"
                                " both: with fp32 on a CPU, with bf16-weights on a GPU",
                        ("both", *DTYPES))
    data: str = option("pystdlib", "text: pystdlib, text:PATH or hf:NAME[:CONFIG[:COLUMN]]")
    context: int = option(32768, "sparse, prompt: longest context in tokens; others are shorter",
                          low=1)
    record: str = option("", "profile: JSON file that keeps measurements; its figure stands beside")
    label: str = option("", "profile: name to record this measurement under; none: draw only")
    run: str = option("runs/tiny", "speculative, serve: run folder of the model; none, serve: "
                                   "random weights of the preset, without HTTP")
    rows: int = option(16, "serve, batching: sequences that are continued together", low=1)
    seed: int = option(0, "seed of the weights and the text's order", low=0, high=2 ** 32 - 1)
    seeds: int = option(3, "moe-vs-dense: runs of each model", low=1)
    steps: int = option(0, "moe-vs-dense: steps of each run; 0: the preset's number", low=0)
    threads: int = option(2, "CPU threads", low=1, high=1024)
    device: str = option("cpu", "device", ("cpu", "cuda"))

    def __post_init__(self):
        super().__post_init__()
        unknown = next((name for name in self.tables if name not in TABLES), "")
        require(self, "what", not unknown, f"all, or one or several of {', '.join(TABLES)}")
        require(self, "what", world_size() == 1 or self.tables == ["program"],
                "program under torchrun")
        require(self, "label", "profile" not in self.tables or bool(self.label or self.record),
                "a name for the measurement, unless --record names a file that has some")

    @property
    def tables(self) -> list[str]:
        """Return the names of the tables to make."""
        return list(DEFAULT_TABLES) if self.what == "all" else self.what.split(",")

    @property
    def dtypes(self) -> list[str]:
        """Return the precisions of the tables that have a row for each."""
        return list(BOTH[self.device]) if self.dtype == "both" else [self.dtype]

    @property
    def decode_dtypes(self) -> list[str]:
        """Return the same for decoding, where both kinds of BF16 have weights in BF16."""
        return list(dict.fromkeys(name.removesuffix("-weights") for name in self.dtypes))

    @property
    def one_dtype(self) -> torch.dtype:
        """Return the precision of the tables that run in one: FP32 unless BF16 is asked for."""
        return DTYPES[self.dtypes[-1]]


class Bench:
    """The configuration and the text of one program; its timed models have no MTP modules.

    team: of the ranks that torchrun started; None for one process
    """

    def __init__(self, settings: BenchArgs, args: ModelArgs, team: Team | None = None):
        self.team = team
        tokenizer = Tokenizer.open(TrainArgs.for_preset(settings.preset).tokenizer)
        self.settings = settings
        # Text has the tokenizer's tokens; a model may have more.
        self.trained_args = replace(args, vocab_size=max(args.vocab_size, tokenizer.vocab_size))
        self.args = replace(self.trained_args, n_mtp_layers=0)
        limit, s = self.args.max_seq_len, settings
        require(self.args, "n_routed_experts", self.args.has_moe, "at least 1")
        require(s, "seq_len", s.seq_len <= limit, f"at most max_seq_len = {limit}")
        require(s, "new_tokens", s.prompt + s.new_tokens <= limit,
                f"at most {limit - s.prompt}, so that max_seq_len = {limit} holds the prompt too")
        data = open_data(s.data, tokenizer, s.seq_len, seed=s.seed)
        self.loader, self.valid = data.loader, data.valid
        require(s, "decode_batch", s.prompt * s.decode_batch <= len(self.valid),
                f"at most {len(self.valid) // s.prompt}: the validation text is short")

    def model(self, args: ModelArgs | None = None) -> Transformer:
        """Return a new model, with the same random weights every time, drawn on the device."""
        torch.manual_seed(self.settings.seed)
        with torch.device(self.settings.device):
            return Transformer(args or self.args)

    def trained(self, dtype: str) -> Transformer:
        """Return a new model whose weights have a training precision's type."""
        model = self.model()
        return model.to(torch.bfloat16) if dtype == "bf16-weights" else model

    def decoder(self, **changes) -> Transformer:
        """Return a model for decoding, made where and in the precision in which it is used.

        A large one would have no room in FP32. changes: fields that differ from the benchmark's
        """
        s, before = self.settings, torch.get_default_dtype()
        torch.manual_seed(s.seed)
        torch.set_default_dtype(s.one_dtype)
        try:
            with torch.device(s.device):
                return Transformer(replace(self.args, **changes)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return the next training batches, on the device."""
        drawn = [self.loader.next_batch(self.settings.batch_size) for _ in range(count)]
        return [tuple(t.to(self.settings.device) for t in batch) for batch in drawn]

    def prompts(self, count: int) -> list[list[int]]:
        """Return `count` pieces of the validation text."""
        size = self.settings.prompt
        return self.valid[:count * size].view(count, size).tolist()

    def time_steps(self, ours: "Stepper", theirs: "Stepper") -> list[str]:
        """Time training steps in turn, both sides on the same batches; return `speed_cells`."""
        s = self.settings
        for stepper in (ours, theirs):
            stepper.run(self.batches(WARM_UP))
        batches = [self.batches(s.steps_per_timing) for _ in range(s.pairs)]
        first, second = iter(batches), iter(batches)
        works = [lambda: ours.run(next(first)), lambda: theirs.run(next(second))]
        taken = in_turn(works, s.pairs, s.device)
        return speed_cells(taken, s.steps_per_timing * s.batch_size * s.seq_len)


def minids_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats."""
    return model.loss(tokens, targets, mtp_weight=0.0, balance_weight=0.0).total


class Stepper:
    """One model's training step: forward, backward, clipping, fused AdamW.

    loss: such as `minids_loss`
    dtype: "bf16" (autocast, FP32 master weights), "bf16-weights" (nothing else) or "fp32"
    first, first_loss: seconds of the first step, which compiles what is compiled, and its loss
    """

    def __init__(self, model: nn.Module, loss: Callable, dtype: str):
        self.model, self.loss, self.dtype, self.first = model, loss, dtype, 0.0
        self.first_loss, self.copies = 0.0, None
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def speed_up(self) -> None:
        """Do to a model of minids what `train` does on a GPU: BF16 copies, compiled blocks."""
        self.copies = StepCopies(self.model) if self.dtype == "bf16" else None
        compile_blocks(self.model)

    def check(self, batch: tuple[Tensor, Tensor], loss: float, tolerance: float) -> None:
        """Stop unless the first step's loss is that of the model as it was before `speed_up`."""
        with self.resting():
            self.run([batch])
        gap = abs(self.first_loss - loss)
        assert gap <= tolerance, f"the loss was {loss:.6f} and is {self.first_loss:.6f} when fast"

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch; tokens, targets: (B, S) int64."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.loss(self.model, tokens, targets)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Take one optimizer step and return the loss before it."""
        if self.copies:
            self.copies.refresh()
        loss = self.forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, batches: list) -> None:
        """Take one step on each batch."""
        start = time.perf_counter()
        for batch in batches:
            loss = self.step(*batch)
            if not self.first:
                self.first_loss = loss.item()  # waits for a GPU
                self.first = time.perf_counter() - start

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Let the steps within leave the weights as they are."""
        [group] = self.optimizer.param_groups
        group["lr"] = 0.0
        yield
        group["lr"] = LEARNING_RATE

    def held(self) -> int:
        """Return the bytes of weights, buffers and optimizer between two steps."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        states = self.optimizer.state.values()
        tensors += [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors)
