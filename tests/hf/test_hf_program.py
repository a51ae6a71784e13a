"""The program: a run becomes a folder that every program takes, and mistakes are one line."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_folders import CLEAN, V3_CONFIG, all_equal, call, folder_of, from_pretrained
from small_models import LITTLE, scrambled
from transformers import AutoTokenizer

from minids import ModelArgs
from minids.evaluate import main as evaluate_program
from minids.generate import main as generate_program
from minids.hf import __main__ as program
from minids.hf import load_hf, save_hf
from minids.hf.__main__ import HfArgs, convert
from minids.hf.names import CONFIG
from minids.runs.checkpoints import save_checkpoint
from minids.runs.open import open_model
from minids.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")



@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder whose model has learnt nothing, but is sure of what it says."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    tokenizer = Tokenizer.load()
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size)
    save_checkpoint(folder, 7, scrambled(args, dtype=torch.float32).state_dict(), {"step": 7})
    tokenizer.save(folder / "tokenizer")
    config = {"model": asdict(args), "tokenizer": tokenizer.fingerprint}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """That run as a Hugging Face folder."""
    out = tmp_path_factory.mktemp("exported") / "nano"
    convert(HfArgs(run=str(run), out=str(out)))
    return out


@pytest.mark.parametrize("words, named", [
    ([], "give either --run"), (["--run", "a", "--folder", "b"], "give either --run"),
    (["--run", "a"], "name the folder to write"), (["--folder", "nowhere"], "nowhere is not a"),
    (["--folder", "a", "--dtype", "bf16"], "out = ''"), (["--foldr", "a"], "--folder"),
    (["--run", "a", "--out", "b", "--quantize", "int4"], "int4"),
    (["--run", "a", "--out", "b", "--shard-bytes", "0"], "shard_bytes = 0"),
    (["--run", "nowhere", "--out", "b"], "nowhere is not a folder")])
def test_a_mistake_on_the_command_line_is_one_line(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, monkeypatch, *words)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err
    assert list(tmp_path.iterdir()) == []


def test_an_exported_run_is_the_same_model_with_the_same_tokenizer(run, exported):
    mine, theirs = open_model(run), open_model(exported)
    assert all_equal(mine.model.state_dict(), theirs.model.state_dict())
    assert mine.model.args == theirs.model.args and theirs.path == exported
    text = "def read_file(path):\n    return 'naïve'  # 12345\n"
    ids = mine.tokenizer.encode(text)
    assert theirs.tokenizer.encode(text) == ids
    assert AutoTokenizer.from_pretrained(exported)(text)["input_ids"] == ids
    config = json.loads((exported / CONFIG).read_text())
    for name, id in (("bos", mine.tokenizer.bos_id), ("eos", mine.tokenizer.eos_id)):
        assert config[f"{name}_token_id"] == getattr(theirs.tokenizer, f"{name}_id") == id
    assert from_pretrained(exported)[1] == CLEAN


def test_generate_takes_either_folder(run, exported, capsys, monkeypatch):
    said = []
    for folder, seed in ((run, 5), (exported, 5), (exported, 6)):
        words = ["--run", folder, "--prompt", "def ", "--max-new-tokens", 20, "--seed", seed]
        monkeypatch.setattr(sys, "argv", ["minids.generate", *map(str, words)])
        generate_program()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_evaluate_takes_either_folder(run, exported, tmp_path, capsys, monkeypatch):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"This is text number {i}, and it is not long.\n" * 4)
    said = []
    for folder, seq_len in ((run, 32), (exported, 32), (exported, 16)):
        words = ["--run", folder, "--data", f"text:{tmp_path}", "--seq-len", seq_len,
                 "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["minids.evaluate", *map(str, words)])
        evaluate_program()
        said.append(capsys.readouterr().out.split("\n", 1)[1])
    assert said[0] == said[1] != said[2] and "bits per byte" in said[0]


def test_a_folder_without_a_tokenizer_is_named(exported, tmp_path):
    with pytest.raises(ValueError, match="plain.*tokenizer.json"):
        open_model(folder_of(LITTLE, tmp_path / "plain"))
    folder_of(LITTLE, tmp_path / "small", tokenizer=exported)
    with pytest.raises(ValueError, match="its tokenizer has [0-9]+ tokens and its model only 64"):
        open_model(tmp_path / "small")
    with pytest.raises(ValueError, match="tokenizer has .* at most vocab_size = 64"):
        save_hf(scrambled(LITTLE), tmp_path / "out", tokenizer=Tokenizer.load())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_model(tmp_path)


def test_fp8_is_made_wide_and_the_tokenizer_copied(run, exported, tmp_path, capsys, monkeypatch):
    status, out, _ = call(capsys, monkeypatch, "--run", run, "--out", tmp_path / "fp8",
                          "--dtype", "bf16", "--quantize", "fp8")
    assert status == 0 and "FP8: yes" in out
    status, out, _ = call(capsys, monkeypatch, "--folder", tmp_path / "fp8",
                          "--out", tmp_path / "wide")
    assert status == 0 and "FP8: no" in out and "BF16" in out
    expected = load_hf(tmp_path / "fp8", torch.bfloat16)
    assert all_equal(load_hf(tmp_path / "wide", torch.bfloat16).state_dict(),
                     expected.state_dict())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy, original = tmp_path / "wide" / name, exported / name
        assert copy.read_bytes() == original.read_bytes()
        assert copy.stat().st_ino != (tmp_path / "fp8" / name).stat().st_ino
    ends = [{end: json.loads((folder / CONFIG).read_text())[end] for end in
             ("bos_token_id", "eos_token_id")} for folder in (exported, tmp_path / "wide")]
    assert ends[0] == ends[1]
    assert open_model(tmp_path / "wide").model.head.weight.dtype == torch.float32
    assert open_model(tmp_path / "wide", dtype=torch.bfloat16).model.head.weight.dtype \
        == torch.bfloat16


def secret_link(folder: Path, name: str) -> None:
    """The folder's file becomes a link to another file of its user."""
    secret = folder.parent / "secret"
    secret.write_text('{"password": "swordfish"}', "utf-8")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)


