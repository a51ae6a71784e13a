"""Speculative decoding against plain decoding, token for token and in distribution."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_models import LITTLE, gap, random_tokens, scrambled

from minids import ModelArgs, Transformer
from minids.apply.folded import fold
from minids.generate import generate
from minids.hf import load_hf, save_hf
from minids.infer import speculative
from minids.infer.generation import Generation
from minids.infer.sampling import Sampler
from minids.kernels.attention import FEW
from minids.model.cache import LatentCache

NARROW = replace(LITTLE, n_heads=2)  # latents narrow enough to fold the expansions
EXACT = 1e-12  # FP64 rounds at 1e-16; a step adds up some thousand numbers
PROMPTS = [[5, 9, 2, 33, 7], [8], [1, 2, 3], [4, 60, 50, 40, 30]]
# Of few heads the indexer's scores are often all 0, and which of equal ones it takes is left open.
SHAPES = {
    "folded": NARROW,
    "not folded": LITTLE,
    "sparse attention": replace(LITTLE, index_n_heads=16, index_head_dim=16, index_topk=6),
    "dense": replace(NARROW, n_routed_experts=0),
}


def agreeing(args: ModelArgs, seed: int = 0) -> Transformer:
    """A model whose MTP modules are often right, and often enough wrong.

    The likeliest token follows from the one before, a little disturbed by the blocks.
    """
    model = scrambled(args, seed)
    with torch.no_grad():
        for block in [*model.layers, *(module.block for module in model.mtp)]:
            block.attn.wo.weight.mul_(0.8)
            for name, weight in block.ffn.named_parameters():
                if "w2" in name:
                    weight.mul_(0.8)
        model.head.weight.copy_(model.embed.weight.roll(1, dims=0))
        for module in model.mtp:
            module.eh_proj.weight[:, :args.dim] = torch.eye(args.dim)
            module.eh_proj.weight[:, args.dim:] *= 0.3
    return model


@pytest.mark.parametrize("depth, drafts", [(1, 1), (1, 3), (2, 2), (3, 2), *(
    pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 1), (3, 5)))])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_that_of_plain_decoding(shape, depth, drafts):
    model = agreeing(replace(SHAPES[shape], n_mtp_layers=depth))
    plain = generate(model, PROMPTS, 24)
    done = generate(model, PROMPTS, 24, speculative=drafts)
    assert done.tokens == plain.tokens
    assert plain.passed == [[0] * (plain.steps - 1)] * len(PROMPTS)  # the prompts' pass is none
    assert max(map(len, done.passed)) == done.steps - 1
    passed = [n for row in done.passed for n in row]
    assert 0 in passed and drafts in passed  # both branches were taken
    assert done.steps < plain.steps
    assert done.tokens_per_pass == 1 + sum(passed) / len(passed)
    assert len(done.acceptance) == drafts


def test_acceptance_counts_drafts_whose_predecessors_were_accepted():
    done = Generation([[1]], steps=4, seconds=1.0, prompt_tokens=1, drafts=2, passed=[[2, 0], [1]])
    assert done.acceptance == [2 / 3, 1 / 2]  # of three first drafts two, of two second drafts one
    assert done.tokens_per_pass == 2


def test_each_prompt_gets_what_it_gets_alone():
    model = agreeing(replace(NARROW, n_mtp_layers=2))
    together = generate(model, PROMPTS, 20, speculative=2)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 20, speculative=2)
        assert alone.tokens == [together.tokens[row]] and alone.passed == [together.passed[row]]


def test_eos_ends_a_sequence_inside_a_round():
    """At every second place of the first text, and wherever the others have that token."""
    model = agreeing(NARROW)
    for eos in {*generate(model, PROMPTS, 20).tokens[0][::2]}:
        plain = generate(model, PROMPTS, 20, eos_id=eos)
        assert generate(model, PROMPTS, 20, eos_id=eos, speculative=3).tokens == plain.tokens


def test_the_longest_sequence_fits():
    model = agreeing(replace(NARROW, n_mtp_layers=2))
    done = generate(model, [[1] * 35], 10, speculative=2)  # and 2 drafts, and 1 position before
    assert done.tokens == generate(model, [[1] * 35], 10).tokens


def wrong_texts(monkeypatch, where, name, wrong, args=NARROW, drafts=2) -> int:
    """Return how many of the texts differ from plain decoding's with a part replaced."""
    model = agreeing(args)
    plain = generate(model, PROMPTS, 24).tokens
    monkeypatch.setattr(where, name, wrong)
    done = generate(model, PROMPTS, 24, speculative=drafts).tokens
    return sum(a != b for a, b in zip(plain, done, strict=True))


