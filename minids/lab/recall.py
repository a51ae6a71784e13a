"""Long-range recall: a key far back decides the answer, and sparse attention has to find it.

    python -m minids.lab.recall                                 2,048 tokens, on a CPU
    python -m minids.lab.recall --seq-len 1024 --seed 1         quicker: three minutes on one core
    python -m minids.lab.recall --seq-len 8192 --device cuda

On text at small scale a sliding window can be as good as any selection, for little of the loss
hangs on what is far away. Here all of it does. A sequence of S tokens is

    filler | key value key value .. | filler | key value key value ..

S / 16 pairs, each key another one, and at the end the same keys in another order. The loss is on
the values there, which are told nearly S / 2 tokens before the first of them is asked for. Chance
is one in VALUES.

A small dense model learns this, on short sequences first; then indexers are added and learn from
its attention (V3.2, arXiv 2512.02556, section 2.1.1), and the model goes on under their selection.
The table has the accuracy of the same model under dense attention and under each way of selecting
k = S / 8 tokens: by its indexers, by attention's own probabilities, a window, and at random.

Short sequences have few keys, and with few the model did not learn the task (512 tokens, one seed).

A program of its own, and not a test, since it trains for minutes, and on a GPU at any length.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, option, require
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.infer.selections import all_scores, attention_recall, best, everything, selecting
from minids.model.sparse_attention import (
    freeze_all_but_indexers,
    load_weights_without_indexer,
)
from minids.model.transformer import Transformer
from minids.runs.checkpoints import pick_device
from minids.runs.learner import pick_dtype, tune_allocator
from minids.runs.optimizers import build_optimizers, clip_gradients, set_learning_rate
from minids.runs.settings import TrainArgs

VALUES, FILLERS = 64, 64  # words of each kind; there are S / 8 keys
SHORTEST, FEWEST = 32, 8  # tokens and pairs of the first sequences, which have no filler
SOLVED = 0.99  # accuracy at which longer sequences follow; the mean over some twenty steps
RISE = 50  # steps in which the learning rate rises
INIT_STD = 0.02  # at 0.1 this model does not learn the task


@dataclass(frozen=True)
class RecallArgs:
    """The task and its training."""

    seq_len: int = option(2048, "tokens in a sequence, a multiple of 16")
    dim: int = option(64, "width of the residual stream")
    n_layers: int = option(2, "transformer blocks; one alone cannot do the task")
    index_n_heads: int = option(4, "heads of the indexers")
    index_head_dim: int = option(32, "width of the indexers' keys, 16 at least")
    index_topk: int = option(0, "tokens that a query attends to; 0: an eighth of seq_len")
    steps: int = option(3000, "dense training: steps at most; it ends when the task is solved")
    warmup_steps: int = option(200, "steps of the indexers alone")
    sparse_steps: int = option(50, "steps of the model under their selection")
    tokens: int = option(4096, "tokens in a step, two sequences at least")
    lr: float = option(1e-2, "dense training: learning rate of AdamW, for embedding and head")
    muon_lr: float = option(3e-3, "dense training: learning rate of Muon, for the other matrices")
    sparse_lr: float = option(0.1, "learning rates of the sparse stage, as a share of these")
    indexer_lr: float = option(3e-3, "learning rate of the indexers")
    test_sequences: int = option(16, "sequences that accuracy is measured on")
    dtype: str = option("auto", "precision of products; auto: bf16 where the hardware has it",
                        ("auto", "bf16", "fp32"))
    out: str = option("", "folder to keep the models of both stages in; none: keep none")
    seed: int = option(0, "decides weights and sequences")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice, one a core")

    def __post_init__(self):
        check_types(self)
        require(self, "seq_len", self.seq_len % 16 == 0 and self.seq_len >= 2 * SHORTEST,
                f"a multiple of 16, at least {2 * SHORTEST}")
        for name in "steps tokens test_sequences".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in "lr muon_lr sparse_lr indexer_lr".split():
            require(self, name, getattr(self, name) > 0, "above 0")
        for name in "index_topk warmup_steps sparse_steps seed threads".split():
            require(self, name, getattr(self, name) >= 0, "0 or more")
        require(self, "index_topk", self.index_topk < self.seq_len,
                f"below seq_len = {self.seq_len}")
        self.sparse_model()  # refuses what is no model

    @property
    def k(self) -> int:
        """Tokens that a query attends to."""
        return self.index_topk or self.seq_len // 8

    @property
    def keys(self) -> int:
        """Words that are keys: tokens 0 to keys - 1. Values follow, then fillers."""
        return max(self.seq_len // 8, 2 * FEWEST)

    def model(self) -> ModelArgs:
        """The dense model."""
        return ModelArgs(
            vocab_size=self.keys + VALUES + FILLERS, max_seq_len=self.seq_len,
            original_seq_len=self.seq_len, dim=self.dim, inter_dim=2 * self.dim,
            n_layers=self.n_layers, n_dense_layers=self.n_layers, n_routed_experts=0,
            n_mtp_layers=0, init_std=INIT_STD)

    def sparse_model(self) -> ModelArgs:
        """The same with indexers."""
        return replace(self.model(), index_n_heads=self.index_n_heads,
                       index_head_dim=self.index_head_dim, index_topk=self.k)


def pairs_in(length: int) -> int:
    """Pairs of key and value in a sequence of so many tokens."""
    return max(length // 16, FEWEST)


def draw(args: RecallArgs, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Sequences of the task: (batch, length) int64, see the top of the file."""
    pairs = pairs_in(length)
    keys = torch.rand(batch, args.keys, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (batch, pairs), generator=generator) + args.keys
    order = torch.rand(batch, pairs, generator=generator).argsort(1)
    filler = torch.randint(FILLERS, (batch, length - 4 * pairs), generator=generator)
    filler += args.keys + VALUES
    lead = filler.size(1) // 3
    told = torch.stack([keys, values], dim=2).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
    return torch.cat([filler[:, :lead], told, filler[:, lead:], asked], dim=1)


