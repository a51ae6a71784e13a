"""The figures hold the data they were given, with units on every axis, and reach the disk."""

import subprocess
import sys
from io import BytesIO
from itertools import combinations
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from minids import ModelArgs
from minids.costs import count_parameters
from minids.plots import counts, decoding, model, runs, speed
from minids.plots.counts import PARTS, short
from minids.plots.style import png

COUNTS = {name: count_parameters(ModelArgs.preset(name)) for name in ("tiny", "v2-lite", "v3")}
ROWS = [{"vocab_size": v, "nats_per_token": n, "bits_per_byte": h}
        for v, n, h in [(4096, 3.1, 1.6), (512, 1.9, 1.9), (1024, 2.3, 1.7)]]


def run_of(steps: int, layers: int = 3) -> list[dict]:
    """Return lines of a made-up metrics.jsonl that is evaluated at every fifth step."""
    lines = []
    for step in range(1, steps + 1):
        main = 2 + 6 / step + 0.1 * (step % 3)
        line = dict(step=step, loss=1.3 * main, main=main, mtp=main + 1, balance=1.0, lr=1e-3,
                    grad_norm=1.0, tokens_per_s=1e3, max_vio=[i + 1 / step for i in range(layers)])
        lines.append(line | ({"valid_bpb": main / 2} if step % 5 == 0 else {}))
    return lines


def measured(ms: float, **kinds: float) -> dict:
    return dict(what="a step", ms=ms, kinds=kinds)


PROFILE = {"before": dict(where="a card", training=measured(100.0, products=30.0, attention=20.0),
                          decoding=measured(50.0, products=1.0)),
           "after": dict(where="a card", training=measured(40.0, products=30.0),
                         decoding=measured(4.0, products=1.0, routing=2.0))}


def drawn(figure, axis: int) -> list[tuple[list, list]]:
    """Return x and y of every line in one panel."""
    return [(list(line.get_xdata()), list(line.get_ydata()))
            for line in figure.axes[axis].get_lines()]


def shows(figure, axis: int, xs: list, ys: list) -> bool:
    """Return whether one line of the panel runs through exactly these points."""
    return (list(xs), list(ys)) in drawn(figure, axis)


def axes_without_a_unit(figure) -> list[str]:
    """Return the axes whose label lacks a unit; steps are their own unit, names have none."""
    labels = {}
    for i, ax in enumerate(figure.axes):
        if ax.get_subplotspec().is_last_row():
            labels[f"x{i}"] = ax.get_xlabel()
        if not ax.yaxis.have_units():
            labels[f"y{i}"] = ax.get_ylabel()
    return [name for name, label in labels.items() if "(" not in label and label != "step"]


FIGURES = {"loss_curve": (runs.loss_curve, run_of(30)),
           "parameter_map": (counts.parameter_map, COUNTS),
           "compression_curve": (counts.compression_curve, ROWS),
           "profile_figure": (speed.profile_figure, PROFILE)}


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_label_and_a_unit(name):
    draw, data = FIGURES[name]
    figure = draw(data)
    assert axes_without_a_unit(figure) == []
    last = len(figure.axes) - 1
    figure.axes[-1].set_xlabel("amount")  # wrong variant
    assert axes_without_a_unit(figure) == [f"x{last}"]


def collisions(figure) -> list[str]:
    """Return the panels and legends that, with labels, overlap or leave the figure."""
    figure.draw_without_rendering()
    boxes = {f"panel {i}": ax.get_tightbbox() for i, ax in enumerate(figure.axes)}
    boxes |= {f"legend {i}": legend.get_tightbbox() for i, legend in enumerate(figure.legends)}
    page = figure.bbox.padded(1)  # antialiasing may touch the next pixel
    outside = [name for name, box in boxes.items()
               if not page.containsx(box.x0) or not page.containsx(box.x1)
               or not page.containsy(box.y0) or not page.containsy(box.y1)]
    return outside + [f"{a} on {b}" for a, b in combinations(boxes, 2)
                      if boxes[a].overlaps(boxes[b])]


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_overlaps(name):
    draw, data = FIGURES[name]
    figure = draw(data)
    assert collisions(figure) == []
    figure.axes[1].set_position([0, 0, 1, 1])  # wrong variant
    assert {"panel 1", "panel 0 on panel 1"} <= set(collisions(figure))


