"""Run every command of the four pages, as it stands there, made small by more flags.

All run in this process, or in one more, by `runpy`, in a temporary folder: importing torch takes
seconds. A command is run here or named in ELSEWHERE with the test that runs it; one that stands on
two pages is run once.
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
from local_hub import serve
from small_models import LITTLE, scrambled

from minids.__main__ import programs
from minids.lab import roofline

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "minids/README.md", "notebooks/README.md", "figures/README.md")
PROGRAMS = ("python", "torchrun", "pip", "pytest", "jupyter", "nbgrader", "cd")

# The beginning of a command -> flags that make it small. The longest beginning counts.
GIVEN = "--steps 2 --batch-size 2 --seq-len 64 --max-seq-len 64 --eval-every 0 --threads 1"
TRAIN = f"{GIVEN} --data text:my_folder"
BENCH = "--preset nano --pairs 1 --steps-per-timing 1 --batch-size 1 --seq-len 32 --threads 1"
SMALL = {
    "python -m minids.train": f"--preset nano {TRAIN}",
    "python -m minids.train --data": f"--preset nano {GIVEN}",
    "python -m minids.train --resume": "",
    "python -m minids.train --fp8": f"--preset nano {TRAIN} --out runs/fp8",
    "python -m minids.train --from": "--steps 2 --batch-size 2 --seq-len 64 --threads 1",
    "python -m minids.train --from runs/tiny --context": "--context 96 --steps 2 --threads 1",
    "python -m minids.train --preset deep": f"{TRAIN} --dim 32 --n-heads 2",
    "python -m minids.train --preset micro": "--steps 2 --batch-size 4 --threads 1",
    "python -m minids.train --preset gpu-80gb": f"--preset nano {GIVEN}",
    "python -m minids.train --seq-len 2048": f"--preset nano --n-mtp-layers 0 {TRAIN}",
    "python -m minids.generate": "--max-new-tokens 4 --threads 1",
    "python -m minids.evaluate": "--max-tokens 500 --threads 1",
    "python -m minids.evaluate --run runs/warm": "--max-tokens 500 --index-topk 8 --threads 1",
    "python -m minids.tokenizer": "--vocab-size 400 --max-bytes 100000",
    "python -m minids.lab.bench": f"{BENCH} --what train",
    "python -m minids.lab.bench --what sparse": f"{BENCH} --context 96 --index-n-heads 2 "
                                            "--index-head-dim 16 --index-topk 16",
    "python -m minids.lab.bench --what fp8": f"{BENCH} --device cpu",
    "python -m minids.lab.bench --what speculative":
        "--pairs 1 --prompt 8 --new-tokens 4 --threads 1",
    "python -m minids.lab.bench --what moe-vs-dense": f"{BENCH} --seeds 1 --steps 2",
    "python -m minids.lab.bench --what rollout":
        f"{BENCH} --decode-batch 2 --prompt 8 --new-tokens 4",
    "python -m minids.lab.bench --device cuda":
        f"{BENCH} --device cpu --decode-batch 2 --prompt 8 --new-tokens 4 --context 64 "
        f"--command '--preset nano {TRAIN}'",
    "python -m minids.lab.recall": "--seq-len 256 --dim 32 --steps 2 --warmup-steps 2 "
                               "--sparse-steps 2 --tokens 512 --test-sequences 2 --threads 1 "
                               "--device cpu",
    "python -m minids.sft": "--steps 2 --examples 64 --eval-problems 4 --threads 1",
    "python -m minids.grpo": "--steps 2 --questions 2 --group 2 --eval-problems 4 --threads 1 "
                             "--max-new-tokens 8 --warmup-steps 1",
    "python -m minids.distill": f"--steps 2 --problems 16 --eval-problems 4 --threads 1 "
                                f"--teacher {ROOT / 'data' / 'r1' / 'rl'}",
    "python -m minids.solve": "--problems 4 --max-new-tokens 8 --threads 1",
    "python -m minids.solve --run runs/rejected": "--problems 4 --max-new-tokens 8 --samples 2 "
                                                  "--threads 1",
    "python -m minids.grpo --from FOLDER": "--steps 1 --questions 2 --group 2 --updates 1 "
                                           "--eval-problems 4 --threads 1 --max-new-tokens 8 "
                                           "--device cpu",
    "python -m minids.dryrun": "--preset nano --gpus 4 --pipeline 2 --expert-parallel 2 "
                               "--seq-len 64",
    "python -m minids.costs": "", "python -m minids.hf": "", "python -m minids.plots": "",
    "python -m minids": "",
    "python tests/kill_and_resume.py": "--kills 1 --steps 12 --batch-size 2 --seq-len 64 "
                                       f"--data text:{ROOT / 'minids' / 'text'}",
    "python tests/parity_hf.py": "--seeds 1",
    "python tests/notebook_times.py": "--only 00",
    "python tests/parallel/eight_gpus.py":
        "--device cpu --gpus 2 --sequences 4 --shape '--n-layers 3 --seq-len 32 "
        "--vocab-size 80000 --dim 32 --n-heads 2 --kv-lora-rank 16 --qk-nope-head-dim 16 "
        "--qk-rope-head-dim 8 --v-head-dim 16 --inter-dim 64 --moe-inter-dim 16 "
        "--n-routed-experts 8 --n-activated-experts 2 --threads 1 --lr 0.01 --muon-lr 0.01'",
}

# A benchmark measures what the machine can do, by less than it would: `minids.lab.roofline`.
PEAKS = dict(SIDE=64, COPIED=2 ** 20, CACHES=2 ** 16)

# A program that is only named: its help.
NAMED = {"python -m minids.grpo"}

# These take longest, and other tests run what they run.
SLOW = ("python tests/", "python -m minids.lab.bench --what moe-vs-dense",
        "python -m minids.dryrun", "python -m minids.lab.bench --what speculative",
        "python -m minids.lab.bench --device cuda", "python -m minids.grpo --from FOLDER",
        "python -m minids.tokenizer --data hf:",  # GSM8K comes from the hub in every run
        "python -m minids.train --")  # the plain one is `first_run`

# What is not run here, and where it is.
ELSEWHERE = {
    "pip install": ".ci/run makes a fresh environment",
    "pytest": ".ci/run calls it",
    "jupyter lab": "tests/test_jupyterlab.py",
    "nbgrader": "tests/lab/test_course.py",
    "python -m minids.lab.course": "tests/lab/test_course.py",
    "python -m minids.lab.site": "tests/lab/test_site.py",
    "python -m minids.lab.grading": "tests/lab/test_grading.py",
    "python tests/known_mistakes.py": "tests/test_graders.py compares with it",
    "python -m minids.lab.claims": "tests/lab/test_claims.py, on small runs",
    "python -m minids.lab.flags": "tests/lab/test_flags.py",
    "python tests/mutants.py": "it runs the tests themselves, for an hour",
    "python tests/crash_points.py": "tests/test_crash_points.py",
    "python tests/kinds.py": "it runs hundreds of programs, for a quarter of an hour",
    "python tests/run_damage.py": "tests/runs/test_damaged_runs.py flips drawn bits",
    "python tests/kill_and_resume.py --program": "it kills whole runs of the default settings",
    "python tests/kill_and_resume.py --kills 100": "the same with fewer kills is run here",
    "python tests/busy.py": "it measures a machine that does nothing else",
    "python -m minids.serve": "tests/serve/",
    "python -m minids.dryrun --what table": "tests/test_dryrun.py runs what it is made of",
    "python -m minids.dryrun --preset moonlight": "tests/test_dryrun.py, with smaller models",
    "torchrun": "tests/parallel/test_{training,learning}_over_ranks.py, test_serving_programs.py",
    "python -m minids.generate --run data/r1/rl --chat": "tests/test_generate.py",
    "python -m minids.r1": "tests/test_r1.py runs all stages with small settings",
}


def blocks(text: str) -> list[list[str]]:
    """Return the commands of each fenced block, without remarks after two or more spaces."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language:
            continue
        lines = block.replace("\\\n", "").splitlines()
        words = [re.split(r"(?<=\S)\s{2,}(?=\S)(?!--)", line)[0].strip() for line in lines]
        commands = [part.strip() for line in words for part in line.split("&&")]
        found.append([c for c in commands if c.split(" ")[0] in PROGRAMS])
    return [commands for commands in found if commands]


