"""FP8 beside BF16: rounding, a linear layer, and a layer of experts, forward and backward.

One layer of the preset stands alone, weights and gradients in BF16, on batch_size x seq_len tokens.
On a GPU experts are compiled on both sides, as training compiles them, and their copies are there
beforehand, as an optimizer step makes them: BF16's have w1 and w3 joined, FP8's are rounded in both
layouts; what this rounding takes has a row of its own, and so has each kernel that a step calls for
the experts' first matrices. Linear layers round their weights in each call. A share is of the
measured peak: of a large product in the same precision, or of a copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from minids.apply.fp8 import StepRounding, use_fp8_within
from minids.config import ModelArgs
from minids.fp8 import fp8_linear, quantize_activation
from minids.kernels.fp8 import multiply, multiply_over_tokens, run_on
from minids.kernels.fp8_layout import BLOCK, group_tiles
from minids.kernels.registry import using
from minids.lab.bench_setup import Bench
from minids.lab.roofline import fp8_rate, measure_peaks, seconds_per_call
from minids.model.layers import linear
from minids.model.moe import MoE

COPIES = 4  # of a small call's inputs, more than a cache holds


def one_layer(args: ModelArgs) -> ModelArgs:
    """Return settings whose parameters are about those of one layer with experts."""
    return replace(args, n_layers=1, n_dense_layers=0, n_mtp_layers=0)


def fp8_table(bench: Bench) -> Iterator[list[str]]:
    """Time the two precisions; whether they compute the same stands in the last column."""
    args, s = bench.args, bench.settings
    tokens = s.batch_size * s.seq_len
    yield ["FP8", "BF16 ms", "of its peak", "FP8 ms", "of its peak", "times as fast",
           "results apart"]
    yield rounding_row(tokens, args.dim, s.device)
    for shape in ((args.dim, args.moe_inter_dim), (args.moe_inter_dim, args.dim)):
        yield linear_row(tokens, *shape, s.device)
    layers, leaves = expert_layers(args, s.device)
    if run_on(torch.device(s.device)):
        copies = StepRounding(layers[1:])
        yield weights_row(copies, s.device)
        yield from kernel_rows(args, copies, tokens, s.device)
    yield experts_row(args, layers, leaves, s.batch_size, s.seq_len, s.device)


def drawn(*shape: int, device: str) -> Tensor:
    """Return standard normal numbers in BF16."""
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def rounding_row(tokens: int, width: int, device: str) -> list[str]:
    """Return the table's cells for rounding activations to tiles along their rows."""
    inputs = [(drawn(tokens, width, device=device),) for _ in range(COPIES)]
    mine = quantize_activation(*inputs[0])
    with using("off"):
        plain = quantize_activation(*inputs[0])
    same = all(torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
               for a, b in zip((mine[0], mine[1].contiguous()), plain, strict=True))
    taken = seconds_per_call(quantize_activation, inputs, device)
    moved = sum(t.nbytes for t in (*inputs[0], *mine))
    share = moved / measure_peaks(device).bytes_per_second / taken
    return [f"rounding {tokens} x {width}", "-", "-", f"{1e3 * taken:.3f}", f"{share:.0%}", "-",
            "0" if same else "not the same bits"]


def linear_row(tokens: int, width: int, height: int, device: str) -> list[str]:
    """Return the table's cells for a linear layer, forward and backward."""
    dy = drawn(tokens, height, device=device)
    inputs = [(drawn(tokens, width, device=device).requires_grad_(),
               drawn(height, width, device=device).requires_grad_()) for _ in range(COPIES)]
    works = [lambda x, w, product=product: passes(product(x, w), [x, w], dy)
             for product in (linear, fp8_linear)]
    return pair_row(f"linear {tokens} x {width} x {height}", works, inputs,
                    6 * tokens * width * height, device)


def weights_row(copies: StepRounding, device: str) -> list[str]:
    """Return the table's cells for rounding all weights of a layer to blocks, in both layouts."""
    taken = seconds_per_call(copies.refresh, [()], device)
    moved = sum(t.nbytes for weights, rounded in copies.pairs for t in (*weights, *rounded))
    floor = moved / measure_peaks(device).bytes_per_second
    return alone("rounding all weights of it", taken, floor)


