"""Long-range recall: the answer depends on a key far back, which sparse attention has to find.

    python -m minids.lab.recall                                 2,048 tokens, on a CPU
    python -m minids.lab.recall --seq-len 1024 --seed 1         quicker: three minutes on one core
    python -m minids.lab.recall --seq-len 8192 --device cuda

On text, at small scale, a sliding window can be as good as any selection, because little of the
loss depends on distant tokens. Here all of it does. A sequence of S tokens is

    filler | key value key value .. | filler | key value key value ..

S / 16 pairs with distinct keys, and at the end the same pairs in another order. The loss is on the
values at the end, which appeared nearly S / 2 tokens earlier. Chance is one in 64. With fewer keys,
in sequences of 512 tokens, the model did not learn the task (one seed).

A small dense model learns this, on short sequences first; then indexers are added and learn from
its attention (V3.2, arXiv 2512.02556, section 2.1.1), and the model continues training under their
selection. The table shows the accuracy of the same model under dense attention and under each way
of selecting k = S / 8 tokens: its indexers, attention's own probabilities, a window, at random.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minids.base.command_line import parse, run_program
from minids.base.fields import option, require
from minids.base.files import read_json, write_json
from minids.base.tables import format_table
from minids.base.tensors import save_tensors
from minids.config import ModelArgs
from minids.infer.validation import all_scores, attention_recall, best, everything, selecting
from minids.model.sparse_attention import freeze_all_but_indexers, load_weights_without_indexer
from minids.model.transformer import Transformer
from minids.runs.device import Machine, pick_dtype
from minids.runs.optimizers import build_optimizers, clip_gradients, set_learning_rate
from minids.runs.settings import TrainArgs

VALUES, FILLERS = 64, 64  # words of each kind; there are S / 8 keys
SHORTEST, FEWEST = 32, 8  # tokens and pairs of the first sequences, which have no filler
SOLVED = 0.99  # accuracy, averaged over about twenty steps, at which longer sequences follow
RISE = 50  # steps in which the learning rate rises
INIT_STD = 0.02  # at 0.1 this model does not learn the task


@dataclass(frozen=True)
class RecallArgs(Machine):
    """The task and its training."""

    seq_len: int = option(2048, "tokens per sequence, a multiple of 16", low=2 * SHORTEST)
    dim: int = option(64, "width of the residual stream")
    n_layers: int = option(2, "transformer blocks; one alone cannot do the task")
    index_n_heads: int = option(4, "heads of the indexers")
    index_head_dim: int = option(32, "width of the indexers' keys, 16 at least")
    index_topk: int = option(0, "tokens that a query attends to; 0: an eighth of seq_len", low=0)
    steps: int = option(3000, "dense training: most steps; it ends when the task is solved", low=1)
    warmup_steps: int = option(200, "steps that train the indexers alone", low=0)
    sparse_steps: int = option(50, "steps that train the model under their selection", low=0)
    tokens: int = option(4096, "tokens per step; a step has two sequences at least", low=1)
    lr: float = option(1e-2, "dense training: AdamW's learning rate, embedding and head", above=0)
    muon_lr: float = option(3e-3, "dense training: Muon's learning rate, other matrices", above=0)
    sparse_lr: float = option(0.1, "later learning rates, as a share of these two", above=0)
    indexer_lr: float = option(3e-3, "learning rate of the indexers", above=0)
    test_sequences: int = option(16, "sequences on which accuracy is measured", low=1)
    dtype: str = option("auto", "precision; auto: bf16 where the hardware multiplies it",
                        ("auto", "bf16", "fp32"))
    out: str = option("", "folder for the models of both stages; none: saves nothing", folder=True)
    seed: int = option(0, "seed of weights and sequences", low=0, high=2 ** 32 - 1)

    def __post_init__(self):
        super().__post_init__()
        require(self, "seq_len", self.seq_len % 16 == 0, "a multiple of 16")
        require(self, "index_topk", self.index_topk < self.seq_len,
                f"below seq_len = {self.seq_len}")
        self.sparse_model()  # refuses invalid settings of the model

    @property
    def k(self) -> int:
        """Return the number of tokens that a query attends to."""
        return self.index_topk or self.seq_len // 8

    @property
    def keys(self) -> int:
        """Return the number of words that are keys: tokens 0, 1, ..; then values and fillers."""
        return max(self.seq_len // 8, 2 * FEWEST)

    def model(self) -> ModelArgs:
        """Return the settings of the dense model."""
        size = dict(vocab_size=self.keys + VALUES + FILLERS, max_seq_len=self.seq_len,
                    original_seq_len=self.seq_len, dim=self.dim, inter_dim=2 * self.dim)
        return ModelArgs(**size, n_layers=self.n_layers, n_dense_layers=self.n_layers,
                         n_routed_experts=0, n_mtp_layers=0, init_std=INIT_STD)

    def sparse_model(self) -> ModelArgs:
        """Return the settings of the same model with indexers."""
        return replace(self.model(), index_n_heads=self.index_n_heads,
                       index_head_dim=self.index_head_dim, index_topk=self.k)


def pairs_in(length: int) -> int:
    """Return the number of key-value pairs in a sequence of `length` tokens."""
    return max(length // 16, FEWEST)


def draw(args: RecallArgs, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return sequences of the task, (batch, length) int64."""
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
    """A model's answers to the keys at the end."""

    logits: Tensor  # (B, pairs, vocab_size)
    loss: Tensor  # mean cross-entropy of the values, nats
    accuracy: float  # share of right answers
    indexer: Tensor | float  # loss of the indexers, summed over layers, or 0


