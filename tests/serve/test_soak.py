"""Many requests with clients that leave at random: no row is lost, nobody is left without an end.

    pytest -n 0 -m exhaustive tests/serve/test_soak.py          # 10,000 requests
"""

import asyncio
import collections
import gc
import random

import pytest
from running import running, until

from minids.infer.batch import Job
from minids.lab.bench_serving import ask
from minids.lab.timing import process_memory
from minids.serve.replies import Choice, Reply

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed")

CLIENTS = 24  # at once; the server has 8 rows and 8 places to wait
KNOWN = "[DONE]", "rate_limit_exceeded", '"param": "temperature"'
GROWN = 16 * 2 ** 20  # bytes that ten thousand requests may add: the log's newest steps, the heap


async def soak(server, count: int) -> tuple[collections.Counter, list[int]]:
    """Let clients ask, read all, or leave; return what their last events were, and memory."""
    host, port = server.url.removeprefix("http://").split(":")
    left, said, memory = iter(range(count)), collections.Counter(), []

    async def client(number: int) -> None:
        draw = random.Random(number)
        for i in left:
            if i % (count // 20) == count // 40:
                gc.collect()
                memory.append(process_memory("VmRSS"))
            body = dict(prompt=["1+1", "3*7", "2"][draw.randrange(3)] * draw.randint(1, 4),
                        max_tokens=draw.randint(1, 24), n=draw.randint(1, 3), temperature=1.0,
                        seed=i, stop=[None, "="][draw.randrange(2)])
            if draw.random() < 0.05:
                body["temperature"] = -1
            times, leaves = [], draw.random() < 0.4
            last = await ask(host, int(port), body, times, draw.randint(0, 9) if leaves else -1)
            said[next((word for word in KNOWN if word in last), "left" if leaves else last)] += 1

    await asyncio.gather(*map(client, range(CLIENTS)))
    return said, memory


def check_soak(count: int) -> list[int]:
    """Soak a server; return the process's memory at twenty points, bytes."""
    ends: dict[int, list[str]] = {}
    with running(rows=8, queue=8) as server:
        batch, submit = server.engine.batch, server.engine.submit
        finish = batch.finish

        def noted(*requests):
            jobs = submit(*requests)
            for job in jobs:
                ends.setdefault(job.number, [])
            return jobs

        def finished(job, reason, error):
            ends.setdefault(job.number, []).append(reason)
            finish(job, reason, error)

        server.engine.submit, batch.finish = noted, finished
        said, memory = asyncio.run(soak(server, count))
        server.ended()
        assert set(said) <= {*KNOWN, "left"} and sum(said.values()) == count, said
        reasons = collections.Counter(reason for [reason] in ends.values())  # each ended once
        assert set(reasons) <= {"length", "stop", "cancelled"}
        assert batch.jobs == [None] * 8 and batch.running == 0 and batch.reading is None
        del server.engine.submit, batch.finish
        said, _ = asyncio.run(soak(server, 40))  # and all rows are of use
        assert said["[DONE]"]
        server.ended()

        def kept() -> list:
            gc.collect()
            return [o for o in gc.get_objects() if isinstance(o, Job | Reply | Choice)]

        until(lambda: len(kept()) <= 16)  # the worker and the loop may hold their last request
    return memory


@pytest.mark.slow
def test_a_hundred_and_twenty_requests():
    check_soak(120)


@pytest.mark.exhaustive
def test_ten_thousand_requests():
    memory = check_soak(10_000)
    print([f"{m / 2 ** 20:.0f} MiB" for m in memory])
    assert memory[-1] - memory[2] < GROWN
