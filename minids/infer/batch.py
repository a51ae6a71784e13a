"""Continuous batching: sequences join and leave the running batch between tokens.

Static batching waits until a batch is full, and then until its longest reply is done. Continuous
batching (Orca: Yu et al., OSDI 2022) asks after every token who has finished and who has come:

    step 7   reads the 20 tokens of D's prompt   writes a token of A, B, C and D's first
    step 8                                       writes a token of A, B, C, D; B has finished
    step 9   reads the first 256 of E's 300      writes a token of A, C, D

Long prompts are read in pieces, so that other sequences wait at most one piece. Each request has
its own seed, so its text does not depend on the rest of the batch (in FP32: BF16 rounds products of
another batch size differently, and a close choice may fall the other way). `minids.infer.slots`
stores the latents, and `minids.infer.engine` queues requests.

With drafts, the first MTP module guesses the token after the newest one of each sequence, and the
next step reads both and keeps the guess or replaces it, as `minids.infer.speculative` describes.
Sequences then grow by one or two tokens per step, each at its own pace. It pays while reading the
weights takes most of the time, so with few rows; many rows keep a machine busy by themselves.
"""

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minids.infer.sampling import COLDEST, Sampler, no_token
from minids.infer.slots import Slots
from minids.model.transformer import Transformer

CHUNK, CHUNK_GPU = 256, 8192  # tokens of prompts that a step reads at most, on a CPU and on a GPU
LOGGED = 4096  # newest steps that the log keeps


class Token(NamedTuple):
    """A token of a reply.

    logp: its log-probability in the model's own distribution, before temperature and cuts; nats
    top: the likeliest tokens there and theirs
    experts: by MoE layer, the experts that the token before it visited
    """

    id: int
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    experts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it; `minids.infer.generation.generate` explains each setting.

    ends: tokens that end the reply
    top_logprobs: likeliest tokens to name at each position; -1: no log-probabilities at all
    take: called by the worker with each token; true ends the reply, as a stop string does
    end: called by the worker once, with the reason ("stop", "length", "cancelled" or "error") and
        the error
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] = frozenset()
    top_logprobs: int = -1
    take: Callable[[Token], bool] = lambda token: False
    end: Callable[[str, Exception | None], None] = lambda reason, error: None


@dataclass(eq=False)
class Job:
    """A request that the engine has accepted.

    row: its place in the cache once it has one; copied: tokens of its prompt that were there before
    newest: its last token; draft: a guess at the next, drawn from `expected`, (V,)
    """

    number: int
    request: Request
    random: random.Random
    arrived: float = field(default_factory=time.monotonic)
    row: int = -1
    copied: int = 0
    written: int = 0
    newest: int = -1
    draft: int = -1
    expected: Tensor | None = None
    cancelled: bool = False

    @property
    def way(self) -> tuple[float, int, float]:
        """Return how its tokens are drawn; equal ones are drawn together."""
        r = self.request
        return (r.temperature, r.top_k, r.top_p) if r.temperature >= COLDEST else (0.0, 0, 1.0)


class Step(NamedTuple):
    """The record of one step.

    read: by job number, the prompt tokens that went through the model
    copied: by job number, those that the cache already held
    wrote: the job number of each token; waiting: jobs without a row at its end
    seconds: duration
    """

    read: dict[int, int]
    copied: dict[int, int]
    wrote: list[int]
    waiting: int
    seconds: float


