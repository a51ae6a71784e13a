"""Logs beside metrics.jsonl: what they hold after a stop and a resume, and when they fail.

The packages are optional, so fakes stand for them; TensorBoard's own reader is used if it is here.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import training_runs
from kill_and_resume import differences
from training_runs import STEPS, cut_back, read_records, run_train

from minids import grpo, r1, sft
from minids.base.command_line import run_program
from minids.runs import loggers
from minids.runs.loggers import Mirror, numbers

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken
TENSORBOARD = ["tensorboard", "tensorboard.compat", "tensorboard.compat.proto",
               "tensorboard.summary", "tensorboard.summary.writer"]
PATTERN = "events.out.tfevents.*.minids"


def records(steps: range, scale: float = 1.0) -> list[dict]:
    """Lines of metrics.jsonl."""
    return [dict(step=n, loss=scale / n, seconds=float(n), max_vio=[0.5, 0.25], loads=[[1, 2]],
                 free=dict(accuracy=n / 8), skipped=True) for n in steps]


class Event:
    """A fake of TensorBoard's; its bytes are JSON."""

    def __init__(self, **fields):
        self.fields = fields

    def SerializeToString(self) -> bytes:
        return json.dumps(self.fields).encode()


class RecordWriter:
    """A fake of TensorBoard's: a line per record."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, data: bytes) -> None:
        self.stream.write(data + b"\n")


class FakeWandb(ModuleType):
    """A wandb that keeps an offline run in its folder, and an online one as its server does: no
    step is taken twice, and the session of a resumed run begins after the last one."""

    def __init__(self):
        super().__init__("wandb")
        self.Settings, self.given, self.server, self.finished = dict, [], {}, 0

    def init(self, **given):
        self.given.append(given)
        if given["mode"] == "online":
            held = self.server.setdefault(given["id"], {})
        else:
            held = {}
            folder = Path(given["dir"]) / f"wandb/offline-run-{len(self.given)}-{given['id']}"
            folder.mkdir()
        session = SimpleNamespace(step=max(held, default=-1) + 1, url=None, finish=self.finish)

        def log(values: dict, step: int, commit: bool) -> None:
            assert commit and step >= session.step, "a step that it has"
            held[step], session.step = values, step + 1
            if given["mode"] == "offline":
                (folder / "log.json").write_text(json.dumps(list(held.items())))

        session.log = log
        return session

    def finish(self) -> None:
        self.finished += 1

    def read(self, run: Path) -> dict[int, dict]:
        """Return the steps that `wandb sync` and the server have together."""
        files = (run / "wandb").glob("offline-run-*/log.json")
        found = [step for file in files for step in json.loads(file.read_text())]
        found += [step for held in self.server.values() for step in held.items()]
        assert len(found) == len(dict(found)), "a step stands there twice"
        return dict(found)


def read_fake(run: Path) -> dict[int, dict]:
    [file] = (run / "tensorboard").glob(PATTERN)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["file_version"] and lines[1]["session_log"] == {"status": "START"}
    found = [(line["step"], {v["tag"]: v["simple_value"] for v in line["summary"]["value"]})
             for line in lines[2:]]
    assert len(found) == len(dict(found)), "a step stands there twice"
    return dict(found)


def read_real(run: Path) -> dict[int, dict]:
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    found: dict[int, dict] = {}
    for tag in events.Tags()["scalars"]:
        for scalar in events.Scalars(tag):
            assert tag not in found.setdefault(scalar.step, {}), "a step stands there twice"
            found[scalar.step][tag] = scalar.value
    return found


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", made := FakeWandb())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return made


@pytest.fixture
def tensorboard(monkeypatch):
    forget(monkeypatch, "tensorboard")
    for name in TENSORBOARD:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, content in (("compat.proto.event_pb2", Event), ("summary.writer.record_writer",
                                                              RecordWriter)):
        made = ModuleType(name)
        setattr(made, content.__name__, content)
        monkeypatch.setitem(sys.modules, f"tensorboard.{name}", made)


def forget(patch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package one that is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        patch.delitem(sys.modules, name)
    patch.setitem(sys.modules, package, None)


@pytest.fixture(params=["tensorboard", "wandb", "wandb online", "tensorboard itself"])
def log(request, monkeypatch):
    """The name of a log, and a function that returns what it holds of a run, step by step."""
    if request.param == "tensorboard itself":
        pytest.importorskip("tensorboard", reason="the log itself: pip install tensorboard")
        return "tensorboard", read_real
    name, _, mode = request.param.partition(" ")
    made = request.getfixturevalue(name)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    return name, made.read if made else read_fake


def follow(log: str, run: Path, before: list[dict], more: list[dict], end: bool = True) -> None:
    """A run that has the lines `before`, and adds `more`; without an end it is killed."""
    with (mirror := Mirror(log, run)).following({}, before):
        for record in more:
            mirror.write(record)
        if not end:
            mirror.log = None


def test_numbers_have_their_names():
    assert dict(numbers(records(range(2, 3))[0])) == {
        "step": 2, "loss": 0.5, "seconds": 2, "max_vio/0": 0.5, "max_vio/1": 0.25,
        "free/accuracy": 0.25, "skipped": 1}
    assert dict(numbers(dict(a="text", b=[], c=None, d={}, e=[dict(f=1)]))) == {"e/0/f": 1}


def test_a_resumed_run_goes_on_in_the_same_log(log, tmp_path):
    """Killed at step 5 after a checkpoint at 3, then at step 4, then stopped at 6 and resumed."""
    name, read = log
    follow(name, tmp_path, [], records(range(1, 6)), end=False)
    follow(name, tmp_path, records(range(1, 4)), records(range(4, 5)), end=False)
    follow(name, tmp_path, records(range(1, 4)), records(range(4, 7)))
    follow(name, tmp_path, records(range(1, 7)), records(range(7, 9)))
    expected = {record["step"]: dict(numbers(record)) for record in records(range(1, 9))}
    found = read(tmp_path)
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step]) for step in expected)


def test_a_log_that_is_begun_late_has_the_steps_before(log, tmp_path):
    name, read = log
    follow(name, tmp_path, records(range(1, 5)), records(range(5, 6)))
    assert list(read(tmp_path)) == [1, 2, 3, 4, 5]


def test_tensorboard_takes_the_steps_of_the_resumed_run(tensorboard, tmp_path):
    """It may have another learning rate; what the killed one wrote is gone."""
    follow("tensorboard", tmp_path, [], records(range(1, 6)))
    follow("tensorboard", tmp_path, records(range(1, 4)), records(range(4, 7), scale=3.0))
    assert [values["loss"] for values in read_fake(tmp_path).values()] == [
        1, 1 / 2, 1 / 3, 3 / 4, 3 / 5, 3 / 6]


def test_tensorboards_clock_is_the_runs_own(tensorboard, tmp_path):
    """A resumed run's steps of before lie as far back as they took, the next ones follow on."""
    begin = time.time()
    follow("tensorboard", tmp_path, records(range(1, 6)), records(range(6, 8)))
    [file] = (tmp_path / "tensorboard").glob(PATTERN)
    times = [json.loads(line)["wall_time"] for line in file.read_text().splitlines()[2:]]
    assert [end - times[0] for end in times] == pytest.approx([0, 1, 2, 3, 4, 5, 6], abs=1e-3)
    assert begin <= times[4] <= time.time()  # step 5 was the last before the resumption