def corner(picture: bytes) -> list[float]:
    """Return red, green, blue and opacity of a picture's first pixel."""
    return imread(BytesIO(picture))[0, 0].tolist()


@pytest.mark.parametrize("name", FIGURES)
def test_picture_is_on_disk_and_in_the_notebook_on_opaque_white(name, tmp_path):
    """The same bytes each time; opaque, so that black text stays readable on a dark page."""
    draw, data = FIGURES[name]
    figure = draw(data, tmp_path / "new" / "a.png")
    draw(data, str(tmp_path / "b.png"))
    picture = (tmp_path / "new" / "a.png").read_bytes()
    assert (tmp_path / "b.png").read_bytes() == picture == figure._repr_png_()
    assert corner(picture) == [1, 1, 1, 1]


def test_loss_curve_shows_each_step():
    metrics = run_of(30)
    figure = runs.loss_curve(metrics)
    steps = [row["step"] for row in metrics]
    losses, validation, balance = range(3)
    assert shows(figure, losses, steps, [row["main"] for row in metrics])
    assert shows(figure, losses, steps, [row["mtp"] for row in metrics])
    assert shows(figure, validation, [5, 10, 15, 20, 25, 30],
                 [row["valid_bpb"] for row in metrics[4::5]])
    for layer in range(3):
        assert shows(figure, balance, steps, [row["max_vio"][layer] for row in metrics])
    wrong = [row["main"] for row in metrics[1:] + metrics[:1]]
    assert not shows(figure, losses, steps, wrong)


def test_mean_of_a_long_run_does_not_lag():
    """On a straight line a centred mean changes nothing; one that looks back lies above it."""
    values = [5 - 0.01 * step for step in range(400)]
    figure = runs.loss_curve([dict(step=i, main=v) for i, v in enumerate(values)])
    (_, each), (steps, means) = drawn(figure, 0)
    assert each == values and steps == list(range(5, 395))
    # Sums of eleven numbers below 5 in FP64: rounding is far below 1e-12.
    np.testing.assert_allclose(means, values[5:-5], rtol=0, atol=1e-12)
    looking_back = [sum(values[i - 10:i + 1]) / 11 for i in range(10, 400)]
    assert min(np.subtract(looking_back, values[10:])) > 0.04


def test_panels_without_data_are_left_out():
    dense = [dict(step=i, loss=3.0, main=3.0, mtp=0.0, max_vio=[]) for i in range(1, 4)]
    figure = runs.loss_curve(dense)
    assert len(figure.axes) == 1
    assert all(ys == [3.0, 3.0, 3.0] for _, ys in drawn(figure, 0))
    unevaluated = [row | {"valid_bpb": None} for row in run_of(3)]
    assert len(runs.loss_curve(unevaluated).axes) == 2
    assert len(runs.loss_curve(run_of(5)).axes) == 3


def test_a_profile_s_parts_and_what_is_left_are_a_step():
    figure = speed.profile_figure(PROFILE)
    for ax, step in zip(figure.axes, speed.STEPS, strict=True):
        parts = bars(ax)
        for height, part in enumerate(PROFILE.values()):
            end = 0.0
            for kind in speed.COLOURS:
                left, width = parts[kind][height]
                assert left == pytest.approx(end, abs=1e-9)
                assert kind == speed.IDLE or width == part[step]["kinds"].get(kind, 0)
                end += width
            assert end == pytest.approx(part[step]["ms"], abs=1e-9)


def test_a_short_step_is_drawn_enlarged_too():
    training, decoding = speed.profile_figure(PROFILE).axes
    assert not training.child_axes
    [inner] = decoding.child_axes
    assert bars(inner) == {kind: [found[1]] for kind, found in bars(decoding).items()}
    assert all(-0.5 < bar.get_y() < bar.get_y() + bar.get_height() < 0.5
               for bar in inner.patches) and inner.get_ylim() == (0.5, -0.5)
    assert inner.get_xlim()[1] < 5 < decoding.get_xlim()[1] / 10


def test_a_profile_s_title_is_its_message():
    both = speed.profile_figure(PROFILE)._suptitle.get_text()
    assert both == ("A training step is 2.5 times as fast, a decoding step 12.5 times (a card)")
    one = speed.profile_figure({"before": PROFILE["before"]})._suptitle.get_text()
    assert one.startswith("The card waits for 50% of a training step and 98% of a decoding step")
    with pytest.raises(ValueError, match="nothing is recorded"):
        speed.profile_figure({})


