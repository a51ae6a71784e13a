"""Sequences that come and go in one latent cache.

A row of the cache belongs to one sequence at a time. Those that are being continued stand in rows 0
to n - 1, so a decoding step works on a view of the cache. When a sequence leaves, the last of them
moves into its row: a copy of 576 numbers per token and layer in V3, which MLA makes cheap.

What a sequence leaves behind stays readable until its row is needed. A new prompt that begins like
any sequence in the cache copies the latents of that beginning, and only the rest goes through the
model: a system prompt is computed once, and so is a conversation's past.

On a GPU a short prompt's pass becomes a graph too: launching its kernels one by one would take as
long as ten decoding steps of all rows. A graph reads and writes where it was recorded, so such a
pass has a cache of its own, the desk, and latents are copied between it and the prompt's row.

With drafts, the first MTP module has a cache beside the model's. Its entry at position i is made
from the model's state there and from token i + 1, so it stands one token behind.
"""

import copy
import functools

import torch
from torch import Tensor

from minids.apply.folded import fold
from minids.apply.graphs import Steps
from minids.infer.decoding import Session, new_cache
from minids.model.cache import LatentCache
from minids.model.transformer import Hidden, Transformer

WORTH = 8  # tokens that a prompt must share with another sequence before they are copied
WIDTHS = 16, 64, 256  # tokens of a prompt that a graph reads; fewer are padded


