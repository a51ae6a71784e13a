"""Figures of serving: throughput over the batch, and who writes in which row when."""

from itertools import cycle

from minids.plots import style


@style.house_style()
def throughput_figure(panels: dict[str, dict[str, list]], path: style.File = None, alt: str = ""):
    """Draw tokens per second over the batch, up to the batch that fills the memory.

    panels: title -> label -> (sequences, tokens per second), the last one fills the memory
    alt: what the picture shows, for those who do not see it
    """
    from matplotlib.ticker import LogLocator, NullLocator
    figure = style.new_figure(9.8, 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        for (name, points), (colour, dash) in zip(rows.items(), cycle(style.DASHES), strict=False):
            x, y = zip(*points, strict=True)
            ax.plot(x, y, color=colour, linestyle=dash, label=name)
            ax.plot(x[-1], y[-1], "o", color=colour)
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_locator(NullLocator())
        ax.set(xlabel="sequences in the batch (count)",
               ylabel="throughput (tokens per second)", title=title)
        ax.legend()
    return style.described(style.finish(figure, path), alt)


@style.house_style()
def batching_figure(schedules: dict[str, list], rows: int, path: style.File = None, alt: str = ""):
    """Draw which reply each row of a batch writes at each step; white rows stand idle.

    schedules: title -> for each reply (row, first step, steps)
    """
    figure = style.new_figure(9.8, 0.8 + len(schedules) * (0.5 + 0.16 * rows))
    panels = figure.subplots(len(schedules), 1, sharex=True, squeeze=False)[:, 0]
    last = max(first + steps for spans in schedules.values() for _, first, steps in spans)
    colours = style.SKY, style.ORANGE, style.GREEN, style.YELLOW, style.PINK, style.BLUE
    for ax, (title, spans) in zip(panels, schedules.items(), strict=True):
        ax.grid(visible=False)
        for number, (row, first, steps) in enumerate(spans):
            ax.barh(row, steps, 0.86, left=first, color=colours[number % len(colours)],
                    edgecolor="white", linewidth=0.6)
        ax.set(title=title, xlim=(0, last), yticks=range(rows), ylabel="row (number)")
        ax.invert_yaxis()
    panels[-1].set_xlabel("time (steps)")
    return style.described(style.finish(figure, path), alt)
