"""minids: the DeepSeek model family, small enough to read and exact enough to trust."""

import os
import sys

from minids.base.command_line import tell_import
from minids.config import ModelArgs

# OpenMP's threads spin while they wait for each other: where a thread has lost its core to another
# program, the others burn theirs. These let them sleep; LLVM and GNU read them when torch loads.
os.environ.setdefault("KMP_BLOCKTIME", "0")
if sys.argv[0] == "-m":  # `python -m minids.NAME` imports this before the program's own imports
    sys.excepthook = tell_import
else:  # a program spins on a quiet machine: `minids.runs.waiting`
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

__all__ = ["ModelArgs", "Transformer"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """Import torch only when the model is asked for, so that `--help` and the costs stay quick."""
    if name == "Transformer":
        from minids.model.transformer import Transformer
        return Transformer
    raise AttributeError(f"module 'minids' has no attribute {name!r}")
