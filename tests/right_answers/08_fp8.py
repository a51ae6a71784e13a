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


def quantised_blocks(w, size):
    """Padded, and all blocks at once."""
    r, c = w.shape
    wide = torch.nn.functional.pad(w, (0, -c % size, 0, -r % size))
    pieces = wide.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    scale = pieces.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448
    return e4m3(pieces / scale).flatten(2).flatten(0, 1)[:r, :c], scale[:, 0, :, 0]


def quantised_blocks(w, size):
    """With split, and PyTorch's own format."""
    values, scales = [], []
    for band in w.split(size):
        parts = band.split(size, dim=1)
        own = [part.abs().max().clamp(min=1e-4) / 448 for part in parts]
        values.append(torch.cat([(part / s).to(torch.float8_e4m3fn).float()
                                 for part, s in zip(parts, own, strict=True)], dim=1))
        scales.append(torch.stack(own))
    return torch.cat(values), torch.stack(scales)


def scaled_product(qx, sx, qw, sw, size):
    """Band by band of the weight."""
    bands = []
    for i, band in enumerate(qw.split(size)):
        total = 0
        for b, (x, w) in enumerate(zip(qx.split(size, 1), band.split(size, 1), strict=True)):
            total = total + (x @ w.T) * (sx[:, b:b + 1] * sw[i, b])
        bands.append(total)
    return torch.cat(bands, dim=1)


def scaled_product(qx, sx, qw, sw, size):
    """All tiles at once, padded."""
    tiles = sx.size(1)
    pad = tiles * size - qx.size(1)
    x, w = (torch.nn.functional.pad(q, (0, pad)).unflatten(1, (tiles, size)) for q in (qx, qw))
    parts = torch.einsum("mbk,nbk->bmn", x, w)
    scales = torch.einsum("mb,nb->bmn", sx, sw.repeat_interleave(size, 0)[:len(qw)])
    return (parts * scales).sum(0)


def power_scale(largest):
    """A loop in both directions."""
    scale = 1.0
    while max(largest, 1e-4) > 448 * scale:
        scale *= 2
    while max(largest, 1e-4) <= 448 * scale / 2:
        scale /= 2
    return scale


def power_scale(largest):
    """The logarithm, rounded up."""
    import math
    return float(2 ** math.ceil(math.log2(max(largest, 1e-4) / 448)))


def quantised_blocks(w, size):
    """Padded to whole blocks, all at once."""
    import torch.nn.functional as F
    r, c = w.shape
    down, across = -(-r // size), -(-c // size)
    full = F.pad(w, (0, across * size - c, 0, down * size - r))
    blocks = full.view(down, size, across, size)
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-4) / 448
    values = e4m3(blocks / scales[:, None, :, None]).reshape(down * size, across * size)
    return values[:r, :c], scales


def quantised_blocks(w, size):
    """PyTorch's own E4M3 type, back as floats, tiled from row slices."""
    import torch
    rows, scales = [], []
    for strip in w.split(size, dim=0):
        cells = strip.split(size, dim=1)
        own = [max(cell.abs().max().item(), 1e-4) / 448 for cell in cells]
        scales.append(own)
        rows.append(torch.cat([(cell / s).clamp(-448, 448).to(torch.float8_e4m3fn).float()
                               for cell, s in zip(cells, own, strict=True)], dim=1))
    return torch.cat(rows), torch.tensor(scales)


def scaled_product(qx, sx, qw, sw, size):
    """Number by number over tiles, in a list of rows."""
    import torch
    M, K = qx.shape
    rows = []
    for m in range(M):
        row = []
        for n in range(qw.shape[0]):
            y = 0.0
            for t, lo in enumerate(range(0, K, size)):
                part = (qx[m, lo:lo + size] * qw[n, lo:lo + size]).sum()
                y = y + part * sx[m, t] * sw[n // size, t]
            row.append(y)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def scaled_product(qx, sx, qw, sw, size):
    """Padded tiles, one einsum for the parts, another for the scales."""
    import torch
    import torch.nn.functional as F
    K, N, n = qx.shape[1], qw.shape[0], sx.shape[1]
    x, w = (F.pad(q, (0, n * size - K)).unflatten(1, (n, size)) for q in (qx, qw))
    parts = torch.einsum("mtk,ntk->mnt", x, w)
    owner = torch.arange(N) // size
    return torch.einsum("mnt,mt,nt->mn", parts, sx, sw[owner])


def power_scale(largest):
    """Doubles and halves until it fits."""
    x, s = max(abs(largest), 1e-4), 1.0
    while x / s > 448:
        s *= 2
    while x / (s / 2) <= 448:
        s /= 2
    return s


def power_scale(largest):
    """frexp: 448 is 0.875 times 2 to the 9."""
    import math
    mantissa, exponent = math.frexp(max(largest, 1e-4))
    return 2.0 ** (exponent - 9 + (mantissa > 0.875))
