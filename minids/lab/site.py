"""Write the course as a static site: the notebooks with their stored outputs, and an index.

    python -m minids.lab.site --out runs/site

The index is notebooks/README.md; the folder's other pages come along. The pages need neither a
server nor a network and run no script: formulas are pictures, links between notebooks lead to
their pages. Nothing is executed.
"""

import html
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, demand, option
from minids.base.files import write_whole
from minids.lab.formulas import Formulas
from minids.lab.opening import LINE, address_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="style.css">
</head>
<body>
{before}
<main>
{body}
</main>
{after}
</body>
</html>
"""
# What differs from nbconvert's own pages: no prompts, and folded cells.
CELLS = """{%- extends 'basic/index.html.j2' -%}
{% block codecell %}{{ super.super() }}{% endblock %}
{% block input_group %}
{%- set fold = cell.metadata.get('fold') -%}
{% if fold %}<details><summary>{{ fold }}</summary>{% endif %}
<div class="code">{{ cell.source | highlight_code(metadata=cell.metadata) }}</div>
{% if fold %}</details>{% endif %}
{% endblock %}
{% block output_group %}<div class="output">{{ super.super() }}</div>
{%- if cell.metadata.get('moves') %}<p class="note">In JupyterLab, you can move this.</p>{% endif %}
{% endblock %}
{% block output %}{{ super.super() }}{% endblock %}
{% block markdowncell %}<div class="text">{{ cell.source | markdown2html }}</div>{% endblock %}
"""
STYLES = {"": "default", "@media (prefers-color-scheme: dark)": "github-dark"}  # Pygments' names
MOVES = re.compile(r"^(moving\.)?move\(", re.M)  # a cell's last line, where its picture moves
CARD = re.compile(r"^\| \[(\d\d_\w+\.png)\]\(\S+\) \| (.+?) \|", re.M)


@dataclass(frozen=True)
class SiteArgs(Settings):
    """Settings of the site."""

    out: str = option("runs/site", "folder of the site", folder=True)


def folded(cell) -> str:
    """Return the title of a cell that the page folds, "" if it shows the cell."""
    graded = cell.metadata.get("nbgrader", {})
    if graded.get("solution"):
        return f"Our solution: {graded['grade_id']}"
    if graded.get("grade"):
        return "The test that gives points"
    if not cell.metadata.get("jupyter", {}).get("source_hidden"):
        return ""
    return "The code" if cell.outputs else "Set-up"


def prepared(nb, formulas: Formulas, shows: dict[str, str]):
    """Return a notebook for nbconvert: formulas marked, cells to fold named, pictures described.

    shows: file of a figure -> what it shows, for pictures that have no text of their own
    """
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas.take(LINE.sub("", cell.source))
            continue
        cell.metadata["fold"] = folded(cell)
        cell.metadata["moves"] = cell.outputs and MOVES.search(cell.source) is not None
        saved = [name for name in re.findall(r'"(\d\d_\w+\.png)"', cell.source) if name in shows]
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = formulas.take("".join(data["text/markdown"]))
            if "image/png" in data and saved:
                about = output.metadata.setdefault("image/png", {})
                about.setdefault("alt", shows[saved[0]])
    return nb


def linked(page: str, folder: str, out: Path) -> str:
    """Return HTML whose links stay within the site or lead to the repository's address.

    folder: where the source of the page stands in the repository. A picture is copied; a file that
    is not on the site is linked where the address is decided, and only named where it is not
    """
    address = address_of()

    def lead(found: re.Match) -> str:
        target, _, anchor = found[2].partition("#")
        if not target or re.match(r"\w+:", target):
            return found[0]
        path = (ROOT / folder / target).resolve()
        if path.suffix in (".ipynb", ".md") and path.parent == ROOT / "notebooks":
            name = "index" if path.stem == "README" else path.stem
            new = f"{name}.html" + (anchor and f"#{anchor}")
        elif path.suffix in (".png", ".gif"):
            (out / "figures").mkdir(exist_ok=True)
            shutil.copyfile(path, out / "figures" / path.name)
            new = f"figures/{path.name}"
        else:
            path = path.relative_to(ROOT)
            new = address and f"{address}/blob/main/{path}" + (anchor and f"#{anchor}")
        return f'{found[1]}="{new}"' if new else ""

    return re.sub(r'(?<=[\s"])(href|src)="([^"]*)"', lead, page)


def anchored(page: str) -> str:
    """Return HTML whose headings have the anchors that GitHub gives them."""
    def name(found: re.Match) -> str:
        words = html.unescape(re.sub(r"<[^>]*>|¶", "", found[2])).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        return f'<h{found[1]} id="{anchor}">'

    page = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", page)
    return re.sub(r"<h(\d) [^>]*>(?=(.*?)</h\1>)", name, page)


def way(before: tuple, after: tuple, kind: str) -> str:
    """Return the links to the page before, the index and the page after; each (file, title)."""
    def link(page: tuple, text: str) -> str:
        return f'<span><a href="{page[0]}">{text.format(html.escape(page[1]))}</a></span>'

    parts = [link(before, "← {}") if before else "<span></span>", link(("index.html", "All"), "{}"),
             link(after, "{} →") if after else "<span></span>"]
    return f'<nav class="{kind}">{"".join(parts)}</nav>'


def stylesheet() -> str:
    """Return the site's own rules and those of the code's colours, light and dark."""
    from pygments.formatters import HtmlFormatter
    rules = (Path(__file__).with_suffix(".css")).read_text(encoding="utf-8")
    for when, style in STYLES.items():
        code = HtmlFormatter(style=style).get_style_defs(".highlight")
        rules += f"{when} {{\n{code}\n}}\n" if when else f"{code}\n"
    return rules


def write_site(out: Path) -> list[str]:
    """Write all pages; return the formulas that stay as LaTeX."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import markdown2html_mistune
    exporter, formulas = HTMLExporter(template_name="basic"), Formulas()
    exporter.raw_template = CELLS
    shows = dict(CARD.findall((ROOT / "figures" / "README.md").read_text(encoding="utf-8")))
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    books = [nbformat.read(path, as_version=4) for path in paths]
    pages = [(f"{path.stem}.html", nb.cells[0].source.splitlines()[0].lstrip("# "))
             for path, nb in zip(paths, books, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    for i, (nb, page) in enumerate(zip(books, pages, strict=True)):
        body, _ = exporter.from_notebook_node(prepared(nb, formulas, shows))
        ways = [pages[i - 1] if i else (), pages[i + 1] if i + 1 < len(pages) else ()]
        body = anchored(linked(formulas.put_back(body), "notebooks", out))
        write_whole(out / page[0], PAGE.format(
            title=html.escape(page[1]), body=body, before=way(*ways, "start"),
            after=way(*ways, "end")))
    for path in (ROOT / "notebooks").glob("*.md"):
        text, index = path.read_text(encoding="utf-8"), path.stem == "README"
        body = anchored(linked(markdown2html_mistune(text), "notebooks", out))
        write_whole(out / ("index.html" if index else f"{path.stem}.html"), PAGE.format(
            title=text.splitlines()[0].lstrip("# "), body=body, after="",
            before="" if index else way((), (), "start")))
    write_whole(out / "style.css", stylesheet())
    return formulas.undrawn


def main(argv: list[str] | None = None) -> None:
    """Write the site and say where it begins."""
    [given] = parse("minids.lab.site", __doc__, SiteArgs, argv=argv)
    out = SiteArgs(**given).out
    demand("out", out, (ROOT / "notebooks").is_dir(), "in a clone: only it has the notebooks")
    for formula in write_site(Path(out)):
        print(f"this formula stays as LaTeX: {formula}")
    print(f"next: open {out}/index.html")


if __name__ == "__main__":
    run_program("minids.lab.site", main)
