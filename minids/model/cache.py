"""The latent cache: one latent and one rotated key per token and layer, for all heads (V2 2.1).

With an indexer (V3.2) it stores the indexer's keys too. Position p of a sequence stands in slot p:
sequences of unequal length are aligned at slot 0, and what follows a sequence's end is overwritten
by its next tokens. Nobody sees it, since a query sees the slots up to its own.
"""

import torch
from torch import Tensor

from minids.config import ModelArgs
from minids.kernels.attention import FEW, causal
from minids.model.rope import rotations


class LatentCache:
    """The latents and rotated keys of the tokens seen so far, for every layer.

    batch: sequences decoded together, max_len: slots of each
    layers: those that it serves, of which MTP module k is n_layers + k; None: all but the modules

    latents: (layers, batch, max_len, kv_lora_rank + qk_rope_head_dim)
    index_keys: (layers, batch, max_len, index_head_dim) with an indexer, else None
    length: slots that the longest sequence has filled, or more
    lengths: (B,) int64, slots that each has filled; None when all have filled `length`
    folded, joined: by layer, weights derived from the model's for decoding with this cache, or None
    """

    def __init__(self, args: ModelArgs, batch: int, max_len: int, device=None,
                 dtype: torch.dtype = torch.float32, layers: range | None = None):
        layers = range(args.n_layers) if layers is None else layers
        self.first_layer, shape = layers.start, (len(layers), batch, max_len)
        kind = dict(device=device, dtype=dtype)
        self.latents = torch.zeros(*shape, args.kv_lora_rank + args.qk_rope_head_dim, **kind)
        self.index_keys = None
        if args.has_indexer:
            self.index_keys = torch.zeros(*shape, args.index_head_dim, **kind)
        self.rotations = rotations(torch.arange(max_len, device=device), args)  # (max_len, rope/2)
        self.length, self.lengths, self.folded, self.joined = 0, None, None, None
        self.at = None  # (B, count) int64, the slots of the pass under way where lengths differ

    @property
    def room(self) -> int:
        """Return how many more tokens fit."""
        return self.latents.size(2) - self.length

    def slots(self, count: int) -> Tensor:
        """Return the next slots of each sequence, (B or 1, count) int64."""
        start = self.length if self.lengths is None else self.lengths
        new = torch.arange(count, device=self.latents.device)
        return torch.as_tensor(start, device=new.device).view(-1, 1) + new

    def look(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the rotations of the next `count` tokens and the slots that each sees.

        (B or 1, count, rope / 2) complex, and (B or 1, count, T) bool; None where sequences of
        equal length see all up to their own, as in `Context`: a mask pays for few tokens only.
        """
        end = self.length + count
        if self.lengths is None:
            self.at, masked = None, 1 < count <= FEW and self.length
            visible = causal(count, end, self.latents.device) if masked else None
            return self.rotations[None, self.length:end], visible
        self.at = self.slots(count)
        keys = torch.arange(end, device=self.at.device)  # (T,)
        return self.rotations[self.at], keys <= self.at[..., None]

    def append(self, layer: int, latent: Tensor) -> Tensor:
        """Store the new latents of a layer and return all, (B, S, ..) -> (B, T, ..).

        The model calls `advance` when all layers have stored theirs.
        """
        return self._append(self.latents[layer - self.first_layer], latent)

    def append_index_keys(self, layer: int, keys: Tensor) -> Tensor:
        """Do the same for the indexer's keys."""
        return self._append(self.index_keys[layer - self.first_layer], keys)

    def _append(self, stored: Tensor, new: Tensor) -> Tensor:
        end = self.length + new.size(1)
        if self.lengths is None:
            stored[:, self.length:end] = new
        else:
            sequence = torch.arange(len(stored), device=stored.device)[:, None]
            stored[sequence, self.at] = new.to(stored.dtype)
        return stored[:, :end]

    def advance(self, count: int) -> None:
        """Count the last `count` tokens of each sequence as seen."""
        self.length += count
        if self.lengths is not None:
            self.lengths = self.lengths + count

    def truncate(self, lengths: Tensor, longest: int | None = None) -> None:
        """Forget what follows the first `lengths` slots of each sequence, (B,) int64.

        longest: none of them is above it; None: look, for which the CPU waits for a GPU
        """
        if longest is not None:
            self.length, self.lengths = longest, lengths
            return
        self.length = int(lengths.max())
        self.lengths = None if bool((lengths == self.length).all()) else lengths
