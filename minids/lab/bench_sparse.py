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
from minids.kernels import few_tokens_gpu
from minids.kernels.indexer import best_in_pieces, pieces
from minids.lab.bench_decoding import sparse_table
from minids.lab.bench_setup import Bench
from minids.lab.roofline import measure_peaks
from minids.lab.timing import in_turn, watch_memory
from minids.model.cache import LatentCache
from minids.model.mla import MLA, Context, attention, selected_attention
from minids.model.rope import rotations
from minids.model.sparse_attention import freeze_all_but_indexers

SHORTEST, STEP = 8192, 4  # tokens of the shortest context; each is four times the one before
BATCH = 8                 # sequences decoded together
STEPS = 16                # decoding steps in one timing
LONGEST_TRAINED = 32768   # tokens of a training sequence
KIND = torch.bfloat16


class Layer:
    """One attention layer with random weights, and its settings."""

    def __init__(self, args: ModelArgs):
        self.args = replace(args, n_layers=1, n_dense_layers=1)

    def module(self, **changes) -> MLA:
        """Return a new module on the GPU in BF16; changes: of settings."""
        torch.manual_seed(0)
        with torch.device("cuda"):
            attn = MLA(replace(self.args, **changes), 0).to(KIND)
        for parameter in attn.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
        return attn

    def pairs(self, length: int) -> int:
        """Return the pairs of a query and a key that it sees."""
        return length * (length + 1) // 2

    def selected_pairs(self, length: int) -> int:
        """Return the pairs that are left when each query attends to k tokens."""
        k = min(self.args.index_topk, length)
        return self.pairs(k) + (length - k) * k

    @property
    def absorbed_flops(self) -> int:
        """FLOPs of one pair in the absorbed form: 2 x 128 x (576 + 512) in V3.2"""
        args = self.args
        return 2 * args.n_heads * (2 * args.kv_lora_rank + args.qk_rope_head_dim)


def drawn(*shape: int) -> Tensor:
    """Return random numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=KIND)


def seconds(works: list[Callable], bench: Bench, times: int = 1) -> list[float]:
    """Return the median seconds of each work, timed in turn after a first call."""
    for work in works:
        work()
    return [statistics.median(t) for t in in_turn(works, bench.settings.pairs, "cuda", times)]


@torch.inference_mode()
def prefill_row(layer: Layer, length: int, bench: Bench) -> list[str]:
    """Return the table's cells for attention over one prompt."""
    args, peak = layer.args, measure_peaks("cuda").flops[KIND]
    scale, shape = args.qk_head_dim ** -0.5, (1, length, args.n_heads)
    own = [drawn(*shape, width) for width in (args.qk_head_dim, args.qk_head_dim, args.v_head_dim)]
    [dense] = seconds([lambda: attention(*own, None, scale)], bench)
    own.clear()
    index = (drawn(1, length, args.index_n_heads, args.index_head_dim),
             torch.randn(1, length, args.index_n_heads, device="cuda"),
             drawn(1, length, args.index_head_dim))
    top = min(args.index_topk, length)
    absorbed = drawn(1, length, args.n_heads, args.kv_lora_rank + args.qk_rope_head_dim)
    latent = drawn(1, length, args.kv_lora_rank + args.qk_rope_head_dim)
    chosen = best_in_pieces(*index, None, top)
    works = [lambda: all_scores(*index), lambda: best_in_pieces(*index, None, top),
             lambda: selected_attention(absorbed, latent, args.kv_lora_rank, *chosen, scale)]
    scores, choice, attended = seconds(works, bench)
    scored = 2 * args.index_n_heads * args.index_head_dim * layer.pairs(length)
    work = layer.absorbed_flops * layer.selected_pairs(length)
    return [f"prefill, {length:,} tokens", *sides(dense, choice + attended),
            f"scores {1e3 * scores:.2f} ({scored / scores / peak:.0%} of the peak), choice "
            f"{1e3 * (choice - scores):.2f}, attention {1e3 * attended:.2f} "
            f"({work / attended / peak:.0%})"]


def all_scores(q: Tensor, weights: Tensor, keys: Tensor) -> None:
    """Score as `best_in_pieces` does, and choose nothing."""
    from minids.kernels.triton_indexer import scores
    for part in pieces(len(q), q.size(1), keys.size(1)):
        scores(q[:, part], weights[:, part], keys[:, :part.stop], part.start)


def sides(dense: float, sparse: float) -> list[str]:
    """Return table cells: milliseconds of both, and how many times the dense side takes."""
    return [f"{1e3 * dense:.3f}", f"{1e3 * sparse:.3f}", f"{dense / sparse:.2f}"]


