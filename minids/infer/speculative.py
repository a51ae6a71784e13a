"""Speculative decoding: MTP modules draft tokens, the model checks them all in one pass (V3 5.4.3).

A pass over two tokens costs the model little more than a pass over one, since most of the time goes
into reading weights. So the modules draft D tokens, the model reads the newest token and the drafts
behind it, and `Sampler.verify` keeps those that the model might have written itself. The text has
exactly the distribution of plain decoding; at temperature 0 it is the same text.

    slots        .. n        n+1      n+2         n is the newest token of the text
    model reads     token n  draft 1  draft 2     and has its own opinion of n+1, n+2 and n+3
    1 passes        token n  draft 1  its own     n+2 is now the newest; the cache goes back to n+1

Draft k comes from module k, which reads the state of module k - 1 at the last position that the
model has seen, and the embedding of draft k - 1 (V3 section 2.2). Where there are fewer modules
than drafts, the last one goes on from its own state one position further, as the serving engines do
with V3's single module; it was not trained to.

Each sequence of a batch keeps its own number of drafts. Those that fail leave stale entries in the
caches: nobody sees them, and the next pass overwrites them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.infer.decode import Steps, decoder_for
from minids.infer.sampling import Sampler
from minids.model.layers import compute_dtype
from minids.model.mla import LatentCache
from minids.model.transformer import Transformer


def speculative_rounds(model: Transformer, tokens: Tensor, pad: Tensor | None, new_tokens: int,
                       drafts: int, sampler: Sampler) -> Iterator[list[list[int]]]:
    """Generate text, a pass of the model at a time.

    tokens: (B, S) int64, prompts, padded on the left
    pad: (B,) int64, how much padding each has; None: none
    new_tokens: of each sequence; one that has them all stands still
    drafts: D, tokens drafted in a round
    Yields each sequence's new tokens: one each from the prompts, then up to D + 1.
    """
    text = Text(model, tokens, pad, new_tokens, drafts)
    hidden = text.read_prompts()
    text.end = text.end + 1
    token = sampler.sample(model.head(hidden[:, -1]))
    text.put(text.end, token)
    yield token.unsqueeze(1).tolist()
    window = Window(hidden, text.end - hidden.size(1), hidden.size(1) - 1)
    ahead, q = draft(text, window, drafts, sampler)  # (B, D), (B, D, V)
    text.body = decoder_for(model, text.cache, text.ahead)
    depth = len(model.mtp)
    while True:
        hidden = text.read(drafts + 1)  # (B, D + 1, dim)
        passed, token = sampler.verify(ahead, q, sampler.distribution(model.head(hidden)))
        yield [[*row[:n], last] for row, n, last in
               zip(ahead.tolist(), passed.tolist(), token.tolist(), strict=True)]
        text.put(text.end + passed + 1, token)
        moved = torch.minimum(passed + 1, text.last - text.end)  # (B,)
        # The modules read the last positions of the old window again: now they know what follows.
        before = window.last_states(depth - 1)
        text.end = text.end + moved
        window = Window(torch.cat([before, hidden], dim=1), text.end - moved - (depth - 1),
                        (moved + depth - 2).clamp(min=0))
        ahead, q = draft(text, window, drafts, sampler)


class Window:
    """States of the model, at the same number of neighbouring slots of each sequence.

    states: (B, W, D); start: (B,), slot of the first; at: (B,) or int, column of the last one that
    is followed by a token of the text
    """

    def __init__(self, states: Tensor, start: Tensor, at: Tensor | int):
        self.states, self.start = states, start
        self.at = torch.as_tensor(at, device=states.device).expand(len(states))

    def last_states(self, count: int) -> Tensor:
        """Those at the `count` slots up to `at`, (B, count, D)."""
        columns = self.at[:, None] - count + 1 + torch.arange(count, device=self.at.device)
        row = torch.arange(len(self.states), device=self.at.device)[:, None]
        return self.states[row, columns.clamp(min=0)]


class Text:
    """A batch of sequences that grow at their own pace, with the caches of model and modules.

    end: (B,) int64, slot of each sequence's newest token
    last: slot of the last token that is wanted
    """

    def __init__(self, model: Transformer, tokens: Tensor, pad: Tensor | None, new_tokens: int,
                 drafts: int):
        self.model = model
        device, batch, depth = tokens.device, len(tokens), len(model.mtp)
        # A module reads up to depth - 1 positions before the newest: let there always be so many.
        length = tokens.size(1) + depth - 1
        if depth > 1:
            pad = torch.zeros(batch, dtype=torch.int64, device=device) if pad is None else pad
            pad = pad + depth - 1
        self.prompts = F.pad(tokens, (depth - 1, 0))
        self.last = length + new_tokens - 1
        room = self.last + drafts + 1
        self.slots = torch.zeros(batch, room + drafts + depth, dtype=torch.int64, device=device)
        self.slots[:, :length] = self.prompts
        self.end = torch.full((batch,), length - 1, device=device)
        self.row = torch.arange(batch, device=device)
        kind = dict(pad=pad, device=device, dtype=compute_dtype(model.head.weight))
        self.cache = LatentCache(model.args, batch, room, **kind)
        self.ahead = LatentCache(model.args, batch, room, **kind, mtp=True)
        self.body = Steps(model, self.cache, self.ahead, absorbed=False)

    def read_prompts(self) -> Tensor:
        """The model's states of the prompts, (B, S, D)."""
        return self.body.hidden(self.prompts)

    def read(self, count: int) -> Tensor:
        """The model's states of each sequence's newest token and those behind, (B, count, D)."""
        self.cache.go_back(self.end)
        return self.body.hidden(self.get(self.end, count))

    def get(self, start: Tensor, count: int) -> Tensor:
        """The tokens from a slot of each sequence on: (B,) -> (B, count)"""
        columns = start[:, None] + torch.arange(count, device=start.device)
        return self.slots[self.row[:, None], columns]

    def put(self, slot: Tensor, token: Tensor) -> None:
        """Write a token of each sequence: (B,), (B,)"""
        self.slots[self.row, slot] = token


def draft(text: Text, window: Window, drafts: int, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """The tokens that the modules expect next, (B, D), and their distributions, (B, D, V).

    They stand in the text, behind its newest token, where the model finds them.
    """
    model, states, tokens, probs = text.model, window.states, [], []
    depth, width = len(model.mtp), window.states.size(1)
    text.ahead.go_back(window.start)
    for k in range(1, drafts + 1):
        if k <= depth:
            states = text.body.mtp(k - 1, states, text.get(window.start + k, width))
            state = states[text.row, window.at]  # (B, D)
        else:  # the last module, one position further
            text.ahead.go_back(window.start + window.at + k - depth)
            newest = text.get(text.end + k - 1, 1)
            state = text.body.mtp(depth - 1, state.unsqueeze(1), newest).squeeze(1)
        probs += [sampler.distribution(model.head(state))]
        tokens += [sampler.draw(probs[-1])]
        text.put(text.end + k, tokens[-1])
    return torch.stack(tokens, dim=1), torch.stack(probs, dim=1)
