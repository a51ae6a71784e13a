"""Figures of what is counted: parameters, cache, work, vocabularies, money."""

from minids.plots import style

PARTS = {  # part of a ParameterCount -> its label and colour
    "embedding": ("embedding", style.SKY), "head": ("head", style.BLUE),
    "attention": ("attention", style.ORANGE), "indexer": ("lightning indexer", style.BLACK),
    "dense_ffn": ("dense feed-forward", style.PINK),
    "routed_experts": ("routed experts", style.GREEN),
    "shared_experts": ("shared experts", style.YELLOW), "gate": ("gate", style.RED),
    "norms": ("norms", style.GREY)}


VISIBLE = 1  # percent: a narrower part is drawn and has no place in the legend


def short(count: float) -> str:
    """Return a number with three digits and a unit: 671026419200 -> '671B'."""
    for unit, size in [("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)]:
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


@style.house_style()
def parameter_map(counts: dict, path: style.File = None, title: str = ""):
    """Draw where the parameters are: all of them, and those that one token uses.

    counts: model name -> its `ParameterCount` (parts and active_parts are read)
    title: the figure's message
    Left: both totals, on a log scale. Middle and right: the parts of each total, percent.
    """
    figure = style.new_figure(10.5, 1.5 + 0.42 * len(counts))
    figure.suptitle(title or None, x=0.01, ha="left", fontsize=11.5)
    left, *shares = figure.subplots(1, 3, sharey=True, width_ratios=[1.1, 1, 1])
    names = list(counts)
    total = [sum(count.parts.values()) for count in counts.values()]
    active = [sum(count.active_parts.values()) for count in counts.values()]
    left.hlines(names, active, total, color=style.GREY, linewidth=2)
    left.plot(active, names, "o", markersize=8, color=style.ORANGE, label="active")
    left.plot(total, names, "s", color=style.BLUE, label="total")
    for name, low, high in zip(names, active, total, strict=True):
        style.note(left, short(low), (low, name), (-7, 0), ha="right", va="center")
        style.note(left, short(high), (high, name), (7, 0), va="center")
    room = max(4, (max(total) / min(active)) ** 0.3)  # for the numbers at both ends
    left.set(title="How many", xscale="log", xlim=(min(active) / room, max(total) * room),
             xlabel="parameters (count, log scale)")
    left.invert_yaxis()  # the first model on top
    left.xaxis.set_major_formatter(lambda count, _: short(count))
    left.legend(loc="lower right", bbox_to_anchor=(1.02, 1), borderaxespad=0.3, ncols=2,
                handletextpad=0, columnspacing=0.8)

    for ax, title, field in zip(shares, ("All parameters", "Those that one token meets"),
                                ("parts", "active_parts"), strict=True):
        of_each, ends = [getattr(count, field) for count in counts.values()], [0.0] * len(counts)
        for part, (label, colour) in PARTS.items():
            widths = [100 * parts[part] / sum(parts.values()) for parts in of_each]
            if any(widths):  # the legend names no part that nobody can see
                ax.barh(names, widths, left=ends, height=0.68, color=colour,
                        label=label if max(widths) >= VISIBLE else f"_{label}")
            ends = [a + b for a, b in zip(ends, widths, strict=True)]
        ax.set(title=title, xlim=(0, 100), xlabel="share (percent)")
        ax.grid(axis="y", visible=False)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1,
                  columnspacing=1.4)
    return style.finish(figure, path)


@style.house_style()
def compression_curve(rows: list[dict], path: style.File = None):
    """Draw the loss of a model against its vocabulary, per token and per byte.

    rows: one dict per tokenizer: vocab_size (entries), nats_per_token and bits_per_byte (of a
        model that reads through it)
    """
    rows = sorted(rows, key=lambda row: row["vocab_size"])
    sizes = [row["vocab_size"] for row in rows]
    upper, lower = style.new_figure(7.0, 4.8).subplots(2, 1, sharex=True)
    for ax, field, colour in [(upper, "nats_per_token", style.RED),
                              (lower, "bits_per_byte", style.GREEN)]:
        style.lines(ax, sizes, {"": [row[field] for row in rows]}, [colour], 5)
        best = min(rows, key=lambda row: row[field])
        ax.plot(best["vocab_size"], best[field], "o", markersize=12, markerfacecolor="none",
                color=style.BLACK, label="_lowest")
        ax.margins(y=0.18)
    upper.set(title="Counted per token, the smallest vocabulary wins",
              ylabel="loss\n(nats per token)")
    lower.set(xlabel="vocabulary (entries, log scale)", ylabel="loss\n(bits per byte)",
              title=f"Counted per byte, the one with {best['vocab_size']:,} tokens does")
    lower.set_xscale("log", base=2)
    lower.set_xticks(sizes, [f"{size:,}" for size in sizes])
    return style.finish(lower.figure, path)


@style.house_style()
def curves(panels: list[dict], x: list[float], xlabel: str, path: style.File = None):
    """Draw lines over a common horizontal axis, both axes logarithmic, one panel each.

    panels: title, ylabel (with its unit) and lines: label -> values at x; optionally levels:
        label -> a height to mark across the panel
    x: the common values; xlabel: with their unit
    """
    figure = style.new_figure(0.6 + 6.6 * len(panels), 3.8)
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        style.lines(ax, x, panel["lines"])
        for label, height in panel.get("levels", {}).items():
            ax.axhline(height, color=style.GREY, linewidth=1.2)
            style.note(ax, label, (x[0], height), (2, 3))
        ax.set_xscale("log", base=2)
        ax.set(title=panel["title"], xlabel=xlabel, ylabel=panel["ylabel"], yscale="log")
        ax.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:.0f}K" if n >= 1024 else f"{n:.0f}")
        name_lines(ax)
    return style.finish(figure, path)


