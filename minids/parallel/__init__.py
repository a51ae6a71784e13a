"""Training on many ranks: layouts, sharding, experts apart, pipelines. Applied from outside.

Choose sums, never averages: each rank divides its loss by the number of ranks and micro-batches
before it goes backward, and every reduction adds. So gradients, loads and logged losses of any
layout are those of one process.
"""
