"""Figures of the model's parts: positions, experts, MTP, FP8, sparse attention."""

from minids.plots import style


@style.house_style()
def yarn_figure(wavelengths: dict[str, list], low: int, high: int, contexts: dict[str, int],
                losses: dict[str, list], trained: int, path: style.File = None):
    """Draw what YaRN does to the rotary pairs, and to the loss past the trained length.

    wavelengths: label -> tokens in a full rotation, for each pair
    low, high: last pair that stays as it is, first pair that is fully stretched
    contexts: label -> a length to mark among the wavelengths, tokens
    losses: label -> loss at each position, nats per token; a label has one line style
    trained: length that the model of `losses` was trained on, tokens
    """
    left, right = style.new_figure(10.5, 4.0).subplots(1, 2)
    dashes = [(style.BLUE, "-"), (style.RED, "--"), (style.ORANGE, "-"), (style.BLACK, ":")]
    styles = dict(zip(dict.fromkeys([*losses, *wavelengths]), dashes, strict=False))
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
    left.set(xlabel="rotary pair (number)", ylabel="wavelength (tokens, log scale)", yscale="log")
    left.set_ylim(bottom=min(map(min, wavelengths.values())) / 8)  # room for the regions' names

    for label, row in losses.items():  # means of 16 neighbours, at their middle
        parts = [row[i:i + 16] for i in range(0, len(row), 16)]
        middles = [16 * n + (len(part) - 1) / 2 for n, part in enumerate(parts)]
        means = [sum(part) / len(part) for part in parts]
        style.lines(right, middles, {label: means}, [styles[label]])
    right.axvline(trained, color=style.GREY, linewidth=1.2)
    style.note(right, "trained length", (trained, 0), (4, 5), ("data", "axes fraction"))
    right.set(xlabel="position (tokens)", ylabel="loss (nats per token)")
    left.figure.legend(*right.get_legend_handles_labels(), loc="outside lower center",
                       ncols=len(losses))
    return style.finish(left.figure, path)


@style.house_style()
def moe_figure(tokens: list[int], losses: dict[str, list], kinds: list[str], visits: list[list],
               path: style.File = None):
    """Draw the losses of experts and of a dense model, and which expert gets which kind of token.

    tokens: seen after each step; losses: label -> loss at each step, nats per token
    visits: for each of `kinds` the share of its tokens that visit each expert, percent
    """
    left, right = style.new_figure(9.8, 3.6).subplots(1, 2, width_ratios=[1, 1.15])
    style.training_losses(left, tokens, losses, (style.GREEN, style.BLUE))
    picture = style.heat_map(right, visits)
    picture.set_clim(0)
    middle = max(map(max, visits)) / 2
    for n, row in enumerate(visits):
        for e, share in enumerate(row):
            right.text(e, n, f"{share:.0f}", ha="center", va="center", fontsize=8,
                       color=style.BLACK if share > middle else "white")
    right.set_yticks(range(len(kinds)), kinds)
    right.set(xticks=range(len(visits[0])), xlabel="expert (number)")
    left.figure.colorbar(picture, ax=right, label="tokens that visit (percent)")
    return style.finish(left.figure, path)


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
    maps[0].set_ylabel("expert (number)")
    maps[0].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=maps, extend="max", ticks=range(5),
                    label="load (times the even share)")
    colours = style.BLACK, style.ORANGE, style.BLUE, style.GREEN
    for (label, row), colour in zip(max_vio.items(), colours, strict=True):
        style.series(below, [*range(1, len(row) + 1)], row, colour, label)
    below.set(xlabel="step", ylabel="MaxVio (times the mean)", ylim=(0, None))
    below.legend()
    return style.finish(figure, path)


