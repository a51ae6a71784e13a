"""A server in a thread of this process, whose engine a test can hold still."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minids.runs.open import open_model
from minids.serve.__main__ import ServeArgs, serve_run

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 60  # seconds until something that must happen has happened


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + LONGEST
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Running:
    """A server and its address.

    still: cleared, the engine's worker stands before its next step
    """

    def __init__(self, served, url: str):
        self.served, self.url, self.still = served, url, threading.Event()
        self.engine, self.still = served.engine, threading.Event()
        self.still.set()
        step = self.engine.batch.step

        def held() -> None:
            self.still.wait()
            step()

        self.engine.batch.step = held

    @contextlib.contextmanager
    def standing_after(self, tokens: int) -> Iterator[Callable[[], None]]:
        """Let the engine stand once it has written so many tokens; call what is yielded to wait
        until it does. The last token arrives a moment earlier."""
        step, left = self.engine.batch.step, [tokens]

        def counted() -> None:
            step()
            left[0] -= len(wrote := self.engine.batch.log[-1].wrote)
            if wrote and left[0] == 0:
                self.still.clear()

        self.engine.batch.step = counted
        try:
            yield lambda: until(lambda: not self.still.is_set())
        finally:
            self.engine.batch.step = step
            self.still.set()

    def ended(self) -> None:
        """Wait until nobody is served any more."""
        until(lambda: not self.engine.batch.busy)


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
        timeout_graceful_shutdown=1))
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
