"""The machine's measured peaks, and how close each body of a kernel comes to them.

The calls are those of one training step and of one decoding step of the model, with the text's own
tokens: for each body the largest call, its arguments copied several times, so that no timing finds
them in a cache. A call cannot be faster than its floor, the larger of two times: its FLOPs at the
peak of a large product, its bytes (arguments read once, results written once) at the rate of a
large copy. A body's share is the floor over the time it takes. The backward pass reads arguments and
the result's gradient and writes the arguments' gradients; it costs twice the FLOPs.

(Williams, Waterman and Patterson, "Roofline", 2009.)
"""

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minids.infer.decoding import new_cache, next_token, prefill
from minids.kernels.registry import REGISTRY, recorded
from minids.lab.bench_setup import Bench, minids_loss

SIDE = {"cuda": 8192, "cpu": 1024}  # of the square product whose rate is the peak
COPIED = {"cuda": 2 ** 30, "cpu": 2 ** 26}  # bytes of the copy
CACHES = {"cuda": 2 ** 28, "cpu": 2 ** 26}  # bytes of arguments that no cache holds
MOST_COPIES = 32
ROUNDS = {"cuda": 15, "cpu": 3}
SPIN = 2_000_000  # clock cycles that a GPU waits, a millisecond: the queue is full when it begins
# A body's result beside the plain one, relative to its length: BF16 rounds to 2^-9, FP32 to 2^-24.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class Peaks(NamedTuple):
    """What the machine can do: FLOP/s by precision, and bytes read or written per second."""

    flops: dict
    bytes_per_second: float


def seconds_per_call(work: Callable, inputs: list[tuple], device: str) -> float:
    """Return the median time of a call, seconds; each round calls it once on each of `inputs`."""
    def on_cpu() -> float:
        start = time.perf_counter()
        for arguments in inputs:
            work(*arguments)
        return time.perf_counter() - start

    def on_gpu() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN)
        begin.record()
        for arguments in inputs:
            work(*arguments)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    once = on_gpu if device == "cuda" else on_cpu
    once()  # warms up
    return statistics.median(once() for _ in range(ROUNDS[device])) / len(inputs)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large product of random matrices."""
    side = SIDE[device]
    pairs = [tuple(torch.randn(side, side, device=device).to(dtype) for _ in range(2))
             for _ in range(2)]
    return 2 * side ** 3 / seconds_per_call(torch.matmul, pairs, device)


def fp8_rate() -> float:
    """Return the FLOP/s of a large product of E4M3 numbers, one scale per tensor; 0: not there."""
    side, one = SIDE["cuda"], torch.ones((), device="cuda")

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
    try:
        pairs = [tuple(torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn)
                       for _ in range(2)) for _ in range(2)]
        return 2 * side ** 3 / seconds_per_call(product, pairs, "cuda")
    except RuntimeError:  # a card without such units
        return 0.0


@functools.cache
def measure_peaks(device: str) -> Peaks:
    """Return the measured peaks of products and of a copy, bytes read and written counted."""
    flops = {dtype: product_rate(device, dtype) for dtype in TOLERANCE}
    count = COPIED[device] // 4
    pairs = [(torch.randn(count, device=device), torch.empty(count, device=device))
             for _ in range(2)]
    taken = seconds_per_call(lambda source, target: target.copy_(source), pairs, device)
    return Peaks(flops, 8 * count / taken)


@dataclass
class Call:
    """One call of a registered function, as the model made it."""

    name: str
    body: Callable
    arguments: dict

    def tensors(self) -> dict[str, Tensor]:
        """Return the arguments that are tensors, by name."""
        return {name: t for name, t in self.arguments.items() if isinstance(t, Tensor)}

    def copy(self) -> tuple:
        """Return the arguments, tensors copied, for gradients of their own."""
        return tuple(t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor)
                     else t for t in self.arguments.values())

    def read(self) -> float:
        """Return the bytes of the arguments; of stacked experts those that have rows count."""
        tensors = self.tensors()
        size = {name: t.nbytes for name, t in tensors.items()}
        if self.name == "moe.grouped_linear":
            size["weight"] *= (tensors["counts"] > 0).double().mean().item()
        return sum(size.values())

    def flops(self) -> float:
        """Return the FLOPs of its products; 0 for functions that only pass over memory."""
        return FLOPS.get(self.name, lambda **_: 0)(**self.arguments)


def attention_flops(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> float:
    """Count the pairs that a causal mask, or another, lets a query see."""
    queries, keys = q.size(1), k.size(1)
    seen = queries * keys - queries * (queries - 1) / 2  # of one sequence
    if visible is not None:
        seen = visible.sum().item() / len(visible)
    return 2 * len(q) * q.size(2) * seen * (k.size(-1) + v.size(-1))


FLOPS = {  # by the function's own arguments
    "layers.linear": lambda x, weight: 2 * x.numel() * len(weight),
    "mla.attention": attention_flops,
    "mla.latent_attention": lambda q, latent, rank, visible, scale:
        2 * q[..., 0].numel() * latent.size(1) * (latent.size(-1) + rank),
    "moe.grouped_linear": lambda x, weight, counts: 2 * counts.sum().item() * weight[0].numel(),
    "objective.linear_cross_entropy": lambda x, weight, targets, count:
        2 * x.numel() * len(weight)}
SENSIBLE = {"moe.grouped_linear": lambda out, counts, **_: out[:counts.sum()]}  # of the result


def largest_calls(work: Callable[[], object], device: str) -> list[Call]:
    """Return the largest call of each function and body that `work` makes.

    Functions of modules, such as a whole block, are made of the others and left out.
    """
    found: dict[tuple, Call] = {}

    def watch(name: str, chosen: Callable, given: tuple, named: dict) -> None:
        bound = inspect.signature(REGISTRY[name].plain).bind(*given, **named)
        call = Call(name, chosen, bound.arguments)
        if any(isinstance(a, torch.nn.Module) for a in call.arguments.values()):
            return
        key = name, chosen.__name__
        if key not in found or call.read() > found[key].read():
            found[key] = call

    with recorded(watch):
        work()
    return sorted(found.values(), key=lambda call: call.name)


def body_row(call: Call, device: str, learns: bool) -> list[str]:
    """Return the table's cells for a call: times, rates and shares of the floor.

    Raises AssertionError if body and plain definition do not give the same.
    """
    function, peaks = REGISTRY[call.name], measure_peaks(device)
    copies = max(2, min(MOST_COPIES, int(CACHES[device] / call.read()) + 1))
    inputs = [call.copy() for _ in range(copies)]
    out = call.body(*inputs[0])
    require_equal(call, out, function.plain(*inputs[0]))
    dtype = next((t.dtype for t in call.tensors().values() if t.dtype in peaks.flops), None)
    peak, plain = peaks.flops.get(dtype, float("inf")), call.body is function.plain

    def cells(taken: float, flops: float, moved: float) -> list[str]:
        by_flops, by_bytes = flops / peak, moved / peaks.bytes_per_second
        bound = "products" if by_flops > by_bytes else "memory"
        return [f"{1e3 * taken:.4f}", f"{flops / taken / 1e12:.1f}",
                f"{moved / taken / 1e9:,.0f}", bound, f"{max(by_flops, by_bytes) / taken:.0%}"]

    moved, flops = call.read() + out.nbytes, call.flops()
    shapes = " ".join("x".join(map(str, t.shape)) for t in list(call.tensors().values())[:2])
    head = [f"{call.name}, {'plain' if plain else call.body.__name__}", shapes]
    leaves = [name for name, t in call.tensors().items() if t.requires_grad]
    at = [list(call.arguments).index(name) for name in leaves]
    if not (learns and leaves and out.requires_grad):
        return [*head, *cells(seconds_per_call(call.body, inputs, device), flops, moved)]
    grad = torch.randn_like(out)

    def both(*arguments) -> tuple:
        return torch.autograd.grad(call.body(*arguments), [arguments[i] for i in at], grad)
    more = grad.nbytes + 2 * sum(call.arguments[name].nbytes for name in leaves)
    return [*head, *cells(seconds_per_call(both, inputs, device), 3 * flops, moved + more)]


def require_equal(call: Call, ours: Tensor, plain: Tensor) -> None:
    """Stop unless both results agree within `TOLERANCE`."""
    cut = SENSIBLE.get(call.name, lambda out, **_: out)
    a, b = (cut(t.detach().double(), **call.arguments) for t in (ours, plain))
    gap = ((a - b).norm() / b.norm()).item()
    limit = max(TOLERANCE.get(t.dtype, 0) for t in (ours, plain, *call.tensors().values()))
    assert gap <= limit, f"{call.name}, {call.body.__name__}: {gap:.1e} from the plain definition"


def few_layers(bench: Bench) -> int:
    """Return how many layers hold one of each kind."""
    return min(bench.args.n_layers, bench.args.n_dense_layers + 1)


def training_calls(bench: Bench) -> list[Call]:
    """Return the largest calls of one training step's forward pass."""
    model = bench.decoder(n_layers=few_layers(bench)).train().requires_grad_(True)
    [batch] = bench.batches(1)
    return largest_calls(lambda: minids_loss(model, *batch), bench.settings.device)


