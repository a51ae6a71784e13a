"""Serving: the program under many clients, and continuous beside static batching."""

import asyncio
import contextlib
import functools
import json
import logging
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

import torch

from minids.base.command_line import one_line
from minids.base.openmp import end_team
from minids.infer.batch import CHUNK, Request
from minids.infer.engine import Engine
from minids.infer.generation import generate
from minids.lab.bench_setup import Bench
from minids.lab.bench_transformers import NEVER, to_transformers
from minids.lab.timing import RATIOS
from minids.model.transformer import Transformer
from minids.runs.open import open_model, open_source
from minids.serve.__main__ import ServeArgs, serve_run
from minids.text.loaders import open_data

CLIENTS = 1, 8, 64
EACH = 3  # requests of a client, but not fewer in all than the busiest eight have
ROUNDS = 6  # requests of the trace that batching is compared on, for each row of the cache
PROMPT, REPLY = (8, 64), (16, 512)  # tokens, shortest and longest
MOST = 128  # tokens of a client's reply
PAUSE = 0.2  # seconds between a client's reply and its next request, on average
TRIALS = 4  # of rates, until first tokens come as late as with static batching
PAGE = 32  # tokens of a page of transformers' cache


class Arrival(NamedTuple):
    """A request of a trace: when it comes, in mean gaps, and its tokens."""

    at: float
    prompt: int
    reply: int


def arrivals(count: int, seed: int = 0) -> list[Arrival]:
    """Return a trace: Poisson arrivals, lengths whose logarithms are uniform.

    It is the same on every machine: Python guarantees what `random.random` returns after a seed.
    """
    draw, found, now = random.Random(seed), [], 0.0
    for _ in range(count):
        now += draw.expovariate(1.0)
        lengths = (round(low * (high / low) ** draw.random()) for low, high in (PROMPT, REPLY))
        found.append(Arrival(now, *lengths))
    return found


@dataclass
class Served:
    """When each request was asked for and got its tokens, seconds."""

    asked: list[float] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)

    def add(self, at: float) -> list[float]:
        """Note a request; return the list of its tokens' times."""
        self.asked.append(at)
        self.tokens.append([])
        return self.tokens[-1]

    @property
    def seconds(self) -> float:
        """Return the time from the first request to the last token."""
        return max(times[-1] for times in self.tokens if times) - min(self.asked)

    @property
    def rate(self) -> float:
        """Return tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def first(self) -> list[float]:
        """Return each request's time to its first token, seconds."""
        return [times[0] - at for at, times in zip(self.asked, self.tokens, strict=True) if times]

    def cells(self) -> list[str]:
        """Return table cells; their titles are `TITLES`."""
        between = [b - a for times in self.tokens for a, b in zip(times, times[1:], strict=False)]
        found = [f"{len(self.asked) / self.seconds:.1f}", f"{self.rate:,.0f}"]
        for times in (self.first, between or [0.0]):
            found += [f"{1e3 * part(times, share):,.1f}" for share in (0.5, 0.99)]
        return found


TITLES = ["requests/s", "tokens/s", "first token ms, median", "99%", "between tokens ms, median",
          "99%"]


def part(values: list[float], share: float) -> float:
    """Return the value that a share of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Serving(NamedTuple):
    """A server under test: `ask(body, times)` is one client's request, `state()` what it says."""

    name: str
    ask: Callable
    state: Callable[[], dict]


@contextlib.contextmanager
def over_http(bench: Bench, drafts: int) -> Iterator[Serving]:
    """Start `python -m minids.serve`."""
    s = bench.settings
    words = ["--run", s.run, "--port", "0", "--rows", str(s.rows), "--threads", str(s.threads),
             "--device", s.device, "--queue", str(max(CLIENTS)), "--drafts", str(drafts)]
    with subprocess.Popen([sys.executable, "-m", "minids.serve", *words], stdout=subprocess.PIPE,
                          encoding="utf-8") as server:
        try:
            line = server.stdout.readline()
            if not line:
                raise ValueError(f"run = {s.run!r} cannot be served")
            url = line.split()[1]
            host, port = url.removeprefix("http://").split(":")

            def state() -> dict:
                with urllib.request.urlopen(f"{url}/health") as answer:
                    return json.load(answer)

            yield Serving("over HTTP", functools.partial(ask, host, int(port)), state)
        finally:
            server.terminate()


@contextlib.contextmanager
def without_http(bench: Bench, drafts: int) -> Iterator[Serving]:
    """Start the engine in this process: of --run or, without one, of random weights."""
    s, queue = bench.settings, max(CLIENTS)
    if s.run:
        args = ServeArgs(rows=s.rows, queue=queue, drafts=drafts, device=s.device)
        engine = serve_run(open_model(s.run, args.prepare()), args).engine
    else:
        engine = Engine(bench.decoder(), s.rows, PROMPT[1] + MOST, queue)

    async def ask_engine(body: dict, times: list[float]) -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        engine.submit(Request(**body, take=lambda token: times.append(time.perf_counter()),
                              end=lambda *how: loop.call_soon_threadsafe(done.set)))
        await done.wait()

    try:
        yield Serving("without HTTP", ask_engine, engine.state)
    finally:
        engine.stop()


