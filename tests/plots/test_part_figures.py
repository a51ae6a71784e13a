"""The figures of FP8's scales, of sparse attention and of bills hold the data they were given."""

import pytest
from test_plots import axes_without_a_unit, collisions, lines_of

from minids.fp8 import to_e4m3
from minids.plots import counts, scales, selection


def test_number_line_has_every_positive_number_of_the_format():
    import torch
    bytes_ = torch.arange(1, 127, dtype=torch.uint8)  # 127 is NaN, 128 and more are negative
    assert scales.NUMBERS == bytes_.view(torch.float8_e4m3fn).float().tolist()


@pytest.mark.parametrize("scale", [1.0, 2.0 ** -4, 8.0])
def test_number_line_counts_what_the_format_loses(scale):
    """Beside the package's own rounding; 600 is clipped, and 2^-12 becomes 0, at scale 1."""
    import torch
    values = torch.tensor([2.0 ** -12, 2.0 ** -8, 0.01, 0.3, 1.0, 40.0, 600.0, 5000.0])
    figure = scales.e4m3_figure(values, scale)
    zero = (to_e4m3(values / scale).float() == 0).double().mean().item()
    clipped = (values / scale > 448).double().mean().item()
    (ax,) = figure.axes
    assert f"{zero:.1%} of the values become 0, {clipped:.1%} are" in ax.get_title("left")
    ticks = [path.vertices[0][0] for path in ax.collections[0].get_paths()]
    assert ticks == [scale * number for number in scales.NUMBERS]
    assert sum(bar.get_height() for bars in ax.containers for bar in bars) == pytest.approx(100)
    assert min(ax.get_yticks()) == 0  # below are the numbers' ticks, which are no share
    assert collisions(figure) == [] == axes_without_a_unit(figure)


def test_fp8_figure_shows_the_numbers_given():
    errors = {"tensor": [3.0, 90.0], "block": [3.0, 9.0], "tile": [3.0, 4.0]}
    sums = {"14 bits": [0.1, 2.0], "moved": [0.1, 0.2]}
    figure = scales.fp8_figure([1.0, 0.01], errors, [128, 4096], sums)
    left, right = figure.axes
    assert errors == {dots.get_label(): dots.get_offsets()[:, 1].tolist()
                      for dots in left.collections}
    assert lines_of(right) == sums
    assert axes_without_a_unit(figure) == []


def test_dsa_figure_shows_the_numbers_given():
    held = {"attention's best": [0.5, 0.9], "indexer": [0.4, 0.8], "window": [0.1, 0.2],
            "random": [0.0, 0.1]}
    figure = selection.dsa_figure([1, 2], held, [1024, 2048],
                                  {"dense": [1e9, 2e9], "sparse": [1e9, 1e9]})
    left, right = figure.axes
    assert lines_of(left) == held and lines_of(right) == {"dense": [1, 2], "sparse": [1, 1]}
    assert axes_without_a_unit(figure) == []


def test_questions_figure_marks_the_indexers_best_and_counts_agreement():
    weights = [[0.0, 1.0, 0.0], [0.25, 0.0, 0.75], [0.0, 0.0, 1.0]]
    figure = selection.questions_figure(weights, 10, [11, 10, 12], ["key 1", "key 2", "key 3"])
    ax = figure.axes[0]
    assert ax.images[0].get_array().tolist() == [[0, 100, 0], [25, 0, 75], [0, 0, 100]]
    marks = [line.get_xydata().tolist() for line in ax.get_lines()]
    assert marks == [[[11, 0]], [[10, 1]], [[12, 2]]]
    assert "for 2 of 3 questions" in ax.get_title("left")


def test_query_figure_parts_selected_tokens_from_the_others():
    figure = selection.query_figure([0.1, 0.7, 0.2], [-3.0, 2.0, 1.0], [1, 2], "key 5")
    upper, lower = figure.axes
    assert "the 2 selected of 3 tokens hold 90%" in upper.get_title("left")
    others, selected, bar = lower.get_lines()
    assert others.get_xydata().tolist() == [[0, -3]]
    assert selected.get_xydata().tolist() == [[1, 2], [2, 1]] and bar.get_ydata()[0] == 1
    assert collisions(figure) == [] == axes_without_a_unit(figure)


def test_bill_map_draws_lines_of_equal_cost():
    """At 6e12 FLOPs per dollar, 1e9 parameters and 1e10 tokens cost ten million."""
    figure = counts.bill_map({"small": (1e9, 1e11)}, (1e9, 1e10), 6e12)
    (ax,) = figure.axes
    lines = ax.get_lines()
    costs = [[a * n / 1e12 for n, a in line.get_xydata()] for line in lines[:9]]
    for power, ends in enumerate(costs, 1):
        assert ends == pytest.approx([10.0 ** power] * 2)
    assert ax.get_title("left") == "1B active parameters, 0.01T tokens: 10,000,000 USD"
    assert figure.get_label().endswith("; small, and as a star a run of 10,000,000 USD")
    assert axes_without_a_unit(figure) == []


def test_bill_map_names_no_line_whose_name_would_leave_it():
    (ax,) = counts.bill_map({}, (1e9, 1e10), 1.2e12).axes  # a million buys just 2e9 tokens
    assert ax.texts[0].get_text() == "$10,000,000"
