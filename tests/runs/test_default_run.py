"""The default run, whole: what README promises of it. Nine minutes on two cores."""

import re
import subprocess
import sys

import pytest

from minids.runs.metrics import read_metrics

MOST = 1.475  # bits per byte of held-out text; all runs so far ended below 1.468


def check(run, said: str) -> None:
    """Require a model as good and as balanced as promised."""
    last = [record for record in read_metrics(run) if "valid_bpb" in record][-1]
    assert last["step"] == 800 and last["valid_bpb"] <= MOST
    balance = re.search(r"^balance .*: ([\d. ]+)$", said, re.M)[1].split()
    assert len(balance) == 3 and max(map(float, balance)) < 0.5


@pytest.mark.exhaustive
def test_the_default_run_learns_what_readme_says(tmp_path):
    run = tmp_path / "tiny"
    ended = subprocess.run([sys.executable, "-m", "minids.train", "--out", str(run)],
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    check(run, ended.stdout)
