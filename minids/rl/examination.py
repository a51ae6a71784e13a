"""Put problems to a model and score its replies by rule.

The problems are held out, so no training has seen them. With several replies per problem, pass@k is
the probability that at least one of k replies is right (Chen et al., arXiv 2107.03374, section 2.1;
the estimator is unbiased).
"""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from minids.base.fields import require
from minids.infer.generation import generate
from minids.model.transformer import Transformer
from minids.parallel.team import ALONE, Alone
from minids.rl.rewards import accuracy, well_formed
from minids.text.chat import MODES, TEMPLATES, Reply
from minids.text.tasks import Problem, Task
from minids.text.tokenizer import Tokenizer

BATCH = 512  # prompts that are decoded together


class Asking(NamedTuple):
    """Mode and template of the prompts (`minids.text.chat`), and the settings of `generate`."""

    mode: str = "free"
    template: str = "chat"
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Marks(NamedTuple):
    """The shares of replies that are right, well formed, with a thought; mean length, tokens."""

    accuracy: float
    form: float
    thinking: float
    tokens: float


def parts(items: Sequence, size: int) -> Iterator[Sequence]:
    """Yield the items in parts of `size`."""
    return (items[i:i + size] for i in range(0, len(items), size))


def ask(model: Transformer, tokenizer: Tokenizer, questions: Sequence[str], how: Asking
        ) -> list[Reply]:
    """Return the model's reply to each question."""
    form = TEMPLATES[how.template](tokenizer)
    replies = []
    for number, part in enumerate(parts(questions, BATCH)):
        prompts = [form.prompt(question, how.mode) for question in part]
        done = generate(model, prompts, how.max_new_tokens, how.temperature, top_p=how.top_p,
                        seed=how.seed + number, eos_id=tokenizer.eos_ids)
        replies += [form.read(tokens, how.mode) for tokens in done.tokens]
    return replies


def mark(task: Task, problems: Sequence[Problem], replies: Sequence[Reply]) -> Marks:
    """Return the marks of replies, one to each problem."""
    right = [accuracy(task, p, r) for p, r in zip(problems, replies, strict=True)]
    return Marks(fmean(right), fmean(map(well_formed, replies)),
                 fmean(reply.thought is not None for reply in replies),
                 fmean(reply.tokens for reply in replies))


def check_room(args, max_seq_len: int, form, task: Task) -> None:
    """Raise `ValueError` unless `args.max_new_tokens` fit after every question that is examined.

    args: settings that also have `eval_problems`; form: of the prompts
    """
    asked = [*task.some(64, "train", seed=0), *task.some(args.eval_problems, "held-out", seed=0)]
    longest = max(len(form.prompt(p.question, mode)) for p in asked for mode in MODES)
    room = max_seq_len - longest
    require(args, "max_new_tokens", args.max_new_tokens <= room,
            f"at most {room}: max_seq_len is {max_seq_len}, and the questions have up to {longest} "
            "tokens")


def examine(model: Transformer, tokenizer: Tokenizer, task: Task, count: int, how: Asking,
            team: Alone = ALONE) -> Marks:
    """Return the marks on the first `count` held-out problems.

    team: each of its ranks has the model and asks its share; greedy replies are then one process's
    """
    problems = task.some(count, "held-out", seed=0)
    with team.together():
        own = ask(model, tokenizer, [p.question for p in team.share(problems)], how)
    return mark(task, problems, team.joined(own))


def examine_modes(model: Transformer, tokenizer: Tokenizer, task: Task, count: int, how: Asking,
                  modes: Sequence[str] = MODES, team: Alone = ALONE) -> dict[str, dict]:
    """Return the marks in each mode, in place of `how.mode`, as metrics; team: as of `examine`"""
    return {mode: examine(model, tokenizer, task, count, how._replace(mode=mode), team)._asdict()
            for mode in modes}


def pass_at(k: int, right: int, samples: int) -> float:
    """Return the probability that one of k replies, drawn without replacement, is right.

    >>> pass_at(1, 1, 4), pass_at(2, 1, 4)
    (0.25, 0.5)
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def pass_curve(model: Transformer, tokenizer: Tokenizer, task: Task, count: int, samples: int,
               how: Asking) -> dict[int, float]:
    """Return pass@k over `count` held-out problems for k = 1, 2, 4, .. up to `samples`."""
    problems = [p for p in task.some(count, "held-out", seed=0) for _ in range(samples)]
    replies = ask(model, tokenizer, [p.question for p in problems], how)
    right = [accuracy(task, p, r) for p, r in zip(problems, replies, strict=True)]
    each = [int(sum(part)) for part in parts(right, samples)]
    ks = [2 ** i for i in range(samples.bit_length())]
    return {k: fmean(pass_at(k, n, samples) for n in each) for k in ks}
