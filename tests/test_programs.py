"""`python -m minids` lists every program: of files, of packages, of the lab; all know UTF-8."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import minids.__main__
from minids.__main__ import programs
from minids.base import command_line

ROOT = Path(__file__).resolve().parents[1]


def test_files_packages_and_the_lab_are_listed_in_this_order():
    names = [name for name, _ in programs()]
    lab = [name for name in names if name.startswith("lab.")]
    assert {"train", "costs", "hf", "lab.bench"} <= set(names)
    assert names == sorted(set(names) - set(lab)) + sorted(lab)
    assert all(importlib.util.find_spec(f"minids.{name}") for name in names)
    # A module that only others import is no program, nor is the list itself.
    assert not {"config", "lab.lesson", "__main__", "costs.__main__"} & set(names)


def test_each_module_that_calls_run_program_is_listed():
    root = Path(minids.__main__.__file__).parent
    calling = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
               for path in root.rglob("*.py")
               if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")}
    assert calling - {"__main__"} == {name for name, _ in programs()}


# They write files, and go on when nobody reads what they print.
LASTING = {"distill", "grpo", "hf", "r1", "sft", "tokenizer", "train", "lab.claims", "lab.course",
           "lab.grading", "lab.recall"}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_each_program_runs_its_own_main_under_its_own_name(monkeypatch):
    begun = {}
    monkeypatch.setattr(command_line, "run_program", lambda program, main, lasting=False: (
        begun.update({program: (main.__name__, main.__module__, lasting)})))
    for name, _ in programs():
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_module(f"minids.{name}", run_name="__main__", alter_sys=True)
    assert begun == {f"minids.{name}": ("main", "__main__", name in LASTING)
                     for name, _ in programs()}


@pytest.mark.parametrize("text, listed", [
    ('"""Sort.\n\nMore."""\n\n\ndef main():\n    pass\n', [("a", "Sort."), ("b", "Sort.")]),
    ('"""Sort."""\n\n\ndef other():\n    pass\n', [])])
def test_a_program_is_a_file_or_a_package_with_a_main(text, listed, tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    for path in ("a.py", "b/__main__.py", "b/helper.py"):
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(minids.__main__, "__file__", str(tmp_path / "__main__.py"))
    assert programs() == listed


def test_the_list_is_printed_without_torch():
    code = ("import runpy, sys\ntry:\n    runpy.run_module('minids', run_name='__main__')\n"
            "except SystemExit:\n    sys.exit('torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line.split()[2] for line in run.stdout.splitlines()] == [
        f"minids.{name}" for name, _ in programs()]


MISSING = "raise ModuleNotFoundError('No module named {0}', name='{0}')"


@pytest.mark.parametrize("program, package, body, status, line", [
    ("generate", "torch", MISSING, 2, "{0} is not installed: pip install {0}"),
    *(pytest.param(program, package, MISSING, 2, "{0} is not installed: pip install {0}",
                   marks=pytest.mark.slow)  # these import torch first
      for program, package in (("train", "tqdm"), ("evaluate", "filelock"), ("hf", "safetensors"))),
    ("sft", "torch", "raise KeyboardInterrupt", 130, "interrupted")])
def test_imports_that_end_are_told_in_one_line(tmp_path, program, package, body, status, line):
    (tmp_path / f"{package}.py").write_text(body.format(package), "utf-8")
    run = subprocess.run([sys.executable, "-m", f"minids.{program}", "--device", "cpu"],
                         capture_output=True, encoding="utf-8", cwd=tmp_path,
                         env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    told = f"python -m minids: {line.format(package)}\n"
    assert (run.returncode, run.stdout, run.stderr) == (status, "", told)


def test_a_bug_at_import_keeps_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("1 / 0", "utf-8")
    run = subprocess.run([sys.executable, "-m", "minids.generate"], capture_output=True,
                         encoding="utf-8", cwd=tmp_path,
                         env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert run.returncode == 1 and "ZeroDivisionError" in run.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
@pytest.mark.parametrize("program", ["minids", "minids.costs"])
def test_a_program_without_torch_finds_a_full_disk(program):
    with open("/dev/full", "w", encoding="utf-8") as full:
        run = subprocess.run([sys.executable, "-m", program], stdout=full, stderr=subprocess.PIPE,
                             encoding="utf-8", env=os.environ | {"PYTHONPATH": str(ROOT)})
    told = f"python -m {program}: standard output: No space left on device\n"
    assert (run.returncode, run.stderr) == (2, told)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.slow
def test_text_that_is_not_ascii_under_an_ascii_locale(tmp_path):
    (tmp_path / "téxte").mkdir()
    for i in range(30):
        (tmp_path / f"téxte/zwölf{i}.txt").write_text(f"{i} höher, 日本 {i} \u2028" * 40, "utf-8")
    messages = [dict(role="user", content="wie höher? 日本"), dict(role="assistant", content="é")]
    row = json.dumps(dict(messages=messages), ensure_ascii=False)
    (tmp_path / "gespräch.jsonl").write_text(row, "utf-8")

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True,
                              env=os.environ | ASCII | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        return done.stdout.decode("ascii")

    small = ["--threads", "1", "--batch-size", "2"]
    run("minids.train", "--preset", "nano", "--data", "text:téxte", "--steps", "2", "--seq-len",
        "32", "--eval-tokens", "64", "--prompt", "höher", "--out", "läuft", *small)
    config = json.loads((tmp_path / "läuft/config.json").read_text("utf-8"))
    assert config["train"]["prompt"] == "höher"
    assert (tmp_path / "läuft/sample.txt").read_text("utf-8").startswith("höher")
    assert "\\u65e5" in run("minids.generate", "--run", "läuft", "--prompt", "日", "--threads", "1",
                            "--max-new-tokens", "4")
    run("minids.sft", "--from", "läuft", "--data", "jsonl:gespräch.jsonl", "--steps", "1", "--out",
        "réponse", *small)
