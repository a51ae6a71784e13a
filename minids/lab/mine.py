"""Collect what a learner wrote in other notebooks: the capstone builds its model from it.

    mine = collect()
    y = mine.moe(u, layer, args)

Notebooks 03 to 07 tag the cells that define a part with `mine` (02 has none: MLA replaces its
attention). They run here, cell by cell, in a namespace that holds torch alone. Each part is then
tried once, in FP64, beside the package's own.
A part that is missing, unsolved or stops with an error is replaced by the package's, and `rows`
says so. A wrong part stays, because it is the learner's: `rows` says by how much it differs.
"""

import contextlib
import copy
import io
import json
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.func import functional_call

from minids.config import ModelArgs
from minids.lab.checker import LARGE, Tell, run
from minids.lab.lesson import reason
from minids.model.mla import MLA, Context
from minids.model.moe import Gate, MoE, Routing, sequence_balance_loss, update_bias
from minids.model.mtp import MTPModule
from minids.model.rope import apply_rotary_emb
from minids.model.transformer import Transformer

ROOT = Path(__file__).resolve().parents[2]
TAG = "mine"
CLOSE = 1e-10  # absolute and relative; two orders of summation in FP64 differ by about 1e-15
SMALL = replace(ModelArgs.preset("nano"), dim=24, n_heads=3, moe_inter_dim=12, n_routed_experts=8,
                n_activated_experts=3, n_expert_groups=4, n_limited_groups=2, route_scale=2.5,
                init_std=0.5, vocab_size=50)


# The package's own parts, with the arguments that the notebooks' parts have.

