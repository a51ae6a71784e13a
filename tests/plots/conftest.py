"""Every figure that these tests draw looks as it did when somebody last looked at it.

`looks.json` holds digests of what each test draws: positions, sizes, colours, words, limits, ticks,
and the text for those who do not see it. After a change that is meant, look at the figures and
record them anew:

    LOOKS=record pytest -n 0 tests/plots
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from minids.plots import style

LOOKS = Path(__file__).with_name("looks.json")
TRAITS = (
    "text", "position", "fontsize", "fontfamily", "weight", "rotation", "ha", "va", "color",
    "alpha", "zorder", "xydata", "linewidth", "linestyle", "marker", "markersize", "edgecolor",
    "facecolor", "fill", "hatch", "array", "clim", "extent", "sizes", "offsets", "drawstyle")


def plain(value):
    """Return a value as JSON knows it, numbers to three digits after the point."""
    if isinstance(value, np.ndarray | np.generic):
        value = np.ma.filled(value, np.nan).tolist()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return round(value, 3) + 0.0
    return value if isinstance(value, str | int | bool | None) else str(type(value))


def traits(artist) -> list:
    """Return what an artist looks like."""
    found = [type(artist).__name__]
    for trait in TRAITS:
        if hasattr(artist, f"get_{trait}"):
            found.append((trait, plain(getattr(artist, f"get_{trait}")())))
    if hasattr(artist, "get_patch_transform"):
        path = artist.get_path()
        found.append(plain(artist.get_patch_transform().transform(path.vertices)))
    if hasattr(artist, "get_paths"):
        found += [plain(path.vertices) for path in artist.get_paths()]
    return found


def look(figure) -> str:
    """Return a digest of what a figure looks like, without what matplotlib itself decides."""
    seen = [plain(figure.get_size_inches()), [traits(text) for text in figure.texts]]
    for ax in figure.axes:
        texts = [text for text in ax.get_children() if isinstance(text, Text)]  # titles, too
        texts += [ax.xaxis.label, ax.yaxis.label]
        seen += [plain([ax.get_xlim(), ax.get_ylim(), ax.get_xscale(), ax.get_yscale()]),
                 [traits(text) for text in texts]]
        seen += [traits(artist) for kind in ("lines", "patches", "collections", "images")
                 for artist in getattr(ax, kind)]
    return digest(seen)


def frame(figure) -> str:
    """Return a digest of what a finished figure has around its data: ticks, grids, legends."""
    seen = []
    for ax in filter(lambda ax: ax.axison, figure.axes):
        grid = ax.get_subplotspec() and ax.get_subplotspec().get_gridspec()
        seen += [[grid.get_width_ratios(), grid.get_height_ratios()] if grid else None]
        for axis in (ax.xaxis, ax.yaxis):
            flags, lines = axis.get_tick_params(), axis.get_gridlines()
            seen += [plain(axis.get_ticklocs()), axis.get_visible(),
                     lines[0].get_color() if lines else None,
                     sorted((name, plain(flags[name])) for name in flags),
                     [[t.get_text(), t.get_color(), t.get_fontsize()]
                      for t in axis.get_ticklabels()]]
        seen += [[(name, spine.get_visible(), plain(spine.get_edgecolor()))
                  for name, spine in sorted(ax.spines.items())]]
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()] + figure.legends
    seen += [[legend.get_title().get_text(), legend._ncols, str(legend._loc), legend.handlelength,
              legend.get_frame_on(), [[text.get_text(), text.get_fontsize(), text.get_color()]
                                      for text in legend.get_texts()]] for legend in legends]
    return digest(seen)


def digest(seen: list) -> str:
    """Return a few characters that stand for all that was seen."""
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:8]


@pytest.fixture(autouse=True)
def looks(request, monkeypatch):
    """Compare what a test draws with what it drew before; a new test has nothing to compare."""
    drawn, finish, described = [], style.finish, style.described

    def noted(figure, *given):
        seen = look(figure)
        drawn.append(f"{seen} {frame(finish(figure, *given))}")
        return figure

    def read(figure, alt: str):
        drawn.append(digest([alt]))
        return described(figure, alt)

    monkeypatch.setattr(style, "finish", noted)
    monkeypatch.setattr(style, "described", read)
    yield
    name = f"{request.node.path.stem}::{request.node.name}"
    known = json.loads(LOOKS.read_text("utf-8")) if LOOKS.exists() else {}
    if os.environ.get("LOOKS") == "record" and drawn:
        lines = (known | {name: drawn}).items()
        LOOKS.write_text("{\n" + ",\n".join(
            f"{json.dumps(test)}: {json.dumps(found)}" for test, found in sorted(lines)) + "\n}\n")
    elif name in known:
        assert drawn == known[name], f"figures look different: see {__file__}"
