"""A movable picture: sliders where a reader sits, one still picture wherever else a cell runs."""

import base64
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from minids.lab import moving
from minids.lab.moving import VIEW, film, move
from minids.plots.style import new_figure


def bar(height=1, name="one"):
    """A bar of some height"""
    if height > 90:
        raise ValueError("too high\nto draw")
    figure = new_figure(2, 1)
    figure.subplots().bar([name], [height])
    return figure


def png(output: dict) -> bytes:
    """Return the picture in an output."""
    return base64.b64decode(output["data"]["image/png"])


@pytest.fixture
def reader(monkeypatch):
    """Somebody sits at the front end."""
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(moving, "attended", lambda: True)


def test_a_run_without_a_reader_stores_the_still_picture_alone():
    """As tests and static pages run a notebook: the same bytes twice, nothing of widgets."""
    source = ("from minids.lab.moving import move\nfrom minids.plots.style import new_figure\n"
              "def dot(x):\n    'A dot that moves'\n    figure = new_figure(2, 1)\n"
              "    figure.subplots().plot([x], [0], 'o')\n    return figure\n")
    nb = new_notebook(cells=[new_code_cell(source), new_code_cell("move(dot, x=range(3, 9))"),
                             new_code_cell("move(dot, x=range(3, 9))"), new_code_cell("dot(3)")])
    client = NotebookClient(nb, kernel_name="python3", timeout=600, startup_timeout=600)
    client.execute(stderr=subprocess.DEVNULL)
    [one], [two], [plain] = (cell.outputs for cell in nb.cells[1:])
    assert set(one.data) == {"image/png", "text/plain"} == set(plain.data)
    assert png(one) == png(two) == png(plain) and one.data["text/plain"] == plain.data["text/plain"]
    assert one.metadata == {"image/png": {"alt": "A dot that moves"}}
    assert "widgets" not in nb.metadata and VIEW not in nbformat.writes(nb)


def test_a_reader_gets_sliders_and_the_still_picture_beside_them(reader):
    shown = move(bar, height=[2, 1, 3], name=["b", "a"])
    data, about = shown._repr_mimebundle_()
    assert data[VIEW]["model_id"] and png({"data": data}) == bar(2, "b")._repr_png_()
    assert about == {"image/png": {"alt": "A bar of some height"}}


def test_what_a_control_says_is_drawn(reader):
    shown = move(bar, height=[2, 1, 3], name=["b", "a"])
    shown.box()
    assert png(shown.screen.outputs[0]) == bar(2, "b")._repr_png_()
    shown.handles["height"].value, shown.handles["name"].value = 3, "a"
    assert png(shown.screen.outputs[0]) == bar(3, "a")._repr_png_() != bar(2, "b")._repr_png_()


def test_an_error_while_drawing_is_one_sentence_and_the_next_picture_comes(reader):
    shown = move(bar, height=[2, 99])
    shown.box()
    shown.handles["height"].value = 99
    assert shown.screen.outputs[0]["text"] == "No picture for height = 99: ValueError: too high"
    shown.handles["height"].value = 2
    assert png(shown.screen.outputs[0]) == bar(2)._repr_png_()


def test_an_error_in_the_still_picture_is_raised():
    with pytest.raises(ValueError, match="too high"):
        move(bar, height=[99, 1])


@pytest.mark.parametrize("values, kind, first, other", [
    (range(4, 9), "SelectionSlider", 4, 8), ([0.5, 0.1, 0.9], "SelectionSlider", 0.5, 0.9),
    (film(range(0, 50, 10)), "IntSlider", 0, 40),
    (film(range(0, 50, 10), first=20), "IntSlider", 20, 40), (["b", "a"], "Dropdown", "b", "a"),
    ({"V3": 512, "tiny": 32}, "Dropdown", 512, 32), (True, "Checkbox", True, False),
    ("def f(", "Text", "def f(", "x = 1")])
def test_every_kind_of_value_has_its_control(reader, values, kind, first, other):
    shown = move(lambda value: f"it is {value}", value=values)
    assert shown.still == f"it is {first}"
    shown.box()
    handle = shown.handles["value"]
    assert type(handle).__name__ == kind and handle.value == first
    handle.value = other
    assert shown.screen.outputs[0]["data"] == {"text/plain": f"it is {other}"}


def test_numbers_stand_in_order_on_their_slider(reader):
    assert [value for _, value in moving.control("n", [2, 9, 1])[0].options] == [1, 2, 9]


def test_controls_stand_below_each_other(reader):
    shown = move(bar, height=[2, 1, 3], name=["b", "a"])
    shown.box()
    assert {handle.style.description_width for handle in shown.handles.values()} == {"3.6em"}


def test_a_film_has_a_play_button(reader):
    slider, play = moving.control("step", film(range(0, 50, 10), seconds=0.5))
    assert (slider.min, slider.max, slider.step) == (play.min, play.max, play.step) == (0, 40, 10)
    assert play.interval == 500


def test_without_ipywidgets_a_reader_is_told_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(moving, "attended", lambda: True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    data, _ = move(bar, height=[2, 1])._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"}
    assert capsys.readouterr().out == moving.MISSING + "\n"


def test_a_table_moves_too(reader):
    from minids.lab.lesson import table
    shown = move(lambda n: table(["n"], [(n,)]), n=[1, 2])
    shown.box()
    shown.handles["n"].value = 2
    assert "| 2 |" in shown.screen.outputs[0]["data"]["text/markdown"]


@pytest.mark.parametrize("request_, there", [
    ({"content": {"allow_stdin": True}}, True), ({"content": {"allow_stdin": False}}, False),
    ({"content": {}}, False), ({}, False)])
def test_a_reader_is_known_by_the_request(monkeypatch, request_, there):
    """A front end that answers `input()` has somebody at it; nbclient and nbval do not."""
    import IPython
    kernel = type("Kernel", (), {"get_parent": lambda self: request_})()
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), {"kernel": kernel})())
    assert moving.attended() is there


def test_a_plain_program_has_no_reader():
    assert not moving.attended()
