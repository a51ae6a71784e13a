"""Latent attention: two forms, one cache, one mask, one reference written from the equations."""

import copy
import math

import pytest
import torch
from small_models import LITTLE, SHAPES, gap, random_tokens, scrambled

from minids import ModelArgs, Transformer
from minids.kernels.attention import FEW, causal, fused
from minids.model import mla
from minids.model.cache import LatentCache
from minids.model.layers import RMSNorm
from minids.model.mla import MLA, attention
from minids.model.rope import apply_rotary_emb

EXACT = 1e-12  # FP64 sums of a few hundred products in another order
ARGS = LITTLE


def with_attention(model: Transformer, wrong: type) -> Transformer:
    """The same weights, with another attention class."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.attn.__class__ = wrong
    return model


def rms(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + norm.eps) * norm.weight


def turn(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Interleaved pairs of one vector, turned to its position."""
    y = x.clone()
    for i in range(0, len(x), 2):
        angle = position * theta ** (-i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        y[i], y[i + 1] = x[i] * cos - x[i + 1] * sin, x[i] * sin + x[i + 1] * cos
    return y


def reference_layer(attn: MLA, h: torch.Tensor) -> torch.Tensor:
    """V3 equations 1 to 11 for one sequence h: (T, D), in loops."""
    args = attn.args
    nope, rope, theta = args.qk_nope_head_dim, args.qk_rope_head_dim, args.rope_theta
    wkv_b = attn.wkv_b.weight.view(args.n_heads, nope + args.v_head_dim, -1)
    c_kv, k_r, q = [], [], []
    for t, h_t in enumerate(h):
        down = attn.wkv_a.weight @ h_t
        c_kv += [rms(down[:args.kv_lora_rank], attn.kv_norm)]
        k_r += [turn(down[args.kv_lora_rank:], t, theta)]
        full = (attn.wq_b.weight @ rms(attn.wq_a.weight @ h_t, attn.q_norm) if args.q_lora_rank
                else attn.wq.weight @ h_t)
        heads = full.view(args.n_heads, nope + rope)
        q += [[(head[:nope], turn(head[nope:], t, theta)) for head in heads]]
    rows = []
    for t in range(len(h)):
        outputs = []
        for i in range(args.n_heads):
            q_c, q_r = q[t][i]
            scores = torch.stack([q_c @ (wkv_b[i, :nope] @ c_kv[j]) + q_r @ k_r[j]
                                  for j in range(t + 1)])
            probs = torch.softmax(scores / math.sqrt(nope + rope), dim=0)
            outputs += [sum(p * (wkv_b[i, nope:] @ c) for p, c in zip(probs, c_kv, strict=False))]
        rows += [attn.wo.weight @ torch.cat(outputs)]
    return torch.stack(rows)


class NopeScale(MLA):
    """Scores divided by the root of the part without position alone."""

    def naive(self, *inputs):
        self.scale = self.args.qk_nope_head_dim ** -0.5
        return super().naive(*inputs)


class NoKVNorm(MLA):
    """The latent as it comes out of the down-projection."""

    def latent(self, x, rotation):
        c_kv, k_pe = self.wkv_a(x).split([self.args.kv_lora_rank, self.args.qk_rope_head_dim], -1)
        return torch.cat([c_kv, apply_rotary_emb(k_pe.unsqueeze(2), rotation).squeeze(2)], dim=-1)


class KeyPerHead(MLA):
    """Another rotated key for each head: here the shared one, moved on by the head's number."""

    def naive(self, q_nope, q_pe, latent, visible):
        q_pe = torch.stack([q_pe[:, :, i].roll(i, -1) for i in range(q_pe.size(2))], dim=2)
        return super().naive(q_nope, q_pe, latent, visible)


class NormalisedKey(MLA):
    """One norm over latent and rotated key together."""

    def latent(self, x, rotation):
        rank = self.args.kv_lora_rank
        latent = super().latent(x, rotation)
        raw = self.wkv_a(x)
        scale = raw.pow(2).mean(-1, keepdim=True).rsqrt()
        key = apply_rotary_emb((raw[..., rank:] * scale).unsqueeze(2), rotation).squeeze(2)
        return torch.cat([latent[..., :rank], key], dim=-1)


class RopeFirst(MLA):
    """A head's query read as [rotated ; without position]."""

    def queries(self, c_q, rotation):
        q = (self.wq_b if self.args.q_lora_rank else self.wq)(c_q)
        q = q.unflatten(-1, (self.args.n_heads, -1))
        q_pe, q_nope = q.split([self.args.qk_rope_head_dim, self.args.qk_nope_head_dim], dim=-1)
        return q_nope, apply_rotary_emb(q_pe, rotation)


def layer_error(attn: MLA) -> float:
    """Return how far an attention layer is from the reference, over a batch of two sequences."""
    torch.manual_seed(0)
    h = torch.randn(2, 9, attn.args.dim, dtype=torch.float64)
    context = Transformer(attn.args).context(torch.zeros(2, 9, dtype=torch.int64))
    expected = torch.stack([reference_layer(attn, row) for row in h])
    return gap(attn(h, context)[0], expected)


def first_attention(args: ModelArgs, kind: type = MLA) -> MLA:
    return with_attention(scrambled(args), kind).layers[0].attn


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_layer_is_the_papers_equations(shape):
    # The layer's angles are FP32: at position 8 they are off by up to 8 * 2^-23 = 1e-6.
    assert layer_error(first_attention(SHAPES[shape])) < 3e-6


@pytest.mark.parametrize("wrong", [NopeScale, NoKVNorm, KeyPerHead, NormalisedKey, RopeFirst])
@torch.no_grad()
def test_a_wrong_layer_is_caught(wrong):
    assert layer_error(first_attention(ARGS, wrong)) > 1e-2


class LatentScale(MLA):
    """The absorbed form scaled by the width of its own keys."""

    def absorbed(self, *inputs):
        self.scale = (self.args.kv_lora_rank + self.args.qk_rope_head_dim) ** -0.5
        return super().absorbed(*inputs)


class NoPosition(MLA):
    """The absorbed form with the rotated part left out."""

    def absorbed(self, q_nope, q_pe, latent, visible):
        return super().absorbed(q_nope, 0 * q_pe, latent, visible)


def form_gap(model: Transformer) -> float:
    """Return how far the logits of the two forms lie apart."""
    tokens = random_tokens(model.args, 3, 20)
    naive = copy.deepcopy(model)(tokens)  # a wrong class may leave its scale behind
    return gap(model(tokens, absorbed=True), naive)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_naive_equals_absorbed(shape):
    assert form_gap(scrambled(SHAPES[shape])) < EXACT


@pytest.mark.parametrize("wrong", [LatentScale, NoPosition])
@torch.no_grad()
def test_a_wrong_absorption_is_caught(wrong):
    assert form_gap(with_attention(scrambled(ARGS), wrong)) > 1e-2


def test_the_forms_have_the_same_gradients():
    model, tokens = scrambled(ARGS), random_tokens(ARGS, 2, 8)
    parameters = list(model.layers.parameters())
    naive, absorbed = (torch.autograd.grad(model(tokens, absorbed=form).square().sum(), parameters)
                       for form in (False, True))
    assert max(gap(a, b) for a, b in zip(absorbed, naive, strict=True)) < EXACT


def leak(forward, args: ModelArgs = ARGS, length: int = 12) -> float:
    """Return how much the logits before position p move when all tokens from p on are exchanged."""
    tokens = random_tokens(args, 2, length)
    logits, worst = forward(tokens), 0.0
    for p in (1, length // 2, length - 1):
        other = torch.cat([tokens[:, :p], (tokens[:, p:] + 1) % args.vocab_size], dim=1)
        moved = forward(other)
        assert not torch.equal(moved[:, p:], logits[:, p:])  # the exchange is not in vain
        worst = max(worst, (moved[:, :p] - logits[:, :p]).abs().max().item())
    return worst


def cached(model: Transformer, absorbed: bool = False, chunk: int = 12):
    """The forward pass of a model through a fresh cache, a few tokens at a time."""
    def forward(tokens):
        cache = LatentCache(model.args, len(tokens), model.args.max_seq_len, dtype=torch.float64)
        return torch.cat([model(part, cache, absorbed) for part in tokens.split(chunk, 1)], dim=1)
    return forward


def every_path(model: Transformer) -> dict:
    return {"naive": model, "absorbed": lambda t: model(t, absorbed=True),
            "prefill": cached(model), "absorbed prefill": cached(model, True),
            "chunks": cached(model, chunk=5), "absorbed chunks": cached(model, True, 5)}


@torch.no_grad()
def test_a_future_token_never_moves_a_past_logit(monkeypatch):
    model = scrambled(ARGS)
    paths = every_path(model)
    for name, forward in paths.items():
        assert leak(forward) < EXACT, name
    for body in (fused, attention.plain):
        monkeypatch.setattr(mla, "attention", body)
        for name in ("naive", "prefill", "chunks"):
            assert leak(paths[name]) < EXACT, f"{name}, {body}"


def off_by_one(queries: int, keys: int, device=None) -> torch.Tensor:
    """A mask that lets each query see one key too many."""
    return torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries + 1)


class PeeksInTheCache(Transformer):
    """Visible keys one position too far."""

    def context(self, tokens, cache=None, *inputs):
        context = super().context(tokens, cache, *inputs)
        if cache is None:
            return context
        keys = cache.length + tokens.size(1)
        return context._replace(visible=off_by_one(tokens.size(1), keys))


@torch.no_grad()
def test_a_leaky_mask_is_caught(monkeypatch):
    model = scrambled(ARGS)
    peeking = copy.deepcopy(model)
    peeking.__class__ = PeeksInTheCache
    for name, forward in every_path(peeking).items():
        assert (leak(forward) > 1e-3) == ("prefill" in name or "chunks" in name), name
    monkeypatch.setattr(mla, "causal", off_by_one)
    monkeypatch.setattr("minids.kernels.attention.causal", off_by_one)
    for name in ("naive", "absorbed"):
        assert leak(every_path(model)[name]) > 1e-3, name


def decode_gap(model: Transformer, sizes: list[int], absorbed: bool) -> float:
    """Return how far the logits of tokens fed in pieces are from those of the whole."""
    tokens = random_tokens(model.args, 2, sum(sizes))
    cache = LatentCache(model.args, 2, sum(sizes), dtype=torch.float64)
    parts = [model(part, cache, absorbed) for part in tokens.split(sizes, dim=1)]
    assert cache.length == sum(sizes) and cache.room == 0
    return gap(torch.cat(parts, dim=1), model(tokens))


PIECES = {"one by one": [1] * 12, "prefill, then one by one": [8, 1, 1, 1, 1],
          "uneven chunks": [5, 1, 4, 2], "whole": [12]}


@pytest.mark.parametrize("absorbed", [False, True], ids=["naive", "absorbed"])
@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_cached_equals_uncached(pieces, absorbed):
    for args in SHAPES.values():
        assert decode_gap(scrambled(args), PIECES[pieces], absorbed) < EXACT


class ForgetsPosition(Transformer):
    """Each chunk starts again at position 0."""

    def context(self, tokens, cache=None, *inputs):
        fresh = super().context(tokens)
        return super().context(tokens, cache, *inputs)._replace(rotation=fresh.rotation)


class TopLeftMask(Transformer):
    """A chunk's mask aligned with the first keys instead of the last, as `is_causal` would."""

    def context(self, tokens, cache=None, *inputs):
        context = super().context(tokens, cache, *inputs)
        if cache is None:
            return context
        shape = 1, tokens.size(1), cache.length + tokens.size(1)
        return context._replace(visible=torch.ones(shape, dtype=torch.bool).tril())


@pytest.mark.parametrize("wrong", [ForgetsPosition, TopLeftMask])
@torch.no_grad()
def test_a_wrong_chunk_is_caught(wrong):
    model = scrambled(ARGS)
    model.__class__ = wrong
    assert decode_gap(model, PIECES["uneven chunks"], False) > 1e-2
    assert decode_gap(model, PIECES["uneven chunks"], True) > 1e-2
    assert decode_gap(model, PIECES["whole"], False) < EXACT  # where these slips do no harm


def padding_gap(model: Transformer, lengths: list[int], steps: int, absorbed: bool,
                truncated: bool = True) -> float:
    """Return how far a batch of unequal prompts, padded on the right, is from each prompt alone.

    steps: tokens fed one by one after the prompts; truncated: whether the cache is told of it
    """
    longest, args = max(lengths), model.args
    tokens = random_tokens(args, len(lengths), longest + steps)
    cache = LatentCache(args, len(lengths), longest + steps, dtype=torch.float64)
    prompts, more = tokens.split([longest, steps], dim=1)
    read = model(prompts, cache, absorbed)
    if truncated:
        cache.truncate(torch.tensor(lengths))
    rest = [model(part, cache, absorbed) for part in more.split(1, dim=1)]
    gaps = []
    for i, n in enumerate(lengths):
        alone = model(torch.cat([prompts[i:i + 1, :n], more[i:i + 1]], dim=1))[0]
        gaps += [gap(torch.cat([read[i, :n], *(r[i] for r in rest)]), alone)]
    return max(gaps)


@pytest.mark.parametrize("absorbed", [False, True], ids=["naive", "absorbed"])
@torch.no_grad()
def test_a_batch_of_unequal_prompts_equals_each_prompt_alone(absorbed):
    for args in SHAPES.values():
        assert padding_gap(scrambled(args), [3, 7, 1, 7, 5], 4, absorbed) < EXACT


@torch.no_grad()
def test_padding_that_counts_as_text_is_caught():
    for absorbed in (False, True):
        assert padding_gap(scrambled(ARGS), [3, 7, 5], 2, absorbed, truncated=False) > 1e-2


def filled_cache(model: Transformer, length: int = 6) -> LatentCache:
    cache = LatentCache(model.args, 2, length + 1, dtype=torch.float64)
    model(random_tokens(model.args, 2, length), cache)
    return cache


@torch.no_grad()
def test_the_cache_holds_latent_and_rotated_key_and_nothing_else():
    model = scrambled(ARGS)
    cache = filled_cache(model)
    tensors = {k: v for k, v in vars(cache).items() if isinstance(v, torch.Tensor)}
    assert list(tensors) == ["latents", "rotations"]  # the latter is the same for every model
    numbers = tensors["latents"].numel() / (2 * 7 * ARGS.n_layers)  # a token and layer
    assert numbers == ARGS.kv_lora_rank + ARGS.qk_rope_head_dim == 26
    v3 = ModelArgs.preset("v3")
    assert LatentCache(v3, 1, 1, device="meta").latents.numel() == 576 * 61
    # Each of the 26 numbers is read: without it the next token's logits move.
    token = random_tokens(ARGS, 2, 1, seed=5)
    logits = model(token, filled_cache(model), absorbed=True)
    for column in range(26):
        damaged = filled_cache(model)
        damaged.latents[..., column] = 0
        assert gap(model(token, damaged, absorbed=True), logits) > 1e-6


def latent_rms(model: Transformer) -> torch.Tensor:
    """Root mean square of each cached latent without the norm's weight: 1 if normalised."""
    latents = filled_cache(model).latents[:, :, :6, :ARGS.kv_lora_rank]
    weights = torch.stack([layer.attn.kv_norm.weight for layer in model.layers])
    return (latents / weights[:, None, None]).square().mean(-1).sqrt()


@torch.no_grad()
def test_the_cached_latent_is_normalised():
    model = scrambled(ARGS)
    assert (latent_rms(model) - 1).abs().max() < 1e-4  # eps under the root
    assert (latent_rms(with_attention(model, NoKVNorm)) - 1).abs().max() > 0.1


def test_a_full_cache_says_so():
    model = scrambled(ARGS)
    with pytest.raises(ValueError, match="8 tokens are too many: this model and cache hold 7"):
        model(random_tokens(ARGS, 2, 2), filled_cache(model))
    assert LatentCache(ARGS, 3, 9).room == 9


@pytest.mark.parametrize("before, count, masked", [
    (0, 4, False), (5, 1, False), (5, 2, True), (5, FEW, True), (5, FEW + 1, False)])
def test_a_mask_is_made_for_a_few_tokens_behind_others(before, count, masked):
    cache = LatentCache(ARGS, 1, 20)
    cache.length = before
    turns, visible = cache.look(count)
    assert torch.equal(turns[0], cache.rotations[before:before + count])
    assert torch.equal(visible, causal(count, before + count)) if masked else visible is None