class Batch:
    """The sequences that one model continues together, and those that wait to join.

    rows: sequences that are continued together; max_len: tokens of each, prompt included
    waiting: jobs without a row, the longest wait first; other threads may append to it
    running: jobs that get a token at each step; theirs are the first rows
    reading: the job whose prompt is being read; log: the newest steps
    passes: of single sequences through the model, prompts apart; written: tokens that they wrote
    """

    def __init__(self, model: Transformer, rows: int, max_len: int, chunk: int = 0,
                 drafts: int = 0):
        on_gpu = model.head.weight.device.type == "cuda"
        self.chunk = chunk or (CHUNK_GPU if on_gpu else CHUNK)
        with torch.inference_mode():
            self.slots = Slots(model, rows, max_len, drafts)
        self.model, self.log = self.slots.model, deque(maxlen=LOGGED)
        self.jobs: list[Job | None] = [None] * rows  # by row
        self.waiting: deque[Job] = deque()
        self.running, self.reading, self.seconds = 0, None, 1.0
        self.passes, self.written = 0, 0

    @property
    def busy(self) -> bool:
        """Return whether there is anything to do."""
        return bool(self.waiting) or any(self.jobs)

    def step(self) -> None:
        """Let those who left go, read prompts, and write one token of each running sequence."""
        start, note = time.perf_counter(), Step({}, {}, [], 0, 0.0)
        self.drop_cancelled()
        left, fresh = self.chunk, self.running
        while left > 0 and (job := self.next_to_read(note)):
            left -= self.read(job, left, note)
        self.write(self.jobs[:min(fresh, self.running)], note)
        self.log.append(note._replace(waiting=len(self.waiting),
                                      seconds=time.perf_counter() - start))

    def drop_cancelled(self) -> None:
        """End the jobs whose clients have left, also those that have no row yet."""
        gone = [job for job in [*self.waiting] if job.cancelled]
        for job in gone:
            self.waiting.remove(job)
        for job in gone + [job for job in self.jobs if job and job.cancelled]:
            self.finish(job, "cancelled", None)

    def next_to_read(self, note: Step) -> Job | None:
        """Return the job whose prompt is to be read next, in a row of its own."""
        free = [row for row, job in enumerate(self.jobs) if job is None]
        if self.reading is None and free and self.waiting:
            self.reading = job = self.waiting.popleft()
            job.row = min(free, key=self.slots.used.__getitem__)
            self.jobs[job.row] = job
            job.copied = self.slots.begin(job.row, job.request.prompt)
            note.copied[job.number] = job.copied
        return self.reading

    def read(self, job: Job, most: int, note: Step) -> int:
        """Read some of a prompt, and write the first token after its end; return how many read."""
        prompt, held = job.request.prompt, self.slots.held
        try:
            part = prompt[len(held[job.row]):][:most]
            states, visited = self.slots.read(job.row, part)
            note.read[job.number] = len(part)
            if len(held[job.row]) == len(prompt):
                self.reading = None
                self.swap(job.row, self.running)
                self.running += 1
                self.give([job], self.model.head(states[:, -1:]), visited, note)
            return len(part)
        except Exception as error:
            self.finish(job, "error", error)
            return 1

    def write(self, jobs: list[Job], note: Step) -> None:
        """Write a token of each job; if that fails, of each alone: only those that fail end."""
        if not jobs:
            return
        first = jobs[0].row
        try:
            tokens = [[job.newest, job.draft][:1 + self.slots.drafts] for job in jobs]
            found = self.slots.step(first, first + len(jobs), tokens)
        except Exception as error:
            if len(jobs) == 1:
                return self.finish(jobs[0], "error", error)
            for job in reversed(jobs):  # a job that leaves moves only rows after its own
                self.write([job], note)
            return
        before = len(note.wrote)
        self.give(jobs, *found, note)
        self.passes += len(jobs)
        self.written += len(note.wrote) - before

    def give(self, jobs: list[Job], logits: Tensor, visited: Tensor, note: Step) -> None:
        """Draw tokens for each job, hand them over, and end the replies that are done.

        logits: (n, C, V); visited: (n, C, layers, K): after the newest token and, for C = 2, after
        the draft
        """
        ended, drawn = [], draw(jobs, logits)
        for i, (job, tokens) in enumerate(zip(jobs, drawn, strict=True)):
            self.slots.held[job.row] += tokens[:-1]  # drafts that passed
            try:
                for column, token in enumerate(tokens):
                    found = logits[i, column], visited[i, column]
                    if (reason := self.hand_over(job, token, *found, note)):
                        ended.append((job, reason, None))
                        break
            except Exception as error:
                ended.append((job, "error", error))
        if self.slots.drafts:
            done = [job for job, *_ in ended]
            ended += [end for end in self.guess(jobs, drawn) if end[0] not in done]
        for end in ended:
            self.finish(*end)

    def hand_over(self, job: Job, token: int, logits: Tensor, visited: Tensor, note: Step) -> str:
        """Give a job a token; return the reason if that was its last, or ""."""
        if token == logits.size(-1):
            raise no_token(f"new token {job.written + 1}")
        job.newest, job.written = token, job.written + 1
        note.wrote.append(job.number)
        stop = job.request.take(described(job.request, token, logits, visited))
        if stop or token in job.request.ends:
            return "stop"
        return "length" if job.written == job.request.max_tokens else ""

    def guess(self, jobs: list[Job], drawn: list[list[int]]) -> list[tuple]:
        """Draft a token for each job, after those just drawn; return how those ended that fail."""
        first, most = jobs[0].row, self.model.args.vocab_size - 1
        try:
            tokens = [[min(token, most) for token in row] for row in drawn]
            draft(jobs, self.slots.guess(first, first + len(jobs), tokens, jobs[0].draft < 0))
            return []
        except Exception as error:
            if len(jobs) == 1:
                return [(jobs[0], "error", error)]
            return [end for job, row in zip(jobs, drawn, strict=True)
                    for end in self.guess([job], [row])]

    def finish(self, job: Job, reason: str, error: Exception | None) -> None:
        """Free the row of a job, if it has one, and tell who asked."""
        if job.row >= 0:
            if self.reading is job:
                self.reading = None
            elif job.row < self.running:
                self.running -= 1
                self.swap(job.row, self.running)
            if error is not None:
                self.slots.clear(job.row)
            self.jobs[job.row], job.row = None, -1
            self.seconds += 0.1 * (time.monotonic() - job.arrived - self.seconds)
        with contextlib.suppress(Exception):  # who asked may be gone
            job.request.end(reason, error)

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows of the cache, and the jobs in them."""
        self.slots.swap(a, b)
        self.jobs[a], self.jobs[b] = self.jobs[b], self.jobs[a]
        for row in (a, b):
            if self.jobs[row]:
                self.jobs[row].row = row


@dataclass(frozen=True)
class OwnDraws(Sampler):
    """Draws in which each sequence has random numbers of its own, so that a reply does not depend
    on the others in the batch."""

    jobs: tuple[Job, ...] = ()

    def random(self, count: int, each: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return each job's next numbers, (count, each)."""
        numbers = [[job.random.random() for _ in range(each)] for job in self.jobs]
        return torch.tensor(numbers, dtype=dtype, device=device)


