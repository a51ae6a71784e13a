"""Sparse attention: the indexer against its equation, and a model that attends to k tokens.

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
from minids.kernels import indexer as kernel
from minids.model import mla, sparse_attention
from minids.model.cache import LatentCache
from minids.model.rope import apply_rotary_emb, rotations
from minids.model.sparse_attention import (
    Indexer,
    Selection,
    hadamard,
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
    monkeypatch.setattr(sparse_attention, "select", sees_the_future)
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
    monkeypatch.setattr(sparse_attention, "select",
                        lambda scores, visible, k: select(scores, visible, 12))
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
