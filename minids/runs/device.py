"""Choose device, precision of products and threads; measure and check memory."""

import ctypes
import os
import platform
import sys
from dataclasses import dataclass

import torch

from minids.base.fields import Settings, demand, nearest, option
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.kernels.registry import use
from minids.runs.threads import quota
from minids.runs.waiting import watch_waiting


@dataclass(frozen=True)
class Machine(Settings):
    """Device, CPU threads and bodies, which every program that runs a model has."""

    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice, one per core", low=0, high=1024)
    bodies: str = option("auto", "the fastest bodies, or off: plain definitions", ("auto", "off"))

    def prepare(self) -> torch.device:
        """Set threads and bodies, and return the device."""
        prepare_cpu(self.threads, self.bodies)
        return pick_device(self.device)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {name!r} is not valid: {nearest(name, ['cpu', 'cuda', 'auto'])}"
                         "valid are auto, cpu and cuda")
    if name == "cuda" and not has_gpu:
        raise ValueError("device = 'cuda' is not valid: torch sees no GPU here; use --device cpu, "
                         "or install the CUDA build of torch")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of products; "auto" is BF16 where the hardware multiplies it."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if able else torch.float32


def prepare_cpu(threads: int, bodies: str = "auto") -> None:
    """Tune the allocator, set torch's threads (0: one per core it may use) and how they wait, and
    which bodies run.

    By default glibc returns every large block to the kernel and fetches it again, zeroed, for the
    next tensor: 1.05 to 1.5 times the time of a step, measured on two cores.
    """
    use(bodies)
    most = 4 * (os.cpu_count() or 1)  # more wait for each other; very many end the process
    demand("threads", threads, 0 <= threads <= most, f"between 0 and {most}, four per core here")
    torch.set_num_threads(threads or min(torch.get_num_threads(), quota() or sys.maxsize))
    watch_waiting()
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for name, value in ((-4, 0), (-1, 1 << 30), (-2, 1 << 26)):  # of <malloc.h>:
            libc.mallopt(name, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def memory_mib(device: torch.device) -> int:
    """Return the peak memory so far, MiB: the GPU's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    import resource  # Windows has none
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def check_memory(args: ModelArgs, device: torch.device) -> None:
    """Refuse a model too large to train here, before torch runs out of memory halfway."""
    count = count_parameters(args)
    parameters = count.total + count.mtp
    needed = 16 * parameters  # weight, gradient and two moments, FP32
    here = (torch.cuda.mem_get_info(device)[1] if device.type == "cuda"
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > here:
        raise ValueError(f"a model of {parameters:,} parameters does not fit: weights, gradients "
                         f"and optimizer take {needed / 2**30:,.0f} GiB, and {device} has "
                         f"{here / 2**30:,.0f}; take a smaller preset or fewer layers")
