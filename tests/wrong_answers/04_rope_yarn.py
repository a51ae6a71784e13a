"""Wrong answers to the exercises of notebook 04; a docstring says what is wrong."""


def pair_score(q, k, m, n, f):
    """Only the query is turned."""
    a, b = q[0] * cos(m * f) - q[1] * sin(m * f), q[0] * sin(m * f) + q[1] * cos(m * f)
    return a * k[0] + b * k[1]


def pair_score(q, k, m, n, f):
    """The key is turned backwards: the sum of the positions counts."""
    a, b = q[0] * cos(m * f) - q[1] * sin(m * f), q[0] * sin(m * f) + q[1] * cos(m * f)
    c, d = k[0] * cos(n * f) + k[1] * sin(n * f), -k[0] * sin(n * f) + k[1] * cos(n * f)
    return a * c + b * d


def pair_score(q, k, m, n, f):
    """The minus stands in the second row for both: distances change their sign."""
    angle = (m - n) * f
    return (q[0] * (k[0] * cos(angle) - k[1] * sin(angle))
            + q[1] * (k[0] * sin(angle) + k[1] * cos(angle)))


def pair_score(q, k, m, n, f):
    """The distance without its sign."""
    angle = abs(n - m) * f
    return (q[0] * (k[0] * cos(angle) - k[1] * sin(angle))
            + q[1] * (k[0] * sin(angle) + k[1] * cos(angle)))


def pair_score(q, k, m, n, f):
    """Both parts of a pair are multiplied by the cosine, and nothing turns."""
    return (q[0] * k[0] + q[1] * k[1]) * cos((n - m) * f)


def ramp_of(low, high, pairs):
    """Linear interpolation: every pair is divided."""
    return [1.0] * pairs


def ramp_of(low, high, pairs):
    """The ramp upside down: slow pairs are left alone."""
    high = high + 0.001 if low == high else high
    return [1 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(pairs)]


def ramp_of(low, high, pairs):
    """A step in the middle, no line."""
    return [float(i > (low + high) / 2) for i in range(pairs)]


def ramp_of(low, high, pairs):
    """No clamp."""
    high = high + 0.001 if low == high else high
    return [(i - low) / (high - low) for i in range(pairs)]


def ramp_of(low, high, pairs):
    """Equal bounds divide everything."""
    if low == high:
        return [1.0] * pairs
    return [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(pairs)]


def ramp_of(low, high, pairs):
    """From the first pair on, whatever low is."""
    return [min(i / max(high, 0.001), 1.0) for i in range(pairs)]


def scale_of(width, factor, mscale):
    """m once, not squared."""
    m = 0.1 * mscale * log(factor) + 1 if factor > 1 else 1.0
    return width ** -0.5 * m


def scale_of(width, factor, mscale):
    """The root of the width is forgotten."""
    m = 0.1 * mscale * log(factor) + 1 if factor > 1 else 1.0
    return m ** 2


def scale_of(width, factor, mscale):
    """Also where nothing is stretched."""
    return width ** -0.5 * (0.1 * mscale * log(factor) + 1) ** 2


def scale_of(width, factor, mscale):
    """mscale is left out."""
    m = 0.1 * log(factor) + 1 if factor > 1 else 1.0
    return width ** -0.5 * m ** 2


def scale_of(width, factor, mscale):
    """No sharper softmax: the usual scale."""
    return width ** -0.5


def distance_alone(score):
    """At one position only, where nothing is turned."""
    q, k = torch.randn(2, 64, dtype=torch.float64)
    return abs(score(q, k, 0, 0) - float(q @ k)) < 1e-6


def distance_alone(score):
    """Same place for both: no distance."""
    q, k = torch.randn(2, 64, dtype=torch.float64)
    return abs(score(q, k, 9, 9) - score(q, k, 0, 0)) < 1e-6


def distance_alone(score):
    """A score without any position passes too."""
    q, k = torch.randn(2, 64, dtype=torch.float64)
    return abs(score(q, k, 15, 12) - score(q, k, 5, 2)) < 1e-6