def test_one_step_is_enough_and_none_is_refused():
    assert png(runs.loss_curve(run_of(1, layers=1)))
    with pytest.raises(ValueError, match="metrics is empty"):
        runs.loss_curve([])


def test_last_validation_is_written_out():
    figure = runs.loss_curve(run_of(10))
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert texts == [f"last: {run_of(10)[-1]['valid_bpb']:.3f}"]


def bars(ax) -> dict[str, list[tuple[float, float]]]:
    """Return the label of each part of a stacked bar -> its (left, width) for each model."""
    return {c.get_label(): [(bar.get_x(), bar.get_width()) for bar in c] for c in ax.containers}


@pytest.mark.parametrize("axis, field", [(1, "parts"), (2, "active_parts")])
def test_parameter_map_shares(axis, field):
    shown = bars(counts.parameter_map(COUNTS).axes[axis])
    for i, count in enumerate(COUNTS.values()):
        parts = getattr(count, field)
        end = 0.0
        for part, number in parts.items():
            if part == "indexer":  # none of these models has one
                continue
            label = PARTS[part][0]
            left, width = shown[label if label in shown else f"_{label}"][i]
            # Percentages in FP64, added up eight times.
            assert left == pytest.approx(end, abs=1e-9)
            assert width == pytest.approx(100 * number / sum(parts.values()), abs=1e-9)
            end = left + width
        assert end == pytest.approx(100, abs=1e-9)


def test_parameter_map_totals():
    ax = counts.parameter_map(COUNTS).axes[0]
    names = list(COUNTS)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
             for line in ax.get_lines()}
    assert lines["total"] == ([count.total for count in COUNTS.values()], names)
    assert lines["active"] == ([count.active for count in COUNTS.values()], names)
    assert {text.get_text() for text in ax.texts} >= {"671B", "37.6B", "15.7B", "2.66B"}


def test_parameter_map_of_a_single_small_model_keeps_its_numbers_inside():
    parts = dict.fromkeys(PARTS, 10)
    figure = counts.parameter_map({"one": SimpleNamespace(parts=parts, active_parts=parts)})
    low, high = figure.axes[0].get_xlim()
    assert low <= 90 / 4 and high >= 90 * 4


@pytest.mark.parametrize("count, text", [
    (7, "7"), (596_000, "596K"), (5_628_440, "5.63M"), (1_026_408_232_448, "1.03T")])
def test_short_numbers(count, text):
    assert short(count) == text


def test_compression_curve_is_sorted_and_exact():
    figure = counts.compression_curve(ROWS)
    assert shows(figure, 0, [512, 1024, 4096], [1.9, 2.3, 3.1])
    assert shows(figure, 1, [512, 1024, 4096], [1.9, 1.7, 1.6])
    assert not shows(figure, 0, [4096, 512, 1024], [3.1, 1.9, 2.3])
    assert figure.axes[1].get_title("left") == "Counted per byte, the one with 4,096 tokens does"
    figure.draw_without_rendering()
    ticks = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert ticks == ["512", "1,024", "4,096"]


