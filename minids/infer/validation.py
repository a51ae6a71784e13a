"""Measurements on held-out text: bits per byte, experts' balance, drafts; Python in a sample.

Bits per byte is the cross-entropy of all tokens, in bits, over the number of bytes they stand for.
Unlike the loss per token it does not depend on the vocabulary, so models with different tokenizers
can be compared (V3's table of base models has it as Pile BPB, section 4.4).

A draft of an MTP module (V3 section 5.4.3) is compared with the model's own prediction from the
same true text, so a module cannot profit from the repetitions of a model's own output.
"""

import ast
import contextlib
import io
import keyword
import math
import tokenize
from itertools import accumulate, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.model.moe import max_violation

KINDS = {tokenize.COMMENT: "comments", tokenize.STRING: "strings", tokenize.NUMBER: "numbers",
         tokenize.OP: "punctuation"}


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
    """Return consecutive windows of a text, (M,) int64, each with the next token: (n, S + 1).

    seq_len: S, tokens in a window; `ValueError` for a text shorter than one
    max_tokens: take at most this many tokens, in windows spread evenly over the text; None: all
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
    """Run the model over validation text.

    tokens: (M,) int64, packed documents; seq_len, max_tokens: as for `windows`
    n_bytes: (vocab_size,) int64, bytes that each token stands for; batch_size: windows at a time
    begin_id: the token that begins a document, if documents must not see each other
    """
    device, nats, size, loads = model.head.weight.device, 0.0, 0, []
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

    A block starts at a line without indentation, unless that continues the block before (`else:`, a
    closing bracket, a decorated function). Ignored are comments between blocks, and the last block,
    which the end of the text may have cut.
    """
    blocks = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        goes_on = not line[:1].strip() or line.startswith(
            ("else:", "elif ", "except", "finally:", ")", "]", "}"))
        if blocks and (goes_on or blocks[-1].rstrip().rsplit("\n", 1)[-1].startswith("@")):
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


class Agreement(NamedTuple):
    """The number of drafts of one kind of text, and the shares accepted at temperature 0 and 1."""

    tokens: int
    greedy: float
    sampled: float


def kinds_of_python(text: str) -> list[str]:
    """Return the kind of word that each character belongs to, by Python's own tokenizer."""
    kinds = ["white space" if c.isspace() else "other" for c in text]
    starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for word in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = KINDS.get(word.type)
            if word.type == tokenize.NAME:
                kind = "keywords" if keyword.iskeyword(word.string) else "names"
            if kind:
                first, last = (starts[line - 1] + column for line, column in (word.start, word.end))
                kinds[first:last] = [kind] * (last - first)
    return kinds


def kinds_of_tokens(tokens: Tensor, tokenizer) -> list[str]:
    """Return the kind of each token of packed documents: that of its first non-space character."""
    special, kinds = set(tokenizer.special.values()), []
    ends = ((tokens == tokenizer.eos_id).nonzero().flatten() + 1).tolist()
    for document in tokens.tensor_split(ends):
        raw = [b"" if i in special else tokenizer.decode_bytes([i]) for i in document.tolist()]
        text = b"".join(raw).decode("utf-8", "replace")
        of_bytes = (kind for kind, c in zip(kinds_of_python(text), text, strict=True)
                    for _ in c.encode())
        for piece in raw:
            own = list(islice(of_bytes, len(piece)))
            kinds.append(next((k for k in own if k != "white space"),
                              "white space" if own else "ends of documents"))
    return kinds


@torch.no_grad()
def draft_agreement(model, tokens: Tensor, kinds: list[str], seq_len: int, batch_size: int,
                    max_tokens: int | None = None) -> list[dict[str, Agreement]]:
    """Return how well each MTP module predicts the model's own next token on given text.

    kinds: the kind of each token; the other arguments are those of `evaluate`
    Returns for each depth the agreement by kind of the drafted token, and of "all".
    """
    names = sorted(set(kinds))
    codes = windows(torch.tensor([names.index(kind) for kind in kinds]), seq_len, max_tokens)
    device = model.head.weight.device
    sums = torch.zeros(len(model.mtp), len(names), 3, dtype=torch.float64)
    for batch, kind in zip(windows(tokens, seq_len, max_tokens).split(batch_size),
                           codes.split(batch_size), strict=True):
        batch = batch[:, :-1].to(device)
        states = model.hidden(batch)[0]
        own = model.head(states).float().softmax(-1)  # (B, S, V)
        for k, module in enumerate(model.mtp, start=1):
            context = model.context(batch[:, k:])
            states, *_ = module(states[:, :-1], model.embed(batch[:, k:]), context)
            draft = model.head(states).float().softmax(-1)  # (B, S - k, V), of token i + k + 1
            p, drafted = own[:, k:], kind[:, k + 1:].flatten()
            passes = torch.stack([torch.ones_like(p[..., 0]), draft.argmax(-1) == p.argmax(-1),
                                  torch.minimum(p, draft).sum(-1)], dim=-1)
            sums[k - 1].index_add_(0, drafted, passes.flatten(0, 1).double().cpu())
    rows = [dict(zip(names, depth, strict=True)) | {"all": depth.sum(0)} for depth in sums]
    return [{name: Agreement(int(n), float(g / n), float(s / n))
             for name, (n, g, s) in row.items() if n} for row in rows]
