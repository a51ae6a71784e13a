"""In which precision a product runs. Only bodies ask: plain definitions follow their inputs."""

import contextlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from minids.kernels.fp8_layout import in_gluon

TRITON = find_spec("triton") is not None  # comes with torch's CUDA build; imported where it runs
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then kernels run on a CPU, for tests
HOPPER = 9, 0  # compute capability
LOG2_E = 1.4426950408889634  # kernels have exp2


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a product with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def on_hopper(*tensors: Tensor) -> bool:
    """Return whether kernels in Triton that fill a Hopper's shared memory take these tensors."""
    kinds, first = (torch.bfloat16, torch.float16, torch.float32), tensors[0]
    return TRITON and all(compute_dtype(t) in kinds for t in tensors) and (INTERPRETED or (
        first.device.type == "cuda" and torch.cuda.get_device_capability(first.device) >= HOPPER))


def gluon_attends(q: Tensor, rank: int, rows: int) -> bool:
    """Return whether attention to latents has a kernel for Hopper: of its widths, for many rows."""
    return (in_gluon(q) and q.element_size() == 2 and rank in (256, 512)
            and q.size(-1) - rank in (32, 64) and rows > 32)


def in_fp32(*tensors: Tensor) -> bool:
    """Return whether kernels in Triton that compute in FP32 take tensors: on a GPU, none wider."""
    return TRITON and all(t.is_cuda and t.dtype != torch.float64 for t in tensors)


def in_triton(x: Tensor) -> str:
    """Return how a kernel computes products of x: FP32 as it is, without rounding to TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


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
