"""Validation: bits per byte, the balance of the experts, and how much of a sample is Python.

Bits per byte is the cross-entropy of all tokens, in bits, over the number of bytes they stand for.
Unlike the loss per token it does not depend on the vocabulary, so models with different tokenizers
can be compared (V3's table of base models has it as Pile BPB, section 4.4).
"""

import ast
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.model.moe import max_violation


class Evaluation(NamedTuple):
    """The measurements of one pass over validation text.

    bits_per_byte: of all targets, special tokens included
    loads: (n MoE layers, E) int64, tokens sent to each expert, without the MTP modules
    """

    bits_per_byte: float
    loads: Tensor

    @property
    def max_vio(self) -> list[float]:
        """MaxVio of each MoE layer over all of the text: "global" in arXiv 2408.15664."""
        return max_violation(self.loads).tolist() if self.loads.numel() else []


def windows(tokens: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Return consecutive windows of a text, each with the next token: (n, S + 1).

    tokens: (M,) int64
    seq_len: S, tokens in a window
    max_tokens: take at most this many tokens, in windows spread evenly over the text; None: all
    Raises `ValueError` for a text shorter than a window.
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
    """Run the model over validation text without changing anything in it.

    tokens: (M,) int64, packed documents
    n_bytes: (vocab_size,) int64, bytes that each token stands for
    seq_len, batch_size: tokens in a window, windows at a time
    max_tokens: the same evenly spread part every time; None: all windows
    begin_id: the token that begins a document, if documents must not see each other
    Raises `ValueError` for a text shorter than a window.
    """
    device = model.head.weight.device
    nats, size, loads = 0.0, 0, []
    for batch in windows(tokens, seq_len, max_tokens).split(batch_size):
        inputs = batch[:, :-1].to(device)
        samples = None if begin_id is None else (inputs == begin_id).cumsum(1)
        hidden, routings, _ = model.hidden(inputs, samples=samples)
        logits, targets = model.head(hidden).float(), batch[:, 1:].to(device)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        size += int(n_bytes[batch[:, 1:]].sum())
        if routings:
            loads.append(torch.stack([r.load() for r in routings]).cpu())
    total = sum(loads) if loads else torch.zeros(0, 0, dtype=torch.int64)
    return Evaluation(nats / math.log(2) / size, total)


def parse_share(text: str) -> tuple[int, int]:
    """Return how much of a text is Python: (top-level blocks that parse, top-level blocks).

    A block starts at a line without indentation, unless the line continues the block before it
    (`else:`, a closing bracket, a decorated function). Comments between blocks are ignored, and so
    is the last block, which the end of the text may have cut.
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
    """Return whether Python's own parser accepts a text."""
    try:
        ast.parse(block)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