class Asked(NamedTuple):
    """What a model says to the keys at the end, and what is right.

    logits: (B, pairs, vocab_size); values: (B, pairs) int64; indexer: the indexers' loss, or 0
    """

    logits: Tensor
    values: Tensor
    indexer: Tensor | float

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy of the values, nats."""
        return F.cross_entropy(self.logits.flatten(0, 1).float(), self.values.flatten())

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return (self.logits.argmax(-1) == self.values).float().mean().item()


def ask(model: Transformer, tokens: Tensor, dsa: str = "") -> Asked:
    """Run the model over sequences (B, S); dsa: how indexers learn meanwhile, as in `loss`."""
    hidden, _, losses = model.hidden(tokens[:, :-1], indexer_stage=dsa)
    at = torch.arange(tokens.size(1) - 2 * pairs_in(tokens.size(1)), tokens.size(1), 2)
    return Asked(model.head(hidden[:, at]), tokens[:, at + 1],
                 sum(losses) if dsa else 0.0)


class Lesson:
    """Sequences from a seed, and steps on them.

    args: the settings; model: what learns; stage: "", "warmup" or "sparse"
    """

    def __init__(self, args: RecallArgs, model: Transformer, stage: str = ""):
        self.args, self.model, self.stage = args, model, stage
        self.device = model.head.weight.device
        self.dtype = pick_dtype(args.dtype, self.device)
        share = args.sparse_lr if stage else 1.0
        self.optimizers = build_optimizers(model, TrainArgs(
            optimizer="muon", lr=args.lr * share, muon_lr=args.muon_lr * share, weight_decay=0.0,
            indexer_lr=args.indexer_lr), self.dtype)
        number = ("", "warmup", "sparse").index(stage)
        self.generator = torch.Generator().manual_seed(4 * args.seed + number)
        self.steps = 0

    def step(self, length: int) -> Asked:
        """Learn from new sequences of that length."""
        args, self.steps = self.args, self.steps + 1
        tokens = draw(args, max(args.tokens // length, 2), length, self.generator)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            asked = ask(self.model, tokens.to(self.device), self.stage)
        (asked.loss + asked.indexer).backward()
        clip_gradients(self.model, 1.0)
        set_learning_rate(self.optimizers, 1.0 if self.stage else min(self.steps / RISE, 1.0))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return asked


def train_dense(args: RecallArgs, model: Transformer) -> Iterator[tuple[int, int]]:
    """Train until the task is solved; yields length and steps so far whenever a length is."""
    lesson, length, accuracy = Lesson(args, model), SHORTEST, 0.0
    while lesson.steps < args.steps:
        accuracy = 0.9 * accuracy + 0.1 * lesson.step(length).accuracy
        if accuracy > SOLVED:
            yield length, lesson.steps
            if length == args.seq_len:
                return
            length, accuracy = min(2 * length, args.seq_len), 0.0


def with_indexers(model: Transformer, args: RecallArgs) -> Transformer:
    """The same model with indexers that know nothing yet."""
    sparse = Transformer(args.sparse_model()).to(model.head.weight.device)
    load_weights_without_indexer(sparse, model.state_dict())
    return sparse


@torch.no_grad()
def accuracies(args: RecallArgs, model: Transformer) -> list[list]:
    """Rows for each way of attending: its name, accuracy, and recall of attention's mass by layer.

    The model runs in FP32; the sequences are none of those it was trained on.
    """
    generator = torch.Generator().manual_seed(4 * args.seed + 3)
    tokens = draw(args, args.test_sequences, args.seq_len, generator).to(model.head.weight.device)
    parts = tokens.split(max(args.tokens // args.seq_len, 1))
    recall = attention_recall(model, parts[0], args.k)
    rules = {"dense": everything} | {n: best(args.k, s) for n, s in all_scores(model).items()}
    rows = []
    for name, rule in rules.items():
        with selecting(model, rule):
            right = [ask(model, part).accuracy * len(part) for part in parts]
        shares = " ".join(f"{share:.3f}" for share in recall.get(name, []))
        rows += [[name, sum(right) / len(tokens), shares]]
    return rows


def experiment(args: RecallArgs, say: Callable[[str], None] = print) -> dict:
    """Train and measure: `accuracies` after the stages "warmup" and "sparse"."""
    torch.manual_seed(args.seed)
    model = Transformer(args.model()).to(pick_device(args.device))
    start = time.perf_counter()
    for length, steps in train_dense(args, model):
        say(f"{length} tokens solved after {steps} steps, {time.perf_counter() - start:.0f} s")
    model, found = with_indexers(model, args), {}
    freeze_all_but_indexers(model)
    for stage, steps in (("warmup", args.warmup_steps), ("sparse", args.sparse_steps)):
        lesson = Lesson(args, model, stage)
        for _ in range(steps):
            asked = lesson.step(args.seq_len)
        model.requires_grad_(True)
        if steps:
            found[stage] = accuracies(args, model)
            if args.out:
                save_stage(args, model, stage)
            say(f"\nafter {steps} steps of stage {stage}, {time.perf_counter() - start:.0f} s; "
                f"indexers {asked.indexer:.4f} nats a query from attention\n"
                f"{table(found[stage], args.k)}")
    return found


def save_stage(args: RecallArgs, model: Transformer, stage: str) -> None:
    """Keep a model and the settings that made it: STAGE.safetensors and settings.json."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: w.cpu().contiguous() for n, w in model.state_dict().items()},
              folder / f"{stage}.safetensors")
    (folder / "settings.json").write_text(json.dumps(asdict(args), indent=1) + "\n")


def load_stage(folder: str | Path, stage: str) -> tuple[RecallArgs, Transformer]:
    """The settings and the model that `save_stage` kept."""
    args = RecallArgs(**json.loads((Path(folder) / "settings.json").read_text()))
    model = Transformer(args.sparse_model())
    model.load_state_dict(load_file(Path(folder) / f"{stage}.safetensors"))
    return args, model.eval()


def table(rows: list[list], k: int) -> str:
    """`accuracies` for reading."""
    title = [f"attention to {k} tokens", "accuracy", "recall of attention by layer"]
    return format_table([title, *([name, f"{share:.2%}", recall] for name, share, recall in rows)])


def main() -> None:
    """The command line."""
    [given] = parse("minids.lab.recall", __doc__, RecallArgs)
    args = RecallArgs(**given)
    tune_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"recall over {args.seq_len} tokens, {pairs_in(args.seq_len)} pairs, chance "
          f"{1 / VALUES:.2%}; {args.device}, torch {torch.__version__}", flush=True)
    experiment(args, lambda text: print(text, flush=True))


if __name__ == "__main__":
    run_program("minids.lab.recall", main)
