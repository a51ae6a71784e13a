"""In which precision a product runs. Only bodies ask: plain definitions follow their inputs."""

import contextlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None  # comes with torch's CUDA build; imported where it runs
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then kernels run on a CPU, for tests


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a product with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide(x: Tensor) -> torch.dtype:
    """Return FP32, or x's own type if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context for FP32 work on x: entering autocast costs a decoding step 3 percent."""
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def plain_inference(x: Tensor) -> bool:
    """Return whether this is decoding, where x meets a CPU's products in its own type.

    Only inference mode counts: without gradients alone, a forward pass gives the bits of training.
    """
    return (not torch.is_grad_enabled()  # which a compiler understands; training ends here
            and torch.is_inference_mode_enabled() and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu"))
