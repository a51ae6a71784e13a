"""`python -m minids.plots` draws what its flags say, once for each kind of page."""

from types import SimpleNamespace

import pytest
from training_runs import run_main

from minids import ModelArgs
from minids.plots import __main__ as program


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of drawings that the program asks for, none of which is made."""
    drawn = []

    def draw(*what):
        drawn.append(what)
        return SimpleNamespace(get_label=lambda: "an alt text")

    monkeypatch.setattr(program, "model_drawing", draw)
    return drawn


def test_two_files_are_drawn_as_the_flags_say(tmp_path, drawn):
    said = run_main(program, "--preset", "tiny", "--where", "mla", "--out", str(tmp_path))
    light, dark = tmp_path / "model.png", tmp_path / "model_dark.png"
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines() == [str(light), str(dark), "an alt text"]
    tiny = ModelArgs.preset("tiny")
    assert drawn == [(tiny, "mla", False, light), (tiny, "mla", True, dark)]


def test_a_mistake_is_one_line(drawn):
    said = run_main(program, "--where", "the cellar")
    assert said.status == 2 and said.err.count("\n") == 1 and not drawn
    wanted = "python -m minids.plots: argument --where: invalid choice: 'the cellar'"
    assert said.err.startswith(wanted)
