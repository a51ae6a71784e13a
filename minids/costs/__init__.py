"""Costs: parameters, FLOPs, cache, memory and the bill of a model, by arithmetic alone.

Nothing is built and torch is not imported, so the 671B model is counted in a blink on any machine.
`python -m minids.costs` prints everything as one table.
"""

from minids.costs.parameters import count_parameters

__all__ = ["count_parameters"]