def name_lines(ax) -> None:
    """Write each line's label at its right end."""
    to_panel = ax.transData + ax.transAxes.inverted()
    ends = {line: to_panel.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1]
            for line in ax.lines if not line.get_label().startswith("_")}
    lowest = 0.0
    for line, height in sorted(ends.items(), key=lambda end: end[1]):
        lowest = max(height, lowest)
        ax.annotate(line.get_label(), (1.01, lowest), xycoords="axes fraction", va="center",
                    fontsize=9, color=line.get_color())
        lowest += 0.07  # of the panel's height, room for a label


@style.house_style()
def bill_figure(shares: dict[str, float], tokens: list[float], bills: dict[str, list[float]],
                paid: tuple[float, float], path: style.File = None):
    """Draw each model's right answers, and what pre-training costs.

    shares: model -> share of right answers; tokens: of pre-training; bills: model -> USD at each
    paid: tokens and USD of a run as published
    """
    left, right = style.new_figure(9.8, 3.8).subplots(1, 2)
    bars = left.barh([*shares][::-1], [*shares.values()][::-1], color=style.BLUE, height=0.55)
    left.bar_label(bars, fmt="{:.2f}", padding=4, fontsize=9)
    left.set(xlim=(0, 1.15), xlabel="right answers, thinking (share)",
             title="A teacher's words beat reward alone")
    left.grid(axis="y", visible=False)
    style.lines(right, tokens, bills, [(style.SKY, ":"), (style.ORANGE, "--"), (style.GREEN, "-")])
    right.plot(*paid, "o", color=style.BLACK, label="V3 as published")
    right.set(title="The formula meets what V3 paid", xscale="log", yscale="log",
              xlabel="pre-training (tokens, log scale)", ylabel="cost (USD, log scale)")
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.legend()
    return style.finish(left.figure, path)


@style.house_style()
def bill_map(runs: dict[str, tuple], own: tuple[float, float], flops_per_usd: float,
             path: style.File = None):
    """Draw training runs on a map whose diagonals are lines of equal cost.

    runs: name -> active parameters and tokens; own: those of the reader's run
    flops_per_usd: what a dollar buys; training takes six FLOPs per active parameter and token
    """
    ax = style.new_figure(9.0, 4.4).subplots()
    tokens, active = (1e9, 1e14), (1e8, 1e12)
    for power in range(1, 10):
        usd = 10.0 ** power
        line = [usd * flops_per_usd / 6 / n for n in tokens]
        ax.plot(tokens, line, color=style.GREY, linewidth=0.9)
        for end, n in zip(tokens, line, strict=True):  # its name, where the line leaves the map
            at = (min(end, usd * flops_per_usd / 6 / active[0]), active[0]) if n < active[0] else (
                end, n)
            if end == tokens[1] and at[0] > 2 * tokens[0]:
                style.note(ax, f"${usd:,.0f}", at, (-4, 6), ha="right")
    for name, (n, count) in runs.items():
        ax.plot(count, n, "o", color=style.BLUE)
        style.note(ax, name, (count, n), (7, -9))
    usd = 6 * own[0] * own[1] / flops_per_usd
    ax.plot(own[1], own[0], "*", color=style.RED, markersize=14)
    ax.set(xscale="log", yscale="log", xlim=tokens, ylim=active, xlabel="tokens (log scale)",
           ylabel="active parameters (count, log scale)",
           title=f"{own[0] / 1e9:g}B active parameters, {own[1] / 1e12:g}T tokens: "
           f"{usd:,.0f} USD")
    return style.described(style.finish(ax.figure, path), (
        "Active parameters over tokens on log axes; diagonals of equal cost, from 10 dollars to a "
        f"billion; {', '.join([*runs, f'and as a star a run of {usd:,.0f} USD'])}"))
