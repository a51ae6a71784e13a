"""Measure the memory and messages of one rank, without other ranks, GPUs or real memory.

The package's own code cuts and shards a model on "meta", in a process group that is torch's fake
one: this process acts as rank 0 and no message arrives. Micro-batches then run forward and
backward on fake tensors, which have shapes, types and no numbers, so 671B parameters take seconds.
Every storage that is made or freed on the way is counted, and every message. Rank 0 has the largest
shards where they are uneven.

Without numbers no gate can choose: experts get equally many tokens. Operations are those of the
CPU's path, except attention, whose kernel here is one that stores no scores, and the chunks of the
head, which have a GPU's size. What CUDA, NCCL and a fragmented allocator take is not seen.
"""

import contextlib
import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minids.apply.recompute import recompute_blocks
from minids.config import ModelArgs
from minids.kernels import attention, cross_entropy
from minids.kernels.precision import compute_dtype
from minids.model.transformer import Transformer
from minids.parallel.layout import Layout
from minids.parallel.pipeline import Weights, cut
from minids.parallel.ranks import Ranks
from minids.parallel.sharding import empty_model, expect, keeps_gathered, shard
from minids.parallel.shards import local


@dataclasses.dataclass(frozen=True)
class Load:
    """The micro-batch to run, and the settings of the run that change memory.

    state_bytes: of the optimizer, per number of a parameter with this name
    memory: of a GPU, bytes, which decides whether gathered matrices stay (`keeps_gathered`)
    """

    rows: int
    seq_len: int
    state_bytes: Callable[[str, Tensor], int]
    recompute: str = "none"
    dtype: torch.dtype = torch.bfloat16
    memory: float = 0

    @property
    def products(self) -> torch.dtype | None:
        """Return the precision in which matrices travel, as `shard` takes it."""
        return self.dtype if self.dtype == torch.bfloat16 else None


class Footprint(NamedTuple):
    """The memory and messages of one stage on one rank, in bytes; `whole` and `own` are counts.

    outlast: what a micro-batch leaves behind for the next: gathered weights, gradients
    kept: what a micro-batch stores from its forward pass until its backward pass
    peak: what is needed beside outlast and kept at the worst moment
    Of the messages, what this rank sends; weights and gradients: in a step's first micro-batch, in
    each of those between, in the last.
    """

    whole: int  # parameters of the stage, on all its ranks
    own: int  # those of this rank
    weights: int
    state: int  # of the optimizer
    outlast: int
    kept: int
    peak: int
    exchange: int  # tokens to experts on other ranks and back, a micro-batch
    hand_over: int  # states to the next stage, a micro-batch; their gradients come back
    gather_first: int
    gather: int
    gather_last: int
    reduce_first: int
    reduce: int
    reduce_last: int

    def step(self, micro_batches: int) -> dict[str, int]:
        """Return the bytes of a step's messages by kind."""
        between = micro_batches - 2  # a single one is like those between
        gather = self.gather_first + between * self.gather + self.gather_last
        reduce = self.reduce_first + between * self.reduce + self.reduce_last
        return {"tokens to experts and back": micro_batches * self.exchange,
                "states and their gradients": micro_batches * 2 * self.hand_over,
                "weights": gather, "gradients": reduce}


class Kind(NamedTuple):
    """The parts of a stage: whether it has the embedding (`first`) and norm, head and MTP modules
    (`last`), and its numbers of dense and MoE layers."""

    first: bool
    last: bool
    dense: int
    moe: int

    @classmethod
    def of(cls, args: ModelArgs, layout: Layout, stage: int) -> "Kind":
        """Return the kind of a stage, of a layout that may be without a pipeline."""
        layers = layout.layers_of(stage, args) if layout.pipeline > 1 else range(args.n_layers)
        moe = sum(map(args.is_moe_layer, layers))
        return cls(stage == 0, stage == layout.n_stages - 1, len(layers) - moe, moe)

    def with_layers(self, count: int) -> "Kind":
        """Return the kind with this many of its equal layers: those with experts, if it has any."""
        return self._replace(**{"moe" if self.moe else "dense": count})


SETTLED = 0.01  # share of the peak
FEW = 2  # equal layers that are run: FSDP gathers one ahead, so that a single one is no example


