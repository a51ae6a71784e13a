"""Opening a run folder, a checkpoint, a Hugging Face folder: one model; misfits are named.

The rules of run folders: what is taken, what may change, which run is the newest.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small_models import LITTLE, random_tokens

from minids.base.files import sealed, write_json, write_whole
from minids.config import ModelArgs
from minids.hf import save_hf
from minids.model.transformer import Transformer
from minids.runs import open as opening
from minids.runs.checkpoints import save_checkpoint
from minids.runs.open import (
    folder_of,
    newest_run,
    open_model,
    open_source,
    read_config,
    resumes,
    source_of,
    stored_run,
)
from minids.runs.settings import LearnArgs, TrainArgs
from minids.sft import SftArgs
from minids.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder of two checkpoints with random weights."""
    run = tmp_path_factory.mktemp("open") / "run"
    tokenizer = Tokenizer.open("bytes")
    args = LITTLE.__class__(**vars(LITTLE) | dict(vocab_size=tokenizer.vocab_size))
    for step in (1, 2):
        torch.manual_seed(step)
        save_checkpoint(run, step, Transformer(args).state_dict(), {})
    tokenizer.save(run / "tokenizer")
    write_json(run / "config.json", dict(model=vars(args), train=vars(TrainArgs()),
                                         tokenizer=tokenizer.fingerprint))
    return run


def logits(path: Path) -> torch.Tensor:
    opened = open_model(path)
    with torch.no_grad():
        return opened.model(random_tokens(opened.model.args, 1, 9))


def test_a_run_is_its_newest_checkpoint_and_its_hugging_face_export(run, tmp_path):
    checkpoints = [run / f"checkpoints/step_00000{step}" for step in (1, 2)]
    assert torch.equal(logits(run), logits(checkpoints[1]))
    assert not torch.equal(logits(run), logits(checkpoints[0]))  # the wrong checkpoint shows
    opened = open_model(run)
    save_hf(opened.model, tmp_path / "hf")
    opened.tokenizer.save_hf(tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "hf"), logits(run))
    assert opened.path == checkpoints[1] and not opened.model.training
    assert folder_of(checkpoints[0]) == folder_of(run) == run.resolve()
    assert folder_of(tmp_path / "hf") == (tmp_path / "hf").resolve()


def test_a_hugging_face_folder_is_fp32_on_a_cpu_and_as_stored_on_a_gpu(run, tmp_path, monkeypatch):
    opened = open_model(run)
    save_hf(opened.model, tmp_path / "hf", dtype=torch.bfloat16)
    opened.tokenizer.save_hf(tmp_path / "hf")
    assert open_model(tmp_path / "hf").model.head.weight.dtype == torch.float32
    asked = []
    monkeypatch.setattr(opening.hf, "read_model", lambda folder, *how: asked.append(how))
    for device in ("cpu", torch.device("cuda", 0)):
        open_model(tmp_path / "hf", device)
        open_model(tmp_path / "hf", device, torch.float64)
    assert [dtype for dtype, *_ in asked] == [torch.float32, torch.float64,
                                              torch.bfloat16, torch.float64]


def test_a_source_has_all_but_the_weights(run, monkeypatch):
    source = open_source(run)
    assert source.folder == run.resolve() and source.path.name == "step_000002"
    assert source.config["train"]["steps"] == TrainArgs.steps
    weights = source.weights()
    assert weights.keys() == Transformer(source.args).state_dict().keys()
    assert source.describe().keys() == {"checkpoint", "sha256"}
    monkeypatch.chdir(run / "checkpoints")
    assert open_source("step_000001").folder == run.resolve()


def broken(run: Path, to: Path, change) -> Path:
    """A copy of the run folder after `change`."""
    shutil.copytree(run, to)
    change(to)
    return to


def other_tokenizer(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"tokenizer": "0" * 8})


BROKEN = {
    "no config": (lambda run: (run / "config.json").unlink(), "is not a run folder"),
    "cut short": (lambda run: (run / "config.json").write_text('{"mod'), "is damaged"),
    "later version": (lambda run: write_json(run / "config.json", {"model": {"later": 1}}),
                      "of another version of minids"),
    "other tokenizer": (other_tokenizer, "is not the run's"),
    "no tokenizer": (lambda run: shutil.rmtree(run / "tokenizer"), "tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_misfit_is_named_in_one_line(run, tmp_path, name):
    change, named = BROKEN[name]
    with pytest.raises(ValueError) as caught:
        open_model(broken(run, tmp_path / "run", change))
    assert named in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed, refused", [({"steps": 7}, ""), ({"seed": 9}, "seed")])
def test_a_resumed_run_may_differ_from_its_checkpoints_in_what_may_change(changed, refused,
                                                                          tmp_path):
    config = {"model": asdict(ModelArgs()), "train": asdict(TrainArgs(out=str(tmp_path)))}
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(1)}, {}, record=dict(config=config))
    now = config | {"train": config["train"] | changed}
    write_whole(tmp_path / "config.json", sealed(now))
    if not refused:
        assert read_config(tmp_path, "train", TrainArgs) | now == read_config(tmp_path)
    else:
        with pytest.raises(ValueError, match=f"config.json is damaged, changed.*{refused}"):
            read_config(tmp_path, "train", TrainArgs)