def test_drafts_that_nobody_checks_are_caught(monkeypatch):
    def unverified(self, drafts, q, p):
        return torch.full((len(drafts),), drafts.size(1)), self.draw(p[:, -1])

    assert wrong_texts(monkeypatch, Sampler, "verify", unverified) == len(PROMPTS)


def test_a_cache_that_goes_back_too_far_is_caught(monkeypatch):
    truncate = LatentCache.truncate

    def one_too_far(self, lengths, longest=None):
        truncate(self, (lengths - 1).clamp(min=0))

    assert wrong_texts(monkeypatch, LatentCache, "truncate", one_too_far) > 0


def test_a_batch_that_goes_back_together_is_caught(monkeypatch):
    def together(self, lengths, longest=None):
        self.length, self.lengths = int(lengths.min()), None

    assert wrong_texts(monkeypatch, LatentCache, "truncate", together) > 0


def module_states(model: Transformer, text: list[int], depth: int) -> torch.Tensor:
    """What module `depth` makes of a text in training: (its positions, D)."""
    tokens = torch.tensor([text])
    states = model.hidden(tokens)[0]
    for k in range(1, depth + 1):
        states = states[:, :-1]
        context = model.context(tokens[:, k:])
        states = model.mtp[k - 1](states, model.embed(tokens[:, k:]), context)[0]
    return states[0]


def rounds_of(model: Transformer, drafts: int, monkeypatch) -> list[tuple[list, list, bool]]:
    """Each sequence's text, the drafts for it, and whether it goes on, round by round."""
    rounds, draft = [], speculative.draft

    def recorded(text, *inputs):
        proposed = draft(text, *inputs)
        known = [text.slots[row, :end + 1].tolist() for row, end in enumerate(text.end.tolist())]
        goes_on = (text.end < text.last).tolist()
        rounds.extend(zip(known, proposed[0].tolist(), goes_on, strict=True))
        return proposed

    monkeypatch.setattr(speculative, "draft", recorded)
    generate(model, PROMPTS, 12, speculative=drafts)
    return rounds


@pytest.mark.parametrize("kind, depth", [
    (agreeing, 1), (scrambled, 2), (agreeing, 3), *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in ((scrambled, 1), (agreeing, 2), (scrambled, 3)))])
@torch.no_grad()
def test_further_drafts_go_on_from_the_last_modules_own_state(kind, depth, monkeypatch):
    model = kind(replace(NARROW, n_mtp_layers=depth))
    rounds = [found[:2] for found in rounds_of(model, depth + 2, monkeypatch) if found[2]]
    assert len(rounds) > 10
    for known, drafts in rounds:
        text = known + drafts[:depth - 1]
        states = module_states(model, text, depth - 1)[None, :-1]
        for k in range(depth, depth + 3):
            tokens = torch.tensor([text[depth:]])
            out = model.mtp[-1](states, model.embed(tokens), model.context(tokens))[0][:, -1:]
            assert model.head(out).argmax() == drafts[k - 1], k
            states, text = torch.cat([states, out], dim=1), [*text, drafts[k - 1]]


@pytest.mark.parametrize("shape, depth", [
    ("folded", 1), ("not folded", 2), ("folded", 3), *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("not folded", 1), ("folded", 2), ("not folded", 3)))])
def test_drafts_are_what_the_modules_learnt(shape, depth, monkeypatch):
    """Draft k is the choice of module k, as in training, after the text and the drafts before."""
    model = agreeing(replace(SHAPES[shape], n_mtp_layers=depth))
    rounds, checked = rounds_of(model, depth, monkeypatch), 0
    with torch.no_grad():
        for text, drafts, _ in rounds:
            for k, token in enumerate(drafts, start=1):
                state = module_states(model, text + drafts[:k - 1], k)[-1]
                assert model.head(state).argmax() == token
                checked += 1
    assert checked == len(rounds) * depth > 25


