"""Figures of FP8: what a scale keeps, and what one scale for too many numbers loses."""

import math

from minids.plots import style

SMALLEST, NORMAL, LARGEST = 2.0 ** -9, 2.0 ** -6, 448.0  # of E4M3: subnormal, normal, any number
NUMBERS = [n * SMALLEST for n in range(1, 8)] + [
    (8 + n) * 2.0 ** (e - 3) for e in range(-6, 9) for n in range(8)][:-1]  # 480 stands for NaN


@style.house_style()
def e4m3_figure(values, scale: float, path: style.File = None):
    """Draw E4M3's number line under a scale, and how a tensor's values fall on it.

    values: absolute values above zero, any sequence
    """
    import numpy as np
    values = np.asarray(values, dtype=float)
    edges = [scale * edge for edge in (SMALLEST / 2, NORMAL, LARGEST)]
    end = math.ceil(math.log2(values.max())) + 5  # bins of quarter octaves: zones end on edges
    bins = 2.0 ** np.arange(end - 42, end, 0.25)
    ax = style.new_figure(9.0, 3.4).subplots()
    zones = [(bins[0], "become 0", style.RED), (edges[0], "lose bits", style.YELLOW),
             (edges[1], "keep 3 bits", style.GREEN), (edges[2], "are clipped", style.PINK)]
    shares = np.diff([0.0, *(np.mean(values < edge) for edge in edges), 1.0])
    counts, _ = np.histogram(values, bins)
    heights, width = 100 * counts / len(values), np.diff(bins)
    high = 1.25 * max(heights)
    for (left, name, colour), right, share in zip(zones, [*edges, bins[-1]], shares, strict=True):
        left, right = np.clip([left, right], bins[0], bins[-1])
        inside = (bins[:-1] >= left * 0.999) & (bins[:-1] < right * 0.999)
        ax.axvspan(left, right, color=colour, alpha=0.1, linewidth=0)
        ax.bar(bins[:-1][inside], heights[inside], width[inside], align="edge", color=colour)
        if right > 10 * left:
            style.note(ax, f"{share:.1%}\n{name}", ((left * right) ** 0.5, 0.98), ha="center",
                       va="top", coords=("data", "axes fraction"))
    ax.vlines([scale * n for n in NUMBERS], -0.12 * high, -0.02 * high, linewidth=0.5,
              color=style.BLACK)
    ax.set(xscale="log", xlim=(bins[0], bins[-1]), ylim=(-0.14 * high, high),
           xlabel="size of a value (log scale); ticks below: E4M3's numbers times the scale",
           ylabel="values (percent)", title=f"Scale 2^{math.log2(scale):g}: {shares[0]:.1%} of the "
           f"values become 0, {shares[3]:.1%} are clipped")
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= high])  # none at E4M3's ticks
    return style.finish(ax.figure, path)


@style.house_style()
def fp8_figure(sizes: list[float], errors: dict[str, list], lengths: list[int],
               sums: dict[str, list], path: style.File = None):
    """Draw what scales of three sizes do to each token's gradient, and the error of long sums.

    sizes: norm of each token's gradient, in times the largest
    errors: label -> relative error of each token's gradient, percent
    lengths: of sums; sums: label -> largest error at each, percent
    """
    left, right = style.new_figure(9.8, 4.0).subplots(1, 2)
    colours = style.RED, style.ORANGE, style.BLUE
    for (name, row), colour in zip(errors.items(), colours, strict=True):
        left.scatter(sizes, row, s=4, color=colour, linewidth=0, label=name)
    left.set(xlabel="size of a token's gradient (times the largest, log scale)", xscale="log",
             yscale="log", ylabel="its error (percent, log scale)",
             title="One scale per tensor loses the quiet tokens")
    left.legend(title="one scale per", markerscale=3, loc="upper right")
    style.lines(right, lengths, sums, (style.RED, style.BLUE), 3)
    right.set(xlabel="length of the sum (count, log scale)", ylabel="largest error (percent)",
              title="Moving to FP32 keeps long sums accurate")
    right.set_xscale("log", base=2)
    right.legend()
    return style.finish(left.figure, path)
