"""The static site of the course: no dead links, nothing from outside, nothing left as LaTeX.

`faults` reads a folder of pages and says what is wrong; a wrong site shows that it can.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from matplotlib.path import Path as Outline
from nbformat.v4 import new_code_cell, new_output

from minids.lab import site
from minids.lab.formulas import MATHS, Formulas, outline, plainer, svg

ROOT = Path(__file__).resolve().parents[2]
NAMES = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


class Page(HTMLParser):
    """links: (tag, address) of all that is linked or loaded; anchors: ids; bare: images without a
    text; scripts: tags that would run"""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.bare, self.scripts = [], set(), 0, 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [(tag, found[name]) for name in ("href", "src") if found.get(name)]
        self.anchors |= {found["id"]} if "id" in found else set()
        self.bare += tag == "img" and not found.get("alt")
        self.scripts += tag in ("script", "iframe", "object")


def faults(folder: Path) -> list[str]:
    """Return what is wrong with a site: dead links, resources from outside, untold images."""
    pages = {path.name: Page(path) for path in sorted(folder.glob("*.html"))}
    found = []
    for name, page in pages.items():
        found += [f"{name}: {page.scripts} scripts"] if page.scripts else []
        found += [f"{name}: {page.bare} images without a text"] if page.bare else []
        for tag, link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                if tag != "a" and not link.startswith("data:"):
                    found.append(f"{name}: {link} comes from outside")
            elif target and not (folder / target).is_file():
                found.append(f"{name}: {link} is dead")
            elif anchor and anchor not in pages[target or name].anchors:
                found.append(f"{name}: {link} is dead")
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[Path, str]:
    """Return the site's folder, and what the program printed; it takes half a minute."""
    out = tmp_path_factory.mktemp("site") / "pages"
    undrawn = site.write_site(out)
    return out, undrawn


@pytest.mark.slow
def test_the_site_has_no_dead_link_and_needs_no_network(pages):
    assert faults(pages[0]) == []


@pytest.mark.slow
def test_every_formula_is_drawn(pages):
    assert pages[1] == []


@pytest.mark.slow
def test_index_and_ways_reach_every_page(pages):
    out, _ = pages
    index = Page(out / "index.html").links
    for before, name, after in zip([None, *NAMES], NAMES, [*NAMES[1:], None], strict=False):
        assert ("a", f"{name}.html") in index
        links = {link for tag, link in Page(out / f"{name}.html").links if tag == "a"}
        assert {f"{near}.html" for near in (before, after) if near} | {"index.html"} <= links
        pictures = [link for tag, link in index if tag == "img"]
        assert any(link.startswith(f"figures/{name[:2]}_") for link in pictures)


@pytest.mark.slow
def test_a_page_shows_what_the_notebook_shows(pages):
    """Text, code, printed output, a table, the figure; solutions and set-up are folded."""
    text = (pages[0] / "00_map.html").read_text(encoding="utf-8")
    nb = nbformat.read(ROOT / "notebooks" / "00_map.ipynb", 4)
    images = [out.data["image/png"] for cell in nb.cells for out in cell.get("outputs", [])
              if "image/png" in out.get("data", {})]
    assert images and all(image.replace("\n", "") in text.replace("\n", "") for image in images)
    solutions = sum(cell.metadata.get("nbgrader", {}).get("solution", False) for cell in nb.cells)
    assert text.count("<summary>Our solution: ") == solutions
    assert text.count("<summary>Set-up</summary>") == 1 and "<table" in text


@pytest.mark.slow
def test_a_picture_that_can_be_moved_says_so(pages):
    """A static page shows the still picture, which does not look as if it could move."""
    note = "you can move this"
    for name in NAMES:
        nb = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        moved = sum(bool(re.search(r"minids\.lab(\.| import )moving", c.source)) for c in nb.cells)
        text = (pages[0] / f"{name}.html").read_text(encoding="utf-8")
        assert (note in text) == bool(moved), name


