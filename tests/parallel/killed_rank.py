"""`minids.train` over ranks, the last of which is killed in its fourth step, at its first start."""

import os
import signal

from minids import train
from minids.base.command_line import run_program
from minids.runs.over_ranks import TrainerOverRanks

whole_step = TrainerOverRanks.accumulate


def accumulate(learner):
    """Step 2 is saved by then: the save of step 3 has waited for it."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if learner.step == 4 and learner.team.rank == learner.team.world - 1 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_step(learner)


if __name__ == "__main__":
    TrainerOverRanks.accumulate = accumulate
    run_program("minids.train", train.main, lasting=True)
