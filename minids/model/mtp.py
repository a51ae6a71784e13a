"""Multi-token prediction (V3 section 2.2, equations 21 to 25).

Module k reads, at position i, the hidden state of depth k-1 and the embedding of token i+k, and
predicts token i+k+1 through the main model's own head: the causal chain is kept at every depth.

The concatenation is [enorm(embedding) ; hnorm(hidden)], the order of the released weights (the
paper writes it the other way round). The first module reads the hidden state after the model's
final norm, as the serving engines do; the paper leaves this open.
"""

import torch
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.model.layers import Linear, RMSNorm


class MTPModule(nn.Module):
    """One prediction depth: join, a block of the model's kind, norm. The head is the model's."""

    def __init__(self, args: ModelArgs, block: nn.Module):
        super().__init__()
        self.enorm = RMSNorm(args.dim, args.norm_eps)
        self.hnorm = RMSNorm(args.dim, args.norm_eps)
        self.eh_proj = Linear(2 * args.dim, args.dim)
        self.block = block
        self.norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, hidden: Tensor, embedding: Tensor, context) -> tuple:
        """Go one depth further.

        hidden: (B, S, D), of depth k-1 at positions i; embedding: (B, S, D), of tokens i+k
        Returns the hidden state that the head reads for token i+k+1, (B, S, D), and what the block
        found: its routing and its indexer's loss.
        """
        joined = torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)  # (B, S, 2 D)
        x, *found = self.block(self.eh_proj(joined), context)
        return self.norm(x), *found
