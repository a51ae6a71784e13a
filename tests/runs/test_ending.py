"""Python ends while a thread is inside torch. Until 3.14 that aborted the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys, threading, time, torch; sys.argv[0] = '-m'"
GUEST = """
from minids.runs import waiting

class Slow(waiting.Guest):
    def stay(self):
        while not self.leave.is_set():
            torch.ones(2 ** 18).add_(1)

waiting.Guest, waiting.EVERY, waiting.BUSY = Slow, 0.05, -1.0  # a guest comes at the first look
waiting.watch_waiting()
time.sleep(0.3)
"""
WRITER = """
from minids.base.command_line import run_program
from minids.runs.writer import Writer

def main():
    def write():
        while True:
            begun.set()
            torch.ones(2 ** 18).add_(1)

    writer, begun = Writer(), threading.Event()
    writer.run(write, beside=True)
    begun.wait()
    raise KeyboardInterrupt  # the second one: it does not wait for the writer

run_program("minids.train", main)
"""
ENGINE = """
from small_models import LITTLE, scrambled
from minids.infer.batch import Request
from minids.infer.engine import Engine

engine = Engine(scrambled(LITTLE), rows=1)
step = engine.batch.step
engine.batch.step = lambda: (step(), [torch.ones(2 ** 18).add_(1) for _ in range(99)])
reply = engine.stream(Request([1, 2], 40))
next(reply)
"""


@pytest.mark.parametrize("code, status", [(GUEST, 0), (WRITER, 130), (ENGINE, 0)],
                         ids=["a guest", "a checkpoint's writer", "a server's engine"])
def test_a_thread_inside_torch_does_not_abort_the_end(code, status):
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    ended = subprocess.run([sys.executable, "-c", PROGRAM + code],
                           env=env | dict(PYTHONPATH=path), capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert "terminate" not in ended.stderr
