"""Every figure of the programs and the notebooks, in one style.

A drawing function takes plain data and returns the figure; given a path it also writes the file.
A notebook shows a figure by ending a cell with it. No window is opened and no backend is chosen:
the figures do not pass through pyplot, so that they look the same on a server and on a laptop.

The background is white and opaque, a card that stays readable on a dark page too. The colours are
those of Okabe and Ito, which readers with any common colour blindness can tell apart; lines that
share a panel differ in lightness or dash as well.
"""

import contextlib
from io import BytesIO
from pathlib import Path

BLACK, GREY, ORANGE, SKY = "#222222", "#9a9a9a", "#e69f00", "#56b4e9"
GREEN, YELLOW, BLUE, RED, PINK = "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
PARTS = {  # part of a ParameterCount -> its label and colour
    "embedding": ("embedding", SKY), "head": ("head", BLUE), "attention": ("attention", ORANGE),
    "indexer": ("lightning indexer", BLACK),
    "dense_ffn": ("dense feed-forward", PINK), "routed_experts": ("routed experts", GREEN),
    "shared_experts": ("shared experts", YELLOW), "gate": ("gate", RED), "norms": ("norms", GREY)}
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "text.color": BLACK,
    "axes.edgecolor": GREY, "axes.labelcolor": BLACK, "xtick.color": BLACK, "ytick.color": BLACK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "grid.linestyle": "-",
    "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "axes.labelsize": 10, "legend.fontsize": 9,
    "legend.frameon": False, "lines.linewidth": 1.8, "figure.dpi": 100,
}


@contextlib.contextmanager
def house_style():
    """Draw what follows in the one style, whatever the reader's own settings are."""
    import matplotlib
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float):
    """An empty figure, width and height in inches, that a notebook shows as a picture."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = lambda: png(figure)  # the name that Jupyter asks an object for
    return figure


@house_style()
def png(figure) -> bytes:
    """The figure as a PNG file's bytes; equal figures give equal bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def save(figure, path: str | Path) -> None:
    """Write the figure as a PNG, making the folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def finish(figure, path: str | Path | None):
    """Fix the figure's ticks and layout, save it where a path is given, and return it.

    Left to itself matplotlib makes the ticks at the first drawing, in the style of that moment,
    and moves the panels a little at every one.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if path is not None:
        save(figure, path)
    return figure


@house_style()
def loss_curve(metrics: list[dict], path: str | Path | None = None):
    """The course of a training run: losses, validation, balance of the experts.

    metrics: the lines of a run's metrics.jsonl. Read are step, main and mtp (nats per token),
        valid_bpb (bits per byte, on evaluated steps) and max_vio (one number a MoE layer); a
        panel without data is left out
    path: where to save the picture
    Returns the figure. Raises ValueError if there is no line.
    """
    if not metrics:
        raise ValueError("metrics is empty: a run has to log a step before it can be drawn")
    from matplotlib.ticker import MaxNLocator
    panels = [(draw_losses, 3.0)]
    if any(row.get("valid_bpb") is not None for row in metrics):
        panels.append((draw_validation, 2.0))
    if any(row.get("max_vio") for row in metrics):
        panels.append((draw_balance, 1.8))
    heights = [height for _, height in panels]
    figure = new_figure(7.0, 0.5 + sum(heights))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (draw, _) in zip(axes, panels, strict=True):
        draw(ax, metrics)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return finish(figure, path)


def column(metrics: list[dict], name: str) -> tuple[list, list]:
    """The steps that logged `name`, and its values there."""
    rows = [row for row in metrics if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw_series(ax, steps: list, values: list[float], colour, label: str) -> None:
    """A noisy series: each step pale, the mean of its neighbourhood strong.

    The mean stands at the middle of its window, where it does not lag behind a falling loss, and
    only where the window is whole.
    """
    reach = len(values) // 80
    middles = range(reach, len(values) - reach)
    means = [sum(values[i - reach:i + reach + 1]) / (2 * reach + 1) for i in middles]
    ax.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8, label="_each step")
    ax.plot([steps[i] for i in middles], means, color=colour, label=label)