def decoding_calls(bench: Bench, batch: int) -> list[Call]:
    """Return the largest calls of one decoding step after a prompt."""
    model, s = bench.decoder(n_layers=few_layers(bench)), bench.settings
    text = torch.tensor(bench.prompts(batch), device=s.device)
    lengths = torch.full((batch,), s.prompt, device=s.device)
    with torch.inference_mode():
        cache = new_cache(model, batch, s.prompt + 2)
        prefill(model, cache, text, lengths)
        return largest_calls(lambda: next_token(model, cache, text[:, 0]), s.device)


def roofline_table(bench: Bench) -> Iterator[list[str]]:
    """Measure the peaks, then each body's share of them."""
    s, peaks = bench.settings, measure_peaks(bench.settings.device)
    yield ["body", "shapes", "ms", "TFLOP/s", "GB/s", "bound", "share"]
    for dtype, rate in peaks.flops.items():
        side = SIDE[s.device]
        name = str(dtype).removeprefix("torch.")
        yield [f"peak: product, {name}", f"{side}x{side}", f"{2e3 * side ** 3 / rate:.4f}",
               f"{rate / 1e12:.1f}", "", "", ""]
    if s.device == "cuda" and (rate := fp8_rate()):
        side = SIDE["cuda"]
        yield ["peak: scaled_mm, E4M3", f"{side}x{side}", f"{2e3 * side ** 3 / rate:.4f}",
               f"{rate / 1e12:.1f}", "", "", ""]
    count = COPIED[s.device] // 4
    yield ["peak: copy", f"{count}", f"{8e3 * count / peaks.bytes_per_second:.4f}", "",
           f"{peaks.bytes_per_second / 1e9:,.0f}", "", ""]
    works = {"training": (functools.partial(training_calls, bench), True)}
    for batch in sorted({1, s.decode_batch}):
        works[f"decoding, batch {batch}"] = functools.partial(decoding_calls, bench, batch), False
    for title, (calls, learns) in works.items():
        yield [title, *[""] * 6]
        for call in calls():
            with torch.inference_mode(not learns):
                row = body_row(call, s.device, learns)
            yield row
