"""Checkpoints written while training goes on: whole, in order, and an error ends the run."""

import json
import threading
from pathlib import Path

import pytest
import torch
import training_runs
from kill_and_resume import differences
from training_runs import make_trainer, read_records, run_train

from minids import train
from minids.base import files
from minids.runs import checkpoints, sharded
from minids.runs.writer import Writer, on_host

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken


@pytest.fixture
def beside(monkeypatch) -> None:
    """Let a run on a CPU write its checkpoints as one on a GPU does."""
    class Beside(train.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.saves_beside = True

    monkeypatch.setattr(train, "Trainer", Beside)


def test_one_write_at_a_time_and_the_end_waits():
    writer, began, may_end, order = Writer(), threading.Event(), threading.Event(), []

    def slow():
        began.set()
        assert may_end.wait(60)
        order.append("slow")

    with writer:
        assert writer.run(slow, beside=True) is None and began.wait(60)
        order.append("training")
        writer.check()  # nothing is wrong so far
        threading.Timer(0.05, may_end.set).start()
        assert writer.run(lambda: order.append("next"), beside=True) is None
    assert order == ["training", "slow", "next"]
    assert writer.run(lambda: Path("x"), beside=False) == Path("x")


@pytest.mark.parametrize("error", [OSError("No space left on device"), SystemExit(2)])
def test_an_error_of_the_thread_is_raised_once_where_training_asks(error):
    def fail():
        raise error

    writer = Writer()
    writer.run(fail, beside=True)
    writer.join()
    with pytest.raises(type(error)) as caught:
        writer.check()
    assert caught.value is error
    writer.check()
    with pytest.raises(type(error)), writer:
        writer.run(fail, beside=True)
    with pytest.raises(KeyError), writer:  # what ends training is told, not what follows from it
        writer.run(fail, beside=True)
        raise KeyError


def test_copies_share_nothing_with_training():
    value = {"a": [torch.ones(3), (torch.zeros(2), 5)], "b": "text"}
    copy = on_host(value)
    for tensor in (value["a"][0], value["a"][1][0]):
        tensor.fill_(7)
    assert copy["a"][0].tolist() == [1] * 3 and copy["a"][1][0].tolist() == [0] * 2
    assert (copy["a"][1][1], copy["b"]) == (5, "text")


def test_a_run_that_writes_beside_training_has_the_same_bytes(home, flags, unbroken, tmp_path,
                                                              beside):
    """Also in a checkpoint whose writing ended some steps later, while weights moved."""
    run = tmp_path / "run"
    said = run_train(*flags, "--out", str(run))
    assert (said.status, said.err) == (0, "")
    assert differences(unbroken, run) == []


def test_training_goes_on_while_a_checkpoint_is_written(home, tmp_path, monkeypatch):
    """The step after the first save is taken before that is on the disk; the copy is of then."""
    stepped, publish = threading.Event(), files.publish
    trainer = make_trainer(home, tmp_path / "run", steps=6, eval_every=0)
    trainer.saves_beside = True
    before = trainer.write_record

    def record(entry):
        before(entry)
        if entry["step"] == 4:
            stepped.set()

    def wait_for_a_step(temp, final):
        assert stepped.wait(60)  # where nothing goes on, this fails
        publish(temp, final)

    monkeypatch.setattr(trainer, "write_record", record)
    monkeypatch.setattr(checkpoints, "publish", wait_for_a_step)
    trainer.run.mkdir()
    trainer.begin(None)
    trainer.train()
    steps = [checkpoints.verify(path)["step"] for path in checkpoints.all_checkpoints(trainer.run)]
    assert steps == [6, 3]


def test_a_full_disk_ends_the_run_with_one_line(home, flags, tmp_path, monkeypatch, beside):
    """The write that fails is the second one; the first is intact, and the run goes on from it."""
    run, write, count = tmp_path / "run", checkpoints.write_manifest, [0]

    def fail(*args):
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoints, "write_manifest", fail)
    said = run_train(*flags, "--out", str(run))
    training_runs.assert_refused(said, "step_000006 could not be written: No space left on device",
                                 "step_000003, the one before it, is intact")
    assert len(read_records(run)) in range(6, 10)  # it is noticed at a step, or at the next save
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000003"]
    assert run_train("--resume", "--out", str(run)).status == 0


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(home, flags, tmp_path,
                                                                    monkeypatch, beside):
    """What such a kill leaves: a folder under a temporary name, which the next run removes."""
    run = tmp_path / "run"

    def killed(temp, final):
        raise SystemExit(9)

    assert run_train(*flags, "--out", str(run), "--steps", "5").status == 0
    newest = checkpoints.resolve(run)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "publish", killed)
        patch.setattr(checkpoints.shutil, "rmtree", lambda *a, **k: None)
        run_train("--resume", "--out", str(run), "--steps", "9")
    assert [path.name for path in (run / "checkpoints").glob(".tmp_*")] != []
    assert checkpoints.resolve(run) == newest
    assert run_train("--resume", "--out", str(run), "--steps", "9").status == 0
    assert list((run / "checkpoints").glob(".tmp_*")) == []


def test_parts_are_copied_before_training_goes_on(tmp_path):
    """What many ranks write beside training is of the step that was saved."""
    weight = torch.arange(6.0).view(2, 3)
    mesh = type("Mesh", (), dict(get_local_rank=staticmethod(lambda name: 0)))
    team = type("Team", (), dict(rank=0, world=1, ranks=type("Ranks", (), dict(dense=mesh))))
    held = sharded.held_parts(team, {"model": {"w": weight}})
    weight.fill_(9)
    assert held["model-00001-of-00001.safetensors"]["w"].tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert json.dumps(held["model-00001-of-00001.safetensors"]["w"].offsets) == "[0, 0]"