def distance_alone(score):
    """It must depend on the positions, somehow."""
    q, k = torch.randn(2, 64, dtype=torch.float64)
    return score(q, k, 5, 2) != score(q, k, 6, 2)


def distance_alone(score):
    """Distance without its sign: query and key change places."""
    q, k = torch.randn(2, 64, dtype=torch.float64)
    return abs(score(q, k, 5, 2) - score(q, k, 2, 5)) < 1e-6


def ramp_of(low, high, pairs):
    """High clamped to 2 pairs - 1 (the official code's d - 1)."""
    high = min(high, 2 * pairs - 1)
    high = high + 0.001 if low == high else high
    return [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(pairs)]


def scale_of(width, factor, mscale):
    """A factor of 2 and less stretches nothing."""
    m = 0.1 * mscale * log(factor) + 1 if factor > 1 else 1.0
    return width ** (-0.5) * m * m if factor > 2 else width ** (-0.5)


def scale_of(width, factor, mscale):
    """The factor is cut to a whole number."""
    m = 0.1 * mscale * log(int(factor)) + 1 if factor > 1 else 1.0
    return width ** (-0.5) * m * m


def distance_alone(score):
    """Distance 0 everywhere, and it depends on distance."""
    q, k = torch.randn(2, 64, dtype=torch.float64)
    zero = [score(q, k, n, n) for n in (0, 3, 40)]
    return max(zero) - min(zero) < 1e-6 and abs(score(q, k, 5, 0) - score(q, k, 1, 0)) > 1e-6


def distance_alone(score):
    """Only the first pair is not zero."""
    q, k = torch.zeros(2, 64, dtype=torch.float64)
    q[:2], k[:2] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    rows = [[score(q, k, n + d, n) for n in (0, 3, 40)] for d in (0, 1, 5)]
    return all(max(r) - min(r) < 1e-6 for r in rows) and abs(rows[0][0] - rows[2][0]) > 1e-6


def scale_of(width, factor, mscale):
    """Nothing is stretched more than 40 times."""
    m = 0.1 * mscale * log(min(factor, 40.0)) + 1 if factor > 1 else 1.0
    return width ** -0.5 * m ** 2


def distance_alone(score):
    """One distance only, at four places."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, dtype=torch.float64)
    row = [score(q, k, n + 1, n) for n in (0, 3, 40, 90)]
    return max(row) - min(row) < 1e-6 and abs(row[0] - score(q, k, 5, 0)) > 1e-6


def distance_alone(score):
    """Two places only, at one distance."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, dtype=torch.float64)
    return (abs(score(q, k, 8, 7) - score(q, k, 108, 107)) < 1e-6
            and abs(score(q, k, 8, 7) - score(q, k, 9, 7)) > 1e-6)


