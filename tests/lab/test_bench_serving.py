"""The trace, what is made of the times, and that both ways of batching serve all of it."""

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_models import LITTLE, scrambled
from test_bench import a_run, run

from minids.infer.engine import Engine
from minids.lab import bench_serving
from minids.lab.bench_serving import REPLY, Served, arrivals, as_late, by_engine, coming, static

SHORT = [a._replace(prompt=2 + i, reply=1 + 5 * i % 7) for i, a in enumerate(arrivals(20))]
PROMPTS = [list(range(a.prompt)) for a in SHORT]


def test_the_trace_is_the_same_everywhere():
    trace = arrivals(96)
    assert [(round(a.at, 6), *a[1:]) for a in trace[:2]] == [(1.860607, 39, 69), (2.160249, 23, 65)]
    assert trace[:9] == arrivals(9) and arrivals(9, seed=1) != arrivals(9)
    assert min(a.reply for a in trace) >= REPLY[0] and max(a.reply for a in trace) <= REPLY[1]
    gaps = arrivals(2000)[-1].at / 2000
    assert 0.9 < gaps < 1.1  # a mean of 2000 such gaps: standard deviation 0.02


def test_what_is_made_of_the_times():
    served = Served()
    served.add(1.0).extend([1.5, 1.75, 2.0])
    served.add(2.0).extend([3.0])
    assert served.rate == 2 and served.seconds == 2
    assert served.cells() == ["1.0", "2", "1,000.0", "1,000.0", "250.0", "250.0"]


@pytest.mark.parametrize("most", [1, 3])
def test_requests_come_when_the_trace_says(most):
    seen = [(i, at) for here, came in coming(SHORT, 1e-4, most)
            for i, at in zip(here, came, strict=True)]
    assert [i for i, _ in seen] == [*range(20)]
    gaps = [at - seen[0][1] for _, at in seen]
    assert gaps == pytest.approx([1e-4 * (a.at - SHORT[0].at) for a in SHORT])
    assert all(len(here) <= most for here, _ in coming(SHORT, 0.0, most))
    for here, came in coming(SHORT, 1e-3, most):  # sleeps until somebody is there
        assert len(here) and max(came) <= time.perf_counter()


@pytest.mark.parametrize("how", ["static", "static, by the engine", "continuous"])
@pytest.mark.parametrize("gap", [0.0, 1e-4])
def test_every_request_gets_its_tokens(how, gap):
    model = scrambled(LITTLE, dtype=torch.float32)
    if how == "static":
        served = static(model, 4, SHORT, PROMPTS, gap)
    else:
        engine = Engine(model, 4, queue=len(SHORT))
        served = by_engine(engine, 4 if "engine" in how else 0, SHORT, PROMPTS, gap)
        engine.stop()
    assert [len(times) for times in served.tokens] == [a.reply for a in SHORT]
    assert all(t >= at for at, times in zip(served.asked, served.tokens, strict=True)
               for t in times)
    if how == "static, by the engine" and not gap:  # nobody comes in before all four are done
        ends = [max(times) for times in served.tokens]
        assert all(max(ends[i:i + 4]) <= min(served.tokens[i + 4]) for i in range(0, 16, 4))


def test_the_rate_at_which_first_tokens_come_as_late():
    def run(gap: float) -> Served:  # the longest wait is 1 s at a gap of 1 s, 4 s at a quarter
        return Served([0.0] * 100, [[1 / gap]] * 100)

    assert as_late(run, 1.0, 4.0) == 0.25
    assert 1 / as_late(run, 1.0, 5.0) == pytest.approx(5, rel=0.2)  # sixteenth root of 16
    assert as_late(run, 1.0, 0.5) == 1.0  # it is later at any rate


