"""Sparse attention's kernels in Triton, by its interpreter or on a GPU: the choice; a whole model.

What each body computes is `test_bodies.py`'s and `test_gpu_bodies.py`'s.
"""

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from small_models import LITTLE, random_tokens, scrambled
from torch import Tensor

from minids.base import command_line
from minids.infer.decoding import new_cache
from minids.kernels import indexer, selected
from minids.kernels.attention import causal
from minids.kernels.registry import recorded, using
from minids.model.cache import LatentCache
from minids.model.sparse_attention import Selection, select

INTERPRETED = triton_interpreter.running()
DEVICE = "cpu" if INTERPRETED else "cuda"
inside = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                            reason="runs in the interpreter's subprocess, or on a GPU")
WIDTHS = dict(kv_lora_rank=32, qk_rope_head_dim=16, index_n_heads=16, index_head_dim=16,
              index_topk=6)


@pytest.mark.skipif(INTERPRETED, reason="starts the subprocess")
def test_by_the_interpreter():
    triton_interpreter.run(__file__)


@pytest.mark.skipif(INTERPRETED, reason="of a process without the interpreter")
@pytest.mark.parametrize("changes, card, lacking", [
    ({}, (9, 0), ""), (dict(index_n_heads=0), (8, 0), ""),
    ({}, (8, 0), "the card is older than Hopper, compute capability 9.0"),
    (dict(kv_lora_rank=24), (9, 0), "kv_lora_rank = 24 is no power of two from 16 to 512"),
    (dict(index_n_heads=256), (10, 0), "index_n_heads = 256 is above 128")])
def test_what_the_kernels_lack_is_said_once(monkeypatch, capsys, changes, card, lacking):
    args, gpu = replace(LITTLE, **(WIDTHS | changes)), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: card)
    monkeypatch.setattr(selected, "TRITON", True)
    assert selected.missing(args, gpu) == lacking
    assert selected.missing(args, torch.device("cpu")) == ""
    monkeypatch.setattr(selected, "TRITON", False)
    assert bool(selected.missing(args, gpu)) == args.has_indexer
    monkeypatch.setattr(selected, "missing", lambda args, device: lacking)
    monkeypatch.setattr(command_line, "SAID", set())
    model = scrambled(LITTLE)
    for _ in range(2):
        new_cache(model, 1, 8)
    assert capsys.readouterr().err == (lacking and (
        f"sparse attention: {lacking}; it runs in PyTorch operations, slower than dense\n"))


def chosen(scores: Tensor, visible: Tensor | None, k: int) -> Selection:
    from minids.kernels import triton_choice
    batch, count, total = scores.shape
    indices = torch.full((batch, count, k), -1, device=scores.device)
    seen = torch.zeros(batch, count, k, dtype=torch.bool, device=scores.device)
    triton_choice.select(scores, visible, total - count, indices, seen)
    return Selection(indices, seen)


def require_topk(scores: Tensor, visible: Tensor | None, k: int) -> None:
    """Assert that the choice is `select`'s, and that no position stands twice."""
    past = causal(*scores.shape[1:], scores.device) if visible is None else visible
    found, wanted = chosen(scores, visible, k), select(scores, past, k)
    assert torch.equal(found.mask(scores.size(2)), wanted.mask(scores.size(2)))
    assert all(len(set(row.tolist())) == k for row in found.indices.flatten(0, 1))


@inside
@pytest.mark.parametrize("batch, queries, keys", [(2, 5, 40), (1, 3, 7), (1, 2, 300), (1, 1, 5000)])
def test_the_choice_is_topks(batch, queries, keys):
    """Numbers of either sign; queries that see fewer than k, and none; one row in pieces."""
    torch.manual_seed(0)
    scores, past = torch.randn(batch, queries, keys, device=DEVICE), causal(queries, keys, DEVICE)
    for k in (1, 5, min(keys, 30)):
        require_topk(scores, None, k)
    require_topk(scores, past & (torch.rand_like(scores) < 0.3), 5)
    with pytest.raises(AssertionError):  # the largest negative numbers are not the smallest
        assert torch.equal(chosen(-scores, None, 5).mask(keys), chosen(scores, None, 5).mask(keys))


@inside
def test_the_choice_is_topks_where_the_sample_misleads():
    """The best stand where the sample looks, and where it does not: more, and fewer, than listed.

    For k = 10 it looks at 64 numbers of 1,024, every sixteenth.
    """
    scores, at = torch.rand(1, 1, 1024, device=DEVICE), torch.arange(1024, device=DEVICE)
    for raised in (at % 16 == 0, at % 16 != 0, at >= 0):
        for height in (2.0, -2.0):
            require_topk(scores + height * raised, None, 10)


@inside
def test_of_equal_scores_the_earliest_are_chosen():
    """ReLU makes many zeros; a number just below them stays out."""
    for length in (20, 900):  # listed, and too many to list
        scores = torch.zeros(1, 1, length, device=DEVICE)
        scores[..., 3], scores[..., 11], scores[..., :2] = 1.0, 1e-40, -1e-40
        assert chosen(scores, None, 5).indices.tolist() == [[[2, 3, 4, 5, 11]]]


@inside
@torch.no_grad()
def test_a_model_reads_and_continues_as_with_the_plain_definitions(monkeypatch):
    """Prompts of unequal length, choices in pieces; the same selections, so nearly equal logits."""
    monkeypatch.setattr(indexer, "PIECE", 100)
    args = replace(LITTLE, **WIDTHS)
    model = scrambled(args, dtype=torch.float32).to(DEVICE)
    tokens, found = random_tokens(args, 3, 14).to(DEVICE), []
    for setting in ("auto", "off"):
        cache, states = LatentCache(args, 3, 20, DEVICE), []
        with using(setting), recorded() as record:
            states.append(model(tokens[:, :11], cache))
            cache.truncate(torch.tensor([9, 11, 5], device=DEVICE))
            states.append(model(tokens[:, 11:12], cache, absorbed=True))
            states.append(model(tokens[:, 12:], cache, absorbed=True))
        found.append(states)
        bodies = {chosen for name, chosen in record if "parse" in name or "selected" in name}
        assert bodies == ({"attend_selected", "absorbed_for_naive", "select_in_pieces"}
                          if setting == "auto" else {"plain"}), bodies
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()  # FP32, sums in another order, 3 layers


@inside
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_both_stages_learn_as_with_the_plain_definitions(stage, monkeypatch):
    monkeypatch.setattr(indexer, "PIECE", 100)
    args = replace(LITTLE, **WIDTHS)
    tokens, found = random_tokens(args, 2, 12).to(DEVICE), []
    for setting in ("auto", "off"):
        model = scrambled(args, dtype=torch.float32).to(DEVICE)
        with using(setting), recorded() as record:
            losses = model.loss(tokens, tokens.roll(-1, 1), dsa=stage)
            losses.total.backward()
        found.append([losses.indexer.detach(), *(p.grad for p in model.parameters()
                                                 if p.grad is not None)])
        losses = {chosen for name, chosen in record if name.endswith("indexer_loss")}
        body = {"warmup": "loss_over_all", "sparse": "loss_over_selection"}[stage]
        assert losses == {body if setting == "auto" else "plain"}
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
