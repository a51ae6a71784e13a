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
def ablation_figure(tokens: list[int], losses: dict[str, list], costs: dict[str, list],
                    path: style.File = None):
    """Draw losses during training, and what each change of the model costs at the end.

    tokens: seen after each step; losses: label -> loss at each step, nats per token
    costs: label -> bits per byte above the unchanged model, one per seed
    """
    left, right = style.new_figure(10.2, 3.8).subplots(1, 2)
    style.training_losses(left, tokens, losses, (style.BLUE, style.RED, style.GREEN))
    left.locator_params(axis="x", nbins=5)
    for height, row in enumerate(costs.values()):
        right.plot(row, [height] * len(row), "o", color=style.BLUE, markersize=6, alpha=0.8)
    right.axvline(0, color=style.GREY, linewidth=1.2)
    right.set_yticks(range(len(costs)), costs)
    right.set(ylim=(len(costs) - 0.5, -0.5), xlabel="above the whole model (bits per byte)")
    return style.finish(left.figure, path)


@style.house_style()
def grpo_figure(runs: dict[str, list[dict]], path: style.File = None):
    """Draw the course of reinforcement learning, one line per run.

    runs: name -> lines of a run's metrics.jsonl, of which step, reward_accuracy (share of the
        sampled replies that are right), thinking (share that think), length (tokens) and kl (nats
        per token) are read
    """
    figure = style.new_figure(8.6, 5.6)
    panels = [("reward_accuracy", "right answers", "replies (share)"),
              ("thinking", "thinking", "replies (share)"),
              ("length", "length", "a reply (tokens)"),
              ("kl", "distance from the reference", "KL (nats a token)")]
    for ax, (name, title, unit) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for (label, metrics), dash in zip(runs.items(), cycle(style.DASHES), strict=False):
            steps, values = column(metrics, name)
            style.lines(ax, steps, {label: values}, [dash])
        ax.set(title=title, xlabel="step", ylabel=unit,
               ylim=(0, 1.05 if "share" in unit else None))
    if len(runs) > 1:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(len(runs), 5))
    return style.finish(figure, path)


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
    for ax, title in ((left, "well-formed replies, left to choose"),
                      (right, "right answers to held-out questions")):
        ax.set(title=title, xlabel="step", ylabel="replies (share)", ylim=(0, 1.05))
    right.legend()
    return style.finish(left.figure, path)