def test_reader_settings_neither_matter_nor_change():
    plain = png(runs.loss_curve(run_of(5)))
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert png(runs.loss_curve(run_of(5))) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_neither_matplotlib_at_import_nor_a_window_ever():
    code = ("import sys, minids.plots.runs as p; assert 'matplotlib' not in sys.modules; "
            "p.loss_curve([{'step': 1, 'main': 2.0}])._repr_png_(); "
            "assert 'matplotlib.pyplot' not in sys.modules; "
            "sys.exit('torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_parameter_map_names_the_parts_that_the_models_have():
    v32 = {"v3.2": count_parameters(ModelArgs.preset("v3.2"))}
    with_indexer, without = counts.parameter_map(COUNTS | v32), counts.parameter_map(COUNTS)
    names = [{text.get_text() for text in figure.legends[0].get_texts()}
             for figure in (with_indexer, without)]
    unseen = {"gate", "norms"}  # too narrow to be seen in a bar
    assert names[0] == {label for label, _ in PARTS.values()} - unseen
    assert names[0] - names[1] == {"lightning indexer"}
    assert collisions(with_indexer) == []
    assert len({colour for _, colour in PARTS.values()}) == len(PARTS)


def lines_of(ax) -> dict[str, list]:
    """Return label -> heights of each labelled line."""
    return {line.get_label(): list(line.get_ydata()) for line in ax.lines
            if not line.get_label().startswith("_")}


def test_curves_show_the_numbers_given():
    panels = [dict(title="a", ylabel="cache (GB)", lines={"MHA": [1, 2, 4], "MLA": [0.1, 0.2, 0.4]},
                   levels={"one GPU": 80}),
              dict(title="b", ylabel="work (FLOPs)",  # more lines than styles
                   lines={str(n): [n, 2 * n, 3 * n] for n in range(1, 9)})]
    figure = counts.curves(panels, [256, 1024, 4096], "context (tokens)")
    left, right = figure.axes
    assert lines_of(left) == panels[0]["lines"] and lines_of(right) == panels[1]["lines"]
    assert [ax.get_ylabel() for ax in (left, right)] == ["cache (GB)", "work (FLOPs)"]
    assert "1K" in [label.get_text() for label in left.get_xticklabels()]
    assert "one GPU" in [text.get_text() for text in left.texts]


def ends(ax) -> dict[str, float]:
    """Return label -> height in the panel of the names at the right ends of its lines."""
    return {text.get_text(): text.xy[1] for text in ax.texts if text.xy[0] == 1.01}


def test_curves_name_their_lines_at_the_ends_in_order_and_apart():
    close = {"low": [1, 1.0], "high": [1, 99.0], "almost as high": [1, 98.0]}
    figure = counts.curves([dict(title="a", ylabel="work (FLOPs)", lines=close)], [1, 2], "x (n)")
    heights = ends(figure.axes[0])
    assert sorted(heights, key=heights.get) == ["low", "almost as high", "high"]
    assert heights["high"] - heights["almost as high"] >= 0.07 - 1e-9  # rounding of one sum


FORMS = {"plain": (512.0, 512.0), "absorbed": (2176.0, 9.0), "naive": (262_784.0, 9.0)}


def test_a_roofline_shows_floors_and_rates():
    """The roof bends where the machine does so many FLOPs per byte; dots lie on it, or below."""
    figure = decoding.roofline_figure(FORMS, 2000.0, 10.0, "message (a)")
    left, right = figure.axes
    reading, computing = ([bar.get_width() for bar in bars] for bars in left.containers)
    assert reading == pytest.approx([51_200, 900, 900])  # ms: bytes over the bandwidth
    assert computing == pytest.approx([256, 1088, 131_392])
    rates = {line.get_xdata()[0]: line.get_ydata()[0] for line in right.lines[1:]}
    assert rates == pytest.approx({1.0: 1e-8, 2176 / 9: 2e-6, 262_784 / 9: 2e-6})
    assert right.lines[0].get_xdata()[1] == 200
    assert "ridge at 200 FLOPs per byte: plain 51,200 and 256 ms, 1" in figure.get_label()
    taken = decoding.roofline_figure(FORMS, 2000.0, 10.0, "b", {"plain": 64.0, "absorbed": 2.0,
                                                                "naive": 200.0}).axes
    assert taken[1].lines[1].get_ydata()[0] == pytest.approx(8e-9)
    assert list(taken[0].lines[0].get_xdata()) == [64_000, 2000, 200_000]


def test_names_of_forms_stand_where_the_roof_leaves_room():
    """The ridge is at 200 FLOPs per byte: from a quarter of that on, below their points."""
    forms = {"far": (490.0, 10.0), "near": (510.0, 10.0), "above": (9000.0, 10.0)}
    _, right = decoding.roofline_figure(forms, 2000.0, 10.0, "message").axes
    assert [(text.xyann, text.get_ha()) for text in right.texts[1:]] == [
        ((10, -6), "left"), ((6, -8), "left"), ((6, -42), "right")]


def test_a_cache_is_written_in_bytes_and_in_time():
    figure = decoding.cache_figure({"MHA": 524e9, "MLA": 9.2e9}, 80e9, 3.35e12, "a message")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [524, 9.2]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["524 GB, 156 ms to read", "9.2 GB, 2.75 ms to read",
                     "memory of one GPU, 80 GB"]
    assert "MHA 524 GB, MLA 9.2 GB; a line" in figure.get_label()


YARN = dict(
    wavelengths={"as trained": [10.0 ** (1 + i / 4) for i in range(32)],
                 "YaRN": [10.0 ** (1 + i / 2) for i in range(32)]},
    low=10, high=23, contexts={"4,096": 4096, "163,840": 163_840}, trained=64,
    positions=[32, 96, 160], right={
        task: {name: [90.0 - start, 50.0 + start, 10.0] for start, name in
               enumerate(["as trained", "linear", "YaRN", "64 tokens at a time"])}
        for task in ("near", "far")})


def test_yarn_figure_shows_wavelengths_and_answers():
    figure = model.yarn_figure(**YARN)
    for wavelengths in YARN["wavelengths"].values():
        assert shows(figure, 0, range(32), wavelengths)
    for panel, (task, rows) in enumerate(YARN["right"].items(), 1):
        assert figure.axes[panel].get_title("left") == task
        assert all(shows(figure, panel, YARN["positions"], row) for row in rows.values())
        assert not shows(figure, panel, YARN["positions"], [90.0, 50.0, 11.0])  # wrong variant
    levels = [ys[0] for _, ys in drawn(figure, 0) if len(ys) == 2]
    assert levels == [4096, 163_840]


def test_yarn_figure_is_readable_and_names_the_three_regions():
    figure = model.yarn_figure(**YARN)
    assert axes_without_a_unit(figure) == [] and collisions(figure) == []
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"left alone\n0-10", "mixed\n11-22", "divided\n23-31", "4,096", "163,840"}
    shifted = model.yarn_figure(**YARN | dict(low=11)).axes[0].texts  # wrong variant
    assert {text.get_text() for text in shifted} != texts
    figure.axes[1].set_ylabel("right")  # wrong variant
    assert axes_without_a_unit(figure) == ["y1"]


