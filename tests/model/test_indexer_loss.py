"""Compare the indexer's loss with the papers' equations, and check which parameters it moves."""

import copy
from dataclasses import replace

import pytest
import torch
from small_models import gap, random_tokens, scrambled
from test_sparse_attention import KINDS, SPARSE, dense_twin

from minids import ModelArgs, Transformer
from minids.apply.recompute import recompute_blocks
from minids.infer.validation import attention_recall
from minids.kernels import indexer as kernel
from minids.kernels.registry import using
from minids.model import mla, sparse_attention
from minids.model.mla import MLA, Context
from minids.model.objective import mtp_loss
from minids.model.rope import rotations
from minids.model.sparse_attention import (
    freeze_all_but_indexers,
    in_indexer,
    load_weights_without_indexer,
)

STAGES = ("warmup", "sparse")


def taught(attn: MLA, x: torch.Tensor, stage: str, visible=None, positions=None) -> torch.Tensor:
    """The indexer's loss of one layer."""
    positions = torch.arange(x.size(1))[None] if positions is None else positions
    return attn(x, Context(rotations(positions, attn.args), visible, indexer_stage=stage))[1]


def literal_loss(attn: MLA, x: torch.Tensor, stage: str) -> torch.Tensor:
    """V3.2's equations 3 and 4, query by query, as the mean over queries; FP64.

    What attention attends with and what the indexer's scores are is taken as given: both have tests
    of their own.
    """
    rotation = rotations(torch.arange(x.size(1))[None], attn.args)
    with torch.no_grad():
        c_q = attn.query_latent(x)
        q = torch.cat(attn.queries(c_q, rotation), -1)  # (B, S, H, qk_head_dim)
        k = attn.expand(attn.latent(x, rotation))[0]  # (B, S, H, qk_head_dim)
        chosen = attn.selection(x, c_q, Context(rotation))
    scores = attn.indexer.scores(x, c_q, attn.indexer.keys(x, rotation), rotation)
    total = 0.0
    for b in range(len(x)):
        for t in range(x.size(1)):
            own = list(range(t + 1))
            if stage == "sparse":
                own = chosen.indices[b, t][chosen.seen[b, t]].tolist()
            summed = torch.zeros(len(own), dtype=x.dtype)
            for h in range(attn.args.n_heads):
                logits = torch.stack([q[b, t, h] @ k[b, s, h] * attn.scale for s in own])
                summed += logits.exp() / logits.exp().sum()
            p = summed / summed.abs().sum()
            log_q = scores[b, t, own] - scores[b, t, own].exp().sum().log()
            total = total + (p * (p.log() - log_q)).sum()
    return total / (x.size(0) * x.size(1))


def loss_gaps(args: ModelArgs, stage: str) -> tuple[float, float]:
    """Return how far the loss, and its gradients, are from the literal ones; relative."""
    torch.manual_seed(5)
    attn = scrambled(args).layers[1].attn
    x = torch.randn(2, 9, args.dim, dtype=torch.float64)
    grads, losses = [], []
    for loss in (taught(attn, x, stage), literal_loss(attn, x, stage)):
        grads.append(torch.autograd.grad(loss, list(attn.indexer.parameters())))
        losses.append(loss.item())
    return (abs(losses[0] / losses[1] - 1),
            max(gap(g, literal) for g, literal in zip(*grads, strict=True)))


