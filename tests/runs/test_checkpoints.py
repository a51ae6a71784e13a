"""Checkpoints: whole or absent after a kill, damage found, a full disk survived."""

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minids.runs import checkpoints as checkpoint
from minids.runs.checkpoints import (
    MANIFEST,
    STATE,
    WEIGHTS,
    load_state,
    load_weights,
    newest_checkpoint,
    prune,
    resolve,
    rng_state,
    save_checkpoint,
    set_rng_state,
    verify,
)

ROOT = Path(__file__).resolve().parents[2]


def small(step: int) -> tuple[dict, dict]:
    """Weights and state that tell the step."""
    weights = {"w": torch.full((4, 8), float(step)), "b": torch.arange(3) + step}
    return weights, {"step": step, "optimizer": {"momentum": [torch.full((5,), -float(step))]}}


def steps(run: Path) -> list[int]:
    """The steps of all that lies in the folder, which must all be checkpoints."""
    return sorted(int(checkpoint.NAME.fullmatch(path.name)[1])
                  for path in (run / "checkpoints").iterdir())


def assert_holds(path: Path, step: int) -> None:
    """The checkpoint reads back as `small(step)`, bit for bit."""
    weights, state = small(step)
    assert verify(path)["step"] == step
    torch.testing.assert_close(load_weights(path), weights, rtol=0, atol=0)
    torch.testing.assert_close(load_state(path), state, rtol=0, atol=0)


def save_in_place(run: Path, step: int, weights: dict, state: dict, keep_last=3, metric=None):
    """The wrong variant: writes under the final name from the start."""
    path = Path(run) / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True, exist_ok=True)
    checkpoint.write_files(path, step, weights, state, metric)
    prune(run, path, keep_last)
    return path


# Weights and state come back as they were.

def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def awkward_weights() -> dict[str, torch.Tensor]:
    """Tied, transposed, expanded, sliced, empty, scalar and low-precision tensors."""
    torch.manual_seed(0)
    table = torch.randn(6, 4)
    odd = torch.tensor([0x7FC1, 0x8000, 0xFF80 - 2**16], dtype=torch.int32).to(torch.int16)
    return {
        "embed": table, "head": table, "rows": table[1:3], "transposed": table.T,
        "strided": table[::2, ::3], "expanded": torch.randn(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)), "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5), "bf16": torch.randn(5, 3).bfloat16().T,
        "half": torch.randn(4).half(), "fp8": torch.randn(8).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]), "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "nan payload, -0 and -inf": odd.view(torch.bfloat16),
    }


def test_weights_return_bit_for_bit(tmp_path):
    weights = awkward_weights()
    path = save_checkpoint(tmp_path, 7, weights, {})
    for loaded in (load_weights(path), load_file(path / WEIGHTS)):
        assert loaded.keys() == weights.keys()
        for name, tensor in weights.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
            assert bits(loaded[name]) == bits(tensor.detach()), name
    with pytest.raises((RuntimeError, ValueError)):  # without copies, safetensors refuses the tie
        save_file(weights, tmp_path / "tied.safetensors")


def test_same_content_gives_same_bytes(tmp_path):
    first = save_checkpoint(tmp_path / "a", 3, *small(3), metric=1.25)
    again = save_checkpoint(tmp_path / "b", 3, *small(3), metric=1.25)
    other = save_checkpoint(tmp_path / "c", 3, *small(4), metric=1.25)
    for name in (WEIGHTS, STATE, MANIFEST):
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


def test_optimizer_state_returns(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, layer.state_dict(), {"optimizer": optimizer.state_dict()})
    fresh = torch.optim.AdamW(layer.parameters())
    fresh.load_state_dict(load_state(path)["optimizer"])
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x"), len, {3, 4}])
def test_state_that_could_not_be_read_back_is_refused_when_saved(tmp_path, value):
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] = .* cannot be saved"):
        save_checkpoint(tmp_path, 1, {}, {"a": [1, value]})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_metric_must_be_finite(tmp_path, metric):
    with pytest.raises(ValueError, match="metric = .* must be finite"):
        save_checkpoint(tmp_path, 1, {}, {}, metric=metric)


