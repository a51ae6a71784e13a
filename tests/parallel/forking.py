"""Fork ranks from one process that has imported torch and the program.

Under torchrun each rank imports torch, and torchrun does too: longer than a short run takes.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from torch.distributed import TCPStore

HOST = "127.0.0.1"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GRACE = 30  # seconds that a rank has after SIGTERM, as torchrun gives it


def serve() -> None:
    """Run the job in each line of stdin; print how its ranks ended."""
    importlib.import_module("torch._dynamo")  # an optimizer imports it
    gc.freeze()  # else each rank's collections read, and so copy, all that is imported
    for line in sys.stdin:
        job = json.loads(line)
        if not job["program"].endswith(".py"):
            importlib.import_module(job["program"])  # once for all ranks and jobs
        at = socket.create_server((HOST, 0))  # nobody else gets its port any more
        job["port"] = at.getsockname()[1]
        ranks = [forked(job, rank, at) for rank in range(job["world"])]
        # Outlives rank 0, as torchrun's store does. Made now: its threads would not be forked.
        store = TCPStore(HOST, job["port"], is_master=True, wait_for_workers=False,
                         master_listen_fd=at.detach())
        print(json.dumps(ended(ranks, job["limit"])), flush=True)
        del store


def forked(job: dict, rank: int, at: socket.socket) -> int:
    """Fork a rank and return its process; it runs the program as `python -m` would, or a file.

    at: the socket at which the parent's store listens, and the ranks meet
    """
    if process := os.fork():
        return process
    at.close()
    try:
        world = str(job["world"])
        os.environ |= job["environment"] | dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
            MASTER_ADDR=HOST, MASTER_PORT=str(job["port"]), TORCHELASTIC_USE_AGENT_STORE="True")
        os.chdir(job["folder"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.argv = [job["program"], *job["flags"]]
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        if job["program"].endswith(".py"):
            runpy.run_path(job["program"], run_name="__main__")
        else:
            runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
    except SystemExit as end:  # of a single process; a rank of several has left already
        sys.stdout.flush()
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def ended(ranks: list[int], limit: float) -> list[int]:
    """Return how the ranks ended: when one fails, or time is up, the others get SIGTERM."""
    ends, last, told = {}, time.monotonic() + limit, None
    while left := [rank for rank in ranks if rank not in ends]:
        for rank in left:
            if (found := os.waitpid(rank, os.WNOHANG))[0]:
                ends[rank] = os.waitstatus_to_exitcode(found[1])
        if told is None and (any(ends.values()) or time.monotonic() > last):
            told = time.monotonic()
            end(left, ends, signal.SIGTERM)
        if told and time.monotonic() > told + GRACE:
            end(left, ends, signal.SIGKILL)
        time.sleep(0.05)
    return [ends[rank] for rank in ranks]


def end(ranks: list[int], ends: dict[int, int], number: int) -> None:
    """Send a signal to the ranks that have not ended."""
    for rank in ranks:
        if rank not in ends:
            os.kill(rank, number)


@functools.cache
def server() -> subprocess.Popen:
    """Start the process that forks ranks, once per process of the tests."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    made = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1"))
    atexit.register(made.kill)
    return made


def fork_ranks(*flags: str, program: str, world: int = 2, limit: float = 600,
               folder: Path | None = None, **environment: str) -> tuple[list[int], str, str]:
    """Run a program, or a file, on ranks in a folder; return how each ended, and what they wrote.

    limit: seconds until they are ended
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: str(Path(scratch) / name) for name in ("out", "err")}
        job = dict(flags=[*map(str, flags)], program=program, world=world, limit=limit,
                   folder=str(folder or Path.cwd()), environment=environment, **files)
        made = server()
        made.stdin.write(json.dumps(job) + "\n")
        made.stdin.flush()
        ends = json.loads(made.stdout.readline())
        return ends, *(Path(file).read_text() for file in files.values())


if __name__ == "__main__":
    serve()
