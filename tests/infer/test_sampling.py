"""Draws against the distribution that they should have, with drafts and without."""

import pytest
import torch
from torch import Tensor

from minids.infer.sampling import Sampler

PROBABILITIES = [0.4, 0.25, 0.2, 0.1, 0.05]


def rescaled(kept: list[float], temperature: float = 1.0) -> list[float]:
    """p^(1/temperature) of those that are kept, adding up to one."""
    powers = [p ** (1 / temperature) for p in kept] + [0.0] * (len(PROBABILITIES) - len(kept))
    return [p / sum(powers) for p in powers]


CUTS = {
    "all": (dict(), rescaled(PROBABILITIES)),
    "cool": (dict(temperature=0.5), rescaled(PROBABILITIES, 0.5)),
    "top 2": (dict(top_k=2), rescaled(PROBABILITIES[:2])),
    "top 9 of 5": (dict(top_k=9), rescaled(PROBABILITIES)),
    "nucleus 0.7": (dict(top_p=0.7), rescaled(PROBABILITIES[:3])),
    "nucleus 0.64": (dict(top_p=0.64), rescaled(PROBABILITIES[:2])),
    "top 3, nucleus 0.7": (dict(top_k=3, top_p=0.7), rescaled(PROBABILITIES[:2])),
    "tiny nucleus": (dict(top_p=1e-9), rescaled(PROBABILITIES[:1])),
}


def distance(cut: dict, expected: list[float], draws: int = 40_000) -> float:
    """Largest difference between how often a token is drawn and how often it should be."""
    order = torch.tensor([3, 0, 4, 2, 1])  # likeliest first is not the order of the ids
    logits = torch.empty(5).index_put_((order,), torch.tensor(PROBABILITIES).log()) + 7.0
    settings = dict(temperature=1.0, top_k=0, top_p=1.0) | cut
    generator = torch.Generator().manual_seed(0)
    drawn = Sampler(**settings, generator=generator).sample(logits.expand(draws, -1))
    share = drawn.bincount(minlength=5)[order] / draws
    return (share - torch.tensor(expected)).abs().max().item()


@pytest.mark.parametrize("name", CUTS)
def test_draws_follow_the_distribution(name):
    # A share of 40,000 draws has a standard deviation of at most 0.0025.
    assert distance(*CUTS[name]) < 0.01
    for other, (_, expected) in CUTS.items():  # a sampler that cuts otherwise would be seen
        if expected != CUTS[name][1]:
            assert distance(CUTS[name][0], expected) > 0.01, other


def test_temperature_zero_and_top_1_are_greedy():
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    assert torch.equal(Sampler().sample(logits), best)
    assert torch.equal(Sampler(5.0, 1).sample(logits), best)
    assert not torch.equal(Sampler(5.0, 2).sample(logits), best)
    assert torch.equal(Sampler().distribution(logits).argmax(-1), best)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-45, 1e-39, 1e-30, 9.9e-6])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = 30 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for cut in (dict(), dict(top_k=3), dict(top_p=0.9)):
        sampler = Sampler(temperature, **cut)
        assert torch.equal(sampler.sample(logits), logits.argmax(-1)) and sampler.cuts
        assert torch.equal(sampler.distribution(logits).argmax(-1), logits.argmax(-1))
        assert torch.equal(sampler.draw(sampler.distribution(logits)), logits.argmax(-1))
    assert not Sampler(1e-5).cuts  # not yet greedy, and finite
    assert torch.equal(Sampler(1e-5).sample(logits), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_the_hottest_draws_are_uniform_over_what_is_left(temperature):
    logits = torch.tensor([9.0, -9.0, float("-inf"), 0.0])
    third = torch.tensor([1, 1, 0, 1]) / 3
    torch.testing.assert_close(Sampler(temperature).distribution(logits), third)
    assert Sampler(temperature, 2).distribution(logits).count_nonzero() == 2


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-39, 1e-20])
def test_the_smallest_nucleus_is_one_token(top_p):
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(1.0, 0, top_p).sample(logits), logits.argmax(-1))


NO_LOGITS = {"one NaN": [0.0, float("nan"), 1.0, 2.0], "all NaN": [float("nan")] * 4,
             "nothing": [float("-inf")] * 4, "infinite": [0.0, float("inf"), 1.0, 2.0]}
SETTINGS = {"greedy": dict(), "cold": dict(temperature=1e-39), "all": dict(temperature=1.0),
            "top 2": dict(temperature=1.0, top_k=2), "nucleus": dict(temperature=1.0, top_p=0.5),
            "hot": dict(temperature=1e39), "both": dict(temperature=0.7, top_k=3, top_p=0.9)}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("logits", NO_LOGITS)
