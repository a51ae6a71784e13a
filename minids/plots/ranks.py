"""Figures of training over many ranks: who holds what, when a pipeline waits, what breaks."""

from minids.plots import style


@style.house_style()
def shards_figure(pieces: dict[str, float], layouts: dict[str, list], path: style.File = None):
    """Draw which part of a model each rank stores, and which it gathers to compute with.

    pieces: name of a part of the model -> its parameters; names of experts begin with "experts"
    layouts: title -> for each rank a dict: name -> (stored, at hand), shares (from, to) of a piece
    """
    figure = style.new_figure(9.8, 0.7 + 1.5 * len(layouts))
    panels = figure.subplots(len(layouts), 1, sharex=True, squeeze=False)[:, 0]
    lefts, end = {}, 0.0
    for name, size in pieces.items():
        lefts[name] = end
        end += size
    for ax, (title, ranks) in zip(panels, layouts.items(), strict=True):
        ax.grid(visible=False)
        for row, held in enumerate(ranks):
            for name, (stored, at_hand) in held.items():
                colour = style.GREEN if name.startswith("experts") else style.BLUE
                for (first, last), alpha in ((at_hand, 0.25), (stored, 1.0)):
                    ax.barh(row, (last - first) * pieces[name], 0.72, color=colour, alpha=alpha,
                            left=lefts[name] + first * pieces[name], linewidth=0)
        for left in [*lefts.values(), end]:
            ax.axvline(left, color=style.BLACK, linewidth=0.8)
        ax.set(title=title, xlim=(0, end), yticks=range(len(ranks)), ylabel="rank (number)")
        ax.invert_yaxis()
        ax.tick_params(axis="x", length=0)
    middles = [lefts[name] + size / 2 for name, size in pieces.items()]
    panels[-1].set_xticks(middles, [name.replace(" ", "\n", 1) for name in pieces])
    panels[-1].set_xlabel("parameters (width) of each part; strong: stored, pale: gathered for use")
    return style.finish(figure, path)


@style.house_style()
def schedule_figure(schedules: dict[str, list], path: style.File = None):
    """Draw what each rank of a pipeline does when; white is the bubble.

    schedules: title -> for each rank its passes (kind, stage, micro-batch, start, end): kind F, a
        forward pass; B, a backward pass; or its halves I, for inputs, and W, for weights. A unit of
        time is a rank's forward pass of one micro-batch through all its layers
    """
    colours = {"F": style.SKY, "B": style.ORANGE, "I": style.ORANGE, "W": style.GREEN}
    names = {"F": "forward", "B": "backward, or its half for inputs", "W": "its half for weights"}
    height = sum(0.35 + 0.26 * len(rows) for rows in schedules.values())
    figure = style.new_figure(9.8, 0.9 + height)
    panels = figure.subplots(len(schedules), 1, sharex=True, squeeze=False,
                             height_ratios=[len(rows) for rows in schedules.values()])[:, 0]
    last = max(end for rows in schedules.values() for row in rows for *_, end in row)
    for ax, (title, rows) in zip(panels, schedules.items(), strict=True):
        ax.grid(visible=False)
        for rank, row in enumerate(rows):
            for kind, _, batch, start, end in row:
                if kind != "W" and (end - start) * 70 > last:
                    ax.text((start + end) / 2, rank, batch, ha="center", va="center", fontsize=6.5)
            for look in sorted({(kind, stage >= len(rows)) for kind, stage, *_ in row}):
                spans = [(start, end - start) for kind, stage, _, start, end in row
                         if (kind, stage >= len(rows)) == look]
                ax.broken_barh(spans, (rank - 0.43, 0.86), facecolors=colours[look[0]],
                               alpha=0.6 if look[1] else 1.0, edgecolor="white", linewidth=0.6)
        ax.set(title=title, xlim=(0, last), yticks=range(len(rows)), ylabel="rank\n(number)")
        ax.invert_yaxis()
    panels[-1].set_xlabel("time (forward passes of a micro-batch through one rank)")
    for kind, name in names.items():
        panels[-1].barh(0, 0, color=colours[kind], label=name)
    figure.legend(loc="outside lower center", ncols=3)
    return style.finish(figure, path)


@style.house_style()
def wrong_ranks_figure(losses: dict[str, list], max_vio: dict[str, list], path: style.File = None):
    """Draw a loss under right and wrong sums of gradients, and balance under right and wrong loads.

    losses: label -> training loss at each step; max_vio: label -> MaxVio at each step
    """
    left, right = style.new_figure(9.8, 3.6).subplots(1, 2)
    styles = [(style.BLUE, "-"), (style.ORANGE, "--"), (style.RED, "-.")]
    for ax, rows in ((left, losses), (right, max_vio)):
        style.lines(ax, range(1, 1 + len(next(iter(rows.values())))), rows, styles)
        ax.set(xlabel="step", ylim=(0, None))
        ax.legend()
    left.set(ylabel="loss (squared error)", title="Adam hides a factor of four, but no mixture")
    right.set(ylabel="MaxVio (times the mean)", title="The loads of one rank balance one rank")
    return style.finish(left.figure, path)