def clients_table(bench: Bench) -> Iterator[list[str]]:
    """Let clients ask a server, read the stream, pause and ask again; with and without drafts."""
    s, text = bench.settings, bench.valid
    widths, start = (0,), without_http
    if s.run:
        source = open_source(s.run)
        text = open_data(s.data, source.tokenizer, s.seq_len).valid
        widths = (0, 1) if source.args.n_mtp_layers else (0,)
        start = over_http if find_spec("starlette") and find_spec("uvicorn") else without_http
    yield ["serving", "requests", *TITLES, "tokens per pass", "graphs"]
    for drafts in widths:
        with start(bench, drafts) as serving:
            run = functools.partial(clients, serving.ask, text.tolist(), s.seed)
            asyncio.run(run(2, 2))
            for count in CLIENTS:
                requests = max(count * EACH, 8 * EACH)
                if s.device == "cuda":  # graphs are made at first use: a third of a second for each
                    asyncio.run(run(count, requests))
                before = serving.state()
                served, after = asyncio.run(run(count, requests)), serving.state()
                passes, written = (after[key] - before[key] for key in ("passes", "written"))
                name = f"{count} client{'s' if count > 1 else ''}, {serving.name}"
                yield [name + ", drafts" * drafts, str(requests), *served.cells(),
                       f"{written / passes:.2f}", str(after["graphs"])]


async def clients(ask: Callable, text: list[int], seed: int, count: int, requests: int) -> Served:
    """Let `count` clients make some requests of a trace, each the next when it has its reply."""
    served, waiting = Served(), iter(arrivals(requests, seed))

    async def one(number: int) -> None:
        draw = random.Random(1000 * seed + number)
        for arrival in waiting:
            await asyncio.sleep(draw.expovariate(1 / PAUSE))
            at = draw.randrange(len(text) - PROMPT[1])
            body = dict(prompt=text[at:at + arrival.prompt], temperature=1, seed=number,
                        max_tokens=min(arrival.reply, MOST))
            await ask(body, served.add(time.perf_counter()))

    await asyncio.gather(*map(one, range(count)))
    return served


async def ask(host: str, port: int, body: dict, times: list[float], most: int = -1) -> str:
    """Send a completion's request and note when each chunk of its stream comes.

    most: chunks after which to leave; -1: stay to the end. Returns what the last event said.
    """
    raw, last = json.dumps(body | dict(stream=True)).encode(), ""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
    await writer.drain()
    while most and (line := await reader.readline()):
        if line.startswith((b"data: ", b'{"error"')):
            last = line.decode().removeprefix("data: ").strip()
            if '"text": ""' not in last and last.startswith('{"id"'):
                times.append(time.perf_counter())
                if len(times) == most:
                    break
    writer.close()
    return last


def coming(trace: list[Arrival], gap: float, most: int) -> Iterator[tuple[range, list[float]]]:
    """Wait for the requests of a trace, and yield who has come since: their numbers, at most so
    many, and when they came. gap: mean seconds between two; 0: all are there."""
    start, done = time.perf_counter(), 0
    while done < len(trace):
        time.sleep(max(0.0, start + trace[done].at * gap - time.perf_counter()))
        now = time.perf_counter() - start
        here = sum(a.at * gap <= now for a in trace[done:done + most])
        yield range(done, done + here), [start + a.at * gap for a in trace[done:done + here]]
        done += here


def static(model: Transformer, rows: int, trace: list[Arrival], prompts: list[list[int]],
           gap: float) -> Served:
    """Serve a trace with `generate`: who has come forms a batch, which ends with its longest."""
    served = Served()
    for here, came in coming(trace, gap, rows):
        times = [served.add(at) for at in came]

        def note(row: int, token: int, here=here, times=times) -> None:
            if len(times[row]) < trace[here[row]].reply:
                times[row].append(time.perf_counter())

        if here:
            generate(model, [prompts[i] for i in here], max(trace[i].reply for i in here),
                     on_token=note)
    return served


def by_engine(engine: Engine, most: int, trace: list[Arrival], prompts: list[list[int]],
              gap: float) -> Served:
    """Serve a trace with the engine; most: that come in together, and nobody after them until they
    are done; 0: each comes in at once."""
    served, left = Served(), threading.Semaphore(0)
    for here, came in coming(trace, gap, most or 1):
        for i, at in zip(here, came, strict=True):
            times = served.add(at)
            engine.submit(Request(
                prompts[i], trace[i].reply, end=lambda *how: left.release(),
                take=lambda token, times=times: times.append(time.perf_counter())))
        for _ in here if most else ():
            left.acquire()
    for _ in () if most else trace:
        left.acquire()
    return served


