"""Two and four GPUs, one a rank, exchange by NCCL and compute what one GPU computes.

The checks of the CPU's ranks, in FP64 and to the same 1e-12; those of gpu_ranks.py; and the program
killed on two GPUs, continued on one, and on two again.
"""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from launching import begin_ranks, launch, ranks_below, torchrun, wait_for_steps
from test_four_ranks import CHECKS as OF_FOUR
from test_serving_programs import PROGRAMS, home, run
from test_two_ranks import CHECKS as OF_TWO
from training_runs import read_records, run_train

from minids import ModelArgs
from minids.dryrun import DryRunArgs, dry_run
from minids.parallel.layout import Layout

__all__ = ["home"]  # a fixture
GPUS = torch.cuda.device_count()
OF_GPUS = re.findall(r"^def (check_\w+)", (Path(__file__).parent / "gpu_ranks.py").read_text(),
                     re.M)
FILES = {2: "two_ranks.py", 4: "four_ranks.py"}
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs; here: {GPUS}")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Return what every check says on n GPUs: one launch for each n."""
    return cache(lambda n: launch(FILES[n], n, tmp_path_factory.mktemp("gpus"), limit=180,
                                  device="cuda"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two GPUs said of training, and the folder of their launch."""
    folder = tmp_path_factory.mktemp("trained")
    return launch("gpu_ranks.py", 2, folder, limit=180, device="cuda"), folder


@pytest.mark.parametrize("gpus, check", [(2, c) for c in OF_TWO] + [(4, c) for c in OF_FOUR])
def test_gpus_equal_one_gpu(said, gpus, check):
    if GPUS < gpus:
        pytest.skip(f"needs {gpus} GPUs; here: {GPUS}")
    faults = said(gpus).get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)


@needs_two
@pytest.mark.parametrize("check", OF_GPUS)
def test_two_gpus_train_as_one(trained, check):
    faults = trained[0].get(check, ["not reached: an earlier check failed"])
    assert "".join(faults) == "", "\n".join(faults)


@needs_two
@pytest.mark.parametrize("flags, layout", [("", Layout()), ("--expert-parallel 2",
                                                            Layout(expert_parallel=2))])
def test_the_peak_is_that_of_the_dry_run(trained, flags, layout):
    """Bodies on a GPU store a little less than a CPU's, and BF16 copies of weights stay longer."""
    measured = json.loads((trained[1] / "peaks-0.json").read_text())[flags]
    run = DryRunArgs(gpus=2, micro_batch=16, seq_len=2048, optimizer="muon", recompute="none")
    args = replace(ModelArgs.preset("small"), n_layers=6)
    here = torch.cuda.mem_get_info()[1]
    dry = dry_run(args, run, layout, memory=here).fullest.total
    print(f"peak of two GPUs {flags}: {measured / 1e9:.2f} GB, dry run {dry / 1e9:.2f} GB")
    assert measured == pytest.approx(dry, rel=0.15)


@needs_two
def test_a_run_killed_on_two_gpus_goes_on_on_one_and_on_two_again(tmp_path):
    """The first loss after a checkpoint is that of its weights, on any number of GPUs; sums in
    another order move later ones, by what a step of Muon or AdamW makes of gradients near zero."""
    run, fork = tmp_path / "run", tmp_path / "fork"
    flags = ["--preset", "nano", "--max-seq-len", "128", "--data", "pystdlib", "--batch-size", "8",
             "--eval-every", "0", "--compile", "false", "--dtype", "fp32", "--device", "cuda"]
    ranks = begin_ranks(*flags, "--out", str(run), "--steps", "100000", "--save-every", "20",
                        "--expert-parallel", "2", program="minids.train")
    wait_for_steps(run, 90, ranks)
    os.kill(ranks_below(ranks.pid)[-1], signal.SIGKILL)
    ranks.communicate(timeout=60)

    def go_on(start, folder: Path) -> int:
        done = len(read_records(folder))
        said = start("--resume", "--out", str(folder), "--device", "cuda", "--steps",
                     str(done + 20))
        assert said.status == 0, said.err
        return int(re.search(r"resumed at step (\d+)", said.out)[1])

    unbroken = read_records(run)
    at = go_on(run_train, run)
    again = read_records(run)
    assert 80 <= at < len(unbroken) and at % 20 == 0
    assert again[at]["main"] == pytest.approx(unbroken[at]["main"], rel=1e-5)
    shutil.copytree(run, fork)
    for start, folder in ((run_train, fork), (partial(torchrun, program="minids.train"), run)):
        assert go_on(start, folder) == len(again)
    ends = [[r["main"] for r in read_records(folder)] for folder in (fork, run)]
    assert len(ends[0]) == len(ends[1]) == len(again) + 20
    assert ends[1][len(again)] == pytest.approx(ends[0][len(again)], rel=1e-5)
    assert ends[1][-20:] == pytest.approx(ends[0][-20:], rel=0.02)
    assert ends[1][-20:] != pytest.approx(ends[0][-21:-1], rel=0.02), "neighbours differ by more"
    assert ends[1][-1] < ends[1][0] - 1


@needs_two
@pytest.mark.parametrize("name", ["generate", "drafts", "evaluate"])
def test_two_gpus_that_share_a_model_say_what_one_says(home, name):
    """In FP32, greedy: no two of these scores are so near that a sum in another order decides."""
    words, *ways = PROGRAMS[name]
    greedy = [] if name == "evaluate" else ["--dtype", "fp32", "--temperature", "0"]
    flags = [*words.split(), "--run", "fp8", *greedy]
    alone = run(home, *flags, device="cuda")
    assert alone.status == 0, alone.err
    for way in ways[:2]:
        said = run(home, *flags, *way, world=2, device="cuda")
        assert (said.status, said.out) == (0, alone.out), said.err
