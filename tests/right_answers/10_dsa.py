"""Right answers to the exercises of notebook 10, unlike the reference."""


def blind_to_future(choose):
    """Ten draws without a seed."""
    for _ in range(10):
        scores = torch.randn(12, 12)
        other = scores + torch.randn(12, 12).triu(1)
        if not torch.equal(choose(scores, 3), choose(other, 3)):
            return False
    return True


def blind_to_future(choose):
    """Sixteen draws of another size, the future far above and far below."""
    for shift in (1000.0, -1000.0, 1.0, -1.0) * 4:
        scores = torch.randn(10, 10)
        other = torch.where(torch.ones(10, 10).tril() > 0, scores, torch.randn(10, 10) + shift)
        if not torch.equal(choose(scores, 2), choose(other, 2)):
            return False
    return True


def chosen(scores, t, k):
    """A stable sort of torch."""
    import torch
    order = torch.tensor(scores[:t + 1], dtype=torch.float64).sort(descending=True, stable=True)
    return sorted(order.indices[:k].tolist())


def breaks_even(pair, index, k):
    """The smallest whole number above the quotient."""
    import math
    from fractions import Fraction
    return math.floor(Fraction(pair * k, pair - index)) + 1
