"""Sequences that come and go in one latent cache.

A row of the cache belongs to one sequence at a time. Those that are being continued stand in rows 0
to n - 1, so a decoding step works on a view of the cache. When a sequence leaves, the last of them
moves into its row: a copy of 576 numbers per token and layer in V3, which MLA makes cheap.

What a sequence leaves behind stays readable until its row is needed. A new prompt that begins like
any sequence in the cache copies the latents of that beginning, and only the rest goes through the
model: a system prompt is computed once, and so is a conversation's past.
"""

import copy

import torch
from torch import Tensor

from minids.apply.folded import fold
from minids.apply.graphs import Steps
from minids.infer.decoding import Session
from minids.model.cache import LatentCache
from minids.model.transformer import Hidden, Transformer

WORTH = 8  # tokens that a prompt must share with another sequence before they are copied


class Slots:
    """The rows of one cache, and the decoding step of the first few.

    held: by row, the tokens whose latents it holds, in use or not
    used: by row, the time of its last use, a count
    """

    def __init__(self, model: Transformer, rows: int, max_len: int):
        session = Session(model, rows, max_len)
        self.model, self.cache, self.static = session.model, session.cache, session.static
        fold(self.model, self.cache)
        self.max_len, self.held = max_len, [[] for _ in range(rows)]
        self.used, self.clock = [0] * rows, 0
        args, device = model.args, model.head.weight.device
        layers = sum(block.is_moe for block in model.layers)
        self.end = torch.zeros(rows, dtype=torch.int64, device=device)  # slots that each has filled
        self.token = torch.zeros_like(self.end)  # the newest of each, not yet in the cache
        self.logits = self.cache.latents.new_zeros(rows, args.vocab_size)
        self.visited = self.end.new_zeros(rows, layers, args.n_activated_experts)
        self.graphs: dict[int, Steps] = {}

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of the cache that a token of a sequence takes."""
        return sum(t.size(0) * t.size(-1) * t.element_size() for t in self.stores())

    def view(self, start: int, stop: int) -> LatentCache:
        """Return some rows as a cache of their own, which shares memory with the whole."""
        part = copy.copy(self.cache)
        part.latents = self.cache.latents[:, start:stop]
        if part.index_keys is not None:
            part.index_keys = self.cache.index_keys[:, start:stop]
        return part

    def stores(self) -> list[Tensor]:
        """Return the tensors that hold the rows: (layers, rows, max_len, width)"""
        return [t for t in (self.cache.latents, self.cache.index_keys) if t is not None]

    def touch(self, row: int) -> None:
        """Count a use of a row."""
        self.clock += 1
        self.used[row] = self.clock

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a == b:
            return
        filled = max(len(self.held[a]), len(self.held[b]))
        for stored in self.stores():
            stored[:, [a, b], :filled] = stored[:, [b, a], :filled]
        for values in (self.held, self.used):
            values[a], values[b] = values[b], values[a]

    def clear(self, row: int) -> None:
        """Forget what a row holds. NaN must not stay: attention gives it the weight 0, and 0 times
        NaN is NaN."""
        for stored in self.stores():
            stored[:, row] = 0
        self.held[row] = []

    def begin(self, row: int, prompt: list[int]) -> int:
        """Assign a row to a prompt; return how many of its tokens the cache held already.

        The last token is never one of them: what follows it has to be computed.
        """
        shared = [common(prompt[:-1], held) for held in self.held]
        source = max(range(len(shared)), key=shared.__getitem__)
        count = shared[source] if shared[source] >= WORTH else 0
        if source != row:
            for stored in self.stores():
                stored[:, row, :count] = stored[:, source, :count]
        if count:
            self.touch(source)
        self.touch(row)
        self.held[row] = prompt[:count]
        return count

    def read(self, row: int, tokens: list[int]) -> Hidden:
        """Read the next tokens of a row's prompt, in attention's naive form."""
        part, held = self.view(row, row + 1), self.held[row]
        part.length, part.lengths = len(held), None
        found = self.model.hidden(torch.tensor([tokens], device=self.end.device), part)
        held += tokens
        return found

    def step(self, start: int, stop: int, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Read one more token of each row from `start` to `stop`, in the absorbed form.

        Returns the logits of what follows, (n, V), and the experts that were visited, by layer,
        (n, layers, K); both are overwritten by the next step.
        """
        rows = range(start, stop)
        longest = max(len(self.held[row]) for row in rows)
        whole = start == 0 and self.static
        if whole:  # rows beyond the last one are computed too, and what they write is not read
            rows = range(min(1 << (stop - 1).bit_length(), len(self.held)))
        filled = [min(len(self.held[row]), self.max_len - 1) for row in rows]
        self.end[rows.start:rows.stop] = torch.tensor(filled, device=self.end.device)
        self.token[start:stop] = torch.tensor(tokens, device=self.end.device)
        if whole:
            self.graph(len(rows))(longest)
        else:
            self.compute(rows.start, rows.stop, longest)
        for row, token in zip(range(start, stop), tokens, strict=True):
            self.held[row].append(token)
            self.touch(row)
        return self.logits[start:stop], self.visited[start:stop]

    def graph(self, count: int) -> Steps:
        """Return the step of the first `count` rows as a CUDA graph."""
        if count not in self.graphs:
            self.graphs[count] = Steps(lambda longest: self.compute(0, count, longest),
                                       self.max_len - 1, self.end.device)
        return self.graphs[count]

    def compute(self, start: int, stop: int, longest: int) -> None:
        """Run the model on the newest token of some rows."""
        part, rows = self.view(start, stop), slice(start, stop)
        part.truncate(self.end[rows], longest if self.static else None)
        found = self.model.hidden(self.token[rows, None], part, absorbed=True)
        self.logits[rows] = self.model.head(found.states[:, 0])
        if found.routings:
            self.visited[rows] = torch.stack([r.indices[:, 0] for r in found.routings], dim=1)


def common(a: list[int], b: list[int]) -> int:
    """Return how many first tokens of two sequences are equal."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
