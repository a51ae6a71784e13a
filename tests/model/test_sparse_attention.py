"""Sparse attention: the indexer against its equation, a model that attends to k tokens, and how the
indexer learns which.

`SPARSE` selects 5 tokens of up to 48, so that nearly every query leaves some out.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, gap, random_tokens, scrambled
from test_mla import EXACT, PIECES, cached, decode_gap, every_path, form_gap, leak, padding_gap
from torch.utils.flop_counter import FlopCounterMode

from minids import ModelArgs, Transformer
from minids.apply.recompute import recompute_blocks
from minids.fp8 import E4M3_MAX
from minids.generate import generate
from minids.infer.selections import attention_recall
from minids.kernels import indexer as kernel
from minids.kernels.registry import using
from minids.model import mla, sparse_attention
from minids.model.cache import LatentCache
from minids.model.mla import MLA, Context
from minids.model.objective import mtp_loss
from minids.model.rope import apply_rotary_emb, rotations
from minids.model.sparse_attention import (
    STAGES,
    Indexer,
    Selection,
    freeze_all_but_indexers,
    hadamard,
    in_indexer,
    load_weights_without_indexer,
    select,
)

SPARSE = replace(LITTLE, index_n_heads=6, index_head_dim=16, index_topk=5)
KINDS = {"query latent": SPARSE, "no query latent": replace(SPARSE, q_lora_rank=0)}


def indexer_and_input(args: ModelArgs = SPARSE, length: int = 12):
    """An indexer, an attention's input, the query latent and the rotations."""
    attn = scrambled(args).layers[1].attn
    torch.manual_seed(3)
    torch.nn.init.normal_(attn.indexer.k_norm.bias, std=0.3)
    x = torch.randn(2, length, args.dim, dtype=torch.float64)
    return attn.indexer, x, attn.query_latent(x), rotations(torch.arange(length)[None], args)


def half_split(x: torch.Tensor, position: int, rope: int, theta: float) -> torch.Tensor:
    """The first `rope` numbers of x turned in pairs (x_i, x_{i + rope/2}), number by number."""
    y, half = x.clone(), rope // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / rope)
        cos, sin = math.cos(angle), math.sin(angle)
        y[i] = x[i] * cos - x[i + half] * sin
        y[i + half] = x[i] * sin + x[i + half] * cos
    return y


def literal_scores(indexer: Indexer, x: torch.Tensor, c_q: torch.Tensor) -> torch.Tensor:
    """V3.2 equation 1 for each pair of positions, from the weights alone."""
    args, norm = indexer.args, indexer.k_norm
    heads, width, rope = args.index_n_heads, args.index_head_dim, args.qk_rope_head_dim
    out = torch.zeros(*x.shape[:2], x.size(1), dtype=x.dtype)
    every = [(t, s, j) for t in range(x.size(1)) for s in range(x.size(1)) for j in range(heads)]
    for b in range(len(x)):
        k = x[b] @ indexer.wk.weight.T
        k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        k = k * norm.weight + norm.bias
        k = [half_split(row, s, rope, args.rope_theta) for s, row in enumerate(k)]
        q = (c_q[b] @ indexer.wq_b.weight.T).view(-1, heads, width)
        w = x[b] @ indexer.weights_proj.weight.T * heads ** -0.5
        for t, s, j in every:
            product = half_split(q[t, j], t, rope, args.rope_theta) @ k[s]
            out[b, t, s] += w[t, j] * width ** -0.5 * product.clamp(min=0)
    return out


def score_gap(indexer: Indexer, x, c_q, rotation) -> float:
    scores = indexer.scores(x, c_q, indexer.keys(x, rotation), rotation)
    return gap(scores, literal_scores(indexer, x, c_q))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_are_the_papers_equation(kind):
    # Angles are FP32 in both: at position 6 they are off by at most 6 * 2^-23 = 7e-7.
    assert score_gap(*indexer_and_input(KINDS[kind], 7)) < 3e-6


class RopeLast(Indexer):
    """The rotated part behind the rest, as in attention's own keys."""

    def positioned(self, x, rotation):
        rope = self.args.qk_rope_head_dim
        return super().positioned(x.roll(rope, -1), rotation).roll(-rope, -1)


