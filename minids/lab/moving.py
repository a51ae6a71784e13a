"""A picture with controls: the reader moves a quantity, and the picture follows.

    def clock(position):
        "Four clock hands, one per pair of numbers, at a position"
        figure = new_figure(7, 3)
        ...
        return figure

    move(clock, position=range(64))

In JupyterLab, VS Code and Colab, sliders from ipywidgets redraw the picture. Everywhere else the
cell shows one still picture: on GitHub, in a static page, where a test runs the notebook. Which of
the two it is depends on the request to run the cell. A front end with a reader at it accepts
questions from the kernel (Jupyter's `allow_stdin`); nbclient, nbconvert and nbval accept none, so
what they store is the still picture alone, the same bytes each time and no state of widgets.
"""

import base64
import sys
from collections.abc import Callable
from dataclasses import dataclass

MISSING = "For sliders that move this picture: pip install ipywidgets, then restart the kernel."
VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class film:
    """Values for a control with a play button, in lower case as `range`.

    seconds: from one picture to the next, more if drawing takes longer
    first: the value of the still picture; None: the range's own first
    """

    values: range
    seconds: float = 0.2
    first: int | None = None


def move(draw: Callable, /, **controls) -> "Moving":
    """Return a picture with controls for the end of a cell.

    draw: called by keyword with one value of each control; returns a figure, a table, or text. The
        first line of its docstring is the picture's alternative text
    controls: name -> values, of which the first stands in the still picture: a range or a list
        of numbers (a slider, in ascending order), a `film` (with a play button), other choices or
        a dict of label -> value (a menu), True or False (a box to tick), text (a field)

    Raises what `draw` raises for the first values; later errors become one sentence in its place.
    """
    return Moving(draw, {name: values if isinstance(values, bool | str | film | dict)
                         else list(values) for name, values in controls.items()})


class Moving:
    """A picture with controls; Jupyter asks it for its outputs when the cell ends."""

    def __init__(self, draw: Callable, controls: dict):
        self.draw, self.controls = draw, controls
        self.still = draw(**{name: first(values) for name, values in controls.items()})

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """Return the outputs by type, and their metadata: the still picture, and controls."""
        data, about = formatted(self.still, self.draw)
        if not attended():
            return data, about
        try:
            box = self.box()
        except ImportError:
            print(MISSING)
            return data, about
        # The picture stays beside the controls, for a page that cannot show them.
        return data | {VIEW: box._repr_mimebundle_()[VIEW]}, about

    def box(self):
        """Return the controls above the picture, as one widget."""
        import ipywidgets
        handles, shown = {}, []
        for name, values in self.controls.items():
            handles[name], *players = control(name, values, max(map(len, self.controls)))
            shown.append(ipywidgets.HBox([handles[name], *players]))
        screen = ipywidgets.Output()
        screen.outputs = [output(self.still, self.draw)]

        def redraw(_change) -> None:
            values = {name: handle.value for name, handle in handles.items()}
            try:
                screen.outputs = [output(self.draw(**values), self.draw)]
            except Exception as error:  # of the drawing: the reader can move on
                given = ", ".join(f"{name} = {value!r}" for name, value in values.items())
                told = f"No picture for {given}: {type(error).__name__}: {error}".splitlines()[0]
                screen.outputs = [{"output_type": "stream", "name": "stdout", "text": told}]

        for handle in handles.values():
            handle.observe(redraw, "value")
        self.handles, self.screen = handles, screen
        return ipywidgets.VBox([*shown, screen])


def first(values):
    """Return the value that stands in the still picture."""
    if isinstance(values, bool | str):
        return values
    if isinstance(values, film):
        return values.values[0] if values.first is None else values.first
    return next(iter(values.values() if isinstance(values, dict) else values))


def control(name: str, values, letters: int = 0) -> list:
    """Return the widget that has a value, and after it one that plays it, if any.

    letters: room for the name, so that controls stand below each other
    """
    import ipywidgets
    look = {"description": name.replace("_", " "),
            "style": {"description_width": f"{0.6 * letters:.1f}em" if letters else "initial"}}
    if isinstance(values, bool):
        return [ipywidgets.Checkbox(values, indent=False, **look)]
    if isinstance(values, str):
        return [ipywidgets.Text(values, continuous_update=False, layout={"width": "36em"}, **look)]
    if isinstance(values, dict):
        return [ipywidgets.Dropdown(options=list(values.items()), **look)]
    if isinstance(values, film):
        steps = {"value": first(values), "min": min(values.values), "max": max(values.values),
                 "step": abs(values.values.step)}
        slider = ipywidgets.IntSlider(**steps, layout={"width": "28em"}, **look)
        play = ipywidgets.Play(**steps, interval=round(1000 * values.seconds))
        ipywidgets.jslink((play, "value"), (slider, "value"))
        return [slider, play]
    if all(isinstance(value, int | float) for value in values):
        options = [(f"{value:,}", value) for value in sorted(values)]
        return [ipywidgets.SelectionSlider(options=options, value=values[0],
                                           layout={"width": "28em"}, **look)]
    return [ipywidgets.Dropdown(options=values, value=values[0], **look)]


def attended() -> bool:
    """Return whether the front end that runs this cell has somebody at it."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    request = getattr(getattr(shell, "kernel", None), "get_parent", dict)()
    return bool(request.get("content", {}).get("allow_stdin"))


def formatted(shown, draw: Callable) -> tuple[dict, dict]:
    """Return what Jupyter would show of an object, by type, and its metadata; text stays text."""
    if isinstance(shown, str):
        return {"text/plain": shown}, {}
    from IPython.core.formatters import DisplayFormatter
    data, about = DisplayFormatter().format(shown)
    if "image/png" in data:
        data["image/png"] = base64.b64encode(data["image/png"]).decode()
        alt = (draw.__doc__ or draw.__name__).strip().splitlines()[0]
        about["image/png"] = {"alt": alt} | about.get("image/png", {})
    return data, about


def output(shown, draw: Callable) -> dict:
    """Return an object as an output of a notebook."""
    data, about = formatted(shown, draw)
    return {"output_type": "display_data", "data": data, "metadata": about}
