"""Where the milliseconds of a training step and of a decoding step go, by kind of kernel.

A step is timed without the profiler; the profiler's times of all kernels are then added up by kind,
recognised by their names. On a GPU the rest of the step is time in which the card waits. The
measurements are kept in a JSON file under a label, so that "before" and "after" share a figure that
any machine can draw.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from minids.base.fields import demand
from minids.base.files import read_json, write_json
from minids.infer.generation import generate
from minids.lab.bench_alone import seconds_per_step, trainer
from minids.lab.bench_setup import WARM_UP, Bench
from minids.model.transformer import Transformer
from minids.plots.speed import IDLE, STEPS, idle, profile_figure

PROFILED = {"training": 3, "decoding": 16}  # steps
# The first pattern that a kernel's name holds decides; the last takes what is left.
# What is called .._kernel alone is ours; a compiler's own name lists all that it has fused.
FUSED = r"^triton_(poi|red|per)_"
KINDS = {
    "grouped products": r"group(ed|problem)|_grouped_mm|^(up|down)_kernel",
    "attention": r"cudnn|flash|fmha|sdpa|attention|attn|^(prepare|attend|merge)_kernel",
    "products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|::(mm|bmm|addmm|baddbmm|linear)\b|splitk",
    "optimizer": r"adam|multi_tensor|foreach|lerp|^(look_ahead|move)_kernel",
    "cross-entropy": r"softmax|nll|entropy|^loss_and_gradient_kernel",
    "routing": r"sort|topk|gather|scatter|index|radix|scan|cumsum|embedding|"
               r"^(sum_slots|gate|choose|list|combine|sums|gradient)_kernel",
    "copies and casts": r"memcpy|memset|copy|cat|fill|zero",
    "norms and elementwise": r"",
}
ANNOTATION = re.compile(r"^[\w.]+#[\w.]+$|^ProfilerStep")  # a stretch of time with kernels in it


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel, or of an operation on a CPU, by its name."""
    if re.search(FUSED, kernel):
        return [*KINDS][-1]
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.I))


def by_kind(done: profile, steps: int) -> dict[str, float]:
    """Return milliseconds per step by kind: of the GPU's kernels, or of a CPU's operations."""
    taken = Counter()
    events = [e for e in done.events() if not ANNOTATION.search(e.name)]
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    for event in kernels:
        taken[kind_of(event.name)] += event.time_range.elapsed_us()
    for event in events if not kernels else []:
        taken[kind_of(event.name)] += event.self_cpu_time_total
    return {kind: round(taken[kind] / steps / 1e3, 4) for kind in KINDS if taken[kind]}


def fitted(kinds: dict[str, float], ms: float) -> dict[str, float]:
    """Return times by kind, in proportion no longer than their step: kernels may run side by side,
    and one that is launched early begins by waiting."""
    share = min(1.0, ms / max(sum(kinds.values()), ms))
    return {kind: round(taken * share, 4) for kind, taken in kinds.items()}


def activities(device: str) -> list[ProfilerActivity]:
    """Return what to watch: the GPU's kernels, or a CPU's operations."""
    return [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]


def training_profile(bench: Bench) -> dict:
    """Profile steps of the program `train`; milliseconds per step, all and by kind."""
    s = bench.settings
    program = trainer(s.command, s.device)
    ends = []
    for _ in range(1 + WARM_UP + PROFILED["training"]):
        program.train_step()
        ends.append(program.seconds)
    taken = statistics.median(b - a for a, b in pairwise(ends[WARM_UP:]))
    with profile(activities=activities(s.device)) as done:
        for _ in range(PROFILED["training"]):
            program.train_step()
    return dict(what=s.command or "train", ms=round(1e3 * taken, 3),
                kinds=fitted(by_kind(done, PROFILED["training"]), 1e3 * taken))


def decoding_profile(bench: Bench) -> dict:
    """Profile steps of `generate` at batch 1; milliseconds per step, all and by kind."""
    s, model = bench.settings, bench.decoder()
    prompts, steps = bench.prompts(1), PROFILED["decoding"]
    generate(model, prompts, 2 * steps)  # warms up
    taken = seconds_per_step(model, prompts, 2 * steps)
    done = profiled_steps(model, prompts, steps, activities(s.device))
    return dict(what=f"{s.preset}, batch 1, {s.prompt} tokens before", ms=round(1e3 * taken, 3),
                kinds=fitted(by_kind(done, steps), 1e3 * taken))


def profiled_steps(model: Transformer, prompts: list[list[int]], steps: int, watched: list,
                   make: Callable = profile) -> profile:
    """Return the profile of the last `steps` steps of a generation twice as long."""
    done, seen = make(activities=watched), []

    def on_token(row: int, token: int) -> None:
        seen.append(token)
        if len(seen) == steps:
            done.start()
        if len(seen) == 2 * steps:
            done.stop()
    generate(model, prompts, 2 * steps, on_token=on_token)
    return done


def profile_table(bench: Bench) -> Iterator[list[str]]:
    """Measure if there is a label, keep it, draw the figure; a row for each kind of kernel."""
    s = bench.settings
    file = Path(s.record) if s.record else None
    kept = read_json(file) if file and file.is_file() else {}
    if s.label:
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
        card = torch.cuda.get_device_name() if s.device == "cuda" else "CPU"
        where = f"{card}, torch {version('torch').split('+')[0]}"
        kept[s.label] = dict(where=where, training=training_profile(bench),
                             decoding=decoding_profile(bench))
        if file:
            write_json(file, kept)
    demand("record", s.record, bool(kept), "a file with measurements, unless --label adds one")
    if file:
        profile_figure(kept, file.with_suffix(".png"))
    yield ["ms per step", *(f"{step}, {label}" for step in STEPS for label in kept)]
    columns = [kept[label][step] for step in STEPS for label in kept]
    yield ["in all", *(f"{column['ms']:.2f}" for column in columns)]
    for kind in KINDS:
        yield [kind, *(f"{column['kinds'].get(kind, 0):.2f}" for column in columns)]
    yield [IDLE, *(f"{idle(column):.2f}" for column in columns)]
