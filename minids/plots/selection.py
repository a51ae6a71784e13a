"""Figures of sparse attention: which tokens a query selects, what they hold, what that costs."""

from minids.plots import style


@style.house_style()
def dsa_figure(ks: list[int], held: dict[str, list], lengths: list[int], flops: dict[str, list],
               path: style.File = None):
    """Draw how much attention k selected tokens hold, and what attention costs.

    ks: numbers of selected tokens; held: label -> share of attention's weight on them at each
    lengths: contexts, tokens; flops: label -> FLOPs of one token's attention at each
    """
    left, right = style.new_figure(9.8, 4.0).subplots(1, 2)
    style.lines(left, ks, held, (style.BLACK, style.BLUE, style.ORANGE, style.GREY), 3)
    left.set(xlabel="tokens selected, k (count, log scale)",
             ylabel="attention's weight on them (share)",
             title="The indexer selects what attention looks at")
    left.set_xscale("log", base=2)
    left.legend(loc="center right")
    giga = {label: [count / 1e9 for count in row] for label, row in flops.items()}
    style.lines(right, lengths, giga, (style.RED, style.BLUE), 3)
    right.set_xscale("log", base=2)
    right.set(xlabel="context (tokens, log scale)", yscale="log",
              ylabel="attention of one token\n(GFLOPs, log scale)",
              title="Only the indexer's share still grows")
    right.legend()
    return style.finish(left.figure, path)


@style.house_style()
def questions_figure(attention: list[list], first: int, chosen: list[int], names: list[str],
                     path: style.File = None):
    """Draw where questions look, and the token that the indexer scores highest for each.

    attention: for each question, weights of the tokens from position `first` on
    chosen: for each question, the position of the indexer's best token
    names: of the questions
    """
    ax = style.new_figure(9.0, 3.9).subplots()
    picture = style.heat_map(ax, [[100 * weight for weight in row] for row in attention], first,
                             "Blues")
    best = [first + max(range(len(row)), key=row.__getitem__) for row in attention]
    for row, token in enumerate(chosen):
        right = token - first > 0.8 * len(attention[0])
        ax.plot(token, row, "s", markersize=13, markerfacecolor="none", color=style.RED)
        style.note(ax, f"token {token}", (token, row), (-12 if right else 12, 0), va="center",
                   ha="right" if right else "left")
    agree = sum(a == b for a, b in zip(best, chosen, strict=True))
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="token looked at (position); red: the indexer's best", ylabel="question (token)",
           title=f"The indexer's best token is attention's best for {agree} of {len(names)} "
           "questions")
    ax.figure.colorbar(picture, ax=ax, label="attention's weight (percent)")
    return style.finish(ax.figure, path)


@style.house_style()
def query_figure(weights: list[float], scores: list[float], chosen: list[int], name: str,
                 path: style.File = None):
    """Draw one query's attention and its indexer's scores over the tokens before it.

    weights: of attention, they sum to 1; scores: of the indexer; both by position
    chosen: positions of the selected tokens; name: of the query
    """
    upper, lower = style.new_figure(9.0, 4.2).subplots(2, 1, sharex=True)
    others = sorted({*range(len(weights))} - {*chosen})
    for tokens, colour, label in ((others, style.GREY, "left out"),
                                  (sorted(chosen), style.RED, "selected")):
        upper.vlines(tokens, 0, [100 * weights[token] for token in tokens], color=colour)
        lower.plot(tokens, [scores[token] for token in tokens], ".", color=colour, label=label,
                   markersize=4)
    lower.axhline(min(scores[token] for token in chosen), color=style.RED, linewidth=0.8)
    held = sum(weights[token] for token in chosen)
    upper.set(ylabel="attention's weight\n(percent)",
              title=f"{name}: the {len(chosen)} selected of {len(weights)} tokens hold {held:.0%} "
              "of attention's weight")
    lower.set(xlabel="token looked at (position)", ylabel="the indexer's score\n(logit)")
    lower.legend(loc="lower left", ncols=2)
    return style.finish(lower.figure, path)
