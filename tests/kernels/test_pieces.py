"""Check how large the pieces are in which rows and queries are processed."""

import pytest
import torch

from minids.kernels import cross_entropy, indexer
from minids.model.sparse_attention import indexer_loss

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype, words, rows, taken", [
    (torch.float32, 2 ** 8, 2 ** 13 + 1, [2 ** 13, 1]),
    (torch.float16, 2 ** 8, 4097, [4096, 1]),
    (torch.float16, 2 ** 10, 2 ** 11 + 1, [2 ** 11, 1]),
    (torch.float32, 2 ** 21 + 1, 2, [1, 1])])
def test_cross_entropy_takes_as_many_rows_as_fit_and_4096_in_fp16(dtype, words, rows, taken):
    """FP16 sums of more rows' gradients would grow too large."""
    found = []

    def middle(logits, targets):
        assert len(targets) == len(logits)
        found.append(len(logits))
        return logits.new_zeros(()), logits

    cross_entropy.Chunked.apply(torch.zeros(rows, 1, dtype=dtype), torch.zeros(words, 1),
                                torch.zeros(rows, dtype=torch.int64), 1, middle)
    assert found == taken


@pytest.mark.parametrize("most, parts", [
    (12, [(0, 2), (2, 4), (4, 5)]), (11, [(n, n + 1) for n in range(5)]), (60, [(0, 5)]),
    (1, [(n, n + 1) for n in range(5)])])
def test_a_piece_has_as_many_queries_as_its_scores_allow(most, parts, monkeypatch):
    """Five queries and three keys, of two sequences or of two heads of one sequence."""
    for name in ("SCORES", "PIECE"):
        monkeypatch.setattr(indexer, name, most)
    for found in (indexer.few_queries(5, torch.empty(1, 3, 7), 2), indexer.pieces(2, 5, 3)):
        assert [(part.start, part.stop) for part in found] == parts


def test_gradients_of_an_indexer_s_pieces_add_up_in_fp32(monkeypatch):
    """And are rounded once, to the type of what learns; here a piece is one query."""
    monkeypatch.setattr(indexer, "SCORES", 1)
    torch.manual_seed(0)
    own = [torch.randn(1, 24, 2, 4), torch.randn(1, 24, 2), torch.randn(1, 24, 4)]
    own = [t.to(kind) for t, kind in zip(own, (BF16, F32, BF16), strict=True)]
    q, k = torch.randn(2, 1, 24, 1, 4)
    found = []
    for learning in (own, [t.float() for t in own]):
        learning = [t.requires_grad_() for t in learning]
        loss = indexer_loss(*learning, q, k, None, 0.5)
        found.append(torch.autograd.grad(loss, learning))
    for rounded, whole in zip(*found, strict=True):
        assert torch.equal(rounded, whole.to(rounded.dtype))