class Measured(dict):
    """Footprints of one model under one load, by ranks and kind: equal ones are run once.

    From FEW equal layers on, each adds the same to every number except the peak. So stages are run
    with FEW of them, and the share of one more is measured once, in a stage without embedding and
    head if there is one. The peak falls at first, while layers free more than an embedding's
    gradient needs, or rises, while fewer are there than FSDP has at hand; it is followed until that
    ends.
    """

    def __init__(self, args: ModelArgs, load: Load):
        super().__init__()
        self.args, self.load = args, load

    def stage(self, ranks: Ranks, stage: int) -> Footprint:
        """Return what a stage takes of one rank; ranks: from `fake_ranks`."""
        kind = Kind.of(self.args, ranks.layout, stage)
        count = kind.moe or kind.dense
        if count <= FEW:
            return self.run(ranks, kind)
        bare = kind._replace(first=False, last=False) if ranks.layout.n_stages > 2 else kind
        few, more = (self.run(ranks, bare.with_layers(n)) for n in (FEW, FEW + 1))
        base = self.run(ranks, kind.with_layers(FEW))
        grown = (a + (count - FEW) * (c - b) for a, b, c in zip(base, few, more, strict=True))
        return Footprint(*grown)._replace(peak=self.peak(ranks, kind, count))

    def peak(self, ranks: Ranks, kind: Kind, count: int) -> int:
        """Return the peak with `count` equal layers: it is run until one more moves it by no more
        than SETTLED, and extended along a line from there."""
        before, last = (self.run(ranks, kind.with_layers(n)).peak for n in (FEW, FEW + 1))
        layers = FEW + 1
        while abs(last - before) > before * SETTLED and layers < count:
            layers += 1
            before, last = last, self.run(ranks, kind.with_layers(layers)).peak
        return last + (count - layers) * (last - before)

    def run(self, ranks: Ranks, kind: Kind) -> Footprint:
        """Return what a rank takes that has all of these layers."""
        layout = ranks.layout
        keep = (dist.get_world_size() > 1
                and keeps_gathered(self.args, layout, self.load.memory))
        in_parts = layout.pipeline > 1 or keep and layout.micro_batches > 1
        key = layout.fsdp, layout.replicate, layout.expert_parallel, in_parts, keep, kind
        if key not in self:
            part = build(self.args, ranks, kind, self.load, keep)
            self[key] = run(part, ranks, kind, self.load, in_parts)
        return self[key]


@contextlib.contextmanager
def fake_ranks(layout: Layout, world: int) -> Iterator[Ranks]:
    """Yield rank 0 of a fitted layout, in a process group without other processes."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        ranks = Ranks.of(layout, torch.device("cpu"))
        yield dataclasses.replace(ranks, device=torch.device("meta"))
    finally:
        dist.destroy_process_group()


class OneStage(Layout):
    """A layout whose stages have all of a model's layers."""

    def layers_of(self, stage: int, args: ModelArgs) -> range:
        return range(args.n_layers)


def build(args: ModelArgs, ranks: Ranks, kind: Kind, load: Load, keep: bool) -> Transformer:
    """Return a rank's part of a model with these layers only, as `ParallelModel` builds it."""
    layout = ranks.layout
    part = empty_model(dataclasses.replace(args, n_layers=kind.dense + kind.moe,
                                           n_dense_layers=kind.dense))
    if layout.pipeline > 1:
        alone = OneStage(**dataclasses.asdict(layout))
        stage = 0 if kind.first else layout.n_stages - 1 if kind.last else 1
        cut(part, stage, dataclasses.replace(ranks, layout=alone))
    recompute_blocks(part, load.recompute)
    if dist.get_world_size() > 1:
        shard(part, ranks, load.products, keep)
    return part


def run(part: Transformer, ranks: Ranks, kind: Kind, load: Load, in_parts: bool) -> Footprint:
    """Run a step's micro-batches; return what they took.

    in_parts: whether gradients stay whole until the last of them
    """
    args, layout = part.args, ranks.layout
    named = dict(part.named_parameters())
    whole = sum(p.numel() for p in named.values())
    numbers = {name: local(p).numel() for name, p in named.items()}
    weights = sum(numbers[name] * p.element_size() for name, p in named.items())
    state = sum(numbers[name] * load.state_bytes(name, p) for name, p in named.items())
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu():
        part.to_empty(device="cpu")
        part.device = torch.device("cpu")
        tokens = torch.zeros(load.rows, load.seq_len, dtype=torch.int64)
        least = load.rows * (load.seq_len - args.n_mtp_layers)  # tokens that MTP modules get
        rows, pairs = for_each_rank(args, least, layout.expert_parallel)
        watch = Watch((rows, rows, pairs))  # what `Plan.numbers` holds
        watch.leave_out([*part.parameters(), *part.buffers()])
        with watch, torch.autocast("cpu", load.dtype, load.dtype != torch.float32,
                                   cache_enabled=dist.get_world_size() == 1):
            found = [micro_batch(part, layout, kind, tokens, watch, last)
                     for last in ([False, False, True] if in_parts else [True, True])]
    first, between, last = found[0], found[-2], found[-1]
    return Footprint(
        whole, sum(numbers.values()), weights, state,
        between["left"], last["after"] - between["left"],
        last["high"] - last["after"], between["exchange"], between["handed"],
        *(one[way] for way in ("gather", "reduce") for one in (first, between, last)))


