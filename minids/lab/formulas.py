"""Draw the formulas of a page as SVG, so that it needs no script and no network.

matplotlib sets them. It knows most of LaTeX's mathematics, and `PLAINER` turns the rest of what the
notebooks use into that.
"""

import html
import re

SIZE = 100.0  # of the letters, in the drawing's units
EM = 88.0  # of the same units that make one em: letters as high as those of the page around them
# A formula between dollar signs, but not within code: code is matched first and left alone.
MATHS = re.compile(r"(?P<code>^```.*?^```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$"
                   r"|(?<![\\$])\$(?P<inline>[^$\s](?:[^$\n]*[^$\s\\])?)\$(?!\d)", re.M | re.S)
PLAINER = [(r"\\[bB]igg?[lr]?(?![a-zA-Z])", ""), (r"\\le(?![a-zA-Z])", r"\\leq"),
           (r"\\ge(?![a-zA-Z])", r"\\geq"), (r"\\([dt])frac(?![a-zA-Z])", r"\\frac"),
           (r"\\frac(\d)(\w)", r"\\frac{\1}{\2}"), (r"\\sqrt (\w)", r"\\sqrt{\1}"),
           (r"\\underbrace\{(.*?)\}_\{\\text\{.*?\}\}", r"\1"), (r"\\operatorname\{", r"\\mathrm{"),
           (r"\\&", "&"), (r"\\lVert|\\rVert", r"\\|"), (r"\\lvert|\\rvert", "|")]
MATRIX = re.compile(r"\\begin\{pmatrix\}(.*?)\\\\(.*?)\\end\{pmatrix\}", re.S)


def plainer(formula: str, block: bool = False) -> str:
    """Return a formula in the LaTeX that matplotlib knows; block: whether it has its own line."""
    formula = MATRIX.sub(lambda rows: r"\genfrac{(}{)}{0}{0}" + "".join(
        "{" + row.replace("&", r"\quad ") + "}" for row in rows.groups()), formula)
    formula = " ".join(formula.split())
    for pattern, instead in PLAINER:
        formula = re.sub(pattern, instead, formula)
    return formula.replace(r"\frac", r"\dfrac") if block else formula


def outline(path) -> str:
    """Return a matplotlib path as SVG's path data, y downward."""
    letters = {path.MOVETO: "M", path.LINETO: "L", path.CURVE3: "Q", path.CURVE4: "C",
               path.CLOSEPOLY: "Z"}
    parts = []
    for points, code in path.iter_segments(simplify=False):
        pairs = zip(points[::2], -points[1::2], strict=True)
        parts.append(letters[code] + ("" if code == path.CLOSEPOLY else
                                      " ".join(f"{x:.1f} {y:.1f}" for x, y in pairs)))
    return "".join(parts)


def svg(formula: str, block: bool = False) -> str:
    """Return a formula as SVG in the colour and size of the text around it.

    Raises `ValueError` if matplotlib cannot set it.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath, text_to_path
    letters = FontProperties(size=SIZE, math_fontfamily="stix")
    text = f"${plainer(formula, block)}$"
    path = TextPath((0, 0), text, prop=letters)
    width, height, depth = text_to_path.get_text_width_height_descent(text, letters, True)
    box = f"0 {depth - height:.1f} {width:.1f} {height:.1f}"
    size = f"width:{width / EM:.3f}em;height:{height / EM:.3f}em"
    size += f";vertical-align:{-depth / EM:.3f}em"
    return (f'<svg class="formula" role="img" aria-label="{html.escape(formula)}" viewBox="{box}" '
            f'style="{size}"><path d="{outline(path)}"/></svg>')


class Formulas:
    """Formulas taken out of Markdown, and put back as pictures into the HTML made of it.

    They wait outside because Markdown would take their signs for its own.
    """

    def __init__(self):
        self.pictures, self.undrawn = [], []

    def take(self, markdown: str) -> str:
        """Return Markdown with a mark in place of each formula."""
        return MATHS.sub(self.mark, markdown)

    def mark(self, found: re.Match) -> str:
        """Draw one formula and return its mark; code stays as it is."""
        if found["code"]:
            return found[0]
        formula = found["block"] or found["inline"]
        try:
            picture = svg(formula, block=bool(found["block"]))
        except ValueError:
            self.undrawn.append(formula)
            picture = f"<code>{html.escape(formula)}</code>"
        if found["block"]:
            picture = f'<span class="display">{picture}</span>'
        self.pictures.append(picture)
        return f"\ue000{len(self.pictures) - 1}\ue001"

    def put_back(self, page: str) -> str:
        """Return HTML with the pictures in place of the marks."""
        return re.sub("\ue000(\\d+)\ue001", lambda found: self.pictures[int(found[1])], page)
