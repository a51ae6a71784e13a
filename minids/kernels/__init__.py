"""Faster bodies of the model's functions, on CPU and GPU, and the registry that picks them.

A body computes what a plain definition in `minids.model` computes, in less time or less memory. It
states for which arguments it runs; `registry` says how it is found, named and switched off.
"""
