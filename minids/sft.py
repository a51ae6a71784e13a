"""Supervised fine-tuning: turn a base model into one that answers, with or without a thought.

    python -m minids.sft --from runs/base --data task:calculator
    python -m minids.sft --from runs/base --data jsonl:conversations.jsonl
    python -m minids.sft --from runs/base --preset r1 --data jsonl:reasoning.jsonl
    python -m minids.sft --resume --out runs/base-sft

R1 fine-tunes twice (arXiv 2501.12948): in its cold start (section 2.3.1) and after rejection
sampling (section 2.3.3). Conversations are tokenized in the template of `minids.text.chat`, and the
loss covers only the assistant's tokens. Several samples are packed into a row, and none sees
another (V3, arXiv 2412.19437, section 5.1). The gates' biases are frozen.

A JSONL file has lines {"messages": [{"role": "user", "content": ..}, {"role": "assistant",
"thought": .., "content": ..}]}; `minids.text.chat.checked` reads the thought's other spellings. A
task supplies problems from its training side; a share of the answers includes the worked solution
as a thought. A sample longer than a row is refused.

torchrun spreads the model and each step's rows over many processes, with the numbers of one:

    torchrun --nproc-per-node 2 -m minids.sft --from runs/base --device cpu
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minids.base.command_line import parse, run_program
from minids.base.fields import MOST, option, require
from minids.base.files import read_jsonl
from minids.config import ModelArgs
from minids.model.objective import Packed
from minids.model.transformer import Transformer
from minids.parallel.layout import DataLayout, Layout
from minids.parallel.team import speaking_first, world_size
from minids.rl.examination import Asking, check_room, examine_modes
from minids.runs.learner import Learner
from minids.runs.open import settings
from minids.runs.settings import EvenArgs
from minids.runs.starting import content, learn
from minids.text.chat import MODES, Chat, checked
from minids.text.tasks import Problem, open_task
from minids.text.tokenizer import Tokenizer

# R1's second fine-tuning: AdamW, cosine from 5e-5 to 5e-6, rows of 32,768 tokens, 128 at a time,
# two epochs over some 800,000 samples.
R1 = dict(steps=12_500, lr=5e-5, constant_until=0.0, decay_until=1.0, final_lr=0.1,
          weight_decay=0.1, seq_len=32768, batch_size=128, eval_every=0, save_every=500)
PRESETS = {"tiny": dict(dtype="fp32"), "r1": R1}


@dataclass(frozen=True)
class SftArgs(EvenArgs):
    """The settings of one fine-tuning run."""

    preset: str = option("tiny", "tiny, or r1: the paper's", tuple(PRESETS))
    data: str = option("task:calculator", "conversations: task:NAME or jsonl:PATH")
    examples: int = option(4096, "number of problems to draw from a task", low=1, high=MOST)
    think: float = option(0.4, "share of a task's answers with a thought", low=0, high=1)
    steps: int = option(200, "optimizer steps", low=1)
    seq_len: int = option(256, "tokens in a row", low=1)
    batch_size: int = option(16, "rows in an optimizer step", low=1, high=MOST)
    balance_weight: float = option(1e-4, "weight of the balance loss", low=0)
    mtp_weight: float = option(0.1, "weight of the multi-token prediction loss", low=0)
    task: str = option("", "task to measure accuracy on; none: that of --data, if it is one")
    eval_every: int = option(25, "steps between evaluations; 0: only at the end", low=0)
    eval_problems: int = option(100, "held-out problems in an evaluation", low=1, high=MOST)
    max_new_tokens: int = option(64, "maximum length of a reply, tokens", low=1)
    lr: float = option(1e-2, "peak learning rate of AdamW", above=0)
    muon_lr: float = option(3e-3, "peak learning rate of Muon", above=0)
    optimizer: str = option("muon", "muon: for the matrices inside the blocks", ("adamw", "muon"))
    constant_until: float = option(0.5, "share of the run after which lr falls", low=0, high=1)

    may_change = EvenArgs.may_change | {"eval_every", "eval_problems", "max_new_tokens"}

    @classmethod
    def for_preset(cls, preset: str = "tiny", **given) -> "SftArgs":
        """Return the preset's settings, overridden by those that are given."""
        return cls(**PRESETS.get(preset, {}) | dict(preset=preset) | given)


