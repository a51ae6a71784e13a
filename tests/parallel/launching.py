"""Start ranks on this machine and collect what each of their checks said: with gloo on its CPU, or
with NCCL and a GPU for each.

A file of checks ends with `run_checks(globals())`. Each function `check_NAME(layouts..)` is a check
that all ranks go through together; the test that starts them reads one result per check.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from forking import HOST, fork_ranks
from torch import distributed as dist

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def device_of_rank() -> torch.device:
    """The device that this rank computes on."""
    kind = os.environ.get("DEVICE_OF_RANKS", "cpu")
    return torch.device(kind, int(os.environ["RANK"])) if kind == "cuda" else torch.device(kind)


class Said(NamedTuple):
    """What a program did: exit status and what its ranks wrote."""

    status: int
    out: str
    err: str


def launch(checks: str, world: int, folder: Path, limit: float = 600,
           device: str = "cpu", patience: int = 120) -> dict[str, list[str]]:
    """Run a file of checks on `world` ranks; return what each rank says to each: "" is right.

    limit: seconds until ranks that hang are ended; device: cpu or cuda
    patience: seconds that a rank waits for the others after a check, such as one that failed alone
    """
    start = forked_ranks if device == "cpu" else started_ranks
    ends, said = start(HERE / checks, world, folder, limit, DEVICE_OF_RANKS=device,
                       PATIENCE=str(patience)), {}
    for number, (end, error) in enumerate(ends):
        # A rank that hangs is ended; by then a check has said "did not end".
        assert end in (0, -signal.SIGTERM, -signal.SIGKILL), f"rank {number}: {end}: {error}"
        found = folder / f"said-{number}.json"
        assert found.exists(), f"rank {number} has not begun after {limit} seconds: {error}"
        for name, fault in json.loads(found.read_text()).items():
            said.setdefault(name, []).append(fault)
    return said


def forked_ranks(checks: Path, world: int, folder: Path, limit: float,
                 **environment: str) -> list[tuple[int, str]]:
    """Go through checks on ranks that are forked; return how each ended, and what they wrote."""
    ends, _, error = fork_ranks(folder, program=str(checks), world=world, limit=limit,
                                folder=folder, **environment)
    return [(end, error) for end in ends]


def started_ranks(checks: Path, world: int, folder: Path, limit: float,
                  **environment: str) -> list[tuple[int, str]]:
    """The same on processes of their own, which may use a GPU each."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE)])
    environment |= dict(PYTHONPATH=paths, OMP_NUM_THREADS="1", WORLD_SIZE=str(world))
    ranks, last = [], time.monotonic() + limit
    for number in range(world):
        with open(folder / f"errors-{number}.txt", "w") as errors:
            ranks.append(subprocess.Popen(
                [sys.executable, checks, folder], cwd=folder, stderr=errors,
                env=os.environ | environment | dict(RANK=str(number))))
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(last - time.monotonic(), 0))
    for rank in ranks:
        rank.kill()
    return [(rank.wait(), (folder / f"errors-{number}.txt").read_text())
            for number, rank in enumerate(ranks)]


def begin_ranks(*flags: str, program: str, world: int = 2, restarts: int = 0) -> subprocess.Popen:
    """Start a program on ranks that go on beside the test, as its user does: by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(world), "--max-restarts", str(restarts), "-m", program, *flags]
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def run_ranks(*flags: str, program: str, world: int = 2, limit: float = 600) -> Said:
    """Run ranks, forked from one process, to the end or for `limit` seconds."""
    ends, out, err = fork_ranks(*flags, program=program, world=world, limit=limit)
    return Said(int(any(ends)), out, err)


def torchrun(*flags: str, limit: float = 600, **options) -> Said:
    """Run ranks as a user starts them, to the end or for `limit` seconds."""
    ranks = begin_ranks(*flags, **options)
    try:
        out, err = ranks.communicate(timeout=limit)
    finally:
        ranks.kill()
    return Said(ranks.returncode, out, err)


def ranks_below(launcher: int) -> list[int]:
    """The processes that torchrun started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True,
                           text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    """Wait until a run has taken steps; a run that ends before has failed."""
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def run_checks(names: dict) -> None:
    """Go through the checks among `names`, in order; one that fails is the last one only where
    some rank still waits for another."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    world, said = int(os.environ["WORLD_SIZE"]), {}
    torch.set_num_threads(1)
    limit, device = timedelta(seconds=600), device_of_rank()
    if "MASTER_PORT" in os.environ:  # forked: of the process that forks
        store = dist.TCPStore(HOST, int(os.environ["MASTER_PORT"]), is_master=False)
    else:
        store = dist.FileStore(str(folder / "store"), world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
                            timeout=limit, world_size=world, rank=rank,
                            store=dist.PrefixStore("group", store))

    def say(fault: str) -> None:
        said[name] = fault
        (folder / f"said-{rank}.json").write_text(json.dumps(said))

    for name, check in names.items():
        if name.startswith("check_"):
            say("did not end")
            begin = time.perf_counter()
            try:
                check()
                say("")
            except Exception:
                say(traceback.format_exc())
            if os.environ.get("TIMES") and not rank:
                print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
            if not all_have_ended(name, store, rank, world):
                break
    os._exit(0)  # a rank that waits for another one is not waited for


def all_have_ended(name: str, store: dist.Store, rank: int, world: int) -> bool:
    """Return whether every rank is through with a check: nobody waits in an exchange that others,
    who failed before it, will not join."""
    if torch.cuda.is_available() and dist.get_backend(dist.group.WORLD) != "gloo":
        torch.cuda.synchronize()
    store.set(f"{name} {rank}", "")
    try:
        store.wait([f"{name} {other}" for other in range(world)],
                   timedelta(seconds=int(os.environ["PATIENCE"])))
        return not store.check(["over"])
    except RuntimeError:
        store.set("over", "")
        return False
