"""Pictures of one moment, behind the controls of notebooks 04 to 07, and the film made of them.

clock hands of rotary pairs | routes of a sentence | loads of one step | drafts on a time line
"""

from collections.abc import Iterable
from io import BytesIO
from math import cos, degrees, pi, sin
from pathlib import Path

from minids.base.files import write_whole
from minids.plots import style


@style.house_style()
def clock_figure(frequencies: dict[str, list], pairs: list[int], position: int, trained: int,
                 path: style.File = None):
    """Draw rotary pairs as clock hands at one position; the grey sector was seen in training.

    frequencies: label -> radians per token of every pair; the first label is the trained model
    pairs: numbers of the pairs to draw; position: of the token; trained: tokens of a context
    """
    from matplotlib.patches import Circle, Wedge
    figure = style.new_figure(9.8, 3.2)
    faces = figure.subplots(1, len(pairs))
    first, lost = next(iter(frequencies)), []
    for ax, pair in zip(faces, pairs, strict=True):
        seen = min(trained * frequencies[first][pair], 2 * pi)  # radians from the top
        ax.add_patch(Wedge((0, 0), 1, 90 - degrees(seen), 90, facecolor="#dddddd"))
        ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=style.GREY))
        ax.set(aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[], yticks=[])
        ax.axis("off")
        styles = zip(frequencies.items(), (style.RED, style.BLUE), (5.0, 2.0), strict=False)
        for (label, row), colour, width in styles:
            angle = position * row[pair] % (2 * pi)
            ax.plot([0, sin(angle)], [0, cos(angle)], color=colour, linewidth=width, label=label,
                    solid_capstyle="round")
        if position * frequencies[first][pair] % (2 * pi) > seen:
            lost.append(str(pair))
        ax.set_title(f"pair {pair}: {position * frequencies[first][pair] / (2 * pi):,.2f} turns")
    verdict = (f"{first}, pair {' and '.join(lost)} points where training never did" if lost
               else "every hand points where training has been")
    figure.suptitle(f"Position {position:,}: {verdict}", x=0.01, ha="left")
    handles, labels = faces[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return style.described(style.finish(figure, path), (
        f"Clock faces of rotary pairs {', '.join(map(str, pairs))} at position {position:,}, hands "
        f"for {' and '.join(frequencies)}; grey: angles seen in {trained:,} tokens of training"))


@style.house_style()
def routes_figure(tokens: list[str], weights: dict[str, list], path: style.File = None):
    """Draw which experts each token of a sentence visits, layer by layer.

    tokens: of the sentence, as text; weights: layer -> for each token the weight of every expert,
        0 for one that it does not visit
    """
    figure = style.new_figure(9.8, 0.9 + 1.9 * len(weights))
    panels = figure.subplots(len(weights), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (label, rows) in zip(panels, weights.items(), strict=True):
        style.heat_map(ax, [*zip(*rows, strict=True)], cmap="Blues").set_clim(0, 1)
        ax.set(title=label, ylabel="expert (number)", yticks=range(len(rows[0])))
    panels[-1].set_xticks(range(len(tokens)), tokens, rotation=90, family="monospace")
    visits = sum(weight > 0 for weight in next(iter(weights.values()))[0])
    figure.suptitle(f"Each token visits {visits} of {len(rows[0])} experts, "
                    "and other ones in every layer", x=0.01, ha="left")
    return style.described(style.finish(figure, path), (
        f"A grid per layer, {len(weights)} in all: {len(tokens)} tokens by {len(rows[0])} experts, "
        f"darker where an expert weighs more; {visits} fields in each column are filled"))


@style.house_style()
def loads_figure(shares: dict[str, list], step: int, limit: float, path: style.File = None):
    """Draw the load of each expert after one step, under each way of balancing.

    shares: regime -> for each step the load of each expert, in times the even share
    step: to draw, from 1; limit: the largest load that is possible, in times the even share
    """
    figure = style.new_figure(9.8, 2.9)
    figure.set_layout_engine(None)  # a film draws many of these: fixed margins are much faster
    margins = dict(left=0.055, right=0.995, bottom=0.17, top=0.74, wspace=0.08)
    panels = figure.subplots(1, len(shares), sharey=True, gridspec_kw=margins)
    for ax, rows in zip(panels, shares.values(), strict=True):
        ax.bar(range(len(rows[0])), 0, 0.85, edgecolor=style.GREY, linewidth=0.5)
        ax.axhline(1, color=style.BLACK, linewidth=0.8)
        ax.set(ylim=(0, limit), xlabel="expert (number)")
    panels[0].set_ylabel("load (times the even share)")
    return style.finish(at_step(figure, shares, step), path)


@style.house_style()
def at_step(figure, shares: dict[str, list], step: int):
    """Move a `loads_figure` to a step, much faster than a new one is drawn, and return it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TwoSlopeNorm
    colour = ScalarMappable(TwoSlopeNorm(1, 0, 4), "RdBu_r").to_rgba
    for ax, (label, rows) in zip(figure.axes, shares.items(), strict=True):
        row = rows[step - 1]
        for bar, height, shade in zip(ax.patches, row, colour(row), strict=True):
            bar.set(height=height, facecolor=shade)
        starved = sum(share < 0.1 for share in row)
        ax.set_title(f"{label}\nbusiest {max(row):.1f} times, {starved} starved")
    busiest = {label: max(rows[step - 1]) for label, rows in shares.items()}
    most, least = (pick(busiest, key=busiest.get) for pick in (max, min))
    figure.suptitle(f"Step {step}: busiest expert at {busiest[most]:.1f} times the even share "
                    f"({most}), at {busiest[least]:.1f} ({least})", x=0.01, ha="left")
    told = ", ".join(f"{label} {share:.1f}" for label, share in busiest.items())
    return style.described(figure, (
        f"Loads of the experts at step {step} under {len(shares)} ways of balancing, as bars; the "
        f"busiest in times the even share: {told}"))


@style.house_style()
def speed_figure(curves: dict[float, list], chosen: float, path: style.File = None):
    """Draw how MaxVio falls when only the biases move, at one speed among others.

    curves: speed of the bias -> MaxVio after each step; chosen: the speed to stress
    """
    ax = style.new_figure(7.5, 3.2).subplots()
    free = 0.0  # height above which the next label has room
    for speed, row in sorted(curves.items(), key=lambda item: item[1][-1]):
        here = speed == chosen
        ax.plot(range(len(row)), row, color=style.BLUE if here else style.GREY,
                linewidth=2 if here else 0.7, zorder=3 if here else 1)
        height = max(row[-1], free)
        free = height + 0.06 * max(map(max, curves.values()))
        style.note(ax, f"{speed:g}", (len(row) - 1, height), (5, 0), va="center")
    row = curves[chosen]
    end = row[3 * len(row) // 4:]
    done = next((step for step, value in enumerate(row) if value <= max(end)), len(row))
    verdict = (f"still falling after {len(row) - 1} steps" if done > 0.7 * len(row) else
               f"settles after {done} steps, then swings up to {max(end):.2f}")
    ax.set_title(f"Speed {chosen:g}: {verdict}")
    ax.set(xlabel="step", ylabel="MaxVio (times the mean)", ylim=(0, None))
    return style.described(style.finish(ax.figure, path), (
        f"MaxVio over steps for {len(curves)} speeds of the bias; {chosen:g} stands out, it goes "
        f"from {row[0]:.2f} to {row[-1]:.2f}"))


@style.house_style()
def drafting_figure(passes: list[dict], shown: int, path: style.File = None):
    """Draw drafts proposed and verified: a row per pass of the model, a column per token.

    passes: start (tokens before it), draft (text of each drafted token), kept (drafts accepted),
        own (text of the token that the model itself adds)
    shown: passes to draw; a draft is verified by the pass that reads it
    """
    ends = [turn["start"] + turn["kept"] + 1 for turn in passes]
    wide = max(*ends, *(turn["start"] + len(turn["draft"]) for turn in passes))
    ax = style.new_figure(9.8, 0.9 + 0.36 * len(passes)).subplots()
    for row, turn in enumerate(passes[:shown]):
        for n, text in enumerate(turn["draft"]):
            colour = style.GREEN if n < turn["kept"] else style.RED
            token(ax, turn["start"] + n, row - 0.25, text, colour, n >= turn["kept"])
        token(ax, turn["start"] + turn["kept"], row + 0.2, turn["own"], style.BLUE)
    tokens, kept = ends[shown - 1] - passes[0]["start"], sum(t["kept"] for t in passes[:shown])
    drafts = sum(len(turn["draft"]) for turn in passes[:shown])
    title = f"Tokens written after pass {shown}: {tokens}; drafts accepted: {kept} of {drafts}"
    ax.set_title(title)
    ax.set(xlim=(-0.55, wide - 0.45), ylim=(len(passes) - 0.4, -0.6), yticks=range(len(passes)),
           xlabel="token written (number)", ylabel="pass of the model (number)")
    ax.set_yticklabels(range(1, len(passes) + 1))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(visible=False)
    return style.described(style.finish(ax.figure, path), (
        f"A time line of speculative decoding, one row per pass: {title}. Green drafts are "
        "accepted, red ones are crossed out, blue tokens are the model's own"))


def token(ax, column: int, height: float, text: str, colour, struck: bool = False) -> None:
    """Draw a token's text on its colour; a struck one is crossed out."""
    ax.text(column, height, text, ha="center", va="center", fontsize=8, family="monospace",
            bbox=dict(boxstyle="round,pad=0.2", facecolor="white", edgecolor=colour), color=colour)
    if struck:
        ax.plot([column - 0.3, column + 0.3], [height, height], color=colour, linewidth=1,
                zorder=4)  # above the text's box


@style.house_style()
def gif(figures: Iterable, path: style.File, milliseconds: int = 120, dpi: int = 80) -> bytes:
    """Return figures as an animated GIF, also written to `path`; equal figures give equal bytes.

    figures: in turn, so that they may be one figure that moves
    milliseconds: that a figure is shown; the last one stays ten times as long
    """
    from PIL import Image
    frames = []
    for figure in figures:
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
        frames.append(Image.open(buffer).convert("RGB"))
    palette = frames[len(frames) // 2].quantize(64, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    out = BytesIO()
    times = [milliseconds] * (len(frames) - 1) + [10 * milliseconds]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, out.getvalue())
    return out.getvalue()
