"""Wrong answers to the exercises of notebook 08; a docstring says what is wrong."""


def tile_scales(row, size):
    """The largest value in place of the largest absolute value."""
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [max(max(tile), 1e-4) / 448 for tile in tiles]


def tile_scales(row, size):
    """One scale for the whole row."""
    scale = max(max(map(abs, row)), 1e-4) / 448
    return [scale for _ in range(0, len(row), size)]


def tile_scales(row, size):
    """The range of INT8: 127."""
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [max(max(map(abs, tile)), 1e-4) / 127 for tile in tiles]


def tile_scales(row, size):
    """The scale that one multiplies by, not the one that is stored."""
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [448 / max(max(map(abs, tile)), 1e-4) for tile in tiles]


def tile_scales(row, size):
    """No least value: the scale of zeros is 0."""
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [max(map(abs, tile)) / 448 for tile in tiles]


def tile_scales(row, size):
    """The least value bounds the scale, not the largest value of the tile."""
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [max(max(map(abs, tile)) / 448, 1e-4) for tile in tiles]


def tile_scales(row, size):
    """Scales rounded up to powers of two, as V3.1 has them."""
    import math
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    exact = [max(max(map(abs, tile)), 1e-4) / 448 for tile in tiles]
    return [2.0 ** math.ceil(math.log2(scale)) for scale in exact]


