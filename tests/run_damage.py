"""Flip the bits of a run folder's files, one at a time, and read the run as the programs do.

    python tests/run_damage.py runs/nano        every bit of every file that something reads
    python tests/run_damage.py runs/nano 1000   a thousand drawn bits per file

A flip is accepted if all is read without a word, or with words that do not name the file. The run
is left as it was. A run of `minids.train` is expected, with a single checkpoint: another one would
take the place of a damaged one.
"""

import contextlib
import io
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minids.runs import checkpoints  # noqa: E402
from minids.runs.metrics import read_metrics  # noqa: E402
from minids.runs.open import open_source, stored_run  # noqa: E402
from minids.runs.settings import TrainArgs  # noqa: E402


def read_all(run: Path) -> None:
    """Read what `generate`, `evaluate`, `solve`, `hf`, --from and --resume read, in their way."""
    open_source(run)
    stored_run("train", TrainArgs, dict(out=str(run), resume=True))
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


def main() -> None:
    """The command line."""
    run, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    read_all(run)
    for file in read_files(run):
        bits = some_bits(file, count) if count else range(8 * file.stat().st_size)
        accepted = accepted_flips(run, file, bits, read_all)
        print(f"{file}: {len(bits)} flips, {len(accepted)} accepted {accepted[:5]}", flush=True)


if __name__ == "__main__":
    main()
