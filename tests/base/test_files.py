"""Files: written whole or not at all, and read with errors that name them."""

import json
import os
import resource
from pathlib import Path

import pytest

from minids.base.files import read_json, write_json, write_whole


@pytest.fixture
def small_files():
    """No file may pass 100 kB: a disk error that every user can have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_text_is_utf_8_and_bytes_are_bytes(tmp_path):
    write_whole(tmp_path / "text", "1 + 1 = zwölf\n")
    write_whole(str(tmp_path / "bytes"), b"\r\n\xff")
    assert (tmp_path / "text").read_text("utf-8") == "1 + 1 = zwölf\n"
    assert (tmp_path / "bytes").read_bytes() == b"\r\n\xff"
    assert sorted(os.listdir(tmp_path)) == ["bytes", "text"]


@pytest.mark.parametrize("data, problem", [
    (None, "is missing"), (b"", "is not JSON"), (b'{"a": ', "is not JSON"),
    (b"\xff{}", "is not JSON"), (b"[1]", "holds list, not an object of fields")])
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