class NormalisedQuery(Indexer):
    """The keys' norm on the queries too."""

    def positioned(self, x, rotation):
        x = self.k_norm(x) if x.size(2) > 1 else x
        return super().positioned(x, rotation)


class EvenWeights(Indexer):
    """No head counts more than another."""

    def weights(self, x):
        return torch.ones_like(super().weights(x))


@pytest.mark.parametrize("wrong", [RopeLast, NormalisedQuery, EvenWeights])
@torch.no_grad()
def test_a_wrong_indexer_is_caught(wrong):
    indexer, *inputs = indexer_and_input(length=7)
    indexer.__class__ = wrong
    assert score_gap(indexer, *inputs) > 1e-2


@torch.no_grad()
def test_interleaved_pairs_are_caught(monkeypatch):
    """The slip of DeepSeek's first demonstration code."""
    inputs = indexer_and_input(length=7)
    monkeypatch.setattr(sparse_attention, "apply_rotary_emb_half", apply_rotary_emb)
    assert score_gap(*inputs) > 1e-2


@torch.no_grad()
def test_scores_without_relu_are_caught(monkeypatch):
    inputs = indexer_and_input(length=7)
    monkeypatch.setattr(sparse_attention, "index_scores", lambda q, w, k: torch.einsum(
        "bshd,btd,bsh->bst", q, k, w))
    assert score_gap(*inputs) > 1e-2


@torch.no_grad()
def test_scores_in_parts_equal_the_whole(monkeypatch):
    indexer, x, c_q, rotation = indexer_and_input()
    keys = indexer.keys(x, rotation)
    whole = indexer.scores(x, c_q, keys, rotation)
    monkeypatch.setattr(kernel, "SCORES", 5 * 2 * 12 * 6)  # five queries at a time
    # The same products in matrices of another height.
    assert gap(indexer.scores(x, c_q, keys, rotation), whole) < 1e-14


def test_selection_on_numbers():
    scores = torch.tensor([[[9., -9., 9., 9.], [1., -2., 9., 9.], [1., -2., 3., 9.],
                            [-1., -2., 3., -4.]]])
    chosen = select(scores, mla.causal(4, 4), 2)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]
    assert chosen.mask(4).int().tolist() == [expected]
    assert chosen.seen.sum(-1).tolist() == [[1, 2, 2, 2]]
    rows = chosen.gather(torch.arange(4.).view(1, 4, 1))  # (1, 4, 2, 1)
    assert sorted(rows[0, 3, :, 0].tolist()) == [0, 2]


def sees_the_future(scores, visible, k):
    """Hides the future after the choice instead of before.

    Nobody attends to a later token, but one that scores high takes the place of an earlier one.
    """
    queries, keys = scores.shape[1:]
    own = mla.causal(queries, keys) & torch.ones_like(scores).triu(keys - queries).bool()
    best = scores.masked_fill(own, float("inf")).topk(k, dim=-1)  # else some would see nothing
    return Selection(best.indices, visible.expand_as(scores).gather(-1, best.indices))


@torch.no_grad()
def test_a_future_token_never_moves_a_past_logit(monkeypatch):
    model = scrambled(SPARSE)
    for name, forward in every_path(model).items():
        assert leak(forward, SPARSE) < EXACT, name
    monkeypatch.setattr(mla, "select", sees_the_future)
    for name, forward in every_path(model).items():
        assert leak(forward, SPARSE) > 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_naive_equals_absorbed(kind):
    assert form_gap(scrambled(KINDS[kind])) < EXACT


class KeepsTheFirst(mla.MLA):
    """The absorbed form takes the oldest tokens, whatever was chosen."""

    def absorbed_sparse(self, q_nope, q_pe, latent, chosen):
        first = torch.arange(chosen.indices.size(-1)).expand_as(chosen.indices)
        return super().absorbed_sparse(q_nope, q_pe, latent, chosen._replace(indices=first))


class ForgetsEmptyPlaces(mla.MLA):
    """The absorbed form attends to the places of queries that see fewer than k tokens."""

    def absorbed_sparse(self, q_nope, q_pe, latent, chosen):
        every = torch.ones_like(chosen.seen)
        return super().absorbed_sparse(q_nope, q_pe, latent, chosen._replace(seen=every))


