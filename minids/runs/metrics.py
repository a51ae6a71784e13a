"""A run's metrics.jsonl: one object per step, in order, and how damage to it is found.

A checkpoint's manifest holds the length and the SHA-256 of the lines up to its step, and a CRC-32
of each, which says which line was damaged. Only a last line without an end may be dropped: a crash
cut it short. Checkpoints of an earlier version say nothing about metrics; there only the form of
the lines is checked.
"""

import hashlib
import json
import zlib
from pathlib import Path
from shlex import quote

from minids.base.files import flush, naming, read_jsonl
from minids.runs.checkpoints import recorded

METRICS = "metrics.jsonl"


def line_of(record: dict) -> bytes:
    """Return the line of one step."""
    return json.dumps(record).encode() + b"\n"


def summary(records: list[dict]) -> dict:
    """Return what a manifest holds about the lines of these records."""
    lines = [line_of(record) for record in records]
    data = b"".join(lines)
    return dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(),
                crc32=" ".join(map(checksum, lines)))


def checksum(text: bytes) -> str:
    """Return the CRC-32 of a line, in hexadecimal."""
    return f"{zlib.crc32(text):08x}"


def append(run: Path, record: dict) -> None:
    """Add a line to a run's metrics."""
    with naming(run / METRICS), open(run / METRICS, "ab") as file:
        file.write(line_of(record))


def settle(run: Path) -> None:
    """Wait until the metrics are on the disk, before a checkpoint that counts on them."""
    if (run / METRICS).exists():
        flush(run / METRICS)


def read_metrics(run: Path, checkpoint: Path | None = None) -> list[dict]:
    """Return the lines of a run's metrics.jsonl, without a last one that a crash cut short.

    checkpoint: whose manifest they are compared with; None: the newest one's
    Raises `ValueError` naming file and line for any other damage.
    """
    path, records = Path(run) / METRICS, []
    data = path.read_bytes() if path.exists() else b""
    lines = data.splitlines(keepends=True)
    known = recorded(run, "metrics", checkpoint) or dict(bytes=0, sha256=None, crc32="")
    for number, crc in enumerate(known["crc32"].split(), start=1):
        if number > len(lines) or checksum(lines[number - 1]) != crc:
            raise damaged(run, path, number,
                          "is missing" if number > len(lines) else "was changed")
    if known["sha256"] not in (None, hashlib.sha256(data[:known["bytes"]]).hexdigest()):
        raise damaged(run, path, 1, "or a later one was changed")
    try:
        for number, record in read_jsonl(path) if data else ():
            if type(record) is not dict or type(record.get("step")) is not int:
                raise damaged(run, path, number, "has no step")
            if record["step"] != number:
                raise damaged(run, path, number, f"is of step {record['step']}")
            records.append(record)
    except ValueError:
        if len(records) < data.count(b"\n"):
            raise
    return records


def damaged(run: Path, path: Path, number: int, what: str) -> ValueError:
    """Return the error that names a damaged line and says what can be done."""
    return ValueError(f"{path} line {number} {what}: the file is not as the run wrote it; put it "
                      f"back, or begin a new run with the weights, --from {quote(str(run))}")
