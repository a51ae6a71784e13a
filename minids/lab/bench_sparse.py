"""One layer of sparse attention on a GPU, beside dense attention: prefill, decoding, training.

The layer is the preset's if that has an indexer, else V3.2's. Prefill is attention with indexer and
choice, without projections; the dense side is `mla.attention`, cuDNN's kernel at V3's widths.
Decoding is one token for each of a batch of sequences, each side one CUDA graph. Training is
forward and backward of the layer: dense, the warm-up, which trains the indexer alone, and the
sparse stage, which trains all of it.

A floor is the larger of two times: the FLOPs at the rate of a large product, the bytes that have to
be read at the rate of a large copy.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minids.apply.folded import joined
from minids.config import ModelArgs
from minids.costs.flops import pair_flops
from minids.kernels import few_tokens_gpu
from minids.kernels.indexer import best_in_pieces, best_tokens, in_e4m3, pieces, scored
from minids.lab.bench_decoding import sparse_table
from minids.lab.bench_setup import Bench
from minids.lab.roofline import Peaks, measure_peaks
from minids.lab.timing import in_turn, watch_memory
from minids.model.cache import LatentCache
from minids.model.mla import MLA, Context, attention, selected_attention
from minids.model.rope import rotations
from minids.model.sparse_attention import freeze_all_but_indexers

SHORTEST, STEP = 8192, 4  # tokens of the shortest context; each is four times the one before
BATCH = 8                 # sequences decoded together
STEPS = 16                # decoding steps in one timing
LONGEST_TRAINED = 32768   # tokens of a training sequence


class Layer:
    """One attention layer: its settings, where it runs and in which type, how often it is timed."""

    def __init__(self, args: ModelArgs, device: str, dtype: torch.dtype, rounds: int):
        self.args = replace(args, n_layers=1, n_dense_layers=1)
        self.kind, self.rounds = dict(device=device, dtype=dtype), rounds
        self.latent = args.kv_lora_rank + args.qk_rope_head_dim
        self.pair = pair_flops(self.args)

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.kind["device"]

    @property
    def peaks(self) -> Peaks:
        """The measured peaks of that device."""
        return measure_peaks(self.device)

    @property
    def peak(self) -> float:
        """Return the FLOP/s of a large product in the layer's type."""
        return self.peaks.flops[self.kind["dtype"]]

    def module(self, **changes) -> MLA:
        """Return a new module with random weights; changes: of settings."""
        torch.manual_seed(0)
        with torch.device(self.device):
            attn = MLA(replace(self.args, **changes), 0).to(self.kind["dtype"])
        for name, parameter in attn.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
            elif name.endswith("norm.weight"):
                torch.nn.init.ones_(parameter)
        return attn

    def drawn(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, **self.kind)

    def index(self, batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return an indexer's queries, head weights (FP32) and keys."""
        heads, width = self.args.index_n_heads, self.args.index_head_dim
        return (self.drawn(batch, queries, heads, width),
                torch.randn(batch, queries, heads, device=self.device),
                self.drawn(batch, keys, width))

    def seconds(self, works: list[Callable], times: int = 1) -> list[float]:
        """Return the median seconds of each work, timed in turn after a first call."""
        for work in works:
            work()
        return [statistics.median(t) for t in in_turn(works, self.rounds, self.device, times)]


def sides(dense: float, sparse: float) -> list[str]:
    """Return table cells: milliseconds of both, and how many times the dense side takes."""
    return [f"{1e3 * dense:.3f}", f"{1e3 * sparse:.3f}", f"{dense / sparse:.2f}"]


@torch.inference_mode()
def prefill_rows(layer: Layer, length: int) -> Iterator[list[str]]:
    """Yield the table's cells for attention over one prompt, its indexer in BF16 and in FP8."""
    args, k = layer.args, min(layer.args.index_topk, length)
    scale, shape = args.qk_head_dim ** -0.5, (1, length, args.n_heads)
    own = [layer.drawn(*shape, n) for n in (args.qk_head_dim, args.qk_head_dim, args.v_head_dim)]
    [dense] = layer.seconds([lambda: attention(*own, None, scale)])
    own.clear()
    index, q, latent = (layer.index(1, length, length), layer.drawn(*shape, layer.latent),
                        layer.drawn(1, length, layer.latent))
    chosen = best_in_pieces(*index, None, k)
    [attended] = layer.seconds([functools.partial(
        selected_attention, q, latent, args.kv_lora_rank, *chosen, scale)])
    del chosen, q, latent
    pairs = layer.pair["indexer"] * length * (length + 1) / 2
    work = layer.pair["mqa"] * (k * (k + 1) / 2 + (length - k) * k)
    for kind, fp8 in (("", False), (", FP8 indexer", True)):
        scores, choice = layer.seconds([functools.partial(all_scores, *index, fp8),
                                        functools.partial(best_in_pieces, *index, None, k, fp8)])
        yield [f"prefill, {length:,} tokens{kind}", *sides(dense, choice + attended),
               f"scores {1e3 * scores:.2f} ({pairs / scores / layer.peak:.0%} of the peak), "
               f"choice {1e3 * (choice - scores):.2f}, attention {1e3 * attended:.2f} "
               f"({work / attended / layer.peak:.0%})"]


def all_scores(q: Tensor, weights: Tensor, keys: Tensor, fp8: bool) -> None:
    """Score as `best_in_pieces` does, rounding included, and choose nothing."""
    keys, scales = in_e4m3(keys) if fp8 else (keys, None)
    for part in pieces(len(q), q.size(1), keys.size(1)):
        scored(q[:, part], weights[:, part], keys[:, :part.stop], part.start,
               None if scales is None else scales[:, :part.stop])


def graphed(work: Callable[[], Tensor]) -> Callable[[], object]:
    """Return a call that repeats `work` as one CUDA graph; without CUDA, as it is."""
    if not torch.cuda.is_available():
        return work
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.inference_mode()
def decode_rows(layer: Layer, length: int) -> Iterator[list[str]]:
    """Yield the table's cells for one token of each sequence: the whole layer, attention alone."""
    args, device, steps, x = layer.args, layer.device, [], layer.drawn(BATCH, layer.args.dim)
    for attn in (layer.module(index_n_heads=0), layer.module()):
        cache = LatentCache(attn.args, BATCH, length + 1, **layer.kind)
        cache.latents.normal_()
        cache.length, cache.lengths = length, torch.full((BATCH,), length, device=device)
        context = Context(*cache.look(1), cache, absorbed=True)
        if attn.indexer is not None:
            cache.index_keys.normal_()
        steps.append(functools.partial(few_tokens_gpu.attention, attn, joined(attn), x, context))
    attn, cache = steps[0].args[0], steps[0].args[3].cache
    reading, work = cache.latents.nbytes, BATCH * length * layer.pair["mqa"] / layer.peak
    floors = [max(size / layer.peaks.bytes_per_second, work) for size in
              (reading + sum(p.nbytes for p in attn.parameters()), reading)]
    dense, sparse = layer.seconds([graphed(step) for step in steps], STEPS)
    yield [f"decode, {length:,} tokens, the layer", *sides(dense, sparse),
           f"dense at {floors[0] / dense:.0%} of its floor"]
    q, latents = layer.drawn(BATCH, 1, args.n_heads, layer.latent), cache.latents[0]
    index = *layer.index(BATCH, 1, length + 1), cache.at, min(args.index_topk, length)
    every = torch.arange(length + 1, dtype=torch.int32, device=device).repeat(BATCH, 1, 1)

    def attended(tokens: Tensor) -> Tensor:
        from minids.kernels.triton_selected import attend_in_pieces
        return few_tokens_gpu.merge(attn, *attend_in_pieces(q, latents, tokens, args.kv_lora_rank,
                                                            attn.scale))
    works = {"dense": functools.partial(few_tokens_gpu.attend, attn, q.flatten(0, 1), latents,
                                        cache.at, length + 1),
             "dense, by the sparse kernel": functools.partial(attended, every),
             "sparse": functools.partial(attended, best_tokens(*index)),
             "choice": functools.partial(best_tokens, *index)}
    taken = dict(zip(works, layer.seconds([graphed(work) for work in works.values()], STEPS),
                     strict=True))
    best = min(taken["dense"], taken["dense, by the sparse kernel"])
    yield [f"decode, {length:,} tokens, attention alone", *sides(best, taken["sparse"]),
           "; ".join(f"{name} {1e3 * t:.3f}" for name, t in taken.items())
           + f"; dense at {floors[1] / best:.0%} of its floor"]


def training_works(layer: Layer, length: int) -> dict[str, Callable[[], None]]:
    """Return forward and backward of the layer by stage."""
    x, works = layer.drawn(1, length, layer.args.dim), {}
    rotation = rotations(torch.arange(length, device=layer.device), layer.args)[None]
    for stage in ("dense", "warmup", "sparse"):
        attn = layer.module(**dict(index_n_heads=0) if stage == "dense" else {})
        if stage == "warmup":
            freeze_all_but_indexers(torch.nn.ModuleDict(dict(attn=attn)))
        context = Context(rotation, indexer_stage="" if stage == "dense" else stage)
        works[stage] = functools.partial(learn, attn, x, context)
    return works


def learn(attn: MLA, x: Tensor, context: Context) -> None:
    """Run the layer forward and backward, its input's gradient included where it learns."""
    frozen = context.indexer_stage == "warmup"
    out, loss = attn(x.detach().requires_grad_(not frozen), context)
    losses = ([] if frozen else [out.float().square().mean()]) + ([] if loss is None else [loss])
    sum(losses).backward()
    attn.zero_grad()


def training_rows(layer: Layer, length: int) -> Iterator[list[str]]:
    """Yield the table's cells for the stages of training, beside dense training."""
    works, memory = training_works(layer, length), {}
    for stage, work in works.items():
        work()
        before, most = watch_memory(work, layer.device)
        memory[stage] = (most - before) / 2 ** 30
    taken = dict(zip(works, layer.seconds(list(works.values())), strict=True))
    for stage in ("warmup", "sparse"):
        yield [f"train, {length:,} tokens, {stage}", *sides(taken["dense"], taken[stage]),
               f"GiB: dense {memory['dense']:.1f}, {stage} {memory[stage]:.1f}"]


def table(bench: Bench) -> Iterator[list[str]]:
    """Compare dense and sparse attention: on a GPU of one layer, on a CPU of the preset's model."""
    yield from (layer_table if bench.settings.device == "cuda" else sparse_table)(bench)


def layer_table(bench: Bench) -> Iterator[list[str]]:
    """Compare one layer's dense and sparse attention at each length up to --context, in BF16."""
    args, s = bench.args if bench.args.has_indexer else ModelArgs.preset("v3.2"), bench.settings
    layer, lengths = Layer(args, s.device, torch.bfloat16, s.pairs), [s.context]
    while lengths[0] > SHORTEST:
        lengths.insert(0, max(lengths[0] // STEP, SHORTEST))
    yield [f"{args.n_heads} heads, {args.index_n_heads} of the indexer, k = {args.index_topk:,}",
           "dense ms", "sparse ms", "ratio", "of that"]
    for length in lengths:
        yield from prefill_rows(layer, length)
        torch.cuda.empty_cache()
    for length in lengths:
        yield from decode_rows(layer, length)
        torch.cuda.empty_cache()
    for length in lengths:
        if length <= LONGEST_TRAINED:
            yield from training_rows(layer, length)
            torch.cuda.empty_cache()