@pytest.mark.parametrize("wrong", [KeepsTheFirst, ForgetsEmptyPlaces])
@torch.no_grad()
def test_a_wrong_fetch_is_caught(wrong):
    model = scrambled(SPARSE)
    for layer in model.layers:
        layer.attn.__class__ = wrong
    assert form_gap(model) > 1e-2


@pytest.mark.parametrize("absorbed", [False, True], ids=["naive", "absorbed"])
@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_cached_equals_uncached(pieces, absorbed):
    for args in KINDS.values():
        assert decode_gap(scrambled(args), PIECES[pieces], absorbed) < EXACT


@torch.no_grad()
def test_keys_that_are_not_cached_are_caught(monkeypatch):
    def forgets(cache, layer, keys):
        return torch.zeros(len(keys), cache.length + keys.size(1), keys.size(2), dtype=keys.dtype)

    monkeypatch.setattr(LatentCache, "append_index_keys", forgets)
    assert decode_gap(scrambled(SPARSE), PIECES["uneven chunks"], True) > 1e-2


@pytest.mark.parametrize("absorbed", [False, True], ids=["naive", "absorbed"])
@torch.no_grad()
def test_a_batch_of_unequal_prompts_equals_each_prompt_alone(absorbed):
    for args in KINDS.values():
        assert padding_gap(scrambled(args), [3, 7, 1, 12, 5], 4, absorbed) < EXACT
    assert padding_gap(scrambled(SPARSE), [3, 7, 5], 2, absorbed, truncated=False) > 1e-2


def dense_twin(model: Transformer) -> Transformer:
    """The same weights without the indexer: V3."""
    twin = Transformer(replace(model.args, index_n_heads=0)).to(model.head.weight.dtype)
    weights = {k: v for k, v in model.state_dict().items() if ".indexer." not in k}
    twin.load_state_dict(weights)
    return twin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_up_to_k_tokens_it_is_v3_bit_for_bit(dtype):
    model = scrambled(replace(SPARSE, index_topk=12), dtype=dtype)
    tokens = random_tokens(SPARSE, 2, 12)
    for name, forward in every_path(model).items():
        if "chunks" not in name and "prefill" not in name:
            assert torch.equal(forward(tokens), every_path(dense_twin(model))[name](tokens)), name
    # One token more than k, and the last query leaves one out.
    longer = random_tokens(SPARSE, 2, 13)
    assert gap(model(longer)[:, -1], dense_twin(model)(longer)[:, -1]) > 1e-3


@torch.no_grad()
def test_up_to_k_tokens_a_cached_model_is_v3_bit_for_bit():
    model = scrambled(replace(SPARSE, index_topk=12))
    tokens = random_tokens(SPARSE, 2, 12)
    for absorbed in (False, True):
        assert torch.equal(cached(model, absorbed, 5)(tokens),
                           cached(dense_twin(model), absorbed, 5)(tokens))


@torch.no_grad()
def test_choosing_all_tokens_is_dense_attention(monkeypatch):
    """The selecting path itself, with nothing left out."""
    model = scrambled(SPARSE)
    tokens = random_tokens(SPARSE, 2, 12)
    monkeypatch.setattr(mla, "select", lambda scores, visible, k: select(scores, visible, 12))
    assert torch.equal(model(tokens), dense_twin(model)(tokens))
    assert gap(model(tokens, absorbed=True), dense_twin(model)(tokens)) < EXACT


def step_flops(args: ModelArgs, length: int) -> int:
    """Multiply-adds, twice, of one decoding step after `length` tokens, without the indexer's."""
    model = scrambled(args, dtype=torch.float32)
    cache = LatentCache(args, 1, length + 1)
    model(random_tokens(args, 1, length), cache)
    with FlopCounterMode(display=False) as counter:
        model(random_tokens(args, 1, 1), cache, absorbed=True)
    counts = counter.get_flop_counts()
    indexers = [sum(c.values()) for name, c in counts.items() if name.endswith(".indexer")]
    return sum(counts["Global"].values()) - sum(indexers)


