"""The k best scores of each query, in Triton, without sorting a row.

A row of few scores stays in registers. Of a longer one most is out of the question: of 131,072
scores 2,048 are wanted. A sample of the row tells a bound that a few more than k scores reach;
those are listed, and the k-th best is looked for among them only, in registers. Where the sample
misled, or many scores are equal, the row itself is searched: slower, and as exact.

Scores become integers of the same order. The k-th largest is found bit by bit: the largest bound
that k numbers or more reach. Letters: query s sees the keys t <= first + s, or those of its mask,
or those up to its own edge; SEES is 0, 1, 2. Chosen keys are written as t, and where fewer than k
are seen, unseen ones as -1 - t, so that no position stands twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 132  # multiprocessors of a large GPU; fewer rows than these are listed in pieces
MOST_PIECES = 16
SHORT = 16384  # scores of a row that stay in registers; of many rows a quarter
HIDDEN = tl.constexpr(-2147483648)  # the number of a score that its query does not see


@triton.jit
def stop_at(visible, b, s, T, first, visible_batch, visible_row, SEES: tl.constexpr):
    """Return the position after the last that a query may see."""
    if SEES == 2:
        edge = tl.load(visible + b * visible_batch + s * visible_row).to(tl.int32)
        return tl.minimum(T, edge + 1)
    return T if SEES == 1 else tl.minimum(T, first + s + 1)


@triton.jit
def numbers_at(row, own, t, there, SEES: tl.constexpr):
    """Return int32 numbers in the order of the scores at positions t, HIDDEN where not seen."""
    if SEES == 1:
        there = there & (tl.load(own + t, mask=there, other=0) != 0)
    bits = tl.load(row + t, mask=there, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(there, bits ^ ((bits >> 31) & 2147483647), HIDDEN)


@triton.jit
def kth(numbers, k, BITS: tl.constexpr):
    """Return the largest bound that k of the numbers or more reach; HIDDEN if fewer are seen.

    The search ends where k reach a bound exactly: the same numbers reach the largest.
    BITS: how many of its 31 are found; with 20 it is lower by a 4,096th of a score at most
    """
    seen = tl.sum((numbers > HIDDEN).to(tl.int32), axis=0)
    above = tl.sum((numbers >= 0).to(tl.int32), axis=0)
    bound = tl.where(above >= k, 0, HIDDEN)
    reach = tl.where(above >= k, above, tl.maximum(seen, k))
    step = tl.full((), 1073741824, tl.int32)
    while (step >= 1 << (31 - BITS)) & (reach != k):
        count = tl.sum((numbers >= bound + step).to(tl.int32), axis=0)
        bound = tl.where(count >= k, bound + step, bound)
        reach = tl.where(count >= k, count, reach)
        step = step >> 1
    return bound


@triton.jit
def places(numbers, there, bound, k, MANY: tl.constexpr):
    """Return which numbers are the k best, and the place of each among them.

    bound: of `kth`; there: those that may be chosen; of equal ones the earliest are best
    One sum counts both kinds, those above the bound and those at it; MANY: above 16,384 numbers
    """
    kind: tl.constexpr = tl.int64 if MANY else tl.int32
    HALF: tl.constexpr = 32 if MANY else 16
    above, equal = numbers > bound, there & (numbers == bound)
    missing = k - tl.sum(above.to(tl.int32), axis=0)
    counts = tl.cumsum(above.to(kind) + (equal.to(kind) << HALF), axis=0)
    equals = (counts >> HALF).to(tl.int32)
    before = (counts & ((1 << HALF) - 1)).to(tl.int32) + tl.minimum(equals, missing)
    return above | (equal & (equals <= missing)), before - 1


@triton.jit
def best_of_row_kernel(scores, visible, tokens, S, T, pitch, first, visible_batch, visible_row,
                       place_batch, k, SEES: tl.constexpr, ALL: tl.constexpr):
    """Write the k best of one row (B, S, T), by position: tokens (B, S, k) int32

    pitch: numbers from one row to the next, T or more; ALL: a power of two not below T
    """
    s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    stop = stop_at(visible, b, s, T, first, visible_batch, visible_row, SEES)
    t, own = tl.arange(0, ALL), visible + b * visible_batch + s * visible_row
    number = numbers_at(scores + (b * S + s) * pitch, own, t, t < stop, SEES)
    bound = kth(number, k, 31)  # HIDDEN where fewer are seen, and then the first unseen fill up
    best, place = places(number, t < T, bound, k, ALL > 16384)
    at = b * place_batch + s * k + place
    tl.store(tokens + at, tl.where(number == HIDDEN, -1 - t, t), mask=best)


@triton.jit
def reaching(row, own, stop, guess, SEES: tl.constexpr, BLOCK: tl.constexpr):
    """Count the scores of a row that reach a bound."""
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, stop, BLOCK):
        t = start + tl.arange(0, BLOCK)
        counts += (numbers_at(row, own, t, t < stop, SEES) >= guess).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def search_row(row, own, tokens, T, stop, k, SEES: tl.constexpr, BLOCK: tl.constexpr):
    """Do what `best_kernel` does without a list: pass over the row again and again."""
    total = reaching(row, own, stop, HIDDEN + 1, SEES, BLOCK)
    bound = tl.full((), HIDDEN, tl.int32)
    if total > k:
        bound = tl.where(reaching(row, own, stop, 0, SEES, BLOCK) >= k, 0, HIDDEN)
        step = tl.full((), 1073741824, tl.int32)
        for _ in range(31):
            guess = bound + step
            reach = reaching(row, own, stop, guess, SEES, BLOCK)
            bound = tl.where(reach >= k, guess, bound)
            step = step >> 1
    missing = k - reaching(row, own, stop, bound + 1, SEES, BLOCK)
    taken = tl.full((), 0, tl.int32)
    equals = tl.full((), 0, tl.int32)
    hidden = tl.full((), 0, tl.int32)
    for start in range(0, tl.maximum(stop, k), BLOCK):
        t = start + tl.arange(0, BLOCK)
        number = numbers_at(row, own, t, t < stop, SEES)
        there = number != HIDDEN
        equal = (there & (number == bound)).to(tl.int32)
        unseen = ((t < T) & ~there).to(tl.int32)
        best = there & ((number > bound)
                        | ((equal > 0) & (equals + tl.cumsum(equal, axis=0) <= missing)))
        fills = (unseen > 0) & (hidden + tl.cumsum(unseen, axis=0) <= k - total)
        chosen = (best | fills).to(tl.int32)
        at = taken + tl.cumsum(chosen, axis=0) - 1
        tl.store(tokens + at, tl.where(best, t, -1 - t), mask=chosen > 0)
        taken += tl.sum(chosen, axis=0)
        equals += tl.sum(equal, axis=0)
        hidden += tl.sum(unseen, axis=0)


@triton.jit
def listed(row, own, t, there, bound, numbers, positions, found, SEES: tl.constexpr,
           MOST: tl.constexpr):
    """Add those that reach the bound to a list of `found`; return how many it then has."""
    number = numbers_at(row, own, t, there, SEES)
    take = (number >= bound).to(tl.int32)
    to = found + tl.cumsum(take, axis=0) - 1
    keep = (take > 0) & (to < MOST)
    tl.store(numbers + to, number, mask=keep)
    tl.store(positions + to, t, mask=keep)
    return found + tl.sum(take, axis=0)


@triton.jit
def candidates_kernel(scores, visible, numbers, positions, counts, S, T, pitch, first,
                      visible_batch, visible_row, piece, k, SEES: tl.constexpr,
                      SAMPLE: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """List what may be among the k best in one piece of one row of scores (B, S, T).

    numbers, positions: (B, S, pieces, MOST) int32; counts: (B, S, pieces) int32, above MOST where
    the list has no room. All pieces of a row look at the same sample, and so have the same bound.
    """
    s, b, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row, own = scores + (b * S + s) * pitch, visible + b * visible_batch + s * visible_row
    stop = stop_at(visible, b, s, T, first, visible_batch, visible_row, SEES)
    stride = tl.cdiv(stop, SAMPLE)
    at = tl.arange(0, SAMPLE) * stride
    # Of the sample `few` are expected among the k best. One row in a thousand has three deviations
    # more, and all others would wait for its search; five happen to nobody, and the list has room.
    few = k // stride
    wanted = few + (5.0 * tl.sqrt(few.to(tl.float32))).to(tl.int32) + 1
    bound = tl.maximum(kth(numbers_at(row, own, at, at < stop, SEES), wanted, 20), HIDDEN + 1)
    place = (b * S + s) * tl.num_programs(2) + part
    begin, end = part * piece, tl.minimum(stop, (part + 1) * piece)
    rest = end - tl.maximum(end - begin, 0) % BLOCK
    found, i = tl.full((), 0, tl.int32), tl.arange(0, BLOCK)
    numbers, positions = numbers + place * MOST, positions + place * MOST
    for start in range(begin, rest, BLOCK):  # without a mask four scores are one read
        found = listed(row, own, start + i, tl.full((BLOCK,), 1, tl.int1), bound, numbers,
                       positions, found, SEES, MOST)
    if rest < end:
        found = listed(row, own, rest + i, rest + i < end, bound, numbers, positions, found, SEES,
                       MOST)
    tl.store(counts + place, found)


@triton.jit
def best_kernel(scores, visible, numbers, positions, counts, tokens, S, T, pitch, first,
                visible_batch, visible_row, place_batch, pieces, k, SEES: tl.constexpr,
                MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Do what `best_of_row_kernel` does, with what `candidates_kernel` listed."""
    s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, own = scores + (b * S + s) * pitch, visible + b * visible_batch + s * visible_row
    i = tl.arange(0, MOST)
    number, t = tl.full((MOST,), HIDDEN, tl.int32), tl.zeros((MOST,), tl.int32)
    total = tl.full((), 0, tl.int32)
    for part in range(pieces):
        listed = (b * S + s) * pieces + part
        count = tl.load(counts + listed)
        inside = (i >= total) & (i < total + count)
        source = listed * MOST + i - total
        number = tl.where(inside, tl.load(numbers + source, mask=inside, other=0), number)
        t = tl.where(inside, tl.load(positions + source, mask=inside, other=0), t)
        total += count
    to = b * place_batch + s * k
    if (total >= k) & (total <= MOST):
        best, place = places(number, i < total, kth(number, k, 31), k, MOST > 16384)
        tl.store(tokens + to + place, t, mask=best)
    else:
        stop = stop_at(visible, b, s, T, first, visible_batch, visible_row, SEES)
        search_row(row, own, tokens + to, T, stop, k, SEES, BLOCK)