# Random generators.

def draw() -> list:
    random.gauss(0, 1)
    np.random.standard_normal()
    values = [random.gauss(0, 1), random.random(), np.random.standard_normal(),
              np.random.random(), *torch.randn(3).tolist()]
    if torch.cuda.is_available():
        values += torch.randn(3, device="cuda").tolist()
    return values


def resumes(tmp_path, get_state) -> bool:
    """Return whether a state that went through a checkpoint repeats the draws that followed it."""
    draw()
    random.gauss(0, 1)  # gauss makes two and keeps one: the kept one is state too
    np.random.standard_normal()
    path = save_checkpoint(tmp_path, 1, {}, {"rng": get_state()})
    expected = draw()
    draw()
    set_rng_state(load_state(path)["rng"])
    return draw() == expected


def test_rng_state_resumes(tmp_path):
    assert resumes(tmp_path, rng_state)


def test_rng_check_notices_a_stale_generator(tmp_path):
    stale = rng_state()
    for name in ("python", "numpy", "torch"):
        draw()
        assert not resumes(tmp_path, lambda name=name: rng_state() | {name: stale[name]}), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_weights_and_generator_return(tmp_path):
    weights = {"w": torch.randn(4, 3, device="cuda").T}
    path = save_checkpoint(tmp_path, 1, weights, {"momentum": weights["w"], "rng": rng_state()})
    expected = torch.randn(5, device="cuda")
    set_rng_state(load_state(path)["rng"])
    assert torch.equal(torch.randn(5, device="cuda"), expected)
    assert load_weights(path)["w"].device.type == "cpu"
    assert torch.equal(load_weights(path)["w"], weights["w"].cpu())
    assert torch.equal(load_state(path)["momentum"], weights["w"].cpu())


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


