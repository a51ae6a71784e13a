"""Figures of the model's parts: positions, experts, MTP."""

from minids.plots import style


@style.house_style()
def yarn_figure(wavelengths: dict[str, list], low: int, high: int, contexts: dict[str, int],
                right: dict[str, dict], positions: list, trained: int, path: style.File = None):
    """Draw what YaRN does to the rotary pairs, and what a model can do past the trained length.

    wavelengths: label -> tokens in a full rotation, for each pair
    low, high: last pair that stays as it is, first pair that is fully stretched
    contexts: label -> a length to mark among the wavelengths, tokens
    right: title of a task -> label -> right answers at each of `positions`, percent
    trained: length that the model was trained on, tokens
    """
    figure = style.new_figure(10.5, 4.6)
    panels = figure.subplot_mosaic([[0, 1], [0, 2]], width_ratios=[1, 1.05])
    left, tasks = panels.pop(0), [*panels.values()]
    labels = dict.fromkeys([*next(iter(right.values())), *wavelengths])
    dashes = [(style.BLUE, "-"), (style.RED, "--"), (style.ORANGE, "-"), (style.BLACK, ":")]
    styles = dict(zip(labels, dashes, strict=False))
    pairs = len(next(iter(wavelengths.values())))
    left.axvspan(low + 0.5, high - 0.5, color=style.YELLOW, alpha=0.25, linewidth=0)
    for name, first, end in [("left alone", 0, low), ("mixed", low + 1, high - 1),
                             ("divided", high, pairs - 1)]:
        style.note(left, f"{name}\n{first}-{end}", ((first + end) / 2, 0.02), ha="center",
                   coords=("data", "axes fraction"))
    for label, length in contexts.items():
        left.axhline(length, color=style.GREY, linewidth=1.2)
        style.note(left, label, (-0.5, length), (0, 3))
    style.lines(left, range(pairs), wavelengths, [styles[label] for label in wavelengths], 3)
    left.set(title="YaRN stretches only the slow pairs", xlabel="rotary pair (number)",
             ylabel="wavelength (tokens, log scale)", yscale="log")
    left.set_ylim(bottom=min(map(min, wavelengths.values())) / 8)  # room for the regions' names
    for ax, (title, rows) in zip(tasks, right.items(), strict=True):
        style.lines(ax, positions, rows, [styles[label] for label in rows], 3)
        ax.axvline(trained, color=style.GREY, linewidth=1.2)
        ax.set(title=title, ylabel="right (percent)", ylim=(-4, 104))
    style.note(tasks[0], "trained length", (trained, 45), (4, 0))
    tasks[-1].set_xlabel("position (tokens)")
    figure.legend(*tasks[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(labels))
    ends = "; ".join(f"{title}: " + ", ".join(f"{label} {row[-1]:.0f}" for label, row in
                                              rows.items()) for title, rows in right.items())
    return style.described(style.finish(figure, path), (
        f"Left: wavelengths of {pairs} rotary pairs. Right: answers by position past the trained "
        f"length; at the end, percent right: {ends}"))


@style.house_style()
def moe_figure(known: dict[str, tuple], kinds: list[str], visits: list[list],
               path: style.File = None):
    """Draw what idle parameters can hold, and which expert gets which kind of token.

    known: label of a layer -> its parameters (count), and the share of facts it knows, percent
    visits: for each of `kinds` the share of its tokens that visit each expert, percent
    """
    left, right = style.new_figure(9.8, 3.6).subplots(1, 2, width_ratios=[1, 1.15])
    sizes, shares = zip(*known.values(), strict=True)
    style.lines(left, sizes, {"facts known": shares}, [style.GREEN], 5)
    for label, point in known.items():
        style.note(left, label, point, (6, -10))
    left.set(title="Idle parameters hold facts, at equal work per token", xscale="log",
             ylim=(0, 105), xlim=(min(sizes) / 1.3, max(sizes) * 2.2),
             xlabel="parameters of the layer (count, log scale)", ylabel="facts known (percent)")
    columns = [*zip(*visits, strict=True)]  # experts, sorted by the kind that visits them most
    order = sorted(range(len(columns)), key=lambda e: (columns[e].index(max(columns[e])),
                                                       -max(columns[e])))
    rows = [[row[e] for e in order] for row in visits]
    picture = style.heat_map(right, rows, cmap="Blues")
    picture.set_clim(0, 100)
    for n, row in enumerate(rows):
        for e, share in enumerate(row):
            right.text(e, n, f"{share:.0f}", ha="center", va="center", fontsize=8,
                       color=style.BLACK if share < 60 else "white")
    right.set_yticks(range(len(kinds)), kinds)
    right.set_xticks(range(len(order)), order)
    right.set(title="Experts specialise, by categories of their own", xlabel="expert (number)")
    left.figure.colorbar(picture, ax=right, label="tokens that visit (percent)")
    return style.described(style.finish(left.figure, path), (
        "Left: the share of facts that a layer knows grows with its parameters: " + ", ".join(
            f"{label} {share:.0f} percent" for label, (_, share) in known.items())
        + f". Right: a heat map of {len(kinds)} kinds of token by {len(order)} experts"))


@style.house_style()
def balance_figure(shares: dict[str, list], max_vio: dict[str, list], path: style.File = None):
    """Draw the load of each expert under each way of balancing, and the busiest expert's excess.

    shares: regime -> for each step the load of each expert, in times the even share
    max_vio: regime -> MaxVio at each step
    """
    from matplotlib.colors import TwoSlopeNorm
    figure = style.new_figure(9.8, 5.6)
    *maps, below = figure.subplot_mosaic(
        [[*shares], [None] * len(shares)], height_ratios=[1, 1.1]).values()
    norm = TwoSlopeNorm(1, 0, 4)  # white is the even share, whatever the busiest expert gets
    for ax, (label, rows) in zip(maps, shares.items(), strict=True):
        picture = style.heat_map(ax, [*zip(*rows, strict=True)], 1, "RdBu_r", norm)
        ax.set_title(label)
        ax.tick_params(left=ax is maps[0], labelleft=ax is maps[0])
        ax.set_xlabel("step")
    figure.suptitle("A bias evens out the load of the experts within some 60 steps", x=0.01,
                    ha="left")
    maps[0].set_ylabel("expert (number)")
    maps[0].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=maps, extend="max", ticks=range(5),
                    label="load (times the even share)")
    colours = style.BLACK, style.ORANGE, style.BLUE, style.GREEN
    for (label, row), colour in zip(max_vio.items(), colours, strict=True):
        style.series(below, [*range(1, len(row) + 1)], row, colour, label)
    below.set(xlabel="step", ylabel="MaxVio (times the mean)", ylim=(0, None))
    below.legend()
    ends = ", ".join(f"{label} {row[-1]:.1f}" for label, row in max_vio.items())
    return style.described(style.finish(figure, path), (
        "Above: heat maps of the experts' loads over steps, one per way of balancing; with a bias "
        f"they turn white, the even share. Below: MaxVio over steps, which ends at: {ends}"))


