"""Figures of speed: where the time of a step goes."""

from minids.plots import style

STEPS = "training", "decoding"
IDLE = "the card waits"
TINY = 0.1  # the shortest step, if below this share of the longest, is drawn enlarged too
COLOURS = {"grouped products": style.BLUE, "products": style.SKY, "attention": style.GREEN,
           "norms and elementwise": style.YELLOW, "copies and casts": style.RED,
           "routing": style.PINK, "cross-entropy": style.ORANGE, "optimizer": style.BLACK,
           IDLE: "#dddddd"}


def message(kept: dict[str, dict]) -> str:
    """Return what the measurements say, first against last."""
    labels = list(kept)
    first, last = kept[labels[0]], kept[labels[-1]]
    if len(labels) == 1:
        waits = {step: idle(first[step]) / first[step]["ms"] for step in STEPS}
        return (f"The card waits for {waits['training']:.0%} of a training step and "
                f"{waits['decoding']:.0%} of a decoding step")
    gains = {step: first[step]["ms"] / last[step]["ms"] for step in STEPS}
    return (f"A training step is {gains['training']:.1f} times as fast, "
            f"a decoding step {gains['decoding']:.1f} times")


def idle(part: dict) -> float:
    """Return the milliseconds of a step in which nothing runs."""
    return max(part["ms"] - sum(part["kinds"].values()), 0.0)


def draw_bars(ax, parts: dict[str | int, dict]) -> None:
    """Draw a stacked bar for each part of a measurement, from top to bottom; keys: its label or
    height"""
    left = [0.0] * len(parts)
    for kind, colour in COLOURS.items():
        row = [idle(part) if kind == IDLE else part["kinds"].get(kind, 0.0)
               for part in parts.values()]
        ax.barh(list(parts), row, 0.62, left, color=colour, label=kind, edgecolor="white",
                linewidth=0.4)
        left = [a + b for a, b in zip(left, row, strict=True)]
    for height, part in enumerate(parts.values()):
        style.note(ax, f"{part['ms']:.3g} ms", (left[height], height), (4, 0), va="center")
    ax.set(xlim=(0, 1.18 * max(left)), ylim=(len(parts) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")


@style.house_style()
def profile_figure(kept: dict[str, dict], path: style.File = None):
    """Draw the milliseconds of a training and of a decoding step by kind of kernel.

    kept: label -> "where" and, for each of `STEPS`, a dictionary: what was measured, ms of a step,
        and kinds, the milliseconds of each kind in it; labels from top to bottom
    Raises ValueError if there is no label.
    """
    if not kept:
        raise ValueError("nothing is recorded: measure with --label first")
    figure = style.new_figure(9.4, 2.9 + 0.45 * len(kept))
    for ax, step in zip(figure.subplots(1, 2), STEPS, strict=True):
        parts = {label: measured[step] for label, measured in kept.items()}
        draw_bars(ax, parts)
        ax.set(title=f"one {step} step", xlabel="time (milliseconds)")
        label, least = min(parts.items(), key=lambda part: part[1]["ms"])
        if least["ms"] < TINY * max(part["ms"] for part in parts.values()):
            top = list(parts).index(label) / len(parts)  # beside its bar, which is short
            inner = ax.inset_axes([0.33, 0.68 - top, 0.64, 0.45 / len(parts)])
            draw_bars(inner, {0: least})
            inner.set_title(f"{label}, enlarged")
            inner.yaxis.set_visible(False)
    where = ", ".join(dict.fromkeys(part["where"] for part in kept.values()))
    figure.suptitle(f"{message(kept)} ({where})", fontsize=10.5, x=0.01, ha="left")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return style.finish(figure, path)
