"""A thread gives its team of OpenMP threads up; after a fork there is none to wait for."""

from types import SimpleNamespace

import pytest

from minids.base import openmp


@pytest.mark.parametrize("forked, told", [(False, [1]), (True, [])])
def test_a_team_is_ended_softly_and_never_in_a_fork(forked, told, monkeypatch):
    """1 is omp_pause_soft: the next product makes a new team, and settings stay."""
    seen, here = [], SimpleNamespace(here=True) if forked else SimpleNamespace()
    monkeypatch.setattr(openmp, "FORKED", here)
    monkeypatch.setattr(openmp, "gnu_openmp", lambda: [
        SimpleNamespace(omp_pause_resource_all=seen.append)])
    openmp.end_team()
    assert seen == told
