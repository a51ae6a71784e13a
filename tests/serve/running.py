"""A server in a thread of this process, whose engine a test can hold still."""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minids.runs.open import open_model
from minids.serve.__main__ import ServeArgs, serve_run

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 120  # seconds until something that must happen has happened


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + LONGEST
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Running:
    """A server and its address.

    still: cleared, the engine's worker stands before its next step; stepping: whether it is in one
    left: tokens until it stands by itself
    """

    def __init__(self, served, url: str):
        self.served, self.engine, self.url = served, served.engine, url
        self.still, self.stepping, self.left = threading.Event(), False, math.inf
        self.still.set()
        step = self.engine.batch.step

        def held() -> None:
            self.stepping = True
            self.still.wait()
            step()
            self.left -= len(self.engine.batch.log[-1].wrote)
            if self.left <= 0:
                self.left = math.inf
                self.still.clear()
            self.stepping = False

        self.engine.batch.step = held

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Let the engine stand still, and go on at the end until nobody is served."""
        self.ended()
        self.still.clear()
        try:
            yield
        finally:
            self.still.set()
            self.ended()

    @contextlib.contextmanager
    def standing_after(self, tokens: int) -> Iterator[Callable[[], None]]:
        """Let the engine stand once it has written so many tokens; call what is yielded to wait
        until it does. The last token arrives a moment earlier."""
        self.ended()
        self.left = tokens
        try:
            yield lambda: until(lambda: not self.still.is_set())
        finally:
            self.left = math.inf
            self.still.set()

    def asked(self, replies: int) -> None:
        """Wait until so many replies run or wait."""
        until(lambda: sum(map(self.engine.state().get, ("running", "waiting"))) == replies)

    def ended(self) -> None:
        """Wait until nobody is served any more, and the last step, which tells clients before it
        ends, is over. In this order: no step begins while nobody is served."""
        until(lambda: not self.engine.batch.busy and not self.stepping)


@contextlib.contextmanager
def running(run: str = "data/r1/rl", limits: dict | None = None, **settings) -> Iterator[Running]:
    """Serve a run on a free port."""
    import uvicorn

    from minids.serve.app import Limits, make_app

    served = serve_run(open_model(ROOT / run), ServeArgs(**settings))
    at = socket.socket()
    at.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(
        make_app(served, Limits(**limits or {})), log_level="warning", lifespan="off",
        timeout_graceful_shutdown=1, timeout_keep_alive=600))
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[at]), daemon=True)
    thread.start()
    until(lambda: server.started)
    made = Running(served, f"http://127.0.0.1:{at.getsockname()[1]}")
    try:
        yield made
    finally:
        made.still.set()
        served.engine.stop()
        server.should_exit = True
        thread.join()
        at.close()