def beginning(command: str, known: dict) -> str | None:
    """Return the longest known beginning of a command."""
    found = [start for start in known if f"{command} ".startswith(f"{start} ")]
    return max(found, key=len, default=None)


def spans(text: str) -> list[list[str]]:
    """Return the commands between backticks; tables leave out `python -m minids.`"""
    found, modules = {}, {name for name, _ in programs()}
    for line in re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S).split("\n\n"):
        for span in re.findall(r"`([^`]+)`", line):
            first, *more = span.split()
            if line.startswith("|") and first in modules:
                found[" ".join([f"python -m minids.{first}", *more])] = None
            elif more and first in PROGRAMS and not span.endswith("."):
                found[" ".join([first, *more])] = None
    return [[command] for command in found]


def groups(pages: list[str]) -> list[list[str]]:
    """Return the blocks of commands, then each other command between backticks, on its own.

    A block is one story: its commands stay together, and in order.
    """
    found = [block for page in pages for block in blocks(page)]
    seen = {command for block in found for command in block}
    alone = dict.fromkeys(c for page in pages for [c] in spans(page) if c not in seen)
    return found + [[command] for command in alone]


COMMANDS = groups([(ROOT / page).read_text(encoding="utf-8") for page in PAGES])
HERE = [here for block in COMMANDS if (here := [
    c for c in block if beginning(c, SMALL) and not beginning(c, ELSEWHERE)])]
