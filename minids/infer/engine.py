"""The serving engine: one worker owns the model; any thread may ask it, and leave again.

The worker runs the steps of a batch (`minids.infer.batch`) while there is something to do. Requests
that find no row wait in a queue, and those that find no place there are refused, with the seconds
after which to try again: a client that waits for ever is worse off than one that is told.
"""

import atexit
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import SimpleQueue

import torch

from minids.base.fields import demand
from minids.base.openmp import end_team
from minids.infer.batch import Batch, Job, Request, Token
from minids.infer.generation import check_arguments
from minids.model.transformer import Transformer

IDLE = 1.0  # seconds after which a worker that nobody woke looks whether to end


class Full(Exception):
    """The queue is full; `seconds` until a request is likely to find a place."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Stopped(Exception):
    """The engine was stopped before the request was done."""


class Engine:
    """Serves requests with one model, from a thread of its own.

    rows: sequences that are continued together; max_len: tokens of each, prompt included
    queue: requests that may wait for a row
    chunk: tokens of prompts that a step reads at most; 0: what suits the device
    drafts: tokens that the first MTP module drafts before each step, 0 or 1
    precision: makes the context in which the model runs, such as autocast's
    """

    def __init__(self, model: Transformer, rows: int = 16, max_len: int = 0, queue: int = 64,
                 chunk: int = 0, drafts: int = 0,
                 precision: Callable[[], contextlib.AbstractContextManager] =
                 contextlib.nullcontext):
        self.args, self.queue, self.precision = model.args, queue, precision
        self.max_len = min(max_len or model.args.max_seq_len, model.args.max_seq_len)
        demand("drafts", drafts, drafts in (0, 1), "0 or 1")
        demand("drafts", drafts, drafts <= model.args.n_mtp_layers,
               "0: this model has no MTP module to draft with")
        with precision():
            self.batch = Batch(model, rows, self.max_len, chunk, drafts)
        self.wake, self.stopping = threading.Condition(), False
        self.accepted, self.broken = 0, None
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.thread.start()
        atexit.register(self.stop)  # Python aborts if it ends while this thread is inside torch
        end_team()  # with which this thread has made the model

    def check(self, request: Request) -> None:
        """Raise `ValueError` naming the setting of a request that is not valid."""
        r = request
        check_arguments(self.args, [r.prompt], r.max_tokens, r.temperature, r.top_k, r.top_p, 0)
        if len(r.prompt) + r.max_tokens > self.max_len:
            raise ValueError(f"prompts: {len(r.prompt)} tokens and max_new_tokens = {r.max_tokens} "
                             f"are too many together: a sequence has {self.max_len}")

    def submit(self, *requests: Request) -> list[Job]:
        """Queue requests, all or none.

        Raises `Full`, `Stopped`, or `ValueError` for a request that is not valid.
        """
        for request in requests:
            self.check(request)
        batch = self.batch
        end_team()  # of who asks: the worker computes now
        with self.wake:
            if self.stopping:
                raise Stopped("the server is shutting down") from self.broken
            inside = len(batch.waiting) + len(batch.jobs) - batch.jobs.count(None)
            if inside + len(requests) > len(batch.jobs) + self.queue:
                rounds = (inside + len(requests)) / len(batch.jobs)
                raise Full(max(1, round(batch.seconds * rounds)))
            new = [Job(self.accepted + i, request, random.Random(request.seed))
                   for i, request in enumerate(requests)]
            self.accepted += len(new)
            batch.waiting.extend(new)
            self.wake.notify()
        return new

    def cancel(self, *jobs: Job) -> None:
        """Let jobs end as soon as the step under way is done; those that have ended stay so."""
        with self.wake:
            for job in jobs:
                job.cancelled = True
            self.wake.notify()

    def stream(self, request: Request) -> Iterator[Token]:
        """Yield the tokens of one reply; raise the error that ended it. Closing it cancels."""
        arriving: SimpleQueue = SimpleQueue()

        def take(token: Token) -> bool:
            arriving.put(token)
            return request.take(token)

        def end(reason: str, error: Exception | None) -> None:
            request.end(reason, error)
            arriving.put((error,))

        [job] = self.submit(replace(request, take=take, end=end))
        try:
            while isinstance(got := arriving.get(), Token):
                yield got
            if got[0] is not None:
                raise got[0]
        finally:
            self.cancel(job)

    def close(self) -> None:
        """Ask the worker to end every request with `Stopped`, and itself.

        A signal's handler may call this, in whatever it interrupts: it waits for no lock. Where
        another thread holds it, the worker sees by itself that it is to end.
        """
        self.stopping = True
        if self.wake.acquire(blocking=False):
            self.wake.notify()
            self.wake.release()

    def stop(self) -> None:
        """Close the engine, and wait until the worker is done."""
        with self.wake:
            self.close()
        self.thread.join()
        atexit.unregister(self.stop)

    def state(self) -> dict[str, int]:
        """Return how many requests run and wait, the bytes of the cache, all and in use, and since
        the start: passes of sequences through the model, the tokens that they wrote, and graphs."""
        batch, each = self.batch, self.batch.slots.bytes_per_token
        rows = [row for row, job in enumerate(batch.jobs) if job]
        return dict(running=len(rows), waiting=len(batch.waiting), rows=len(batch.jobs),
                    passes=batch.passes, written=batch.written, graphs=batch.slots.captured,
                    cache_bytes=each * self.max_len * len(batch.jobs), cache_bytes_per_token=each,
                    cache_bytes_used=each * sum(len(batch.slots.held[row]) for row in rows))

    def work(self) -> None:
        """Run steps while there is something to do, until the engine is stopped."""
        try:
            with torch.inference_mode(), self.precision():
                while self.wait():
                    self.batch.step()
        except BaseException as error:  # a fault of the engine: clients must not hang
            self.broken = error
            raise
        finally:
            with self.wake:
                self.stopping = True
            for job in [*filter(None, self.batch.jobs), *self.batch.waiting]:
                with contextlib.suppress(Exception):  # who asked may be gone
                    job.request.end("error", Stopped("the server is shutting down"))

    def wait(self) -> bool:
        """Wait for something to do; return false when the engine is stopped."""
        with self.wake:
            while not (self.stopping or self.batch.busy):
                end_team()
                self.wake.wait(IDLE)
            return not self.stopping
