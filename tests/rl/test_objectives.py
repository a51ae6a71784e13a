"""The GRPO loss worked out on paper, and advantages whose zeros are exact."""

import math
from statistics import fmean, pstdev

import pytest
import torch

from minids.rl.objectives import (
    ObjectiveArgs,
    advantages,
    mean_by_reply,
    objective,
    token_weights,
)

# Four replies to one question, with rewards 1, 0, 1, 0, of 1, 2, 1 and 2 tokens.
REPLY = torch.tensor([0, 1, 1, 2, 3, 3])
RATIO = torch.tensor([1.5, 0.5, 1.0, 1.1, 2.0, 1.0], dtype=torch.float64)
ADVANTAGE = torch.tensor([0.5, -0.5, -0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 1, 2])


def paper_args(**changed) -> ObjectiveArgs:
    paper = dict(advantage="mean", clip_low=0.2, clip_high=0.2, kl_beta=0.1)
    return ObjectiveArgs(**paper | changed)


def paper_loss(ref: torch.Tensor | None = None, longest: int = 4, **changed):
    args = paper_args(**changed)
    weight = token_weights(LENGTHS, args.normalise, longest).double()[REPLY]
    return objective(RATIO.log(), torch.zeros(6, dtype=torch.float64), ref, ADVANTAGE, REPLY,
                     weight, args)


# min(r A, clip(r) A) of each token, with r clipped to 0.8 .. 1.2:
#     0.6 | -0.4  -0.5 | 0.55 | -1.0  -0.5
# The replies' means: 0.6, -0.45, 0.55, -0.75; their mean: -0.0125. The sum: -1.25.
@pytest.mark.parametrize("normalise, loss", [
    ("sequence", 0.0125),          # DeepSeekMath: the mean of the means, negated
    ("tokens", 1.25 / 6),          # DAPO: over six tokens
    ("constant", 1.25 / 16)])      # Dr. GRPO: over four replies of four tokens at most
def test_the_loss_of_four_replies_is_the_one_on_paper(normalise, loss):
    # 1/6 in FP32
    assert paper_loss(normalise=normalise).loss.item() == pytest.approx(loss, abs=1e-7)


def test_kl_of_four_replies_is_the_one_on_paper():
    """The first token is twice as likely under the reference: k3 = 2 - log 2 - 1, in one of four
    replies; times the ratio, 1.5 times that."""
    ref = RATIO.log() + torch.tensor([math.log(2), 0, 0, 0, 0, 0], dtype=torch.float64)
    k3 = 1 - math.log(2)
    assert paper_loss(ref).loss.item() == pytest.approx(0.0125 + 0.1 * k3 / 4, abs=1e-12)
    unbiased = paper_loss(ref, kl="unbiased").loss.item()
    assert unbiased == pytest.approx(0.0125 + 0.1 * 1.5 * k3 / 4, abs=1e-12)
    assert paper_loss(ref).kl == pytest.approx(k3 / 6, abs=1e-12)


def test_bounds_on_paper():
    """Two of six tokens are clipped: the first, and the second, whose ratio is below 0.8."""
    assert paper_loss().clipped == pytest.approx(2 / 6)
    # R1's 10 lets all through: -(0.75 - (0.25 + 0.5) / 2 + 0.55 - (1.0 + 0.5) / 2) / 4
    assert paper_loss(clip_low=10.0, clip_high=10.0).loss.item() == pytest.approx(-0.04375)
    with pytest.raises(ValueError, match="clip_both = 1.0 is not valid"):
        paper_args(clip_both=1.0)
    # A bad reply's ratio of 2 counts as 1.5 only: -1.0 becomes -0.75.
    assert paper_loss(clip_both=1.5).loss.item() == pytest.approx((-0.6 + 0.45 - 0.55 + 0.625) / 4)


def test_replies_left_behind_count_no_more():
    """Bad replies' mean log(old / new): log 2 / 2 and -log 2 / 2. Only the first is above 0.3:
    its -0.45 is left out, its KL is not."""
    found = paper_loss(off_policy_delta=0.3)
    assert found.loss.item() == pytest.approx(-(0.6 + 0.55 - 0.75) / 4)
    assert found.left_out == pytest.approx(2 / 6)
    ref = RATIO.log() + torch.tensor([0, math.log(2), 0, 0, 0, 0], dtype=torch.float64)
    more = paper_loss(ref, off_policy_delta=0.3).loss - found.loss
    assert more.item() == pytest.approx(0.1 * (1 - math.log(2)) / 2 / 4)


# Two replies of two tokens that end, and two that ran into a maximum of four.
ENDED = torch.tensor([True, False, True, False])
CUT_LENGTHS = torch.tensor([2, 4, 2, 4])
CUT_REPLY = torch.arange(4).repeat_interleave(CUT_LENGTHS)


@pytest.mark.parametrize("normalise, weight", [
    ("sequence", 1 / (2 * 2)),     # two replies are left, of two tokens each
    ("tokens", 1 / 4),             # four tokens are left
    ("constant", 1 / (4 * 4))])    # whatever is left
