"""Speculative decoding: MTP modules draft tokens, the model checks them all in one pass (V3 5.4.3).

A pass over two tokens costs the model little more than a pass over one, since most of the time goes
into reading weights. So the modules draft D tokens, the model reads the newest token and the drafts
behind it, and `Sampler.verify` keeps those that the model might have written itself.

    slots        .. n        n+1      n+2         n is the newest token of the text
    model reads     token n  draft 1  draft 2     and has its own opinion of n+1, n+2 and n+3
    1 passes        token n  draft 1  its own     n+2 is now the newest; the cache goes back to n+1

Draft k comes from module k, which reads the state of module k - 1 at the last position that the
model has seen, and the embedding of draft k - 1 (V3 section 2.2). Beyond the last module, that one
goes on from its own state one position further, as the serving engines do with V3's single module;
it was not trained to. Drafts that fail leave stale entries in the caches: nobody sees them, and the
next pass overwrites them.
"""

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from minids.apply.folded import fold
from minids.infer.decoding import Session, last_states, new_cache, one_step_late
from minids.infer.sampling import Sampler
from minids.kernels.attention import FEW
from minids.model.cache import LatentCache
from minids.model.transformer import Transformer


def speculative_rounds(model: Transformer, tokens: Tensor, lengths: Tensor, new_tokens: int,
                       drafts: int, sampler: Sampler) -> Iterator[list[list[int]]]:
    """Generate text: yield each sequence's new tokens, one from the prompts, then up to D + 1.

    tokens: (B, S) int64, lengths: (B,) int64, prompts as `right_pad` returns them
    new_tokens: of each sequence; one that has them all stands still
    drafts: D, tokens drafted in a round
    """
    text = Text(model, tokens, lengths, new_tokens, drafts)
    model, depth = text.model, len(text.model.mtp)
    made = tokens.new_zeros(len(tokens), drafts + 2)  # drafts, how many passed, the token after

    def play(window: Window, longest: int | None) -> Window:
        """Draft and verify; returns the states that the next drafts start from."""
        ahead, q = draft(text, window, drafts, sampler, longest)  # (B, D), (B, D, V)
        text.cut(text.cache, text.end, longest)
        read = take(text.slots, text.end, drafts + 1)
        states = model.hidden(read, text.cache, absorbed=True).states  # (B, D + 1, dim)
        passed, token = sampler.verify(ahead, q, sampler.distribution(model.head(states)))
        made.copy_(torch.cat([ahead, passed[:, None], token[:, None]], dim=1))
        text.put(text.end + passed + 1, token)
        moved = torch.minimum(passed + 1, text.last - text.end)  # (B,)
        # The modules read the last positions of the old window again: now they know what follows.
        before = window.last_states(depth - 1)
        text.end.add_(moved)
        return Window(torch.cat([before, states], dim=1), text.end - moved - (depth - 1),
                      (moved + depth - 2).clamp(min=0))

    def each() -> Iterator[Tensor]:
        states = text.session.prefill(tokens, lengths).states  # (B, S, dim)
        made[:, -1] = sampler.sample(model.head(last_states(states, lengths)))
        text.put(text.end, made[:, -1])
        yield made
        window = play(Window(states, torch.zeros_like(lengths), lengths - 1), None)
        fold(model, text.ahead)
        run = text.session.steps(lambda longest: window.become(play(window, longest)),
                                 sampler.generator, drafts)
        for rounds in count(1):
            yield made
            run(tokens.size(1) + min(rounds * (drafts + 1), new_tokens - 1))

    for rows in one_step_late(each()):
        yield [[*row[:passed], last] for *row, passed, last in rows]


def take(values: Tensor, start: Tensor, count: int) -> Tensor:
    """Return `count` neighbouring columns of each row from `start` (B,) on, clamped to its ends."""
    columns = start[:, None] + torch.arange(count, device=start.device)
    row = torch.arange(len(values), device=start.device)[:, None]
    return values[row, columns.clamp(0, values.size(1) - 1)]