def file_of(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize("harm, told", [
    *((partial(secret_link, name=name), f"{name} is a link to") for name in (
        "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "merges.txt",
        "generation_config.json", "tokenizer.model", "tokenization_own.py")),
    (file_of("special_tokens_map.json", b"root:x:0:0"), "special_tokens_map.json is not JSON"),
    (file_of("generation_config.json", b"[]"), "generation_config.json holds list"),
    (file_of("chat_template.jinja", b"a\0b"), "chat_template.jinja is binary"),
    (file_of("merges.txt", b"\xff\xfe"), "merges.txt is binary or not UTF-8")])
def test_tokenizer_files_are_copied_when_they_are_understood(harm, told, exported, tmp_path, capsys,
                                                            monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(exported, folder)
    harm(folder)
    for words in (["--folder", folder, "--out", out], ["--folder", folder]):
        status, said, err = call(capsys, monkeypatch, *words)
        assert (status, said, err.count("\n")) == (2, "", 1) and told in err and not out.exists()


def test_the_links_of_a_hubs_cache_are_followed(exported, tmp_path, capsys, monkeypatch):
    """Every file of a snapshot is a link to a blob beside all snapshots."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(exported, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    status, _, err = call(capsys, monkeypatch, "--folder", snapshot, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (blobs / name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()
    shutil.rmtree(blobs)
    shutil.copytree(exported, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")  # a cache that somebody else has packed
    status, _, err = call(capsys, monkeypatch, "--folder", snapshot)
    assert status == 2 and "outside its folder" in err


def test_a_new_tokenizer_replaces_the_old_one_whole(exported, tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out", tokenizer=exported)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    folder_of(LITTLE, folder, overwrite=True)
    assert (folder / "tokenizer.json").exists() and (folder / "generation_config.json").exists()
    folder_of(LITTLE, folder, overwrite=True, tokenizer=exported)
    assert (folder / "tokenizer.json").exists()
    for name in ("bos_token_id", "eos_token_id"):  # no longer 5
        own, new = (json.loads((where / CONFIG).read_text())[name] for where in (exported, folder))
        assert json.loads((folder / "generation_config.json").read_text())[name] == own == new


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(exported):
    done = subprocess.run([sys.executable, "-m", "minids.hf", "--folder", exported],
                          capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0 and "DeepseekV3ForCausalLM" in done.stdout and not done.stderr


def test_a_mistake_in_a_file_of_settings_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / CONFIG).write_text(json.dumps(V3_CONFIG | {"index_topk": 0, "topk_group": 9}))
    assert call(capsys, monkeypatch, "--folder", tmp_path) == (
        2, "", f"python -m minids.hf: {tmp_path / CONFIG}: topk_group = 9 is not valid: it must be "
               "between 1 and n_group = 8\n")


@pytest.mark.parametrize("learnt, chat", [
    ({}, False), (dict(sft={}), True), (dict(grpo=dict(template="chat")), True),
    (dict(grpo=dict(template="task")), False)])
def test_a_run_that_has_learnt_to_chat_is_exported_with_its_template(learnt, chat, tmp_path,
                                                                     monkeypatch):
    opened = SimpleNamespace(config=learnt, model="model", folder=tmp_path, tokenizer="own")
    saved = []
    monkeypatch.setattr(program, "open_model", lambda run: opened)
    monkeypatch.setattr(program, "save_hf", lambda *given: saved.append(given))
    monkeypatch.setattr(program, "describe", str)
    out = str(tmp_path / "out")
    convert(HfArgs(run="r", out=out, overwrite=True, dtype="bf16", shard_bytes=9, quantize="fp8"))
    assert saved == [("model", out, True, torch.bfloat16, 9, "own", "fp8", chat)]