def test_a_wrong_site_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="here"></h1><a href="#here"></a><a href="#gone"></a><a href="b.html#gone"></a>'
        '<a href="c.html"></a><img src="no.png" alt="a"><img src="data:x"><script></script>'
        '<link href="https://a/b.css"><a href="https://a/b">')
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    assert faults(tmp_path) == [
        "a.html: 1 scripts", "a.html: 1 images without a text", "a.html: #gone is dead",
        "a.html: b.html#gone is dead", "a.html: c.html is dead", "a.html: no.png is dead",
        "a.html: https://a/b.css comes from outside"]


@pytest.mark.parametrize("name", ["06_balance.png", "06_film.gif"])
def test_a_picture_is_copied_to_the_site(name, tmp_path):
    tag = site.linked(f'<img src="../figures/{name}">', "notebooks", tmp_path)
    assert tag == f'<img src="figures/{name}">'
    assert (tmp_path / "figures" / name).read_bytes() == (ROOT / "figures" / name).read_bytes()


@pytest.mark.parametrize("address, source", [
    ("", "<a >"), ("https://github.com/a/b", '<a href="https://github.com/a/b/blob/main/LICENSE">')])
def test_a_file_that_is_not_on_the_site(address, source, monkeypatch, tmp_path):
    """It is linked where the repository has an address, and only named where it has none."""
    monkeypatch.setattr(site, "address_of", lambda: address)
    assert site.linked('<a href="../LICENSE">', "notebooks", tmp_path) == source
    assert site.linked('<a href="07_mtp.ipynb#a">', "notebooks", tmp_path) == (
        '<a href="07_mtp.html#a">')


def test_a_picture_has_its_own_text_or_that_of_the_page_of_figures():
    own = {"image/png": {"alt": "own"}}
    cell = new_code_cell('draw(FIGURES / "07_mtp.png")', outputs=[
        new_output("execute_result", {"image/png": ""}, metadata=about) for about in ({}, own)])
    site.prepared(nbformat.v4.new_notebook(cells=[cell]), Formulas(), {"07_mtp.png": "shown"})
    assert [out.metadata["image/png"]["alt"] for out in cell.outputs] == ["shown", "own"]


@pytest.mark.parametrize("formula", [
    r"\frac1T \sum_t s_{i,t}", r"\sqrt K \le \big(x\big)", r"\#\{t : i \text{ among}\} F\&B",
    r"\underbrace{2\,V D}_{\text{embed, head}} + n",
    r"\begin{pmatrix} \cos a & -\sin a \\ \sin a & \cos a \end{pmatrix}"])
def test_a_formula_becomes_a_picture(formula):
    picture = svg(formula)
    assert picture.startswith("<svg") and 'd="M' in picture and svg(formula) == picture
    assert r"\dfrac{1}{T}" in plainer(r"\frac1T", block=True)


def test_an_outline_has_every_line_and_curve_and_is_closed():
    move, line, curve3, curve4, close = 1, 2, 3, 4, 79  # matplotlib's codes
    path = Outline([(1, 2), (3, 4), (5, 6), (7, 8), (1, 1), (2, 2), (3, 3), (0, 0)],
                   [move, line, curve3, curve3, curve4, curve4, curve4, close])
    assert outline(path) == (
        "M1.0 -2.0L3.0 -4.0Q5.0 -6.0 7.0 -8.0C1.0 -1.0 2.0 -2.0 3.0 -3.0Z")


def test_an_unknown_formula_stays_as_it_is_and_is_told():
    formulas = Formulas()
    assert formulas.put_back(formulas.take(r"so $\nosuch{a<b}$.")) == (
        r"so <code>\nosuch{a&lt;b}</code>.")
    assert formulas.undrawn == [r"\nosuch{a<b}"]


@pytest.mark.parametrize("text, count", [
    ("`$a$` and $b$", 1), ("```\n$a$ $b$\n```\n$c$", 1), ("costs $5 and $6", 0), (r"\$a\$", 0),
    ("$$\na\nb\n$$ and $c$", 2), ("two $a$, $b$", 2)])
def test_formulas_are_told_from_code_and_money(text, count):
    assert sum(not found["code"] for found in MATHS.finditer(text)) == count


def test_the_program_says_where_the_site_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(site, "write_site", lambda out: ["x"])
    site.main(["--out", str(tmp_path / "s")])
    assert capsys.readouterr().out == (f"this formula stays as LaTeX: x\n"
                                       f"next: open {tmp_path / 's'}/index.html\n")
