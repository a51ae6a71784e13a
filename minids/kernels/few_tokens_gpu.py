"""A few tokens of every sequence, on a GPU: the decoding step of a block in a dozen kernels.

Written in PyTorch operations a block takes a hundred kernels, most of which move a few kilobytes
and last as long as it takes to start them. Here the kernels are Triton's (`triton_decode`), and
torch's for the products with one matrix:

    norm   product   fold, rotate, store the latent   attend in pieces   merge   product
    add and norm   gate   choose   list by expert   experts up   experts down   add up

With an indexer a second branch runs beside the fold: product, rotate and store the index key,
scores, choose. Attention then waits for both.

Attention looks at the slots that are filled and no others, whatever the cache has room for. Experts
read each weight once, and only those that somebody chose.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels.indexer import best_tokens, fits
from minids.kernels.precision import (
    HOPPER,
    INTERPRETED,
    LOG2_E,
    TRITON,
    gluon_attends,
    in_triton,
    on_hopper,
)
from minids.kernels.registry import REGISTRY, body, mention
from minids.kernels.selected import is_tile

KINDS = torch.bfloat16, torch.float16, torch.float32
MANY = 1024  # tokens of a step; with more the plain definition's products are as quick
MULTIPROCESSORS = 132  # of a large GPU; attention is cut into so many programs, or twice as many
MOST_PIECES = 64  # more take longer to add up than they save
MERGED = 64  # columns of W_UV that one program multiplies
OLDEST = 8, 0  # compute capability; before, V3's widths need more shared memory than a block has


class Joined(NamedTuple):
    """Weights that a decoding session derives for one block.

    down: [wq_a or wq ; wkv_a ; indexer.wk], the matrices that read the block's input
    index_width: rows of the last, 0 where the indexer runs by itself
    routing: makes what the block returns of scores and indices
    """

    down: Tensor
    index_width: int
    routing: Callable[[Tensor, Tensor], tuple]


def takes(args, weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether these kernels take a model: its settings, a weight, the type of products."""
    powers = (args.qk_nope_head_dim, args.v_head_dim, args.kv_lora_rank, args.qk_rope_head_dim)
    known = INTERPRETED or (weight.device.type == "cuda" and dtype in KINDS
                            and torch.cuda.get_device_capability(weight.device) >= OLDEST)
    return (TRITON and known and weight.dtype == dtype
            and all(width >= 16 and width & (width - 1) == 0 for width in powers))


def index_width(args, weight: Tensor) -> int:
    """Return the width of an index key if the indexer's kernels prepare a step, else 0."""
    known = (args.has_indexer and on_hopper(weight)
             and fits(args.index_n_heads, args.index_head_dim) and is_tile(args.kv_lora_rank)
             and not args.index_hadamard and not args.index_fp8)
    return args.index_head_dim if known else 0


def is_joined(block, x: Tensor, context) -> bool:
    """Return whether the decoding session that owns the cache has joined this block's weights."""
    cache = context.cache
    return (cache is not None and cache.joined is not None and cache.at is not None
            and context.absorbed and context.routes is None and torch.is_inference_mode_enabled()
            and x.size(0) * x.size(1) <= MANY)


@body(is_joined)
def joined_block(block, x: Tensor, context) -> tuple:
    """Run `Block.forward` in a dozen kernels."""
    own, rows = context.cache.joined[block.layer], x.flatten(0, 1)  # (N, D)
    kind = own.down.dtype
    n, _ = normalise(rows, block.attn_norm, kind)
    rows, n = normalise(rows, block.ffn_norm, kind, attention(block.attn, own, n, context))[::-1]
    if not block.is_moe:
        hidden = F.silu(F.linear(n, block.ffn.w1.weight)) * F.linear(n, block.ffn.w3.weight)
        return (rows + F.linear(hidden, block.ffn.w2.weight)).view_as(x), None, None
    weights, scores, indices = choose(block.ffn.gate, n)
    out = experts(block.ffn, rows, n, weights, indices)
    found = own.routing(*(t.view(*x.shape[:2], -1) for t in (scores, indices)))
    return out.view_as(x), found, None


