"""The pictures behind the controls show the moment they are asked for; the film is a GIF file."""

from io import BytesIO
from math import pi

import pytest
from PIL import Image

from minids.plots import scenes
from minids.plots.style import png

QUARTER = {"as trained": [pi / 2, pi / 200], "YaRN": [pi / 2, pi / 400]}  # radians per token
SHARES = {name: [[n, 4.0 - n, 0.0, 0.0], [1.0] * 4] for n, name in enumerate("ab")}
PASSES = [dict(start=0, draft=[], kept=0, own="def"), dict(start=1, draft=["x"], kept=0, own="y"),
          dict(start=2, draft=["("], kept=1, own=")")]
WEIGHTS = {"layer 1": [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], "layer 2": [[1.0, 0.0, 0.0]] * 2}
CURVES = {0.01: [2.0, 1.0, 0.1, 0.2] + [0.1, 0.2] * 8, 0.001: [2.0] * 20}
SCENES = {
    "clock": lambda: scenes.clock_figure(QUARTER, [0, 1], 150, 100),
    "routes": lambda: scenes.routes_figure(["a", "b"], WEIGHTS),
    "loads": lambda: scenes.loads_figure(SHARES, 1, 4),
    "speed": lambda: scenes.speed_figure(CURVES, 0.01),
    "drafting": lambda: scenes.drafting_figure(PASSES, 3)}


@pytest.mark.parametrize("name", SCENES)
def test_equal_scenes_give_equal_bytes_and_an_alt_text(name):
    figure = SCENES[name]()
    assert png(figure) == png(SCENES[name]()) and len(figure.get_label()) > 40


def hands(position: int, trained: int = 100):
    """Return the figure, and the ends of the hands as (x, y), one list per face."""
    figure = scenes.clock_figure(QUARTER, [0, 1], position, trained)
    ends = [[(round(line.get_xdata()[1], 6), round(line.get_ydata()[1], 6))
             for line in ax.get_lines()] for ax in figure.axes]
    return figure.get_suptitle(), ends


def test_clock_hands_turn_clockwise_from_the_top():
    _, ends = hands(100)  # pair 0: 25 full turns; pair 1: a quarter turn, with YaRN an eighth
    assert ends == [[(0, 1), (0, 1)], [(1, 0), (round(0.5 ** 0.5, 6),) * 2]]


def test_clock_names_the_hands_that_left_the_trained_sector():
    assert "pair 1 points where training never did" in hands(150)[0]
    assert "every hand points where training has been" in hands(100)[0]
    assert "every hand" in hands(150, trained=400)[0]  # trained for a full turn


def test_routes_are_drawn_expert_by_token():
    figure = SCENES["routes"]()
    drawn = [ax.images[0].get_array().tolist() for ax in figure.axes]
    assert drawn == [[[0.5, 0.0], [0.5, 0.25], [0.0, 0.75]], [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == ["a", "b"]
    assert figure.get_suptitle().startswith("Each token visits 2 of 3 experts")


@pytest.mark.parametrize("step", [1, 2])
def test_loads_are_those_of_the_step(step):
    figure = scenes.loads_figure(SHARES, step, 4)
    bars = [[bar.get_height() for bar in ax.patches] for ax in figure.axes]
    assert bars == [rows[step - 1] for rows in SHARES.values()]
    starved = {1: ["3 starved", "2 starved"], 2: ["0 starved"] * 2}[step]
    assert [ax.get_title("left").split(", ")[1] for ax in figure.axes] == starved
    title = {1: "Step 1: busiest expert at 4.0 times the even share (a), at 3.0 (b)",
             2: "Step 2: busiest expert at 1.0 times the even share (a), at 1.0 (a)"}
    assert figure.get_suptitle() == title[step]


def test_a_figure_that_moves_equals_the_one_drawn_for_the_step():
    moved = scenes.at_step(scenes.loads_figure(SHARES, 1, 4), SHARES, 2)
    drawn = scenes.loads_figure(SHARES, 2, 4)
    assert (png(moved), moved.get_label()) == (png(drawn), drawn.get_label())


def test_speed_says_when_it_settles():
    assert SCENES["speed"]().axes[0].get_title("left") == (
        "Speed 0.01: settles after 2 steps, then swings up to 0.20")
    wide = scenes.speed_figure({0.1: [30.0, 12.0], 0.2: [20.0, 12.0], 0.3: [25.0, 12.5]}, 0.1)
    heights = [note.xy[1] for note in wide.axes[0].texts]  # apart by a share of the highest
    assert heights == pytest.approx([12.0, 12.0 + 0.06 * 30, 12.0 + 2 * 0.06 * 30])
    still = scenes.speed_figure({0.1: [2 - i / 20 for i in range(20)]}, 0.1)
    assert "still falling after 19 steps" in still.axes[0].get_title("left")


@pytest.mark.parametrize("shown, title, tokens", [
    (1, "Tokens written after pass 1: 1; drafts accepted: 0 of 0", ["def"]),
    (3, "Tokens written after pass 3: 4; drafts accepted: 1 of 2", ["def", "x", "y", "(", ")"])])
def test_drafting_shows_the_passes_so_far(shown, title, tokens):
    ax = scenes.drafting_figure(PASSES, shown).axes[0]
    assert ax.get_title("left") == title
    assert [text.get_text() for text in ax.texts] == tokens
    assert len(ax.get_lines()) == tokens.count("x")  # the failed draft is crossed out


def test_film_is_a_gif_of_all_steps_the_same_bytes_twice(tmp_path):
    frames = [scenes.loads_figure(SHARES, step, 4) for step in (1, 2)]
    made = scenes.gif(frames, tmp_path / "new" / "film.gif")
    assert (tmp_path / "new" / "film.gif").read_bytes() == made == scenes.gif(frames, None)
    film = Image.open(BytesIO(made))
    assert (film.format, film.n_frames, film.info["loop"]) == ("GIF", 2, 0)
    first = film.convert("RGB").tobytes()
    film.seek(1)
    assert film.convert("RGB").tobytes() != first