def test_truncated_replies_weigh_nothing_and_are_not_counted(normalise, weight):
    found = token_weights(CUT_LENGTHS, normalise, 4, ENDED)
    assert found.tolist() == [weight, 0, weight, 0]
    if normalise != "constant":  # wrong variant: masked after normalising
        assert (token_weights(CUT_LENGTHS, normalise, 4) * ENDED).tolist() != found.tolist()
    assert token_weights(CUT_LENGTHS, normalise, 4, ~ENDED ^ ENDED).tolist() == \
        token_weights(CUT_LENGTHS, normalise, 4).tolist()
    assert token_weights(CUT_LENGTHS, normalise, 4, ENDED & ~ENDED).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("normalise, weight", [("sequence", 1 / 4), ("tokens", 1 / 4),
                                               ("constant", 1 / 16)])
def test_the_gradient_without_truncated_replies_is_the_one_on_paper(normalise, weight):
    """FP64. Of an unclipped token it is weight (-A r + beta (1 - pi_ref / pi)); the advantage is
    over the whole group. Rewards 1, 0, 0, 1: mean 1/2."""
    ratio = torch.tensor([1.1, 0.9] + [1.3] * 4 + [0.95, 1.0] + [0.7] * 4, dtype=torch.float64)
    to_ref = torch.linspace(-1, 1, 12, dtype=torch.float64)  # log (pi_ref / pi)
    advantage = torch.tensor([0.5, -0.5, -0.5, 0.5], dtype=torch.float64)[CUT_REPLY]
    logp = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    weights = token_weights(CUT_LENGTHS, normalise, 4, ENDED).double()[CUT_REPLY]
    objective(logp, -ratio.log(), to_ref, advantage, CUT_REPLY, weights,
              paper_args()).loss.backward()
    expected = [weight * (-a * r + 0.1 * (1 - math.exp(d))) for a, r, d in
                zip([0.5, 0.5, -0.5, -0.5], [1.1, 0.9, 0.95, 1.0], to_ref[[0, 1, 6, 7]].tolist(),
                    strict=True)]
    assert logp.grad[[0, 1, 6, 7]].tolist() == pytest.approx(expected, rel=1e-12)
    assert logp.grad[[2, 3, 4, 5, 8, 9, 10, 11]].eq(0).all()


def test_mean_by_reply():
    values = torch.tensor([1.0, 2.0, 4.0, 5.0, 7.0, 9.0])
    assert mean_by_reply(values, REPLY).tolist() == [1, 3, 3, 5, 8, 8]


def test_the_gradient_of_a_fresh_rollout_is_the_policy_gradient():
    """At ratio 1 nothing is clipped, and the gradient is -weight A d log pi."""
    logp = torch.randn(6, dtype=torch.float64, requires_grad=True)
    weight = token_weights(LENGTHS, "sequence", 4).double()[REPLY]
    objective(logp, logp.detach(), None, ADVANTAGE, REPLY, weight, paper_args()).loss.backward()
    torch.testing.assert_close(logp.grad, -weight * ADVANTAGE, rtol=1e-12, atol=0)


def test_unbiased_kl_has_the_gradient_of_the_kl():
    """The mean of each estimator's gradient over a whole distribution, drawn from an old one: with
    the ratio it is the gradient of KL(pi, ref); without it is not (V3.2 section 3.1)."""
    torch.manual_seed(0)
    logits, old, ref = (torch.randn(7, dtype=torch.float64) for _ in range(3))

    def estimate(kind: str) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(-1)
        args = paper_args(kl=kind, kl_beta=1.0)
        objective(logp, old.log_softmax(-1), ref.log_softmax(-1), torch.zeros(7), torch.arange(7),
                  old.softmax(-1), args).loss.backward()
        return leaf.grad

    leaf = logits.clone().requires_grad_()
    p = leaf.log_softmax(-1)
    (p.exp() * (p - ref.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(estimate("unbiased"), leaf.grad, rtol=1e-9, atol=1e-12)
    assert (estimate("k3") - leaf.grad).abs().max() > 0.01


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.float64)
    assert advantages(rewards, "mean").tolist() == [[0.5, -0.5, -0.5, 0.5],
                                                    [-0.25, -0.25, -0.25, 0.75]]
    by_std = advantages(rewards, "std")
    for row, group in zip(by_std.tolist(), rewards.tolist(), strict=True):
        expected = [(r - fmean(group)) / (pstdev(group) + 1e-6) for r in group]
        assert row == pytest.approx(expected)
    # Wrong variant: over the whole batch a group of equal rewards has a signal.
    batch = torch.cat([rewards[:1], torch.zeros(1, 4)])
    assert advantages(batch, "std")[1].eq(0).all()
    assert ((batch - batch.mean()) / batch.std())[1].ne(0).all()


@pytest.mark.parametrize("kind", ["mean", "std"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1.1, 0.7])
def test_equal_rewards_have_exactly_no_advantage(kind, reward):
    for group in (3, 7, 16):
        assert advantages(torch.full((2, group), reward), kind).eq(0).all()


def test_rounding_would_give_equal_rewards_an_advantage():
    """Wrong variant: the mean of equal numbers need not be that number."""
    rewards = torch.full((1, 7), 0.1)
    naive = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    found = [torch.full((1, n), x) for n in (3, 7, 11, 13) for x in (0.1, 1 / 3, 1.1, 0.7)]
    assert any((r - r.mean()).ne(0).any() for r in found) or naive.ne(0).any()
