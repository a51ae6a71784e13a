"""Checkpoints: whole or absent after a kill, and flushed before they get their name."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_checkpoints import assert_holds, save_in_place, small, steps, torn

from minids.runs import checkpoints as checkpoint
from minids.runs.checkpoints import (
    MANIFEST,
    STATE,
    WEIGHTS,
    newest_checkpoint,
    resolve,
    save_checkpoint,
    verify,
)

ROOT = Path(__file__).resolve().parents[2]

SAVER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_killed_checkpoints
for line in sys.stdin:
    save_name, run, first = line.split()
    if (child := os.fork()) == 0:
        test_killed_checkpoints.save_for_ever(save_name, run, int(first))
    test_killed_checkpoints.say("child", child)
    os.waitpid(child, 0)
    test_killed_checkpoints.say("dead")
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
        self.process.wait(timeout=600)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def killer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        killer = Killer()
    yield killer
    killer.close()


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
