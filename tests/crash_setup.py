"""Start short runs of every program that writes, for `crash_points`, and compare their results."""

import importlib
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  (an optimizer imports it: once is enough)
from kill_and_resume import MEASURED, leaves, read_state
from test_r1 import shorten
from training_runs import VOCABULARY, short_sample, write_texts

from minids import train
from minids.base.command_line import run_program
from minids.lab import course
from minids.r1 import Pipeline
from minids.text import loaders
from minids.text import tokenizer as text_tokenizer
from minids.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
with tempfile.TemporaryDirectory() as scratch:  # imports what draws, once
    train.loss_curve([dict(step=1, main=1.0)], Path(scratch) / "loss.png")
SETTINGS = {"resume", "seal", "overwrite"}  # of the second start


def program(name: str, folder: Path, until: str = "", wrong: bool = False):
    """Return the `main` of a program, made short, with its cache in `folder`; and its runner.

    until: stage of r1 after which it ends; "": at its own end
    wrong: whether it writes as the wrong variant does
    """
    train.Trainer.sample = short_sample
    train.open_data = partial(loaders.open_data, cache=folder / "cache")
    if wrong:
        text_tokenizer.write_whole = write_under_another_name
    if name == "r1":
        shorten(pytest.MonkeyPatch())
        end_after(until)
    if name == "lab.course":
        course.ROOT = folder
    path = "minids.hf.__main__" if name == "hf" else f"minids.{name}"
    return importlib.import_module(path).main, run_program


def end_after(last: str) -> None:
    """Make r1 end when this stage is done."""
    make = Pipeline.make

    def make_and_end(pipeline: Pipeline, name: str, stage) -> None:
        make(pipeline, name, stage)
        if name == last:
            raise SystemExit(0)
    Pipeline.make = make_and_end


def write_under_another_name(path: Path, data: str) -> None:
    """The wrong variant: what a kill leaves looks like a file of somebody else."""
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(data, "utf-8")
    os.replace(temp, path)


def set_up(name: str, folder: Path, server) -> None:
    """Fill the folder that a program is started in."""
    folder.mkdir()
    if name in ("train", "tokenizer"):
        write_texts(folder / "texts", documents=12)
        texts = (path.read_text() for path in sorted((folder / "texts").iterdir()))
        Tokenizer.train(texts, VOCABULARY).save(folder / "tok")
    if name == "course":
        (folder / "notebooks").mkdir()
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))[:6]:
            shutil.copy(path, folder / "notebooks")
    if name.startswith("hf"):
        from crash_points import COMMANDS
        words = ["given" if word == "run" else word for word in COMMANDS["sft"]]
        status, said, _ = server.run(words, folder)
        assert status == 0, said
        if name == "hf-over":
            status, said, _ = server.run(["hf", "--run", "given", "--out", "there"], folder)
            assert status == 0, said
            (folder / "there/config.json").write_text("{}")
            (folder / "there/own.txt").write_text("stays")


def contents(file: Path, folder: Path):
    """Return what has to be equal in a file below a folder."""
    if file.name in ("times.json", "manifest.json") or file.suffix in (".png", ".lock"):
        return file.stat().st_size > 0 or file.suffix == ".lock"
    if file.name == "state.pt":
        return {place: value for place, value in read_state(file).items()
                if place.rpartition(".")[2] not in MEASURED}
    if file.name == "metrics.jsonl":
        return [without(json.loads(line)) for line in file.read_text().splitlines()]
    if file.name == "config.json":
        return dict(leaves(without(json.loads(file.read_text()))))
    return file.read_bytes().replace(str(folder).encode(), b"")


def without(value):
    """Return what JSON can hold without what a clock or the second start decides."""
    if isinstance(value, dict):
        return {k: without(v) for k, v in value.items() if k not in MEASURED | SETTINGS}
    return [without(v) for v in value] if isinstance(value, list) else value


def differences(whole: Path, other: Path) -> list[str]:
    """Return what differs between two folders, in words."""
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (whole, other)]
    found = [f"{name} is {'missing' if name in names[0] else 'left over'}"
             for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if (whole / name).is_file() and (
                contents(whole / name, whole) != contents(other / name, other)):
            found.append(f"{name} differs")
    return found
