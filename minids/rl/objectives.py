"""The GRPO objective and its variants."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minids.base.fields import Settings, option, require

OBJECTIVES = {
    "r1": dict(clip_low=10.0, clip_high=10.0, reference_every=400),
    "deepseekmath": dict(clip_low=0.2, clip_high=0.2, kl_beta=0.04),
    "v3.2": dict(advantage="mean", kl="unbiased", off_policy_delta=0.1, length_weight=0.1,
                 clip_low=0.2, clip_high=0.2),
    "speciale": dict(advantage="mean", kl="unbiased", off_policy_delta=0.1, length_weight=0.01,
                     clip_low=0.2, clip_high=0.2),
    "dapo": dict(clip_low=0.2, clip_high=0.28, normalise="tokens", kl_beta=0.0),
    "dr-grpo": dict(advantage="mean", clip_low=0.2, clip_high=0.2, normalise="constant",
                    kl_beta=0.0),
}


@dataclass(frozen=True)
class ObjectiveArgs(Settings):
    """The settings of the loss."""

    objective: str = option("r1", "the loss's settings by name", tuple(OBJECTIVES))
    advantage: str = option("std", "reward less the group's mean (mean), over its standard"
                                   " deviation (std)", ("std", "mean"))
    clip_low: float = option(0.2, "the ratio counts down to 1 - clip_low", low=0)
    clip_high: float = option(0.2, "the ratio counts up to 1 + clip_high", low=0)
    clip_both: float = option(0.0, "largest ratio of a bad reply too, above 1; 0: none", low=0)
    kl: str = option("k3", "estimator of the KL, or the same times the ratio",
                     ("k3", "unbiased"))
    kl_beta: float = option(0.02, "weight of the KL; 0: no reference model", low=0)
    off_policy_delta: float = option(0.0, "leave out a bad reply whose mean log(pi_old / pi) is"
                                          " above this, nats; 0: none", low=0)
    normalise: str = option("sequence", "what a token's loss is divided by: its reply's length and"
                                        " their number, all tokens, or the longest length",
                            ("sequence", "tokens", "constant"))

    def __post_init__(self):
        super().__post_init__()
        require(self, "clip_both", self.clip_both == 0 or self.clip_both > 1, "0, or above 1")


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """How much better than its group each reply is: (Q, G) -> (Q, G)

    kind: "mean", R - mean R (V3.2 section 3.1), or "std", the same over the group's standard
        deviation (DeepSeekMath section 4.1.2). Exactly 0 where all rewards of a group are equal.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "std":
        centred = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    alike = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return centred.masked_fill(alike, 0.0)


class Objective(NamedTuple):
    """The loss of some tokens, and what one wants to know about them.

    loss: scalar, with gradient; kl: mean over tokens, nats; clipped, left_out: shares of tokens
    """

    loss: Tensor
    kl: float
    clipped: float
    left_out: float


def objective(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantage: Tensor,
              reply: Tensor, weight: Tensor, args: ObjectiveArgs) -> Objective:
    """The GRPO loss of M tokens, see the head of this file.

    logp: (M,) log pi, with gradient; old_logp: (M,) what it was drawn with
    ref_logp: (M,) log pi_ref; None without KL
    advantage: (M,) that of the token's reply; reply: (M,) int64, which reply it is of
    weight: (M,) of each token in the sum, see `token_weights`
    """
    ratio = (logp - old_logp).exp()  # (M,)
    bounded = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = (ratio * advantage > bounded * advantage)
    if args.clip_both:
        limit = torch.where(advantage < 0, args.clip_both * advantage, -math.inf)
        clipped, gain = clipped | (gain < limit), torch.maximum(gain, limit)
    on_policy = torch.ones_like(logp)
    if args.off_policy_delta:
        drift = mean_by_reply((old_logp - logp).detach(), reply)  # (M,)
        on_policy = 1.0 - ((advantage < 0) & (drift > args.off_policy_delta)).to(logp)
    loss = -on_policy * gain
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        further = ref_logp - logp
        kl = further.exp() - further - 1
        loss = loss + args.kl_beta * (kl * ratio if args.kl == "unbiased" else kl)
    return Objective((weight * loss).sum(), kl.mean().item(), clipped.float().mean().item(),
                     1 - on_policy.mean().item())


def mean_by_reply(values: Tensor, reply: Tensor) -> Tensor:
    """The mean over a token's reply, at each token: (M,), (M,) -> (M,)"""
    sums = torch.zeros(int(reply.max()) + 1, 2, dtype=values.dtype, device=values.device)
    sums.index_add_(0, reply, torch.stack([values, torch.ones_like(values)], dim=1))
    return (sums[:, 0] / sums[:, 1].clamp(min=1))[reply]


def token_weights(lengths: Tensor, normalise: str, longest: int) -> Tensor:
    """What a token of each of B replies weighs in the loss: (B,) -> (B,)

    lengths: tokens of each reply; longest: what a reply may have at most
    normalise: "sequence", 1 / (B length): every reply weighs the same (DeepSeekMath); "tokens",
        one over all tokens (DAPO); "constant", 1 / (B longest) (Dr. GRPO)
    """
    batch = len(lengths)
    return {"sequence": 1.0 / (batch * lengths.clamp(min=1)),
            "tokens": torch.ones_like(lengths, dtype=torch.float32) / lengths.sum().clamp(min=1),
            "constant": torch.full_like(lengths, 1.0 / (batch * longest), dtype=torch.float32),
            }[normalise]
