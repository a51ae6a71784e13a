"""`minids.train` over ranks that take two seconds to tell why they end.

Whoever has started them ends all of them sooner, once one has ended.
"""

import os
import shlex
import time

from minids import train
from minids.base import command_line

told, join = command_line.told, shlex.join


def told_slowly(error: Exception) -> str:
    time.sleep(2)
    return told(error)


def joined_slowly(words: list[str]) -> str:
    """Of the command that goes on after a signal."""
    time.sleep(2 if os.environ["RANK"] == "0" and "--resume" in words else 0)
    return join(words)


if __name__ == "__main__":
    command_line.told, shlex.join = told_slowly, joined_slowly
    command_line.run_program("minids.train", train.main, lasting=True)
