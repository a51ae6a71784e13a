"""`minids.train` over ranks, the last of which finds no memory in its third step."""

import torch

from minids import train
from minids.base.command_line import run_program
from minids.runs.over_ranks import TrainerOverRanks

enough = TrainerOverRanks.accumulate


def accumulate(learner):
    if learner.step == 3 and learner.team.rank == learner.team.world - 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has ..")
    return enough(learner)


if __name__ == "__main__":
    TrainerOverRanks.accumulate = accumulate
    run_program("minids.train", train.main, lasting=True)