def test_a_window_does_not_begin_before_the_text():
    states = torch.arange(8).view(2, 4, 1)
    window = speculative.Window(states, start=torch.tensor([-1, 2]), at=torch.tensor([2, 3]))
    assert window.start.tolist() == [0, 2] and window.at.tolist() == [1, 3]
    assert window.states.flatten(1).tolist() == [[1, 2, 3, 3], [4, 5, 6, 7]]
    assert window.last_states(2).flatten(1).tolist() == [[1, 2], [6, 7]]
    assert window.last_states(3).flatten(1).tolist() == [[1, 1, 2], [5, 6, 7]]
    assert window.last_states(0).shape == (2, 0, 1)


@pytest.mark.parametrize("shape", ["folded", "dense"])
def test_folded_weights_serve_several_tokens_of_sequences_of_unequal_length(shape):
    args = replace(SHAPES[shape], n_mtp_layers=2)
    model, tokens = scrambled(args), random_tokens(args, 3, 20)
    filled, states = torch.tensor([6, 4, 5]), torch.randn(3, 4, args.dim).double()
    outs = []
    with torch.inference_mode():
        for with_folding in (False, True):
            modules = range(args.n_layers, args.n_layers + 2)
            cache, ahead = (LatentCache(args, 3, 20, dtype=torch.float64, layers=layers)
                            for layers in (None, modules))
            model(tokens[:, :8], cache)
            if with_folding:
                fold(model, cache)
                fold(model, ahead)
                assert sorted(ahead.folded) == [args.n_layers, args.n_layers + 1]
            cache.truncate(filled)
            out = [model(tokens[:, 8:11], cache, True), model(tokens[:, 11:12], cache, True)]
            ahead.truncate(filled)
            embedded = model.embed(tokens[:, 12:16])
            out += [module(states, embedded, model.context(tokens[:, 12:16], ahead, True))[0]
                    for module in model.mtp]
            cache.truncate(filled + 4)
            out += [model(tokens[:, 16:18], cache, True), cache.latents, ahead.latents]
            outs.append(out)
    assert max(gap(b, a) for a, b in zip(*outs, strict=True)) < EXACT


def test_modules_of_a_hugging_face_folder_draft(tmp_path):
    model = agreeing(replace(LITTLE, rope_factor=1.0), seed=3).float()
    save_hf(model, tmp_path / "folder")
    loaded = load_hf(tmp_path / "folder")
    done = generate(loaded, PROMPTS, 16, speculative=2)
    assert done.tokens == generate(model, PROMPTS, 16).tokens
    assert done.passed == generate(model, PROMPTS, 16, speculative=2).passed
    assert done.tokens_per_pass > 1.3


def test_going_back_forgets_what_came_after():
    model, tokens = scrambled(LITTLE), random_tokens(LITTLE, 2, 12)
    cache = LatentCache(LITTLE, 2, 12, dtype=torch.float64)
    with torch.inference_mode():
        model(tokens[:, :9], cache)
        cache.truncate(torch.tensor([3, 5]))
        again = torch.stack([tokens[0, 3:7], tokens[1, 5:9]])
        cached = model(again, cache, absorbed=True)
        whole = model(tokens)
    assert gap(cached[0], whole[0, 3:7]) < EXACT and gap(cached[1], whole[1, 5:9]) < EXACT
    assert cache.length == 9 and cache.lengths.tolist() == [7, 9]
    cache.truncate(torch.tensor([4, 4]))
    assert cache.length == 4 and cache.lengths is None


