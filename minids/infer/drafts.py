"""Measure how often the MTP modules' drafts agree with the model, by depth and kind of text.

Over held-out text a draft (V3 section 5.4.3) is compared with the model's own prediction from the
same true text, so a module cannot profit from the repetitions that a model falls into when it
continues its own output.
"""

import contextlib
import io
import keyword
import tokenize
from typing import NamedTuple

import torch
from torch import Tensor

from minids.infer.validation import windows

KIND = {tokenize.COMMENT: "comments", tokenize.STRING: "strings", tokenize.NUMBER: "numbers",
        tokenize.OP: "punctuation"}


class Agreement(NamedTuple):
    """Acceptance of drafts of one kind of text: their number, and the shares accepted.

    greedy: the module's likeliest token is the model's
    sampled: probability of acceptance at temperature 1
    """

    tokens: int
    greedy: float
    sampled: float


def kinds_of_python(text: str) -> list[str]:
    """Return the kind of word that each character belongs to, by Python's own tokenizer."""
    kinds = ["white space" if c.isspace() else "other" for c in text]
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for word in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = KIND.get(word.type)
            if word.type == tokenize.NAME:
                kind = "keywords" if keyword.iskeyword(word.string) else "names"
            if kind:
                first, last = (starts[line - 1] + column for line, column in (word.start, word.end))
                kinds[first:last] = [kind] * (last - first)
    return kinds


def kinds_of_tokens(tokens: Tensor, tokenizer) -> list[str]:
    """Return the kind of each token of packed documents: that of its first non-space character.

    tokens: (M,) int64, documents that end with the tokenizer's EOS
    """
    special, kinds = set(tokenizer.special.values()), []
    ends = ((tokens == tokenizer.eos_id).nonzero().flatten() + 1).tolist()
    for document in tokens.tensor_split(ends):
        raw = [b"" if i in special else tokenizer.decode_bytes([i]) for i in document.tolist()]
        text = b"".join(raw).decode("utf-8", "replace")
        of_bytes = [kind for kind, c in zip(kinds_of_python(text), text, strict=True)
                    for _ in c.encode()]
        at = 0
        for piece in raw:
            own = of_bytes[at:at + len(piece)]
            kinds.append(next((k for k in own if k != "white space"),
                              "white space" if own else "ends of documents"))
            at += len(piece)
    return kinds


@torch.no_grad()
def draft_agreement(model, tokens: Tensor, kinds: list[str], seq_len: int, batch_size: int,
                    max_tokens: int | None = None) -> list[dict[str, Agreement]]:
    """Return how well each MTP module predicts the model's own next token on given text.

    tokens: (M,) int64, packed documents
    kinds: the kind of each token
    seq_len, batch_size, max_tokens: as for `evaluate`
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
    tables = []
    for depth in sums:
        rows = dict(zip(names, depth, strict=True)) | {"all": depth.sum(0)}
        tables.append({name: Agreement(int(n), float(g / n), float(s / n))
                       for name, (n, g, s) in rows.items() if n})
    return tables
