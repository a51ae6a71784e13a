"""A handout says of a notebook what it is about, and prints on one page."""

import html
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from minids.lab import handouts
from minids.lab.exercises import exercises

PATHS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
[BALANCE] = [path for path in PATHS if path.stem == "06_balance"]
PAGE = cache(handouts.handout)  # its formulas are drawn: a second and more


@pytest.mark.parametrize("path", [pytest.param(
    path, id=path.stem, marks=() if path.stem[:2] in ("00", "06") else pytest.mark.slow)
    for path in PATHS])
def test_it_has_the_question_the_exercises_and_the_summary(path):
    page = PAGE(path)
    text = html.unescape(re.sub(r"<svg.*?</svg>|<[^>]*>", "", page, flags=re.S))
    assert "The question." in text and "Paper." in text and "What to remember" in text
    found = exercises(path)
    assert f"Exercises, {sum(e.points for e in found)} points" in text
    for exercise in found:
        assert f"<td>{exercise.number}</td><td><code>{exercise.name}</code></td>" in page
    assert len(re.findall("<li>", page[page.index("What to remember"):])) == 5
    assert "<li><p>" not in page  # a single paragraph needs no room around it
    assert not re.search("[\ue000\ue001]", page)  # every formula was put back
    assert "$$" not in page and "http://" not in page and "<script" not in page


def test_equations_are_numbered_and_drawn():
    page = PAGE(BALANCE)
    assert re.findall(r"<span>\((\d)\)</span>", page) == ["1", "2", "3"]
    assert page.count('class="equation"') == 3 and page.count('<svg class="formula"') >= 3


def test_shapes_come_from_the_functions():
    assert "sequence_loss(scores, k)" in PAGE(BALANCE)
    assert "scores: (T, E) of one sequence" in PAGE(BALANCE)


def test_every_page_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(handouts, "handout", lambda path: f"of {path.stem}")
    handouts.write_handouts(tmp_path / "pages", PATHS)
    written = {path.stem: path.read_text() for path in (tmp_path / "pages").glob("*.html")}
    assert written == {path.stem: f"of {path.stem}" for path in PATHS}


def test_a_long_task_is_cut_after_a_sentence():
    task = "Return one. " + "A sentence of some length that says something. " * 10
    kept = handouts.first_sentence(task)
    assert kept.startswith("Return one. A sentence") and kept.endswith(".") and len(kept) < 190


@pytest.mark.slow
def test_each_prints_on_one_page():
    tools = pytest.importorskip("playwright.sync_api")
    found = [path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
             if path]
    if not found:
        pytest.skip("no Chromium is installed")
    with tools.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        tab, long = browser.new_page(), []
        for path in PATHS:
            tab.set_content(PAGE(path))
            pdf = tab.pdf(prefer_css_page_size=True)
            long += [path.stem] if len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf)) != 1 else []
        browser.close()
    assert long == []
