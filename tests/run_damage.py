"""Flip the bits of a run folder's files, one at a time, and read the run as the programs do.

    python tests/run_damage.py runs/nano        all bits that something reads; see below
    python tests/run_damage.py runs/nano 1000   a thousand drawn bits per file

A flip is accepted if all is read without a word, or with words that do not name the file. Copies
are damaged, by a process per core. A run of train, sft or grpo is expected, with a single
checkpoint: another one would take the place of a damaged one.

Of a file above 64 KiB one bit is drawn in each 4 KiB. The others need no trial: each reader
compares the SHA-256 of the whole file with the manifest's, whose every bit is tried.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minids.base.files import digest  # noqa: E402
from minids.grpo import GrpoArgs  # noqa: E402
from minids.runs import checkpoints  # noqa: E402
from minids.runs.metrics import read_metrics  # noqa: E402
from minids.runs.open import open_source, stored_run  # noqa: E402
from minids.runs.settings import TrainArgs  # noqa: E402
from minids.sft import SftArgs  # noqa: E402

LARGE, STRETCH = 2 ** 16, 2 ** 12
SETTINGS = {"train": TrainArgs, "sft": SftArgs, "grpo": GrpoArgs}


def read_all(run: Path, program: str = "train") -> None:
    """Read what `generate`, `evaluate`, `solve`, `hf`, --from and --resume read, in their way."""
    open_source(run)
    stored_run(program, SETTINGS[program], dict(out=str(run), resume=True))
    read_metrics(run)
    checkpoints.load_weights(checkpoints.resolve(run))
    checkpoints.load_state(checkpoints.resolve(run))


def read_files(run: Path) -> list[Path]:
    """Return the files of a run that something reads."""
    return [file for file in sorted(run.rglob("*"))
            if file.is_file() and file.name not in ("loss.png", "sample.txt")]


def accepted_flips(run: Path, file: Path, bits, check) -> list[int]:
    """Flip each bit in turn; return those after which `check` passes, or does not name the file."""
    whole, accepted = file.read_bytes(), []
    for bit in bits:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                check(run)
            accepted.append(bit)
        except ValueError as error:
            if file.name not in f"{error}{said.getvalue()}" or "\n" in str(error):
                accepted.append(bit)
    file.write_bytes(whole)
    return accepted


def some_bits(file: Path, count: int = 60) -> list[int]:
    """Return bits of a file, at both ends and between."""
    size = 8 * file.stat().st_size
    return sorted({0, size - 1, *random.Random(size).sample(range(size), min(count, size))})


def all_bits(file: Path) -> range | list[int]:
    """Return every bit of a small file, and of a large one a bit in each stretch of 4 KiB."""
    size, dice = file.stat().st_size, random.Random(0)
    if size <= LARGE:
        return range(8 * size)
    kept = json.loads((file.parent / checkpoints.MANIFEST).read_text("utf-8"))["files"][file.name]
    assert kept == dict(bytes=size, sha256=digest(file))
    return [dice.randrange(8 * at, 8 * min(at + STRETCH, size)) for at in range(0, size, STRETCH)]


def try_share(run: Path, name: Path, bits: list[int], program: str) -> list[int]:
    """Return the accepted ones of these bits of a file, tried on a copy of the run."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(run, Path(scratch) / run.name)
        return accepted_flips(copy, copy / name, bits, lambda at: read_all(at, program))


def main() -> None:
    """The command line."""
    run, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    stored = json.loads((run / "config.json").read_text("utf-8"))
    [program] = SETTINGS.keys() & stored.keys()
    read_all(run, program)
    workers, bad, start = os.cpu_count() or 1, 0, time.perf_counter()
    with ProcessPoolExecutor(workers) as pool:
        for file in read_files(run):
            bits = some_bits(file, count) if count else all_bits(file)
            shares = [pool.submit(try_share, run, file.relative_to(run), bits[i::workers], program)
                      for i in range(workers)]
            accepted = sorted(bit for share in shares for bit in share.result())
            bad += len(accepted)
            print(f"{file}: {len(bits)} flips, {len(accepted)} accepted {accepted[:5]}, "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
