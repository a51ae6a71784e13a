"""Programs that are killed, or find the disk full, at each of their file-system operations.

Drawn points are slow tests: twelve a program, and three of R1, which runs a whole pipeline for
each. MINIDS_POINTS=60 draws sixty and fifteen. All points are exhaustive tests; `crash_points` says
what a point is, and is a command too.
"""

import os
import random
import shutil

import pytest
from crash_points import COMMANDS, Server, Trial, trials
from crash_setup import differences

DRAWN = int(os.environ.get("MINIDS_POINTS", "12"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One process forks the runs of all tests: it imports torch once."""
    made = Server(tmp_path_factory.mktemp("said"))
    yield made
    made.close()


@pytest.fixture
def trial(request, tmp_path, server):
    return Trial(request.param, tmp_path, server)


def wrong(trial: Trial, points: list) -> dict:
    """The points after which something is wrong, and what."""
    found = {point: trial.problems(point) for point in points}
    return {point: problems for point, problems in found.items() if problems}


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["tokenizer"], indirect=True)
def test_every_other_point_of_a_program(trial):
    """The one that is quick; it tries the checks as well."""
    assert len(trial.points) > 15 and wrong(trial, trial.points[::2]) == {}


@pytest.mark.slow
def test_the_check_notices_files_that_stay(tmp_path, server, monkeypatch):
    """Wrong variant: a temporary file with a name that the next start does not know."""
    monkeypatch.setattr(server, "wrong", True)
    trial = Trial("tokenizer", tmp_path, server)
    assert any(map(trial.problems, trial.points))  # the first one is enough


@pytest.mark.slow
@pytest.mark.parametrize("trial", COMMANDS, indirect=True)
def test_drawn_points(trial):
    count = DRAWN // 4 if trial.name == "r1" else DRAWN
    drawn = random.Random(1).sample(trial.points, min(count, len(trial.points)))
    assert wrong(trial, drawn) == {}


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["train", "sft", "grpo", "r1"], indirect=True)
def test_two_starts_at_once(trial, tmp_path):
    """One runs, and the other says why not; R1 says nothing if all was done when it began."""
    folder = shutil.copytree(trial.start, tmp_path / "both", symlinks=True)
    ends = sorted(trial.server.twice(trial.words, folder))
    assert ends[0] == (0, "") and (trial.name == "r1" or ends[1][0] == 2), ends
    if ends[1][0]:
        assert ends[1][1].count("\n") == 1
        assert "another process works" in ends[1][1] or "holds a run already" in ends[1][1]
    assert differences(trial.whole, folder) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", COMMANDS)
def test_all_points(name, tmp_path, server):
    found = [wrong(trial, trial.points) for trial in trials(name, tmp_path, server)]
    assert found and not any(found)