def micro_batch(part: Transformer, layout: Layout, kind: Kind, tokens: Tensor, watch: "Watch",
                last: bool) -> dict[str, int]:
    """Run one forward and one backward pass.

    Returns the bytes of messages (gather, reduce, exchange, handed), after the forward pass, at
    the highest point, and left in the end.
    """
    watch.begin()
    expect(part, last)
    if layout.pipeline == 1:
        loss = part.loss(tokens, tokens, *Weights()).total
        handed, after = 0, watch.live
        loss.backward()
        del loss
    else:
        part.begin(Weights(), 1.0)
        states = torch.empty(*tokens.shape, part.args.dim, dtype=part.dtype, requires_grad=True)
        balance = torch.zeros((), dtype=part.wide, requires_grad=True)
        given = (tokens,) if kind.first else (states, balance)
        out = part(*given, targets=tokens)
        handed, after = 0 if isinstance(out, Tensor) else out[0].nbytes, watch.live
        out = [out] if isinstance(out, Tensor) else [t for t in out if t.requires_grad]
        torch.autograd.backward(out, [torch.zeros_like(t) for t in out])
        del states, balance, given, out
    return watch.sent | dict(handed=handed, after=after, high=watch.high, left=watch.live)


def for_each_rank(args: ModelArgs, tokens: int, ranks: int) -> tuple[int, int]:
    """Return how many of a rank's tokens, and of their pairs with experts, each of `ranks` gets.

    As if the experts of a token were drawn evenly from all: it leaves for a rank that has one.
    """
    if not args.has_moe:
        return 0, 0
    experts, chosen = args.n_routed_experts, args.n_activated_experts
    elsewhere = math.comb(experts - experts // ranks, chosen) / math.comb(experts, chosen)
    return math.ceil(tokens * (1 - elsewhere)), tokens * chosen // ranks


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let attention store no scores, and the head take a GPU's chunks, as bodies there do."""
    before = attention.SHORT, cross_entropy.LOGITS["cpu"], F.scaled_dot_product_attention
    attention.SHORT, cross_entropy.LOGITS["cpu"] = 0, cross_entropy.LOGITS["cuda"]
    F.scaled_dot_product_attention = without_scores
    try:
        yield
    finally:
        attention.SHORT, cross_entropy.LOGITS["cpu"], F.scaled_dot_product_attention = before


def without_scores(q: Tensor, k: Tensor, v: Tensor, mask: None, is_causal: bool,
                   scale: float) -> Tensor:
    """Run a kernel that stores queries, keys, values, output and a sum per query."""
    q, k, v = (t.to(compute_dtype(t)) for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, scale=scale)[0]


class Watch(TorchDispatchMode):
    """Count the bytes of storages while they live, and of messages.

    asked: the numbers that the program gets, in turn, when it asks a fake tensor for one
    """

    def __init__(self, asked: tuple[int, ...]):
        super().__init__()
        self.asked, self.live, self.high = itertools.cycle(asked), 0, 0
        self.sizes: dict[int, int] = {}  # of living storages, by address
        self.sent: dict[str, int] = {}

    def begin(self) -> None:
        """Forget the messages and the highest count."""
        self.high, self.sent = self.live, dict(gather=0, reduce=0, exchange=0)

    def leave_out(self, tensors: list[Tensor]) -> None:
        """Do not count what these hold: the weights are counted elsewhere."""
        for tensor in tensors:
            self.count(local(tensor).untyped_storage(), 0)

    def __enter__(self):
        self.own_resize = resize = torch.UntypedStorage.resize_

        def counted(storage, size: int):
            self.count(storage, size)
            return resize(storage, size)

        self.own_tolist = FakeTensor.tolist
        torch.UntypedStorage.resize_ = counted
        FakeTensor.tolist = lambda tensor: self.listed(tensor.shape)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_, FakeTensor.tolist = self.own_resize, self.own_tolist
        return super().__exit__(*error)

    def listed(self, shape: tuple[int, ...]):
        """Return asked numbers in this shape; torch would make a fake tensor of each."""
        return [self.listed(shape[1:]) for _ in range(shape[0])] if shape else next(self.asked)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it asks again, for this rank's part
        if func is torch.ops.prim.device.default:  # by far the most frequent
            return args[0].fake_device
        space, _, name = func._schema.name.partition("::")
        if name == "_local_scalar_dense":
            return next(self.asked)
        out = func(*args, **(kwargs or {}))
        if "c10d" in space and name in MESSAGES:
            self.sent[MESSAGES[name]] += sent_bytes(name, *args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.count(storage, storage.nbytes())
        return out

    def count(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage of this size from now on."""
        if (key := storage._cdata) not in self.sizes:
            weakref.finalize(storage, self.freed, key)
        self.live += size - self.sizes.get(key, 0)
        self.sizes[key], self.high = size, max(self.high, self.live)

    def freed(self, key: int) -> None:
        """Forget a storage."""
        self.live -= self.sizes.pop(key)


MESSAGES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce",
            "allreduce_": "reduce", "alltoall_base_": "exchange"}


def sent_bytes(name: str, first, second, *others) -> int:
    """Return the bytes that a rank sends to others in a collective; arguments: torch's own."""
    if name == "alltoall_base_":  # output, input, group, rows from each rank; without rows: counts
        return first.nbytes * (len(others[1]) - 1) // len(others[1]) if others[1] else 0
    if name == "allreduce_":  # of a ring: a sum of parts, then their way around
        return 2 * sum(tensor.nbytes for tensor in first)
    return abs(first.nbytes - second.nbytes)  # of output and input, or input and output
