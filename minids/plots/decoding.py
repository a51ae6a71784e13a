"""Figures of what one more token costs: bytes that are read, arithmetic, and time."""

from minids.plots import style


def three(number: float) -> str:
    """Return a number with three digits, or with all before the point: 0.53, 29,151."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


@style.house_style()
def cache_figure(sizes: dict[str, float], memory: float, bytes_per_second: float, title: str,
                 path: style.File = None):
    """Draw the cache that each form of attention keeps, and how long reading it once takes.

    sizes: form -> bytes of cache; memory: of one GPU, bytes; bytes_per_second: its bandwidth
    """
    figure = style.new_figure(7.4, 1.2 + 0.42 * len(sizes))
    ax = figure.subplots()
    giga = [size / 1e9 for size in sizes.values()]
    ax.barh([*sizes], giga, height=0.6, color=style.BLUE)
    for name, size in zip(sizes, giga, strict=True):
        time = 1e12 * size / bytes_per_second
        style.note(ax, f"{three(size)} GB, {three(time)} ms to read", (1, name), (-2, 0),
                   ("axes fraction", "data"), "right", "center")
    ax.axvline(memory / 1e9, color=style.RED, linewidth=1.4)
    style.note(ax, f"memory of one GPU, {memory / 1e9:.0f} GB", (memory / 1e9, 0), (4, 3),
               ("data", "axes fraction"))
    ax.set(title=title, xscale="log", xlabel="cache of one request (GB, log scale)",
           xlim=(min(giga) / 3, 500 * max(*giga, memory / 1e9)))
    ax.set_ylim(len(sizes) - 0.1, -0.6)  # the first on top, and room for the note
    ax.grid(axis="y", visible=False)
    told = ", ".join(f"{name} {three(size)} GB" for name, size in zip(sizes, giga, strict=True))
    return style.described(style.finish(figure, path), (
        f"A bar for each form of attention, the cache of one request on a log axis: {told}; a line "
        f"at the memory of one GPU, {memory / 1e9:.0f} GB"))


@style.house_style()
def roofline_figure(forms: dict[str, tuple[float, float]], flops: float, bandwidth: float,
                    title: str, measured: dict[str, float] | None = None,
                    path: style.File = None):
    """Draw how long each form of attention must take, and where it stands under the roofline.

    forms: label -> (FLOPs, bytes read and written) of the work; flops: the machine's peak, FLOP/s
    bandwidth: bytes per second; measured: label -> seconds that the work took, if it was run
    (Williams, Waterman and Patterson, "Roofline", 2009.)
    """
    figure = style.new_figure(10.4, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    reading = [1e3 * size / bandwidth for _, size in forms.values()]
    computing = [1e3 * work / flops for work, _ in forms.values()]
    taken = [1e3 * measured[name] for name in forms] if measured else []
    longest = max(*reading, *computing, *taken)
    for times, shift, colour, label in [(reading, -0.2, style.BLUE, "to read the bytes"),
                                        (computing, 0.2, style.ORANGE, "to do the arithmetic")]:
        heights = [n + shift for n in range(len(forms))]
        left.barh(heights, times, 0.38, color=colour, label=label)
        for time, height in zip(times, heights, strict=True):
            style.note(left, three(time), (time, height), (4, 0), va="center")
    if taken:
        left.plot(taken, range(len(forms)), "D", color=style.BLACK, label="measured")
    left.set_yticks(range(len(forms)), forms)
    left.set(xscale="log", xlabel="time at the machine's peaks (ms, log scale)",
             xlim=(min(*reading, *computing) / 3, 4 * longest), title="What it must take")
    left.invert_yaxis()
    left.grid(axis="y", visible=False)

    ridge = flops / bandwidth
    ratios = {name: work / size for name, (work, size) in forms.items()}
    low, high = min(ridge, *ratios.values()) / 6, 6 * max(ridge, *ratios.values())
    right.plot([low, ridge, high], [low * bandwidth / 1e9, flops / 1e9, flops / 1e9],
               color=style.GREY)
    style.note(right, f"ridge: {three(ridge)} FLOPs per byte", (ridge, flops / 1e9), (0, 6),
               ha="center")
    rates = [forms[name][0] / measured[name] / 1e9 if measured else
             min(flops, ratio * bandwidth) / 1e9 for name, ratio in ratios.items()]
    right_of_ridge = 0
    colours = style.BLUE, style.RED, style.GREEN
    for (name, ratio), rate, colour in zip(ratios.items(), rates, colours, strict=False):
        right.plot(ratio, rate, "o", color=colour, markersize=8)
        far = ratio > ridge / 4  # its text stands to the left, each lower than the one before
        style.note(right, f"{name}\n{three(ratio)} FLOPs per byte", (ratio, rate),
                   (6, -8 - 34 * right_of_ridge) if far else (10, -6),
                   ha="right" if far and right_of_ridge else "left", va="top")
        right_of_ridge += far
    right.set(xscale="log", yscale="log", xlabel="arithmetic (FLOPs per byte, log scale)",
              ylabel="rate (GFLOP/s, log scale)", ylim=(min(rates) / 8, 5 * flops / 1e9),
              title="Left of the ridge memory is the limit")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    told = "; ".join(f"{name} {three(a)} and {three(b)} ms, {three(ratio)} FLOPs per byte"
                     for (name, ratio), a, b in zip(ratios.items(), reading, computing,
                                                    strict=True))
    return style.described(style.finish(figure, path), (
        "Left, bars of the time to read and to compute; right, the same forms under a roofline "
        f"with its ridge at {three(ridge)} FLOPs per byte: {told}"))