def launch(kernel, grid: tuple, first: Tensor, *rest, early: bool = True, **named) -> None:
    """Launch a kernel of a step, on Hopper while the one before it still runs.

    Programmatic dependent launch: a kernel of a few microseconds is over as soon as the next one
    has been launched. early: false where another stream's kernel comes before it, too
    """
    early = early and is_chained(first)
    kernel[grid](first, *rest, EARLY=early, **(dict(launch_pdl=True) if early else {}), **named)


def is_chained(x: Tensor) -> bool:
    """Return whether kernels can be launched early."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= HOPPER


def normalise(x: Tensor, norm, kind: torch.dtype, more: Tensor | None = None
              ) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm of x (N, D), or of x + more, and that sum, in x's type."""
    from minids.kernels import triton_decode as kernels
    total = x if more is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=kind, device=x.device)
    width = x.size(1)
    launch(
        kernels.normalise_kernel, (len(x),), x, x if more is None else more, norm.weight, total,
        out, x.stride(0), norm.eps, width, ADD=more is not None, BLOCK=kernels.power(width),
        num_warps=8 if width > 2048 else 4)
    return out, total


def attention(attn, own: Joined, x: Tensor, context) -> Tensor:
    """Run `MLA.forward` in its absorbed form: (N, D) -> (N, D)"""
    from minids.kernels import triton_decode as kernels
    args, cache, slots = attn.args, context.cache, context.cache.at
    heads, rank, rope = args.n_heads, args.kv_lora_rank, args.qk_rope_head_dim
    widths = dict(H=heads, NOPE=args.qk_nope_head_dim, V=args.v_head_dim, R=rank)
    latents = cache.latents[attn.layer - cache.first_layer]  # (B, slots, W)
    batch, count = len(latents), context.rotation.size(1)
    latent_start = own.down.size(0) - own.index_width - rank - rope
    q, kv, index_k = F.linear(x, own.down).tensor_split(
        (latent_start, latent_start + rank + rope), dim=1)
    c_q = normalise(q, attn.q_norm, x.dtype)[0] if args.q_lora_rank else x
    turn = torch.view_as_real(context.rotation)  # (B or 1, S, rope / 2, 2)
    end, picked = cache.length + count, None
    if own.index_width:
        with beside(x.device):
            picked = choose_tokens(attn, x, c_q, index_k, turn, cache, end)
    q = F.linear(c_q, attn.wq_b.weight) if args.q_lora_rank else q
    folded = x.new_empty(len(x), heads, rank + rope)
    tokens, block = 16, min(rank, 64)
    launch(
        kernels.prepare_kernel, (-(-len(x) // tokens), heads + 1, rank // block), q, kv,
        attn.wkv_b.weight, attn.kv_norm.weight, turn, slots, folded, latents, len(x), count,
        q.stride(0), kv.stride(0), turn.stride(0) if len(turn) > 1 else 0,
        slots.stride(0) if len(slots) > 1 else 0, latents.stride(0), attn.kv_norm.eps, P=rope,
        TOKENS=tokens, BLOCK=block, PRECISION=in_triton(x), **widths)
    if own.index_width:
        meet(x.device)
    if picked is not None:
        from minids.kernels.triton_selected import attend_in_pieces
        parts, sums = attend_in_pieces(folded.view(batch, count, heads, -1), latents[:, :end],
                                       picked, rank, attn.scale)
        return F.linear(merge(attn, parts, sums), attn.wo.weight)
    if attn.indexer is not None and not own.index_width:
        chosen = attn.selection(*(t.view(batch, count, -1) for t in (x, c_q)), context)
        if chosen is not None:
            z = REGISTRY["mla.selected_attention"](folded.view(batch, count, heads, -1),
                                                   latents[:, :end], rank, *chosen, attn.scale)
            return F.linear(attn.unfold(z).flatten(2).flatten(0, 1), attn.wo.weight)
    return F.linear(attend(attn, folded, latents, slots, end), attn.wo.weight)


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream of its own for work beside the current one's; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run the block beside what is launched after it, until `meet`; in a graph, a branch of it."""
    stream = second_stream(device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # None changes nothing
        yield


def meet(device: torch.device) -> None:
    """Let the current stream wait for what ran beside it."""
    if second_stream(device) is not None:
        torch.cuda.current_stream(device).wait_stream(second_stream(device))


def choose_tokens(attn, x: Tensor, c_q: Tensor, index_k: Tensor, turn: Tensor, cache, end: int
                  ) -> Tensor | None:
    """Store the new index keys, and return what each query attends to, (B, S, k); None for all."""
    from minids.kernels.triton_indexer import prepare
    indexer, slots = attn.indexer, cache.at
    keys = cache.index_keys[attn.layer - cache.first_layer]  # (B, slots, index_head_dim)
    every = end <= attn.args.index_topk
    q = None if every else F.linear(c_q, indexer.wq_b.weight)
    q, weights = prepare(indexer, x, index_k, q, turn, slots, keys)
    if every:
        return None
    mention("few_tokens_gpu.choose_tokens", "in_kernels")
    shape = len(keys), turn.size(1)
    return best_tokens(q.view(*shape, *q.shape[1:]), weights.view(*shape, -1), keys[:, :end],
                       slots, attn.args.index_topk)


def fills_hopper(x: Tensor) -> bool:
    """Return whether products of x are Hopper's, which take 64 rows, or no faster than half."""
    return (x.device.type == "cuda" and x.element_size() == 2
            and torch.cuda.get_device_capability(x.device) >= HOPPER)


def attend(attn, folded: Tensor, latents: Tensor, slots: Tensor, end: int) -> Tensor:
    """Attend to the latents of slots before `end`: (N, H, W) -> (N, H * v_head_dim)"""
    from minids.kernels import triton_decode as kernels
    args, batch, (total, heads, width) = attn.args, len(latents), folded.shape
    rank, rows = args.kv_lora_rank, total // batch * heads
    together = max(16, min(kernels.power(rows), 64 if fills_hopper(folded) else 32))
    keys = 64 if together == 64 else 32
    at_once = MULTIPROCESSORS if together == 64 else 2 * MULTIPROCESSORS
    pieces = min(at_once // (batch * -(-rows // together)), -(-end // (2 * keys)), MOST_PIECES)
    piece = -(-end // max(pieces, 1) // keys) * keys
    pieces = -(-end // piece)
    parts = torch.empty(pieces, total, heads, rank, dtype=torch.float32, device=folded.device)
    sums = parts.new_empty(pieces, total, heads)
    if gluon_attends(folded, rank, rows):
        from minids.kernels import triton_selected_hopper
        triton_selected_hopper.attend(folded.view(batch, rows, width), latents, None, slots, parts,
                                      sums, end, piece, attn.scale * LOG2_E, heads)
    else:
        launch(
            kernels.attend_kernel, (batch, -(-rows // together), pieces), folded, latents, slots,
            parts, sums, slots.stride(0) if len(slots) > 1 else 0, latents.stride(0),
            attn.scale * LOG2_E, rows, piece, H=heads, R=rank, P=args.qk_rope_head_dim,
            HEADS=together, KEYS=keys, PRECISION=in_triton(folded), num_stages=2,
            num_warps=4 if together == 16 else 8, early=attn.indexer is None)
    return merge(attn, parts, sums)


def merge(attn, parts: Tensor, sums: Tensor) -> Tensor:
    """Average pieces (pieces, N, H, R) by their sums, and fold W_UV in: (N, H * v_head_dim)"""
    from minids.kernels import triton_decode as kernels
    args, weight, tokens = attn.args, attn.wkv_b.weight, 16
    pieces, total, heads, rank = parts.shape
    out = torch.empty(total, heads * args.v_head_dim, dtype=weight.dtype, device=weight.device)
    block = min(args.v_head_dim, MERGED)
    launch(
        kernels.merge_kernel, (-(-total // tokens), heads, args.v_head_dim // block), parts, sums,
        weight, out, total, pieces, H=heads, NOPE=args.qk_nope_head_dim, V=args.v_head_dim, R=rank,
        TOKENS=tokens, BLOCK=block, ALL=kernels.power(pieces), PRECISION=in_triton(weight))
    return out


def choose(gate, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run `Gate.forward`: (N, D) -> weights (N, K) FP32, scores (N, E) FP32, indices (N, K)"""
    from minids.kernels import triton_decode as kernels
    args, n, number = gate.args, len(x), gate.args.n_routed_experts
    k, block = args.n_activated_experts, min(kernels.power(x.size(1)), 1024)
    new = dict(dtype=torch.float32, device=x.device)
    logits, scores, weights = (torch.empty(n, w, **new) for w in (number, number, k))
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    launch(kernels.gate_kernel, (n, -(-number // 4)), x, gate.weight, logits, x.size(1), number,
           EXPERTS=4, BLOCK=block)
    launch(
        kernels.choose_kernel, (n,), logits, logits if gate.bias is None else gate.bias,
        scores, indices, weights, args.route_scale, E=number, K=k, GROUPS=args.n_expert_groups,
        LIMITED=args.n_limited_groups, SIGMOID=args.score_func == "sigmoid",
        BIAS=gate.bias is not None, ALL=kernels.power(number), FEW=kernels.power(k),
        GROUPS_BLOCK=kernels.power(args.n_expert_groups), num_warps=1)
    return weights, scores, indices


def experts(moe, x: Tensor, n: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Return x plus what routed and shared experts make of n: x, n (N, D), the rest (N, K)"""
    from minids.kernels import triton_decode as kernels
    w1, w2, w3 = moe.experts.w1, moe.experts.w2, moe.experts.w3
    (number, inner, width), (tokens, k) = w1.shape, indices.shape
    shared = moe.args.n_shared_experts
    s1, s2, s3 = ((w1, w2, w3) if not shared else
                  (getattr(moe.shared_experts, name).weight for name in ("w1", "w2", "w3")))
    pairs = torch.empty(number, tokens * k, dtype=torch.int32, device=x.device)
    counts = pairs.new_empty(number)
    launch(
        kernels.list_kernel, (number,), indices, pairs, counts, tokens * k,
        BLOCK=kernels.power(tokens * k), num_warps=1 if tokens * k <= 256 else 4)
    # Without tensor cores a product is written out number by number: small ones compile in time.
    half = n.element_size() == 2
    rows = max(16, min(kernels.power(2 * tokens * k // number), 64 if half else 16))
    sizes = tokens, k, width, inner, number
    hidden = torch.empty(tokens * (k + shared), inner, dtype=n.dtype, device=x.device)
    how = dict(ROWS=rows, BLOCK=128 if half else 32, PRECISION=in_triton(n),
               num_stages=4 if half else 2)
    cols = 32 if rows == 16 else 64
    launch(
        kernels.up_kernel, (-(-inner // cols), number + shared), n, w1, w3, s1, s3,
        pairs, counts, hidden, *sizes, COLS=cols, **how)
    out = torch.empty(len(hidden), width, dtype=n.dtype, device=x.device)
    launch(
        kernels.down_kernel, (-(-width // cols), number + shared), hidden, w2, s2,
        pairs, counts, out, *sizes, shared, COLS=cols, **how)
    summed, block = torch.empty_like(x), min(kernels.power(width), 1024)
    launch(
        kernels.combine_kernel, (tokens, -(-width // block)), x, out, weights, summed,
        tokens, width, K=k, SHARED=shared, BLOCK=block)
    return summed
