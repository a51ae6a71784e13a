"""The machine's measured peaks, and how close each body of a kernel comes to them.

The calls are those of one training step and of one decoding step of the model, with the text's own
tokens: for each body the largest call, its arguments copied several times, so that no timing finds
them in a cache. A call cannot be faster than its floor, the larger of two times: its FLOPs at the
peak of a large product, its bytes (arguments read once, results written once) at the rate of a
large copy. A body's share is the floor over the time it takes. Training's times are of forward and
backward together: the latter reads the arguments and the result's gradient, writes the arguments'
gradients, and costs twice the FLOPs. Nothing here is compiled, each body stands alone, and all
but those of whole blocks are compared with their plain definitions first.

(Williams, Waterman and Patterson, "Roofline", 2009.)
"""

import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minids.infer.decoding import Session
from minids.kernels.registry import REGISTRY, recorded
from minids.lab.bench_decoding import count_flops
from minids.lab.bench_setup import Bench, minids_loss

SIDE = {"cuda": 8192, "cpu": 1024}  # of the square product whose rate is the peak
COPIED = {"cuda": 2 ** 30, "cpu": 2 ** 26}  # bytes of the copy
CACHES = {"cuda": 2 ** 28, "cpu": 2 ** 26}  # bytes of arguments that no cache holds
MOST_COPIES = 32
BLOCK, BLOCKS = "transformer.Block.forward", 7  # no cache holds the weights of 7 blocks
ROUNDS = {"cuda": 15, "cpu": 3}
CLOCK = 2e9  # a GPU's cycles per second, at most
# A body's result beside the plain one, relative to its length: BF16 rounds to 2^-9, FP32 to 2^-24.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class Peaks(NamedTuple):
    """The measured peaks of a machine: FLOP/s by precision; bytes read or written per second."""

    flops: dict
    bytes_per_second: float


def seconds_per_call(work: Callable, inputs: list[tuple], device: str) -> float:
    """Return the median time of a call, seconds; each round calls it once on each of `inputs`."""
    def launched() -> float:
        start = time.perf_counter()
        for arguments in inputs:
            work(*arguments)
        return time.perf_counter() - start

    def on_gpu() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(wait)  # until the queue is full, or launching would be timed
        begin.record()
        launched()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    launched()  # warms up
    if device == "cuda":
        torch.cuda.synchronize()
    wait = int(CLOCK * (2 * launched() + 1e-4))
    once = on_gpu if device == "cuda" else launched
    return statistics.median(once() for _ in range(ROUNDS[device])) / len(inputs)


def product_rate(device: str, dtype: torch.dtype, product: Callable = torch.matmul) -> float:
    """Return the FLOP/s of a large product of random matrices."""
    side = SIDE[device]
    pairs = [tuple(torch.randn(side, side, device=device).to(dtype) for _ in range(2))
             for _ in range(2)]
    return 2 * side ** 3 / seconds_per_call(product, pairs, device)


def fp8_rate() -> float:
    """Return the FLOP/s of a large product of E4M3 numbers, one scale per tensor; 0: not there."""
    one = torch.ones((), device="cuda")

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
    try:
        return product_rate("cuda", torch.float8_e4m3fn, product)
    except RuntimeError:  # a card without such units
        return 0.0


def copy_rate(device: str) -> float:
    """Return the bytes per second of a large copy, read and written counted."""
    count = COPIED[device] // 4
    pairs = [(torch.randn(count, device=device), torch.empty(count, device=device))
             for _ in range(2)]
    taken = seconds_per_call(lambda source, target: target.copy_(source), pairs, device)
    return 8 * count / taken


@functools.cache
def measure_peaks(device: str) -> Peaks:
    """Return the measured peaks of products and of a copy."""
    return Peaks({dtype: product_rate(device, dtype) for dtype in TOLERANCE}, copy_rate(device))


@dataclass
class Call:
    """One call of a registered function, as the model made it."""

    name: str
    body: Callable
    arguments: dict

    def copy(self) -> tuple:
        """Return the arguments, tensors copied, for gradients of their own."""
        return tuple(copied(argument) for argument in self.arguments.values())

    def read(self) -> float:
        """Return the bytes of the arguments; of stacked experts those that have rows count."""
        size = sum(t.nbytes for t in tensors_in(tuple(self.arguments.values())))
        if self.name == "moe.grouped_linear":
            without = (self.arguments["counts"] == 0).double().mean().item()
            size -= without * self.arguments["weight"].nbytes
        return size