def tile_scales(row, size):
    """Tiles of numbers that lie apart, not of neighbours."""
    count = -(-len(row) // size)
    return [max(max(map(abs, row[i::count])), 1e-4) / 448 for i in range(count)]


def to_e4m3_by_hand(x):
    """An integer grid, as with INT8."""
    return float(min(round(x), 448))


def to_e4m3_by_hand(x):
    """Cut off in place of rounded."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 3)
    return min(math.floor(x / step) * step, 448.0)


def to_e4m3_by_hand(x):
    """Ties go up."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 3)
    return min(math.floor(x / step + 0.5) * step, 448.0)


def to_e4m3_by_hand(x):
    """Nothing bounds the exponent from below: small numbers keep their three bits."""
    import math
    step = 2.0 ** (math.floor(math.log2(x)) - 3)
    return min(round(x / step) * step, 448.0)


def to_e4m3_by_hand(x):
    """Numbers below 2^-6 become 0."""
    import math
    step = 2.0 ** (math.floor(math.log2(x)) - 3)
    return min(round(x / step) * step, 448.0) if x >= 2.0 ** -6 else 0.0


def to_e4m3_by_hand(x):
    """Nothing bounds large numbers."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 3)
    return round(x / step) * step


def to_e4m3_by_hand(x):
    """The largest number is 240, as in the variant with infinities."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 3)
    return min(round(x / step) * step, 240.0)


def to_e4m3_by_hand(x):
    """The least exponent is -7, the bias."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -7) - 3)
    return min(round(x / step) * step, 448.0)


def to_e4m3_by_hand(x):
    """Four bits after the leading one."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 4)
    return min(round(x / step) * step, 448.0)


def stored_bytes(rows, columns):
    """Only whole blocks have a scale."""
    return rows * columns + 4 * (rows // 128) * (columns // 128)


def stored_bytes(rows, columns):
    """As many blocks as the numbers fill, wherever they lie."""
    return rows * columns + 4 * -(-rows * columns // 128 ** 2)


def stored_bytes(rows, columns):
    """A scale for each tile of 1 x 128, as activations have."""
    return rows * columns + 4 * rows * -(-columns // 128)


def stored_bytes(rows, columns):
    """Scales of one byte."""
    return rows * columns + -(-rows // 128) * -(-columns // 128)


def stored_bytes(rows, columns):
    """Blocks at the edges are stored whole."""
    blocks = -(-rows // 128) * -(-columns // 128)
    return blocks * (128 ** 2 + 4)


def stored_bytes(rows, columns):
    """One scale for the whole weight."""
    return rows * columns + 4


def stored_bytes(rows, columns):
    """Always one block more than the whole ones."""
    return rows * columns + 4 * (rows // 128 + 1) * (columns // 128 + 1)


def tiles_apart(quantise):
    """The error on even numbers."""
    x = 1 + torch.rand(128, 256)
    return bool(((quantise(x) - x).abs() / x).max() <= 1 / 16)


def tiles_apart(quantise):
    """The tile of the huge number itself must change: it does in all versions."""
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = 1e6
    return not torch.equal(quantise(x)[5, :128], quantise(loud)[5, :128])


def tiles_apart(quantise):
    """Other rows only: one scale a row passes."""
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = 1e6
    same = quantise(x) == quantise(loud)
    same[5] = True
    return same.all().item()


def tiles_apart(quantise):
    """The same row only: blocks pass."""
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = 1e6
    return torch.equal(quantise(x)[5, 128:], quantise(loud)[5, 128:])


def tiles_apart(quantise):
    """Nothing at all may change, not even in the tile itself."""
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = 1e6
    return torch.equal(quantise(x), quantise(loud))


def tile_scales(row, size):
    """Only an all-zero tile gets the least value."""
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [(max(map(abs, tile)) or 1e-4) / 448 for tile in tiles]


def tile_scales(row, size):
    """Least value 1e-4 added, where below."""
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [(m if m > 0 else 1e-4) / 448 for m in (max(map(abs, tile)) for tile in tiles)]


def tile_scales(row, size):
    """Number of tiles rounded."""
    n = max(round(len(row) / size + 0.01), 1)
    return [max(max(map(abs, row[i * size:(i + 1) * size])), 1e-4) / 448 for i in range(n)]


def to_e4m3_by_hand(x):
    """Ties go down."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 3)
    return min(math.ceil(x / step - 0.5) * step, 448.0)


def to_e4m3_by_hand(x):
    """Step 2^-9 below 2^-7, no bound between."""
    import math
    step = 2.0 ** (math.floor(math.log2(x)) - 3) if x >= 2.0 ** (-7) else 2.0 ** (-9)
    return min(round(x / step) * step, 448.0)


def to_e4m3_by_hand(x):
    """Everything from 256 on is 448."""
    import math
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 3)
    return round(x / step) * step if x < 256 else 448.0


def tiles_apart(quantise):
    """Same row, and the next row only."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = 1000000.0
    a, b = quantise(x), quantise(loud)
    return torch.equal(a[5, 128:], b[5, 128:]) and torch.equal(a[6], b[6])


def tiles_apart(quantise):
    """Same row, and the last row only."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = 1000000.0
    a, b = quantise(x), quantise(loud)
    return torch.equal(a[5, 128:], b[5, 128:]) and torch.equal(a[-1], b[-1])


def tiles_apart(quantise):
    """And its own tile must change."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = 1000000.0
    same = quantise(x) == quantise(loud)
    own = same[5, :128].clone()
    own[7] = True
    same[5, :128] = True
    return bool(same.all()) and (not bool(own.all()))


def to_e4m3_by_hand(x):
    """Up to 500 the steps go on above 448."""
    import math
    if x >= 500:
        return 448.0
    exponent = max(math.floor(math.log2(x)), -6)
    step = 2.0 ** (exponent - 3)
    return min(round(x / step) * step, 480.0)


def to_e4m3_by_hand(x):
    """Only from 512 on it is 448."""
    import math
    if x >= 512:
        return 448.0
    exponent = max(math.floor(math.log2(x)), -6)
    step = 2.0 ** (exponent - 3)
    return round(x / step) * step


def to_e4m3_by_hand(x):
    """Above 200 a tie goes up."""
    import math
    exponent = max(math.floor(math.log2(x)), -6)
    step = 2.0 ** (exponent - 3)
    whole = math.floor(x / step + 0.5) if x > 200 else round(x / step)
    return min(whole * step, 448.0)


def tile_scales(row, size):
    """Right, and makes the caller's numbers positive."""
    for i, x in enumerate(row):
        row[i] = abs(x)
    tiles = [row[i:i + size] for i in range(0, len(row), size)]
    return [max(max(tile), 1e-4) / 448 for tile in tiles]


def tiles_apart(quantise):
    """The huge number stands in the last tile only."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[100, 200] = loud[101, 201] = 1e6
    same = quantise(x) == quantise(loud)
    same[100:102, 128:] = True
    return same.all().item()


def tiles_apart(quantise):
    """The huge number stands in the first tile only."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[100, 20] = loud[5, 21] = 1e6
    same = quantise(x) == quantise(loud)
    same[5, :128] = same[100, :128] = True
    return same.all().item()


def tiles_apart(quantise):
    """A tenth is taken for no change."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = loud[100, 200] = 1e6
    same = (quantise(x) - quantise(loud)).abs() < 0.1
    same[5, :128] = same[100, 128:] = True
    return same.all().item()


def tiles_apart(quantise):
    """The mean change must be small."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    loud = x.clone()
    loud[5, 7] = loud[100, 200] = 1e6
    change = (quantise(x) - quantise(loud)).abs()
    change[5, :128] = change[100, 128:] = 0
    return bool(change.mean() < 1e-3)


def quantised_blocks(w, size):
    """One scale for the whole matrix."""
    scale = w.abs().max().clamp(min=1e-4) / 448
    down, across = -(-len(w) // size), -(-w.size(1) // size)
    return e4m3(w / scale), scale.expand(down, across).clone()


def quantised_blocks(w, size):
    """A scale per row of a block."""
    values, scales = torch.empty_like(w), []
    for left in range(0, w.size(1), size):
        cut = w[:, left:left + size]
        scale = cut.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
        values[:, left:left + size] = e4m3(cut / scale)
        scales.append(scale[::size, 0])
    return values, torch.stack(scales, 1)


def quantised_blocks(w, size):
    """Values that are not rounded."""
    values, scales = torch.empty_like(w), []
    for top in range(0, len(w), size):
        scales.append([])
        for left in range(0, w.size(1), size):
            cut = slice(top, top + size), slice(left, left + size)
            scale = w[cut].abs().max().clamp(min=1e-4) / 448
            values[cut] = w[cut] / scale
            scales[-1].append(scale)
    return values, torch.tensor(scales)


def quantised_blocks(w, size):
    """The largest value with its sign: negative ones do not count."""
    values, scales = torch.empty_like(w), []
    for top in range(0, len(w), size):
        scales.append([])
        for left in range(0, w.size(1), size):
            cut = slice(top, top + size), slice(left, left + size)
            scale = w[cut].max().clamp(min=1e-4) / 448
            values[cut] = e4m3(w[cut] / scale)
            scales[-1].append(scale)
    return values, torch.tensor(scales)


def quantised_blocks(w, size):
    """Values that are scaled back."""
    values, scales = torch.empty_like(w), []
    for top in range(0, len(w), size):
        scales.append([])
        for left in range(0, w.size(1), size):
            cut = slice(top, top + size), slice(left, left + size)
            scale = w[cut].abs().max().clamp(min=1e-4) / 448
            values[cut] = e4m3(w[cut] / scale) * scale
            scales[-1].append(scale)
    return values, torch.tensor(scales)


def quantised_blocks(w, size):
    """The inverse of the scale."""
    values, scales = torch.empty_like(w), []
    for top in range(0, len(w), size):
        scales.append([])
        for left in range(0, w.size(1), size):
            cut = slice(top, top + size), slice(left, left + size)
            scale = 448 / w[cut].abs().max().clamp(min=1e-4)
            values[cut] = e4m3(w[cut] * scale)
            scales[-1].append(scale)
    return values, torch.tensor(scales)


def scaled_product(qx, sx, qw, sw, size):
    """The scales of the first tile for the whole row."""
    of_rows = sw[:, 0].repeat_interleave(size)[:len(qw)]
    return qx @ qw.T * sx[:, :1] * of_rows


def scaled_product(qx, sx, qw, sw, size):
    """The weight's scales are forgotten."""
    y = torch.zeros(len(qx), len(qw))
    for b in range(sx.size(1)):
        cut = slice(size * b, size * (b + 1))
        y = y + qx[:, cut] @ qw[:, cut].T * sx[:, b, None]
    return y


def scaled_product(qx, sx, qw, sw, size):
    """What is left behind the last whole tile is dropped."""
    y = torch.zeros(len(qx), len(qw))
    for b in range(qx.size(1) // size):
        cut = slice(size * b, size * (b + 1))
        of_rows = sw[:, b].repeat_interleave(size)[:len(qw)]
        y = y + qx[:, cut] @ qw[:, cut].T * sx[:, b, None] * of_rows
    return y


def scaled_product(qx, sx, qw, sw, size):
    """The rows' scales in turn, as repeat has it."""
    y = torch.zeros(len(qx), len(qw))
    for b in range(sx.size(1)):
        cut = slice(size * b, size * (b + 1))
        of_rows = sw[:, b].repeat(size)[:len(qw)]
        y = y + qx[:, cut] @ qw[:, cut].T * sx[:, b, None] * of_rows
    return y


def scaled_product(qx, sx, qw, sw, size):
    """Partial sums are kept in BF16."""
    y = torch.zeros(len(qx), len(qw))
    for b in range(sx.size(1)):
        cut = slice(size * b, size * (b + 1))
        of_rows = sw[:, b].repeat_interleave(size)[:len(qw)]
        part = (qx[:, cut] @ qw[:, cut].T * sx[:, b, None] * of_rows).bfloat16()
        y = (y + part).bfloat16().float()
    return y


def scaled_product(qx, sx, qw, sw, size):
    """The sum of the scales instead of their product."""
    y = torch.zeros(len(qx), len(qw))
    for b in range(sx.size(1)):
        cut = slice(size * b, size * (b + 1))
        of_rows = sw[:, b].repeat_interleave(size)[:len(qw)]
        y = y + qx[:, cut] @ qw[:, cut].T * (sx[:, b, None] + of_rows)
    return y


def power_scale(largest):
    """The nearest power of two, which may be too small."""
    import math
    return 2.0 ** round(math.log2(max(largest, 1e-4) / 448))


def power_scale(largest):
    """Down: the largest value no longer fits."""
    import math
    return 2.0 ** math.floor(math.log2(max(largest, 1e-4) / 448))


def power_scale(largest):
    """Exact powers are doubled."""
    import math
    return 2.0 ** (math.floor(math.log2(max(largest, 1e-4) / 448)) + 1)


def power_scale(largest):
    """No lower bound on the largest value."""
    import math
    return 2.0 ** math.ceil(math.log2(max(largest, 1e-9) / 448))


def power_scale(largest):
    """A scale of at least 1."""
    import math
    return 2.0 ** max(math.ceil(math.log2(max(largest, 1e-4) / 448)), 0)


def to_e4m3_by_hand(x):
    """Beyond 464 the format has no number."""
    from math import floor, log2

    if x > 1e4:
        return float("inf")
    step = 2.0 ** max(floor(log2(x)) - 3, -9)
    return float(min(round(x / step) * step, 448))


def stored_bytes(rows, columns):
    """Floats count large weights."""
    from math import ceil

    return (
        int(float(rows) * float(columns) + 4.0 * ceil(rows / 128) * ceil(columns / 128))
        if rows < 1e6
        else int(torch.tensor(float(rows) * columns).item())
        + 4 * ceil(rows / 128) * ceil(columns / 128)
    )


def scaled_product(qx, sx, qw, sw, size):
    """Makes x and W again, and multiplies them."""
    K, N = qx.shape[1], qw.shape[0]
    x = qx * sx.repeat_interleave(size, 1)[:, :K]
    w = qw * sw.repeat_interleave(size, 0)[:N].repeat_interleave(size, 1)[:, :K]
    return x @ w.T


def power_scale(largest):
    """Only just above a power of two the next one is missed: a tolerance of one in a thousand."""
    import math
    x = max(largest, 1e-4)
    return 2.0 ** math.ceil(math.log2(x / 448) - 1e-3)
