"""The GRPO objective and its variants, for tokens that a sampler drew.

A reply's advantage A is its reward less the mean reward of its group: no critic is trained. The
loss of token t of reply i is

    -M_i min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) + beta KL_t,
    r_t = pi(o_t) / pi_old(o_t)

where pi_old is the distribution that the sampler drew from, KL compares pi with a reference model
by the estimator k3 = pi_ref/pi - log(pi_ref/pi) - 1 (DeepSeekMath, arXiv 2402.03300, section 4.1),
and M is 1. OBJECTIVES has the variants of the papers.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minids.base.fields import Settings, option, require

# What differs from the defaults of ObjectiveArgs; of GrpoArgs where it is the reward or reference.
OBJECTIVES = {
    # R1 and V3 (Nature 645:633, Methods)
    "r1": dict(clip_low=10.0, clip_high=10.0, reference_every=400),
    # arXiv 2402.03300
    "deepseekmath": dict(kl_beta=0.04),
    # A without the standard deviation; KL times r, which makes its gradient unbiased; M is 0 for a
    # bad reply that the policy has moved away from; a length penalty (arXiv 2512.02556, 3.1)
    "v3.2": dict(advantage="mean", kl="unbiased", off_policy_delta=0.1, length_weight=0.1),
    # V3.2 with a weaker length penalty; the paper does not say how weak
    "speciale": dict(advantage="mean", kl="unbiased", off_policy_delta=0.1, length_weight=0.01),
    # a higher upper clip, the same weight for every token of the batch, no KL (arXiv 2503.14476)
    "dapo": dict(clip_high=0.28, normalise="tokens", kl_beta=0.0),
    # no standard deviation; a constant instead of the reply's length (arXiv 2503.20783)
    "dr-grpo": dict(advantage="mean", normalise="constant", kl_beta=0.0),
}


@dataclass(frozen=True)
class ObjectiveArgs(Settings):
    """The settings of the loss."""

    objective: str = option("r1", "variant of the loss; other flags override it", tuple(OBJECTIVES))
    advantage: str = option("std", "reward less the group's mean (mean), over its standard"
                                   " deviation (std)", ("std", "mean"))
    clip_low: float = option(0.2, "the ratio counts down to 1 - clip_low", low=0)
    clip_high: float = option(0.2, "the ratio counts up to 1 + clip_high", low=0)
    clip_both: float = option(0.0, "largest ratio of a bad reply too, above 1; 0: none", low=0)
    kl: str = option("k3", "estimator of the KL: k3, or k3 times the ratio", ("k3", "unbiased"))
    kl_beta: float = option(0.02, "weight of the KL; 0: no reference model", low=0)
    off_policy_delta: float = option(0.0, "leave out a bad reply whose mean log(pi_old / pi) is"
                                          " above this, nats; 0: none", low=0)
    normalise: str = option("sequence", "divide a token's loss by its reply's length and the number"
                                        " of replies, by the number of tokens, or by the longest"
                                        " length", ("sequence", "tokens", "constant"))
    mask_truncated: bool = option(False, "leave replies that ran into max_new_tokens out of the"
                                         " loss: DAPO's overlong filtering")

    def __post_init__(self):
        super().__post_init__()
        require(self, "clip_both", self.clip_both == 0 or self.clip_both > 1, "0, or above 1")


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """Return how much better each reply is than its group.

    rewards: (Q, G), one row per question
    kind: "mean", R - mean R (V3.2 section 3.1), or "std", the same over the group's standard
        deviation (DeepSeekMath section 4.1.2)
    Returns (Q, G), exactly 0 where all rewards of a group are equal.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "std":
        centred = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    alike = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return centred.masked_fill(alike, 0.0)


class Objective(NamedTuple):
    """The loss, a scalar with gradient; the mean KL per token, nats; the shares of tokens whose
    ratio was clipped, and whose reply was left out as off-policy."""

    loss: Tensor
    kl: float
    clipped: float
    left_out: float


def objective(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantage: Tensor,
              reply: Tensor, weight: Tensor, args: ObjectiveArgs) -> Objective:
    """Return the GRPO loss of M tokens.

    logp: (M,) log pi, with gradient; old_logp: (M,) log pi_old
    ref_logp: (M,) log pi_ref; None for no KL
    advantage: (M,) and reply: (M,) int64, those of the reply that the token belongs to
    weight: (M,) the token's weight in the sum, see `token_weights`
    """
    ratio = (logp - old_logp).exp()  # (M,)
    bounded = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = ratio * advantage > bounded * advantage
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
        log_ratio = ref_logp - logp
        kl = log_ratio.exp() - log_ratio - 1
        loss = loss + args.kl_beta * (kl * ratio if args.kl == "unbiased" else kl)
    return Objective((weight * loss).sum(), kl.mean().item(), clipped.float().mean().item(),
                     1 - on_policy.mean().item())


def mean_by_reply(values: Tensor, reply: Tensor) -> Tensor:
    """Return, for each token, the mean over its reply: (M,), (M,) -> (M,)"""
    return (reply.bincount(values) / reply.bincount().clamp(min=1))[reply]


def token_weights(lengths: Tensor, normalise: str, longest: int, kept: Tensor | None = None
                  ) -> Tensor:
    """Return the weight in the loss of a token of each reply: (B,) -> (B,)

    lengths: (B,) tokens of each reply; longest: maximum length, tokens
    normalise: "sequence", 1 / (B length): each reply has the same weight (DeepSeekMath); "tokens",
        1 / (all tokens) (DAPO); "constant", 1 / (B longest) (Dr. GRPO)
    kept: (B,) bool, the replies in the loss; None: all. The others weigh 0, and neither they nor
        their tokens are counted, except in the constant
    """
    kept = torch.ones_like(lengths, dtype=torch.bool) if kept is None else kept
    batch, tokens = kept.sum().clamp(min=1), (lengths * kept).sum().clamp(min=1)
    return kept * {
        "sequence": 1.0 / (batch * lengths.clamp(min=1)),
        "tokens": torch.ones_like(lengths, dtype=torch.float32) / tokens,
        "constant": torch.full_like(lengths, 1.0 / (len(lengths) * longest), dtype=torch.float32),
    }[normalise]
