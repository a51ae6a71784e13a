"""Draw the whole model, or one of its parts in its place, for light and for dark pages.

    python -m minids.plots                                      # rewrites the README's drawing
    python -m minids.plots --preset tiny --where mla --out my_drawings

Writes model.png and model_dark.png.
"""

from dataclasses import dataclass
from pathlib import Path

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option
from minids.config import ModelArgs
from minids.plots.drawn_model import PARTS, model_drawing


@dataclass(frozen=True)
class DrawingArgs(Settings):
    """A drawing of a model"""

    preset: str = option("v3", "the model", tuple(ModelArgs.presets()))
    where: str = option("", "part to highlight; empty colours all of them", tuple(PARTS))
    out: str = option("figures", "folder to write", folder=True)


def main() -> None:
    (given,) = parse("minids.plots", __doc__, DrawingArgs)
    settings = DrawingArgs(**given)
    args = ModelArgs.preset(settings.preset)
    for name, dark in [("model.png", False), ("model_dark.png", True)]:
        path = Path(settings.out) / name
        figure = model_drawing(args, settings.where, dark, path)
        print(path)
    print(figure.get_label())


if __name__ == "__main__":
    run_program("minids.plots", main)
