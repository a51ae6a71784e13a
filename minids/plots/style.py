"""The one style of every figure, and how a figure becomes a file or a notebook's picture.

No window is opened and no backend is chosen: the figures do not pass through pyplot, so that they
look the same on a server and on a laptop. matplotlib is imported where it is used.

The background is white and opaque, a card that stays readable on a dark page too. The colours are
those of Okabe and Ito, which readers with any common colour blindness can tell apart; lines that
share a panel differ in lightness or dash as well.
"""

import contextlib
from io import BytesIO
from pathlib import Path

from minids.base.files import write_whole

BLACK, GREY, ORANGE, SKY = "#222222", "#9a9a9a", "#e69f00", "#56b4e9"
GREEN, YELLOW, BLUE, RED, PINK = "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
DASHES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (PINK, "-"), (BLACK, "--")]
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "text.color": BLACK,
    "axes.edgecolor": GREY, "axes.labelcolor": BLACK, "xtick.color": BLACK, "ytick.color": BLACK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "grid.linestyle": "-",
    "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "axes.labelsize": 10, "legend.fontsize": 9,
    "legend.frameon": False, "lines.linewidth": 1.8, "figure.dpi": 100,
}


@contextlib.contextmanager
def house_style():
    """Draw what follows in the one style, whatever the reader's own settings are."""
    import matplotlib
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float):
    """Return an empty figure that a notebook shows as a picture; width and height in inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = lambda: png(figure)  # the name that Jupyter asks an object for
    return figure


@house_style()
def png(figure) -> bytes:
    """Return the bytes of the figure's PNG file; equal figures give equal bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def finish(figure, path: str | Path | None):
    """Fix the figure's ticks and layout, save it if there is a path, and return it.

    path: PNG file to write; its folder is made if need be
    Left to itself matplotlib makes the ticks at the first drawing, in the style of that moment,
    and moves the panels a little at every one.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, png(figure))
    return figure