def test_a_decoding_steps_attention_does_not_grow_with_the_context(monkeypatch):
    # FlopCounterMode attributes work to modules by their calls; scores() is called as a method.
    monkeypatch.setattr(Indexer, "forward", Indexer.scores, raising=False)
    monkeypatch.setattr(Indexer, "scores", lambda self, *inputs: self(*inputs))
    args = replace(SPARSE, max_seq_len=400)
    assert step_flops(args, 40) == step_flops(args, 320)
    dense = replace(args, index_n_heads=0)
    assert step_flops(dense, 320) - step_flops(dense, 40) == (
        2 * 280 * args.n_heads * args.n_layers * (2 * args.kv_lora_rank + args.qk_rope_head_dim))


def test_the_cache_has_one_index_key_a_token():
    cache = LatentCache(ModelArgs.preset("v3.2"), 1, 1, device="meta")
    assert cache.index_keys.numel() == 128 * 61 and cache.latents.numel() == 576 * 61
    assert LatentCache(LITTLE, 1, 1).index_keys is None


def test_the_indexer_is_as_large_as_v32s():
    with torch.device("meta"):
        indexer = Indexer(ModelArgs.preset("v3.2"))
    assert sum(p.numel() for p in indexer.parameters()) == 13_959_424


def test_the_language_model_loss_does_not_reach_the_indexer():
    model = scrambled(SPARSE)
    tokens = random_tokens(SPARSE, 2, 12)
    model.loss(tokens, tokens.roll(-1, 1)).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".indexer." in name), name


@pytest.mark.parametrize("width", [1, 2, 16, 128])
def test_the_hadamard_turn_changes_no_product(width):
    h = hadamard(width)
    assert torch.allclose(h @ h.T, torch.eye(width), atol=1e-6)  # FP32 of powers of sqrt(2)
    assert (h.abs() - width ** -0.5).abs().max() == 0


@torch.no_grad()
def test_the_hadamard_turn_changes_no_score_before_rounding(monkeypatch):
    plain, x, c_q, rotation = indexer_and_input()
    turned = indexer_and_input(replace(SPARSE, index_hadamard=True))[0]
    scores = plain.scores(x, c_q, plain.keys(x, rotation), rotation)

    def error():
        return gap(turned.scores(x, c_q, turned.keys(x, rotation), rotation), scores)

    assert error() < 1e-6  # the matrix is FP32
    monkeypatch.setattr(sparse_attention, "hadamard", lambda width, device: hadamard(width) * 2)
    assert error() > 1


def is_e4m3(x: torch.Tensor) -> bool:
    """Return whether each row is E4M3 numbers times one power of two."""
    largest = x.abs().amax(-1, keepdim=True)
    exponents = torch.arange(-40, 40, dtype=x.dtype)
    fits = torch.zeros_like(largest, dtype=torch.bool)
    for scale in (2.0 ** exponents).tolist():
        q = x / scale
        exact = (q.to(torch.float8_e4m3fn).to(x.dtype) == q).all(-1, keepdim=True)
        fits |= exact & (largest / scale <= E4M3_MAX)
    return bool(fits.all())


@torch.no_grad()
def test_fp8_keys_are_e4m3_numbers_and_scores_stay_near():
    plain, x, c_q, rotation = indexer_and_input()
    rounded = indexer_and_input(replace(SPARSE, index_fp8=True, index_hadamard=True))[0]
    keys = rounded.keys(x, rotation)
    assert is_e4m3(keys) and not is_e4m3(plain.keys(x, rotation))
    scores = plain.scores(x, c_q, plain.keys(x, rotation), rotation)
    error = gap(rounded.scores(x, c_q, keys, rotation), scores)
    # Each factor is off by at most 2^-4 of itself, so a product by 13 %; the sum of many by less.
    assert 1e-4 < error < 0.13


@torch.no_grad()
def test_fp8_changes_the_choice_and_not_what_is_attended_to():
    """With all tokens chosen, the rounding leaves no trace."""
    args = replace(SPARSE, index_fp8=True)
    tokens = random_tokens(SPARSE, 2, 24)
    plain, rounded = scrambled(SPARSE), scrambled(args)
    assert gap(rounded(tokens), plain(tokens)) > 1e-3
    every = replace(args, index_topk=24)
    assert torch.equal(scrambled(every)(tokens), scrambled(replace(every, index_fp8=False))(tokens))


