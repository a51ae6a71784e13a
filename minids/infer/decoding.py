"""A decoding session: prompts into the latent cache, then one token of every sequence at a time.

Prompts of unequal length share a batch: they are aligned at position 0 and padded on the right.
Causal attention hides the padding from the prompts, and the first new tokens overwrite its slots.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minids.apply.folded import fold, for_products
from minids.apply.graphs import Steps, graphed
from minids.base.command_line import say_once
from minids.kernels import selected
from minids.kernels.precision import compute_dtype
from minids.model.cache import LatentCache
from minids.model.moe import Routing
from minids.model.transformer import Hidden, Transformer

PIECE = 2 ** 15  # tokens of all prompts that a GPU reads at a time; more fill its memory, not it
SHORTEST = 256  # tokens of a prompt in such a piece, at least


def right_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return unequal prompts as one rectangle, and their lengths.

    [[5, 6, 7], [8]] gives tokens [[5, 6, 7], [8, 0, 0]] and lengths [3, 1].
    """
    longest = max(map(len, prompts))
    rows = [list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(list(map(len, prompts)), device=device)


def new_cache(model: Transformer, batch: int, max_len: int, mtp: bool = False) -> LatentCache:
    """Return an empty cache on the model's device, in the precision of its products.

    It has the model's layers or, with `mtp`, its MTP modules: those that this rank holds.
    """
    weight, first = model.head.weight, model.args.n_layers
    if lacking := selected.missing(model.args, weight.device):
        say_once(f"sparse attention: {lacking}; it runs in PyTorch operations, slower than dense")
    held = [block.layer for block in model.blocks() if (block.layer >= first) == mtp]
    layers = range(held[0], held[-1] + 1) if held else range(first, first)
    return LatentCache(model.args, batch, max_len, weight.device, compute_dtype(weight), layers)


class Session:
    """One decoding session: the cache, the weights derived for it, and where it stands.

    static: whether steps may become CUDA graphs; then no step makes the CPU wait, positions and
        lengths are tensors that stay where they are, and products read weights in their own type.
        The steps of an `eager` model do wait: its ranks for each other, or for tokens' experts
    model: to decode with; the given one, or a copy with such weights
    end: (B,) int64, slots that each sequence has filled, where static
    """

    def __init__(self, model: Transformer, batch: int, max_len: int):
        self.static = graphed(model.head.weight.device) and not getattr(model, "eager", False)
        self.model = for_products(model) if self.static else model
        self.cache, self.end = new_cache(self.model, batch, max_len), None

    def prefill(self, tokens: Tensor, lengths: Tensor) -> Hidden:
        """Read prompts into the empty cache, in attention's naive form, on a GPU piece by piece.

        tokens: (B, S) int64 and lengths: (B,) int64, from `right_pad`
        Returns the hidden states of all positions, the padding's included.
        """
        self.end = lengths.clone()
        parts = [self.model.hidden(part, self.cache)
                 for part in tokens.split(piece(tokens), dim=1)]
        self.cache.truncate(lengths)
        fold(self.model, self.cache)
        if len(parts) == 1:
            return parts[0]
        routings = [Routing(*(torch.cat(t, dim=1) for t in zip(*each, strict=True)))
                    for each in zip(*(part.routings for part in parts), strict=True)]
        return Hidden(torch.cat([part.states for part in parts], dim=1), routings, [])

    def next_token(self, tokens: Tensor, longest: int) -> Hidden:
        """Read one more token of every sequence, (B,) int64, in attention's absorbed form.

        longest: slots that the longest sequence has filled, or more
        """
        if self.static:
            self.cache.truncate(self.end, longest)
        found = self.model.hidden(tokens.unsqueeze(1), self.cache, absorbed=True)
        if self.static:
            self.end += 1
        return found

    def steps(self, step: Callable[[int], None], generator: torch.Generator | None,
              drafts: int = 0) -> Callable[[int], None]:
        """Return a step of the session, `step(longest)`, as what runs it again and again.

        drafts: tokens that a step reads besides the one that it adds at least
        """
        if not self.static:
            return step
        most = self.cache.latents.size(2) - 1 - drafts
        return Steps(step, most, self.model.head.weight.device, generator)


def piece(tokens: Tensor) -> int:
    """Return how many tokens of each prompt (B, S) are read at a time."""
    return max(PIECE // len(tokens), SHORTEST) if graphed(tokens.device) else tokens.size(1)


def last_states(states: Tensor, lengths: Tensor) -> Tensor:
    """Return what the head reads after each prompt's last token: (B, S, D), (B,) -> (B, D)"""
    return states[torch.arange(len(states), device=states.device), lengths - 1]


def one_step_late(steps: Iterator[Tensor]) -> Iterator[list]:
    """Yield the tensor that each step made, as a list, on a GPU when the next step is under way.

    The CPU then waits for a result only while the GPU has something to do.
    """
    before = None
    for made in steps:
        if made.device.type != "cuda":
            yield made.tolist()
            continue
        copy = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        copy.copy_(made, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        if before is not None:
            before[1].synchronize()
            yield before[0].tolist()
        before = copy, ready
    if before is not None:
        before[1].synchronize()
        yield before[0].tolist()
