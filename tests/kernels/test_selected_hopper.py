"""Attention to latents in Gluon, which no interpreter runs: equal to its definition on Hopper."""

import pytest
import torch
from torch import Tensor

from minids.kernels.precision import LOG2_E, gluon_attends

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper")
SCALE = 0.07
WIDTHS = pytest.mark.parametrize("rank, rope, heads",
                                 [(512, 64, 128), (512, 64, 70), (256, 32, 40)])
# Norms of differences over norms: BF16 in, against FP32; sums in FP32 of shares in BF16.
NEAR, SUMS = 1e-2, 1e-4


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def gap(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def defined(q: Tensor, latents: Tensor, seen: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return averages (B, S, H, rank) and sums (B, S, H); seen: (B, S, T)"""
    scores = torch.einsum("bshc,btc->bsht", q.float(), latents.float()) * SCALE
    scores = scores.masked_fill(~seen.unsqueeze(2), float("-inf"))
    shares = scores.softmax(-1).nan_to_num()  # a query that sees nothing averages nothing
    out = torch.einsum("bsht,btc->bshc", shares, latents[..., :rank].float())
    return out, scores.logsumexp(-1) * LOG2_E


def joined(out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Average the pieces by their sums."""
    total = torch.logsumexp(sums / LOG2_E, 0) * LOG2_E
    return (out.float() * (sums - total).exp2().nan_to_num()[..., None]).sum(0), total


def attended(q: Tensor, latents: Tensor, tokens: Tensor | None, slots: Tensor, rank: int, keys: int,
             pieces: int) -> tuple[Tensor, Tensor]:
    """Call the kernel on memory that holds no numbers; q: (units, rows, width)"""
    from minids.kernels import triton_selected_hopper
    units, rows, _ = q.shape
    piece = -(-keys // pieces // 64) * 64
    out = torch.full((-(-keys // piece), units, rows, rank), torch.nan, device="cuda",
                     dtype=torch.bfloat16 if pieces == 1 else torch.float32)
    sums = torch.full(out.shape[:3], torch.nan, device="cuda")
    heads = rows if tokens is not None else rows // slots.size(1)
    triton_selected_hopper.attend(q, latents, tokens, slots, out, sums, keys, piece, SCALE * LOG2_E,
                                  heads)
    return joined(out, sums)


@on_hopper
@WIDTHS
@pytest.mark.parametrize("keys, pieces", [(200, 1), (200, 3), (64, 1), (9, 1), (1000, 2)])
def test_a_selection(rank, rope, heads, keys, pieces):
    """Some entries are empty, all of one query's too."""
    torch.manual_seed(0)
    q, latents = drawn(2, 7, heads, rank + rope), drawn(2, 1200, rank + rope)
    assert gluon_attends(q, rank, heads)
    at = torch.rand(2, 7, 1200, device="cuda").topk(keys).indices
    there = torch.rand(at.shape, device="cuda") < 0.8
    there[1, 3] = False
    seen = torch.zeros(2, 7, 1200, dtype=torch.bool, device="cuda").scatter_(2, at, there)
    out, sums = defined(q, latents, seen, rank)
    for given, right in ((torch.where(there, at, -1 - at).int(), True), (at.int(), False)):
        mine, total = attended(q.flatten(0, 1), latents, given, given, rank, keys, pieces)
        found = gap(mine, out.flatten(0, 1)) < NEAR
        whole = sums.flatten(0, 1).isfinite()
        same = torch.equal(whole, total.isfinite()) and gap(
            total[whole], sums.flatten(0, 1)[whole]) < SUMS
        assert found == same == right


@on_hopper
@WIDTHS
@pytest.mark.parametrize("count, pieces", [(1, 1), (1, 4), (2, 3)])
def test_all_slots_up_to_ones_own(rank, rope, heads, count, pieces):
    torch.manual_seed(0)
    q, latents = drawn(3, count, heads, rank + rope), drawn(3, 500, rank + rope)
    slots = torch.tensor([[3], [255], [450]], device="cuda") + torch.arange(count, device="cuda")
    seen = torch.arange(500, device="cuda") <= slots[..., None]
    out, sums = (t.flatten(1, 2) for t in defined(q, latents, seen, rank))
    for given, right in ((slots, True), (slots - 1, False)):
        mine, total = attended(q.flatten(1, 2), latents, None, given, rank, 480, pieces)
        assert (gap(mine, out) < NEAR and gap(total, sums) < SUMS) == right
