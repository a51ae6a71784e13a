"""Costs: parameters, FLOPs, cache, memory and the bill of a model, by arithmetic alone.

Nothing is built and torch is not imported, so the 671B model is counted in a blink on any machine.
Throughout, `args` is the configuration of the model to count, a `ModelArgs`.
`python -m minids.costs` prints everything as one table.
"""

from minids.costs.bill import (
    R1_GPU_HOURS,
    SERVING_128K,
    V3_GPU_HOURS,
    Rental,
    api_price,
    choose_sharding,
    plan,
    training_bill,
)
from minids.costs.decoding import cache_bytes_per_token, drafting
from minids.costs.flops import attention_flops, flops_per_token, pair_flops
from minids.costs.parameters import count_parameters

__all__ = ["R1_GPU_HOURS", "Rental", "SERVING_128K", "V3_GPU_HOURS", "api_price",
           "attention_flops", "cache_bytes_per_token", "choose_sharding", "count_parameters",
           "drafting", "flops_per_token", "pair_flops", "plan", "training_bill"]