def draw_losses(ax, metrics: list[dict]) -> None:
    """Training losses of the next token and, where there is MTP, of the one after."""
    for name, label, colour in [("mtp", "token after next (MTP)", ORANGE),
                                ("main", "next token", BLUE)]:
        steps, values = column(metrics, name)
        if any(values):
            draw_series(ax, steps, values, colour, label)
    ax.set_ylabel("training loss\n(nats per token)")
    ax.legend(reverse=True)


def draw_validation(ax, metrics: list[dict]) -> None:
    """Validation, with the last value written out."""
    steps, values = column(metrics, "valid_bpb")
    ax.plot(steps, values, color=GREEN, marker="o", markersize=4, label=f"last: {values[-1]:.3f}")
    ax.set_ylabel("validation\n(bits per byte)")
    ax.legend(loc="upper right")


def draw_balance(ax, metrics: list[dict]) -> None:
    """MaxVio of each MoE layer, early layers dark and late ones light."""
    import matplotlib
    steps, values = column(metrics, "max_vio")
    width = min(map(len, values))  # MTP modules come last, and leave when their weight is 0
    layers = list(zip(*(value[:width] for value in values), strict=True))
    last = len(layers) - 1
    for i, layer in enumerate(layers):
        label = {0: "first MoE layer", last: "last"}.get(i, "_between") if last else "MoE layer"
        shade = matplotlib.colormaps["viridis"](0.85 * i / max(1, last))
        draw_series(ax, steps, layer, shade, label)
    ax.set_ylabel("MaxVio\n(largest / mean load - 1)")
    ax.set_ylim(bottom=0)
    ax.legend(ncols=2)


@house_style()
def parameter_map(counts: dict, path: str | Path | None = None):
    """Where the parameters live: all of them, and those that one token meets.

    counts: model name -> its `minids.costs.ParameterCount` (parts and active_parts are read)
    path: where to save the picture
    Left: both totals, on a log scale. Middle and right: what each total consists of, in percent.
    """
    figure = new_figure(10.5, 1.5 + 0.42 * len(counts))
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[1.1, 1, 1])
    draw_totals(axes[0], counts)
    draw_shares(axes[1], {name: count.parts for name, count in counts.items()})
    draw_shares(axes[2], {name: count.active_parts for name, count in counts.items()})
    axes[0].invert_yaxis()  # the first model on top
    axes[0].set_title("How many")
    axes[1].set_title("All parameters")
    axes[2].set_title("Those that one token meets")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1,
                  columnspacing=1.4)
    return finish(figure, path)


