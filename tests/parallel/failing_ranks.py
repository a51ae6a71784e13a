"""Checks that fail, for test_launching.py: what the others still say."""

import os

import torch
from launching import run_checks
from torch import distributed as dist

RANK = int(os.environ["RANK"])


def meet():
    dist.all_reduce(torch.ones(1))


def check_first():
    meet()


def check_that_fails_on_all_ranks():
    meet()
    raise AssertionError("on all")


def check_that_fails_on_one_rank_at_its_end():
    meet()
    assert RANK == 0, "on one"


def check_between():
    meet()


def check_that_one_rank_leaves_while_the_other_waits():
    if RANK == 1:
        os.environ["PATIENCE"] = "1"  # rank 0 waits until this rank has ended
        raise AssertionError("left")
    meet()


def check_last():
    meet()


if __name__ == "__main__":
    run_checks(globals())
