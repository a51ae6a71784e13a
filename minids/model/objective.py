"""The training objective (V3 sections 2.1.2, 2.2 and 4.2; V3.2 section 2.1.1).

    total = main + mtp_weight mtp + balance_weight balance + indexer_weight indexer
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels import cross_entropy
from minids.kernels.registry import bodies
from minids.model.moe import BALANCE_LOSSES, Routing


class Losses(NamedTuple):
    """The parts of the objective, scalars.

    total: their weighted sum, as above
    main: mean cross-entropy of the next token, nats
    mtp: the mean over depths of the multi-token prediction losses, nats
    balance: the balance losses of all MoE layers, added up; each is 1 when balanced
    indexer: how far the indexers are from attention, nats per query, added up over the layers and
        MTP modules; 0 where they do not learn
    loads: (n MoE layers, E) int64, tokens sent to each expert; MTP modules come last
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    loads: Tensor


class Packed(NamedTuple):
    """Samples side by side in a batch's sequences, which do not see each other (V3 section 5.1).

    samples: (B, S) int64, which sample each token belongs to; those of one stand together
    loss_mask: (B, S) bool, whether a token's target counts in the loss
    """

    samples: Tensor
    loss_mask: Tensor


def objective(model, tokens: Tensor, targets: Tensor, mtp_weight: float, balance_weight: float,
              balance_loss: str, dsa: str, indexer_weight: float, packed: Packed | None,
              routes: dict[int, Tensor] | None) -> Losses:
    """Return the losses of a batch; the arguments are those of `Transformer.loss`."""
    samples = None if packed is None else packed.samples
    hidden, routings, indexer = model.hidden(tokens, indexer_stage=dsa, samples=samples,
                                             routes=routes)
    main = prediction_loss(model, hidden, targets, packed)
    mtp = main.new_zeros(())
    if mtp_weight > 0 and model.mtp:
        mtp, more_routings, more_indexer = mtp_loss(model, hidden, targets, packed, dsa, routes)
        routings, indexer = routings + more_routings, indexer + more_indexer
    balance = main.new_zeros(())
    for routing in routings:
        balance = balance + BALANCE_LOSSES[balance_loss](routing, model.args)
    loads = [routing.load() for routing in routings]
    loads = torch.stack(loads) if loads else targets.new_zeros(0, model.args.n_routed_experts)
    indexer = sum(indexer, main.new_zeros(()))
    total = main + mtp_weight * mtp + balance_weight * balance + indexer_weight * indexer
    return Losses(total, main, mtp, balance, indexer, loads)


def prediction_loss(model, hidden: Tensor, targets: Tensor, packed: Packed | None,
                    depth: int = 0) -> Tensor:
    """Return the cross-entropy of the targets `depth` tokens further on, over those that count.

    hidden: (B, S - depth, D); targets: (B, S) int64
    """
    states, wanted, count = hidden, targets[:, depth:], targets.numel()
    if packed is not None:
        same = packed.samples[:, depth:] == packed.samples[:, :targets.size(1) - depth]
        counts = packed.loss_mask[:, depth:] & same  # (B, S - depth)
        states, wanted = hidden[counts], wanted[counts]
        count = max(int(packed.loss_mask.sum()), 1)
    return linear_cross_entropy(states, model.head.weight, wanted, count)


def mtp_loss(model, hidden: Tensor, targets: Tensor, packed: Packed | None = None, dsa: str = "",
             routes: dict[int, Tensor] | None = None,
             ) -> tuple[Tensor, list[Routing], list[Tensor]]:
    """Return the mean over depths of V3's equation 24, and what the modules' blocks found.

    Depth k has T - k predictions and divides their sum by T. Position i of `targets` is token
    i+1, so depth k embeds targets[k-1:] and predicts targets[k:]:

        tokens    a b c d    hidden of a, b, c with
        targets   b c d e    embedding of b, c, d at depth 1 predicts c, d, e
    """
    total, routings, indexer = hidden.new_zeros((), dtype=torch.float32), [], []
    for k, module in enumerate(model.mtp, start=1):
        embedding = model.embed(targets[:, k - 1:-1])  # (B, S-k, D)
        samples = None if packed is None else packed.samples[:, :-k]
        shorter = routes and {layer: r[:, :-k] for layer, r in routes.items()}
        context = model.context(targets[:, k:], samples=samples, indexer_stage=dsa, routes=shorter)
        hidden, routing, loss = module(hidden[:, :-1], embedding, context)
        total = total + prediction_loss(model, hidden, targets, packed, depth=k)
        routings += [routing] if routing else []
        indexer += [loss] if loss is not None else []
    return total / len(model.mtp), routings, indexer


@bodies(cross_entropy.chunked)
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
    """Return the sum of -log softmax(x W^T)[target], divided by `count`, in FP32 or wider.

    x: (.., D); weight: (vocab_size, D); targets: (..) int64
    """
    logits = F.linear(x, weight).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), reduction="sum") / count
