"""The transformer: embedding, blocks of attention and feed-forward, norm, head (V3 section 2).

Pre-norm blocks; the first n_dense_layers have a dense feed-forward layer, the rest experts; the
head is not tied to the embedding. Nothing in a forward pass changes the model, so recomputing a
block counts no token twice and evaluation moves no bias: the trainer passes the loads it saw to
`update_gate_bias`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.kernels import few_tokens, few_tokens_gpu
from minids.kernels.registry import bodies
from minids.model.cache import LatentCache
from minids.model.initial import initial_weights
from minids.model.layers import MLP, Linear, RMSNorm
from minids.model.mla import MLA, Context, causal
from minids.model.moe import MoE, Routing, update_bias
from minids.model.mtp import MTPModule
from minids.model.objective import objective
from minids.model.rope import rotations


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.layer = layer
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = MLA(args, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.is_moe = args.is_moe_layer(layer)
        self.ffn = MoE(args) if self.is_moe else MLP(args.dim, args.inter_dim)

    @bodies(few_tokens.folded_block, few_tokens_gpu.joined_block)
    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routing | None, Tensor | None]:
        """x: (B, S, D) -> (B, S, D), the routing of a MoE layer, the loss of a learning indexer"""
        attended, indexer_loss = self.attn(self.attn_norm(x), context)
        x = x + attended
        if not self.is_moe:
            return x + self.ffn(self.ffn_norm(x)), None, indexer_loss
        routes = None if context.routes is None else context.routes[self.layer]
        y, routing = self.ffn(self.ffn_norm(x), routes)
        return x + y, routing, indexer_loss


class Hidden(NamedTuple):
    """The output of the layers: states (B, S, D), which the head reads, the routing of each MoE
    layer, and the loss of each indexer that learns, nats per query."""

    states: Tensor
    routings: list[Routing]
    indexer: list[Tensor]


class Transformer(nn.Module):
    """A model of the DeepSeek family.

    >>> model = Transformer(ModelArgs.preset("nano"))
    >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 4096])
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = Linear(args.dim, args.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(args, Block(args, args.n_layers + k))
                                 for k in range(args.n_mtp_layers))
        initialise(self)

    def forward(self, tokens: Tensor, cache: LatentCache | None = None,
                absorbed: bool = False) -> Tensor:
        """Return the logits of the next token.

        tokens: (B, S) int64
        cache: latents of earlier tokens, which S more are added to
        absorbed: the form of attention, see `minids.model.mla`
        Returns (B, S, vocab_size). Raises ValueError for more tokens than fit.
        """
        return self.head(self.hidden(tokens, cache, absorbed).states)

    def hidden(self, tokens: Tensor, cache: LatentCache | None = None, absorbed: bool = False,
               indexer_stage: str = "", samples: Tensor | None = None,
               routes: dict[int, Tensor] | None = None) -> Hidden:
        """Run the layers and the final norm.

        samples: as in `Packed`; indexer_stage, routes: as in `Context`; the rest as for `forward`
        """
        context = self.context(tokens, cache, absorbed, indexer_stage, samples, routes)
        x, routings, indexer = self.embed(tokens), [], []  # (B, S, D)
        for layer in self.layers:
            x, routing, loss = layer(x, context)
            routings += [routing] if routing is not None else []
            indexer += [loss] if loss is not None else []
        if cache is not None:
            cache.advance(tokens.size(1))
        return Hidden(self.norm(x), routings, indexer)

    def context(self, tokens: Tensor, cache: LatentCache | None = None, absorbed: bool = False,
                indexer_stage: str = "", samples: Tensor | None = None,
                routes: dict[int, Tensor] | None = None) -> Context:
        """Return the positions and visible keys of the tokens, given what the cache holds."""
        count, limit = tokens.size(1), self.args.max_seq_len
        end = count if cache is None else cache.length + count
        room = limit if cache is None else min(limit, cache.length + cache.room)
        if end > room:
            raise ValueError(f"{end} tokens are too many: this model and cache hold {room}")
        visible = None
        if cache is not None:
            rotation, visible = cache.look(count)
        elif samples is not None:
            rotation = rotations(positions_in(samples), self.args)
            visible = same_sample(samples)
        else:
            rotation = rotations(torch.arange(count, device=tokens.device)[None], self.args)
        return Context(rotation, visible, cache, absorbed, indexer_stage, routes)

    loss = objective  # of training: (tokens, targets, ..) -> Losses

    def blocks(self) -> list[Block]:
        """Return the layers' blocks, then the MTP modules': the order of `Losses.loads`."""
        return [*self.layers, *(module.block for module in self.mtp)]

    def gate_biases(self) -> list[Tensor]:
        """Return the selection biases, in the order of `Losses.loads`."""
        return [b.ffn.gate.bias for b in self.blocks() if b.is_moe and b.ffn.gate.bias is not None]

    @torch.no_grad()
    def update_gate_bias(self, loads: Tensor, speed: float) -> None:
        """Move the selection biases against the loads of one optimizer step (V3 section 2.1.2).

        loads: (n MoE layers, E), summed over micro-batches and ranks; those of MTP modules that
            were left out of the loss may be missing at the end
        """
        for bias, load in zip(self.gate_biases(), loads, strict=False):
            update_bias(bias, load, speed)


def positions_in(samples: Tensor) -> Tensor:
    """Return each token's position in its own sample: [[7, 7, 7, 8, 8]] gives [[0, 1, 2, 0, 1]]."""
    at = torch.arange(samples.size(1), device=samples.device).expand_as(samples)
    begins = F.pad(samples[:, 1:] != samples[:, :-1], (1, 0), value=True)  # (B, S)
    return at - torch.where(begins, at, 0).cummax(dim=1).values


def same_sample(samples: Tensor) -> Tensor:
    """Return (B, S, S) bool: a query sees the keys of its own sample up to itself."""
    same = samples[:, :, None] == samples[:, None, :]
    return same & causal(samples.size(1), samples.size(1), samples.device)


@torch.no_grad()
def initialise(model: Transformer) -> None:
    """Fill a model with its `initial_weights`; one on "meta" has none."""
    named = dict(model.named_parameters())
    if model.embed.weight.is_meta:
        return
    shapes = {name: p.shape for name, p in named.items()}
    for name, read in initial_weights(shapes, model.args.init_std, torch.get_num_threads()):
        named[name].copy_(read(tuple(map(slice, shapes[name]))))
