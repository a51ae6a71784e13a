"""Every figure of the programs and the notebooks, in one style.

A figure function takes plain data and returns the figure. Given a `path` it also writes a PNG file
there, making the folder if need be. A notebook shows a figure by ending a cell with it. matplotlib
is imported when a figure is drawn.
"""

from minids.plots.counts import bill_figure, compression_curve, curves, parameter_map
from minids.plots.model import (
    balance_figure,
    dsa_figure,
    fp8_figure,
    moe_figure,
    mtp_figure,
    yarn_figure,
)
from minids.plots.runs import ablation_figure, cold_start_figure, grpo_figure, loss_curve

__all__ = ["ablation_figure", "balance_figure", "bill_figure", "cold_start_figure",
           "compression_curve", "curves", "dsa_figure", "fp8_figure", "grpo_figure", "loss_curve",
           "moe_figure", "mtp_figure", "parameter_map", "yarn_figure"]
