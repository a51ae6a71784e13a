"""Figures of training: pre-training, ablations, fine-tuning, reinforcement learning."""

from itertools import cycle

from minids.plots import style


def column(metrics: list[dict], name: str) -> tuple[list, list]:
    """Return the steps that logged `name`, and its values there."""
    rows = [row for row in metrics if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


@style.house_style()
def loss_curve(metrics: list[dict], path: style.File = None):
    """Draw the course of a training run: losses, validation, balance of the experts.

    metrics: lines of a run's metrics.jsonl, of which step, main and mtp (nats per token),
        valid_bpb (bits per byte, on evaluated steps) and max_vio (one number per MoE layer) are
        read; a panel without data is left out
    Raises ValueError if there is no line.
    """
    if not metrics:
        raise ValueError("metrics is empty: a run has to log a step before it can be drawn")
    import matplotlib
    heights = {"main": 3.0, "valid_bpb": 2.0, "max_vio": 1.8}
    heights = {name: height for name, height in heights.items()
               if name == "main" or any(column(metrics, name)[1])}
    axes = style.new_figure(7.0, 0.5 + sum(heights.values())).subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=[*heights.values()])[:, 0]
    panels = dict(zip(heights, axes, strict=True))

    for name, label, colour in [("mtp", "token after next (MTP)", style.ORANGE),
                                ("main", "next token", style.BLUE)]:
        steps, values = column(metrics, name)
        if any(values):
            style.series(axes[0], steps, values, colour, label)
    axes[0].set_ylabel("training loss\n(nats per token)")
    axes[0].legend(reverse=True)

    if ax := panels.get("valid_bpb"):
        steps, values = column(metrics, "valid_bpb")
        style.lines(ax, steps, {f"last: {values[-1]:.3f}": values}, [style.GREEN], 4)
        ax.set_ylabel("validation\n(bits per byte)")
        ax.legend(loc="upper right")

    if ax := panels.get("max_vio"):  # early layers dark, late ones light
        steps, values = column(metrics, "max_vio")
        width = min(map(len, values))  # MTP modules come last, and leave when their weight is 0
        layers = [*zip(*(value[:width] for value in values), strict=True)]
        last = len(layers) - 1
        for i, layer in enumerate(layers):
            label = {0: "first MoE layer", last: "last"}.get(i, "_between") if last else "MoE layer"
            shade = matplotlib.colormaps["viridis"](0.85 * i / max(1, last))
            style.series(ax, steps, layer, shade, label)
        ax.set(ylabel="MaxVio\n(largest / mean load - 1)", ylim=(0, None))
        ax.legend(ncols=2)

    axes[-1].set_xlabel("step")
    axes[-1].locator_params("x", nbins=10, integer=True, steps=[1, 2, 5, 10])
    return style.finish(axes[-1].figure, path)


@style.house_style()
def capstone_figure(tokens: list[int], losses: list[float], gaps: dict[str, list],
                    path: style.File = None):
    """Draw a run's loss, and how far other runs are from it.

    tokens: seen after each step; losses: of the run, nats per token
    gaps: label -> distance of another run's loss at each of the first steps, nats per token
    """
    left, right = style.new_figure(10.2, 3.6).subplots(1, 2)
    style.series(left, tokens, losses, style.BLUE, "your model")
    end = sum(losses[-20:]) / len(losses[-20:])  # a single batch is noisy
    left.set(title=f"From {losses[0]:.1f} to {end:.1f} nats: it learns",
             xlabel="tokens seen (count)", ylabel="training loss (nats per token)")
    left.locator_params(axis="x", nbins=5)
    left.xaxis.set_major_formatter("{x:,.0f}")
    for (name, row), colour in zip(gaps.items(), (style.BLUE, style.ORANGE), strict=False):
        steps = range(1, len(row) + 1)
        right.plot(steps, [max(gap, 1e-9) for gap in row], color=colour)
        top = len(row), max(*row[-12:], 1e-9)
        style.note(right, f"the package, {name}", top, (0, 4), ha="right")
    right.set(title="The seed matters, the package's fast bodies do not", xlabel="step",
              ylabel="distance from your loss\n(nats per token)", yscale="log", ylim=(3e-10, 10))
    return style.finish(style.described(left.figure, (
        f"Left: the loss falls from {losses[0]:.1f} to {end:.1f} nats per token. Right: how "
        "far other runs are from it, at most " + ", ".join(
            f"{max(row):.1g} nats with {name}" for name, row in gaps.items()) + ".")), path)