HERE = [block for i, block in enumerate(HERE) if block not in HERE[:i]]


def title(commands: list[str]) -> str:
    """Name a block after its first command."""
    return re.sub(r"\W+", "-", commands[0])[:60]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Serve a hub with the three data sets that the pages name."""
    folder = tmp_path_factory.mktemp("hub")
    for name, config in (("roneneldan/TinyStories", "data"), ("HuggingFaceFW/fineweb-edu",
                                                              "sample/10BT")):
        place = folder / name / config
        place.mkdir(parents=True)
        rows = [json.dumps({"text": f"Story {i}. Once there was a token. It read on."})
                for i in range(1500)]
        (place / "train-00000.jsonl").write_text("\n".join(rows))
    (folder / "HuggingFaceFW/fineweb-edu/README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
        "    path: sample/10BT/*\n---\n")
    asked = "".join(f'{{"question": "{i} and {i}?", "answer": "{2 * i}"}}\n' for i in range(9))
    (folder / "openai/gsm8k/main").mkdir(parents=True)
    for side in ("train", "test"):
        (folder / "openai/gsm8k/main" / f"{side}.jsonl").write_text(asked)
    (folder / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n"
        "    path: main/train*\n  - split: test\n    path: main/test*\n---\n")
    server = serve(folder)
    yield server
    server.shutdown()


class Said(NamedTuple):
    """A program's exit status and output."""

    status: int
    out: str
    err: str


