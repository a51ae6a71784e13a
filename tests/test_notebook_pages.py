"""Every notebook in a real JupyterLab: Run All, each control moved, light, dark, wide, narrow.

    pytest -m exhaustive tests/test_notebook_pages.py -k 06

That takes as long as the notebooks do, so it is run by name. The tests of what it looks for are
slow ones. The pages' pictures are kept beside the test's files.
"""

import nbformat
import pytest
from test_jupyterlab import (  # noqa: F401, I001
    DRAW,
    PANEL,
    ROOT,
    browser,
    page,
    run_all,
    save,
    save_small,
    server,
    streams,
    troubles,
)
from test_jupyterlab import pytestmark as needs

from minids.lab.opening import CELL, GO_ON

# The notebooks themselves are exhaustive tests, not slow ones.
pytestmark = [mark for mark in needs if mark.name != "slow"]
VIEW = "application/vnd.jupyter.widget-view+json"
# Moves each control of a cell once, as a hand would, and waits for the output to change. Controls
# appear when their model has loaded.
MOVE = "async ([path, place]) => {" + PANEL + """
    const cell = panel.content.widgets[place].node;
    const shown = () => [...cell.querySelectorAll('.jp-OutputArea-child .jp-OutputArea-child')].map(
        part => (part.querySelector('img')?.src ?? '') + part.innerText).join('');
    const found = async (look, seconds) => {
        for (let i = 0; i < 10 * seconds; i++) {
            if (look()) return look();
            await sleep(0.1);
        }
    };
    const controls = () => [...cell.querySelectorAll(
        '.noUi-handle, .widget-dropdown select, .widget-checkbox input, .widget-text input')];
    await panel.content.scrollToItem(place, 'center');
    await found(() => controls().length && shown(), 15);
    await sleep(0.5);
    const moved = [];
    for (const control of controls()) {
        const before = shown(), bubbles = true;
        const tell = name => control.dispatchEvent(new Event(name, {bubbles}));
        const press = key => control.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles}));
        if (control.matches('.noUi-handle')) {
            press('ArrowRight');
            if (!await found(() => shown() !== before, 5)) press('ArrowLeft');
        } else if (control.matches('select')) {
            control.selectedIndex = (control.selectedIndex + 1) % control.options.length;
            tell('change');
        } else if (control.type === 'checkbox') {
            control.click();
        } else {
            control.value += ' the model';
            ['input', 'change'].forEach(tell);
            press('Enter');
        }
        const changed = await found(() => shown() !== before, 15);
        moved.push([control.className || control.tagName, Boolean(changed), cell.innerText]);
    }
    return moved;
}"""
LOOK = "async ([path, theme]) => {" + PANEL + """
    window.jupyterapp.shell.collapseLeft();
    await window.jupyterapp.commands.execute('apputils:change-theme', {theme});
    await sleep(2);
}"""
# The cell's pictures that are wider than the room they have; scrolls to the cell first.
WIDE = "async ([path, place]) => {" + PANEL + """
    await Promise.race([panel.content.scrollToItem(place, 'center'), sleep(5)]);
    await sleep(0.5);
    return [...panel.content.widgets[place].node.querySelectorAll('.jp-OutputArea img')].filter(
        picture => picture.clientWidth > picture.closest('.jp-OutputArea').clientWidth).length;
}"""
STATE = "async path => {" + PANEL + """
    const kernel = panel.sessionContext.session.kernel;
    await kernel.interrupt();
    while (kernel.status !== 'idle') await sleep(0.1);
    await sleep(0.5);
    return panel.content.model.toJSON().cells;
}"""


def controlled(cells: list[dict]) -> list[int]:
    """Return the places of the cells that show controls."""
    return [place for place, cell in enumerate(cells)
            if any(VIEW in out.get("data", {}) for out in cell.get("outputs", []))]


def unmoved(page, path: str, places: list[int]) -> list[str]:
    """Move every control of some cells; return what is wrong, one sentence each."""
    found = []
    for place in places:
        moved = page.evaluate(MOVE, [path, place])
        found += [] if moved else [f"cell {place} shows no control"]
        for name, changed, text in moved:
            found += [] if changed else [f"cell {place}: {name} moves and nothing changes"]
            found += [f"cell {place}: {line}" for line in text.splitlines()
                      if line.startswith("No picture for") or "Traceback" in line]
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")),
                         ids=lambda path: path.stem)
def test_a_notebook_in_the_page(path, server, page, run_all, tmp_path):
    name = save(nbformat.read(path, 4), server.tree / "notebooks" / path.name)
    seen = run_all(name, limit=540)
    assert troubles(seen) == []
    assert unmoved(page, name, controlled(seen.cells)) == []
    shown = [place for place, cell in enumerate(seen.cells) if any(
        "image/png" in out.get("data", {}) for out in cell.get("outputs", []))]
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        for width in (1280, 800):
            page.set_viewport_size({"width": width, "height": 900})
            page.evaluate(LOOK, [name, theme])
            for place in shown:
                assert page.evaluate(WIDE, [name, place]) == 0, f"cell {place} at {width} pixels"
                page.screenshot(path=tmp_path / f"{theme[11:]}_{width}_{place:02}.png")


FIGURE = ("from minids.lab.moving import move\nfrom minids.plots.style import new_figure\n"
          "def bar(height):\n    figure = new_figure(5, 2)\n    axes = figure.subplots()\n"
          "    axes.barh([0], [height])\n    axes.set_xlim(0, 3)\n    return figure")


@pytest.mark.slow
def test_controls_are_moved_and_judged(server, page, run_all):
    """A slider, a menu and a text move their picture; one that does nothing, or fails, is told."""
    path = save_small(server, "moved", CELL.format(address=""), FIGURE,
                      "move(bar, height=range(1, 4))", "move(bar, height={'one': 1, 'two': 2})",
                      "move(lambda text: text.upper(), text='a')",
                      "move(lambda height: bar(1), height=[1, 2])",
                      "move(lambda height: bar(1 / (2 - height)), height=[1, 2])", DRAW)
    seen = run_all(path)
    assert troubles(seen) == []
    places = controlled(seen.cells)
    assert places == [2, 3, 4, 5, 6]
    assert unmoved(page, path, places[:3]) == []
    idle, wrong = unmoved(page, path, places[3:])
    assert idle.startswith("cell 5: noUi-handle") and idle.endswith("moves and nothing changes")
    assert wrong.startswith("cell 6: No picture for height = 2: ZeroDivisionError")


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(server, page, run_all):
    """The interrupted cell says it in a sentence, and those after it have not run."""
    path = save_small(server, "interrupted", CELL.format(address=""), DRAW,
                      "import time\ntime.sleep(600)", "2")
    assert not run_all(path, limit=15).finished
    cells = page.evaluate(STATE, path)
    assert streams(cells[2], "stdout").strip() == GO_ON
    assert (cells[3]["execution_count"], cells[3]["outputs"]) == (None, [])
