"""Mistakes in pre-training: one line on stderr, status 2, nothing written and nothing lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_runs
from kill_and_resume import (
    ROOT,
    differences,
)
from training_runs import (
    SAMPLED,
    VOCABULARY,
    Said,
    assert_refused,
    cut_back,
    everything,
    run_train,
)

from minids.runs.checkpoints import all_checkpoints, newest_checkpoint
from minids.tokenizer import Tokenizer

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken


BAD = {
    "unknown preset": (["--preset", "tinny"], "preset 'tinny'", "did you mean 'tiny'?"),
    "unknown flag": (["--warm-up-steps", "3"], "--warm-up-steps", "'--warmup-steps'"),
    "not a number": (["--steps", "many"], "--steps", "'many'"),
    "no heads": (["--n-heads", "0"], "n_heads = 0", "at least 1"),
    "odd rotary width": (["--qk-rope-head-dim", "7"], "qk_rope_head_dim = 7", "even"),
    "longer than the model": (["--seq-len", "300"], "seq_len = 300", f"max_seq_len = {SAMPLED}"),
    "longer than the text": (["--data", "text:{home}/short.txt", "--seq-len", "200",
                              "--max-seq-len", "200"],
                             "seq_len = 200 is longer than the text", "at most"),
    "longer than the held-out text": (["--data", "text:{home}/short.txt", "--seq-len", "20"],
                                      "seq_len = 20 is longer than the validation text"),
    "too short to predict two tokens": (["--seq-len", "1"], "seq_len = 1", "n_mtp_layers = 1"),
    "prompt longer than the model": (["--prompt", "x " * 300], "prompt = 'x x ", "max_seq_len"),
    "unknown device": (["--device", "gpu"], "device = 'gpu'", "cuda"),
    "empty file": (["--data", "text:{home}/empty.txt"], "empty.txt is empty"),
    "binary file": (["--data", "text:{home}/binary.txt"], "binary.txt is binary"),
    "folder without text": (["--data", "text:{home}/pictures"], "pictures", "no text"),
    "no such folder": (["--data", "text:{home}/textes"], "textes", "did you mean 'texts'?"),
    "unknown corpus": (["--data", "pystdlip"], "data = 'pystdlip'", "did you mean 'pystdlib'?"),
    "no such tokenizer": (["--tokenizer", "{home}/texts"], "no whole tokenizer in", "texts"),
    "vocabulary too small": (["--vocab-size", "64"], "vocab_size = 64", f"at least {VOCABULARY}"),
    "does not divide": (["--grad-accum", "3"], "grad_accum = 3", "batch_size = 4"),
    "ranks without torchrun": (["--pipeline", "2"], "pipeline = 2", "the number of ranks, 1"),
    "nothing to merge": (["--merge"], "merge = True", "--resume"),
    "resume of nothing": (["--preset", "small", "--resume"], "no run of minids.train with preset",
                          "'small'"),
}


@pytest.fixture(scope="module")
def bad_files(home) -> None:
    (home / "short.txt").write_text("def f(x):\n    return x\n" * 4)
    (home / "empty.txt").write_text("")
    (home / "binary.txt").write_bytes(bytes(range(256)))
    (home / "pictures").mkdir()
    (home / "pictures/a.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_line_and_writes_nothing(name, tmp_path, home, flags, bad_files,
                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, *words = BAD[name]
    bad = [word.format(home=home) for word in bad]
    assert_refused(run_train(*flags, *bad), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_where_there_is_none(tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_train(*flags, "--device", "cuda"), "device = 'cuda'", "cpu")
    assert list(tmp_path.iterdir()) == []


OTHER = {
    "other stage": (["--resume", "--dsa", "sparse"], "dsa = 'sparse'", "has ''"),
    "other seed": (["--resume", "--seed", "1"], "seed = 1", "has 0"),
    "other width": (["--resume", "--dim", "128"], "dim = 128", "has 64"),
    "other text": (["--resume", "--data", "pystdlib"], "data = 'pystdlib'", "has 'text:"),
    "other tokenizer": (["--resume", "--tokenizer", "x"], "tokenizer = 'x'", "has '"),
    "without --resume": (["--steps", "99"], "holds a run already", "--resume"),
}


@pytest.mark.parametrize("name", OTHER)
def test_run_of_another_configuration_is_left_alone(name, unbroken):
    bad, *words = OTHER[name]
    before = everything(unbroken)
    assert_refused(run_train("--preset", "nano", "--out", str(unbroken), *bad), *words)
    assert everything(unbroken) == before


def test_tokenizer_of_another_run_is_refused(tmp_path, home, unbroken):
    """The run folder's own tokenizer was exchanged."""
    run = cut_back(unbroken, tmp_path / "run", 9)
    texts = (path.read_text() for path in sorted((home / "texts").iterdir()))
    Tokenizer.train(texts, VOCABULARY - 10).save(run / "tokenizer")
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), "tokenizer in", "is not the run's",
                   "ranks.tiktoken")
    assert everything(run) == before


