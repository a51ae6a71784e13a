"""The trace, what is made of the times, and that both ways of batching serve all of it."""

import asyncio
from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, scrambled
from test_bench import run

from minids.lab import bench_serving
from minids.lab.bench_serving import REPLY, Served, arrivals, continuous, static

SHORT = [a._replace(prompt=2 + i, reply=1 + 5 * i % 7) for i, a in enumerate(arrivals(20))]
PROMPTS = [list(range(a.prompt)) for a in SHORT]


def test_the_trace_is_the_same_everywhere():
    trace = arrivals()
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


@pytest.mark.parametrize("serve", [static, continuous])
@pytest.mark.parametrize("gap", [0.0, 1e-4])
def test_every_request_gets_its_tokens(serve, gap):
    model = scrambled(LITTLE, dtype=torch.float32)
    served = serve(model, SHORT, PROMPTS, gap)
    assert [len(times) for times in served.tokens] == [a.reply for a in SHORT]
    assert all(t >= at for at, times in zip(served.asked, served.tokens, strict=True)
               for t in times)


def test_the_table_of_batching(settings, monkeypatch, capsys):
    monkeypatch.setattr(bench_serving, "arrivals", lambda: SHORT)
    head, *body = run(settings, "batching", capsys)
    assert [row[0] for row in body] == ["static", "continuous", "continuous, twice the rate"]
    assert all(len(row) == len(head) for row in body)
    assert [float(cell) for cell in body[0][-3:]] == [1.0] * 3
    assert float(body[2][1]) == pytest.approx(2 * float(body[0][1]), rel=0.01)


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


@pytest.mark.slow
def test_the_table_of_clients(settings, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    monkeypatch.setattr(bench_serving, "CLIENTS", (1, 2))
    monkeypatch.setattr(bench_serving, "EACH", 1)
    head, *body = run(settings, "serve", capsys, "--run=data/r1/rl")
    assert [row[0] for row in body] == ["1 client", "2 clients"]
    assert all(len(row) == len(head) and float(row[2]) > 0 for row in body)
    with pytest.raises(ValueError, match="run = 'nowhere'"):
        run(replace(settings), "serve", capsys, "--run=nowhere")