def graphed(work: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a call that repeats `work` as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.inference_mode()
def decode_rows(layer: Layer, length: int, bench: Bench) -> Iterator[list[str]]:
    """Yield the table's cells for one token of each sequence: the whole layer, attention alone."""
    args, peaks, works = layer.args, measure_peaks("cuda"), []
    x, alone = drawn(BATCH, args.dim), []
    for module in (layer.module(index_n_heads=0), layer.module()):
        cache = LatentCache(module.args, BATCH, length + 1, "cuda", KIND)
        cache.latents.normal_()
        if cache.index_keys is not None:
            cache.index_keys.normal_()
        cache.length, cache.lengths = length, torch.full((BATCH,), length, device="cuda")
        rotation, visible = cache.look(1)
        context = Context(rotation, visible, cache, absorbed=True)
        works.append(functools.partial(few_tokens_gpu.attention, module, joined(module), x,
                                       context))
        alone.append((module, cache))
    size = sum(p.nbytes for p in works[0].args[0].parameters())
    latents = alone[0][1].latents.nbytes
    floor = max((size + latents) / peaks.bytes_per_second,
                BATCH * length * layer.absorbed_flops / peaks.flops[KIND])
    dense, sparse = seconds([graphed(work) for work in works], bench, STEPS)
    yield [f"decode, {length:,} tokens, the layer", *sides(dense, sparse),
           f"dense at {floor / dense:.0%} of its floor"]
    (module, cache), (indexed, cache_too) = alone
    folded = drawn(BATCH, 1, args.n_heads, args.kv_lora_rank + args.qk_rope_head_dim)
    top = min(args.index_topk, length)
    index = (drawn(BATCH, 1, args.index_n_heads, args.index_head_dim),
             torch.randn(BATCH, 1, args.index_n_heads, device="cuda"), cache_too.index_keys[0],
             torch.ones(BATCH, 1, length + 1, dtype=torch.bool, device="cuda"), top)
    chosen = best_in_pieces(*index)
    everything = (torch.arange(length + 1, device="cuda").expand(BATCH, 1, -1).contiguous(),
                  index[3])
    rest = args.kv_lora_rank, *chosen, indexed.scale
    named = {
        "dense": lambda: few_tokens_gpu.attend(module, folded.flatten(0, 1), cache.latents[0],
                                               cache.at, length + 1),
        "dense, by the sparse kernel": lambda: module.unfold(selected_attention(
            folded, cache.latents[0], args.kv_lora_rank, *everything, module.scale)),
        "sparse": lambda: indexed.unfold(selected_attention(folded, cache_too.latents[0], *rest)),
        "choice": lambda: best_in_pieces(*index)}
    taken = dict(zip(named, seconds([graphed(work) for work in named.values()], bench, STEPS),
                     strict=True))
    floor = max(latents / peaks.bytes_per_second,
                BATCH * length * layer.absorbed_flops / peaks.flops[KIND])
    best = min(taken["dense"], taken["dense, by the sparse kernel"])
    yield [f"decode, {length:,} tokens, attention alone", *sides(best, taken["sparse"]),
           "; ".join(f"{name} {1e3 * t:.3f}" for name, t in taken.items())
           + f"; dense floor {1e3 * floor:.3f}"]


def training_works(layer: Layer, length: int) -> dict[str, Callable[[], None]]:
    """Return forward and backward of the layer by stage."""
    x = drawn(1, length, layer.args.dim)
    rotation = rotations(torch.arange(length, device="cuda"), layer.args)[None]
    works = {}
    for stage, heads in (("dense", 0), ("warmup", None), ("sparse", None)):
        module = layer.module(**{} if heads is None else dict(index_n_heads=heads))
        if stage == "warmup":
            freeze_all_but_indexers(torch.nn.ModuleDict(dict(attn=module)))
        context = Context(rotation, indexer_stage="" if stage == "dense" else stage)
        works[stage] = functools.partial(learn, module, x, context)
    return works


def learn(module: MLA, x: Tensor, context: Context) -> None:
    """Run the layer forward and backward, its input's gradient included."""
    frozen = context.indexer_stage == "warmup"
    out, loss = module(x.detach().requires_grad_(not frozen), context)
    total = out.float().square().mean() if not frozen else 0.0
    (total if loss is None else total + loss).backward()
    module.zero_grad()


def training_rows(layer: Layer, length: int, bench: Bench) -> Iterator[list[str]]:
    """Yield the table's cells for the stages of training, beside dense training."""
    works, memory = training_works(layer, length), {}
    for stage, work in works.items():
        work()
        before, most = watch_memory(work, "cuda")
        memory[stage] = (most - before) / 2 ** 30
    taken = dict(zip(works, seconds(list(works.values()), bench), strict=True))
    for stage in ("warmup", "sparse"):
        yield [f"train, {length:,} tokens, {stage}", *sides(taken["dense"], taken[stage]),
               f"GiB: dense {memory['dense']:.1f}, {stage} {memory[stage]:.1f}"]


def table(bench: Bench) -> Iterator[list[str]]:
    """Compare dense and sparse attention: on a GPU of one layer, on a CPU of the preset's model."""
    yield from (layer_table if bench.settings.device == "cuda" else sparse_table)(bench)


def layer_table(bench: Bench) -> Iterator[list[str]]:
    """Compare one layer's dense and sparse attention at each length up to --context."""
    args = bench.args if bench.args.has_indexer else ModelArgs.preset("v3.2")
    layer, lengths = Layer(args), [bench.settings.context]
    while lengths[0] > SHORTEST:
        lengths.insert(0, max(lengths[0] // STEP, SHORTEST))
    yield [f"{args.n_heads} heads, {args.index_n_heads} of the indexer, k = {args.index_topk:,}",
           "dense ms", "sparse ms", "ratio", "of that"]
    for length in lengths:
        yield prefill_row(layer, length, bench)
        torch.cuda.empty_cache()
    for length in lengths:
        yield from decode_rows(layer, length, bench)
        torch.cuda.empty_cache()
    for length in lengths:
        if length <= LONGEST_TRAINED:
            yield from training_rows(layer, length, bench)
            torch.cuda.empty_cache()