def select(scores: Tensor, visible: Tensor | None, first: int, tokens: Tensor) -> None:
    """Write the k best of each row of scores (B, S, T) FP32 to tokens, (B, S, k) int32

    scores: contiguous, or the first T of longer rows that are

    visible: (B or 1, S, T) bool, or (B or 1, S) int64, the last position that each query sees;
        None: query s sees the positions up to first + s
    """
    (batch, count, total), k = scores.shape, tokens.size(2)
    mask, sees = (scores, 0) if visible is None else (visible, 4 - visible.dim())
    if sees == 1:
        mask = (mask if mask.stride(2) == 1 else mask.contiguous()).view(torch.uint8)
    strides = mask.stride(0) if len(mask) > 1 else 0, mask.stride(1)
    edges, few = (count, total, scores.stride(1), first), batch * count <= PROGRAMS
    if total <= (SHORT if few else SHORT // 4):
        best_of_row_kernel[(count, batch)](
            scores, mask, tokens, *edges, *strides, tokens.stride(0), k, SEES=sees,
            ALL=max(16, triton.next_power_of_2(total)),
            num_warps=4 if total <= 2048 else 8 if total <= 8192 else 16)
        return
    most, block = max(16, triton.next_power_of_2(2 * k)), min(2048, triton.next_power_of_2(total))
    pieces = max(1, min(PROGRAMS // (batch * count), MOST_PIECES, triton.cdiv(total, block)))
    piece = triton.cdiv(triton.cdiv(total, pieces), block) * block
    pieces = triton.cdiv(total, piece)
    numbers, positions = torch.empty(2, batch, count, pieces, most, dtype=torch.int32,
                                     device=scores.device)
    counts = numbers.new_empty(batch, count, pieces)
    given = scores, mask, numbers, positions, counts
    how = dict(SEES=sees, MOST=most, num_warps=8 if most >= 1024 else 4)
    sample = min(2 * most, max(16, triton.next_power_of_2(total) // 8))  # tells as much as all
    candidates_kernel[(count, batch, pieces)](*given, *edges, *strides, piece, k, SAMPLE=sample,
                                              BLOCK=block, **how)
    best_kernel[(count, batch)](*given, tokens, *edges, *strides, tokens.stride(0), pieces, k,
                                BLOCK=block, **how)