def flip_one(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


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
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(ValueError, match="format 1: this version reads format 2"):
        verify(path)


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
    """What an attacker would do: bring the manifest in line with a foreign state.pt."""
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


# Kills.

SAVER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_checkpoints
for line in sys.stdin:
    save_name, run, first = line.split()
    if (child := os.fork()) == 0:
        test_checkpoints.save_for_ever(save_name, run, int(first))
    test_checkpoints.say("child", child)
    os.waitpid(child, 0)
    test_checkpoints.say("dead")
"""


def say(*words) -> None:
    """A line on stdout in a single write, which a kill cannot cut in two as it can a `print`."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def save_for_ever(save_name: str, run: str, step: int) -> None:
    """Save step after step, each twice (the second replaces the first), announcing each."""
    save = {"right": save_checkpoint, "wrong": save_in_place}[save_name]
    while True:
        for _ in range(2):
            save(Path(run), step, *small(step), keep_last=2)
            say("saved", step)
        step += 1


class Killer:
    """A process that forks savers: torch is imported once, not once a kill."""

    def __init__(self):
        source = SAVER.format(root=str(ROOT), tests=str(Path(__file__).parent))
        self.process = subprocess.Popen([sys.executable, "-c", source], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.moments = random.Random(0)

    def save_and_kill(self, save_name: str, run: Path, first: int) -> int:
        """Saves from step `first` on until killed; the last step that was announced as saved."""
        self.process.stdin.write(f"{save_name} {run} {first}\n")
        self.process.stdin.flush()
        child, last, alive = 0, 0, True
        while alive:
            word, *number = self.process.stdout.readline().split()
            alive = word != "dead"
            if word == "child":
                child = int(number[0])
            elif word == "saved":
                last = int(number[0])
            if child and last >= first:  # only after one is whole, so that there is one to find
                time.sleep(self.moments.uniform(0, 0.05))
                os.kill(child, signal.SIGKILL)
                child = 0
        return last

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def killer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        killer = Killer()
    yield killer
    killer.close()


def torn(run: Path) -> list[str]:
    """The refusals: what is wrong with each folder that has a checkpoint's name and is not one."""
    refusals = []
    for path in checkpoint.all_checkpoints(run):
        try:
            verify(path)
        except ValueError as error:
            refusals.append(str(error))
    return refusals


def test_killed_saves_leave_whole_checkpoints(tmp_path, killer):
    step, cut = 1, False
    for _ in range(10):
        last = killer.save_and_kill("right", tmp_path, step)
        assert torn(tmp_path) == []
        newest = newest_checkpoint(tmp_path)
        step = verify(newest)["step"]
        assert last <= step <= last + 1
        assert_holds(newest, step)
        whole = {verify(path)["step"] for path in checkpoint.all_checkpoints(tmp_path)}
        assert step == 1 or step - 1 in whole  # keep_last = 2
        cut |= any((tmp_path / "checkpoints").glob(".tmp_*"))
        step += 1
    assert cut  # some kills fell inside a save, else nothing was tried
    save_checkpoint(tmp_path, step, *small(step), keep_last=2)
    assert steps(tmp_path) == [step - 1, step]  # the dead saves' folders are gone


def test_kill_check_notices_a_save_in_place(tmp_path, killer):
    for kill in range(20):
        killer.save_and_kill("wrong", tmp_path / str(kill), 1)
        if torn(tmp_path / str(kill)):
            return
    pytest.fail("twenty kills tore no save in place")


def interrupt_each_step(monkeypatch, run: Path, save) -> list[str]:
    """Stop a replacing save before each rename, flush and removal; what a reader misses then."""
    lost, start = [], run.with_name("start")
    for step in (1, 2):
        save_checkpoint(start, step, *small(step))
    for stop_at in range(40):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(start, run)
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            for module, name in [(os, "rename"), (os, "fsync"), (shutil, "rmtree")]:
                patch.setattr(module, name, stopping(getattr(module, name), calls, stop_at))
            try:
                save(run, 2, *small(2))
                return lost
            except KeyboardInterrupt:
                pass
        if torn(run) or verify(newest_checkpoint(run))["step"] != 2:
            lost.append(f"call {stop_at}")
    raise AssertionError("the save did not end within 40 calls")


def stopping(function, calls, stop_at: int):
    def call(*args, **kwargs):
        if next(calls) >= stop_at:  # also the cleaning up: a killed process does none
            raise KeyboardInterrupt
        return function(*args, **kwargs)
    return call


def test_replacing_save_never_loses_the_step(tmp_path, monkeypatch):
    assert interrupt_each_step(monkeypatch, tmp_path / "run", save_checkpoint) == []


def test_one_put_aside_serves_until_its_successor_is_there(tmp_path):
    """A kill between the two renames, or before the removal of the one put aside."""
    path = save_checkpoint(tmp_path, 1, *small(1))
    aside = path.rename(path.with_name("step_000001.replaced"))
    assert newest_checkpoint(tmp_path) == resolve(tmp_path) == aside
    save_checkpoint(tmp_path, 2, *small(2), keep_last=2)
    assert_holds(aside, 1)
    shutil.copytree(aside, path)
    save_checkpoint(tmp_path, 3, *small(3), keep_last=4)
    assert checkpoint.all_checkpoints(tmp_path)[-1] == path and steps(tmp_path) == [1, 2, 3]


def remove_then_save(run: Path, step: int, weights: dict, state: dict) -> None:
    """The wrong variant: makes room for the new save first."""
    os.rename(run / "checkpoints" / f"step_{step:06d}", run / "old")
    save_checkpoint(run, step, weights, state)


def test_replacing_check_notices_a_gap(tmp_path, monkeypatch):
    assert interrupt_each_step(monkeypatch, tmp_path / "run", remove_then_save)


def flushed_before_rename(monkeypatch, run: Path) -> dict[str, bool]:
    """For each file of a new save, whether it was flushed before its folder got its name."""
    flushed, at_rename = set(), set()
    fsync, rename = os.fsync, os.rename
    def record_fsync(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)
    def record_rename(source, target):
        at_rename.update(flushed)
        flushed.clear()
        rename(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", record_fsync)
        patch.setattr(os, "rename", record_rename)
        path = save_checkpoint(run, 1, *small(1))
    inside = {p.name: p.stat().st_ino in at_rename for p in [path, *path.iterdir()]}
    return inside | {"names": path.parent.stat().st_ino in flushed}


def test_all_is_flushed_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    order = flushed_before_rename(monkeypatch, tmp_path / "right")
    assert order.keys() == {"step_000001", WEIGHTS, STATE, MANIFEST, "names"}
    assert all(order.values())
    monkeypatch.setattr(checkpoint, "flush", lambda path: None)
    assert not all(flushed_before_rename(monkeypatch, tmp_path / "wrong").values())


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


@pytest.fixture
def small_files():
    """No file may pass 100 kB: a disk error that every user can have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


# Which ones are kept.

METRICS = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None, 6: 4.0}


def kept(run: Path, keep_last: int, forget=prune) -> list[int]:
    for step, metric in METRICS.items():
        path = save_checkpoint(run, step, *small(step), keep_last=0, metric=metric)
        forget(run, path, keep_last)
    return steps(run)


@pytest.mark.parametrize("keep_last, expected",
                         [(0, [1, 2, 3, 4, 5, 6]), (1, [2, 6]), (3, [2, 4, 5, 6])])
def test_last_and_best_are_kept(tmp_path, keep_last, expected):
    assert kept(tmp_path, keep_last) == expected
    assert newest_checkpoint(tmp_path).name == "step_000006"


def test_pruning_check_notices_a_lost_best(tmp_path):
    def forget_all_but_last(run, saved, keep_last):
        for path in checkpoint.all_checkpoints(run)[keep_last:]:
            shutil.rmtree(path)
    assert kept(tmp_path, 1, forget_all_but_last) == [6]


def test_save_prunes(tmp_path):
    for step, metric in METRICS.items():
        save_checkpoint(tmp_path, step, *small(step), keep_last=1, metric=metric)
    assert steps(tmp_path) == [2, 6]


def test_of_equal_metrics_the_newest_is_best(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *small(step), metric=1.0, keep_last=1)
    assert steps(tmp_path) == [3]  # were an older one the best, it would stay too


def test_save_at_an_earlier_step_survives_its_own_pruning(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, *small(step), keep_last=1)
    path = save_checkpoint(tmp_path, 15, *small(15), keep_last=1)
    assert steps(tmp_path) == [15, 30]
    assert_holds(path, 15)


def test_damaged_one_is_replaced_by_a_save_of_its_step(tmp_path):
    path = save_checkpoint(tmp_path, 1, *small(1))
    flip_one(path / STATE)
    assert newest_checkpoint(tmp_path) is None
    assert save_checkpoint(tmp_path, 1, *small(1)) == newest_checkpoint(tmp_path) == path
    assert steps(tmp_path) == [1]


def test_steps_of_more_than_six_digits_are_newer(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, *small(step))
    assert newest_checkpoint(tmp_path).name == "step_1000000"


# What a user may name.

def test_resolve_takes_a_run_or_a_checkpoint(tmp_path):
    paths = [save_checkpoint(tmp_path, step, *small(step)) for step in (1, 2)]
    assert resolve(tmp_path) == resolve(str(tmp_path)) == paths[1]
    assert [resolve(path) for path in paths] == paths


def refusals(runs: Path) -> dict[str, str]:
    """A path that is no run -> what the message must hold."""
    save_checkpoint(runs / "python", 100, *small(1))
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    damaged = save_checkpoint(runs / "damaged", 1, *small(1))
    flip_one(damaged / WEIGHTS)
    return {"pyton": "did you mean 'python'?", "python/checkpoints/step_000010":
            "did you mean 'step_000100'?", "nothing/like/it": "is not a folder", "file":
            "is not a folder", "empty": "holds no checkpoint", "damaged": "no whole checkpoint"}


def test_resolve_says_what_would_work(tmp_path):
    for name, expected in refusals(tmp_path).items():
        with pytest.raises(ValueError) as caught:
            resolve(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message and expected in message and "\n" not in message


def test_run_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
