"""What two GPUs go through besides the checks of two_ranks.py; started by test_gpus.py."""

import json
import math
import resource
from pathlib import Path

import torch
from comparing import DEVICE, compare_step, largest, ranks_of
from launching import run_checks
from torch import distributed as dist

from minids.lab.bench_alone import trainer
from minids.parallel.team import Team

LAYOUTS = "", "--expert-parallel 2", "--pipeline 2 --micro-batches 2"
CURVE = ("--preset tiny --dtype bf16 --batch-size 16 --seq-len 256 --steps 400 --data pystdlib "
         "--compile false --log-experts-every 0")
# As in the dry run: no block is compiled, and no batch of another size comes first.
LARGE = ("--preset small --n-layers 6 --batch-size 32 --batch-start 0 --recompute none "
         "--compile false --dtype bf16 --data pystdlib")


def team_of_gpus() -> Team:
    """The ranks of this process group as a team, without torchrun."""
    team = object.__new__(Team)
    team.rank, team.world, team.device = dist.get_rank(), dist.get_world_size(), DEVICE
    team.local_rank = team.rank
    return team


def learner(flags: str, over_ranks: bool):
    """What `minids.train` makes with these flags, on all GPUs or on each by itself."""
    return trainer(flags, DEVICE.type, team_of_gpus() if over_ranks else None)


def check_fp32():
    """Sums in another order: 1.2e-6 was seen; a wrong one differs by 1e-3 and more."""
    for fields in ({}, dict(expert_parallel=2), dict(pipeline=2)):
        compare_step(ranks_of(**fields), dtype=torch.float32, close=1e-5)


def check_bf16_curves_are_those_of_one_gpu():
    """BF16 rounds to 0.4 percent; a wrong gradient leaves the curve within a few steps of Muon."""
    def curve(made) -> list[float]:
        return [made.train_step()["loss"] for _ in range(30)]

    wanted = curve(learner(CURVE, over_ranks=False))
    assert wanted[-1] < wanted[0] - 1, "it learns"
    for layout in LAYOUTS:
        mine = curve(learner(f"{CURVE} {layout}", over_ranks=True))
        parts = [abs(a / b - 1) for a, b in zip(mine, wanted, strict=True)]
        assert parts[0] < 1e-3 and max(parts) < 0.02, (layout, parts)


def check_peaks_for_the_dry_run():
    """The bytes that tensors take, on the fuller GPU; test_gpus.py compares them."""
    peaks = {}
    for layout in LAYOUTS[:2]:
        made = learner(f"{LARGE} {layout}", over_ranks=True)
        made.train_step()
        torch.cuda.reset_peak_memory_stats()
        made.train_step()
        peaks[layout] = largest(torch.cuda.max_memory_allocated())
        del made
        torch.cuda.empty_cache()
    Path(f"peaks-{dist.get_rank()}.json").write_text(json.dumps(peaks))


def check_a_thousand_steps_in_the_same_memory():
    """torch 2.11 left some kB for each sharded parameter and step with a fused optimizer: 100 MB.

    Both kinds of sharded parameters, and replies of the other rank in every layer.
    """
    flags = "--preset nano --batch-size 4 --seq-len 64 --steps 2000 --data pystdlib --compile false"
    made = learner(f"{flags} --expert-parallel 2", over_ranks=True)
    size = []
    for count in (300, 700):
        for _ in range(count):
            loss = made.train_step()["loss"]
        size.append(resident())
    assert math.isfinite(loss) and size[1] - size[0] < 24, size


def resident() -> float:
    """Memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    run_checks(dict(globals()))
