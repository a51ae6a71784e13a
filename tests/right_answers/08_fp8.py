"""Right answers to the exercises of notebook 08, unlike the reference."""


def to_e4m3_by_hand(x):
    """By frexp."""
    import math
    _, exponent = math.frexp(x)
    step = math.ldexp(1.0, max(exponent - 1, -6) - 3)
    return float(min(448, round(x / step) * step))


def tiles_apart(quantise):
    """Every tile of eight rows, one after the other."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    before = quantise(x)
    for row in (0, 1, 2, 63, 64, 126, 127):
        for tile in (0, 1):
            loud = x.clone()
            loud[row, 128 * tile + 5] = 1e5
            changed = quantise(loud) != before
            changed[row, 128 * tile:128 * tile + 128] = False
            if changed.any():
                return False
    return True


def stored_bytes(rows, columns):
    """With ceil."""
    import math
    return rows * columns + 4 * math.ceil(rows / 128) * math.ceil(columns / 128)