def kernel_rows(args: ModelArgs, copies: StepRounding, tokens: int,
                device: str) -> Iterator[list[str]]:
    """Yield the table's cells for the kernels of experts' first matrices [w1; w3], each alone: what
    a step calls on their inputs, on the gradients of their results, and for the three products."""
    from minids.kernels.triton_fp8 import NOT, OF_ROUNDED, OF_X, round_tiles
    rows, width, height = tokens * args.n_activated_experts, args.dim, 2 * args.moe_inter_dim
    counts = torch.randint(args.n_routed_experts, (rows,), device=device).bincount(
        minlength=args.n_routed_experts)
    groups, source = group_tiles(counts, rows), torch.randint(tokens, (rows,), device=device)
    rounded = next(rounded for weights, rounded in copies.pairs if len(weights) == 2)
    x, dy = drawn(tokens, width, device=device), drawn(rows, height, device=device)
    mine = round_tiles(x, True, OF_ROUNDED, groups=groups, source=source)
    theirs = round_tiles(dy, True, OF_X, groups=groups)
    peaks, fp8 = measure_peaks(device), fp8_rate()
    for name, of, columns, of_slots in (
            ("rows, fetched", x, NOT, source),
            ("rows, fetched, and columns of them", x, OF_ROUNDED, source),
            ("rows and columns of gradients", dy, OF_X, None)):
        taken = seconds_per_call(lambda of=of, columns=columns, of_slots=of_slots: round_tiles(
            of, True, columns, groups=groups, source=of_slots), [()], device)
        moved = rows * of.size(1) * (of.element_size() + (1 + 4 / BLOCK) * (2 - (columns == NOT)))
        yield alone(f"  rounding {name}", taken, moved / peaks.bytes_per_second)
    dtype = x.dtype
    for name, product in (
            ("y", lambda: multiply(*mine[:2], *rounded[:2], rows, height, dtype, groups)),
            ("dx", lambda: multiply(*theirs[:2], *rounded[2:], rows, width, dtype, groups)),
            ("dW", lambda: multiply_over_tokens(*theirs[2:], *mine[2:], height, width, dtype,
                                                groups))):
        taken = seconds_per_call(product, [()], device)
        yield alone(f"  experts' product {name}", taken, 2 * rows * width * height / fp8)


def alone(name: str, taken: float, floor: float) -> list[str]:
    """Return the table's cells for a kernel without a counterpart in BF16."""
    return [name, "-", "-", f"{1e3 * taken:.3f}", f"{floor / taken:.0%}", "-", "-"]


def experts_row(args: ModelArgs, layers: list[nn.Module], leaves: list[list[Tensor]], batch: int,
                length: int, device: str) -> list[str]:
    """Return the table's cells for a layer of experts, its gate and shared experts included."""
    x, dy = (drawn(batch, length, args.dim, device=device) for _ in range(2))
    x.requires_grad_()
    if device == "cuda":
        layers = [torch.compile(layer, dynamic=False) for layer in layers]
    works = [lambda layer=layer, own=own: passes(layer(x)[0], [x, *own], dy)
             for layer, own in zip(layers, leaves, strict=True)]
    visited = args.n_activated_experts + args.n_shared_experts
    flops = 18 * batch * length * visited * args.dim * args.moe_inter_dim
    return pair_row(f"experts, {batch * length} tokens", works, [()], flops, device)


def expert_layers(args: ModelArgs, device: str) -> tuple[list[nn.Module], list[list[Tensor]]]:
    """Return a layer in BF16 and one in FP8 over the same weights, and what learns in each."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            layers = [MoE(args) for _ in range(2)]
        experts, width, inner = args.n_routed_experts, args.dim, args.moe_inter_dim
        w13 = drawn(experts, 2 * inner, width, device=device) * width ** -0.5
        w1, w3 = w13.chunk(2, dim=1)
        given = {"experts.w1": w1, "experts.w3": w3}
        for name, t in layers[0].state_dict().items():
            if name == "gate.bias":
                given[name] = torch.zeros(t.shape, dtype=t.dtype, device=device)
            elif name not in given:
                given[name] = drawn(*t.shape, device=device) * t.size(-1) ** -0.5
        for layer in layers:
            layer.load_state_dict(given, assign=True)
    finally:
        torch.set_default_dtype(before)
    plain, rounded = layers
    use_fp8_within(rounded)
    leaves = [list(layer.parameters()) for layer in layers]
    if device == "cuda":  # a body for training there takes the copies in place of w1 and w3
        plain.experts.copies = w13.requires_grad_(), plain.experts.w2
        leaves[0] = [w13, *(p for name, p in plain.named_parameters()
                            if name not in ("experts.w1", "experts.w3"))]
    return layers, leaves


def passes(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Return a result and the gradients of `leaves`."""
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def pair_row(name: str, works: list[Callable], inputs: list[tuple], flops: float,
             device: str) -> list[str]:
    """Return the table's cells for two works that compute the same, in BF16 and in FP8."""
    results = [[t.float() for t in work(*inputs[0])[:2]] for work in works]
    apart = max(((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True))
    del results
    bf16 = measure_peaks(device).flops[torch.bfloat16]
    peaks = [bf16, (fp8_rate() if device == "cuda" else 0) or bf16]
    taken = [seconds_per_call(work, inputs, device) for work in works]
    cells = [cell for t, peak in zip(taken, peaks, strict=True)
             for cell in (f"{1e3 * t:.3f}", f"{flops / t / peak:.0%}")]
    return [name, *cells, f"{taken[0] / taken[1]:.2f}", f"{apart:.1%}"]
