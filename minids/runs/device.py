"""Choose device, precision of products and threads; measure and check memory."""

import os
import re
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minids.base.command_line import one_line, say_once
from minids.base.fields import Settings, demand, nearest, option
from minids.base.memory import keep_freed_memory
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.kernels.registry import use
from minids.runs.threads import quota
from minids.runs.waiting import watch_waiting

DEVICES = "auto", "cpu", "cuda", "mps"


@dataclass(frozen=True)
class Machine(Settings):
    """Device, CPU threads and bodies, which every program that runs a model has."""

    device: str = option("auto", "auto, cpu, cuda, or mps: Apple's GPU")
    threads: int = option(0, "CPU threads; 0: torch's choice, one per core", low=0, high=1024)
    bodies: str = option("auto", "the fastest bodies, or off: plain definitions", ("auto", "off"))

    def prepare(self) -> torch.device:
        """Set threads and bodies, and return the device."""
        prepare_cpu(self.threads, self.bodies)
        return pick_device(self.device)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a CUDA GPU if there is one, else the CPU.

    Apple's GPU is taken by its name alone: its path has run in simulation only.
    """
    if name not in DEVICES:
        raise ValueError(f"device = {name!r} is not valid: {nearest(name, DEVICES)}"
                         "valid are auto, cpu, cuda and mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device = 'mps' is not valid: torch sees no Apple GPU here; "
                         "use --device cpu")
    if name in ("cpu", "mps"):
        return torch.device(name)
    trouble = gpu_trouble()
    if trouble is None:
        return torch.device("cuda")
    if name == "cuda":
        raise ValueError("device = 'cuda' is not valid: " + (trouble or (
            "torch sees no GPU here; use --device cpu, or install the CUDA build of torch")))
    if trouble:
        say_once(f"on the CPU, because {trouble}")
    return torch.device("cpu")


def gpu_trouble() -> str | None:
    """Return why torch cannot use a CUDA GPU, "" if there is none; None if it can use one.

    torch says so in a warning, and then goes on as if there were no GPU.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    said = next((text for w in caught if "CUDA" in (text := str(w.message))), "")
    if found := re.search(r"too old \(found version (\d+)\)", said):
        driver = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
        return (f"the NVIDIA driver is too old for this torch: it runs CUDA {driver}, and this "
                f"torch is built for {torch.version.cuda}; update the driver, or install a torch "
                f"built for CUDA {driver} (pytorch.org/get-started/previous-versions)")
    return one_line(said.partition(". ")[0])


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of products, as named if the device has it.

    "auto" is BF16 where the hardware multiplies it, FP16 on older GPUs with tensor cores (7.0 and
    7.5: V100, T4), else FP32. torch also takes BF16 where it has to convert every number.
    """
    cuda = device.type == "cuda"
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and cuda and not bf16:
        raise ValueError(f"dtype = 'bf16' is not valid: {torch.cuda.get_device_name(device)} does "
                         "not multiply BF16; use --dtype auto, fp16 or fp32")
    if name == "fp16" and device.type == "mps":
        raise ValueError("dtype = 'fp16' is not valid on mps: its loss is not scaled there; use "
                         "--dtype fp32 or bf16")
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if cuda and not bf16:
        tensor_cores = torch.cuda.get_device_capability(device) >= (7, 0)
        return torch.float16 if tensor_cores else torch.float32
    bf16 = bf16 or device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                             or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if bf16 else torch.float32


def written_in(name: str, device: torch.device) -> partial:
    """Return a factory of autocast contexts for generating text. The type is that of `pick_dtype`,
    except that "auto" means FP32 without a CUDA GPU."""
    dtype = pick_dtype("fp32" if name == "auto" and device.type != "cuda" else name, device)
    return partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)


def prepare_cpu(threads: int, bodies: str = "auto") -> None:
    """Keep freed memory, set torch's threads (0: one per core it may use) and how they wait, and
    which bodies run.
    """
    use(bodies)
    most = 4 * (os.cpu_count() or 1)  # more wait for each other; very many end the process
    demand("threads", threads, 0 <= threads <= most, f"between 0 and {most}, four per core here")
    torch.set_num_threads(threads or min(torch.get_num_threads(), quota() or sys.maxsize))
    watch_waiting()
    keep_freed_memory()


def memory_mib(device: torch.device) -> int:
    """Return the peak memory so far, MiB: the GPU's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    if device.type == "mps":  # it counts no peak; what it has taken from Metal, it mostly keeps
        return torch.mps.driver_allocated_memory() >> 20
    import resource  # Windows has none
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def check_memory(args: ModelArgs, device: torch.device, each: int = 16, ranks: int = 1,
                 whole: bool = False) -> None:
    """Refuse a model too large to train here, before torch runs out of memory halfway.

    each: bytes per parameter; 16 are weight, gradient and two moments in FP32
    ranks: GPUs that share it; ranks on CPUs share the memory of one machine
    whole: whether each rank gathers all weights besides, in FP32, to write replies with
    """
    count = count_parameters(args)
    parameters = count.total + count.mtp
    needed = (each + 4 * ranks * whole) * parameters // (ranks if device.type == "cuda" else 1)
    here = (torch.cuda.mem_get_info(device)[1] if device.type == "cuda"
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > here:
        raise ValueError(f"a model of {parameters:,} parameters does not fit: weights"
                         f"{', gradients and optimizer' if each == 16 else ''}"
                         f"{', and all weights on each rank to write replies with,' * whole} take "
                         f"{needed / 2**30:,.0f} GiB, and {device} has "
                         f"{here / 2**30:,.0f}; take a smaller preset or fewer layers")


def fetched(values: dict) -> dict:
    """Return what `Learner.accumulate` does as numbers, with one transfer from the device."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    flat = [t for some in lists.values() for t in some if isinstance(t, Tensor)]
    numbers = iter(torch.stack([t.detach().double() for t in flat]).tolist() if flat else [])
    lists = {name: [next(numbers) if isinstance(t, Tensor) else t for t in some]
             for name, some in lists.items()}
    return {name: sum(v / len(some) for v in some) if len(some) > 1 else some[0]
            for name, some in lists.items()}