def short(count: float) -> str:
    """Three digits and a unit: 671026419200 -> '671B'."""
    for unit, size in [("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)]:
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def draw_totals(ax, counts: dict) -> None:
    """For each model a line from active to total, with both written out."""
    from matplotlib.ticker import FuncFormatter
    names = list(counts)
    total = [sum(count.parts.values()) for count in counts.values()]
    active = [sum(count.active_parts.values()) for count in counts.values()]
    ax.hlines(names, active, total, color=GREY, linewidth=2)
    ax.plot(active, names, "o", markersize=8, color=ORANGE, label="active")
    ax.plot(total, names, "s", color=BLUE, label="total")
    for name, low, high in zip(names, active, total, strict=True):
        ax.annotate(short(low), (low, name), xytext=(-7, 0), textcoords="offset points",
                    ha="right", va="center", fontsize=8.5)
        ax.annotate(short(high), (high, name), xytext=(7, 0), textcoords="offset points",
                    va="center", fontsize=8.5)
    ax.set_xscale("log")
    room = max(4, (max(total) / min(active)) ** 0.3)  # for the numbers at both ends
    ax.set_xlim(min(active) / room, max(total) * room)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    ax.set_xlabel("parameters (count, log scale)")
    ax.legend(loc="lower right", bbox_to_anchor=(1.02, 1), borderaxespad=0.3, ncols=2,
              handletextpad=0, columnspacing=0.8)


def draw_shares(ax, parts_by_model: dict[str, dict[str, int]]) -> None:
    """Stacked bars that add up to 100 percent for each model."""
    names = list(parts_by_model)
    left = [0.0] * len(names)
    for part in next(iter(parts_by_model.values())):
        shares = [100 * parts[part] / sum(parts.values()) for parts in parts_by_model.values()]
        if any(shares):  # the legend names no part that none of the models has
            ax.barh(names, shares, left=left, height=0.68, color=PARTS[part][1],
                    label=PARTS[part][0])
        left = [a + b for a, b in zip(left, shares, strict=True)]
    ax.set_xlim(0, 100)
    ax.set_xlabel("share (percent)")
    ax.grid(axis="y", visible=False)


@house_style()
def compression_curve(rows: list[dict], path: str | Path | None = None):
    """What a larger vocabulary buys: fewer tokens for the same text, and the loss on it.

    rows: one dict a tokenizer: vocab_size (entries), bytes_per_token (of text it was not trained
        on), bits_per_byte (of a model that reads through it)
    path: where to save the picture
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter
    rows = sorted(rows, key=lambda row: row["vocab_size"])
    sizes = [row["vocab_size"] for row in rows]
    figure = new_figure(7.0, 4.6)
    axes = figure.subplots(2, 1, sharex=True)
    for ax, key, label, colour in [
            (axes[0], "bytes_per_token", "compression\n(bytes per token)", BLUE),
            (axes[1], "bits_per_byte", "loss\n(bits per byte)", GREEN)]:
        values = [row[key] for row in rows]
        ax.plot(sizes, values, color=colour, marker="o", markersize=5)
        ax.set_ylabel(label)
        ax.margins(y=0.15)
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_locator(FixedLocator(sizes))
    axes[1].xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes[1].set_xlabel("vocabulary (entries, log scale)")
    return finish(figure, path)


@house_style()
def curves(panels: list[dict], x: list[float], xlabel: str, path: str | Path | None = None):
    """Lines over a common horizontal axis, both axes logarithmic, a panel each.

    panels: title, ylabel (with its unit) and lines: label -> values at x; levels, if there are
        any: label -> a height that is marked across the panel
    x: the common values; xlabel: with their unit
    path: where to save the picture
    """
    from matplotlib.ticker import FuncFormatter
    crowded = max(len(panel["lines"]) for panel in panels) > 4  # the legend stands beside the panel
    figure = new_figure(0.6 + (4.4 + 2.2 * crowded) * len(panels), 3.6)
    styles = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (PINK, "-"), (BLACK, "--")]
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (label, values), (colour, dash) in zip(panel["lines"].items(), styles, strict=False):
            ax.plot(x, values, color=colour, linestyle=dash, label=label)
        for label, height in panel.get("levels", {}).items():
            ax.axhline(height, color=GREY, linewidth=1.2)
            ax.annotate(label, (x[0], height), xytext=(2, 3), textcoords="offset points",
                        fontsize=8.5, color=BLACK)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(
            lambda n, _: f"{n / 1024:.0f}K" if n >= 1024 else f"{n:.0f}"))
        ax.set_yscale("log")
        ax.set_title(panel["title"])
        ax.set_xlabel(xlabel)
        ax.set_ylabel(panel["ylabel"])
        ax.legend(**dict(loc="center left", bbox_to_anchor=(1.02, 0.5)) if crowded else {})
    return finish(figure, path)


@house_style()
def yarn_figure(wavelengths: dict[str, list], low: int, high: int, contexts: dict[str, int],
                losses: dict[str, list], trained: int, path: str | Path | None = None):
    """What YaRN does to the rotary pairs, and to the loss past the trained length.

    wavelengths: label -> tokens in a full turn, for each pair
    low, high: the last pair that is left alone, and the first that is divided whole
    contexts: label -> a length that is marked among the wavelengths, tokens
    losses: label -> loss at each position, nats per token; a label that is among the wavelengths
        too has the same line there
    trained: the length that the model of `losses` was trained on, tokens
    path: where to save the picture
    """
    figure = new_figure(10.5, 4.0)
    left, right = figure.subplots(1, 2)
    styles = [(BLUE, "-"), (RED, "--"), (ORANGE, "-"), (BLACK, ":")]
    styles = dict(zip(dict.fromkeys([*losses, *wavelengths]), styles, strict=False))
    draw_wavelengths(left, wavelengths, styles, low, high, contexts)
    for label, row in losses.items():
        positions, means = means_of_parts(row, 16)
        colour, dash = styles[label]
        right.plot(positions, means, color=colour, linestyle=dash, label=label)
    right.axvline(trained, color=GREY, linewidth=1.2)
    right.annotate("trained length", (trained, 0), xycoords=("data", "axes fraction"),
                   xytext=(4, 5), textcoords="offset points", fontsize=8.5)
    right.set_xlabel("position (tokens)")
    right.set_ylabel("loss (nats per token)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(losses))
    return finish(figure, path)


def means_of_parts(row: list[float], size: int) -> tuple[list[float], list[float]]:
    """The middles of parts of `size` neighbours, and the mean of each part."""
    starts = range(0, len(row), size)
    parts = [row[start:start + size] for start in starts]
    middles = [start + (len(part) - 1) / 2 for start, part in zip(starts, parts, strict=True)]
    return middles, [sum(part) / len(part) for part in parts]


def draw_wavelengths(ax, wavelengths: dict[str, list], styles: dict[str, tuple], low: int,
                     high: int, contexts: dict[str, int]) -> None:
    """A line for each set of pairs, over the three regions that YaRN cuts them into."""
    last = max(map(len, wavelengths.values())) - 1
    ax.axvspan(low + 0.5, high - 0.5, color=YELLOW, alpha=0.25, linewidth=0)
    for name, first, end in [("left alone", 0, low), ("mixed", low + 1, high - 1),
                             ("divided", high, last)]:
        ax.annotate(f"{name}\n{first}-{end}", ((first + end) / 2, 0.02), fontsize=8.5, ha="center",
                    xycoords=("data", "axes fraction"))
    for label, length in contexts.items():
        ax.axhline(length, color=GREY, linewidth=1.2)
        ax.annotate(label, (-0.5, length), xytext=(0, 3), textcoords="offset points", fontsize=8.5)
    for label, turns in wavelengths.items():
        colour, dash = styles[label]
        ax.plot(range(len(turns)), turns, color=colour, linestyle=dash, marker="o", markersize=3)
    ax.set_yscale("log")
    ax.set_ylim(bottom=min(map(min, wavelengths.values())) / 8)  # room for the regions' names
    ax.set_xlabel("rotary pair (number)")
    ax.set_ylabel("wavelength (tokens, log scale)")


@house_style()
def moe_figure(tokens: list[int], losses: dict[str, list], kinds: list[str], visits: list[list],
               path: str | Path | None = None):
    """Experts beside a dense model, and who handles which kind of token.

    tokens: seen after each step; losses: label -> loss at each step, nats per token
    kinds: names; visits: for each kind the share of its tokens that visit each expert, percent
    path: where to save the picture
    """
    figure = new_figure(9.8, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for (label, row), colour in zip(losses.items(), (GREEN, BLUE), strict=True):
        draw_series(left, tokens, row, colour, label)
    left.set_xlabel("tokens seen (count)")
    left.set_ylabel("training loss\n(nats per token)")
    left.legend()
    picture = right.imshow(visits, cmap="viridis", aspect="auto", vmin=0)
    middle = max(map(max, visits)) / 2
    for n, row in enumerate(visits):
        for e, share in enumerate(row):
            right.text(e, n, f"{share:.0f}", ha="center", va="center", fontsize=8,
                       color=BLACK if share > middle else "white")
    right.set_yticks(range(len(kinds)), kinds)
    right.set_xticks(range(len(visits[0])))
    right.set_xlabel("expert (number)")
    right.grid(visible=False)
    figure.colorbar(picture, ax=right, label="tokens that visit (percent)")
    return finish(figure, path)


@house_style()
def mtp_figure(kinds: dict[str, tuple[float, float]], tokens_a_pass: dict[str, list],
               path: str | Path | None = None):
    """How often drafts pass by kind of text, and what they yield.

    kinds: label -> shares of drafts that pass, greedily and at temperature 1, percent
    tokens_a_pass: label -> tokens that one pass yields with 0, 1, 2, .. drafts
    path: where to save the picture
    """
    figure = new_figure(9.8, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    places = range(len(kinds))
    for shift, label, shares, colour in zip((-0.2, 0.2), ("greedy", "temperature 1"),
                                            zip(*kinds.values(), strict=True), (BLUE, ORANGE),
                                            strict=True):
        left.barh([place + shift for place in places], shares, 0.38, color=colour, label=label)
    left.set_yticks(places, kinds)
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("drafts that pass on held-out text (percent)")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for (label, row), colour in zip(tokens_a_pass.items(), (BLUE, ORANGE), strict=True):
        right.plot(range(len(row)), row, color=colour, marker="o", label=label)
    most = len(next(iter(tokens_a_pass.values())))
    right.plot(range(most), range(1, most + 1), color=GREY, linestyle=":", label="all pass")
    right.set_xticks(range(most))
    right.set_xlabel("drafts a pass (count)")
    right.set_ylabel("tokens a pass (count)")
    right.legend()
    return finish(figure, path)


@house_style()
def dsa_figure(ks: list[int], held: dict[str, list], attention: list[list], chosen: list[list],
               first: int, lengths: list[int], flops: dict[str, list],
               path: str | Path | None = None):
    """What a choice of k tokens holds, where the chosen stand, and what attention costs.

    ks: tokens chosen; held: label -> share of attention's weight on them, one of each k
    attention: rows of questions, weights of the tokens from position `first` on
    chosen: the indexer's tokens of each row, their positions
    lengths: contexts; flops: label -> FLOPs of one token's attention at each
    path: where to save the picture
    """
    figure = new_figure(12.5, 3.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.35, 1])
    for (label, row), colour in zip(held.items(), (BLACK, BLUE, ORANGE, GREY), strict=True):
        left.plot(ks, row, color=colour, marker="o", markersize=3, label=label)
    left.set_xscale("log", base=2)
    left.set_xlabel("tokens chosen, k (count, log scale)")
    left.set_ylabel("attention's weight on them (share)")
    left.legend(loc="center right")
    last = first + len(attention[0])
    middle.imshow([[weight ** 0.5 for weight in row] for row in attention], cmap="viridis",
                  aspect="auto", interpolation="nearest",
                  extent=(first - 0.5, last - 0.5, len(attention) - 0.5, -0.5))
    marks = [(token, n) for n, row in enumerate(chosen) for token in row if first <= token < last]
    middle.scatter(*zip(*marks, strict=True), marker="s", s=26, facecolors="none",
                   edgecolors=RED, linewidth=0.9)
    middle.set_xlabel("token looked at (position)")
    middle.set_ylabel("question (number)")
    middle.grid(visible=False)
    for (label, row), colour in zip(flops.items(), (RED, BLUE), strict=True):
        right.plot(lengths, [count / 1e9 for count in row], color=colour, marker="o",
                   markersize=3, label=label)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("context (tokens, log scale)")
    right.set_ylabel("attention of one token\n(GFLOPs, log scale)")
    right.legend()
    return finish(figure, path)


@house_style()
def balance_figure(shares: dict[str, list[list]], max_vio: dict[str, list],
                   path: str | Path | None = None):
    """Where the tokens go under each way of balancing, and how far the busiest expert stands out.

    shares: regime -> for each step the load of each expert, in times the even share
    max_vio: regime -> MaxVio at each step
    path: where to save the picture
    """
    from matplotlib.colors import TwoSlopeNorm
    figure = new_figure(9.8, 5.6)
    grid = figure.add_gridspec(2, len(shares), height_ratios=[1, 1.1])
    norm = TwoSlopeNorm(1, 0, 4)  # white is the even share, whatever the busiest expert gets
    maps = []
    for n, (label, rows) in enumerate(shares.items()):
        ax = figure.add_subplot(grid[0, n])
        extent = (0.5, len(rows) + 0.5, len(rows[0]) - 0.5, -0.5)
        picture = ax.imshow([*zip(*rows, strict=True)], cmap="RdBu_r", norm=norm, aspect="auto",
                            extent=extent, interpolation="nearest")
        ax.set_title(label)
        ax.grid(visible=False)
        ax.tick_params(left=n == 0, labelleft=n == 0)
        maps.append(ax)
    maps[0].set_ylabel("expert (number)")
    maps[0].yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(picture, ax=maps, extend="max", ticks=range(5))
    bar.set_label("load (times the even share)")
    below = figure.add_subplot(grid[1, :])
    for (label, row), colour in zip(max_vio.items(), (BLACK, ORANGE, BLUE, GREEN), strict=True):
        draw_series(below, [*range(1, len(row) + 1)], row, colour, label)
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    below.set_ylabel("MaxVio (times the mean)")
    below.legend()
    return finish(figure, path)


@house_style()
def ablation_figure(tokens: list[int], losses: dict[str, list], costs: dict[str, list],
                    path: str | Path | None = None):
    """Losses on the way, and what each change of the model costs.

    tokens: seen after each step; losses: label -> loss at each step, nats per token
    costs: label -> bits per byte above the unchanged model, one of each seed
    path: where to save the picture
    """
    figure = new_figure(10.2, 3.8)
    left, right = figure.subplots(1, 2)
    for (label, row), colour in zip(losses.items(), (BLUE, RED, GREEN), strict=True):
        draw_series(left, tokens, row, colour, label)
    left.set_xlabel("tokens seen (count)")
    left.set_ylabel("training loss\n(nats per token)")
    left.locator_params(axis="x", nbins=5)
    left.legend()
    for place, row in enumerate(costs.values()):
        right.plot(row, [place] * len(row), "o", color=BLUE, markersize=6, alpha=0.8)
    right.axvline(0, color=GREY, linewidth=1.2)
    right.set_yticks(range(len(costs)), costs)
    right.set_ylim(len(costs) - 0.5, -0.5)
    right.set_xlabel("above the whole model (bits per byte)")
    return finish(figure, path)


@house_style()
def fp8_figure(factors: list[float], outliers: dict[str, list], lengths: list[int],
               sums: dict[str, list], path: str | Path | None = None):
    """What FP8 loses by outliers and by long sums.

    factors: sizes of outliers; outliers: label -> error of a product at each, percent
    lengths: of sums; sums: label -> largest error at each, percent
    path: where to save the picture
    """
    figure = new_figure(9.8, 3.8)
    left, right = figure.subplots(1, 2)
    for (label, row), colour in zip(outliers.items(), (RED, ORANGE, BLUE), strict=True):
        left.plot(factors, row, color=colour, marker="o", markersize=3, label=label)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("size of the outliers (ratio, log scale)")
    left.set_ylabel("error of the product\n(percent, log scale)")
    left.legend(title="one scale for a")
    for (label, row), colour in zip(sums.items(), (RED, BLUE), strict=True):
        right.plot(lengths, row, color=colour, marker="o", markersize=3, label=label)
    right.set_xscale("log", base=2)
    right.set_xlabel("length of the sum (count, log scale)")
    right.set_ylabel("largest error (percent)")
    right.legend()
    return finish(figure, path)


@house_style()
def grpo_figure(runs: dict[str, list[dict]], path: str | Path | None = None):
    """The course of reinforcement learning, one line for each run.

    runs: by name, the lines of a run's metrics.jsonl. Read are step, reward_accuracy (share of
        the sampled replies that are right), thinking (share that think), length (tokens) and kl
        (nats a token)
    path: where to save the picture
    """
    figure = new_figure(8.6, 5.6)
    panels = [("reward_accuracy", "right answers", "replies (share)"),
              ("thinking", "thinking", "replies (share)"),
              ("length", "length", "a reply (tokens)"),
              ("kl", "distance from the reference", "KL (nats a token)")]
    styles = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (PINK, "-"), (BLACK, "--")]
    for ax, (name, title, unit) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for (label, metrics), (colour, dash) in zip(runs.items(), styles, strict=False):
            ax.plot(*column(metrics, name), color=colour, linestyle=dash, label=label)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_ylabel(unit)
        ax.set_ylim(bottom=0, top=1.05 if "share" in unit else None)
    if len(runs) > 1:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(len(runs), 5))
    return finish(figure, path)


@house_style()
def cold_start_figure(steps: list[int], accuracy: dict[str, list[float]], form: list[float],
                      path: str | Path | None = None):
    """What fine-tuning gives first: the form of a reply, then right answers.

    steps: optimizer steps at which the model was examined
    accuracy: by mode ("think", "direct", "free"), share of right answers at each
    form: share of well-formed replies when the model may choose
    path: where to save the picture
    """
    figure = new_figure(8.6, 3.4)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    left.plot(steps, form, color=BLACK, marker="o", markersize=4)
    left.set_title("well-formed replies, left to choose")
    styles = {"think": ("made to think", BLUE, "-"), "direct": ("made to answer", ORANGE, "--"),
              "free": ("left to choose", GREEN, "-.")}
    for mode, values in accuracy.items():
        label, colour, dash = styles[mode]
        right.plot(steps, values, color=colour, linestyle=dash, marker="o", markersize=4,
                   label=label)
    right.set_title("right answers to held-out questions")
    right.legend()
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.set_ylabel("replies (share)")
        ax.set_ylim(0, 1.05)
    return finish(figure, path)


@house_style()
def bill_figure(shares: dict[str, float], tokens: list[float], bills: dict[str, list[float]],
                paid: tuple[float, float], path: str | Path | None = None):
    """Who answers right, and what pre-training costs.

    shares: model -> share of right answers; tokens: of pre-training
    bills: model -> USD for each of `tokens`; paid: tokens and USD of a run as published
    path: where to save the picture
    """
    from matplotlib.ticker import FuncFormatter
    figure = new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    names = list(shares)[::-1]
    left.barh(names, [shares[name] for name in names], color=BLUE, height=0.55)
    for name in names:
        left.annotate(f"{shares[name]:.2f}", (shares[name], name), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=9)
    left.set_xlim(0, 1.15)
    left.set_xlabel("right answers, thinking (share)")
    left.set_title("distilled, and by reward alone")
    left.grid(axis="y", visible=False)
    styles = [(SKY, ":"), (ORANGE, "--"), (GREEN, "-")]
    for (name, dollars), (colour, dash) in zip(bills.items(), styles, strict=False):
        right.plot(tokens, dollars, color=colour, linestyle=dash, label=name)
    right.plot(*paid, "o", color=BLACK, label="V3 as published")
    right.set_xscale("log")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda usd, _: f"{usd:,.0f}"))
    right.set_xlabel("pre-training (tokens)")
    right.set_ylabel("cost (USD)")
    right.set_title("pre-training on H800 at 2 USD an hour")
    right.legend()
    return finish(figure, path)
