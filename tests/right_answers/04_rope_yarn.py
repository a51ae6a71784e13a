"""Right answers to the exercises of notebook 04, unlike the reference."""


def pair_score(q, k, m, n, f):
    """From the angle between the two positions."""
    same, across = q[0] * k[0] + q[1] * k[1], q[0] * k[1] - q[1] * k[0]
    return same * cos((m - n) * f) + across * sin((m - n) * f)


def ramp_of(low, high, pairs):
    """With torch."""
    import torch
    width = high - low or 0.001
    return ((torch.arange(pairs, dtype=torch.float64) - low) / width).clamp(0, 1).tolist()


def distance_alone(score):
    """Many distances at many places, no seed."""
    q, k = torch.randn(64).double(), torch.randn(64).double()
    rows = [[score(q, k, n + d, n) for n in (0, 1, 7, 30, 100)] for d in range(6)]
    flat = all(abs(x - row[0]) < 1e-7 for row in rows for x in row)
    return flat and len({round(row[0], 5) for row in rows}) > 1