def rope(x: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    """x: (.., T, width), row t at positions[t]; freqs: (width / 2,) radians per position"""
    angles = positions[:, None] * freqs  # (T, width / 2)
    rotation = torch.complex(angles.cos(), angles.sin())
    return apply_rotary_emb(x.unsqueeze(-2), rotation).squeeze(-2)


def naive(h: Tensor, w: dict, args: ModelArgs, rotate: Callable) -> Tensor:
    """h: (B, S, D) -> (B, S, D); w: name -> weights; rotate: (B, S, heads, rope) -> the same"""
    with torch.device("meta"):
        layer = MLA(args, layer=0)
    one = torch.ones(1, h.size(1), args.qk_rope_head_dim // 2, dtype=torch.float64, device=h.device)
    pairs = rotate(torch.stack([one, 0 * one], dim=-1).flatten(-2).unsqueeze(2))  # of (1, 0), ..
    rotation = torch.view_as_complex(pairs.squeeze(2).unflatten(-1, (-1, 2)).contiguous())
    weights = {f"{name}.weight": weight for name, weight in w.items()}
    return functional_call(layer, weights, (h, Context(rotation)))[0]


def limit_groups(choice: Tensor, groups: int, kept: int) -> Tensor:
    """choice: (N, E) -> the same, experts outside the best groups at minus infinity"""
    asked = SimpleNamespace(n_expert_groups=groups, n_limited_groups=kept)
    return Gate.limit_groups(SimpleNamespace(args=asked, bias=choice), choice)


def gate(u: Tensor, weight: Tensor, bias: Tensor, args: ModelArgs) -> tuple[Tensor, Tensor]:
    """u: (N, D) -> the chosen experts and their weights, both (N, K)"""
    with torch.device("meta"):
        layer = Gate(args)
    weights, routing = functional_call(layer, dict(weight=weight, bias=bias), (u[None],))
    return routing.indices[0], weights[0]


def moe(u: Tensor, layer, args: ModelArgs) -> Tensor:
    """u: (N, D) -> (N, D); layer: holds gate, experts and shared_experts"""
    with torch.device("meta"):
        package = MoE(args)
    weights = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return functional_call(package, weights, (u[None],))[0][0]


def move(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """bias: (E,), load: (E,) tokens of each expert -> the biases after one step"""
    update_bias(moved := bias.clone(), load, speed)
    return moved


def sequence_loss(scores: Tensor, k: int) -> Tensor:
    """scores: (T, E) of one sequence -> its balance loss, 1 when even"""
    asked = SimpleNamespace(n_activated_experts=k, n_routed_experts=scores.size(1))
    return sequence_balance_loss(Routing(scores[None], None), asked)


def module(part, h: Tensor, following: Tensor, context) -> Tensor:
    """h, following: (B, S, D), states and the embeddings of the next tokens -> (B, S, D)"""
    return MTPModule.forward(part, h, following, context)[0]


# What each part is tried on.

def numbers(*shape: int) -> Tensor:
    """Return random numbers in FP64."""
    return torch.randn(shape, dtype=torch.float64)


def layer_of_experts() -> MoE:
    """Return a layer whose gate has biases, most of them negative."""
    layer = Transformer(SMALL).double().layers[1].ffn
    layer.gate.bias.normal_(mean=-0.4, std=0.3)
    return layer


def gate_example() -> tuple:
    """Return tokens, and a gate's weights and biases."""
    layer = layer_of_experts()
    return numbers(40, SMALL.dim), layer.gate.weight.detach(), layer.gate.bias, SMALL


def naive_example() -> tuple:
    """Return hidden states, and the weights of a layer of attention."""
    layer = Transformer(SMALL).double().layers[0].attn
    weights = {name: m.weight.detach() for name, m in layer.named_children() if name != "indexer"}
    weights["kv_norm"] = weights["kv_norm"] + 0.3 * numbers(SMALL.kv_lora_rank)
    freqs = 10.0 ** -torch.arange(SMALL.qk_rope_head_dim // 2).double()

    def rotate(x: Tensor) -> Tensor:
        return rope(x.transpose(1, 2), torch.arange(x.size(1)), freqs).transpose(1, 2)
    return numbers(2, 9, SMALL.dim), weights, SMALL, rotate


def module_example() -> tuple:
    """Return an MTP module and what it reads."""
    model = Transformer(SMALL).double()
    [module] = model.mtp
    for norm in (module.enorm, module.hnorm, module.norm):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    context = model.context(torch.zeros(2, 7, dtype=torch.int64))
    return module, numbers(2, 7, SMALL.dim), numbers(2, 7, SMALL.dim), context


def in_order(found: tuple[Tensor, Tensor]) -> Tensor:
    """Return a gate's answer as one number per expert: the order in which it chose is free."""
    chosen, weights = found
    return weights.new_zeros(len(chosen), SMALL.n_routed_experts).scatter(-1, chosen, weights)


@dataclass(frozen=True)
class Part:
    """A function that a notebook defines; example: the arguments that it is tried on."""

    notebook: str  # the file's name, without suffix
    reference: Callable
    example: Callable[[], tuple]
    view: Callable = field(default=lambda answer: answer)  # before two answers are compared

    @property
    def name(self) -> str:
        """Return the function's name, in the notebook and here."""
        return self.reference.__name__


PARTS = [  # a part after those that it calls
    Part("03_mla", naive, naive_example),
    Part("04_rope_yarn", rope, lambda: (numbers(2, 7, 8), torch.arange(3, 10), numbers(4).abs())),
    Part("05_moe", limit_groups, lambda: (numbers(20, 12) - 1, 4, 2)),
    Part("05_moe", gate, gate_example, in_order),
    Part("05_moe", moe, lambda: (numbers(40, SMALL.dim), layer_of_experts(), SMALL)),
    Part("06_balance", move, lambda: (numbers(8), torch.tensor([6, 1, 2, 2, 1, 0, 2, 3]), 0.01)),
    Part("06_balance", sequence_loss, lambda: (numbers(11, 6).sigmoid() ** 2, 2)),
    Part("07_mtp", module, module_example),
]


class Mine(SimpleNamespace):
    """The parts, by name, and `rows`: part, notebook, what is used, for `lesson.table`."""

    rows: list[tuple[str, str, str]]


def collect(folder: str | Path = ".", parts: list[Part] = PARTS) -> Mine:
    """Return the learner's parts from the notebooks in `folder`, replaced where they do not run.

    folder: of the notebooks; one that is not there is taken from the clone
    """
    mine, dtype = Mine(rows=[]), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        spaces = {name: run_tagged(name, Path(folder)) for name in {p.notebook: 0 for p in parts}}
        for part in parts:
            space, stopped = spaces[part.notebook]
            function, remark = tried(part, space.get(part.name), stopped)
            space[part.name] = function  # also for the parts that call it
            setattr(mine, part.name, function)
            mine.rows.append((f"`{part.name}`", part.notebook[:2], remark))
    torch.set_default_dtype(dtype)
    return mine


def run_tagged(name: str, folder: Path) -> tuple[dict, str]:
    """Run a notebook's tagged cells; return the names that they define, and what stopped one."""
    path = folder / f"{name}.ipynb"
    path = path if path.is_file() else ROOT / "notebooks" / path.name
    try:
        cells = tagged(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"the notebook cannot be read ({reason(error)})"
    space, stopped = {"torch": torch, "__name__": name}, ""
    if not cells:
        return space, f"no cell is tagged {TAG!r}"
    for number, source in cells:
        file = f"{name}.ipynb, cell {number}"  # as a traceback shows it
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        _, fate = safely(run_source, (source, file, space))
        stopped = stopped or (fate and f"cell {number} {fate}")
    return space, stopped


def tagged(path: Path) -> list[tuple[int, str]]:
    """Return the number and the source of each code cell that has the tag."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(i, "".join(cell["source"])) for i, cell in enumerate(cells)
            if cell["cell_type"] == "code" and TAG in cell["metadata"].get("tags", [])]


def run_source(source: str, file: str, space: dict) -> None:
    """Run a cell; what it defines is in `space` afterwards."""
    exec(compile(source, file, "exec"), space)


def safely(function: Callable, arguments: tuple) -> tuple[object, str]:
    """Call a learner's code: its result, or what stopped it, in words.

    A copy of this process calls it first, and meets endless loops, crashes and unbounded memory.
    """
    def rehearse(tell: Tell) -> None:
        try:
            function(*arguments)
        except (Exception, SystemExit) as error:  # is met again below
            if isinstance(error, MemoryError) or "can't allocate memory" in reason(error):
                tell("large", None)

    told, fate = run(rehearse)
    if fate or ("large", None) in told:
        return None, fate or LARGE
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return function(*arguments), ""
    except (Exception, SystemExit) as error:
        unsolved = type(error) is NotImplementedError and not error.args
        return None, "is not written yet" if unsolved else f"stops with {reason(error)}"


def tried(part: Part, function, stopped: str) -> tuple[Callable, str]:
    """Return the function to use, and a remark: the learner's, unless it does not run."""
    if not callable(function):
        return part.reference, f"the package's: {stopped or 'it is not defined'}"
    torch.manual_seed(0)
    example = part.example()
    expected = part.view(part.reference(*copy.deepcopy(example)))
    answer, fate = safely(lambda *given: part.view(function(*given)), copy.deepcopy(example))
    if fate:
        return part.reference, f"the package's: {part.name} {fate}"
    return function, apart(answer, expected)


def apart(answer, expected: Tensor) -> str:
    """Return whether an answer is the package's, in words."""
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else str(type(answer))
        return f"yours, **but wrong**: {found} instead of shape {tuple(expected.shape)}"
    if torch.allclose(answer.double(), expected, rtol=CLOSE, atol=CLOSE):
        return "yours"
    largest = (answer.double() - expected).abs().max().item()
    return f"yours, **but wrong**: it differs from the package's by up to {largest:.2g}"
