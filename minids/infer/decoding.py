"""Prompts into the latent cache, ready for one token of every sequence at a time.

Prompts of unequal length share a batch: they are aligned at position 0 and padded on the right.
Causal attention hides the padding from the prompts, and the first new tokens overwrite its slots.
"""

import torch
from torch import Tensor

from minids.apply.folded import fold
from minids.kernels.precision import compute_dtype
from minids.model.cache import LatentCache
from minids.model.transformer import Hidden, Transformer


def right_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return unequal prompts as one rectangle, and their lengths.

    [[5, 6, 7], [8]] gives tokens [[5, 6, 7], [8, 0, 0]] and lengths [3, 1].
    """
    longest = max(map(len, prompts))
    rows = [list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(list(map(len, prompts)), device=device)


def new_cache(model: Transformer, batch: int, max_len: int, mtp: bool = False) -> LatentCache:
    """Return an empty cache on the model's device, in the precision of its products."""
    weight = model.head.weight
    return LatentCache(model.args, batch, max_len, weight.device, compute_dtype(weight), mtp)


def prefill(model: Transformer, cache: LatentCache, tokens: Tensor, lengths: Tensor) -> Hidden:
    """Read prompts into an empty cache, in attention's naive form.

    tokens: (B, S) int64 and lengths: (B,) int64, from `right_pad`
    Returns the hidden states of all positions, the padding's included.
    """
    found = model.hidden(tokens, cache)
    cache.truncate(lengths)
    fold(model, cache)
    return found


def next_token(model: Transformer, cache: LatentCache, tokens: Tensor) -> Hidden:
    """Read one more token of every sequence, (B,) int64, in attention's absorbed form."""
    return model.hidden(tokens.unsqueeze(1), cache, absorbed=True)


def last_states(states: Tensor, lengths: Tensor) -> Tensor:
    """Return what the head reads after each prompt's last token: (B, S, D), (B,) -> (B, D)"""
    return states[torch.arange(len(states), device=states.device), lengths - 1]
