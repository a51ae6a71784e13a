"""Plan the journey of tokens to the ranks of their experts, for all ranks in one process.

two_ranks.py and four_ranks.py run it with one process per rank.
"""

import pytest
import torch

from minids.model.moe import ALIGN
from minids.parallel.experts import arriving, leaving, plan_journey


def test_a_token_leaves_once_for_each_rank_that_has_one_of_its_experts():
    """The example of the docstring, and one where all go to one rank of three."""
    slot, source, numbers = leaving(torch.tensor([[0, 1], [0, 3], [2, 3]]), 2, 2)
    assert slot.tolist() == [[0, 4], [1, 2], [4, 3]] and numbers.tolist() == [2, 2]
    assert source[:4].tolist() == [0, 1, 1, 2]
    slot, source, numbers = leaving(torch.tensor([[3, 2], [2, 3]]), 4, 3)
    assert slot.tolist() == [[0, 2], [1, 2]] and source[:2].tolist() == [0, 1]
    assert numbers.tolist() == [2, 0, 0]


def test_a_rank_plans_for_the_tokens_that_come_to_it():
    """Two ranks with two experts and three tokens each; this one has the first two experts."""
    own = torch.tensor([[[0, 1], [0, 3], [2, 3]], [[3, 2], [1, 2], [1, 0]]])
    weights = torch.arange(1.0, 13.0).view(2, 3, 2)
    numbers, slot, source, counts, share = arriving(own, weights, 2)
    assert numbers.tolist() == [[2, 3], [2, 3]]  # tokens 0 and 1 of each; pairs
    assert counts.tolist() == [3, 9]  # all twelve slots are used, six with a weight of 0
    assert slot.tolist() == [[0, 3], [1, 6], [4, 11], [5, 2], *[[11, 11]] * 3]
    assert source[[0, 3, 1, 4, 5, 2]].tolist() == [0, 0, 1, 2, 3, 3]
    assert share[[0, 3, 1, 4, 5, 2]].tolist() == [1, 2, 3, 9, 11, 12] and share[6:].sum() == 0


@pytest.mark.parametrize("ranks, held, n, k, crowded", [
    (2, 2, 3, 2, False), (4, 1, 7, 2, False), (3, 5, 200, 4, False), (1, 3, 5, 3, False),
    (4, 4, 33, 8, True), (2, 3, 150, 2, True)])
def test_what_comes_back_is_the_weighed_sum_of_a_tokens_experts(ranks, held, n, k, crowded):
    """Crowded: all tokens visit the first experts, and some ranks get nothing."""
    torch.manual_seed(0)
    chosen = torch.rand(ranks, n, ranks * held)
    if crowded:
        chosen[..., k:] -= 1
    indices = chosen.topk(k).indices
    weights, x = torch.rand(ranks, n, k).double(), torch.randn(ranks, n, 4).double()
    matrices = torch.randn(ranks * held, 4, 4).double()
    told = torch.cat([indices.double(), weights], dim=-1)
    plans = [plan_journey(told, indices[rank], rank * held, held) for rank in range(ranks)]
    sent = torch.stack([plan.numbers[:, 0] for plan in plans])  # (from, to)
    rows = [x[rank][plan.leaving[:sent[rank].sum()]].split(sent[rank].tolist())
            for rank, plan in enumerate(plans)]
    back = [[] for _ in plans]
    for rank, plan in enumerate(plans):
        assert plan.numbers[:, 1].equal(sent[:, rank])
        arrived = torch.cat([*(row[rank] for row in rows), torch.zeros(1, 4)])
        used = min(int(plan.numbers[:, 2].sum()) + held * (ALIGN - 1) + 1, len(plan.source))
        assert plan.counts.sum() == used and plan.slot.max() < used
        expert = torch.arange(rank * held, (rank + 1) * held).repeat_interleave(plan.counts)
        out = torch.einsum("mij,mj->mi", matrices[expert], arrived[plan.source[:used]])
        results = (out * plan.share[:used, None])[plan.slot[:len(arrived)]].sum(1)[:-1]
        for own, part in zip(back, results.split(sent[:, rank].tolist()), strict=True):
            own.append(part)
    for rank, plan in enumerate(plans):
        y = torch.cat([*back[rank], torch.zeros(1, 4)])[plan.left].sum(1)
        wanted = torch.einsum("nk,nkij,nj->ni", weights[rank], matrices[indices[rank]], x[rank])
        assert torch.allclose(y, wanted, rtol=0, atol=1e-12)  # sums in another order
