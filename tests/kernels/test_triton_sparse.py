"""Sparse attention's kernels in Triton, by its interpreter or on a GPU: the choice; a whole model.

What each body computes is `test_bodies.py`'s and `test_gpu_bodies.py`'s.
"""

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from small_models import LITTLE, random_tokens, scrambled
from test_bodies import INDEXER, joined_case
from torch import Tensor

from minids.base import command_line
from minids.fp8 import rounded_to_fp8
from minids.infer.decoding import new_cache
from minids.kernels import indexer, selected
from minids.kernels.attention import causal
from minids.kernels.registry import recorded, using
from minids.model.cache import LatentCache
from minids.model.sparse_attention import Selection, index_scores, select

INTERPRETED = triton_interpreter.running()
DEVICE = "cpu" if INTERPRETED else "cuda"
inside = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                            reason="runs in the interpreter's subprocess, or on a GPU")
WIDTHS = dict(kv_lora_rank=32, qk_rope_head_dim=16, index_n_heads=16, index_head_dim=16,
              index_topk=6)


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
    """Choose with the kernels, from rows that end with what is no score."""
    from minids.kernels import triton_choice
    batch, count, total = scores.shape
    tokens = torch.full((batch, count, k), 2 ** 30, dtype=torch.int32, device=scores.device)
    rows = torch.nn.functional.pad(scores, (0, 3), value=torch.nan)[..., :total]
    triton_choice.select(rows, visible, total - count, tokens)
    return Selection((tokens ^ (tokens >> 31)).long(), tokens >= 0)


def require_topk(scores: Tensor, visible: Tensor | None, k: int) -> None:
    """Assert that the choice is `select`'s, and that no position stands twice."""
    past = causal(*scores.shape[1:], scores.device) if visible is None else visible
    if past.dim() == 2:  # the last that each sees
        past = torch.arange(scores.size(2), device=scores.device) <= past[..., None]
    found, wanted = chosen(scores, visible, k), select(scores, past, k)
    assert torch.equal(found.mask(scores.size(2)), wanted.mask(scores.size(2)))
    assert all(len(set(row.tolist())) == k for row in found.indices.flatten(0, 1))


@pytest.fixture(params=[0, 16384], ids=["listed", "in registers"])
def short(request, monkeypatch):
    """Set up to how many scores a row stays in registers."""
    monkeypatch.setattr("minids.kernels.triton_choice.SHORT", request.param)


@inside
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("batch, queries, keys", [
    (1, 3, 7), *(pytest.param(*shape, marks=pytest.mark.slow)
                 for shape in ((2, 5, 40), (1, 2, 300), (1, 1, 5000)))])
def test_the_choice_is_topks(batch, queries, keys):
    """Numbers of either sign; queries that see fewer than k, and none; one row in pieces."""
    torch.manual_seed(0)
    scores, past = torch.randn(batch, queries, keys, device=DEVICE), causal(queries, keys, DEVICE)
    edges = torch.randint(keys, (batch, queries), device=DEVICE)
    for k, seen in ((1, None), (5, None), (5, edges), (min(keys, 30), edges)):
        require_topk(scores, seen, k)
    require_topk(scores, past & (torch.rand_like(scores) < 0.3), 5)
    with pytest.raises(AssertionError):  # the largest negative numbers are not the smallest
        assert torch.equal(chosen(-scores, None, 5).mask(keys), chosen(scores, None, 5).mask(keys))
    with pytest.raises(AssertionError):  # an edge is the last position that is seen, not the next
        assert torch.equal(chosen(scores, edges, keys).seen, chosen(scores, edges - 1, keys).seen)


@inside
@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_choice_is_topks_where_the_sample_misleads():
    """The best stand where the sample looks, and where it does not: more, and fewer, than listed.

    For k = 10 it looks at 64 numbers of 1,024, every sixteenth.
    """
    scores, at = torch.rand(1, 1, 1024, device=DEVICE), torch.arange(1024, device=DEVICE)
    for raised in (at % 16 == 0, at % 16 != 0, at >= 0):
        for height in (2.0, -2.0):
            require_topk(scores + height * raised, None, 10)


