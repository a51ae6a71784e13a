"""The rules of run folders: what is taken, what may change, which run is the newest."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest

from minids.base.files import write_json
from minids.config import ModelArgs
from minids.runs import resume
from minids.runs.resume import free_folder, newest_run, stored_run
from minids.runs.settings import LearnArgs, TrainArgs
from minids.sft import SftArgs


def make_run(folder: Path, program: str = "train", age: int = 0, **changes) -> Path:
    """A folder that looks like a run to the rules; age: seconds since it was written to."""
    folder.mkdir(parents=True)
    args = TrainArgs.for_preset(changes.pop("preset", "tiny"), out=str(folder), **changes)
    write_json(folder / "config.json", {"model": asdict(ModelArgs()), program: asdict(args)})
    os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    return folder


def test_a_free_folder(tmp_path):
    names = []
    for _ in range(3):
        names.append(free_folder(tmp_path / "x").name)
        (tmp_path / names[-1]).mkdir()
    assert names == ["x", "x-2", "x-3"]


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


def test_a_run_after_another_is_named_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ({}, dict(from_run=""), dict(out="new"), dict(out="new", resume=True)):
        with pytest.raises(ValueError, match="^from = '' is not valid: name the run to begin with"):
            resume.settings("sft", SftArgs, given, "-sft")
    monkeypatch.setattr(resume, "folder_of", Path)  # what it begins with is checked elsewhere

    def out(**given) -> str:
        return resume.settings("sft", SftArgs, dict(from_run="runs/base") | given, "-sft").out

    assert out() == "runs/base-sft" and out(out="new") == "new"
    Path("runs/base-sft").mkdir(parents=True)
    assert out() == "runs/base-sft-2"
