"""Pre-training that begins with another run's weights; the stages of sparse attention."""

import contextlib
import hashlib
import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import training_runs
from kill_and_resume import (
    differences,
    kill_and_resume,
    newest_step,
)
from training_runs import (
    SAMPLED,
    STEPS,
    assert_refused,
    cut_back,
    everything,
    read_records,
    run_train,
)

from minids import ModelArgs, train
from minids.runs import stages
from minids.runs.checkpoints import load_weights, newest_checkpoint
from minids.runs.settings import TrainArgs

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken

DSA_STEPS = 9


def run_stage(dsa: str, begin: Path, run: Path, next_command: str) -> Path:
    """The run of a stage that begins with another run's weights."""
    said = run_train("--from", str(begin), "--dsa", dsa, "--steps", str(DSA_STEPS), "--out",
                     str(run))
    assert (said.status, said.err) == (0, "")
    assert next_command in said.out
    return run


@pytest.fixture(scope="module")
def warm(home, unbroken) -> Path:
    """The warm-up of the finished run's indexers."""
    run = home / "warm"
    return run_stage("warmup", unbroken, run, f"minids.train --from {run} --dsa sparse")


@pytest.fixture(scope="module")
def sparse(home, warm) -> Path:
    """The stage after it."""
    run = home / "sparse"
    return run_stage("sparse", warm, run, f"minids.evaluate --run {run} --selections")


def weights_of(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    step = newest_step(run) if step is None else step
    return load_weights(run / f"checkpoints/step_{step:06d}")


def moved(before: dict, after: dict) -> set[str]:
    """The names of what is not the same, bit for bit, in both."""
    return {name for name in after if name not in before
            or not torch.equal(before[name], after[name])}


def test_the_warmup_moves_nothing_but_the_indexers(unbroken, warm):
    dense, begun, ended = weights_of(unbroken), weights_of(warm, 0), weights_of(warm)
    indexers = {name for name in begun if ".indexer." in name}
    assert len(indexers) == 3 * 5  # of two layers and the MTP module
    assert moved(dense, begun) == indexers == moved(begun, ended)
    lines = read_records(warm)
    assert lines[-1]["indexer"] < lines[0]["indexer"]
    assert all(line["grad_norm"] == 0 < line["indexer_grad_norm"] for line in lines)
    assert all(line["lr"] == 3e-3 for line in lines)  # the indexers'


def test_the_sparse_stage_moves_everything(warm, sparse):
    assert weights_of(sparse, 0).keys() == weights_of(warm).keys()
    assert moved(weights_of(warm), weights_of(sparse, 0)) == set()
    rest = weights_of(warm).keys() - moved(weights_of(warm), weights_of(sparse))
    assert all(name.endswith("gate.bias") for name in rest)  # these go up and down by equal steps
    for line in read_records(sparse):
        parts = (line["main"] + 0.1 * line["mtp"] + 1e-4 * line["balance"] + line["indexer"])
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_check_of_the_warmup_notices(home, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "freeze_all_but_indexers", lambda model: None)
    run = tmp_path / "run"
    run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", "1", "--out", str(run))
    assert "layers.0.attn.wo.weight" in moved(weights_of(unbroken), weights_of(run))


@pytest.mark.parametrize("stage", ["warm", pytest.param("sparse", marks=pytest.mark.slow)])
def test_a_stage_has_the_same_bytes_twice(stage, tmp_path, request, unbroken, warm, monkeypatch):
    """From the command line, and by the settings that its folder states."""
    monkeypatch.setattr(train, "loss_curve", training_runs.no_picture)
    first = request.getfixturevalue(stage)
    config = json.loads((first / "config.json").read_text())
    args = TrainArgs(**config["train"] | {"out": str(tmp_path / "again")})
    with contextlib.redirect_stdout(io.StringIO()):
        again = train.train(args)
    assert differences(first, again) == []
    other = replace(args, indexer_lr=2e-3, out=str(tmp_path / "other"))
    with contextlib.redirect_stdout(io.StringIO()):
        assert differences(first, train.train(other)) != []


@pytest.mark.parametrize("stage, step", [
    ("warm", 0), ("sparse", 6), pytest.param("warm", 6, marks=pytest.mark.slow),
    pytest.param("sparse", 0, marks=pytest.mark.slow)])
def test_a_resumed_stage_equals_an_unbroken_one(stage, step, tmp_path, request, home, monkeypatch):
    """From its folder alone, also when it was killed before its first step was saved."""
    first = request.getfixturevalue(stage)
    run = cut_back(first, tmp_path / "run", step)
    config = json.loads((run / "config.json").read_text())
    before = Path(config["train"]["from_run"])
    before.rename(tmp_path / "is gone")
    said = run_train("--resume", "--out", str(run))
    (tmp_path / "is gone").rename(before)
    assert said.status == 0 and f"resumed at step {step} of {DSA_STEPS}" in said.out
    assert differences(first, run) == []
    assert json.loads((run / "config.json").read_text())["source"] == config["source"]


@pytest.mark.slow  # a resumed one is compared above; a killed run, in test_learner.py
def test_killed_and_resumed_stage_equals_an_unbroken_one(home, warm, sparse):
    seconds = read_records(sparse)[-1]["seconds"]
    flags = ["--from", str(warm), "--dsa", "sparse", "--steps", str(DSA_STEPS)]
    kill_and_resume(flags, sparse, seconds + 1, home / "killed-sparse", kills=1)


def test_a_stages_folder_says_what_it_began_with(home, unbroken, warm):
    config = json.loads((warm / "config.json").read_text())
    checkpoint = newest_checkpoint(unbroken)
    assert config["source"] == {
        "checkpoint": str(checkpoint),
        "sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()}
    before = json.loads((unbroken / "config.json").read_text())
    assert "source" not in before
    differing = {k for k, v in config["train"].items() if before["train"][k] != v}
    assert differing == {"out", "from_run", "dsa", "steps", "warmup_steps", "constant_until",
                         "mtp_weight", "indexer_lr"}
    model = ModelArgs(**config["model"])
    assert (model.index_n_heads, model.index_head_dim, model.index_topk) == (4, 16, 4)
    assert replace(model, index_n_heads=0, index_head_dim=32, index_topk=128) == ModelArgs(
        **before["model"])
    assert config["tokenizer"] == before["tokenizer"]


def test_a_longer_context_and_another_indexer_can_be_asked_for(tmp_path, unbroken):
    run = tmp_path / "run"
    said = run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", "1", "--out", str(run),
                     "--seq-len", "300", "--max-seq-len", "300", "--batch-size", "1",
                     "--index-n-heads", "2", "--index-topk", "7", "--index-fp8")
    assert said.status == 0, said.err
    model = json.loads((run / "config.json").read_text())["model"]
    assert [model[f"index_{n}"] for n in ("n_heads", "head_dim", "topk", "fp8")] == [2, 16, 7, True]
    assert model["max_seq_len"] == 300


def test_the_default_indexer_at_v3s_size_is_v32s():
    v3, v32 = (asdict(ModelArgs.preset(name)) for name in ("v3", "v3.2"))
    args = TrainArgs.for_preset("v3", from_run="x", dsa="warmup")
    assert v3 | stages.default_indexer(v3, args.seq_len) == v32


def test_a_dense_model_goes_on(tmp_path, unbroken, sparse):
    """The control: equal steps, batches and learning rates as in the sparse stage."""
    run = tmp_path / "run"
    said = run_train("--from", str(unbroken), "--steps", str(DSA_STEPS), "--out", str(run))
    assert said.status == 0 and "generate" in said.out
    assert moved(weights_of(unbroken), weights_of(run, 0)) == set()
    dense, other = (json.loads((r / "config.json").read_text())["train"] for r in (run, sparse))
    assert {k for k in dense if dense[k] != other[k]} == {"out", "from_run", "dsa"}
    assert "indexer" not in read_records(run)[0]


def test_runs_after_others_are_named_after_them(tmp_path, unbroken, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken, tmp_path / "runs/x")
    for words in (["--from", "runs/x", "--dsa", "warmup"], ["--from", "runs/x", "--dsa", "warmup"],
                  ["--from", "runs/x-warm", "--dsa", "sparse"],
                  ["--from", f"runs/x/checkpoints/step_{STEPS:06d}"]):
        assert run_train(*words, "--steps", "1").status == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "x", "x-more", "x-sparse", "x-warm", "x-warm-2"]


