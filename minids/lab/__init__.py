"""Experiments, benchmarks, the notebooks' helpers and the course: `python -m minids.lab.NAME`."""
