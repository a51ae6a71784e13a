"""Figures of speed: where the time of a step goes."""

from minids.plots import style

STEPS = "training", "decoding"
IDLE = "the card waits"
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
        left = [0.0] * len(kept)
        for kind, colour in COLOURS.items():
            parts = [kept[label][step] for label in kept]
            row = [idle(part) if kind == IDLE else part["kinds"].get(kind, 0.0) for part in parts]
            ax.barh(list(kept), row, 0.62, left, color=colour, label=kind, edgecolor="white",
                    linewidth=0.4)
            left = [a + b for a, b in zip(left, row, strict=True)]
        for height, label in enumerate(kept):
            style.note(ax, f"{kept[label][step]['ms']:.3g} ms", (left[height], height), (4, 0),
                       va="center")
        ax.set(title=f"one {step} step", xlabel="time (milliseconds)", xlim=(0, 1.18 * max(left)),
               ylim=(len(kept) - 0.5, -0.5))
        ax.grid(visible=False, axis="y")
    where = ", ".join(dict.fromkeys(part["where"] for part in kept.values()))
    figure.suptitle(f"{message(kept)} ({where})", fontsize=10.5, x=0.01, ha="left")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return style.finish(figure, path)