def run_here(folder: Path, command: str, extra: str = "") -> Said:
    """Run `python ..` of a page, made small, in a folder, as the program of this process."""
    _, *words = shlex.split(f"{command} {extra}")
    name = words.pop(1) if words[0] == "-m" else ""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        for what, size in PEAKS.items():
            patch.setitem(getattr(roofline, what), "cpu", size)
        try:
            if name:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return Said(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def online(surroundings) -> ProcessPoolExecutor:
    """One more process, for what reads the hub: its library reads the address when imported."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module", autouse=True)
def surroundings(hub, tmp_path_factory):
    """Point the programs to the hub and to the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def write_texts(folder: Path) -> None:
    """Write the texts that the commands read."""
    for name in ("my_folder", "books"):
        (folder / name).mkdir()
        for i in range(30):
            (folder / name / f"{i}.txt").write_text(f"Text {i} about tokens, and more.\n" * 40)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    """Return the run of `python -m minids.train`, made small."""
    folder = tmp_path_factory.mktemp("first")
    write_texts(folder)
    said = run_here(folder, "python -m minids.train",
                    f"{SMALL['python -m minids.train']} --out tiny")
    assert said.status == 0, said
    return folder / "tiny"


def prepare(folder: Path, first_run: Path, commands: list[str]) -> None:
    """Prepare what the commands of a block expect: a first run, texts, released folders."""
    text = "\n".join(commands)
    write_texts(folder)
    for name in ("tiny", "deep"):
        if f"runs/{name}" in text or name == "tiny" and re.search("--drafts|speculative", text):
            shutil.copytree(first_run, folder / "runs" / name)
    if re.search("runs/r1|FOLDER", text):
        for place in ("runs/r1/final", "FOLDER"):
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(ROOT / "data" / "r1" / "rl")
    for name in ("DeepSeek-V2-Lite", "DeepSeek-V3"):
        if name in text:
            released(folder / name)


def released(folder: Path) -> None:
    """Write a small folder in the released layout, with a tokenizer."""
    from minids.hf import save_hf
    from minids.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(ROOT / "data" / "tokenizer")
    args = replace(LITTLE, vocab_size=tokenizer.vocab_size)
    save_hf(scrambled(args).float(), folder, tokenizer=tokenizer)


@pytest.mark.parametrize("commands", [pytest.param(
    c, marks=pytest.mark.slow if c[0].startswith(SLOW) else ()) for c in HERE], ids=title)
def test_the_commands_of_a_block_run(commands, first_run, online, tmp_path):
    prepare(tmp_path, first_run, commands)
    for command in commands:
        more = "--help" if command in NAMED else SMALL[beginning(command, SMALL)]
        if re.search("hf:|gsm8k", command):
            said = online.submit(run_here, tmp_path, command, more).result()
        else:
            said = run_here(tmp_path, command, more)
        assert said.status == 0, f"{command}\n{said.out}\n{said.err}"


def test_no_command_is_left_out():
    every = [command for block in COMMANDS for command in block if command[:3] != "cd "]
    assert [c for c in every if not (beginning(c, SMALL) or beginning(c, ELSEWHERE))] == []
    assert {beginning(c, ELSEWHERE) for c in every} - {None} <= set(ELSEWHERE)


def test_the_tests_that_are_named_exist():
    for command in {c for block in COMMANDS for c in block if c.startswith("pytest tests/")}:
        path, *words = command.split()[1:]
        assert (ROOT / path).is_file()
        assert not words or f"{words[1]}" in (ROOT / path).read_text(), command


def test_an_unknown_flag_would_be_noticed(tmp_path):
    assert run_here(tmp_path, "python -m minids.costs --preset v3 --colour red").status == 2


def test_blocks_are_read():
    text = "Do\n```\npip install x && python -m a --b 1   remark  more\ncd x\nls\n```\n" \
           "```json\n{}\n```\n```\npython -m b --c \\\n    --d 2\nplain words\n```\n"
    assert blocks(text) == [["pip install x", "python -m a --b 1", "cd x"],
                            ["python -m b --c     --d 2"]]
    assert spans(f"See `python -m minids.a\n--b 1`, `a.py`\n\n| `costs --c 2` |\n{text}") == [
        ["python -m minids.a --b 1"], ["python -m minids.costs --c 2"]]
    assert beginning("python -m minids.train --fp8", SMALL) == "python -m minids.train --fp8"
    assert beginning("python -m minids.training", SMALL) is None