def alike(jobs: list[Job]) -> list[tuple[Sampler, list[int]]]:
    """Return how to draw, and for which of the jobs: those that draw alike do it together."""
    members: dict[tuple, list[int]] = {}
    for i, job in enumerate(jobs):
        members.setdefault(job.way, []).append(i)
    return [(OwnDraws(*way, jobs=tuple(jobs[i] for i in own)), own)
            for way, own in members.items()]


def draft(jobs: list[Job], logits: Tensor) -> None:
    """Give each job a draft and the distribution it was drawn from; logits: (n, V)"""
    for sampler, members in alike(jobs):
        expected = sampler.distribution(logits[members])
        # Where there is no token, any is read: `verify` sees that its probability is NaN.
        drafts = sampler.draw(expected).clamp(max=logits.size(-1) - 1).tolist()
        for i, drafted, own in zip(members, drafts, expected, strict=True):
            jobs[i].draft, jobs[i].expected = drafted, own


def draw(jobs: list[Job], logits: Tensor) -> list[list[int]]:
    """Return the next tokens of each job: the drafts that passed, then one drawn as it wishes,
    V where there is none.

    logits: (n, C, V), after the newest token and, for C = 2, after the draft
    """
    tokens: list[list[int]] = [[] for _ in jobs]
    for sampler, members in alike(jobs):
        own = logits if len(members) == len(jobs) else logits[members]  # (n, C, V)
        if logits.size(1) == 1:
            passed, drawn = [0] * len(members), sampler.sample(own[:, 0]).tolist()
        else:
            drafts = torch.tensor([[jobs[i].draft] for i in members], device=own.device)
            q = torch.stack([jobs[i].expected for i in members])[:, None]  # (n, 1, V)
            found = sampler.verify(drafts, q, sampler.distribution(own))
            passed, drawn = (t.tolist() for t in found)
        for i, count, token in zip(members, passed, drawn, strict=True):
            tokens[i] = [*[jobs[i].draft][:count], token]
    return tokens


def described(request: Request, token: int, logits: Tensor, visited: Tensor) -> Token:
    """Return a token with what the request wants to know about it.

    logits: (V,); visited: (layers, K)
    """
    if request.top_logprobs < 0:
        return Token(token)
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    best = logp.topk(min(request.top_logprobs, len(logp)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(token, logp[token].item(), top, tuple(map(tuple, visited.tolist())))