class Window:
    """States of the model, (B, W, D), at the same number of neighbouring slots of each sequence.

    start: (B,), slot of the first; at: (B,), column of the last that a token of the text follows
    A start before slot 0 is moved there, and the columns with it; what then fills the end stands
    for no token of the text, and the next pass overwrites it.
    """

    def __init__(self, states: Tensor, start: Tensor, at: Tensor):
        shift = (-start).clamp(min=0)
        self.states = take(states, shift, states.size(1))
        self.start, self.at = start + shift, at - shift

    def become(self, other: "Window") -> None:
        """Take over the numbers of a window of the same size."""
        for name, values in vars(other).items():
            getattr(self, name).copy_(values)

    def last_states(self, count: int) -> Tensor:
        """Return those at the `count` slots up to `at`, (B, count, D)."""
        return take(self.states, self.at - count + 1, count)


class Text:
    """A batch of sequences that grow at their own pace, with the caches of model and modules.

    end: (B,) int64, slot of each newest token, empty at first; last: of the last that is wanted
    """

    def __init__(self, model: Transformer, tokens: Tensor, lengths: Tensor, new_tokens: int,
                 drafts: int):
        batch, length = tokens.shape
        self.end, self.last = lengths.clone(), lengths + new_tokens - 1
        room = length + new_tokens + drafts + len(model.mtp) - 1
        self.slots = tokens.new_zeros(batch, room + drafts + 1)
        self.slots[:, :length] = tokens
        self.session = Session(model, batch, room)
        self.model, self.cache = self.session.model, self.session.cache
        self.ahead = new_cache(self.model, batch, room, mtp=True)

    def module(self, k: int, states: Tensor, tokens: Tensor) -> Tensor:
        """Run MTP module k, counted from 0, on states (B, S, D) and the tokens it embeds (B, S)."""
        few = self.session.static and tokens.size(1) <= FEW
        context = self.model.context(tokens, self.ahead, few or self.ahead.folded is not None)
        return self.model.mtp[k](states, self.model.embed(tokens), context)[0]

    def cut(self, cache: LatentCache, lengths: Tensor, longest: int | None) -> None:
        """Forget what follows the first slots of each sequence; longest: as for `truncate`."""
        cache.truncate(lengths, longest if self.session.static else None)

    def put(self, slot: Tensor, token: Tensor) -> None:
        """Write a token of each sequence: (B,), (B,)"""
        self.slots.scatter_(1, slot[:, None], token[:, None])


def draft(text: Text, window: Window, drafts: int, sampler: Sampler, longest: int | None
          ) -> tuple[Tensor, Tensor]:
    """Put the tokens that the modules expect behind the text's newest one.

    longest: no sequence of the text has its newest token behind this slot; None: look
    Returns them, (B, D), and their distributions, (B, D, V).
    """
    model, states, tokens, probs = text.model, window.states, [], []
    depth, width = len(model.mtp), window.states.size(1)
    text.cut(text.ahead, window.start, longest and max(longest - depth + 1, 0))
    for k in range(1, drafts + 1):
        if k <= depth:
            states = text.module(k - 1, states, take(text.slots, window.start + k, width))
            state = take(states, window.at, 1)  # (B, 1, D)
        else:  # the last module, one position further
            text.cut(text.ahead, window.start + window.at + k - depth,
                     longest and longest + k - depth)
            state = text.module(depth - 1, state, take(text.slots, text.end + k - 1, 1))
        probs += [sampler.distribution(model.head(state.squeeze(1)))]
        # Where there is no token, any is read: `verify` sees that its probability is NaN.
        tokens += [sampler.draw(probs[-1]).clamp(max=probs[-1].size(-1) - 1)]
        text.put(text.end + k, tokens[-1])
    return torch.stack(tokens, dim=1), torch.stack(probs, dim=1)