def test_yarn_figure_has_one_line_style_a_label():
    figure = model.yarn_figure(**YARN)
    styles = [[(line.get_color(), line.get_linestyle()) for line in ax.get_lines()
               if len(line.get_xdata()) > 2] for ax in figure.axes]
    assert len(set(styles[1])) == 4 and styles[0] == [styles[1][0], styles[1][2]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == list(YARN["right"]["near"])


def test_moe_figure_shows_the_numbers_given():
    known = {"dense": (100, 20.0), "experts": (800, 90.0)}
    figure = model.moe_figure(known, ["name", "number"], [[5, 25], [95, 75]])
    left, right, _ = figure.axes
    assert lines_of(left) == {"facts known": [20.0, 90.0]}
    assert left.get_lines()[0].get_xdata().tolist() == [100, 800]
    assert [text.get_text() for text in right.texts] == ["5", "25", "95", "75"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["name", "number"]
    assert "(count" in left.get_xlabel() and "(percent)" in left.get_ylabel()


def test_moe_figure_sorts_experts_by_the_kind_that_visits_them_most():
    visits = [[5, 25, 90], [95, 75, 10]]
    *_, right, _ = model.moe_figure({"a": (1, 2.0)}, ["name", "number"], visits).axes
    assert [label.get_text() for label in right.get_xticklabels()] == ["2", "0", "1"]
    assert right.images[0].get_array().tolist() == [[90, 5, 25], [10, 95, 75]]


def test_mtp_figure_shows_the_numbers_given():
    kinds = {"all": (60.0, 70.0), "names": (55.0, 65.0), "punctuation": (70.0, 75.0)}
    figure = model.mtp_figure(kinds, {"greedy": [1, 1.8, 2.4], "temperature 1": [1, 1.6, 2.0]})
    left, right = figure.axes
    assert [[bar.get_width() for bar in bars] for bars in left.containers] == [[60, 55, 70],
                                                                               [70, 65, 75]]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in left.containers[0]]
    assert middles[1] - middles[0] > 1.5 * (middles[2] - middles[1])  # the whole stands apart
    assert [label.get_text() for label in left.get_yticklabels()] == list(kinds)
    assert lines_of(right) == {"greedy": [1, 1.8, 2.4], "temperature 1": [1, 1.6, 2.0],
                               "all accepted": [1, 2, 3]}
    assert axes_without_a_unit(figure) in ([], ["y0"])  # kinds have names, not units
    assert collisions(figure) == []


def test_balance_figure_shows_the_numbers_given():
    shares = {name: [[n, 2 - n], [1.0, 1.0], [0.5, 1.5]] for n, name in enumerate("abcd")}
    max_vio = {name: [1.0, 0.0, n / 2] for n, name in enumerate("abcd")}
    figure = model.balance_figure(shares, max_vio)
    *maps, below = figure.axes[:5]
    assert [ax.get_title("left") for ax in maps] == list("abcd") and collisions(figure) == []
    assert [ax.images[0].get_array().T.tolist() for ax in maps] == [*shares.values()]
    assert maps[0].images[0].norm(1.0) == 0.5  # the even share is the middle of the colours
    numbered = [ax.yaxis.get_tick_params()["labelleft"] for ax in maps]
    assert numbered == [True, False, False, False]
    assert lines_of(below) == max_vio


def test_capstone_figure_shows_the_numbers_given():
    gaps = {"same seed": [1e-7, 0.0], "another seed": [0.1, 0.2]}
    figure = runs.capstone_figure([10, 20, 30], [8.0, 6.0, 5.0], gaps)
    left, right = figure.axes
    assert left.get_lines()[0].get_ydata().tolist() == [8.0, 6.0, 5.0]
    drawn = [line.get_ydata().tolist() for line in right.get_lines()]
    assert drawn == [[1e-7, 1e-9], [0.1, 0.2]]  # nothing at all is drawn as 1e-9
    assert "8.0 to 6.3" in left.get_title(loc="left")  # the mean of the last twenty


def some_metrics(steps: int, scale: float) -> list[dict]:
    return [dict(step=s, reward_accuracy=scale * s / steps, thinking=s / steps, length=3.0 * s,
                 kl=0.01 * s) for s in range(1, steps + 1)]


def test_grpo_figure_shows_the_numbers_given():
    given = {"reward": some_metrics(4, 1.0), "shuffled": some_metrics(3, 0.5)}
    figure = runs.grpo_figure(given)
    for ax, name in zip(figure.axes, ("reward_accuracy", "thinking", "length", "kl"), strict=True):
        assert lines_of(ax) == {run: [m[name] for m in ms] for run, ms in given.items()}
    assert axes_without_a_unit(figure) == [] and collisions(figure) == []
    told = [ax.get_title("left") for ax in figure.axes]
    assert told == ["Right answers: from 0.25 to 1 (reward)", "Thinking: from 0.25 to 1 (reward)",
                    "Length: from 3 to 12 (reward)", "Distance: from 0.01 to 0.04 (reward)"]


def test_group_figure_colours_replies_by_their_advantage():
    figure = runs.group_figure(["good", "bad", "same"], [1.5, -0.5, 0.0], "three replies")
    [ax] = figure.axes
    assert [text.get_text() for text in ax.texts] == ["+1.50", "good", "-0.50", "bad", "+0.00",
                                                      "same"]
    blue, *others = (patch.get_facecolor()[:3] for patch in ax.patches)
    assert others[0] == others[1] != blue
    assert [round(patch.get_alpha(), 3) for patch in ax.patches] == [0.375, 0.125, 0.0]
    assert "1 is above zero, of 1 below, of 1 exactly zero" in figure.get_label()


def test_cold_start_figure_shows_the_numbers_given():
    series = {"think": [0.0, 0.5, 1.0], "direct": [0.1, 0.3, 0.2], "free": [0.1, 0.4, 0.3]}
    figure = runs.cold_start_figure([20, 40, 60], series, [0.5, 0.75, 1.0])
    left, right = figure.axes
    assert left.get_lines()[0].get_ydata().tolist() == [0.5, 0.75, 1.0]
    names = "made to think", "made to answer", "left to choose"
    assert lines_of(right) == dict(zip(names, series.values(), strict=True))
    assert "rise from 50% to 100%" in figure.get_label()
    assert "made to think 100%, made to answer 20%, left to choose 30%." in figure.get_label()


def test_bill_figure_shows_the_numbers_given():
    bills = {"small": [1.0, 10.0], "large": [5.0, 50.0]}
    figure = counts.bill_figure({"teacher": 1.0, "student": 0.25}, [1e9, 1e10], bills, (1e10, 7.0))
    left, right = figure.axes
    assert sorted(bar.get_width() for bar in left.patches) == [0.25, 1.0]
    assert lines_of(right) == bills | {"V3 as published": [7.0]}
