"""Mirror metrics.jsonl in TensorBoard or Weights & Biases (wandb), while a run learns.

metrics.jsonl stays the source: a resumed run rewrites its log from there, so no step is missing or
there twice. Both packages are optional and imported only when used, and a log that cannot be
written never stops a run.
"""

import contextlib
import importlib
import io
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from shlex import quote


def numbers(value, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record by name, nested ones as free/accuracy and max_vio/0.

    Leaves out text, and tables such as the load of every expert.
    """
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, list) and not any(isinstance(row, list) for row in value):
        yield from numbers(dict(enumerate(value)), name)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}/{key}" if name else str(key))


class TensorBoard:
    """RUN/tensorboard, with one event file."""

    package = "tensorboard.summary.writer.record_writer"

    def __init__(self, run: Path, config: dict, records: list[dict]):
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        for older in folder.glob("events.out.tfevents.*.minids"):
            older.unlink()
        self.file = folder / f"events.out.tfevents.{time.time_ns()}.minids"
        self.start = time.time() - (records[-1]["seconds"] if records else 0.0)
        self.add(file_version="brain.Event:2")
        # A TensorBoard that is open forgets the older file's steps.
        self.add(step=1, session_log=dict(status="START"))
        for record in records:
            self.write(record)
        print(f"log     tensorboard --logdir {quote(str(folder))}", flush=True)

    def add(self, seconds: float = 0.0, **fields) -> None:
        """Append an event; seconds: of training, which stand for the time of day."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        event, stream = Event(wall_time=self.start + seconds, **fields), io.BytesIO()
        RecordWriter(stream).write(event.SerializeToString())
        with open(self.file, "ab") as file:
            file.write(stream.getvalue())

    def write(self, record: dict) -> None:
        values = [dict(tag=name, simple_value=value) for name, value in numbers(record)]
        self.add(record["seconds"], step=record["step"], summary=dict(value=values))

    def close(self) -> None:
        """Do nothing: each step's event is on the disk already."""


class Wandb:
    """RUN/wandb, with one run of wandb, whose id is in id.txt.

    Offline unless WANDB_MODE says otherwise: nothing leaves the machine, and no account is asked
    for. Online, the server keeps the steps that it has.
    """

    package = "wandb"

    def __init__(self, run: Path, config: dict, records: list[dict]):
        import wandb
        folder, mode = run / "wandb", os.environ.get("WANDB_MODE", "offline")
        folder.mkdir(exist_ok=True)
        if not (folder / "id.txt").exists():
            (folder / "id.txt").write_text(uuid.uuid4().hex[:8], "utf-8")
        name = (folder / "id.txt").read_text("utf-8")
        for older in folder.glob(f"offline-run-*-{name}") if mode == "offline" else ():
            shutil.rmtree(older)
        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minids"), name=run.name, id=name,
            dir=str(run), config=config, mode=mode, resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, init_timeout=30, login_timeout=30,
                                    finish_timeout=60))
        for record in records:
            self.write(record)
        offline = f"wandb sync {quote(str(folder))}/offline-run-*-{name}"
        print(f"log     {self.session.url if mode == 'online' else offline}", flush=True)

    def write(self, record: dict) -> None:
        if record["step"] >= self.session.step:
            self.session.log(dict(numbers(record)), step=record["step"], commit=True)

    def close(self) -> None:
        self.session.finish()


LOGS = {"tensorboard": TensorBoard, "wandb": Wandb}


class Mirror:
    """The log that `--log` names, or none. Its first error is told in one line and ends the log.

    Raises `ModuleNotFoundError` if its package is not installed, `ValueError` if it is broken.
    """

    def __init__(self, log: str, run: Path):
        self.name, self.run, self.log = log, run, None
        try:
            if log:
                importlib.import_module(LOGS[log].package)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"log = {log!r} is not valid: its package does not load: {error}"
                             ) from None

    @contextlib.contextmanager
    def following(self, config: dict, records: list[dict]) -> Iterator[None]:
        """Open the log of a run that has these metrics so far; close it at the end."""
        if self.name:
            self.log = self.attempt(LOGS[self.name], self.run, config, records)
        try:
            yield
        finally:
            if self.log:
                self.attempt(self.log.close)

    def write(self, record: dict) -> None:
        """Add the metrics of a step."""
        if self.log:
            self.attempt(self.log.write, record)

    def attempt(self, act, *given):
        """Call `act`; if that fails, say so and give the log up."""
        try:
            return act(*given)
        except Exception as error:
            self.log = None
            print(f"log = {self.name!r} takes no more metrics "
                  f"({' '.join(str(error).split()) or type(error).__name__}); the run goes on, "
                  "and metrics.jsonl has them all", file=sys.stderr, flush=True)