@inside
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("length", [20, pytest.param(900, marks=pytest.mark.slow)])
def test_of_equal_scores_the_earliest_are_chosen(length):
    """ReLU makes many zeros; a number just below them stays out. Listed, and too many to list."""
    scores = torch.zeros(1, 1, length, device=DEVICE)
    scores[..., 3], scores[..., 11], scores[..., :2] = 1.0, 1e-40, -1e-40
    assert chosen(scores, None, 5).indices.tolist() == [[[2, 3, 4, 5, 11]]]


@inside
@torch.no_grad()
def test_a_model_reads_and_continues_as_with_the_plain_definitions(monkeypatch):
    """Prompts of unequal length, choices in pieces; the same selections, so nearly equal logits."""
    monkeypatch.setattr(indexer, "PIECE", 50)
    args = replace(LITTLE, **WIDTHS, n_layers=1)
    model = scrambled(args, dtype=torch.float32).to(DEVICE)
    tokens, found = random_tokens(args, 2, 11).to(DEVICE), []
    for setting in ("auto", "off"):
        cache, states = LatentCache(args, 2, 12, DEVICE), []
        with using(setting), recorded() as record:
            states.append(model(tokens[:, :8], cache))
            cache.truncate(torch.tensor([8, 5], device=DEVICE))
            states.append(model(tokens[:, 8:9], cache, absorbed=True))
            states.append(model(tokens[:, 9:], cache, absorbed=True))
        found.append(states)
        bodies = {chosen for name, chosen in record if "parse" in name or "selected" in name}
        assert bodies == ({"attend_selected", "absorbed_for_naive", "select_in_pieces"}
                          if setting == "auto" else {"plain"}), bodies
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()  # FP32, sums in another order


@inside
@pytest.mark.slow
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


@inside
@torch.no_grad()
def test_scores_in_fp8_are_those_of_the_rounded_numbers():
    """Queries and keys of a deployed indexer are E4M3 numbers times powers of two."""
    torch.manual_seed(0)
    q, keys = torch.randn(2, 5, 5, 24, device=DEVICE), torch.randn(2, 40, 24, device=DEVICE)
    q, keys = (t * torch.rand(t.size(-2), 1, device=DEVICE).exp2() ** 9 for t in (q, keys))
    weights = torch.randn(2, 5, 5, device=DEVICE)
    wanted = index_scores.plain(rounded_to_fp8(q), weights, rounded_to_fp8(keys))

    def gap(keys8: Tensor, scales: Tensor, q: Tensor) -> float:
        found = indexer.scored(q, weights, keys8, 40, scales)
        return ((found - wanted).norm() / wanted.norm()).item()

    given, again = indexer.in_e4m3(keys), indexer.in_e4m3(rounded_to_fp8(keys))
    assert torch.equal(given[0].float() * given[1][..., None],
                       again[0].float() * again[1][..., None])  # what is rounded stays
    near = 1e-5 if INTERPRETED else 5e-4  # Hopper adds up FP8 products in 14 bits or so
    assert gap(*given, q) < near and gap(*again, rounded_to_fp8(q)) < near
    assert gap(given[0], given[1].roll(1, 1), q) > 0.1
    plain = index_scores.plain(q, weights, keys)
    assert (plain - wanted).norm() / wanted.norm() > 1e-3


@pytest.mark.skipif(not INTERPRETED, reason="its example lies on a CPU")
@torch.inference_mode()
@pytest.mark.parametrize("count, k", [
    (1, 6), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 6), (1, 100)))])
def test_a_step_stores_what_the_plain_definitions_store(count, k):
    """Index keys and latents of new tokens; with k = 100 all are attended to."""
    caches, outs = [], []
    for setting in ("auto", "off"):
        torch.manual_seed(0)
        with using("off"):
            block, x, context = joined_case(count, **INDEXER | dict(index_topk=k)).call()
        with using(setting), recorded() as record:
            outs.append(block(x, context)[0])
        assert ("few_tokens_gpu.choose_tokens", "in_kernels") in record or setting == "off" or k > 6
        caches.append(context.cache)
    new = caches[0].index_keys[block.layer] != 0
    for a, b in ((outs[0], outs[1]), *((getattr(c, name) for c in caches)
                                       for name in ("index_keys", "latents"))):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()  # FP32, sums in another order
    assert new.any()