@pytest.mark.parametrize("bodies", ["auto", "off"])
@pytest.mark.parametrize("at_once", [2 ** 24, 4 * 2 * 9 * 6], ids=["whole", "four queries a time"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_the_papers(kind, stage, at_once, bodies, monkeypatch):
    monkeypatch.setattr(kernel, "SCORES", at_once)
    # FP64 throughout, another order of the sums.
    with using(bodies):
        assert max(loss_gaps(KINDS[kind], stage)) < 1e-12


MASS = sparse_attention.attention_mass


def first_head(q, k, seen, scale):
    return MASS(q[:, :, :1], k[:, :, :1], seen, scale)


def summed_scores(q, k, seen, scale):
    """The softmax of the heads' mean score in place of the mean of their softmaxes."""
    return MASS(q.flatten(2).unsqueeze(2), k.flatten(2).unsqueeze(2), seen, scale / q.size(2))


def not_normalised(q, k, seen, scale):
    return MASS(q, k, seen, scale) * q.size(2)


def turned_round(index_q, weights, index_k, q, k, seen, scale):
    """KL(softmax(I) || p)"""
    seen = mla.causal(q.size(1), k.size(1)) if seen is None else seen
    p = MASS(q, k, seen, scale)
    scores = sparse_attention.index_scores(index_q, weights, index_k)
    q = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.where(seen, q * (q.clamp(min=1e-99).log() - p.clamp(min=1e-99).log()), 0).sum(
        -1).mean()


def cross_entropy(index_q, weights, index_k, q, k, seen, scale):
    """Its gradient is the same, its value is above by the entropy of p."""
    seen = mla.causal(q.size(1), k.size(1)) if seen is None else seen
    p = MASS(q, k, seen, scale)
    loss = LOSS(index_q, weights, index_k, q, k, seen, scale)
    return loss - torch.xlogy(p, p).sum(-1).mean()


LOSS = sparse_attention.indexer_loss
WRONG_LOSSES = {(sparse_attention, "attention_mass"): (first_head, summed_scores, not_normalised),
                (mla, "indexer_loss"): (turned_round, cross_entropy)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where, wrong", [(n, w) for n, ws in WRONG_LOSSES.items() for w in ws])
def test_a_wrong_loss_is_caught(where, wrong, stage, monkeypatch):
    monkeypatch.setattr(*where, wrong)
    if where == (mla, "indexer_loss"):
        monkeypatch.setattr(sparse_attention, "indexer_loss", wrong)  # over a selection
    assert max(loss_gaps(SPARSE, stage)) > 1e-2


def test_a_loss_that_sees_the_future_is_caught(monkeypatch):
    monkeypatch.setattr(kernel, "few_queries", lambda queries, *_: [slice(0, queries)])
    monkeypatch.setattr(kernel, "causal", lambda queries, keys, device: torch.ones(
        1, queries, keys, dtype=torch.bool))
    assert loss_gaps(SPARSE, "warmup")[0] > 1e-2


class LooksBeyondTheSelection(MLA):
    """The sparse stage's loss over all tokens, those included that nobody attends to."""

    def indexer_loss(self, x, c_q, queries, latent, chosen, context):
        return super().indexer_loss(x, c_q, queries, latent, None, context)


def test_a_sparse_loss_over_all_tokens_is_caught():
    attn = scrambled(SPARSE).layers[1].attn
    x = torch.randn(2, 9, SPARSE.dim, dtype=torch.float64)
    correct = literal_loss(attn, x, "sparse").item()
    assert taught(attn, x, "sparse").item() == pytest.approx(correct, rel=1e-12)
    attn.__class__ = LooksBeyondTheSelection
    assert abs(taught(attn, x, "sparse").item() / correct - 1) > 1e-2


def padded_gap(attn: MLA, lengths: list[int], sees_padding: bool = False) -> float:
    """A left-padded batch against its sequences alone: the difference of the summed losses."""
    longest, width = max(lengths), attn.args.dim
    torch.manual_seed(6)
    alone = [torch.randn(1, n, width, dtype=torch.float64) for n in lengths]
    pad = torch.tensor([longest - n for n in lengths])
    x = torch.cat([torch.cat([torch.randn(1, longest - n, width, dtype=torch.float64), row], 1)
                   for n, row in zip(lengths, alone, strict=True)])
    at = torch.arange(longest)
    visible = mla.causal(longest, longest) & (at >= pad[:, None, None])
    if sees_padding:
        visible = mla.causal(longest, longest).expand_as(visible)
    visible = visible | torch.eye(longest, dtype=torch.bool)  # padding sees itself
    together = taught(attn, x, "warmup", visible, (at - pad[:, None]).clamp(min=0))
    separate = sum(taught(attn, row, "warmup") * row.size(1) for row in alone)
    return abs(together * len(lengths) * longest / separate - 1).item()


@torch.no_grad()
def test_padding_adds_nothing_to_the_loss():
    attn = scrambled(SPARSE).layers[1].attn
    # A query that sees one token has no choice, and no loss.
    assert padded_gap(attn, [9, 4, 1]) < 1e-12
    assert padded_gap(attn, [9, 4, 1], sees_padding=True) > 1e-2


def batch_of(args: ModelArgs = SPARSE, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = random_tokens(args, 2, length)
    return tokens, tokens.roll(-1, 1)


def reached(model: Transformer, *parts: str, stage: str) -> set[str]:
    """The parameters that the sum of these losses gives a gradient, be it zero."""
    model.zero_grad()
    losses = model.loss(*batch_of(), dsa=stage)
    sum(getattr(losses, part) for part in parts).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def stays_apart(model: Transformer, stage: str) -> bool:
    """The indexers' loss reaches the indexers and nothing else, the others everything else."""
    names = {name for name, _ in model.named_parameters()}
    indexers = {name for name in names if in_indexer(name)}
    return (reached(model, "indexer", stage=stage) == indexers
            and reached(model, "main", "mtp", "balance", stage=stage) == names - indexers)


class ReadsWithGradient(MLA):
    """The indexer's input is not detached."""

    def indexer_loss(self, x, c_q, queries, latent, chosen, context):
        loss = super().indexer_loss(x, c_q, queries, latent, chosen, context)
        leak = self.indexer.weights(x).sum()
        return loss + leak - leak.detach()


class ChoosesWithGradient(MLA):
    """Attention's output carries the scores, so that the choice could learn from the text."""

    def forward(self, x, context):
        c_q, keys = self.query_latent(x), self.indexer.keys(x, context.rotation)
        scores = self.indexer.scores(x, c_q, keys, context.rotation)
        out, loss = super().forward(x, context)
        return out + scores.mean(-1, keepdim=True), loss


@pytest.mark.parametrize("stage", STAGES)
def test_neither_loss_reaches_what_the_other_trains(stage):
    assert stays_apart(scrambled(SPARSE), stage)
    for wrong in (ReadsWithGradient, ChoosesWithGradient):
        model = scrambled(SPARSE)
        for module in model.modules():
            if isinstance(module, MLA):
                module.__class__ = wrong
        assert not stays_apart(model, stage), wrong


def gradients(model: Transformer, **how) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(*batch_of(), **how).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_learning_indexers_leave_the_models_gradient_as_it_was():
    """Bit for bit: with the sparse stage's loss, and with any weight of it."""
    model = scrambled(SPARSE)
    alone, together = gradients(model), gradients(model, dsa="sparse", indexer_weight=4.0)
    assert all(torch.equal(grad, together[name]) for name, grad in alone.items())
    assert together.keys() - alone.keys() == {n for n in together if in_indexer(n)}
    once = gradients(model, dsa="sparse")
    for name in together.keys() - alone.keys():
        assert torch.equal(together[name], 4 * once[name])  # a power of two rounds nothing


def test_the_warmup_attends_densely_and_the_sparse_stage_does_not():
    model = scrambled(SPARSE)
    tokens, targets = batch_of()
    warm, sparse, plain = (model.loss(tokens, targets, dsa=dsa) for dsa in ("warmup", "sparse", ""))
    dense = dense_twin(model).loss(tokens, targets)
    assert torch.equal(warm.main, dense.main) and torch.equal(warm.mtp, dense.mtp)
    assert torch.equal(sparse.main, plain.main) and torch.equal(sparse.mtp, plain.mtp)
    assert gap(plain.main, dense.main) > 1e-4
    assert plain.indexer == 0 and warm.indexer > 0 and sparse.indexer > 0


def test_every_layer_and_every_mtp_module_has_its_loss():
    args = replace(SPARSE, n_mtp_layers=2)
    model, (tokens, targets) = scrambled(args), batch_of(args)
    losses = model.loss(tokens, targets, dsa="warmup", indexer_weight=0.5)
    found = model.hidden(tokens, indexer_stage="warmup")
    own = found.indexer + mtp_loss(model, found.states, targets, dsa="warmup")[2]
    assert len(own) == 4 and len(found.indexer) == 2
    assert gap(losses.indexer, sum(own)) < 1e-15
    total = losses.main + 0.3 * losses.mtp + 1e-4 * losses.balance + 0.5 * losses.indexer
    assert gap(losses.total, total) < 1e-15


def test_up_to_k_tokens_both_stages_have_one_loss():
    model = scrambled(replace(SPARSE, index_topk=12))
    warm, sparse = (gradients(model, dsa=stage) for stage in STAGES)
    assert all(torch.equal(warm[name], sparse[name]) for name in warm)


def test_a_frozen_model_gets_no_gradient():
    model = scrambled(SPARSE)
    freeze_all_but_indexers(model)
    assert gradients(model, dsa="warmup").keys() == {
        name for name, _ in model.named_parameters() if in_indexer(name)}


@pytest.mark.parametrize("stage", STAGES)
def test_recomputation_and_bf16_teach_the_same(stage):
    model = scrambled(SPARSE, dtype=torch.float32)
    again = copy.deepcopy(model)
    recompute_blocks(again)
    plain, recomputed = gradients(model, dsa=stage), gradients(again, dsa=stage)
    assert all(torch.equal(grad, recomputed[name]) for name, grad in plain.items())
    whole = model.loss(*batch_of(), dsa="warmup").indexer
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(*batch_of(), dsa="warmup").indexer
    # Scores of a few units rounded to 2^-9 of themselves, in target and indexer alike.
    assert rounded.dtype == torch.float32 and abs(rounded / whole - 1) < 0.05


def test_rounding_to_fp8_lets_the_gradient_through():
    args = replace(SPARSE, index_fp8=True, index_hadamard=True)
    attn = scrambled(args).layers[1].attn
    torch.manual_seed(5)
    x = torch.randn(2, 9, args.dim, dtype=torch.float64)
    rounded = torch.autograd.grad(taught(attn, x, "warmup"), list(attn.indexer.parameters()))
    attn.indexer.args = SPARSE
    plain = torch.autograd.grad(taught(attn, x, "warmup"), list(attn.indexer.parameters()))
    for a, b in zip(rounded, plain, strict=True):
        # Off by the rounding of the factors, 2^-4 each; a cast's own gradient would be rounded to
        # E4M3 without a scale, where most of it is zero.
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9


def largest_saved(model: Transformer) -> int:
    """Numbers in the largest tensor that the indexers' loss keeps for the backward pass."""
    sizes = [0]
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model.loss(*batch_of(length=40), dsa="warmup")
    return max(sizes)


def test_the_loss_keeps_nothing_for_each_pair_of_tokens(monkeypatch):
    monkeypatch.setattr(kernel, "SCORES", 2 * 40 * SPARSE.index_n_heads * 10)  # ten queries' worth
    model = scrambled(SPARSE, dtype=torch.float32)
    freeze_all_but_indexers(model)
    per_pair = 2 * 40 * 40 * SPARSE.index_n_heads
    assert largest_saved(model) < per_pair / 2

    with using("off"):
        assert largest_saved(model) >= per_pair


def learned_share() -> float:
    """Return the share of the missing recall of attention's mass that 80 steps of warm-up gain."""
    torch.manual_seed(7)
    model = scrambled(replace(SPARSE, index_topk=8), dtype=torch.float32)
    tokens = random_tokens(SPARSE, 8, 48)
    freeze_all_but_indexers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = sum(attention_recall(model, tokens, 8)["indexer"])
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(tokens, tokens, mtp_weight=0.0, dsa="warmup").indexer.backward()
        optimizer.step()
    after = attention_recall(model, tokens, 8)
    return (sum(after["indexer"]) - before) / (sum(after["attention"]) - before)


@pytest.mark.slow
def test_the_warmup_teaches_what_attention_weighs(monkeypatch):
    """Recall rises from 0.35 to 0.54 where the best choice of 8 tokens has 0.56, say."""
    assert learned_share() > 0.8
    monkeypatch.setattr(sparse_attention, "attention_mass", lambda q, k, seen, scale: (
        seen / seen.sum(-1, keepdim=True).to(q.dtype)).expand(len(q), -1, -1))
    assert learned_share() < 0.4  # every token wanted alike


def test_a_dense_models_weights_leave_the_indexers_alone():
    sparse, dense = scrambled(SPARSE), dense_twin(scrambled(SPARSE, seed=1))
    before = copy.deepcopy(sparse.state_dict())
    load_weights_without_indexer(sparse, dense.state_dict())
    for name, tensor in sparse.state_dict().items():
        expected = before[name] if in_indexer(name) else dense.state_dict()[name]
        assert torch.equal(tensor, expected), name
    incomplete = {n: t for n, t in dense.state_dict().items() if "wo" not in n}
    with pytest.raises(AssertionError, match="wo.weight"):
        load_weights_without_indexer(sparse, incomplete)
