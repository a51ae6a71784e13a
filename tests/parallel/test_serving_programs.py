"""`torchrun -m minids.generate | evaluate | solve`: the words and numbers of one process.

On gloo. The first case and a damaged folder are started as a user does, by torchrun, the others in
this process or forked (`forking`). The two dashes before the module keep torchrun from taking --run
for its own --run-path.
"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forking import fork_ranks
from serving import ARGS
from small_models import scrambled
from training_runs import Said, run_main

from minids import hf
from minids.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
EXPERTS, LAYERS, KEPT = [], ["--pipeline", "2"], ["--keep-fp8"]
# What is asked of one process, and then of others: of two ranks, or of one that keeps FP8.
PROGRAMS = {
    "generate": ("generate --prompt def --max-new-tokens 20 --samples 2", EXPERTS, LAYERS, KEPT),
    "drafts": ("generate --max-new-tokens 20 --temperature 0 --speculative 1", EXPERTS, LAYERS),
    "evaluate": ("evaluate --data text:text --seq-len 32 --batch-size 4", EXPERTS, LAYERS, KEPT),
    "draft table": ("evaluate --data text:text --seq-len 32 --max-tokens 64 --drafts", LAYERS),
    "selections": ("evaluate --data text:text --seq-len 32 --max-tokens 64 --selections", EXPERTS),
    "solve": ("solve --problems 5 --max-new-tokens 8 --mode direct", EXPERTS),
}


def run(folder: Path, program: str, *flags: str, world: int = 1, device: str = "cpu") -> Said:
    """Run a program to its end as its user does, in one process or in several."""
    before = ["-m"] if world == 1 else ["-m", "torch.distributed.run", "--standalone",
                                        "--nproc-per-node", str(world), "-m", "--"]
    flags = [f"minids.{program}", *flags, "--device", device, "--threads", "1"]
    done = subprocess.run([sys.executable, *before, *flags], cwd=folder, text=True, timeout=600,
                          capture_output=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    return Said(done.returncode, done.stdout, done.stderr)


def run_quickly(folder: Path, program: str, *flags: str, world: int = 1) -> Said:
    """The same, in this process or on ranks that are forked; and how the worst of them ended."""
    flags = [*flags, "--device", "cpu", "--threads", "1"]
    if world > 1:
        ends, *said = fork_ranks(*flags, program=f"minids.{program}", world=world, folder=folder)
        return Said(max(ends), *said)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_main(importlib.import_module(f"minids.{program}"), *flags)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in FP8, its shards in two files, a run's checkpoint of such a model, and a text."""
    folder, tokenizer = tmp_path_factory.mktemp("home"), Tokenizer.open("bytes")
    args = replace(ARGS, vocab_size=tokenizer.n_tokens, max_seq_len=128)
    model = scrambled(args, dtype=torch.float32)
    hf.save_hf(model, folder / "fp8", quantize="fp8", tokenizer=tokenizer, shard_bytes=400_000)
    hf.save_hf(scrambled(replace(args, n_layers=1, n_dense_layers=0, n_mtp_layers=0),
                         dtype=torch.float32), folder / "one-layer", tokenizer=tokenizer)
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"the {i}th of some texts, of {i * i} words\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_what_one_process_says(home, name):
    words, *ways = PROGRAMS[name]
    flags = [*words.split(), "--run", "fp8"]
    alone = run_quickly(home, *flags)
    assert alone.status == 0, alone.err
    for way in ways:
        start = run if (name, way) == ("generate", EXPERTS) else run_quickly
        said = start(home, *flags, *way, world=1 if way is KEPT else 2)
        assert (said.status, said.out) == (0, alone.out), said.err


@pytest.mark.slow
@pytest.mark.parametrize("folder, flags, told", [
    ("fp8", ["--expert-parallel", "3"], "expert_parallel = 3 is not valid: it must be 2"),
    ("one-layer", ["--pipeline", "2"], "such that its 2 stages have a layer each"),
    ("fp8", ["--max-new-tokens", "300"], "max_seq_len is 128"),
    ("damaged", [], "is missing")])
def test_a_mistake_is_one_line_and_ends_all_ranks(home, folder, flags, told):
    if folder == "damaged":
        subprocess.run(["cp", "-r", home / "fp8", home / folder], check=True)
        sorted((home / folder).glob("model-*.safetensors"))[1].unlink()
    start = run if folder == "damaged" else run_quickly
    said = start(home, "generate", "--run", folder, *flags, world=2)
    lines = [line for line in said.err.splitlines() if line.startswith("python -m minids.")]
    assert len(lines) == 1 and told in lines[0], said.err
    assert "Traceback (most recent call last):\n  File \"" + str(ROOT) not in said.err
    assert said.status != 0 and said.out == ""
    if folder == "damaged":  # torchrun ends those that wait for the rank that has told of it
        assert {"2"} <= set(re.findall(r"exitcode\s*: (-?\d+)", said.err)) <= {"2", "-15"}
