"""Open a model for a program that uses it: in one process, or over the ranks of torchrun."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial

from minids.base.fields import require
from minids.parallel.layout import Spread
from minids.parallel.team import Team, speaking_first, started, world_size
from minids.runs.device import Machine
from minids.runs.open import Source, open_model


@contextlib.contextmanager
def opened(path: str, machine: Machine, spread: Spread) -> Iterator[tuple[Source, Team | None]]:
    """Open the model that `path` names; yield it, and the team of a run over several processes.

    Within the block all ranks do the same, with a part of the model each, and rank 0 speaks.
    """
    with speaking_first():
        layout, device = spread.layout(world_size()), machine.prepare()
        require(machine, "device", world_size() == 1 or device.type != "mps",
                "cpu or cuda over several ranks")
    with started(layout, device.type) as team:
        if team is None:
            yield open_model(path, device, keep_fp8=spread.keep_fp8), None
            return
        with quiet(team), team.alike("start the program again"):
            from minids.parallel.serving import part_of  # waits a second for torch's own imports
            with team.together():
                run = open_model(path, team.device, keep_fp8=True,
                                 cut=partial(part_of, ranks=team.ranks))
            yield run, team


@contextlib.contextmanager
def quiet(team: Team) -> Iterator[None]:
    """Keep remarks and progress of all ranks but the first to themselves; not errors that end one.
    """
    if team.first:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