def test_a_run_of_another_program_is_refused(run):
    assert read_config(run, "train", TrainArgs)["train"]["lr"] == TrainArgs.lr
    with pytest.raises(ValueError, match="not a run of minids.sft"):
        read_config(run, "sft", LearnArgs)


def test_what_a_run_begins_with(run, tmp_path):
    new = LearnArgs(out=str(tmp_path / "new"), resume=True)
    assert not resumes(new) and source_of(new) is None
    after = LearnArgs(out=str(tmp_path / "new"), from_run=str(run))
    assert source_of(after).path.name == "step_000002"
    again = LearnArgs(out=str(run), resume=True, from_run=str(tmp_path / "is gone"))
    assert resumes(again) and source_of(again).path == run
    assert not resumes(LearnArgs(out=str(run)))


# The rules of run folders.

def make_run(folder: Path, program: str = "train", age: int = 0, **changes) -> Path:
    """A folder that looks like a run to the rules; age: seconds since it was written to."""
    folder.mkdir(parents=True)
    args = TrainArgs.for_preset(changes.pop("preset", "tiny"), out=str(folder), **changes)
    write_json(folder / "config.json", {"model": asdict(ModelArgs()), program: asdict(args)})
    os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    return folder


def test_a_new_run_has_nothing_stored(tmp_path):
    assert stored_run("train", TrainArgs, {}) is None
    out = str(tmp_path / "new")
    assert stored_run("train", TrainArgs, dict(out=out)) is None
    assert stored_run("train", TrainArgs, dict(out=out, resume=True)) is None


def test_a_resumed_run_takes_what_may_change_and_keeps_the_rest(tmp_path):
    run = make_run(tmp_path / "run", seed=3, lr=0.5)
    (tmp_path / "moved").symlink_to(run)
    given = dict(out=str(tmp_path / "moved"), resume=True, steps=7, lr=0.25, seed=3)
    args, config = stored_run("train", TrainArgs, given)
    assert (args.steps, args.lr, args.seed, args.out) == (7, 0.25, 3, given["out"])
    assert args.resume and config["train"]["lr"] == 0.5


FIXED = {name: value for name, value in dict(seed=4, batch_size=2, data="text:x", optimizer="adamw",
                                             weight_decay=0.5, seq_len=9).items()}


@pytest.mark.parametrize("name", FIXED)
def test_any_other_setting_is_refused(tmp_path, name):
    run = make_run(tmp_path / "run")
    assert name not in TrainArgs.may_change
    with pytest.raises(ValueError, match=f"{name} = .* is not valid: the run in .* has"):
        stored_run("train", TrainArgs, {"out": str(run), "resume": True, name: FIXED[name]})


def test_a_taken_folder_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        stored_run("train", TrainArgs, dict(out=str(run)))
    with pytest.raises(ValueError, match="not a run of minids.sft"):
        stored_run("sft", LearnArgs, dict(out=str(run), resume=True))


def test_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/ holds no run of minids.train; name its folder"):
        newest_run("train")
    make_run(Path("runs/old"), age=60)
    make_run(Path("runs/middle"), preset="nano", age=40)
    make_run(Path("runs/new"), age=20)
    make_run(Path("runs/newer-but-sft"), program="sft")
    Path("runs/damaged").mkdir()
    Path("runs/damaged/config.json").write_text("{")
    assert newest_run("train") == Path("runs/new")
    assert newest_run("train", "nano") == Path("runs/middle")
    with pytest.raises(ValueError, match="no run of minids.train with preset 'small'"):
        newest_run("train", "small")
    args, _ = stored_run("train", TrainArgs, dict(resume=True))
    assert args.out == "runs/new"


def test_a_run_after_another_names_it():
    for given in ({}, dict(from_run=""), dict(out="new"), dict(out="new", resume=True)):
        with pytest.raises(ValueError, match="^from = '' is not valid: name the run to begin with"):
            opening.settings("sft", SftArgs, given)
    assert opening.settings("sft", SftArgs, dict(from_run="x")).out == ""  # chosen when it begins