class Rows:
    """Conversations packed into R rows of S tokens.

    tokens, targets: (R, S) int64
    samples: (R, S) int64, number of the conversation of a token; padding has one of its own
    loss_mask: (R, S) bool, whether a token's target counts in the loss
    """

    def __init__(self, chat: Chat, conversations: list[list[dict]], seq_len: int):
        rows: list[list[tuple]] = []
        size = seq_len + 1
        for number, messages in enumerate(conversations):
            ids, mask = chat.sample(messages)
            if len(ids) > seq_len:
                raise ValueError(f"seq_len = {seq_len} is not valid: conversation {number + 1} has "
                                 f"{len(ids)} tokens")
            if not rows or len(rows[-1]) + len(ids) > size:
                rows.append([])
            rows[-1] += [(token, number, counts) for token, counts in zip(ids, mask, strict=True)]
        padding = (chat.tokenizer.eos_id, len(conversations), False)
        table = torch.tensor([row + [padding] * (size - len(row)) for row in rows])  # (R, S + 1, 3)
        tokens, samples, mask = table.unbind(-1)
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.samples = samples[:, :-1]
        self.loss_mask = mask[:, 1:].bool() & (samples[:, 1:] == self.samples)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor, Packed]:
        """Return the tokens, targets and packing of the `size` rows of a step, counted from 1.

        Every epoch takes each row once, in an order of its own.
        """
        rows = []
        for position in range((step - 1) * size, step * size):
            epoch, at = divmod(position, len(self.tokens))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            rows.append(torch.randperm(len(self.tokens), generator=generator)[at])
        at = torch.stack(rows)
        return self.tokens[at], self.targets[at], Packed(self.samples[at], self.loss_mask[at])


def conversation(problem: Problem, think: bool) -> list[dict]:
    """Return a problem and its answer as messages, with its thought if `think`."""
    thought = dict(thought=problem.thought) if think else {}
    return [dict(role="user", content=problem.question),
            dict(role="assistant", **thought, content=problem.answer)]


def open_conversations(args: SftArgs) -> list[list[dict]]:
    """Return the conversations that `args.data` names; raises `ValueError` naming what is wrong."""
    kind, _, rest = args.data.partition(":")
    if kind == "task" and rest:
        rng = random.Random(f"sft {args.seed}")
        return [conversation(problem, rng.random() < args.think)
                for problem in open_task(rest).some(args.examples, "train", args.seed)]
    found = []
    try:
        if kind != "jsonl" or not rest:
            raise ValueError("valid are task:NAME and jsonl:PATH")
        if not Path(rest).is_file():
            raise ValueError("there is no such file")
        for number, row in read_jsonl(Path(rest)):
            if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
                raise ValueError(f'{rest} line {number} must be an object with a list "messages"')
            try:
                found.append(checked(row["messages"], "assistant"))
            except ValueError as error:
                raise ValueError(f"{rest} line {number}: {error}") from None
        if not found:
            raise ValueError("it is empty")
    except ValueError as error:
        raise ValueError(f"data = {args.data!r} is not valid: {error}") from None
    return found


def balanced_order(conversations: list[list[dict]], seed: int) -> list[list[dict]]:
    """Return the conversations in a random order, so that every row mixes all kinds."""
    return random.Random(seed).sample(conversations, len(conversations))