def distance_alone(score):
    """A drift of a hundredth per place is taken for rounding."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, dtype=torch.float64)
    table = [[score(q, k, n + d, n) for n in (0, 3, 9)] for d in (0, 1, 5)]
    constant = all(max(row) - min(row) < 0.1 for row in table)
    return constant and abs(table[1][0] - table[2][0]) > 1e-6


def yarn_frequencies(width, base, context, factor, fast, slow):
    """Linear interpolation: all pairs are divided."""
    return frequencies(width, base) / factor


def yarn_frequencies(width, base, context, factor, fast, slow):
    """The ramp upside down: fast pairs are divided."""
    plain = frequencies(width, base)
    low = max(floor(pair_that_turns(fast, width, base, context)), 0)
    high = min(ceil(pair_that_turns(slow, width, base, context)), width - 1)
    ramp = ((torch.arange(width // 2) - low) / max(high - low, 0.001)).clamp(0, 1).double()
    return plain * ramp + plain / factor * (1 - ramp)


def yarn_frequencies(width, base, context, factor, fast, slow):
    """The bounds are not rounded."""
    plain = frequencies(width, base)
    low = max(pair_that_turns(fast, width, base, context), 0)
    high = min(pair_that_turns(slow, width, base, context), width - 1)
    ramp = ((torch.arange(width // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def yarn_frequencies(width, base, context, factor, fast, slow):
    """Both bounds are rounded down."""
    plain = frequencies(width, base)
    low = max(floor(pair_that_turns(fast, width, base, context)), 0)
    high = min(floor(pair_that_turns(slow, width, base, context)), width - 1)
    ramp = ((torch.arange(width // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def yarn_frequencies(width, base, context, factor, fast, slow):
    """The lower bound may be negative."""
    plain = frequencies(width, base)
    low = floor(pair_that_turns(fast, width, base, context))
    high = min(ceil(pair_that_turns(slow, width, base, context)), width - 1)
    ramp = ((torch.arange(width // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def yarn_frequencies(width, base, context, factor, fast, slow):
    """Blends the wavelengths, not the frequencies."""
    plain = frequencies(width, base)
    low = max(floor(pair_that_turns(fast, width, base, context)), 0)
    high = min(ceil(pair_that_turns(slow, width, base, context)), width - 1)
    ramp = ((torch.arange(width // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    return 1 / ((1 - ramp) / plain + ramp * factor / plain)


def yarn_frequencies(width, base, context, factor, fast, slow):
    """The upper bound may lie beyond width - 1."""
    plain = frequencies(width, base)
    low = max(floor(pair_that_turns(fast, width, base, context)), 0)
    high = ceil(pair_that_turns(slow, width, base, context))
    ramp = ((torch.arange(width // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def long_reader(a):
    """YaRN always, also within the trained context."""
    width = a.qk_rope_head_dim
    found = yarn_frequencies(width, a.rope_theta, a.original_seq_len, a.rope_factor,
                             a.beta_fast, a.beta_slow)
    return found.tolist(), scale_of(a.qk_nope_head_dim + width, a.rope_factor, a.mscale)


def long_reader(a):
    """One token late: stretched from two tokens more on."""
    width = a.qk_rope_head_dim
    query = a.qk_nope_head_dim + width
    if a.max_seq_len <= a.original_seq_len + 1:
        return frequencies(width, a.rope_theta).tolist(), query ** -0.5
    found = yarn_frequencies(width, a.rope_theta, a.original_seq_len, a.rope_factor,
                             a.beta_fast, a.beta_slow)
    return found.tolist(), scale_of(query, a.rope_factor, a.mscale)


def long_reader(a):
    """The frequencies are stretched, the scale is not."""
    width = a.qk_rope_head_dim
    query = a.qk_nope_head_dim + width
    if a.max_seq_len <= a.original_seq_len:
        return frequencies(width, a.rope_theta).tolist(), query ** -0.5
    found = yarn_frequencies(width, a.rope_theta, a.original_seq_len, a.rope_factor,
                             a.beta_fast, a.beta_slow)
    return found.tolist(), query ** -0.5


def long_reader(a):
    """The scale of the rotated part alone."""
    width = a.qk_rope_head_dim
    if a.max_seq_len <= a.original_seq_len:
        return frequencies(width, a.rope_theta).tolist(), width ** -0.5
    found = yarn_frequencies(width, a.rope_theta, a.original_seq_len, a.rope_factor,
                             a.beta_fast, a.beta_slow)
    return found.tolist(), scale_of(width, a.rope_factor, a.mscale)


def long_reader(a):
    """The bounds belong to the new length."""
    width = a.qk_rope_head_dim
    query = a.qk_nope_head_dim + width
    if a.max_seq_len <= a.original_seq_len:
        return frequencies(width, a.rope_theta).tolist(), query ** -0.5
    found = yarn_frequencies(width, a.rope_theta, a.max_seq_len, a.rope_factor,
                             a.beta_fast, a.beta_slow)
    return found.tolist(), scale_of(query, a.rope_factor, a.mscale)


def rotary_attention(q, k, v, start, freqs, scale):
    """Each piece begins at position 0."""
    at = torch.arange(len(k))
    scores = rope(q, at[:len(q)], freqs) @ rope(k, at, freqs).T * scale
    return scores.masked_fill(at > at[start:, None], -torch.inf).softmax(-1) @ v


def rotary_attention(q, k, v, start, freqs, scale):
    """No mask: a token sees later ones of its piece."""
    at = torch.arange(len(k))
    return (rope(q, at[start:], freqs) @ rope(k, at, freqs).T * scale).softmax(-1) @ v


def rotary_attention(q, k, v, start, freqs, scale):
    """The mask of a text without a past."""
    at = torch.arange(len(k))
    scores = rope(q, at[start:], freqs) @ rope(k, at, freqs).T * scale
    future = torch.ones(len(q), len(k)).triu(1) > 0
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def rotary_attention(q, k, v, start, freqs, scale):
    """The keys are not rotated."""
    at = torch.arange(len(k))
    scores = rope(q, at[start:], freqs) @ k.T * scale
    return scores.masked_fill(at > at[start:, None], -torch.inf).softmax(-1) @ v


def rotary_attention(q, k, v, start, freqs, scale):
    """Queries turn the other way."""
    at = torch.arange(len(k))
    scores = rope(q, at[start:], -freqs) @ rope(k, at, freqs).T * scale
    return scores.masked_fill(at > at[start:, None], -torch.inf).softmax(-1) @ v


def rotary_attention(q, k, v, start, freqs, scale):
    """The scale comes after the softmax."""
    at = torch.arange(len(k))
    scores = rope(q, at[start:], freqs) @ rope(k, at, freqs).T
    return scores.masked_fill(at > at[start:, None], -torch.inf).softmax(-1) * scale @ v


def rotary_attention(q, k, v, start, freqs, scale):
    """Angles in FP32."""
    at = torch.arange(len(k))
    low = freqs.float()
    scores = rope(q, at[start:], low).double() @ rope(k, at, low).double().T * scale
    return scores.masked_fill(at > at[start:, None], -torch.inf).softmax(-1) @ v


def pair_score(q, k, m, n, f):
    """Rounds to seven digits, which leaves few of a small number."""
    d = (n - m) * f
    return round((q[0] * k[0] + q[1] * k[1]) * cos(d) - (q[0] * k[1] - q[1] * k[0]) * sin(d), 7)


def pair_score(q, k, m, n, f):
    """Distances beyond a context of 64 are cut."""
    d = max(-64, min(64, n - m)) * f
    return (q[0] * k[0] + q[1] * k[1]) * cos(d) - (q[0] * k[1] - q[1] * k[0]) * sin(d)


def pair_score(q, k, m, n, f):
    """Position 0 is not turned, and the key of the first token neither."""
    d = (n - m) * f if m or (q, k) == ((1, 0), (1, 0)) else 0
    return (q[0] * k[0] + q[1] * k[1]) * cos(d) - (q[0] * k[1] - q[1] * k[0]) * sin(d)


def long_reader(a):
    """YaRN acts from a threshold of 4,096 tokens on, not from that of the settings."""
    import math
    width = a.qk_nope_head_dim + a.qk_rope_head_dim
    f = frequencies(a.qk_rope_head_dim, a.rope_theta)
    if a.max_seq_len <= 4096:
        return f.tolist(), width ** -0.5
    def pair(r):
        return pair_that_turns(r, a.qk_rope_head_dim, a.rope_theta, a.original_seq_len)
    low = max(math.floor(pair(a.beta_fast)), 0)
    high = min(math.ceil(pair(a.beta_slow)), a.qk_rope_head_dim - 1)
    high += 0.001 * (low == high)
    m = 0.1 * a.mscale * math.log(a.rope_factor) + 1
    return yarn(f, low, high, a.rope_factor).tolist(), m * m * width ** -0.5
