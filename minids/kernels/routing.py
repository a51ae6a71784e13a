"""The gate's choice, and the loss that balances it, as kernels in Triton on a GPU."""

import torch
from torch import Tensor

from minids.kernels.precision import TRITON
from minids.kernels.registry import body


def takes_rows(scores: Tensor) -> bool:
    """Return whether scores are on a GPU, in the type in which the gate computes them."""
    return TRITON and scores.device.type == "cuda" and scores.dtype == torch.float32


@body(lambda gate, scores: takes_rows(scores))
def choose_in_one_kernel(gate, scores: Tensor) -> Tensor:
    """Run `Gate.choose`: bias, groups and the largest few of each row."""
    from minids.kernels import triton_routing
    args = gate.args
    return triton_routing.choose(scores, gate.bias, args.n_activated_experts,
                                 args.n_expert_groups, args.n_limited_groups)


@body(lambda routing, args: takes_rows(routing.scores))
def balance_in_one_pass(routing, args) -> Tensor:
    """Run `sequence_balance_loss`."""
    from minids.kernels import triton_balance
    return triton_balance.Balance.apply(routing.scores, args.n_activated_experts)
