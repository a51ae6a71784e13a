"""The few things that every drawing of a model is made of: boxes, arrows, labels, grids, a legend.

A drawing is a page 800 units wide, one unit per pixel of a notebook, with y pointing down. Boxes
are placed by their centre and know their edges, so that arrows start and end on them:

    page = Drawing(120, "A norm precedes each layer")
    norm = page.box(100, 70, 120, 30, "RMSNorm", GREY)
    layer = page.box(300, 70, 120, 30, "MLA", BLUE, "attention")
    page.arrow(norm.right, layer.left, "7,168")

Colours have a meaning: see `ROLES`. `dark=True` draws the same page for a dark background.
"""

from itertools import pairwise
from math import dist
from typing import NamedTuple

from minids.plots import style

WIDTH = 800  # units of a page, pixels of a notebook
TITLE, NAME, SMALL = 11.5, 9.5, 8.5  # points; the smallest is 12 pixels high on the page
ROLES = {  # part -> its colour in every drawing
    "attention": style.BLUE, "cached": style.RED, "dense": style.SKY, "routed": style.GREEN,
    "shared": style.YELLOW, "gate": style.ORANGE, "mtp": style.PINK, "plain": style.GREY}
PAGES = {  # dark or not -> background, text, quiet text, lines, share of a colour in a box
    False: ("#ffffff", style.BLACK, "#5c5c5c", "#8a8a8a", 0.2),
    True: ("#0d1117", "#e6edf3", "#a3adb8", "#7d8590", 0.38)}


class Box(NamedTuple):
    """A box's centre and size; the middles of its edges are points (x, y) for arrows."""

    x: float
    y: float
    width: float
    height: float

    left = property(lambda self: (self.x - self.width / 2, self.y))
    right = property(lambda self: (self.x + self.width / 2, self.y))
    top = property(lambda self: (self.x, self.y - self.height / 2))
    bottom = property(lambda self: (self.x, self.y + self.height / 2))


def mix(colour: str, page: str, share: float) -> str:
    """Return `share` of one colour on the other, both '#rrggbb'."""
    pairs = [(int(colour[i:i + 2], 16), int(page[i:i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


class Drawing:
    """A page to draw on. Every method returns where its thing stands, or nothing."""

    def __init__(self, height: float, title: str, dark: bool = False):
        """height: units, 1/100 inch; title: the drawing's message"""
        self.page, self.ink, self.quiet, self.line, self.share = PAGES[dark]
        self.figure = style.new_figure(WIDTH / 100, height / 100)
        self.figure.set_facecolor(self.page)
        self.figure.set_layout_engine(None)
        self.ax = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.ax.set_axis_off()
        self.text(16, 22, title, TITLE, ha="left", weight="bold")

    def text(self, x: float, y: float, words: str, size: float = NAME, colour: str = "",
             ha: str = "center", va: str = "center", weight: str = "normal") -> None:
        """Write words around a point, in ink unless a colour is given."""
        self.ax.text(x, y, words, fontsize=size, color=colour or self.ink, ha=ha, va=va,
                     weight=weight, linespacing=1.25)

    def label(self, x: float, y: float, words: str, ha: str = "center", va: str = "center") -> None:
        """Write a quiet, small text: a shape, a width, a remark."""
        self.text(x, y, words, SMALL, self.quiet, ha, va)

    def box(self, x: float, y: float, width: float, height: float, name: str = "",
            colour: str = style.GREY, detail: str = "", strong: bool = False,
            dashed: bool = False) -> Box:
        """Draw a rounded box with a name, and under it a detail, around its centre.

        strong: a thick edge, for what a drawing is about; dashed: for what is shared or optional
        """
        from matplotlib.patches import FancyBboxPatch
        round_box = f"round,pad=0,rounding_size={min(5, height / 3)}"
        self.ax.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle=round_box, zorder=2,
            facecolor=mix(colour, self.page, self.share), edgecolor=colour,
            linewidth=2.2 if strong else 1.1, linestyle="--" if dashed else "-"))
        if name and detail:
            self.text(x, y - 8, name)
            self.label(x, y + 8, detail)
        elif name:
            self.text(x, y, name)
        return Box(x, y, width, height)

    def frame(self, x: float, y: float, width: float, height: float, name: str = "",
              colour: str = "") -> Box:
        """Draw an empty frame around other things; its name stands in its upper left corner."""
        from matplotlib.patches import FancyBboxPatch
        self.ax.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, zorder=0,
            boxstyle="round,pad=0,rounding_size=8", edgecolor=colour or self.line,
            facecolor=mix(colour or self.line, self.page, 0.07), linewidth=0.9))
        if name:
            self.text(x - width / 2 + 9, y - height / 2 + 12, name, NAME, ha="left")
        return Box(x, y, width, height)

    def arrow(self, *points: tuple[float, float], label: str = "", colour: str = "",
              dashed: bool = False, head: bool = True) -> None:
        """Draw an arrow through points; its label stands beside the middle of its longest part."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path
        self.ax.add_patch(FancyArrowPatch(
            path=Path(points), arrowstyle="-|>" if head else "-", mutation_scale=9, zorder=3,
            shrinkA=0, shrinkB=0, color=colour or self.line, linewidth=1.2, capstyle="butt",
            linestyle="--" if dashed else "-", joinstyle="miter"))
        if label:
            (x0, y0), (x1, y1) = max(pairwise(points), key=lambda ends: dist(*ends))
            if y0 == y1:
                self.label((x0 + x1) / 2, y0 - 3, label, va="bottom")
            else:
                self.label(max(x0, x1) + 5, (y0 + y1) / 2, label, ha="left")

    def plus(self, x: float, y: float) -> Box:
        """Draw a small circle with a plus in it: a sum."""
        from matplotlib.patches import Circle
        self.ax.add_patch(Circle((x, y), 8, facecolor=self.page, edgecolor=self.ink, zorder=4,
                                 linewidth=1.1))
        self.ax.text(x, y, "+", fontsize=NAME, color=self.ink, ha="center", zorder=5,
                     va="center_baseline")
        return Box(x, y, 16, 16)

    def grid(self, x: float, y: float, colours: list[list[str]], cell: tuple[float, float],
             gap: float = 1) -> Box:
        """Draw rows of small cells, one colour each, with (x, y) as their upper left corner."""
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle
        width, height = cell
        cells = [Rectangle((x + j * width, y + i * height), width - gap, height - gap)
                 for i, row in enumerate(colours) for j in range(len(row))]
        faces = [colour for row in colours for colour in row]
        self.ax.add_collection(PatchCollection(cells, facecolors=faces, linewidths=0, zorder=2))
        wide, high = width * len(colours[0]) - gap, height * len(colours) - gap
        return Box(x + wide / 2, y + high / 2, wide, high)

    def shade(self, colour: str, strength: float) -> str:
        """Return a colour between the page (0) and itself (1)."""
        return mix(colour, self.page, strength)

    def legend(self, x: float, y: float, entries: dict[str, str]) -> None:
        """Draw a row of swatches with their meaning; entries: meaning -> colour."""
        from matplotlib.patches import Rectangle
        for name, colour in entries.items():
            self.ax.add_patch(Rectangle((x, y - 5), 10, 10, edgecolor=colour, linewidth=1.1,
                                        facecolor=mix(colour, self.page, self.share)))
            self.label(x + 15, y, name, ha="left")
            x += 36 + 6.3 * len(name)

    def done(self, alt: str, path: style.File = None):
        """Return the figure with its alt text, and write it as a PNG file if there is a path."""
        return style.finish(style.described(self.figure, alt), path)
