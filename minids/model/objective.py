"""The training objective (V3 sections 2.1.2, 2.2 and 4.2; V3.2 section 2.1.1).

    total = main + mtp_weight mtp + balance_weight balance + indexer_weight indexer
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels import cross_entropy
from minids.kernels.registry import bodies
from minids.model.moe import BALANCE_LOSSES


class Losses(NamedTuple):
    """The parts of the objective, scalars, and where the tokens went."""

    total: Tensor
    main: Tensor  # mean cross-entropy of the next token, nats
    mtp: Tensor  # mean over depths of the multi-token prediction losses, nats
    balance: Tensor  # of all MoE layers, added up; each is 1 when balanced
    indexer: Tensor  # distance of indexers from attention, nats per query, added up; 0: none learns
    loads: Tensor  # (n MoE layers, E) int64, tokens sent to each expert; MTP modules come last


class Packed(NamedTuple):
    """Samples side by side in a batch's sequences, which do not see each other (V3 section 5.1)."""

    samples: Tensor  # (B, S) int64, which sample each token belongs to; those of one stand together
    loss_mask: Tensor  # (B, S) bool, whether a token's target counts in the loss


def objective(model, tokens: Tensor, targets: Tensor, mtp_weight: float = 0.3,
              balance_weight: float = 1e-4, balance_loss: str = "sequence", dsa: str = "",
              indexer_weight: float = 1.0, packed: Packed | None = None,
              routes: dict[int, Tensor] | None = None) -> Losses:
    """Return the losses of a batch: `Transformer.loss`.

    tokens: (B, S) int64; targets: (B, S) int64, the token after each
    mtp_weight: lambda of V3 equation 25; 0 leaves the MTP modules out
    balance_weight: alpha of V3 equation 17; balance_loss: "sequence", V3's, or "expert", V2's
    dsa: how the indexers learn: "warmup", with dense attention, "sparse", or "", not at all
    indexer_weight: a factor on their loss
    packed: samples that do not see each other, and what of them counts; None: all is one text
    routes: by layer, the experts to take, (B, S, K) int64; None: gates choose
    """
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
    """Return the cross-entropy of the targets `depth` tokens further on, over those that count."""
    states, wanted, count = hidden, targets[:, depth:], targets.numel()  # (B, S - depth, ..)
    if packed is not None:
        same = packed.samples[:, depth:] == packed.samples[:, :targets.size(1) - depth]
        counts = packed.loss_mask[:, depth:] & same  # (B, S - depth)
        states, wanted = hidden[counts], wanted[counts]
        count = max(int(packed.loss_mask.sum()), 1)
    return linear_cross_entropy(states, model.head.weight, wanted, count)


def mtp_loss(model, hidden: Tensor, targets: Tensor, packed: Packed | None = None, dsa: str = "",
             routes: dict[int, Tensor] | None = None) -> tuple[Tensor, list, list]:
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


@bodies(cross_entropy.chunked_on_gpu, cross_entropy.chunked)
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
    """Return the sum of -log softmax(x W^T)[target], divided by `count`, in FP32 or wider.

    x: (.., D); weight: (vocab_size, D); targets: (..) int64
    """
    logits = F.linear(x, weight).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), reduction="sum") / count