@style.house_style()
def mtp_figure(kinds: dict[str, tuple], tokens_per_pass: dict[str, list], path: style.File = None):
    """Draw how often drafts are accepted by kind of text, and how many tokens a pass yields.

    kinds: label -> shares of drafts that are accepted, greedily and at temperature 1, percent;
        the first label is the whole text and stands apart
    tokens_per_pass: label -> tokens that one pass yields with 0, 1, 2, .. drafts
    """
    left, right = style.new_figure(9.8, 3.8).subplots(1, 2, width_ratios=[1.3, 1])
    heights = [0, *(n + 0.6 for n in range(1, len(kinds)))]
    for shift, colour, label, shares in zip((-0.2, 0.2), (style.BLUE, style.ORANGE),
                                            ("greedy", "temperature 1"),
                                            zip(*kinds.values(), strict=True), strict=True):
        left.barh([y + shift for y in heights], shares, 0.38, color=colour, label=label)
    left.set_yticks(heights, kinds)
    left.invert_yaxis()
    left.set(xlim=(0, 100), xlabel="accepted drafts, on held-out text (percent)",
             title="More drafts are accepted at temperature 1")
    drafts = range(len(next(iter(tokens_per_pass.values()))))
    style.lines(right, drafts, tokens_per_pass, (style.BLUE, style.ORANGE), 6)
    style.lines(right, drafts, {"all accepted": [n + 1 for n in drafts]}, [(style.GREY, ":")])
    right.set(xticks=drafts, xlabel="drafts per pass (count)", ylabel="tokens per pass (count)",
              title="Later drafts yield less than the first")
    left.figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return style.described(style.finish(left.figure, path), (
        "Left: bars of the accepted drafts, for the whole text and by kind. Right: tokens per "
        f"pass against drafts per pass, from none to {drafts[-1]}: " + "; ".join(
            f"{label} {row[0]:.1f} to {row[-1]:.1f}" for label, row in tokens_per_pass.items())))
