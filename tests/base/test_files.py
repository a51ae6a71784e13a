"""Files: written whole or not at all, and read with errors that name them."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from small_models import LITTLE, scrambled

import minids
from minids.base import files
from minids.base.files import read_json, write_json, write_whole
from minids.base.tensors import save_tensors
from minids.hf import save_hf
from minids.parallel.parts import Part, write_parts
from minids.runs.checkpoints import save_checkpoint


def write_json_in_place(path: Path, obj) -> None:
    path.write_text(json.dumps(obj))


def keeps_old_json(path: Path, write) -> bool:
    """Return whether a write that the disk refuses leaves the file before it and nothing else."""
    write_json(path, {"lr": 1.0})
    with pytest.raises(OSError):
        write(path, {"lr": [0] * 100_000})
    return path.read_text() == '{\n  "lr": 1.0\n}\n' and os.listdir(path.parent) == [path.name]


def test_write_json_is_whole_or_absent(tmp_path, small_files):
    path = tmp_path / "config.json"
    assert keeps_old_json(path, write_json)
    with pytest.raises(OSError, match="config.json could not be written: File too large"):
        write_json(path, {"lr": [0] * 100_000})
    assert not keeps_old_json(path, write_json_in_place)


WRITERS = {
    "tensors": lambda folder: save_tensors({"a": torch.ones(2)}, folder / "a.safetensors"),
    "parts": lambda folder: write_parts(folder / "rank0.safetensors",
                                        {"a": Part(torch.ones(2), [2], [0])}),
    "checkpoint": lambda folder: save_checkpoint(folder, 1, {"a": torch.ones(2)}, {}),
    "folder": lambda folder: save_hf(scrambled(LITTLE), folder / "out"),
    "folder of many files": lambda folder: save_hf(scrambled(LITTLE), folder / "out",
                                                   shard_bytes=90_000),
}


def modes(folder: Path) -> set[int]:
    """Return the permissions of all files in a folder."""
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_weights_may_be_read_by_whom_any_new_file_may(tmp_path, write, mask):
    before = os.umask(mask)
    try:
        write(tmp_path)
    finally:
        os.umask(before)
    assert modes(tmp_path) == {0o666 & ~mask}


def test_a_file_keeps_its_permissions_when_tensors_replace_others(tmp_path):
    save_tensors({"a": torch.ones(2)}, tmp_path / "a")
    (tmp_path / "a").chmod(0o640)
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a")
    assert modes(tmp_path) == {0o640} and not load_file(tmp_path / "a")["a"].any()


def test_text_is_utf_8_and_bytes_are_bytes(tmp_path):
    write_whole(tmp_path / "text", "1 + 1 = zwölf\n")
    write_whole(str(tmp_path / "bytes"), b"\r\n\xff")
    assert (tmp_path / "text").read_text("utf-8") == "1 + 1 = zwölf\n"
    assert (tmp_path / "bytes").read_bytes() == b"\r\n\xff"
    assert sorted(os.listdir(tmp_path)) == ["bytes", "text"]


@pytest.mark.parametrize("data, problem", [
    (None, "is missing"), (b"", "is not JSON"), (b'{"a": ', "is not JSON"),
    (b"\xff{}", "is not JSON"), (b"[" * 10**6, "is not JSON"), (b"9" * 5000, "is not JSON"),
    (b"[1]", "holds list, not an object of fields")])
def test_json_that_cannot_be_read_is_named_in_one_line(tmp_path, data, problem):
    path = tmp_path / "config.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} {problem}") and "\n" not in str(caught.value)


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, "ü", None]})
    assert read_json(tmp_path / "x.json") == {"a": [1, "ü", None]}
    assert read_json(str(tmp_path / "x.json")) == {"a": [1, "ü", None]}


def without_encoding(source: str) -> list[str]:
    """Calls that open a file as text, in whatever encoding the machine prefers."""
    found = []
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = [*call.args, *(k.value for k in call.keywords if k.arg in ("encoding", "mode"))]
        words = [a.value for a in given if isinstance(a, ast.Constant) and type(a.value) is str]
        said = any("utf" in word for word in words) or any(
            isinstance(word, str) and "b" in word and len(word) <= 3 for word in words)
        piped = any(k.arg in ("text", "universal_newlines")
                    and getattr(k.value, "value", None) is True for k in call.keywords)
        if name in ("read_text", "write_text", "fdopen") and not said or piped or (
                name == "open" and not said and isinstance(call.func, ast.Name)):
            found.append(ast.unparse(call))
    return found


def test_every_text_file_is_opened_with_its_encoding_stated():
    files = sorted(Path(minids.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    assert {str(f): calls for f in files if (calls := without_encoding(f.read_text("utf-8")))} == {}


@pytest.mark.parametrize("call, wrong", [
    ("open(p)", True), ("open(p, 'w')", True), ("open(p, 'rb')", False),
    ("open(p, 'a', encoding='utf-8')", False), ("p.read_text()", True),
    ("p.read_text('utf-8-sig')", False), ("p.write_text(text)", True), ("p.open('wb')", False),
    ("p.write_text(text, encoding='utf-8')", False), ("run(words, text=True)", True)])
def test_a_text_file_without_encoding_is_noticed(call, wrong):
    assert bool(without_encoding(call)) is wrong


@pytest.mark.parametrize("removed", [False, True])
def test_a_lock_is_given_back_whatever_happens(removed, tmp_path, monkeypatch):
    """Also one whose file its last owner removed in between, which is then taken again."""
    made, there = [], iter([not removed, True])
    monkeypatch.setattr(files, "FileLock", lambda *given, **named: made.append(
        FileLock(*given, **named)) or made[-1])
    lock = type("Lock", (type(tmp_path),), dict(exists=lambda path: next(there)))(tmp_path / "lock")
    with pytest.raises(KeyError), files.holding(lock):
        assert made[0].is_locked and made[0].lock_counter == 1
        raise KeyError
    assert len(made) == 1 and not made[0].is_locked and [*tmp_path.iterdir()] == []