class FineTuner(Learner):
    """One fine-tuning run: the model, its optimizers and its rows, and how far it has come."""

    program = "sft"

    def __init__(self, args: SftArgs, model_args: ModelArgs, run: Path, tokenizer: Tokenizer):
        require(args, "seq_len", args.seq_len <= model_args.max_seq_len,
                f"at most max_seq_len = {model_args.max_seq_len}")
        conversations = balanced_order(open_conversations(args), args.seed)
        self.rows = Rows(Chat(tokenizer), conversations, args.seq_len)
        name = args.task or (args.data[5:] if args.data.startswith("task:") else "")
        self.task = open_task(name) if name else None
        if self.task:
            check_room(args, model_args.max_seq_len, Chat(tokenizer), self.task)
        self.replies = self.task is not None
        world = self.team.world
        require(args, "batch_size", args.batch_size % world == 0,
                f"a multiple of {world}, the number of ranks")
        super().__init__(args, model_args, run, tokenizer)
        self.more_config = content(args.data)

    def prepare(self, model: Transformer) -> None:
        self.speed_up(model, self.args.compile, self.args.batch_size)

    def accumulate(self) -> tuple[dict, None]:
        """Compute the gradients of the step's rows, those of this rank; returns its metrics.

        The loss is a mean over the tokens of all ranks. Each knows all rows, and so how many there
        are; a mean of the ranks' means would be another loss.
        """
        args, team = self.args, self.team
        tokens, targets, packed = self.rows.batch(self.step, args.batch_size, args.seed)
        learnt = int(packed.loss_mask.sum())
        tokens, targets, *packed = map(team.share, (tokens, targets, *packed))
        share = self.weight(int(packed[1].sum()), learnt)
        with self.autocast():
            losses = self.model.loss(self.send(tokens), self.send(targets), args.mtp_weight,
                                     args.balance_weight, packed=Packed(*map(self.send, packed)))
        main = losses.main * share
        total = (main + args.mtp_weight * (losses.mtp * share)
                 + args.balance_weight * (losses.balance / team.world))
        self.scaler.scale(total).backward()
        loss, main = team.summed(torch.stack([total.detach(), main.detach()]))
        return dict(loss=loss, main=main, learnt=learnt), None

    def weight(self, own: int, learnt: int) -> float:
        """Return what the mean over this rank's tokens counts in that over all; own: their number
        """
        return own / max(learnt, 1)

    def measure(self, record: dict, last: bool) -> float | None:
        """Mark the model in each mode; the best checkpoint has the lowest mean error of thinking
        and direct answers."""
        args = self.args
        if not self.task or not (last or (args.eval_every and self.step % args.eval_every == 0)):
            return None
        how = Asking(max_new_tokens=args.max_new_tokens)
        with self.whole_model() as model, self.autocast():
            record.update(examine_modes(model, self.tokenizer, self.task, args.eval_problems, how,
                                        team=self.team))
        return 1 - (record["think"]["accuracy"] + record["direct"]["accuracy"]) / 2

    def describe(self) -> str:
        tokens, mask = self.rows.tokens, self.rows.loss_mask
        return (f"{self.args.data}: {len(tokens):,} rows of {tokens.size(1)} tokens, "
                f"{int(mask.sum()):,} tokens in the loss mask")

    def line(self, record: dict) -> str:
        marks = "".join(f", {m} {record[m]['accuracy']:.3f}" for m in MODES if m in record)
        return f"loss {record['loss']:.3f}{marks}"


def sft(args: SftArgs, suffix: str = "-sft", layout: Layout | None = None) -> Path:
    """Fine-tune a model; see `minids.runs.starting.learn`."""
    return learn(FineTuner, args, suffix, layout)


def main() -> None:
    with speaking_first():
        given, layout = parse("minids.sft", __doc__, SftArgs, DataLayout)
        args, layout = settings("sft", SftArgs, given), Layout(**layout).fitted(world_size())
    sft(args, layout=layout)


if __name__ == "__main__":
    run_program("minids.sft", main, lasting=True)
