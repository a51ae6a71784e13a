"""Put problems to a model and mark its replies by rule."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from minids.generate import generate
from minids.model.transformer import Transformer
from minids.rl.rewards import accuracy, well_formed
from minids.text.chat import TEMPLATES, Reply
from minids.text.tasks import Problem, Task
from minids.text.tokenizer import Tokenizer

BATCH = 512  # prompts that are decoded together


class Marks(NamedTuple):
    """What replies are worth, means over all of them.

    accuracy, form: shares of right and of well-formed replies
    thinking: share that think; tokens: length
    """

    accuracy: float
    form: float
    thinking: float
    tokens: float


def parts(items: Sequence, size: int) -> Iterator[Sequence]:
    """The items, so many at a time."""
    return (items[i:i + size] for i in range(0, len(items), size))


def ask(model: Transformer, tokenizer: Tokenizer, questions: Sequence[str], mode: str = "free",
        template: str = "chat", max_new_tokens: int = 64, temperature: float = 0.0,
        top_p: float = 1.0, seed: int = 0) -> list[Reply]:
    """The model's reply to each question; the other arguments are those of `generate`."""
    form = TEMPLATES[template](tokenizer)
    replies = []
    for number, part in enumerate(parts(questions, BATCH)):
        done = generate(model, [form.prompt(question, mode) for question in part], max_new_tokens,
                        temperature, top_p=top_p, seed=seed + number, eos_id=tokenizer.eos_id)
        replies += [form.read(tokens, mode) for tokens in done.tokens]
    return replies


def mark(task: Task, problems: Sequence[Problem], replies: Sequence[Reply]) -> Marks:
    """The marks of replies, one to each problem."""
    right = [accuracy(task, p, r) for p, r in zip(problems, replies, strict=True)]
    return Marks(fmean(right), fmean(map(well_formed, replies)),
                 fmean(reply.thought is not None for reply in replies),
                 fmean(reply.tokens for reply in replies))


def examine(model: Transformer, tokenizer: Tokenizer, task: Task, count: int,
            **how) -> Marks:
    """The marks on the first `count` held-out problems; how: as in `ask`."""
    problems = task.some(count, "held-out", seed=0)
    return mark(task, problems, ask(model, tokenizer, [p.question for p in problems], **how))


def pass_at(k: int, right: int, samples: int) -> float:
    """Chance that one of k replies is right, drawn from `samples` of which `right` are.

    >>> pass_at(1, 1, 4), pass_at(2, 1, 4)
    (0.25, 0.5)
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def pass_curve(model: Transformer, tokenizer: Tokenizer, task: Task, count: int, samples: int,
               **how) -> dict[int, float]:
    """pass@k over `count` held-out problems for k = 1, 2, 4, .. up to `samples`."""
    problems = [p for p in task.some(count, "held-out", seed=0) for _ in range(samples)]
    replies = ask(model, tokenizer, [p.question for p in problems], **how)
    right = [accuracy(task, p, r) for p, r in zip(problems, replies, strict=True)]
    each = [int(sum(part)) for part in parts(right, samples)]
    ks = [2 ** i for i in range(samples.bit_length())]
    return {k: fmean(pass_at(k, n, samples) for n in each) for k in ks}
