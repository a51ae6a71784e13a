"""Every command of the README is run: as it stands there, in its order, made small by more flags.

A command is either run here or named in ELSEWHERE with the test that runs it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from local_hub import serve
from small_models import LITTLE, scrambled

from minids.__main__ import programs

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("python", "pip", "pytest", "jupyter", "nbgrader", "cd")

# The beginning of a command -> flags that make it small. The longest beginning counts.
GIVEN = "--steps 2 --batch-size 2 --seq-len 64 --eval-every 0 --threads 1"
TRAIN = f"{GIVEN} --data text:my_folder"
BENCH = "--preset nano --pairs 1 --steps-per-timing 1 --batch-size 1 --seq-len 32 --threads 1"
SMALL = {
    "python -m minids.train": f"--preset nano {TRAIN}",
    "python -m minids.train --data": f"--preset nano {GIVEN}",
    "python -m minids.train --resume": "",
    "python -m minids.train --fp8": f"--preset nano {TRAIN} --out runs/fp8",
    "python -m minids.train --from": "--steps 2 --batch-size 2 --seq-len 64 --threads 1",
    "python -m minids.train --preset deep": f"{TRAIN} --dim 32 --n-heads 2",
    "python -m minids.train --preset micro": "--steps 2 --batch-size 4 --threads 1",
    "python -m minids.train --preset small": f"--preset nano {GIVEN} --compile false",
    "python -m minids.train --seq-len 2048": f"--preset nano --n-mtp-layers 0 {TRAIN}",
    "python -m minids.generate": "--max-new-tokens 4 --threads 1",
    "python -m minids.evaluate": "--max-tokens 500 --threads 1",
    "python -m minids.evaluate --run runs/warm": "--max-tokens 500 --index-topk 8 --threads 1",
    "python -m minids.tokenizer": "--vocab-size 400 --max-bytes 100000",
    "python -m minids.lab.bench": f"{BENCH} --what train",
    "python -m minids.lab.bench --what sparse": f"{BENCH} --context 96 --index-n-heads 2 "
                                            "--index-head-dim 16 --index-topk 16",
    "python -m minids.lab.bench --what speculative":
        "--pairs 1 --prompt 8 --new-tokens 4 --threads 1",
    "python -m minids.lab.bench --what moe-vs-dense": f"{BENCH} --seeds 1 --steps 2",
    "python -m minids.lab.bench --what rollout":
        f"{BENCH} --decode-batch 2 --prompt 8 --new-tokens 4",
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
    "python -m minids.costs": "", "python -m minids.hf": "", "python -m minids": "",
    "python tests/kill_and_resume.py": "--kills 1", "python tests/parity_hf.py": "--seeds 1",
    "python tests/notebook_times.py": "--only 00",
    "pytest tests/test_fp8.py -k half_of_bf16": "--collect-only -p no:cacheprovider",
}

# What is not run here, and where it is.
ELSEWHERE = {
    "pip install": ".ci/run makes a fresh environment",
    "pytest": ".ci/run calls it",
    "jupyter lab": "tests/test_jupyterlab.py",
    "nbgrader": "tests/test_course.py",
    "python -m minids.lab.course": "tests/test_course.py",
    "python -m minids.lab.claims": "tests/test_claims.py, on small runs",
    "python -m minids.r1": "tests/test_r1.py runs all stages with small settings",
}


def blocks(text: str) -> list[list[str]]:
    """The commands of each fenced block, without the remark behind two or more spaces."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        lines = block.replace("\\\n", "").splitlines()
        words = [re.split(r"(?<=\S)\s{2,}(?=\S)(?!--)", line)[0].strip() for line in lines]
        commands = [part.strip() for line in words for part in line.split("&&")]
        found.append([c for c in commands if c.split(" ")[0] in PROGRAMS])
    return [commands for commands in found if commands]


def beginning(command: str, known: dict) -> str | None:
    """The longest known beginning of a command."""
    found = [start for start in known if f"{command} ".startswith(f"{start} ")]
    return max(found, key=len, default=None)


