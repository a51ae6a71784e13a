"""Serving: the program under many clients, and continuous beside static batching."""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from minids.infer.batch import Request
from minids.infer.engine import Engine
from minids.infer.generation import generate
from minids.lab.bench_setup import Bench
from minids.lab.timing import RATIOS
from minids.model.transformer import Transformer

CLIENTS = 1, 8, 64
EACH = 3  # requests of a client, but not fewer in all than the busiest eight have
ROWS = 16
TRACE = 96  # requests of the trace that batching is compared on
PROMPT, REPLY = (8, 64), (16, 512)  # tokens, shortest and longest
PAUSE = 0.2  # seconds between a client's reply and its next request, on average


class Arrival(NamedTuple):
    """A request of a trace: when it comes, in mean gaps, and its tokens."""

    at: float
    prompt: int
    reply: int


def arrivals(count: int = TRACE, seed: int = 0) -> list[Arrival]:
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

    def cells(self) -> list[str]:
        """Return table cells; their titles are `TITLES`."""
        pairs = list(zip(self.asked, self.tokens, strict=True))
        first = [times[0] - at for at, times in pairs if times]
        between = [b - a for times in self.tokens for a, b in zip(times, times[1:], strict=False)]
        found = [f"{len(self.asked) / self.seconds:.1f}", f"{self.rate:,.0f}"]
        for times in (first, between or [0.0]):
            found += [f"{1e3 * part(times, share):,.1f}" for share in (0.5, 0.99)]
        return found


TITLES = ["requests/s", "tokens/s", "first token ms, median", "99%", "between tokens ms, median",
          "99%"]


def part(values: list[float], share: float) -> float:
    """Return the value that a share of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def clients_table(bench: Bench) -> Iterator[list[str]]:
    """Start `python -m minids.serve` and let clients ask over HTTP, read the stream, and pause."""
    s = bench.settings
    yield ["serving", "requests", *TITLES]
    words = ["--run", s.run, "--port", "0", "--rows", str(ROWS), "--threads", str(s.threads),
             "--device", s.device, "--queue", str(max(CLIENTS))]
    with subprocess.Popen([sys.executable, "-m", "minids.serve", *words], stdout=subprocess.PIPE,
                          encoding="utf-8") as server:
        try:
            line = server.stdout.readline()
            if not line:
                raise ValueError(f"run = {s.run!r} cannot be served")
            host, port = line.split()[1].removeprefix("http://").split(":")
            asyncio.run(clients(host, int(port), 2, 2, s.seed))  # warms up
            for count in CLIENTS:
                requests = max(count * EACH, 8 * EACH)
                served = asyncio.run(clients(host, int(port), count, requests, s.seed))
                yield [f"{count} client{'s' if count > 1 else ''}", str(requests), *served.cells()]
        finally:
            server.terminate()


async def clients(host: str, port: int, count: int, requests: int, seed: int) -> Served:
    """Let `count` clients make some requests of a trace, each the next when it has its reply."""
    served, waiting = Served(), iter(arrivals(requests, seed))

    async def one(number: int) -> None:
        draw = random.Random(1000 * seed + number)
        for arrival in waiting:
            await asyncio.sleep(draw.expovariate(1 / PAUSE))
            body = dict(prompt=[1 + draw.randrange(200) for _ in range(arrival.prompt)],
                        max_tokens=min(arrival.reply, 128), temperature=1, seed=number)
            await ask(host, port, body, served.add(time.perf_counter()))

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


def static(model: Transformer, trace: list[Arrival], prompts: list[list[int]], gap: float
           ) -> Served:
    """Serve a trace with `generate`: who has come forms a batch, which ends with its longest."""
    served, start, done = Served(), time.perf_counter(), 0
    while done < len(trace):
        now = (time.perf_counter() - start) / gap if gap else float("inf")
        here = [a for a in trace[done:done + ROWS] if a.at <= now]
        if not here:
            time.sleep(max(0.0, (trace[done].at - now) * gap))
            continue
        batch = prompts[done:done + len(here)]
        times = [served.add(start + arrival.at * gap) for arrival in here]

        def note(row: int, token: int, here=here, times=times) -> None:
            if len(times[row]) < here[row].reply:
                times[row].append(time.perf_counter())

        generate(model, batch, max(arrival.reply for arrival in here), on_token=note)
        done += len(here)
    return served


def continuous(model: Transformer, trace: list[Arrival], prompts: list[list[int]], gap: float
               ) -> Served:
    """Serve a trace with the engine."""
    engine, served, left = Engine(model, ROWS, queue=len(trace)), Served(), threading.Semaphore(0)
    start = time.perf_counter()
    for arrival, prompt in zip(trace, prompts, strict=True):
        time.sleep(max(0.0, start + arrival.at * gap - time.perf_counter()))
        times = served.add(start + arrival.at * gap)
        engine.submit(Request(prompt, arrival.reply, end=lambda *how: left.release(),
                              take=lambda token, times=times: times.append(time.perf_counter())))
    for _ in trace:
        left.acquire()
    engine.stop()
    return served


def batching_table(bench: Bench) -> Iterator[list[str]]:
    """Serve one trace at the rate that saturates static batching, both ways in turn, and with
    continuous batching at twice that rate.

    The ratio is of tokens per second, to static batching in the same round; latencies are those of
    the round in the middle.
    """
    s, model, trace = bench.settings, bench.decoder(), arrivals()
    longest = PROMPT[1] + REPLY[1]  # `generate` aligns the longest prompt and the longest reply
    if longest > model.args.max_seq_len:
        model = bench.decoder(max_seq_len=longest)
    draw = random.Random(s.seed)
    prompts = [[draw.randrange(model.args.vocab_size) for _ in range(a.prompt)] for a in trace]
    yield ["batching", "arrivals/s", *TITLES, *RATIOS]
    gap = static(model, trace, prompts, 0.0).seconds / trace[-1].at
    ways: dict[str, tuple[Callable, float]] = {
        "static": (static, gap), "continuous": (continuous, gap),
        "continuous, twice the rate": (continuous, gap / 2)}
    found: dict[str, list[Served]] = {name: [] for name in ways}
    for turn in range(s.pairs):
        for name in list(ways)[::1 - 2 * (turn % 2)]:
            way, own = ways[name]
            found[name].append(way(model, trace, prompts, own))
    for name, (_, own) in ways.items():
        ratios = [a.rate / b.rate for a, b in zip(found[name], found["static"], strict=True)]
        middle = sorted(found[name], key=lambda served: served.rate)[s.pairs // 2]
        yield [name, f"{1 / own:.2f}", *middle.cells(),
               *(f"{of(ratios):.2f}" for of in (statistics.median, min, max))]
