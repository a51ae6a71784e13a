"""Draw into one panel: lines, noisy series, heat maps, notes."""

from itertools import cycle

from minids.plots.style import DASHES


def name_axes(ax, xlabel: str, ylabel: str, log: tuple[int, int] = (0, 0)) -> None:
    """Name both axes, with their units; log: base of each axis if it is logarithmic, else 0."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    for base, scale in zip(log, (ax.set_xscale, ax.set_yscale), strict=True):
        if base:
            scale("log", base=base)


def lines(ax, x: list, rows: dict[str, list], styles=DASHES, size: float = 0) -> None:
    """Draw one line per label.

    x: common values; rows: label -> values at x
    styles: colour, or colour and dash, of each line in turn, from the start again if there are
        more lines; size: of the points, 0 for none
    """
    for (name, row), style in zip(rows.items(), cycle(styles), strict=False):
        colour, dash = (style, "-") if isinstance(style, str) else style
        ax.plot(x, row, color=colour, linestyle=dash, marker="o" if size else "",
                markersize=size, label=name)


def series(ax, steps: list, values: list[float], colour, name: str) -> None:
    """Draw a noisy series: each step pale, the mean of its neighbourhood strong.

    The mean stands at the middle of its window, where it does not lag behind a falling loss, and
    only where the window is whole.
    """
    reach = len(values) // 80
    middles = range(reach, len(values) - reach)
    means = [sum(values[i - reach:i + reach + 1]) / (2 * reach + 1) for i in middles]
    ax.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8, label="_each step")
    ax.plot([steps[i] for i in middles], means, color=colour, label=name)


def training_losses(ax, tokens: list[int], losses: dict[str, list], colours: tuple) -> None:
    """Draw training losses over the tokens seen.

    tokens: seen after each step; losses: label -> loss at each step, nats per token
    """
    for (name, row), colour in zip(losses.items(), colours, strict=True):
        series(ax, tokens, row, colour, name)
    name_axes(ax, "tokens seen (count)", "training loss\n(nats per token)")
    ax.legend()


def heat_map(ax, rows: list[list], first: float = 0, cmap: str = "viridis", norm=None):
    """Draw a number per cell as a colour, and return the picture.

    rows: from the top; first: the first column's number; norm: matplotlib's map to 0..1
    """
    ax.grid(visible=False)
    extent = (first - 0.5, first + len(rows[0]) - 0.5, len(rows) - 0.5, -0.5)
    return ax.imshow(rows, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest",
                     extent=extent)


def note(ax, text: str, at: tuple, offset: tuple = (0, 0), coords="data", ha: str = "left",
         va: str = "baseline") -> None:
    """Write a small text beside a point; offset: from the point, points (1/72 inch)."""
    ax.annotate(text, at, xytext=offset, xycoords=coords, textcoords="offset points", ha=ha, va=va,
                fontsize=8.5)
