"""The smallest benchmark, which the tests of `minids.lab.bench` share."""

import argparse
from pathlib import Path

import pytest

from minids.lab.bench_setup import BenchArgs


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> BenchArgs:
    """The smallest benchmark."""
    text = tmp_path_factory.mktemp("text") / "text.py"
    text.write_text(Path(argparse.__file__).read_text())
    return BenchArgs(preset="nano", data=f"text:{text}", pairs=1, steps_per_timing=1, batch_size=2,
                     seq_len=32, decode_batch=3, prompt=8, new_tokens=4, dtype="fp32", threads=1,
                     seeds=1, steps=2)