SMALL = ModelArgs(
    vocab_size=6, max_seq_len=16, dim=8, inter_dim=12, moe_inter_dim=8, n_layers=1,
    n_dense_layers=1, n_heads=2, n_routed_experts=0, q_lora_rank=0, kv_lora_rank=8,
    qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
DRAWS = 30_000  # wrong rules are then at 15 and more below
NEW = 3


def exact_distribution(model: Transformer, prompt: list[int], sampler: Sampler) -> torch.Tensor:
    """The probability of each text of NEW tokens, (V^NEW,)."""
    texts = torch.cartesian_prod(*[torch.arange(SMALL.vocab_size)] * NEW)
    tokens = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        probs = sampler.distribution(model(tokens))[:, len(prompt) - 1:-1]  # (N, NEW, V)
    return probs.gather(-1, texts.unsqueeze(-1)).squeeze(-1).prod(-1)


def chi_square(drafts: int, depth: int, settings: dict) -> float:
    """Of sampled texts against their exact probabilities, over its degrees of freedom."""
    model = scrambled(replace(SMALL, n_mtp_layers=depth), dtype=torch.float32)
    expected = DRAWS * exact_distribution(model, [3, 1], Sampler(**settings)).double()
    done = generate(model, [[3, 1]] * DRAWS, NEW, **settings, speculative=drafts, seed=4)
    assert {0, drafts} <= {n for row in done.passed for n in row}
    texts = torch.tensor(done.tokens)
    code = (texts * SMALL.vocab_size ** torch.arange(NEW - 1, -1, -1)).sum(1)
    seen = code.bincount(minlength=len(expected)).double()
    assert seen[expected == 0].sum() == 0  # a cut lets nothing else through
    often = expected > 5
    terms = (seen - expected)[often] ** 2 / expected[often]
    return terms.sum().item() / (int(often.sum()) - 1)


@pytest.mark.parametrize("drafts, depth, settings", [
    (2, 2, dict(temperature=0.8)), (1, 1, dict(temperature=1.5, top_p=0.8)),
    pytest.param(2, 1, dict(temperature=1.0, top_k=3), marks=pytest.mark.slow),
    pytest.param(1, 1, dict(temperature=1.0), marks=pytest.mark.slow),
    pytest.param(2, 1, dict(temperature=1.0), marks=pytest.mark.slow)])
def test_sampled_text_has_exactly_the_models_distribution(drafts, depth, settings):
    # Of 20 or more degrees of freedom: standard deviation at most 0.32, some 0.1 for 200.
    assert chi_square(drafts, depth, settings) < 1.8


def from_p(self, drafts, q, p):
    passed, _ = verify(self, drafts, q, p)
    return passed, self.draw(p[torch.arange(len(p)), passed])


def backwards(self, drafts, q, p):
    return verify(self, drafts, p[:, :-1], torch.cat([q, p[:, -1:]], dim=1))


verify = Sampler.verify


@pytest.mark.parametrize("wrong", [from_p, backwards])
def test_a_wrong_rule_of_acceptance_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(Sampler, "verify", wrong)
    assert chi_square(1, 1, dict(temperature=1.0)) > 5


def test_a_wrong_distribution_of_the_drafts_is_caught(monkeypatch):
    """What the drafter drew from, and what it says that it drew from, must be the same."""
    draft = speculative.draft

    def sharper(*inputs):
        drafts, q = draft(*inputs)
        return drafts, (q ** 2) / (q ** 2).sum(-1, keepdim=True)

    monkeypatch.setattr(speculative, "draft", sharper)
    assert chi_square(1, 1, dict(temperature=1.0)) > 5


def test_prompts_are_read_in_the_naive_form_and_what_follows_in_the_absorbed_one(monkeypatch):
    """Which one is only a matter of time."""
    read, hidden = [], Transformer.hidden

    def noting(model, tokens, cache=None, absorbed=False, **rest):
        read.append((tokens.size(1), absorbed))
        return hidden(model, tokens, cache, absorbed, **rest)

    monkeypatch.setattr(Transformer, "hidden", noting)
    for how, width in ((dict(), 1), (dict(speculative=2), 3)):
        read.clear()
        done = generate(scrambled(LITTLE), PROMPTS, 6, **how)
        assert read == [(5, False)] + (done.steps - 1) * [(width, True)]


@pytest.mark.parametrize("static, count, folded, absorbed", [
    (False, 1, None, False), (False, 1, {}, True), (True, FEW, None, True),
    (True, FEW + 1, None, False), (True, FEW + 1, {}, True)])
def test_a_module_has_the_absorbed_form_if_folded_or_for_a_few_tokens_of_a_graph(
        static, count, folded, absorbed):
    model = SimpleNamespace(context=lambda tokens, cache, absorbed: absorbed, embed=lambda x: x,
                            mtp=[None, lambda states, embedding, context: (context,)])
    text = SimpleNamespace(model=model, session=SimpleNamespace(static=static),
                           ahead=SimpleNamespace(folded=folded))
    assert speculative.Text.module(text, 1, None, torch.zeros(1, count)) == absorbed
