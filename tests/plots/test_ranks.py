"""The figures of many ranks hold the data they were given, and nothing overlaps."""

from test_plots import axes_without_a_unit, collisions, lines_of

from minids.plots import ranks

PIECES = {"embedding": 10.0, "experts 0": 40.0}
LAYOUTS = {"two": [{"embedding": ((0, 0.5), (0, 1)), "experts 0": ((0, 0.5), (0, 0.5))},
                   {"embedding": ((0.5, 1), (0, 1)), "experts 0": ((0.5, 1), (0.5, 1))}],
           "one": [{"experts 0": ((0, 1), (0, 1))}]}
ROWS = [[("F", 0, 7, 0, 2), ("B", 0, 7, 4, 8), ("W", 2, 7, 8, 9)], [("F", 1, 7, 2, 4)]]


def test_shards_figure_shows_what_is_stored_and_at_hand():
    figure = ranks.shards_figure(PIECES, LAYOUTS)
    bars = [[(b.get_x(), b.get_width(), b.get_alpha()) for b in ax.patches] for ax in figure.axes]
    assert bars[0] == [(0, 10, 0.25), (0, 5, 1.0), (10, 20, 0.25), (10, 20, 1.0),
                       (0, 10, 0.25), (5, 5, 1.0), (30, 20, 0.25), (30, 20, 1.0)]
    assert bars[1] == [(10, 40, 0.25), (10, 40, 1.0)]
    assert [ax.get_title("left") for ax in figure.axes] == list(LAYOUTS)
    assert collisions(figure) == [] == axes_without_a_unit(figure)


def test_schedule_figure_has_a_box_for_each_pass():
    figure = ranks.schedule_figure({"first": ROWS, "second": ROWS[1:]})
    spans = [[tuple(path.get_extents().intervalx) for part in ax.collections
              for path in part.get_paths()] for ax in figure.axes]
    assert sorted(spans[0]) == [(0, 2), (2, 4), (4, 8), (8, 9)] and spans[1] == [(2, 4)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["7"] * 3  # W: a colour is enough
    assert collisions(figure) == [] == axes_without_a_unit(figure)


def test_wrong_ranks_figure_shows_the_numbers_given():
    losses, max_vio = {"right": [2.0, 1.0], "wrong": [2.0, 1.5]}, {"all": [1.0, 0.1]}
    figure = ranks.wrong_ranks_figure(losses, max_vio)
    left, right = figure.axes
    assert lines_of(left) == losses and lines_of(right) == max_vio
    assert collisions(figure) == [] == axes_without_a_unit(figure)
    left.set_ylabel("loss")  # wrong variant
    assert axes_without_a_unit(figure) == ["y0"]
