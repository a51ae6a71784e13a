"""Validation: bits per byte of held-out text, the balance of the experts, and how much of a sample
parses as Python."""

import ast
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.model.moe import max_violation


class Evaluation(NamedTuple):
    """What a pass over validation text shows.

    bits_per_byte: of all targets, those that are special tokens included
    loads: (n MoE layers, E) int64, tokens sent to each expert, MTP modules left out
    """

    bits_per_byte: float
    loads: Tensor

    @property
    def max_vio(self) -> list[float]:
        """MaxVio of each MoE layer over all of the text: "global" in arXiv 2408.15664."""
        return max_violation(self.loads).tolist() if self.loads.numel() else []


def windows(tokens: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Sequences and their targets, side by side in the text: (n, S + 1).

    tokens: (M,) int64; max_tokens: take only so many, in windows spread evenly over the text
    Raises `ValueError` for text shorter than a window.
    """
    count = (len(tokens) - 1) // seq_len
    if count < 1:
        raise ValueError(f"seq_len = {seq_len} is longer than the validation text, "
                         f"{len(tokens)} tokens: it must be at most {len(tokens) - 1}")
    chosen = min(count, max(max_tokens // seq_len, 1)) if max_tokens else count
    starts = torch.arange(chosen) * count // chosen * seq_len
    return tokens[starts[:, None] + torch.arange(seq_len + 1)]


@torch.no_grad()
def evaluate(model, tokens: Tensor, n_bytes: Tensor, seq_len: int, batch_size: int,
             max_tokens: int | None = None, begin_id: int | None = None) -> Evaluation:
    """Run the model over validation text; nothing in the model changes.

    tokens: (M,) int64, packed documents
    n_bytes: (vocab_size,) int64, bytes that each token stands for
    seq_len, batch_size: tokens in a window, windows at a time
    max_tokens: the same evenly spread part every time; None: all windows
    begin_id: the token that begins a document, where documents do not see each other
    """
    device = model.head.weight.device
    nats, size, loads = 0.0, 0, 0
    for batch in windows(tokens, seq_len, max_tokens).split(batch_size):
        inputs = batch[:, :-1].to(device)
        samples = None if begin_id is None else (inputs == begin_id).cumsum(1)
        hidden, routings = model.hidden(inputs, samples=samples)
        logits, targets = model.head(hidden).float(), batch[:, 1:].to(device)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        size += int(n_bytes[batch[:, 1:]].sum())
        if routings:
            loads = loads + torch.stack([r.load() for r in routings]).cpu()
    loads = loads if torch.is_tensor(loads) else torch.zeros(0, 0, dtype=torch.int64)
    return Evaluation(nats / math.log(2) / size, loads)


def parse_share(text: str) -> tuple[int, int]:
    """How much of a text is Python: (top-level blocks that parse, top-level blocks).

    A block starts at a line without indentation, unless that line only goes on with the one before
    (`else:`, a closing bracket, a decorated function). Comments between blocks count for nothing,
    nor does the last block, which the end of the text may have cut.
    """
    blocks: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        goes_on = blocks and (blocks[-1].rstrip().rsplit("\n", 1)[-1].startswith("@")
                              or line.startswith(("else:", "elif ", "except", "finally:", ")",
                                                  "]", "}")))
        if blocks and (goes_on or not line[:1].strip()):
            blocks[-1] += "\n" + line
        elif line.strip():
            blocks.append(line)
    return sum(map(parses, blocks[:-1])), len(blocks[:-1])


def parses(block: str) -> bool:
    """Whether Python's own parser accepts a text."""
    try:
        ast.parse(block)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