@style.house_style()
def mtp_figure(kinds: dict[str, tuple], tokens_a_pass: dict[str, list], path: style.File = None):
    """Draw how often drafts are accepted by kind of text, and how many tokens a pass yields.

    kinds: label -> shares of drafts that are accepted, greedily and at temperature 1, percent
    tokens_a_pass: label -> tokens that one pass yields with 0, 1, 2, .. drafts
    """
    left, right = style.new_figure(9.8, 3.8).subplots(1, 2, width_ratios=[1.3, 1])
    greedy, sampled = zip(*kinds.values(), strict=True)
    heights = range(len(kinds))
    left.barh([y - 0.2 for y in heights], greedy, 0.38, color=style.BLUE, label="greedy")
    left.barh([y + 0.2 for y in heights], sampled, 0.38, color=style.ORANGE, label="temperature 1")
    left.set_yticks(heights, kinds)
    left.invert_yaxis()
    left.set(xlim=(0, 100), xlabel="drafts that pass on held-out text (percent)")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    drafts = range(len(next(iter(tokens_a_pass.values()))))
    style.lines(right, drafts, tokens_a_pass, (style.BLUE, style.ORANGE), 6)
    style.lines(right, drafts, {"all pass": [n + 1 for n in drafts]}, [(style.GREY, ":")])
    right.set(xticks=drafts, xlabel="drafts a pass (count)", ylabel="tokens a pass (count)")
    right.legend()
    return style.finish(left.figure, path)


@style.house_style()
def fp8_figure(factors: list[float], outliers: dict[str, list], lengths: list[int],
               sums: dict[str, list], path: style.File = None):
    """Draw the error of FP8 as outliers grow, and as sums get longer.

    factors: sizes of outliers; outliers: label -> error of a product at each, percent
    lengths: of sums; sums: label -> largest error at each, percent
    """
    left, right = style.new_figure(9.8, 3.8).subplots(1, 2)
    style.lines(left, factors, outliers, (style.RED, style.ORANGE, style.BLUE), 3)
    left.set(xlabel="size of the outliers (ratio, log scale)", xscale="log", yscale="log",
             ylabel="error of the product\n(percent, log scale)")
    left.legend(title="one scale for a")
    style.lines(right, lengths, sums, (style.RED, style.BLUE), 3)
    right.set(xlabel="length of the sum (count, log scale)", ylabel="largest error (percent)")
    right.set_xscale("log", base=2)
    right.legend()
    return style.finish(left.figure, path)


@style.house_style()
def dsa_figure(ks: list[int], held: dict[str, list], attention: list[list], chosen: list[list],
               first: int, lengths: list[int], flops: dict[str, list], path: style.File = None):
    """Draw how much attention k selected tokens hold, which they are, and what attention costs.

    ks: numbers of selected tokens; held: label -> share of attention's weight on them at each
    attention: for each query, weights of the tokens from position `first` on
    chosen: for each query, positions of the indexer's tokens
    lengths: contexts, tokens; flops: label -> FLOPs of one token's attention at each
    """
    left, middle, right = style.new_figure(12.5, 3.9).subplots(1, 3, width_ratios=[1, 1.35, 1])
    style.lines(left, ks, held, (style.BLACK, style.BLUE, style.ORANGE, style.GREY), 3)
    left.set(xlabel="tokens chosen, k (count, log scale)",
             ylabel="attention's weight on them (share)")
    left.set_xscale("log", base=2)
    left.legend(loc="center right")
    last = first + len(attention[0])
    style.heat_map(middle, [[weight ** 0.5 for weight in row] for row in attention], first)
    marks = [(token, n) for n, row in enumerate(chosen) for token in row if first <= token < last]
    middle.scatter(*zip(*marks, strict=True), marker="s", s=26, facecolors="none",
                   edgecolors=style.RED, linewidth=0.9)
    middle.set(xlabel="token looked at (position)", ylabel="question (number)")
    giga = {label: [count / 1e9 for count in row] for label, row in flops.items()}
    style.lines(right, lengths, giga, (style.RED, style.BLUE), 3)
    right.set_xscale("log", base=2)
    right.set(xlabel="context (tokens, log scale)", yscale="log",
              ylabel="attention of one token\n(GFLOPs, log scale)")
    right.legend()
    return style.finish(left.figure, path)