def test_wandb_is_offline_and_quiet_unless_it_is_told(wandb, tmp_path, monkeypatch, capsys):
    follow("wandb", tmp_path, [], [])
    assert capsys.readouterr().out == (
        f"log     wandb sync {tmp_path / 'wandb'}/offline-run-*-{wandb.given[0]['id']}\n")
    monkeypatch.setenv("WANDB_MODE", "online")
    follow("wandb", tmp_path, [], [])
    first, second = wandb.given
    assert (first["mode"], first["resume"]) == ("offline", None)
    assert (second["mode"], second["resume"]) == ("online", "allow")
    assert first["id"] == second["id"] and first["dir"] == str(tmp_path) and wandb.finished == 2
    assert first["settings"] == dict(  # nothing waits for ever
        console="off", silent=True, init_timeout=30, login_timeout=30, finish_timeout=60)


PROGRAMS = {"train": (training_runs.train, []),
            "sft": (sft, ["--from", "data/r1/base"]),
            "grpo": (grpo, ["--from", "data/r1/sft"]),
            "r1": (r1, [])}


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_missing_package_is_one_line_and_nothing_is_trained(program, package, tmp_path,
                                                              monkeypatch, capsys):
    forget(monkeypatch, package)
    module, given = PROGRAMS[program]
    monkeypatch.setattr(sys, "argv", [program, *given, "--log", package, "--out",
                                      str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        run_program(f"minids.{program}", module.main)
    said = f"python -m minids.{program}: {package} is not installed: pip install {package}\n"
    assert (end.value.code, capsys.readouterr().err) == (2, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ImportError("needs 1.15"), AttributeError("no distutils"),
                                   TypeError("Descriptors cannot be created")])
def test_a_package_that_does_not_load_is_one_line(error, tmp_path, monkeypatch):
    def broken(name):
        raise error

    monkeypatch.setattr(loggers.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=f"log = 'wandb' is not valid: .*{error}"):
        Mirror("wandb", tmp_path)


def test_a_logged_run_has_the_bytes_of_one_without(tensorboard, flags, unbroken, tmp_path):
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--log", "tensorboard")
    assert (said.status, said.err) == (0, "") and "tensorboard --logdir " in said.out
    assert differences(unbroken, tmp_path / "run") == []
    assert list(read_fake(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_a_run_may_be_logged_from_its_resumption_on(tensorboard, unbroken, tmp_path):
    run = cut_back(unbroken, tmp_path / "run", 9)
    assert run_train("--resume", "--out", str(run), "--log", "tensorboard").status == 0
    assert differences(unbroken, run) == []
    assert read_fake(run) == {line["step"]: dict(numbers(line)) for line in read_records(run)}


def fail_to_open(patch: pytest.MonkeyPatch, run: Path) -> None:
    run.mkdir()
    (run / "tensorboard").write_text("a file")


def fail_at_a_step(patch: pytest.MonkeyPatch, run: Path) -> None:
    write = loggers.TensorBoard.write

    def full_disk(log, record: dict) -> None:
        if record["step"] >= 5:
            raise OSError(28, "No space left on device", str(log.file))
        write(log, record)

    patch.setattr(loggers.TensorBoard, "write", full_disk)


def fail_at_the_end(patch: pytest.MonkeyPatch, run: Path) -> None:
    def close(log) -> None:
        raise TimeoutError

    patch.setattr(loggers.TensorBoard, "close", close)


@pytest.mark.parametrize("fail", [fail_to_open, fail_at_a_step, fail_at_the_end])
def test_a_log_that_fails_is_one_line_and_the_run_goes_on(fail, tensorboard, flags, unbroken,
                                                          tmp_path, monkeypatch):
    fail(monkeypatch, run := tmp_path / "run")
    said = run_train(*flags, "--out", str(run), "--log", "tensorboard")
    assert said.status == 0 and said.err.count("\n") == 1
    assert said.err.startswith("log = 'tensorboard' takes no more metrics (")
    assert differences(unbroken, run) == []
