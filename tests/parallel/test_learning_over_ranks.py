"""`torchrun -m minids.sft`, `minids.grpo`: one process's runs, and ones that other ranks continue.

Two ranks, on gloo: forked from one process, and by torchrun where a signal comes.
"""

import contextlib
import io
import os
import signal
from pathlib import Path

import pytest
import torch
from launching import begin_ranks, ranks_below, run_ranks, wait_for_steps
from training_runs import as_flags, cut_back, read_records, run_main

from minids import grpo, sft
from minids.runs import checkpoints
from minids.runs.settings import TrainArgs
from minids.train import train

STEPS = 5
SMALL = dict(steps=STEPS, eval_problems=5, max_new_tokens=8, save_every=1, keep_last=0, threads=1,
             device="cpu", dtype="fp32", eval_every=2)
# GRPO's rate is so low that no draw falls beside another token: the replies are the same ones.
FLAGS = dict(sft=dict(examples=64, seq_len=128, batch_size=4),
             grpo=dict(questions=4, group=4, updates=2, micro_batch=3, max_new_tokens=12, lr=2e-5,
                       top_p=0.9, format_weight=1.0, length_weight=1.0, reference_every=2,
                       reward="shuffled"))
PROGRAMS = dict(sft=sft, grpo=grpo)
# FP32 sums in another order; a step of Muon or AdamW magnifies what differs in gradients that are
# nearly zero. The sampler's gap is all rounding.
CLOSE, CLOSE_WEIGHTS = 1e-4, 3e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("over") / "base"
    with contextlib.redirect_stdout(io.StringIO()):
        train(TrainArgs.for_preset("micro", out=str(run), steps=2, eval_every=0, threads=1))
    return run


def words(program: str, base: Path, run: Path) -> list[str]:
    return ["--from", str(base), "--out", str(run), *as_flags(SMALL | FLAGS[program])]


@pytest.fixture(scope="module")
def alone(base) -> dict[str, Path]:
    """The runs of one process."""
    for name, module in PROGRAMS.items():
        said = run_main(module, *words(name, base, base.with_name(name)))
        assert (said.status, said.err) == (0, "")
    return {name: base.with_name(name) for name in PROGRAMS}


def assert_same_run(run: Path, alone: Path) -> None:
    """Both have the same steps, all metrics included, and the same weights."""
    mine, theirs = read_records(run), read_records(alone)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs] == [*range(1, STEPS + 1)]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "sampling_s", "sampler_gap", "sampler_gap_max"}:
            assert a[name] == pytest.approx(b[name], rel=CLOSE, abs=1e-6), (a["step"], name)
    weights = [checkpoints.load_weights(checkpoints.resolve(r)) for r in (run, alone)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        assert torch.allclose(weights[0][name], tensor, atol=CLOSE_WEIGHTS), name


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_any_number_of_ranks_goes_on_where_another_stopped(base, alone, tmp_path, program):
    """Two ranks, then one process, then two ranks by experts; GRPO's in the middle of a rollout."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    said = run_ranks(*words(program, base, run), program=f"minids.{program}")
    assert said.status == 0, said.err
    assert said.out.count(f"{program:<8}") == 1 and "ranks   2 = pipeline 1" in said.out
    assert_same_run(run, alone[program])
    run.rename(whole)
    cut_back(whole, run, step=1)
    files = {path.name.partition("-")[0] for path in (run / "checkpoints/step_000001").iterdir()}
    assert {"reference", "rollout"} <= files or program == "sft"
    said = run_main(PROGRAMS[program], "--resume", "--out", str(run), "--steps", str(STEPS))
    assert said.status == 0, said.err
    assert_same_run(run, alone[program])
    run.rename(whole.with_name("again"))
    cut_back(whole.with_name("again"), run, step=3)
    said = run_ranks("--resume", "--out", str(run), "--expert-parallel", "2",
                     program=f"minids.{program}")
    assert said.status == 0, said.err
    assert "resumed at step 3 of 5" in said.out
    assert_same_run(run, alone[program])


@pytest.mark.slow
@pytest.mark.parametrize("program, wrong, line", [
    ("sft", ("--batch-size", "3"), "batch_size = 3 is not valid: it must be a multiple of 2"),
    ("sft", ("--replicate", "3"), "replicate = 3 is not valid"),
    ("grpo", ("--questions", "6"), "questions = 6 is not valid: it must be a multiple of 4"),
    ("grpo", ("--pipeline", "2"), "unknown flag --pipeline"),
    ("r1", (), "2 processes are not valid: minids.r1 runs in one"),
    ("distill", (), "2 processes are not valid: minids.distill runs in one")])
def test_a_mistake_is_one_line_of_rank_0(base, tmp_path, program, wrong, line):
    flags = [*words(program, base, tmp_path / "run"), *wrong] if program in PROGRAMS else wrong
    said = run_ranks(*flags, program=f"minids.{program}")
    found = [text for text in said.err.splitlines() if text.startswith("python -m minids.")]
    assert said.status != 0 and len(found) == 1 and line in found[0], said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(base, tmp_path, program):
    run = tmp_path / "run"
    ranks = begin_ranks(*words(program, base, run), "--steps", "100000", "--eval-every", "0",
                        "--save-every", "100000", program=f"minids.{program}")
    wait_for_steps(run, 2, ranks)
    os.kill(ranks_below(ranks.pid)[-1], signal.SIGTERM)
    out, err = ranks.communicate(timeout=600)
    steps = len(read_records(run))
    assert checkpoints.verify(checkpoints.resolve(run))["step"] == steps, (out, err)
    assert f"continue with: python -m minids.{program} --resume --out {run}" in out
