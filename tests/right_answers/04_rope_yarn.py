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


def yarn_frequencies(width, base, context, factor, fast, slow):
    """Pair by pair, without the notebook's functions."""
    import math
    where = [width * math.log(context / (2 * math.pi * turns)) / (2 * math.log(base))
             for turns in (fast, slow)]
    low, high = max(math.floor(where[0]), 0), min(math.ceil(where[1]), width - 1)
    found = []
    for i in range(width // 2):
        share = min(max((i - low) / (high - low or 0.001), 0), 1)
        found.append(base ** (-2 * i / width) * (1 - share + share / factor))
    return torch.tensor(found, dtype=torch.float64)


def yarn_frequencies(width, base, context, factor, fast, slow):
    """A power of the factor's share, by torch.lerp."""
    plain = base ** (-torch.arange(0, width, 2).double() / width)
    low = max(floor(pair_that_turns(fast, width, base, context)), 0)
    high = min(ceil(pair_that_turns(slow, width, base, context)), width - 1)
    ramp = ((torch.arange(width // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    return torch.lerp(plain, plain / factor, ramp)


def long_reader(a):
    """A factor of 1 stands for no stretch."""
    stretch = a.max_seq_len > a.original_seq_len
    factor = a.rope_factor if stretch else 1.0
    found = yarn_frequencies(a.qk_rope_head_dim, a.rope_theta, a.original_seq_len, factor,
                             a.beta_fast, a.beta_slow)
    return found.tolist(), scale_of(a.qk_nope_head_dim + a.qk_rope_head_dim, factor, a.mscale)


def long_reader(a):
    """With a function of its own for the scale."""
    query = a.qk_nope_head_dim + a.qk_rope_head_dim
    if a.max_seq_len > a.original_seq_len:
        m = 1 + a.mscale * log(a.rope_factor) / 10
        found = yarn_frequencies(a.qk_rope_head_dim, a.rope_theta, a.original_seq_len,
                                 a.rope_factor, a.beta_fast, a.beta_slow)
        return list(map(float, found)), m * m / query ** 0.5
    return list(map(float, frequencies(a.qk_rope_head_dim, a.rope_theta))), 1 / query ** 0.5


def rotary_attention(q, k, v, start, freqs, scale):
    """Query by query, by the distance alone."""
    pairs = torch.view_as_complex(k.reshape(len(k), -1, 2).contiguous())
    outputs = []
    for i, row in enumerate(torch.view_as_complex(q.reshape(len(q), -1, 2).contiguous())):
        distance = start + i - torch.arange(start + i + 1)
        turned = row * torch.polar(torch.ones_like(freqs), torch.zeros_like(freqs))
        angle = distance[:, None] * freqs
        products = (turned * pairs[:start + i + 1].conj() * torch.complex(
            angle.cos(), angle.sin())).real.sum(-1)
        outputs.append((products * scale).softmax(0) @ v[:start + i + 1])
    return torch.stack(outputs)


def rotary_attention(q, k, v, start, freqs, scale):
    """By torch's own attention, with a mask."""
    at = torch.arange(len(k))
    seen = at <= at[start:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        rope(q, at[start:], freqs)[None], rope(k, at, freqs)[None], v[None], seen[None],
        scale=scale)[0]


def yarn_frequencies(width, base, context, factor, fast, slow):
    """A loop over pairs; the blend as one factor."""
    import math

    import torch
    def pair(turns):
        return width / 2 * math.log(context / turns / (2 * math.pi), base)
    low = min(max(math.floor(pair(fast)), 0), width - 1)
    high = min(max(math.ceil(pair(slow)), 0), width - 1)
    if low == high:
        high += 0.001
    made = []
    for i in range(width // 2):
        r = min(max((i - low) / (high - low), 0), 1)
        made.append(base ** (-2 * i / width) * (1 - r + r / factor))
    return torch.tensor(made, dtype=torch.float64)


def long_reader(a):
    """The own function of 5a does the work; a list of floats by hand."""
    import math
    scale = 1 / math.sqrt(a.qk_nope_head_dim + a.qk_rope_head_dim)
    d, base = a.qk_rope_head_dim, a.rope_theta
    plain = [base ** (-2 * i / d) for i in range(d // 2)]
    if not a.max_seq_len > a.original_seq_len:
        return plain, scale
    lo, hi = (d * math.log(a.original_seq_len / (2 * math.pi * r)) / (2 * math.log(base))
              for r in (a.beta_fast, a.beta_slow))
    lo, hi = max(math.floor(lo), 0), min(math.ceil(hi), d - 1)
    hi = hi + 0.001 if hi == lo else hi
    ramp = [min(1.0, max(0.0, (i - lo) / (hi - lo))) for i in range(d // 2)]
    m = 1.0 if a.rope_factor <= 1 else 1 + 0.1 * a.mscale * math.log(a.rope_factor)
    both = zip(plain, ramp, strict=True)
    return [f * (1 - r) + f / a.rope_factor * r for f, r in both], scale * m ** 2


def rotary_attention(q, k, v, start, freqs, scale):
    """Complex numbers, and slices of the past in a loop."""
    import torch
    def spun(x, positions):
        z = torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones(len(x), len(freqs), dtype=x.dtype),
                                                  positions[:, None] * freqs)).flatten(1)
    every = torch.arange(len(k)).to(q.dtype)
    q, k = spun(q, every[start:]), spun(k, every)
    return torch.stack([(scale * k[:start + i + 1] @ q[i]).softmax(0) @ v[:start + i + 1]
                        for i in range(len(q))])


def rotary_attention(q, k, v, start, freqs, scale):
    """Only the differences of positions: the query is turned by n - m for each key."""
    import torch
    T = len(k)
    gap = (torch.arange(start, T)[:, None] - torch.arange(T)).to(q.dtype)
    angle = gap[..., None] * freqs
    a, b = q[:, None, 0::2], q[:, None, 1::2]
    c, d = k[None, :, 0::2], k[None, :, 1::2]
    s = ((a * c + b * d) * angle.cos() + (a * d - b * c) * angle.sin()).sum(-1) * scale
    return s.masked_fill(gap < 0, -torch.inf).softmax(-1) @ v


def ramp_of(low, high, pairs):
    """Joined from three lists; equal bounds leave the middle one empty."""
    middle = [(i - low) / (high - low) for i in range(low + 1, high)]
    return ([0.0] * (low + 1) + middle + [1.0] * pairs)[:pairs]


def ramp_of(low, high, pairs):
    """Equal bounds are a step, without any 0.001."""
    if low == high:
        return [float(i > low) for i in range(pairs)]
    return [sorted((0.0, (i - low) / (high - low), 1.0))[1] for i in range(pairs)]
