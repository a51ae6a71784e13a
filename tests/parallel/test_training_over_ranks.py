"""`torchrun -m minids.train`: the run of one process, by every layout, stopped, killed and resumed.

Two ranks, on gloo. torchrun starts them where signals, kills or a hub play a part, and once
besides; else they are forked from one process (`forking`), which is much faster.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import begin_ranks, ranks_below, run_ranks, torchrun, wait_for_steps
from local_hub import serve
from training_runs import as_flags, cut_back, home, read_records, run_train, settings

from minids import hf
from minids.runs import checkpoints

ROOT = Path(__file__).resolve().parent.parent.parent
__all__ = ["home"]  # a fixture

STEPS = 6
# FP32 sums in another order differ by some 1e-7 of a loss; the weights of the sixth step by more,
# since a step of AdamW or Muon magnifies what differs in gradients that are nearly zero.
CLOSE = 1e-4


by_torchrun = partial(torchrun, program="minids.train")
over_ranks = partial(run_ranks, program="minids.train")


@pytest.fixture(scope="module")
def flags(home) -> list[str]:
    """A run of six steps in FP32, whose batches two ranks, or four micro-batches, can share."""
    options = settings(home) | dict(steps=STEPS, muon_lr=3e-3, batch_size=8, eval_every=3,
                                    dtype="fp32", mtp_weight=0.3, balance_weight=0.01,
                                    device="cpu")
    return ["--preset", "nano", "--max-seq-len", "64", "--n-layers", "3", *as_flags(options)]


@pytest.fixture(scope="module")
def alone(home, flags) -> Path:
    """The run of one process."""
    run = home / "alone"
    said = run_train(*flags, "--out", str(run))
    assert (said.status, said.err) == (0, "")
    return run


def assert_same_run(run: Path, alone: Path) -> None:
    """Both have the same steps: losses, norms, validations, and where the tokens went."""
    mine, theirs = read_records(run), read_records(alone)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs] == [*range(1, STEPS + 1)]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "main", "mtp", "balance", "grad_norm", "valid_bpb"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=CLOSE), (a["step"], name)
        assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]
    assert mine[0]["max_vio"] == theirs[0]["max_vio"]
    weights = [checkpoints.load_weights(checkpoints.resolve(r)) for r in (run, alone)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        assert torch.allclose(weights[0][name], tensor, atol=3e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", [
    (), ("--expert-parallel", "2", "--grad-accum", "2"), ("--pipeline", "2", "--recompute")])
def test_any_layout_takes_the_steps_of_one_process(home, flags, alone, layout):
    run = home / f"over-{len(layout)}-{''.join(layout[:1]).strip('-')}"
    said = over_ranks(*flags, "--out", str(run), *layout)
    assert said.status == 0, said.err
    assert said.out.count("model   nano") == 1 and "ranks   2 = pipeline" in said.out
    assert_same_run(run, alone)
    assert (run / "sample.txt").is_file() and (run / "loss.png").is_file()
    newest = checkpoints.resolve(run)
    assert {path.name for path in newest.iterdir()} == {
        "manifest.json", "state.json", *(f"{kind}-0000{i}-of-00002.safetensors" for i in (1, 2)
                                         for kind in ("model", "optimizer"))}


@pytest.mark.slow
def test_two_ranks_go_on_from_a_run_to_sparse_attention_and_to_a_longer_context(home, alone):
    """`--from RUN` takes the steps of one process; a dense run has no weights of indexers.

    The indexers' loss is a difference of nearly equal logarithms, some 3e-6: rounding moves it by
    1e-9.
    """
    source = alone
    for flags in (["--dsa", "warmup"], ["--dsa", "sparse"], ["--context", "128"]):
        if flags[0] == "--context":
            source = alone
        flags = ["--from", str(source), *flags, "--steps", "2", "--dtype", "fp32",
                 "--batch-size", "4", "--device", "cpu"]
        runs = [home / f"{flags[3]}-{kind}" for kind in ("one", "two")]
        for start, run in zip((run_train, over_ranks), runs, strict=True):
            said = start(*flags, "--out", str(run))
            assert said.status == 0, said.err
        for mine, theirs in zip(*map(read_records, runs), strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() & {"loss", "main", "indexer", "grad_norm",
                                       "indexer_grad_norm"}:
                assert mine[name] == pytest.approx(theirs[name], rel=CLOSE, abs=1e-8), name
        source = runs[0]


@pytest.mark.exhaustive
def test_compiled_pieces_around_the_exchange_take_the_steps_of_one_process(home, flags, alone):
    """With generated code, which takes minutes; compiled_ranks.py goes through it without."""
    run = home / "compiled"
    said = over_ranks(*flags, "--out", str(run), "--expert-parallel", "2", "--compile")
    assert said.status == 0 and "the run goes on without" not in said.out, said
    assert_same_run(run, alone)


@pytest.mark.slow
def test_a_run_in_fp8_is_resumed_with_its_moments_in_bf16(home, flags):
    """Ranks round their own tokens, and so nearly what one process rounds: E4M3 has two digits."""
    run, options = home / "fp8", [*flags, "--fp8", "--save-every", "3"]
    assert run_train(*options, "--out", str(home / "fp8-alone")).status == 0
    said = over_ranks(*options, "--out", str(run), "--expert-parallel", "2")
    assert said.status == 0, said.err
    unbroken = read_records(run)
    cut_back(run, again := home / "fp8-again", step=3)
    said = over_ranks("--resume", "--out", str(again), "--expert-parallel", "2")
    assert said.status == 0, said.err
    assert [r["loss"] for r in read_records(again)] == [r["loss"] for r in unbroken]
    for mine, theirs in zip(unbroken, read_records(home / "fp8-alone"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.01)


@pytest.mark.slow
def test_micro_batches_in_bf16_add_up_over_ranks(home, flags):
    """A cast that outlives its micro-batch lost gradients: the norm was then 1 percent off.

    Rounding to BF16 does not depend on the ranks; sums in another order move the norm by 1e-5.
    """
    norms, options = [], [*flags, "--dtype", "bf16", "--steps", "1", "--grad-accum", "2"]
    run_train(*options, "--out", str(home / "bf16-alone"))
    said = over_ranks(*options, "--out", str(home / "bf16-over"))
    assert said.status == 0, said.err
    for run in ("bf16-alone", "bf16-over"):
        norms.append(read_records(home / run)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=5e-4)


@pytest.mark.slow
def test_any_layout_goes_on_where_another_stopped(home, flags, alone):
    """Two ranks by experts, then one process, then a pipeline of two."""
    run = home / "handed-on"
    said = over_ranks(*flags, "--out", str(run), "--expert-parallel", "2", "--save-every", "2")
    assert said.status == 0, said.err
    for step, go_on in ((2, run_train), (4, over_ranks)):
        shutil.move(run, whole := home / f"until-{step}")
        cut_back(whole, run, step)
        more = ["--pipeline", "2"] if go_on is over_ranks else []
        said = go_on("--resume", "--out", str(run), *more)
        assert said.status == 0, said.err
        assert f"resumed at step {step} of {STEPS}" in said.out
    assert_same_run(run, alone)
    assert checkpoints.is_sharded(run / "checkpoints" / "step_000006")


@pytest.mark.slow
def test_one_process_goes_on_to_two_and_exports(home, flags, alone, tmp_path):
    run = tmp_path / "run"
    cut_back(alone, run, step=3)
    said = by_torchrun("--resume", "--out", str(run))
    assert said.status == 0, said.err
    assert_same_run(run, alone)
    before = checkpoints.load_weights(checkpoints.resolve(run))
    exported = subprocess.run([sys.executable, "-m", "minids.hf", "--run", run, "--out",
                               tmp_path / "hf"], env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert exported.returncode == 0
    for name, tensor in hf.load_hf(tmp_path / "hf").state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert_merged(run, before)


def assert_merged(run: Path, before: dict[str, torch.Tensor]) -> None:
    """`--merge` leaves one process's three files with the same numbers, and nothing else new."""
    others = {path.name for path in (run / "checkpoints").iterdir()}
    metric = checkpoints.read_manifest(checkpoints.resolve(run))["metric"]
    said = run_train("--resume", "--out", str(run), "--merge")
    newest = checkpoints.resolve(run)
    assert (said.status, said.err, said.out) == (0, "", f"merged  {newest}\n")
    assert {path.name for path in newest.iterdir()} == {
        "model.safetensors", "state.pt", "manifest.json"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == others
    assert checkpoints.read_manifest(newest)["metric"] == metric
    after = checkpoints.load_weights(newest)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert run_train("--resume", "--out", str(run), "--merge").out == f"merged  {newest}\n"


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(flags, tmp_path):
    run = tmp_path / "run"
    ranks = begin_ranks(*flags, "--out", str(run), "--steps", "100000", "--eval-every", "0",
                        "--save-every", "100000", program="tests.parallel.slow_to_tell")
    wait_for_steps(run, 2, ranks)
    os.kill(ranks_below(ranks.pid)[-1], signal.SIGTERM)
    out, err = ranks.communicate(timeout=600)
    steps = len(read_records(run))
    newest = checkpoints.resolve(run)
    assert checkpoints.verify(newest)["step"] == steps, (out, err)
    assert f"continue with: python -m minids.train --resume --out {run}" in out
    said = over_ranks("--resume", "--out", str(run), "--steps", str(steps + 1))
    assert said.status == 0, said.err
    assert [record["step"] for record in read_records(run)] == [*range(1, steps + 2)]


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_ends_as_an_unbroken_run(home, flags, alone, tmp_path):
    run = tmp_path / "run"
    said = torchrun(*flags, "--out", str(run), "--resume", "--save-every", "1", restarts=1,
                    program="tests.parallel.killed_rank")
    assert said.status == 0, said.err
    assert re.search(r"resumed at step [23] of 6", said.out)
    assert said.err.count("python -m minids.train: another process of this run was lost") == 1
    assert "Traceback" not in said.err
    assert_same_run(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("wrong, words", [
    (("--pipeline", "3"), "pipeline = 3 is not valid"),
    (("--batch-size", "9"), "batch_size = 9 is not valid"),
    (("--balance-loss", "expert"), "balance_loss = 'expert' is not valid"),
    (("--recompute", "selective"), "recompute = 'selective' is not valid"),
    (("--compile", "--pipeline", "2", "--schedule", "ZBVZeroBubble", "--n-layers", "4"),
     "compile = 'true' is not valid"),
    (("--data", "text:no-such-folder"), "no-such-folder"),
    pytest.param(("--device", "cuda"), "device = 'cuda' is not valid", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="this machine has a GPU"))])
def test_a_mistake_is_one_line_of_rank_0(flags, tmp_path, wrong, words):
    said = over_ranks(*flags, "--out", str(tmp_path / "run"), *wrong)
    lines = [line for line in said.err.splitlines() if line.startswith("python -m minids.train: ")]
    assert said.status != 0 and len(lines) == 1 and words in lines[0], said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("wrong, words", [
    (("--batch-size", "9"), "batch_size = 9 is not valid"),
    (("--data", "text:no-such-folder"), "no-such-folder")])
def test_the_rank_that_tells_of_a_mistake_is_waited_for(flags, tmp_path, wrong, words):
    """All find the first; the second is found by one, of which the others know at once."""
    said = run_ranks(*flags, "--out", str(tmp_path / "run"), *wrong,
                     program="tests.parallel.slow_to_tell")
    assert said.status != 0 and said.err.count("python -m minids.train: ") == 1, said.err
    assert words in said.err


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all_ranks_with_one_line(flags, tmp_path):
    said = over_ranks(*flags, "--out", str(tmp_path / "run"), "--lr", "1e30", "--muon-lr", "1e30")
    lines = [line for line in said.err.splitlines() if line.startswith("python -m minids.train: ")]
    assert said.status != 0 and len(lines) == 1, said.err
    assert "step " in lines[0] and "the last good checkpoint is" in lines[0]
    for checkpoint in checkpoints.all_checkpoints(tmp_path / "run"):
        assert json.loads((checkpoint / "manifest.json").read_bytes())["format"] == 2


@pytest.mark.slow
def test_bench_times_the_steps_of_every_layout(flags, alone):
    """One launch for all layouts; the losses are those of one process."""
    flags = shlex.join(flags)
    layouts = "--pipeline 2", "--expert-parallel 2 --optimizer muon", ""
    said = run_ranks("--what", "program", "--pairs", "1", "--steps-per-timing", "3", "--threads",
                    "1", "--command", ";".join(f"{flags} {layout}" for layout in layouts),
                    program="minids.lab.bench")
    assert said.status == 0, said.err
    rows = [line for line in said.out.splitlines() if line.startswith("--preset")]
    steps = read_records(alone)
    for layout, row in zip(layouts, rows, strict=True):  # each row is printed once, by rank 0
        head, cells = row[:len(f"{flags} {layout}")], row.split()
        assert head.strip() == f"{flags} {layout}".strip() and len(rows) == 3
        ranks, first, last = cells[-9], float(cells[-2]), float(cells[-1])
        assert ranks == "2" and first == pytest.approx(steps[0]["loss"], abs=2e-3), row
        if "muon" not in layout:
            assert last == pytest.approx(steps[5]["loss"], abs=2e-3), row
    refused = run_ranks("--what", "program", "--command", f"{flags} --pipeline 2 --micro-batches 3",
                       program="minids.lab.bench")
    assert refused.status == 1 and refused.err.count("batch_size = 8 is not valid") == 1


@pytest.mark.slow
def test_a_rank_without_memory_ends_all_ranks_with_one_line(flags, tmp_path):
    run = tmp_path / "run"
    said = run_ranks(*flags, "--out", str(run), "--save-every", "1",
                     program="tests.parallel.short_of_memory")
    lines = [line for line in said.err.splitlines() if line.startswith("python -m minids.train: ")]
    good = checkpoints.resolve(run)
    assert said.status != 0 and len(lines) == 1, said.err
    assert f"step 3: not enough memory for 2.50 GiB; the last good checkpoint is {good}" in lines[0]
    assert checkpoints.verify(good)["step"] == 2
    said = over_ranks("--resume", "--out", str(run), "--recompute")
    assert said.status == 0 and "resumed at step 2 of 6" in said.out, said.err


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_with_one_line(flags, small_disk, tmp_path):
    """It is found by the ranks' writers, while training goes on; the first checkpoint is whole."""
    run = small_disk(2) / "run"  # room for one checkpoint of the two
    said = over_ranks(*flags, "--out", str(run), "--save-every", "2", "--steps", "40")
    lines = [line for line in said.err.splitlines() if line.startswith("python -m minids.train: ")]
    assert said.status != 0 and len(lines) == 1, said.err
    assert "could not be written" in lines[0] and "No space left on device" in lines[0], lines
    good = checkpoints.resolve(run)
    assert f"{good}, the one before it, is intact" in lines[0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [good.name]
    shutil.move(run, tmp_path / "larger")
    again = ["--resume", "--out", str(tmp_path / "larger"), "--steps", "6"]
    assert checkpoints.read_manifest(tmp_path / "larger/checkpoints" / good.name)["step"] <= 6
    assert over_ranks(*again).status == 0


@pytest.mark.slow
def test_a_stream_is_one_stream_for_any_number_of_ranks(flags, tmp_path, monkeypatch):
    """Two ranks take one process's steps from a data set of the hub, and hand on its position."""
    rows = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7)})
            for i in range(3000)]
    (data := tmp_path / "hub/some/code/data").mkdir(parents=True)
    (data / "train.jsonl").write_text("\n".join(rows))
    server = serve(tmp_path / "hub")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        runs = []
        for world in (1, 2):
            runs.append(run := tmp_path / f"over-{world}")
            said = by_torchrun(*flags, "--data", "hf:some/code", "--out", str(run), world=world)
            assert said.status == 0, said.err
        assert_same_run(*runs)
        for before, world in zip(runs, (2, 1), strict=True):
            run = cut_back(before, tmp_path / f"on-{world}", step=3)
            said = by_torchrun("--resume", "--out", str(run), world=world)
            assert said.status == 0 and "resumed at step 3 of 6" in said.out, said.err
            assert_same_run(run, before)
    finally:
        server.shutdown()
        server.server_close()
