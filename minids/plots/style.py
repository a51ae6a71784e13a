"""The one style of every figure, what is drawn into a panel, and how a figure becomes a picture.

The figures do not pass through pyplot: no window is opened and no backend is chosen, so that they
look the same on a server and on a laptop. The background is opaque, a card that stays readable on a
dark page. The colours are those of Okabe and Ito, which readers with any common colour blindness
can tell apart; lines that share a panel differ in lightness or dash as well.
"""

import contextlib
from io import BytesIO
from itertools import cycle
from pathlib import Path

from minids.base.files import write_whole

File = str | Path | None  # a PNG file to write, or none
BLACK, GREY, ORANGE, SKY = "#222222", "#9a9a9a", "#e69f00", "#56b4e9"
GREEN, YELLOW, BLUE, RED, PINK = "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
DASHES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (PINK, "-"), (BLACK, "--")]
STYLE = {  # beside matplotlib's own defaults
    "text.color": BLACK, "axes.edgecolor": GREY, "axes.labelcolor": BLACK, "xtick.color": BLACK,
    "ytick.color": BLACK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "axes.titlesize": 10.5, "legend.fontsize": 9,
    "axes.titlelocation": "left", "legend.frameon": False, "lines.linewidth": 1.8}


@contextlib.contextmanager
def house_style():
    """Draw what follows in the one style, whatever the reader's own settings are."""
    import matplotlib.style
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float):
    """Return an empty figure that a notebook shows as a picture; width and height in inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure._repr_png_ = lambda: shown(figure)  # the name that Jupyter asks an object for
    return figure


def described(figure, alt: str):
    """Return the figure with an alt text, which a notebook stores beside the picture.

    alt: what the picture shows, in one or two sentences, for readers who cannot see it
    """
    figure.set_label(alt)
    return figure


def shown(figure):
    """Return what Jupyter stores: the picture's bytes, and its alt text where there is one."""
    alt = figure.get_label()
    return (png(figure), {"alt": alt}) if alt else png(figure)


@house_style()
def png(figure) -> bytes:
    """Return the bytes of the figure's PNG file; equal figures give equal bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def finish(figure, path: File):
    """Fix the figure's ticks and layout, save it as a PNG file if there is a path, and return it.

    Left to itself matplotlib makes the ticks at the first drawing, in the style of that moment,
    and moves the panels a little at every one. A drawing has no ticks, and its panel is the page.
    """
    if figure.get_layout_engine() or any(ax.axison for ax in figure.axes):
        figure.draw_without_rendering()
    figure.set_layout_engine(None)  # not "none", which draws everything twice
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, png(figure))
    return figure


def lines(ax, x: list, rows: dict[str, list], styles=DASHES, size: float = 0) -> None:
    """Draw one line per label.

    x: common values; rows: label -> values at x; size: of the points, 0 for none
    styles: colour, or colour and dash, of each line in turn, repeated if there are more lines
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


def heat_map(ax, rows: list[list], first: float = 0, cmap: str = "viridis", norm=None):
    """Draw a number per cell as a colour, return the picture; first: number of the first column."""
    ax.grid(visible=False)
    extent = (first - 0.5, first + len(rows[0]) - 0.5, len(rows) - 0.5, -0.5)
    return ax.imshow(rows, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest",
                     extent=extent)


def note(ax, text: str, at: tuple, offset: tuple = (0, 0), coords="data", ha: str = "left",
         va: str = "baseline") -> None:
    """Write a small text beside a point; offset: from the point, points (1/72 inch)."""
    ax.annotate(text, at, xytext=offset, xycoords=coords, textcoords="offset points", ha=ha, va=va,
                fontsize=8.5)
