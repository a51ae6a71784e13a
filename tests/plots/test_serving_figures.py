"""The figures of serving hold the data they were given, and nothing overlaps."""

from test_plots import axes_without_a_unit, collisions

from minids.plots import serving

POINTS = {"plain": [(1, 10.0), (2, 15.0), (4, 20.0)], "small": [(1, 10.0), (8, 60.0), (16, 80.0)]}
SPANS = {"one": [(0, 0, 3), (1, 0, 5), (0, 5, 2)], "other": [(0, 0, 3), (1, 0, 5), (0, 3, 2)]}


def test_throughput_figure_ends_each_line_where_memory_is_full():
    figure = serving.throughput_figure({"computed": POINTS, "measured": POINTS}, alt="two panels")
    for ax in figure.axes:
        lines = [list(zip(*line.get_data(), strict=True)) for line in ax.lines]
        assert lines[::2] == list(POINTS.values())
        assert lines[1::2] == [[points[-1]] for points in POINTS.values()]
        assert ax.get_xscale() == ax.get_yscale() == "log"
        assert [*ax.xaxis.get_minorticklocs(), *ax.yaxis.get_minorticklocs()] == []
    assert figure.get_label() == "two panels"
    assert collisions(figure) == [] == axes_without_a_unit(figure)


def test_batching_figure_has_a_bar_for_each_reply():
    figure = serving.batching_figure(SPANS, 2)
    for ax, spans in zip(figure.axes, SPANS.values(), strict=True):
        bars = [(round(b.get_y() + b.get_height() / 2), b.get_x(), b.get_width())
                for b in ax.patches]
        assert bars == spans and ax.get_xlim() == (0, 7)
        colours = [b.get_facecolor() for b in ax.patches]
        assert colours[0] != colours[1]
    assert collisions(figure) == [] == axes_without_a_unit(figure)
