"""Start ranks on this machine and collect what each of their checks said: with gloo on its CPU, or
with NCCL and a GPU for each.

A file of checks ends with `run_checks(globals())`. Each function `check_NAME(layouts..)` is a check
that all ranks go through together; the test that starts them reads one result per check.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
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


def launch(checks: str, world: int, folder: Path, limit: float,
           device: str = "cpu") -> dict[str, list[str]]:
    """Run a file of checks on `world` ranks; return what each rank says to each: "" is right.

    limit: seconds until ranks that hang are ended; device: cpu or cuda
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE)])
    environment = os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1", WORLD_SIZE=str(world),
                                    DEVICE_OF_RANKS=device)
    ranks = [subprocess.Popen([sys.executable, HERE / checks, folder], cwd=folder, text=True,
                              stderr=subprocess.PIPE, env=environment | dict(RANK=str(rank)))
             for rank in range(world)]
    try:
        errors = [rank.communicate(timeout=limit)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = {}
    for number, (rank, error) in enumerate(zip(ranks, errors, strict=True)):
        assert rank.returncode == 0, f"rank {number} ended with {rank.returncode}: {error}"
        for name, fault in json.loads((folder / f"said-{number}.json").read_text()).items():
            said.setdefault(name, []).append(fault)
    return said


def begin_ranks(*flags: str, program: str, world: int = 2, restarts: int = 0) -> subprocess.Popen:
    """Start a program on ranks that go on beside the test, as its user does: by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(world), "--max-restarts", str(restarts), "-m", program, *flags]
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def run_ranks(*flags: str, limit: float = 120, **options) -> Said:
    """Run ranks to the end, or for `limit` seconds."""
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
    """Go through the checks among `names`, in order; the first that fails is the last one."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    world, said = int(os.environ["WORLD_SIZE"]), {}
    torch.set_num_threads(1)
    store, limit, device = f"file://{folder / 'store'}", timedelta(seconds=120), device_of_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", store, limit,
                            world, rank)
    try:
        for name, check in names.items():
            if name.startswith("check_"):
                said[name] = "did not end"
                begin = time.perf_counter()
                check()
                said[name] = ""
                if os.environ.get("TIMES") and not rank:
                    print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    except Exception:
        said[name] = traceback.format_exc()
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    os._exit(0)  # a rank that waits for another one is not waited for