def test_generation_equals_uncached_greedy_decoding():
    model = scrambled(SPARSE, dtype=torch.float32)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
    out = generate(model, prompts, max_new_tokens=16)
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        row = list(prompt)
        for token in tokens:
            with torch.no_grad():
                assert model(torch.tensor([row]))[0, -1].argmax() == token
            row.append(token)


def test_recomputation_and_bf16_train():
    model = scrambled(SPARSE, dtype=torch.float32)
    tokens = random_tokens(SPARSE, 2, 12)
    again = copy.deepcopy(model)
    recompute_blocks(again)
    for m in (model, again):
        m.loss(tokens, tokens.roll(-1, 1)).total.backward()
    assert torch.equal(model.embed.weight.grad, again.embed.weight.grad)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, tokens.roll(-1, 1)).total
    assert loss.isfinite()


# How the indexer learns.

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


MASS, DIVERGENCE = kernel.attention_mass, kernel.divergence


def first_head(q, k, seen, scale):
    return MASS(q[:, :, :1], k[:, :, :1], seen, scale)


def summed_scores(q, k, seen, scale):
    """The softmax of the heads' mean score in place of the mean of their softmaxes."""
    return MASS(q.flatten(2).unsqueeze(2), k.flatten(2).unsqueeze(2), seen, scale / q.size(2))


def not_normalised(q, k, seen, scale):
    return MASS(q, k, seen, scale) * q.size(2)


def turned_round(p, scores, seen):
    """KL(softmax(I) || p)"""
    q = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.where(seen, q * (q.log() - p.log()), 0).sum(-1), q - p


def cross_entropy(p, scores, seen):
    """Its gradient is the same, its value is above by the entropy of p."""
    loss, grad = DIVERGENCE(p, scores, seen)
    return loss - torch.xlogy(p, p).sum(-1), grad


def without_relu(grad, q, weights, keys):
    products = torch.einsum("bshd,btd->bsht", q, keys)
    d_products = torch.einsum("bst,bsh->bsht", grad, weights)
    return [torch.einsum("bsht,btd->bshd", d_products, keys),
            torch.einsum("bst,bsht->bsh", grad, products.relu()),
            torch.einsum("bsht,bshd->btd", d_products, q)]


WRONG_LOSSES = {"attention_mass": (first_head, summed_scores, not_normalised),
                "divergence": (turned_round, cross_entropy), "score_gradients": (without_relu,)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name, wrong", [(n, w) for n, ws in WRONG_LOSSES.items() for w in ws])
def test_a_wrong_loss_is_caught(name, wrong, stage, monkeypatch):
    monkeypatch.setattr(kernel, name, wrong)
    assert max(loss_gaps(SPARSE, stage)) > 1e-2


def test_a_loss_that_sees_the_future_is_caught(monkeypatch):
    monkeypatch.setattr(kernel, "few_queries", lambda queries, *_: [slice(0, queries)])
    monkeypatch.setattr(mla, "seen_by", lambda context, x, keys: torch.ones(
        1, x.size(1), keys, dtype=torch.bool))
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
    alone, together = gradients(model), gradients(model, dsa="sparse", indexer_weight=3.0)
    assert all(torch.equal(grad, together[name]) for name, grad in alone.items())
    assert together.keys() - alone.keys() == {n for n in together if in_indexer(n)}
    once = gradients(model, dsa="sparse")
    for name in together.keys() - alone.keys():
        assert gap(together[name], 3 * once[name]) < 1e-15


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


def test_the_loss_keeps_nothing_for_each_pair_of_tokens():
    model = scrambled(SPARSE, dtype=torch.float32)
    freeze_all_but_indexers(model)
    per_pair = 2 * 40 * 40 * SPARSE.index_n_heads
    assert largest_saved(model) < per_pair / 2

    with using("off"):
        assert largest_saved(model) >= per_pair


def learned_share() -> float:
    """What 80 steps of warm-up gain, of all there was to gain, in recall of attention's mass."""
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


def test_the_warmup_teaches_what_attention_weighs(monkeypatch):
    """Recall rises from 0.35 to 0.54 where the best choice of 8 tokens has 0.56, say."""
    assert learned_share() > 0.8
    monkeypatch.setattr(kernel, "attention_mass", lambda q, k, seen, scale: (
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