def spans(text: str) -> list[list[str]]:
    """The commands between backticks, outside of blocks; tables leave out `python -m minids.`"""
    found, modules = {}, {name for name, _ in programs()}
    for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).split("\n\n"):
        for span in re.findall(r"`([^`]+)`", line):
            first, *more = span.split()
            if line.startswith("|") and first in modules:
                found[" ".join([f"python -m minids.{first}", *more])] = None
            elif more and first in PROGRAMS and not span.endswith("."):
                found[" ".join([first, *more])] = None
    return [[command] for command in found]


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
README = blocks(TEXT)
README += [[c] for [c] in spans(TEXT) if not any(c in block for block in README)]
HERE = [[c for c in commands if beginning(c, SMALL)] for commands in README]


def title(commands: list[str]) -> str:
    """A block's name: its first command."""
    return re.sub(r"\W+", "-", commands[0])[:60]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with the three data sets that the README names."""
    folder = tmp_path_factory.mktemp("hub")
    for name, config in (("roneneldan/TinyStories", "data"), ("HuggingFaceFW/fineweb-edu",
                                                              "sample/10BT")):
        place = folder / name / config
        place.mkdir(parents=True)
        rows = [json.dumps({"text": f"Story {i}. " + "Once there was a token. " * 40})
                for i in range(3000)]
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


@pytest.fixture
def run(tmp_path, hub):
    """Run a command of the README, made small, in one folder of its own."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.url,
           "HF_HOME": str(tmp_path / "home")}

    def run(command: str, extra: str = "") -> subprocess.CompletedProcess:
        program, *words = shlex.split(f"{command} {extra}")
        words = ["-m", "pytest", *words] if program == "pytest" else words
        words = [str(ROOT / word) if word.startswith("tests/") else word for word in words]
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=os.environ | own,
                              capture_output=True, text=True, timeout=300)
    return run


def prepare(folder: Path, run, commands: list[str]) -> None:
    """What the commands of a block find: a first run, texts, released folders."""
    text = "\n".join(commands)
    for name in ("my_folder", "books"):
        (folder / name).mkdir()
        for i in range(30):
            (folder / name / f"{i}.txt").write_text(f"Text {i} about tokens, and more.\n" * 40)
    for name in ("tiny", "deep"):
        if f"runs/{name}" in text or name == "tiny" and re.search("--drafts|speculative", text):
            assert run("python -m minids.train",
                       f"{SMALL['python -m minids.train']} --out runs/{name}").returncode == 0
    if re.search("runs/r1|FOLDER", text):
        for place in ("runs/r1/final", "FOLDER"):
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(ROOT / "data" / "r1" / "rl")
    for name in ("DeepSeek-V2-Lite", "DeepSeek-V3"):
        if name in text:
            released(folder / name)


def released(folder: Path) -> None:
    """A small folder in the released layout, with a tokenizer."""
    from minids.hf import save_hf
    from minids.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(ROOT / "data" / "tokenizer")
    args = replace(LITTLE, vocab_size=tokenizer.vocab_size)
    save_hf(scrambled(args).float(), folder, tokenizer=tokenizer)


@pytest.mark.parametrize("commands", [c for c in HERE if c], ids=title)
def test_the_commands_of_a_block_run(commands, run, tmp_path):
    prepare(tmp_path, run, commands)
    for command in commands:
        done = run(command, SMALL[beginning(command, SMALL)])
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


def test_no_command_is_left_out():
    every = [command for commands in README for command in commands if command[:3] != "cd "]
    assert [c for c in every if not (beginning(c, SMALL) or beginning(c, ELSEWHERE))] == []
    assert {beginning(c, ELSEWHERE) for c in every} - {None} <= set(ELSEWHERE)


def test_an_unknown_flag_would_be_noticed(run):
    assert run("python -m minids.costs --preset v3 --colour red").returncode == 2


def test_blocks_are_read():
    text = "Do\n```\npip install x && python -m a --b 1   remark  more\ncd x\nls\n```\n" \
           "```\npython -m b --c \\\n    --d 2\nplain words\n```\n```json\n{}\n```\n"
    assert blocks(text) == [["pip install x", "python -m a --b 1", "cd x"],
                            ["python -m b --c     --d 2"]]
    assert spans(f"See `python -m minids.a\n--b 1`, `a.py`\n\n| `costs --c 2` |\n{text}") == [
        ["python -m minids.a --b 1"], ["python -m minids.costs --c 2"]]
    assert beginning("python -m minids.train --fp8", SMALL) == "python -m minids.train --fp8"
    assert beginning("python -m minids.training", SMALL) is None
