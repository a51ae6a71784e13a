"""The program itself: killed in streams and started again, a folder that changes underneath."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from kept_port import kept_port
from running import LONGEST
from training_runs import run_main

from minids import ModelArgs, Transformer
from minids.runs.checkpoints import save_checkpoint
from minids.serve import __main__ as serve
from minids.tokenizer import Tokenizer

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ASK = dict(prompt="1+1", max_tokens=200, temperature=2, stream=True, seed=3)
# The program with a worker that stands still after five steps until it is told to stop: a signal
# then comes in the middle of a stream, however slow the machine is.
HELD = """
import runpy, time
from minids.infer.engine import Engine
wait = Engine.wait
def held(self):
    while len(self.batch.log) == 5 and not self.stopping:
        time.sleep(0.01)
    return wait(self)
Engine.wait = held
runpy.run_module("minids.serve", run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def program(*words: str, held: bool = False) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start the server; yield it and its address, or what it said instead."""
    start = ["-c", HELD] if held else ["-m", "minids.serve"]
    # Programs that a shell starts in its background ignore SIGINT, and so do those that they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    made = subprocess.Popen([sys.executable, *start, *words], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, preexec_fn=heed,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        line = made.stdout.readline()
        yield made, line.split()[1] if line else made.stderr.read()
    finally:
        made.kill()
        made.wait()
        made.stdout.close()
        made.stderr.close()


def lines(answer) -> Iterator[str]:
    """Return the lines of a stream that are not empty."""
    return filter(None, answer.iter_lines())


@pytest.fixture
def port() -> Iterator[str]:
    with kept_port() as port:
        yield str(port)


def test_a_signal_ends_streams_with_an_error_event_and_the_port_is_free_again(port):
    stream_of = partial(httpx.stream, "POST", timeout=LONGEST)
    with program("--port", port, held=True) as (server, url):
        with stream_of(f"{url}/v1/completions", json=ASK | dict(n=16)) as answer:
            stream = lines(answer)
            for _ in range(3):
                next(stream)
            server.send_signal(signal.SIGTERM)
            *_, last = stream
        assert json.loads(last[6:])["error"]["code"] == "server_shutting_down"
        _, err = server.communicate(timeout=LONGEST)
        assert server.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM) and err == ""
    with program("--port", port, held=True) as (server, url):
        with stream_of(f"{url}/v1/completions", json=ASK) as answer:
            stream = lines(answer)
            next(stream)
            server.kill()  # nothing is said; the connection breaks
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                list(stream)
    with program("--port", port) as (server, url):
        assert httpx.get(f"{url}/health", timeout=LONGEST).json()["status"] == "ok"
        server.send_signal(signal.SIGINT)
        assert server.wait(LONGEST) == 130
        assert server.stderr.read() == "python -m minids.serve: interrupted\n"


def a_run(folder: Path) -> None:
    """Make a run of a model that has learnt nothing."""
    tokenizer = Tokenizer.load()
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size)
    save_checkpoint(folder, 1, Transformer(args).state_dict(), {"step": 1})
    tokenizer.save(folder / "tokenizer")
    config = dict(model=asdict(args), tokenizer=tokenizer.fingerprint)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["a Hugging Face folder", "a run, whose file is mapped"])
def test_a_folder_that_changes_underneath_is_not_read_again(kind, tmp_path):
    folder = tmp_path / "model"
    if kind == "a Hugging Face folder":
        shutil.copytree(ROOT / "data/r1/rl", folder)
    else:
        a_run(folder)
    with program("--port", "0", "--run", str(folder)) as (server, url):
        def ask() -> list:
            asked = ASK | dict(stream=False)
            return httpx.post(f"{url}/v1/completions", json=asked,
                              timeout=LONGEST).json()["choices"]

        before = ask()
        for file in filter(Path.is_file, folder.rglob("*")):
            os.truncate(file, 0)  # a file that is mapped into memory would end the process
        assert ask() == before
        shutil.rmtree(folder)
        assert ask() == before
        assert server.poll() is None


@pytest.mark.parametrize("words, named", [
    (["--run", "nowhere"], "nowhere"), (["--port", "99999"], "port = 99999"),
    (["--host", "no such host"], "host = 'no such host'"), (["--rows", "0"], "rows = 0"),
    (["--task", "nothing"], "task = 'nothing'")])
def test_a_mistake_is_one_line_and_status_2(words, named):
    said = run_main(serve, "--port", "0", *words)
    assert said.status == 2 and named in said.err and said.err.count("\n") == 1