def test_run_without_a_whole_checkpoint_is_left_alone(tmp_path, unbroken):
    """To begin again at step 1 would write over what may still be saved."""
    run = cut_back(unbroken, tmp_path / "run", 6)
    for file in run.glob("checkpoints/*/state.pt"):
        file.write_bytes(b"cut short")
    before = everything(run)
    said = run_train("--resume", "--out", str(run))
    steps = [path.name for path in all_checkpoints(run)]
    assert len(steps) == 2
    assert_refused(said, "holds no whole checkpoint: ", "state.pt has 9 bytes",
                   *(f"refused checkpoint {step}" for step in steps))
    assert everything(run) == before


@pytest.mark.parametrize("text", ["{}", '{"model": {"later": 1}, "train": {}}', '{"mod'])
def test_config_of_another_version_is_refused(text, tmp_path, unbroken):
    run = cut_back(unbroken, tmp_path / "run", 6)
    (run / "config.json").write_text(text)
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), f"{run / 'config.json'} is damaged")
    assert everything(run) == before


def test_changed_text_is_refused(tmp_path, home, flags):
    shutil.copytree(home / "texts", tmp_path / "texts")
    run = tmp_path / "run"
    raised = run_train(*flags, "--data", f"text:{tmp_path / 'texts'}", "--out", str(run))
    assert raised.status == 0
    (tmp_path / "texts/00.py").write_text("x = 1\n" * 99)
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)),
                   f"the data of the run in {run} was changed")
    assert everything(run) == before


def in_process(*flags: str, cwd: Path, **environment: str) -> Said:
    """`python -m minids.train` in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "minids.train", *flags], cwd=cwd, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": path} | environment)
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("more, told", [
    (["--seq-len", "300"], "seq_len = 300"),
    pytest.param(["--data", "hf:roneneldan/TinyStories"], "no network", marks=pytest.mark.slow)])
def test_mistake_in_a_process_of_its_own(tmp_path, flags, more, told):
    """No library writes a line of its own to stderr, and no half-made folder is left."""
    said = in_process(*flags, *more, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(said, told)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_said_before_a_library_tries_for_a_minute(tmp_path, flags, monkeypatch):
    """Nobody listens on port 9."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it is an error
    said = run_train(*flags, "--data", "hf:roneneldan/TinyStories", "--out", str(tmp_path / "run"))
    assert_refused(said, "no network", "127.0.0.1:9", "pystdlib")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_last_checkpoint(small_disk, tmp_path, flags, unbroken):
    run = small_disk(3) / "run"  # room for two checkpoints
    said = run_train(*flags, "--out", str(run))
    good = newest_checkpoint(run)
    assert_refused(said, "could not be written", "No space left on device", str(good))
    shutil.move(run, tmp_path / "larger")  # to a disk with room
    said = run_train("--resume", "--out", str(tmp_path / "larger"))
    assert said.status == 0 and differences(unbroken, tmp_path / "larger") == []
