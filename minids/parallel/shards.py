"""The part of a parameter that a rank holds.

A sharded parameter is a DTensor; it is known here by its placements, since importing its class
takes a second, which a program on one process does not have to wait for.
"""

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether other ranks hold parts, or copies, of a tensor."""
    return hasattr(tensor, "placements")


def own_part(parameter: Tensor) -> tuple[slice, ...]:
    """Return which part of the whole tensor this rank holds of a parameter, or of its gradient."""
    parts = [(0, size) for size in parameter.shape]
    if is_sharded(parameter):
        mesh = parameter.device_mesh
        # Experts are dealt to ranks first; then FSDP, whose dimensions come first, cuts each share.
        for dim, placement in reversed(list(enumerate(parameter.placements))):
            if (cut := getattr(placement, "dim", None)) is not None:
                start, end = parts[cut]
                size = -(-(end - start) // mesh.size(dim))
                first = min(start + mesh.get_local_rank(dim) * size, end)
                parts[cut] = first, min(first + size, end)
    return tuple(slice(*part) for part in parts)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def place(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole` into a sharded tensor."""
    local(tensor).copy_(whole[own_part(tensor)])
