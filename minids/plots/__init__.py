"""Every figure of the programs and the notebooks, in one style.

A figure function takes plain data and returns the figure, which a notebook shows at a cell's end.
Given a `path` it also writes a PNG file there. matplotlib is imported when a figure is drawn.
"""