class Slots:
    """The rows of one cache, and the decoding step of the first few.

    held: by row, the tokens whose latents it holds, in use or not
    used: by row, the time of its last use, a count
    behind: by row, the positions that the MTP module has read; drafts: tokens it drafts, 0 or 1
    """

    def __init__(self, model: Transformer, rows: int, max_len: int, drafts: int = 0):
        session = Session(model, rows, max_len)
        self.model, self.cache, self.static = session.model, session.cache, session.static
        fold(self.model, self.cache)
        self.max_len, self.held = max_len, [[] for _ in range(rows)]
        self.used, self.clock = [0] * rows, 0
        self.drafts, self.behind, self.ahead = drafts, [0] * rows, None
        args, device = model.args, model.head.weight.device
        layers = sum(block.is_moe for block in model.layers)
        width, new = 1 + drafts, self.cache.latents.new_zeros
        self.end = torch.zeros(rows, dtype=torch.int64, device=device)  # slots that each has filled
        # The newest token of each sequence, not yet in the cache, and the draft after it.
        self.token = self.end.new_zeros(rows, width)
        self.logits = new(rows, width, args.vocab_size)
        self.visited = self.end.new_zeros(rows, width, layers, args.n_activated_experts)
        self.graphs: dict[tuple, Steps] = {}
        if self.static:
            self.desk = new_cache(self.model, 1, max_len)
            self.desk.folded, self.desk.joined = self.cache.folded, self.cache.joined
            self.prompt = self.end.new_zeros(1, WIDTHS[-1])
            self.filled = self.end.new_zeros(1)  # slots of the desk
            self.read_states = new(1, WIDTHS[-1], args.dim, dtype=model.embed.weight.dtype)
            self.read_visited = self.visited.new_zeros(1, WIDTHS[-1], *self.visited.shape[2:])
        if drafts:
            self.ahead = new_cache(self.model, rows, max_len, mtp=True)
            fold(self.model, self.ahead)
            self.states = new(rows, width, args.dim, dtype=model.embed.weight.dtype)
            self.last = self.states[:, 0].clone()  # of the newest position of a prompt
            self.passed = torch.zeros_like(self.end)
            self.expected = new(rows, args.vocab_size)  # logits of the next draft

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of the cache that a token of a sequence takes."""
        return sum(t.size(0) * t.size(-1) * t.element_size() for t in self.stores())

    @property
    def captured(self) -> int:
        """Return how many passes have become CUDA graphs; 0 on a CPU."""
        return sum(graph is not None for steps in [*self.graphs.values()]
                   for graph in [*steps.graphs.values()])

    def stores(self) -> list[Tensor]:
        """Return the tensors that hold the rows: (layers, rows, max_len, width)"""
        return tensors(self.cache) + (tensors(self.ahead) if self.drafts else [])

    def touch(self, row: int) -> None:
        """Count a use of a row."""
        self.clock += 1
        self.used[row] = self.clock

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a == b:
            return
        filled = max(len(self.held[a]), len(self.held[b])) + self.drafts  # NaN may stand in a draft
        for stored in self.stores():
            stored[:, [a, b], :filled] = stored[:, [b, a], :filled]
        for values in (self.held, self.used, self.behind):
            values[a], values[b] = values[b], values[a]
        if self.drafts:
            self.last[[a, b]] = self.last[[b, a]]

    def clear(self, row: int) -> None:
        """Forget what a row holds. NaN must not stay: attention gives it the weight 0, and 0 times
        NaN is NaN."""
        for stored in self.stores():
            stored[:, row] = 0
        self.held[row], self.behind[row] = [], 0
        for stored in tensors(self.desk) if self.static else []:
            stored.zero_()
        if self.drafts:
            self.states[row] = 0

    def begin(self, row: int, prompt: list[int]) -> int:
        """Assign a row to a prompt; return how many of its tokens the cache held already.

        The last token is never one of them: what follows it has to be computed.
        """
        shared = [common(prompt[:-1], held) for held in self.held]
        if self.drafts:  # the module's entry of the last shared token was made from the next one
            shared = [max(0, min(s - 1, b)) for s, b in zip(shared, self.behind, strict=True)]
        source = max(range(len(shared)), key=shared.__getitem__)
        count = shared[source] if shared[source] >= WORTH else 0
        if source != row:
            for stored in self.stores():
                stored[:, row, :count] = stored[:, source, :count]
        if count:
            self.touch(source)
        self.touch(row)
        self.held[row], self.behind[row] = prompt[:count], count
        return count

    def read(self, row: int, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Read the next tokens of a row's prompt, in attention's naive form or by a graph.

        Returns the model's states, (1, S, D), and the experts that the last token visited, by
        layer, (1, 1, layers, K); the next pass overwrites both.
        """
        if width := self.width(row, tokens):
            states, visited = self.read_at_desk(row, tokens, width)
        else:
            part = view(self.cache, row, row + 1)
            part.length, part.lengths = len(self.held[row]), None
            found = self.model.hidden(torch.tensor([tokens], device=self.end.device), part)
            states, visited = found.states, by_layer(found, self.visited)
        self.held[row] += tokens
        if self.drafts:
            self.follow(row, states)
        return states, visited[:, -1:]

    def width(self, row: int, tokens: list[int]) -> int:
        """Return how many tokens a graph reads for these and has room for; 0: none does."""
        room = self.max_len - len(self.held[row])
        fits = (width for width in WIDTHS if len(tokens) <= width <= room)
        return next(fits, 0) if self.static else 0

    def read_at_desk(self, row: int, tokens: list[int], width: int) -> tuple[Tensor, Tensor]:
        """Read tokens by a graph, in the absorbed form; nothing sees the padding behind them."""
        start, count = len(self.held[row]), len(tokens)
        end = start + count
        pairs = [(desk[:, 0], rows[:, row])
                 for desk, rows in zip(tensors(self.desk), tensors(self.cache), strict=True)]
        for desk, own in pairs:
            desk[:, :start] = own[:, :start]
        self.prompt[0, :count] = torch.tensor(tokens, device=self.end.device)
        self.filled.fill_(start)
        if (key := ("read", width)) not in self.graphs:
            self.graphs[key] = Steps(functools.partial(self.compute_read, width),
                                     self.max_len - width, self.end.device)
        self.graphs[key](start)
        for desk, own in pairs:
            own[:, start:end] = desk[:, start:end]
        return self.read_states[:, :count], self.read_visited[:, :count]

    def compute_read(self, width: int, longest: int) -> None:
        """Run the model on the tokens at the desk."""
        part = view(self.desk, 0, 1)
        part.truncate(self.filled, longest)
        found = self.model.hidden(self.prompt[:, :width], part, absorbed=True)
        self.read_states[:, :width] = found.states
        self.read_visited[:, :width] = by_layer(found, self.visited)

    def follow(self, row: int, states: Tensor) -> None:
        """Let the module read the positions of a prompt whose next token is known.

        states: (1, S, D), of the model at the last S positions that it has read
        """
        start, held = self.behind[row], self.held[row]
        if start < len(held) - states.size(1):  # the last one of the piece before
            states = torch.cat([self.last[row][None, None], states], dim=1)
        self.last[row], self.behind[row] = states[0, -1], len(held) - 1
        if states.size(1) > 1:
            part = view(self.ahead, row, row + 1)
            part.length, part.lengths = start, None
            tokens = torch.tensor([held[start + 1:]], device=self.end.device)
            self.module(states[:, :-1], tokens, part, absorbed=False)

    def module(self, states: Tensor, tokens: Tensor, part: LatentCache, absorbed: bool) -> Tensor:
        """Run the first MTP module on states (B, S, D) and the tokens after them (B, S)."""
        context = self.model.context(tokens, part, absorbed)
        return self.model.mtp[0](states, self.model.embed(tokens), context)[0]

    def step(self, start: int, stop: int, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Read the newest token of each row from `start` to `stop`, and the draft after it, in the
        absorbed form.

        Returns the logits of what follows each, (n, 1 + drafts, V), and the experts that were
        visited, by layer, (n, 1 + drafts, layers, K); both are overwritten by the next step.
        """
        self.run(self.compute, start, stop, tokens, list(map(len, self.held)))
        for row, (newest, *_) in zip(range(start, stop), tokens, strict=True):
            self.held[row].append(newest)
            self.touch(row)
        return self.logits[start:stop], self.visited[start:stop]

    def guess(self, start: int, stop: int, tokens: list[list[int]], first: bool) -> Tensor:
        """Return the logits of the draft after the newest token of each row, (n, V).

        tokens: by row, those that follow the states which the module has not read: `first`, that
            of a prompt's end, otherwise those of the last step, the last one is the newest token
        """
        if first:
            self.states[start:stop, 0] = self.last[start:stop]
        width, device = 1 + self.drafts, self.end.device
        self.passed[start:stop] = torch.tensor([len(new) - 1 for new in tokens], device=device)
        padded = [new + new[-1:] * (width - len(new)) for new in tokens]
        self.run(self.compute_guess, start, stop, padded, self.behind)
        for row, new in zip(range(start, stop), tokens, strict=True):
            self.behind[row] += len(new)
        return self.expected[start:stop]

    def run(self, work, start: int, stop: int, tokens: list[list[int]], filled: list[int]) -> None:
        """Run `work(start, stop, longest)` on some rows; filled: slots of each row, of all rows."""
        rows, most = range(start, stop), self.max_len - 1 - self.drafts
        longest = max(filled[row] for row in rows)
        whole = start == 0 and self.static
        if whole:  # rows beyond the last one are computed too, and what they write is not read
            rows = range(min(1 << (stop - 1).bit_length(), len(self.held)))
        ends = [min(filled[row], most) for row in rows]
        self.end[rows.start:rows.stop] = torch.tensor(ends, device=self.end.device)
        self.token[start:stop] = torch.tensor(tokens, device=self.end.device)
        if whole:
            key = work.__name__, len(rows)
            if key not in self.graphs:
                self.graphs[key] = Steps(lambda longest: work(0, len(rows), longest), most,
                                         self.end.device)
            self.graphs[key](longest)
        else:
            work(start, stop, longest)

    def compute(self, start: int, stop: int, longest: int) -> None:
        """Run the model on the newest tokens of some rows."""
        part, rows = view(self.cache, start, stop), slice(start, stop)
        part.truncate(self.end[rows], longest if self.static else None)
        found = self.model.hidden(self.token[rows], part, absorbed=True)
        self.logits[rows] = self.model.head(found.states)
        if self.drafts:
            self.states[rows] = found.states
        self.visited[rows] = by_layer(found, self.visited)

    def compute_guess(self, start: int, stop: int, longest: int) -> None:
        """Run the module on the states that it has not read."""
        part, rows = view(self.ahead, start, stop), slice(start, stop)
        part.truncate(self.end[rows], longest if self.static else None)
        states = self.module(self.states[rows], self.token[rows], part, absorbed=True)
        at = self.passed[rows, None, None].expand(-1, 1, states.size(-1))
        self.expected[rows] = self.model.head(states.gather(1, at)[:, 0])


def view(cache: LatentCache, start: int, stop: int) -> LatentCache:
    """Return some rows of a cache as one of their own, which shares memory with the whole."""
    part = copy.copy(cache)
    part.latents = cache.latents[:, start:stop]
    if part.index_keys is not None:
        part.index_keys = cache.index_keys[:, start:stop]
    return part


def tensors(cache: LatentCache) -> list[Tensor]:
    """Return what a cache stores: (layers, rows, slots, width) each"""
    return [t for t in (cache.latents, cache.index_keys) if t is not None]


def by_layer(found: Hidden, like: Tensor) -> Tensor:
    """Return the experts that tokens visited, (B, S, layers, K); like: of which shape's last two"""
    visited = [routing.indices for routing in found.routings]
    empty = *found.states.shape[:2], *like.shape[2:]  # a model without experts
    return torch.stack(visited, dim=2) if visited else like.new_zeros(empty)


def common(a: list[int], b: list[int]) -> int:
    """Return how many first tokens of two sequences are equal."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
