"""Checkpoints that were damaged, and a disk that is full: named, and the one before it used."""

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from small_checkpoints import assert_holds, flip_one, save_in_place, small, steps, torn

from minids.runs import checkpoints as checkpoint
from minids.runs.checkpoints import (
    MANIFEST,
    STATE,
    WEIGHTS,
    load_state,
    load_weights,
    newest_checkpoint,
    resolve,
    save_checkpoint,
    verify,
)

# Damage.

def flips(file: Path) -> list[int]:
    """Positions to flip: each byte of a small file, else both ends and forty between."""
    size = file.stat().st_size
    if size <= 800:  # a manifest, whose every byte must count
        return list(range(size))
    return [0, size - 1, *random.Random(size).sample(range(size), 40)]


def undetected_flips(path: Path, name: str, check) -> list[int]:
    """Positions at which a flipped byte passes `check`; the file is left as it was."""
    file, passed = path / name, []
    whole = file.read_bytes()
    for position in flips(file):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            check(path)
            passed.append(position)
        except ValueError as error:
            assert name in str(error)
    file.write_bytes(whole)
    return passed


def verify_sizes(path: Path) -> None:
    """The wrong variant: believes a file of the right size, and a manifest that parses."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    for name in (WEIGHTS, STATE):
        if (path / name).stat().st_size != manifest["files"][name]["bytes"]:
            raise ValueError(f"{name} has the wrong size")


@pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
def test_each_flipped_byte_is_found(tmp_path, name):
    path = save_checkpoint(tmp_path, 1, *small(1), metric=0.5)
    assert undetected_flips(path, name, verify) == []
    verify(path)


def test_flip_check_notices_a_verifier_of_sizes(tmp_path):
    path = save_checkpoint(tmp_path, 1, *small(1))
    assert undetected_flips(path, WEIGHTS, verify_sizes) == flips(path / WEIGHTS)


DAMAGES = {
    "flipped": flip_one,
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "missing": os.remove,
}


@pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_one_before_it_used(tmp_path, capsys, name, damage):
    before, newest = (save_checkpoint(tmp_path, s, *small(s), metric=9.0 - s) for s in (1, 2))
    assert newest_checkpoint(tmp_path) == resolve(tmp_path) == newest
    assert capsys.readouterr().err == ""
    DAMAGES[damage](newest / name)
    assert newest_checkpoint(tmp_path) == before
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1 and str(newest / name) in refusal
    assert resolve(tmp_path) == before
    assert_holds(before, 1)
    load = load_weights if name == WEIGHTS else load_state
    with pytest.raises(ValueError, match=name):
        load(newest)


def test_later_format_is_named(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 1, *small(1))
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(ValueError, match="format 1: this version reads formats 3 and 2"):
        verify(path)


@pytest.mark.parametrize("depth", [99_999, 2000])
def test_a_manifest_that_is_nested_deeply_is_named(tmp_path, depth, capsys):
    path = save_checkpoint(tmp_path, 1, *small(1))
    (path / MANIFEST).write_text('{"format": 1, "a": ' + "[" * depth + "]" * depth + "}", "utf-8")
    reason = "manifest.json (is not a readable manifest|was changed)"
    with pytest.raises(ValueError, match=reason):
        verify(path)
    with pytest.raises(ValueError, match=f"holds no whole checkpoint: .*step_000001: .*{reason}"):
        resolve(tmp_path)
    assert capsys.readouterr().err == ""  # nothing beside the program's one line


class Malicious:
    """Unpickled, it makes the folder `target`."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def save_malicious(file: Path, target: Path, archive: bool) -> None:
    if archive:
        torch.save({"a": Malicious(target)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Malicious(target)}))


def reseal(path: Path) -> None:
    """Forge the manifest's checksums to match a foreign state.pt, as an attacker would."""
    body = json.loads((path / MANIFEST).read_bytes())
    del body["seal"]
    file = path / STATE
    body["files"][STATE] = {"bytes": file.stat().st_size, "sha256": checkpoint.digest(file)}
    (path / MANIFEST).write_bytes(checkpoint.sealed(body))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("archive", [True, False])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, archive):
    target = tmp_path / "made by the pickle"
    path = save_checkpoint(tmp_path / "run", 1, *small(1))
    save_malicious(path / STATE, target, archive)
    with pytest.raises(ValueError, match="state.pt"):
        load_state(path)
    reseal(path)
    verify(path)
    with pytest.raises(ValueError, match="state.pt holds more than tensors and plain values"):
        load_state(path)
    assert not target.exists()
    with contextlib.suppress(RuntimeError):  # the wrong variant runs it, whatever it then returns
        torch.load(path / STATE, weights_only=False)
    assert target.exists()


# A full disk.

@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


LARGE = torch.zeros(100_000)  # 400 kB: more than the disk and the size limit below


def assert_survives(run: Path, weights: dict, state: dict, reason: str, save) -> None:
    """A save that the disk refuses: one clear line, nothing left over, the one before it whole."""
    before = save_checkpoint(run, 1, *small(1))
    failed = run / "checkpoints" / "step_000002"
    with pytest.raises(OSError) as caught:
        save(run, 2, weights, state)
    message = str(caught.value)
    assert "\n" not in message and reason in message
    assert f"{failed} could not be written" in message and f"{before}, the one" in message
    assert os.listdir(run / "checkpoints") == ["step_000001"]
    assert_holds(before, 1)


CONTENTS = {"weights": ({"w": LARGE}, {}), "state": ({}, {"w": LARGE}),
            "many numbers": ({}, {"a": list(range(100_000))})}


@pytest.mark.parametrize("content", CONTENTS)
def test_full_disk(tiny_disk, content):
    assert_survives(tiny_disk, *CONTENTS[content], "No space left on device", save_checkpoint)
    save_checkpoint(tiny_disk, 2, *small(2))  # and there is room again
    assert steps(tiny_disk) == [1, 2]


def test_full_disk_check_notices_a_save_in_place(tiny_disk):
    with pytest.raises(SafetensorError):
        assert_survives(tiny_disk, {"w": LARGE}, {}, "No space left", save_in_place)
    assert torn(tiny_disk)


@pytest.mark.parametrize("content", CONTENTS)
def test_disk_that_refuses_a_file(tmp_path, small_files, content):
    assert_survives(tmp_path, *CONTENTS[content], "File too large", save_checkpoint)


@pytest.mark.parametrize("broken", ["fsync", "rename", "mkdir"])
def test_disk_that_refuses_a_call(tmp_path, monkeypatch, broken):
    def save_on_full_disk(*args):
        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, refuse)
            save_checkpoint(*args)
    assert_survives(tmp_path, *small(2), "No space left on device", save_on_full_disk)


def test_first_save_on_a_full_disk_says_that_there_is_none_before_it(tmp_path, small_files):
    with pytest.raises(OSError, match="there is none before it"):
        save_checkpoint(tmp_path, 1, {"w": LARGE}, {})
