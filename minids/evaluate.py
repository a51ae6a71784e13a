"""How good a model is: bits per byte of text it has not seen, and how its experts share the work.

    python -m minids.evaluate --run runs/tiny
    python -m minids.evaluate --run runs/tiny --data text:other_text
    python -m minids.evaluate --run DeepSeek-V2-Lite --data text:other_text   # a released model

Bits per byte is the cross-entropy of all tokens, in bits, over the number of bytes they stand for.
Unlike the loss per token it does not depend on the vocabulary, so that models with different
tokenizers can be compared (V3's table of base models has it as Pile BPB, section 4.4).
"""

import ast
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.checkpoint import pick_device
from minids.config import check_types, option, parse, require, run_program
from minids.data import open_data
from minids.hf import open_model
from minids.moe import max_violation


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
             max_tokens: int | None = None) -> Evaluation:
    """Run the model over validation text; nothing in the model changes.

    tokens: (M,) int64, packed documents
    n_bytes: (vocab_size,) int64, bytes that each token stands for
    seq_len, batch_size: tokens in a window, windows at a time
    max_tokens: the same evenly spread part every time; None: all windows
    """
    device = model.head.weight.device
    nats, size, loads = 0.0, 0, 0
    for batch in windows(tokens, seq_len, max_tokens).split(batch_size):
        hidden, routings = model.hidden(batch[:, :-1].to(device))
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


@dataclass(frozen=True)
class EvaluateArgs:
    """Which run to evaluate, and on what."""

    run: str = option("runs/tiny", "run folder, one of its checkpoints, or a Hugging Face folder")
    data: str = option("", "text, as for minids.train; none is the run's own, or else pystdlib")
    seq_len: int = option(0, "tokens in a window; 0: as in training, or else 1024 at most")
    batch_size: int = option(16, "windows at a time")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice, one a core")

    def __post_init__(self):
        check_types(self)
        require(self, "batch_size", self.batch_size >= 1, "at least 1")
        for name in ("seq_len", "threads"):
            require(self, name, getattr(self, name) >= 0, "0 or more")


def main() -> None:
    """The command line."""
    [given] = parse("minids.evaluate", __doc__, EvaluateArgs)
    args = EvaluateArgs(**given)
    if args.threads:
        torch.set_num_threads(args.threads)
    run = open_model(args.run, pick_device(args.device))
    # A Hugging Face folder does not say what its model was trained on.
    train = run.config.get("train") or {"data": "pystdlib",
                                        "seq_len": min(run.model.args.max_seq_len, 1024)}
    seq_len = args.seq_len or train["seq_len"]
    data = open_data(args.data or train["data"], run.tokenizer, seq_len)
    result = evaluate(run.model, data.valid, run.tokenizer.n_bytes, seq_len, args.batch_size)
    print(f"{run.checkpoint} on {data.name}, {len(data.valid):,} validation tokens")
    print(f"bits per byte    {result.bits_per_byte:.4f}")
    if result.max_vio:
        print("MaxVio by layer  " + " ".join(f"{v:.2f}" for v in result.max_vio))


if __name__ == "__main__":
    run_program("minids.evaluate", main)