def test_ways_of_batching_take_turns_at_the_rate_that_saturates_the_static_one(monkeypatch):
    """A then B, B then A; the middle round is shown, and ratios are of the same round."""
    calls, clock, engine = [], iter(range(2, 100)), SimpleNamespace(stop=lambda: None)

    def way(name: str, gap: float) -> Served:
        calls.append((name, gap))
        return Served([0.0], [[float(next(clock))]])
    bench = SimpleNamespace(settings=SimpleNamespace(rows=4, seed=0, device="cpu", pairs=3),
                            args=SimpleNamespace(max_seq_len=48), decoder=lambda max_seq_len: (
                                SimpleNamespace(args=SimpleNamespace(vocab_size=max_seq_len))))
    for name, value in dict(
            Engine=lambda model, rows, longest, queue: engine,
            static=lambda model, rows, trace, prompts, gap: way("static", gap),
            by_engine=lambda engine, at_once, trace, prompts, gap: way(f"engine {at_once}", gap),
            as_late=lambda run, gap, latest: gap / 8, arrivals=lambda count: SHORT).items():
        monkeypatch.setattr(bench_serving, name, value)
    monkeypatch.setattr(bench_serving, "their_manager", lambda *_: 1 / 0)
    _, *rows = bench_serving.batching_table(bench)
    gap = 2 / SHORT[-1].at  # the first call took two seconds for all of the trace
    round_ = [("static", gap), ("engine 4", gap), ("engine 0", gap), ("engine 0", gap / 2),
              ("engine 0", gap / 8)]
    assert calls == [("static", 0.0), ("static", gap), *round_, *round_[::-1], *round_]
    assert [row[1] for row in rows] == [f"{n / gap:.2f}" for n in (1, 1, 1, 2, 8)]
    # Static batching took 4, 13 and 14 seconds, the engine as static 5, 12 and 15.
    assert [row[4] for row in rows[:2]] == ["13,000.0", "12,000.0"]
    assert rows[0][-3:] == ["1.00"] * 3
    assert rows[1][-3:] == [f"{14 / 15:.2f}", f"{4 / 5:.2f}", f"{13 / 12:.2f}"]


@pytest.mark.slow
@pytest.mark.parametrize("rotated", [8, 16])
def test_the_table_of_batching(settings, monkeypatch, capsys, rotated):
    """Transformers' cache takes two tensors of equal width only: it has a row, or its reason."""
    monkeypatch.setattr(bench_serving, "arrivals", lambda count: SHORT)
    before = threading.enumerate()
    flags = "--rows=4", "--kv-lora-rank=16", f"--qk-rope-head-dim={rotated}"
    head, *body = run(settings, "batching", capsys, *flags)
    assert not [t for t in threading.enumerate() if t.name == "engine" and t not in before]
    names = ["static", "static, by the engine", "continuous", "continuous, twice the rate",
             "continuous, as late as static"]
    theirs = ["continuous, by transformers"] if rotated == 16 else []
    assert [row[0] for row in body] == names + theirs
    assert all(len(row) == len(head) for row in body)
    assert [float(cell) for cell in body[0][-3:]] == [1.0] * 3
    assert float(body[3][1]) == pytest.approx(2 * float(body[0][1]), rel=0.01)


def test_clients_read_all_or_leave():
    pytest.importorskip("starlette", reason="starlette is not installed")
    from serve.running import running

    async def ask(server, most: int) -> tuple[int, str]:
        times = []
        body = dict(prompt="1+1", max_tokens=6, temperature=0)
        at = server.url.removeprefix("http://").split(":")
        return times, await bench_serving.ask(at[0], int(at[1]), body, times, most)

    with running(rows=1) as server:
        times, last = asyncio.run(ask(server, -1))
        assert last == "[DONE]" and 1 < len(times) <= 6
        for most in (0, 1):
            assert len(asyncio.run(ask(server, most))[0]) == most
        server.ended()


@pytest.fixture
def few_clients(monkeypatch):
    """One client and two, with short replies and pauses."""
    for name, value in dict(CLIENTS=(1, 2), EACH=1, MOST=8, PAUSE=0.01).items():
        monkeypatch.setattr(bench_serving, name, value)


@pytest.mark.usefixtures("few_clients")
@pytest.mark.parametrize("of", ["a run with a module", "random weights"])
def test_the_table_of_clients_without_http(settings, monkeypatch, capsys, tmp_path, of):
    monkeypatch.setattr(bench_serving, "find_spec", lambda name: None)
    folder = a_run(tmp_path) if of == "a run with a module" else ""
    head, *body = run(settings, "serve", capsys, f"--run={folder}")
    names = ["1 client, without HTTP", "2 clients, without HTTP"]
    assert [row[0] for row in body] == names + [f"{n}, drafts" for n in names if folder]
    assert all(len(row) == len(head) and float(row[2]) > 0 for row in body)
    assert all(float(row[-2]) >= 1 and row[-1].strip() == "0" for row in body)


@pytest.mark.slow
@pytest.mark.usefixtures("few_clients")
def test_the_table_of_clients(settings, capsys):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    head, *body = run(settings, "serve", capsys, "--run=data/r1/rl")
    assert [row[0] for row in body] == ["1 client, over HTTP", "2 clients, over HTTP"]
    assert all(len(row) == len(head) and float(row[2]) > 0 for row in body)
    assert [(float(row[-2]), int(row[-1])) for row in body] == [(1, 0)] * 2
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        run(replace(settings), "serve", capsys, "--run=nowhere")
