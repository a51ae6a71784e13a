"""A start that fails leaves nothing behind, and a later one removes what a kill has left."""

import shutil
from pathlib import Path

import pytest
import training_runs
from training_runs import run_main

from minids import distill, grpo, sft, train
from minids.lab import course
from minids.r1 import Pipeline, R1Args
from minids.runs.checkpoints import newest_checkpoint

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken


@pytest.fixture
def damaged(unbroken, tmp_path) -> Path:
    """A checkpoint whose manifest is whole and whose weights are not."""
    run = shutil.copytree(unbroken, tmp_path / "before")
    path = newest_checkpoint(run)
    (path / "model.safetensors").write_bytes(b"x" + (path / "model.safetensors").read_bytes()[1:])
    return path


@pytest.mark.parametrize("name", ["train", "sft", "grpo", "distill"])
def test_weights_that_cannot_be_read(name, damaged, home, tmp_path):
    flags = {"train": ["--threads", "1"],
             "sft": ["--data", f"jsonl:{tmp_path}/said.jsonl", "--seq-len", "32"],
             "grpo": ["--max-new-tokens", "4", "--questions", "1", "--task",
                      f"jsonl:{tmp_path}/task.jsonl"],
             "distill": ["--corpus", str(tmp_path / "new/c.jsonl"), "--teacher", str(damaged)]}
    (tmp_path / "said.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, '
                                         '{"role": "assistant", "content": "b"}]}\n')
    (tmp_path / "task.jsonl").write_text("".join(
        f'{{"question": "{i}+0", "answer": "{i}"}}\n' for i in range(200)))
    words = [] if name == "distill" else ["--from", str(damaged), "--out", str(tmp_path / "new/x")]
    module = dict(train=train, sft=sft, grpo=grpo, distill=distill)[name]
    said = run_main(module, *words, *flags[name])
    assert (said.status, said.err.count("\n")) == (2, 1), said
    assert "model.safetensors was changed" in said.err
    assert not (tmp_path / "new").exists()


def test_a_prompt_that_is_too_long_is_refused_before_the_text_is_read(flags, monkeypatch):
    monkeypatch.setattr(train, "open_data", lambda *_, **__: pytest.fail("it was read"))
    said = run_main(train, *flags, "--prompt", "x " * 300)
    assert said.status == 2 and "prompt = 'x x " in said.err


def test_a_corpus_below_a_file_is_refused_before_the_teacher_answers(tmp_path):
    (tmp_path / "file").write_text("mine")
    said = run_main(distill, "--teacher", "nowhere", "--corpus", str(tmp_path / "file/c.jsonl"))
    assert said.status == 2 and "corpus = " in said.err and "below a file" in said.err
    said = run_main(distill, "--teacher", "nowhere", "--corpus", "/proc/no/c.jsonl")
    assert said.status == 2 and said.err.count("\n") == 1
    assert "corpus = '/proc/no/c.jsonl' is not valid: it must be a path that can" in said.err


@pytest.mark.parametrize("blank", [True, False])
def test_a_course_with_a_damaged_notebook(blank, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    for name in ("00_a", "01_b"):
        (tmp_path / f"notebooks/{name}.ipynb").write_text('{"cells": []}')
    (tmp_path / "notebooks/02_c.ipynb").write_text('{"cells": [')
    said = run_main(course, "--out", str(tmp_path / "course"), *["--blank"] * blank)
    assert said.status == 2 and "02_c.ipynb is not JSON" in said.err and said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notebooks"]


def test_times_that_were_being_written(tmp_path):
    """Of the last stage: no later one writes them again."""
    (tmp_path / ".tmp_times.json").write_text("{")
    (tmp_path / ".tmp_notes").mkdir()
    Pipeline(R1Args(out=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"r1.json", ".tmp_notes"}