def tensors_in(value) -> list[Tensor]:
    """Return the tensors in an argument or a result, which may be a tuple of them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, tuple) else []


def copied(value):
    """Return an argument with its tensors copied, for gradients of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if not isinstance(value, tuple):
        return value
    parts = map(copied, value)
    return type(value)._make(parts) if hasattr(value, "_make") else tuple(parts)


def attention_flops(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> float:
    """Count the pairs that a causal mask, or another, lets a query see."""
    queries, keys = q.size(1), k.size(1)
    seen = queries * keys - queries * (queries - 1) / 2  # of one sequence
    if visible is not None:
        seen = visible.sum().item() / len(visible)
    return 2 * len(q) * q.size(2) * seen * (k.size(-1) + v.size(-1))


SENSIBLE = {"moe.grouped_linear": lambda out, counts, **_: out[:counts.sum()]}  # of the result


def largest_calls(work: Callable[[], object]) -> tuple[list[Call], list[Call]]:
    """Return the largest call of each function and body that `work` makes, and blocks' calls.

    Functions of modules consist of the others and are left out, except bodies of a whole block.
    """
    found: dict[tuple, Call] = {}
    blocks: list[Call] = []

    def watch(name: str, chosen: Callable, given: tuple, named: dict) -> None:
        bound = inspect.signature(REGISTRY[name].plain).bind(*given, **named)
        call = Call(name, chosen, bound.arguments)
        if not tensors_in(tuple(call.arguments.values())):
            return
        if any(isinstance(a, torch.nn.Module) for a in call.arguments.values()):
            whole = name == BLOCK and chosen is not REGISTRY[name].plain
            return blocks.append(call) if whole and call.arguments["self"].is_moe else None
        key = name, chosen.__name__
        if key not in found or call.read() > found[key].read():
            found[key] = call

    with recorded(watch):
        work()
    return sorted(found.values(), key=lambda call: call.name), blocks


def body_row(call: Call, device: str, learns: bool) -> list[str]:
    """Return the table's cells for a call: times, rates and shares of the floor.

    Raises AssertionError if body and plain definition do not give the same.
    """
    function, peaks = REGISTRY[call.name], measure_peaks(device)
    copies = max(2, min(MOST_COPIES, int(CACHES[device] / call.read()) + 1))
    inputs, plain = [call.copy() for _ in range(copies)], []
    out = call.body(*inputs[0])
    flops = count_flops(lambda: plain.append(function.plain(*inputs[0])))
    if call.name == "mla.attention":
        flops = attention_flops(*inputs[0])
    require_equal(call, out, plain[0])
    moved, work, rounds = call.read() + sum(t.nbytes for t in tensors_in(out)), call.body, 1
    given = tensors_in(inputs[0])
    leaves = [i for i, t in enumerate(given) if t.requires_grad]
    if learns and leaves and isinstance(out, Tensor) and out.requires_grad:
        grad, rounds = torch.randn_like(out), 3
        moved += grad.nbytes + 2 * sum(given[i].nbytes for i in leaves)

        def work(*arguments) -> tuple:
            found = tensors_in(arguments)
            return torch.autograd.grad(call.body(*arguments), [found[i] for i in leaves], grad)
    taken = seconds_per_call(work, inputs, device)
    dtype = next((t.dtype for t in given if t.dtype in peaks.flops), None)
    by_flops = rounds * flops / peaks.flops.get(dtype, math.inf)
    by_bytes = moved / peaks.bytes_per_second
    shapes = " ".join("x".join(map(str, t.shape)) for t in given[:2])
    ran = "plain" if call.body is function.plain else call.body.__name__
    return [f"{call.name}, {ran}", shapes, f"{1e3 * taken:.4f}",
            f"{rounds * flops / taken / 1e12:.1f}", f"{moved / taken / 1e9:,.0f}",
            "products" if by_flops > by_bytes else "memory",
            f"{max(by_flops, by_bytes) / taken:.0%}"]


def block_row(calls: list[Call], device: str) -> list[str]:
    """Return the table's cells for a body of a whole block with experts, one block after another.

    It reads the weights, of experts those that somebody visits as if tokens chose evenly, and the
    latents of the tokens before.
    """
    block, x, context = calls[0].arguments.values()
    args, tokens = block.ffn.args, x.size(0) * x.size(1)
    visited = 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** tokens
    moved = 2 * x.nbytes + context.cache.latents[0, :, :context.cache.length].nbytes
    moved += sum(p.nbytes * (visited if name.startswith("ffn.experts.") else 1)
                 for name, p in block.named_parameters())
    taken = seconds_per_call(calls[0].body, [tuple(c.arguments.values()) for c in calls], device)
    floor = moved / measure_peaks(device).bytes_per_second
    return [f"{BLOCK}, {calls[0].body.__name__}", "x".join(map(str, x.shape)),
            f"{1e3 * taken:.4f}", "", f"{moved / taken / 1e9:,.0f}", "memory",
            f"{floor / taken:.0%}"]


def require_equal(call: Call, ours, plain) -> None:
    """Stop unless both results agree within `TOLERANCE`."""
    cut, gap = SENSIBLE.get(call.name, lambda out, **_: out), 0.0
    given = tensors_in((ours, plain, *call.arguments.values()))
    limit = max(TOLERANCE.get(t.dtype, 0) for t in given)
    for pair in zip(tensors_in(ours), tensors_in(plain), strict=True):
        a, b = (cut(t.detach().double(), **call.arguments) for t in pair)
        gap = max(gap, ((a - b).norm() / b.norm().clamp(min=1e-30)).item())
    assert gap <= limit, f"{call.name}, {call.body.__name__}: {gap:.1e} from the plain definition"


def few_layers(bench: Bench, count: int) -> int:
    """Return how many layers to take to have `count` with experts among them, or all layers."""
    return min(bench.args.n_layers, bench.args.n_dense_layers + count)


def training_calls(bench: Bench) -> tuple[list[Call], list[Call]]:
    """Return the largest calls of one training step's forward pass."""
    model = bench.decoder(n_layers=few_layers(bench, 1)).train().requires_grad_(True)
    [batch] = bench.batches(1)
    return largest_calls(lambda: minids_loss(model, *batch))


def decoding_calls(bench: Bench, batch: int) -> tuple[list[Call], list[Call]]:
    """Return the largest calls of one decoding step after a prompt."""
    model, s = bench.decoder(n_layers=few_layers(bench, BLOCKS)), bench.settings
    text = torch.tensor(bench.prompts(batch), device=s.device)
    lengths = torch.full((batch,), s.prompt, device=s.device)
    with torch.inference_mode():
        session = Session(model, batch, s.prompt + 2)
        session.prefill(text, lengths)
        return largest_calls(lambda: session.next_token(text[:, 0], s.prompt))


def roofline_table(bench: Bench) -> Iterator[list[str]]:
    """Measure the peaks, then each body's share of them."""
    s, peaks = bench.settings, measure_peaks(bench.settings.device)
    yield ["body", "shapes", "ms", "TFLOP/s", "GB/s", "bound", "share"]
    rates = {f"product, {str(dtype).removeprefix('torch.')}": rate
             for dtype, rate in peaks.flops.items()}
    rates["scaled_mm, E4M3"] = fp8_rate() if s.device == "cuda" else 0
    side, count = SIDE[s.device], COPIED[s.device] // 4
    for name, rate in rates.items():
        if rate:
            yield [f"peak: {name}", f"{side}x{side}", f"{2e3 * side ** 3 / rate:.4f}",
                   f"{rate / 1e12:.1f}", "", "", ""]
    yield ["peak: copy", f"{count}", f"{8e3 * count / peaks.bytes_per_second:.4f}", "",
           f"{peaks.bytes_per_second / 1e9:,.0f}", "", ""]
    works = {"training": (functools.partial(training_calls, bench), True)}
    for batch in sorted({1, s.decode_batch}):
        works[f"decoding, batch {batch}"] = functools.partial(decoding_calls, bench, batch), False
    for title, (calls, learns) in works.items():
        yield [title, *[""] * 6]
        single, blocks = calls()
        for call in single:
            with torch.inference_mode(not learns):
                try:
                    row = body_row(call, s.device, learns)
                except AssertionError as wrong:  # no time for what is not the same
                    row = [f"{call.name}, {call.body.__name__}", str(wrong), *[""] * 5]
            yield row
        if blocks:
            with torch.inference_mode():
                row = block_row(blocks, s.device)
            yield row
