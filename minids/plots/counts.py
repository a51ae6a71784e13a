"""Figures of what is counted: parameters, cache, work, vocabularies, money."""

from pathlib import Path

from minids.plots import style

PARTS = {  # part of a ParameterCount -> its label and colour
    "embedding": ("embedding", style.SKY), "head": ("head", style.BLUE),
    "attention": ("attention", style.ORANGE), "indexer": ("lightning indexer", style.BLACK),
    "dense_ffn": ("dense feed-forward", style.PINK),
    "routed_experts": ("routed experts", style.GREEN),
    "shared_experts": ("shared experts", style.YELLOW), "gate": ("gate", style.RED),
    "norms": ("norms", style.GREY)}


def short(count: float) -> str:
    """Return a number with three digits and a unit: 671026419200 -> '671B'."""
    for unit, size in [("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)]:
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


@style.house_style()
def parameter_map(counts: dict, path: str | Path | None = None):
    """Draw where the parameters are: all of them, and those that one token uses.

    counts: model name -> its `minids.costs.ParameterCount` (parts and active_parts are read)
    Left: both totals, on a log scale. Middle and right: the parts of each total, percent.
    """
    figure = style.new_figure(10.5, 1.5 + 0.42 * len(counts))
    totals, *shares = figure.subplots(1, 3, sharey=True, width_ratios=[1.1, 1, 1])
    draw_totals(totals, counts)
    for ax, title, field in zip(shares, ("All parameters", "Those that one token meets"),
                                ("parts", "active_parts"), strict=True):
        draw_shares(ax, {name: getattr(count, field) for name, count in counts.items()})
        ax.set_title(title)
    totals.invert_yaxis()  # the first model on top
    handles, labels = shares[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1,
                  columnspacing=1.4)
    return style.finish(figure, path)


def draw_totals(ax, counts: dict) -> None:
    """Draw for each model a line from active to total, with both written out."""
    names = list(counts)
    total = [sum(count.parts.values()) for count in counts.values()]
    active = [sum(count.active_parts.values()) for count in counts.values()]
    ax.hlines(names, active, total, color=style.GREY, linewidth=2)
    ax.plot(active, names, "o", markersize=8, color=style.ORANGE, label="active")
    ax.plot(total, names, "s", color=style.BLUE, label="total")
    for name, low, high in zip(names, active, total, strict=True):
        style.note(ax, short(low), (low, name), (-7, 0), ha="right", va="center")
        style.note(ax, short(high), (high, name), (7, 0), va="center")
    room = max(4, (max(total) / min(active)) ** 0.3)  # for the numbers at both ends
    ax.set(xscale="log", xlim=(min(active) / room, max(total) * room), title="How many",
           xlabel="parameters (count, log scale)")
    ax.xaxis.set_major_formatter(lambda count, _: short(count))
    ax.legend(loc="lower right", bbox_to_anchor=(1.02, 1), borderaxespad=0.3, ncols=2,
              handletextpad=0, columnspacing=0.8)


def draw_shares(ax, parts_by_model: dict[str, dict[str, int]]) -> None:
    """Draw stacked bars that add up to 100 percent for each model."""
    left = [0.0] * len(parts_by_model)
    for part, (label, colour) in PARTS.items():
        shares = [100 * parts[part] / sum(parts.values()) for parts in parts_by_model.values()]
        if any(shares):  # the legend names no part that none of the models has
            ax.barh(list(parts_by_model), shares, left=left, height=0.68, color=colour, label=label)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    ax.set(xlim=(0, 100), xlabel="share (percent)")
    ax.grid(axis="y", visible=False)


@style.house_style()
def compression_curve(rows: list[dict], path: str | Path | None = None):
    """Draw what a larger vocabulary gains: fewer tokens for the same text, and a lower loss.

    rows: one dict per tokenizer: vocab_size (entries), bytes_per_token (of text that it was not
        trained on), bits_per_byte (of a model that reads through it)
    """
    rows = sorted(rows, key=lambda row: row["vocab_size"])
    sizes = [row["vocab_size"] for row in rows]
    upper, lower = style.new_figure(7.0, 4.6).subplots(2, 1, sharex=True)
    style.lines(upper, sizes, {"": [row["bytes_per_token"] for row in rows]}, [style.BLUE], 5)
    style.lines(lower, sizes, {"": [row["bits_per_byte"] for row in rows]}, [style.GREEN], 5)
    style.name_axes(upper, "", "compression\n(bytes per token)")
    style.name_axes(lower, "vocabulary (entries, log scale)", "loss\n(bits per byte)", (2, 0))
    for ax in (upper, lower):
        ax.margins(y=0.15)
    lower.set_xticks(sizes, [f"{size:,}" for size in sizes])
    return style.finish(lower.figure, path)


@style.house_style()
def curves(panels: list[dict], x: list[float], xlabel: str, path: str | Path | None = None):
    """Draw lines over a common horizontal axis, both axes logarithmic, one panel each.

    panels: title, ylabel (with its unit) and lines: label -> values at x; optionally levels:
        label -> a height to mark across the panel
    x: the common values; xlabel: with their unit
    """
    crowded = max(len(panel["lines"]) for panel in panels) > 4  # the legend stands beside the panel
    figure = style.new_figure(0.6 + (4.4 + 2.2 * crowded) * len(panels), 3.6)
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        style.lines(ax, x, panel["lines"])
        for label, height in panel.get("levels", {}).items():
            ax.axhline(height, color=style.GREY, linewidth=1.2)
            style.note(ax, label, (x[0], height), (2, 3))
        style.name_axes(ax, xlabel, panel["ylabel"], (2, 10))
        ax.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:.0f}K" if n >= 1024 else f"{n:.0f}")
        ax.set_title(panel["title"])
        ax.legend(**dict(loc="center left", bbox_to_anchor=(1.02, 0.5)) if crowded else {})
    return style.finish(figure, path)


@style.house_style()
def bill_figure(shares: dict[str, float], tokens: list[float], bills: dict[str, list[float]],
                paid: tuple[float, float], path: str | Path | None = None):
    """Draw each model's right answers, and what pre-training costs.

    shares: model -> share of right answers
    tokens: of pre-training; bills: model -> USD at each
    paid: tokens and USD of a run as published
    """
    left, right = style.new_figure(9.0, 3.6).subplots(1, 2)
    bars = left.barh([*shares][::-1], [*shares.values()][::-1], color=style.BLUE, height=0.55)
    left.bar_label(bars, fmt="{:.2f}", padding=4, fontsize=9)
    left.set(xlim=(0, 1.15), xlabel="right answers, thinking (share)",
             title="distilled, and by reward alone")
    left.grid(axis="y", visible=False)
    style.lines(right, tokens, bills, [(style.SKY, ":"), (style.ORANGE, "--"), (style.GREEN, "-")])
    right.plot(*paid, "o", color=style.BLACK, label="V3 as published")
    style.name_axes(right, "pre-training (tokens)", "cost (USD)", (10, 10))
    right.yaxis.set_major_formatter(lambda usd, _: f"{usd:,.0f}")
    right.set_title("pre-training on H800 at 2 USD an hour")
    right.legend()
    return style.finish(left.figure, path)