def ask(model: Transformer, tokens: Tensor, dsa: str = "") -> Asked:
    """Run the model on sequences (B, S) int64; dsa: how indexers learn, as `Lesson.stage`."""
    hidden, _, losses = model.hidden(tokens[:, :-1], indexer_stage=dsa)
    at = torch.arange(tokens.size(1) - 2 * pairs_in(tokens.size(1)), tokens.size(1), 2)
    logits, values = model.head(hidden[:, at]), tokens[:, at + 1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), values.flatten())
    accuracy = (logits.argmax(-1) == values).float().mean().item()
    return Asked(logits, loss, accuracy, sum(losses) if dsa else 0.0)


class Lesson:
    """Training steps on new sequences, drawn from the seed.

    stage: "" trains the dense model; "warmup" and "sparse" are V3.2's stages
    """

    def __init__(self, args: RecallArgs, model: Transformer, stage: str = ""):
        self.args, self.model, self.stage = args, model, stage
        self.device = model.head.weight.device
        found = pick_dtype(args.dtype, self.device)
        self.dtype = torch.float32 if found == torch.float16 else found  # no loss is scaled here
        share = args.sparse_lr if stage else 1.0
        rates = dict(lr=args.lr * share, muon_lr=args.muon_lr * share, indexer_lr=args.indexer_lr)
        self.optimizers = build_optimizers(
            model, TrainArgs(optimizer="muon", weight_decay=0.0, **rates), self.dtype)
        number = ("", "warmup", "sparse").index(stage)
        self.generator = torch.Generator().manual_seed(4 * args.seed + number)
        self.steps = 0

    def step(self, length: int) -> Asked:
        """Train on new sequences of `length` tokens; return the answers before the step."""
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
    """Train until the task is solved; yield (length, steps so far) when each length is solved."""
    lesson, length, accuracy = Lesson(args, model), SHORTEST, 0.0
    while lesson.steps < args.steps:
        accuracy = 0.9 * accuracy + 0.1 * lesson.step(length).accuracy
        if accuracy > SOLVED:
            yield length, lesson.steps
            if length == args.seq_len:
                return
            length, accuracy = min(2 * length, args.seq_len), 0.0


def with_indexers(model: Transformer, args: RecallArgs) -> Transformer:
    """Return the same model with untrained indexers."""
    sparse = Transformer(args.sparse_model()).to(model.head.weight.device)
    load_weights_without_indexer(sparse, model.state_dict())
    return sparse


@torch.no_grad()
def accuracies(args: RecallArgs, model: Transformer) -> list[list]:
    """Return name, accuracy, and recall of attention's probability by layer of each way to attend.

    The model runs in FP32, on sequences it was not trained on.
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


def load_stage(folder: str | Path, stage: str) -> tuple[RecallArgs, Transformer]:
    """Return the settings and the model that `main` saved after a stage."""
    args = RecallArgs(**read_json(Path(folder) / "settings.json"))
    model = Transformer(args.sparse_model())
    model.load_state_dict(load_file(Path(folder) / f"{stage}.safetensors"))
    return args, model.eval()


def main() -> None:
    """Train; print `accuracies`, and save the model, after the stages "warmup" and "sparse"."""
    [given] = parse("minids.lab.recall", __doc__, RecallArgs)
    args = RecallArgs(**given)
    device = args.prepare()
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    print(f"recall over {args.seq_len} tokens, {pairs_in(args.seq_len)} pairs, chance "
          f"{1 / VALUES:.2%}; {args.device}, torch {torch.__version__}", flush=True)
    torch.manual_seed(args.seed)
    model, start = Transformer(args.model()).to(device), time.perf_counter()
    for length, steps in train_dense(args, model):
        spent = time.perf_counter() - start
        print(f"{length} tokens solved after {steps} steps, {spent:.0f} s", flush=True)
    model = with_indexers(model, args)
    freeze_all_but_indexers(model)
    for stage, steps in (("warmup", args.warmup_steps), ("sparse", args.sparse_steps)):
        lesson = Lesson(args, model, stage)
        for _ in range(steps):
            asked = lesson.step(args.seq_len)
        model.requires_grad_(True)
        if not steps:
            continue
        rows = [[f"attention to {args.k} tokens", "accuracy", "recall of attention by layer"]]
        rows += [[name, f"{right:.2%}", recall] for name, right, recall in accuracies(args, model)]
        if args.out:
            folder = Path(args.out)
            weights = {name: w.cpu().contiguous() for name, w in model.state_dict().items()}
            save_tensors(weights, folder / f"{stage}.safetensors")
            write_json(folder / "settings.json", asdict(args))
        spent = time.perf_counter() - start
        print(f"\nafter {steps} steps of stage {stage}, {spent:.0f} s; indexers "
              f"{asked.indexer:.4f} nats per query from attention")
        print(format_table(rows), flush=True)


if __name__ == "__main__":
    run_program("minids.lab.recall", main, lasting=True)