def test_what_is_no_distribution_draws_no_token(logits, how):
    """V, and nothing else changes: the rows beside it are drawn as ever."""
    sampler = Sampler(**SETTINGS[how])
    good = [0.0, 40.0, float("-inf"), 1.0]
    rows = torch.tensor([good, NO_LOGITS[logits], good, NO_LOGITS[logits]])
    if how != "hot":
        assert sampler.sample(rows).tolist() == [1, 4, 1, 4]
    probs = sampler.distribution(rows)
    assert (sampler.draw(probs) == 4).tolist() == [False, True, False, True]
    assert probs.isnan().any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("where, passed, token", [
    ("first p", 0, 3), ("second p", 1, 3), ("last p", 2, 3), ("first q", 0, 3), ("second q", 1, 3),
    ("nowhere", 2, 1)])
def test_verification_sees_what_is_no_distribution(where, passed, token):
    q = torch.eye(3)[[0, 2]][None]  # (1, D, V)
    p = torch.eye(3)[[0, 2, 1]][None]
    for name, place in dict(first=0, second=1, last=2).items():
        if where.startswith(name):
            (p if where.endswith("p") else q)[0, place] = float("nan")
    found = Sampler(1.0).verify(torch.tensor([[0, 2]]), q, p)
    assert [t.item() for t in found] == [passed, token]


@pytest.mark.parametrize("name", CUTS)
def test_a_distribution_adds_up_to_one_at_any_shape(name):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(**dict(temperature=1.0) | CUTS[name][0])
    probs = sampler.distribution(logits)
    assert (probs.sum(-1) - 1).abs().max() < 1e-6  # FP32
    assert torch.equal(probs[1, 2], sampler.distribution(logits[1, 2]))


def test_the_nucleus_ends_exactly_at_its_probability():
    """Four tokens of a quarter each, exact in binary: top_p = n/4 leaves n of them, not n + 1."""
    logits = torch.tensor([0.0, 0.0, float("-inf"), 0.0, 0.0])
    for n in (1, 2, 3):
        probs = Sampler(1.0, top_p=n / 4).distribution(logits)
        assert (probs > 0).sum() == n and probs.max() == torch.tensor(1 / n)


# A text of three tokens, each of which depends on the one before: model and drafter as tables.
V, D = 4, 2
GENERATOR = torch.Generator().manual_seed(5)
P = (2 * torch.randn(V, V, generator=GENERATOR, dtype=torch.float64)).softmax(-1)
Q = (2 * torch.randn(V, V, generator=GENERATOR, dtype=torch.float64)).softmax(-1)
DRAWS = 200_000


class Unverified(Sampler):
    """Wrong: all drafts pass."""

    def verify(self, drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(drafts),), drafts.size(1)), self.draw(p[:, -1])