BAD_STAGES = {
    "stage without a model": (["--dsa", "warmup"], "dsa = 'warmup'", "--from"),
    "unknown stage": (["--from", "{warm}", "--dsa", "warm"], "--dsa", "'warm'"),
    "no such run": (["--from", "{home}/warmer"], "warmer", "did you mean 'warm'?"),
    "no run": (["--from", "{home}/texts"], "texts holds no checkpoint"),
    "other preset": (["--from", "{warm}", "--dsa", "sparse", "--preset", "tiny"],
                     "preset = 'tiny'", "has 'nano'"),
    "other tokenizer": (["--from", "{warm}", "--dsa", "sparse", "--tokenizer", "{home}/tokenizer"],
                        "tokenizer = ", "knows the one in"),
    "other width": (["--from", "{warm}", "--dsa", "sparse", "--dim", "128"], "dim = 128",
                    "have 64"),
    "other indexer": (["--from", "{warm}", "--dsa", "sparse", "--index-n-heads", "2"],
                      "index_n_heads = 2", "have 4"),
    "indexer too narrow": (["--from", "{unbroken}", "--dsa", "warmup", "--index-head-dim", "4"],
                           "index_head_dim = 4", "8 or more"),
    "indexer that does not learn": (["--from", "{warm}"], "index_n_heads = 4", "--dsa"),
    "indexer from the start": (["--preset", "nano", "--index-n-heads", "4"], "index_n_heads = 4",
                               "--from RUN --dsa warmup"),
    "too long": (["--from", "{unbroken}", "--dsa", "warmup", "--seq-len", "300"], "seq_len = 300",
                 f"max_seq_len = {SAMPLED}"),
}


@pytest.mark.parametrize("name", BAD_STAGES)
def test_mistake_in_a_stage_is_one_line_and_writes_nothing(name, tmp_path, home, unbroken, warm,
                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, *words = BAD_STAGES[name]
    before = everything(warm)
    bad = [word.format(home=home, unbroken=unbroken, warm=warm) for word in bad]
    assert_refused(run_train(*bad, "--out", str(tmp_path / "run")), *words)
    assert list(tmp_path.iterdir()) == [] and everything(warm) == before