def by_transformers(model: Transformer, rows: int, trace: list[Arrival], prompts: list[list[int]],
                    gap: float) -> Served:
    """Serve a trace with transformers' continuous batching, whose thread ends with it."""
    served, numbers = Served(), {}
    with their_manager(model, rows) as manager:
        for here, came in coming(trace, gap, 1):
            for i, at in zip(here, came, strict=True):
                times = served.add(at)
                numbers[manager.add_request(prompts[i], max_new_tokens=trace[i].reply,
                                            record_timestamps=True)] = times
        for result in finished(manager, len(numbers)):
            numbers[result.request_id].extend(result.timestamps)
    return served


def finished(manager, count: int) -> Iterator:
    """Yield the next results of transformers' manager; raise `ValueError` with what ended one."""
    while count:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running() or result is not None and result.error:
            raise ValueError(result.error if result else "its thread ended")
        if result is not None and result.is_finished():
            count -= 1
            yield result


@contextlib.contextmanager
def their_manager(model: Transformer, rows: int) -> Iterator:
    """Start transformers' continuous batching with our weights, in a cache that is large enough.

    Its model stores what ours does, a latent and a rotated key, as one key and one value; its cache
    takes both to be equally wide, and their width and number from settings that DeepSeek's models
    use for something else. It runs where the two are equally wide and those settings say so.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel("CRITICAL")  # the reason is raised
    theirs, args = to_transformers(model), model.args
    if args.kv_lora_rank == args.qk_rope_head_dim:
        theirs.config.num_key_value_heads, theirs.config.head_dim = 1, args.kv_lora_rank
    pages = -(-(PROMPT[1] + REPLY[1]) // PAGE) * rows
    size = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
    manager = theirs.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=NEVER),
        ContinuousBatchingConfig(**{size: PAGE}, num_blocks=pages, max_requests_per_batch=rows,
                                 max_batch_tokens=max(CHUNK, rows)))
    manager.start()
    try:
        manager.add_request([*range(8)], max_new_tokens=4)
        [found] = finished(manager, 1)
        if model.head.weight.dtype == torch.float32:
            assert found.generated_tokens == generate(model, [[*range(8)]], 4).tokens[0]
        end_team()  # of this thread: theirs computes now
        yield manager
    finally:
        manager.stop(timeout=5)


def as_late(run: Callable[[float], Served], gap: float, latest: float) -> float:
    """Return about the shortest mean gap, from a sixteenth of `gap` to all of it, at which 99 % of
    first tokens come within `latest` seconds."""
    low, high = gap / 16, gap
    for _ in range(TRIALS):
        middle = (low * high) ** 0.5
        if part(run(middle).first, 0.99) <= latest:
            high = middle
        else:
            low = middle
    return high


def batching_table(bench: Bench) -> Iterator[list[str]]:
    """Serve one trace at the rate that saturates static batching, each way in turn, and with
    continuous batching at twice that rate, and at the rate at which its first tokens come as late.

    The ratio is of tokens per second, to static batching in the same round; latencies are those of
    the round in the middle.
    """
    s, longest = bench.settings, PROMPT[1] + REPLY[1]  # `generate` aligns the longest of both
    model = bench.decoder(max_seq_len=max(longest, bench.args.max_seq_len))
    trace, draw = arrivals(ROUNDS * s.rows), random.Random(s.seed)
    prompts = [[draw.randrange(model.args.vocab_size) for _ in range(a.prompt)] for a in trace]
    yield ["batching", "arrivals/s", *TITLES, *RATIOS]
    engine = Engine(model, s.rows, longest, queue=len(trace))
    by_generate = functools.partial(static, model, s.rows)
    at_once = functools.partial(by_engine, engine, 0)
    if s.device == "cuda":
        at_once(trace, prompts, 0.0)  # graphs are made at first use
    gap = by_generate(trace, prompts, 0.0).seconds / trace[-1].at
    latest = part(by_generate(trace, prompts, gap).first, 0.99)
    as_late_gap = as_late(functools.partial(at_once, trace, prompts), gap, latest)
    ways: dict[str, tuple[Callable, float]] = {
        "static": (by_generate, gap),
        "static, by the engine": (functools.partial(by_engine, engine, s.rows), gap),
        "continuous": (at_once, gap), "continuous, twice the rate": (at_once, gap / 2),
        "continuous, as late as static": (at_once, as_late_gap)}
    with contextlib.ExitStack() as stack:
        stack.callback(engine.stop)
        try:
            with their_manager(model, s.rows):  # does it take the model?
                ways["continuous, by transformers"] = (
                    functools.partial(by_transformers, model, s.rows), gap)
        except Exception as error:  # whatever it says about a model, a device or a version
            print(f"transformers: {one_line(error)[:300]}", file=sys.stderr, flush=True)
        found: dict[str, list[Served]] = {name: [] for name in ways}
        for turn in range(s.pairs):
            for name in list(ways)[::1 - 2 * (turn % 2)]:
                way, own = ways[name]
                found[name].append(way(trace, prompts, own))
    for name, (_, own) in ways.items():
        ratios = [a.rate / b.rate for a, b in zip(found[name], found["static"], strict=True)]
        middle = sorted(found[name], key=lambda served: served.rate)[s.pairs // 2]
        yield [name, f"{1 / own:.2f}", *middle.cells(),
               *(f"{of(ratios):.2f}" for of in (statistics.median, min, max))]