class Alike(Sampler):
    """Wrong: a draft passes if the model's own draw is the same; what fails is drawn anew."""

    def verify(self, drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.stack([self.draw(p[:, k]) for k in range(drafts.size(1))], dim=1)
        passed = (own == drafts).long().cumprod(1).sum(1)
        return passed, self.draw(p[torch.arange(len(p)), passed])


class WholeRest(Sampler):
    """Wrong: what fails is drawn from p, not from what p has more than q."""

    def verify(self, drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        passed, _ = super().verify(drafts, q, p)
        return passed, self.draw(p[torch.arange(len(p)), passed])


class Backwards(Sampler):
    """Wrong: q / p in place of p / q."""

    def verify(self, drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return super().verify(drafts, p[:, :-1], torch.cat([q, p[:, -1:]], dim=1))


def far_from_the_model(kind: type[Sampler], first: int = 0) -> float:
    """How far the first D + 1 tokens after `first` are from the model's: chi-square over its mean.

    Sequences in which a draft fails are short: their missing tokens are the model's own draws.
    """
    sampler = kind(1.0, generator=torch.Generator().manual_seed(1))
    drafts, before = [], torch.full((DRAWS,), first)
    for _ in range(D):
        drafts += [sampler.draw(Q[before])]
        before = drafts[-1]
    drafts = torch.stack(drafts, dim=1)
    read = torch.cat([torch.full((DRAWS, 1), first), drafts], dim=1)  # (N, D + 1)
    passed, token = sampler.verify(drafts, Q[read[:, :-1]], P[read])
    text = torch.zeros(DRAWS, D + 1, dtype=torch.int64)
    text[:, :D] = drafts
    text[torch.arange(DRAWS), passed] = token
    for k in range(1, D + 1):
        missing = passed < k
        text[missing, k] = sampler.draw(P[text[missing, k - 1]])
    code = (text * V ** torch.arange(D, -1, -1)).sum(1)
    seen = code.bincount(minlength=V ** (D + 1)).double()
    expected = (P[first, :, None, None] * P[:, :, None] * P[None]).flatten() * DRAWS
    return ((seen - expected) ** 2 / expected).sum().item() / (V ** (D + 1) - 1)


def test_speculative_text_has_the_models_distribution():
    # Chi-square over its 63 degrees of freedom has mean 1 and standard deviation 0.18.
    assert far_from_the_model(Sampler) < 1.7


@pytest.mark.parametrize("wrong", [Unverified, WholeRest, Backwards])
def test_a_wrong_rule_is_caught(wrong):
    assert far_from_the_model(wrong) > 10


def test_rules_that_are_right_may_pass_fewer_drafts():
    """Comparing with an own draw is right if that draw is kept, and passes sum(p q) of them."""
    drafts = torch.multinomial(Q[:1].expand(DRAWS, -1), 1, generator=GENERATOR)
    p = P[:1].expand(DRAWS, 2, -1)
    passed, _ = Sampler(1.0).verify(drafts, Q[:1].expand(DRAWS, 1, -1), p)
    share = passed.double().mean().item()
    best = torch.minimum(P[0], Q[0]).sum().item()  # no rule passes more
    assert abs(share - best) < 0.01  # 200,000 draws: standard deviation 0.001
    assert (P[0] * Q[0]).sum().item() < best - 0.05
    assert far_from_the_model(Alike) > 10  # it draws once more, and so favours what q has little of


def test_equal_distributions_pass_all_drafts():
    drafts = torch.multinomial(P[:1].expand(1000, -1), 1)
    passed, _ = Sampler(1.0).verify(drafts, P[:1].expand(1000, 1, -1), P[:1].expand(1000, 2, -1))
    assert passed.min() == 1


def test_greedy_drafts_pass_if_they_are_the_models_choice():
    logits = torch.tensor([[[0.0, 3, 1], [2, 0, 1], [0, 1, 5]]])
    p = Sampler().distribution(logits)
    for drafts, passed, token in (([1, 0], 2, 2), ([1, 2], 1, 0), ([0, 0], 0, 1)):
        drafts = torch.tensor([drafts])
        q = torch.nn.functional.one_hot(drafts, 3).float()
        assert [t.item() for t in Sampler().verify(drafts, q, p)] == [passed, token]


@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_replacement_follows_its_own_row_whatever_the_batch(others):
    """A failed draft is replaced from [0.8, 0.2, 0, 0], also alone in its batch.

    The other rows have nothing left of p - q, so sums over the wrong dimension show. A wrong rule
    draws the third token with probability 0.2 / 0.7 each time; 0.71^100 is below 1e-14.
    """
    p = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(1 + others, 2, 4)
    q = p[:, :1].clone()
    q[0, 0] = torch.tensor([0.1, 0.2, 0.2, 0.5])
    drafts = torch.tensor([[3]] + [[2]] * others)  # p of the first is 0; the others all pass
    sampler = Sampler(1.0, generator=torch.Generator().manual_seed(0))
    drawn = [sampler.verify(drafts, q, p) for _ in range(400)]
    assert all(passed.tolist() == [0] + [1] * others for passed, _ in drawn)
    first = torch.stack([token[0] for _, token in drawn]).bincount(minlength=4) / 400
    assert (first - torch.tensor([0.8, 0.2, 0.0, 0.0])).abs().max() < 0.08  # 4 deviations of 0.02
    assert first[2:].sum() == 0


def test_what_has_no_probability_is_never_drawn():
    """Not even at the ends of the row, nor where the rest is tiny."""
    probs = torch.tensor([[0.0, 0.5, 0.0, 1e-7, 0.0, 0.5, 0.0, 0.0]]).expand(200_000, -1)
    drawn = Sampler(1.0, generator=torch.Generator().manual_seed(0)).draw(probs)
    assert set(drawn.tolist()) <= {1, 3, 5}
    few = torch.tensor([[0.0, 0.0, 1e-30, 0.0]])  # not scaled to sum to 1
    assert all(Sampler(1.0).draw(few) == 2 for _ in range(100))


def test_a_part_of_a_batch_draws_what_it_would_in_the_whole():
    """Ranks that share a batch draw as one process; sequences of their own would draw otherwise."""
    probs = torch.rand(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([1, 4, 5])

    def draws(probs: Tensor, **of) -> Tensor:
        sampler = Sampler(1.0, generator=torch.Generator().manual_seed(0), **of)
        return torch.stack([sampler.draw(probs) for _ in range(4)])

    whole = draws(probs)
    assert torch.equal(draws(probs[rows], batch=6, rows=rows), whole[:, rows])
    assert not torch.equal(draws(probs[rows]), whole[:, rows])