@style.house_style()
def grpo_figure(runs: dict[str, list[dict]], path: style.File = None, title: str = ""):
    """Draw the course of reinforcement learning, one line per run.

    runs: name -> lines of a run's metrics.jsonl, of which step, reward_accuracy (share of the
        sampled replies that are right), thinking (share that think), length (tokens) and kl (nats
        per token) are read; the titles tell how the first run begins and ends
    title: the message of the whole figure
    """
    figure = style.new_figure(8.6, 5.6)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    panels = [("reward_accuracy", "Right answers", "replies (share)"),
              ("thinking", "Thinking", "replies (share)"),
              ("length", "Length", "length of a reply (tokens)"),
              ("kl", "Distance", "KL (nats per token)")]
    first = next(iter(runs), "")
    for ax, (name, what, unit) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for (label, metrics), dash in zip(runs.items(), cycle(style.DASHES), strict=False):
            steps, values = column(metrics, name)
            style.lines(ax, steps, {label: values}, [dash])
        told = column(runs.get(first, []), name)[1]
        course = f": from {told[0]:.2g} to {told[-1]:.2g} ({first})" if told else ""
        ax.set(title=what + course, xlabel="step", ylabel=unit,
               ylim=(-0.04, 1.05) if "share" in unit else (0, None))  # a line at 0 stays visible
    if len(runs) > 1:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(len(runs), 5))
    return style.finish(figure, path)


@style.house_style()
def group_figure(replies: list[str], advantages: list[float], title: str,
                 path: style.File = None):
    """Draw the replies of one group, each coloured by its advantage: blue up, orange down.

    replies: the text of each; advantages: of each, in units of the group's standard deviation
    """
    ax = style.new_figure(8.0, 0.26 * len(replies) + 0.5).subplots()
    ax.set(title=title, xlim=(0, 1), ylim=(len(replies) - 0.4, -0.6))
    ax.set_axis_off()
    for row, (reply, advantage) in enumerate(zip(replies, advantages, strict=True)):
        colour = style.BLUE if advantage > 0 else style.ORANGE
        ax.axhspan(row - 0.45, row + 0.45, 0.08, color=colour, linewidth=0,
                   alpha=min(0.6, 0.25 * abs(advantage)))
        ax.text(0.07, row, f"{advantage:+.2f}", ha="right", va="center", fontsize=8.5)
        ax.text(0.09, row, reply, va="center", fontsize=8.5, family="monospace")
    up, down = (sum(map(test, advantages)) for test in ((0.0).__lt__, (0.0).__gt__))
    return style.finish(style.described(ax.figure, (
        f"{title}. {len(replies)} replies to one question: the advantage of {up} is above zero, "
        f"of {down} below, of {len(replies) - up - down} exactly zero.")), path)


@style.house_style()
def cold_start_figure(steps: list[int], accuracy: dict[str, list[float]], form: list[float],
                      path: style.File = None):
    """Draw what fine-tuning teaches first: the form of a reply, then right answers.

    steps: optimizer steps at which the model was examined
    accuracy: mode ("think", "direct", "free") -> share of right answers at each
    form: share of well-formed replies when the model may choose
    """
    left, right = style.new_figure(8.6, 3.4).subplots(1, 2, sharex=True, sharey=True)
    names = {"think": "made to think", "direct": "made to answer", "free": "left to choose"}
    style.lines(left, steps, {"": form}, [style.BLACK], 4)
    style.lines(right, steps, {names[mode]: row for mode, row in accuracy.items()}, size=4)
    left.set(title="The form comes within a few steps", ylabel="well-formed replies (share)")
    right.set(title="The skill returns behind the tags", ylabel="right answers (share)")
    for ax in (left, right):
        ax.set(xlabel="step", ylim=(0, 1.05))
    right.legend()
    return style.finish(style.described(left.figure, (
        f"Left: well-formed replies rise from {form[0]:.0%} to {form[-1]:.0%}. Right, the share of "
        "right answers at the end: " + ", ".join(f"{names[mode]} {row[-1]:.0%}"
                                           for mode, row in accuracy.items()) + ".")), path)
