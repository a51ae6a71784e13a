"""Drafts in the running batch: the same text, the same distribution, fewer steps."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, gap, random_tokens, scrambled
from test_batch import LONG, MODELS, PROMPTS, Reply, alone, as_graphs, serve
from test_speculative import SMALL, agreeing

from minids.generate import generate
from minids.infer.batch import Batch, OwnDraws, draft, draw
from minids.infer.engine import Engine
from minids.infer.sampling import Sampler
from minids.infer.slots import Slots
from minids.model.mtp import MTPModule

DRAWS, V = 20_000, 6


def drafting(name: str = "folded", long: bool = False):
    """A model whose MTP module is often right, and often enough wrong; FP64."""
    args = MODELS[name] if not long else replace(LONG, n_heads=2)
    return agreeing(replace(args, n_mtp_layers=1))


@pytest.mark.parametrize("static", [False, True], ids=["plain", "as graphs"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_generate_in_fewer_steps(name, static, monkeypatch):
    as_graphs(monkeypatch, static)
    model = drafting(name)
    replies = [Reply([*PROMPTS[i % 4], i], 24 - 2 * i, i) for i in range(6)]
    batch = Batch(model, 3, model.args.max_seq_len, chunk=4, drafts=1)
    serve(batch, replies)
    expected = generate(model, [r.job.request.prompt for r in replies], 24).tokens
    assert [r.ids for r in replies] == [row[:24 - 2 * i] for i, row in enumerate(expected)]
    written = [len(step.wrote) / len({*step.wrote}) for step in batch.log if step.wrote]
    assert min(written) == 1 and sum(written) / len(written) > 1.2
    assert batch.written > 1.2 * batch.passes


@pytest.mark.parametrize("together", [True, False], ids=["at once", "one after the other"])
def test_each_step_drafts_what_generate_drafts(together):
    """The module's cache is right too, also of a prompt in pieces and of one that was copied."""
    model, system = drafting(), random_tokens(LONG, 1, 20)[0].tolist()
    prompts = [[*system, 7 * i % 60, i] for i in range(4)] + [[5], [3, 3]]
    replies = [Reply(prompt, 14, i) for i, prompt in enumerate(prompts)]
    batch = Batch(model, 3, 48, chunk=5, drafts=1)
    for part in [replies] if together else [[reply] for reply in replies]:
        serve(batch, part)
    assert sum(sum(step.copied.values()) for step in batch.log) == 3 * 19
    for i, prompt in enumerate(prompts):
        steps = sum(i in step.wrote for step in batch.log)
        assert steps == generate(model, [prompt], 14, speculative=1).steps


def test_alone_and_in_a_batch_the_same_text():
    model = drafting()
    replies = [Reply(PROMPTS[i % 4], 16, i, temperature=0.9, seed=i, top_k=[0, 9][i % 2])
               for i in range(6)]
    serve(Batch(model, 4, 48, drafts=1), replies)
    ids = [reply.ids for reply in replies]
    for reply in replies:
        again = Reply(reply.job.request.prompt, 16, **{
            name: getattr(reply.job.request, name) for name in ("temperature", "seed", "top_k")})
        serve(Batch(model, 1, 48, drafts=1), [again])
        assert again.ids in ids
    assert ids != alone(model, replies)  # without drafts other numbers are drawn


def chi_squares(**settings) -> list[float]:
    """Of tokens that many jobs draw after one text, over the degrees of freedom: of the first, and
    of the one after a draft that passed."""
    torch.manual_seed(0)
    p, after, q = torch.randn(V), torch.randn(V, V), torch.randn(V)
    jobs = [Reply([1], 9, i, seed=i, **settings).job for i in range(DRAWS)]
    draft(jobs, q.expand(DRAWS, V))
    logits = torch.stack([p.expand(DRAWS, V), after[[job.draft for job in jobs]]], dim=1)
    drawn, sampler = draw(jobs, logits), Sampler(**settings)
    first = torch.tensor([tokens[0] for tokens in drawn]).bincount(minlength=V)
    pairs = torch.zeros(V, V)
    for tokens in drawn:
        if len(tokens) == 2:
            pairs[tuple(tokens)] += 1
    found = []
    for seen, expected in ((first, DRAWS * sampler.distribution(p)),
                           (pairs, pairs.sum(1, keepdim=True) * sampler.distribution(after))):
        assert seen[expected == 0].sum() == 0  # a cut lets nothing else through
        often = expected > 5
        terms = (seen - expected)[often] ** 2 / expected[often]
        found.append(terms.sum().item() / (int(often.sum()) - (1 if seen is first else V)))
    return found


@pytest.mark.parametrize("settings", [
    dict(temperature=1.2, top_p=0.8), dict(temperature=0.8, top_k=4),
    pytest.param(dict(temperature=1.0), marks=pytest.mark.slow)])
def test_sampled_tokens_have_the_models_distribution(settings):
    # Of 2 or more degrees of freedom: standard deviation at most 1; of 12 or more, at most 0.4.
    first, second = chi_squares(**settings)
    assert first < 4 and second < 2.5


@pytest.mark.parametrize("wrong", ["all drafts pass", "not what it was drawn from"])
def test_a_wrong_rule_of_acceptance_is_caught(wrong, monkeypatch):
    verify = Sampler.verify

    def lenient(self, drafts, q, p):
        passed, token = verify(self, drafts, q, p)
        return torch.ones_like(passed), token

    def sharper(self, drafts, q, p):
        return verify(self, drafts, q ** 2 / (q ** 2).sum(-1, keepdim=True), p)

    monkeypatch.setattr(OwnDraws, "verify", lenient if wrong == "all drafts pass" else sharper)
    assert max(chi_squares(temperature=1.0)) > 10


def worst_guess() -> float:
    """The largest error of a draft's logits, beside a pass over the whole text without a cache.

    Prompts are read in pieces, two copy the beginning of another, sequences join and leave.
    """
    model, system = scrambled(replace(LITTLE, n_mtp_layers=1)), [*range(20)]
    prompts = [[*system, 7, 5], [8], [*system, 3], [4, 60, 50], [*system, 7, 9]]
    replies = [Reply(prompt, 5 + 3 * i, i) for i, prompt in enumerate(prompts)]
    batch, worst = Batch(model, 3, 48, chunk=5, drafts=1), 0.0
    guess = batch.slots.guess

    def checked(start, stop, tokens, first):
        found = guess(start, stop, tokens, first)
        for row, new, logits in zip(range(start, stop), tokens, found, strict=True):
            nonlocal worst
            text = torch.tensor([[*batch.slots.held[row], new[-1]]])
            states = model.hidden(text[:, :-1]).states
            after = model.mtp[0](states, model.embed(text[:, 1:]), model.context(text[:, 1:]))[0]
            worst = max(worst, gap(logits, model.head(after[0, -1])))
        return found

    batch.slots.guess = checked
    serve(batch, replies)
    assert sum(sum(step.copied.values()) for step in batch.log) == 2 * 19
    return worst


def test_a_draft_is_what_the_module_says_after_the_whole_text():
    assert worst_guess() < 1e-12  # FP64 rounds at 1e-16; a step adds up some thousand numbers


@pytest.mark.parametrize("wrong", ["another sequence's state", "nothing of the prompt",
                                   "a piece's last state forgotten"])
def test_a_wrong_cache_of_the_module_is_caught(wrong, monkeypatch):
    compute, module, follow = Slots.compute_guess, Slots.module, Slots.follow

    def shifted(self, start, stop, longest):
        self.states.copy_(self.states.roll(1, 0))
        compute(self, start, stop, longest)

    def blind(self, states, tokens, part, absorbed):
        return module(self, states, tokens, part, absorbed) if absorbed else None

    def forgetful(self, row, states):
        self.last[row] = 0
        follow(self, row, states)

    name, wrong = {"another sequence's state": ("compute_guess", shifted),
                   "nothing of the prompt": ("module", blind),
                   "a piece's last state forgotten": ("follow", forgetful)}[wrong]
    monkeypatch.setattr(Slots, name, wrong)
    assert worst_guess() > 1e-4


def test_a_reply_may_end_at_either_token_of_a_step():
    model = drafting()
    ids = generate(model, [[5, 9, 2]], 24).tokens[0]
    for n in (*range(1, 9), 23):
        reply, batch = Reply([5, 9, 2], n), Batch(model, 1, 27, drafts=1)
        serve(batch, [reply])
        assert reply.ids == ids[:n] and reply.reason == "length"
        again = Reply([5, 9, 2, *ids[:n]], 1, 1)  # what the row holds is what was written
        serve(batch, [again])
        assert again.ids == ids[n:n + 1] or n == 23
    first = {token: ids.index(token) for token in ids}
    for token, at in first.items():
        end = Reply([5, 9, 2], 24, ends=frozenset([token]))
        serve(Batch(model, 2, 48, drafts=1), [end])
        assert end.ids == ids[:at + 1] and end.reason == "stop"


@pytest.mark.parametrize("where", ["module", "nan"])
def test_one_that_fails_ends_alone(where, monkeypatch):
    model, expected = drafting(), []
    prompts = PROMPTS[:3]
    expected = generate(model, prompts, 12).tokens
    bad = min({*range(64)} - set(sum(expected + prompts, [])))
    broken, good = Reply([1, 2], 12, 9), [Reply(p, 12, i) for i, p in enumerate(prompts)]
    batch = Batch(model, 4, 48, drafts=1)
    serve(batch, [*good[:1], broken, *good[1:]], steps=2)
    broken.job.newest = broken.job.draft = bad
    if where == "nan":
        with torch.no_grad():
            model.embed.weight[bad] = float("nan")
    else:
        forward = MTPModule.forward

        def failing(self, hidden, embedding, context):
            newest = model.embed.weight[broken.job.newest]
            if broken.reason is None and (embedding == newest).all(-1).any():
                raise RuntimeError("a module that fails")
            return forward(self, hidden, embedding, context)

        monkeypatch.setattr(MTPModule, "forward", failing)
    serve(batch, [])
    assert broken.reason == "error" and isinstance(broken.error, Exception)
    assert [reply.ids for reply in good] == expected and not any(batch.jobs)


@pytest.mark.parametrize("drafts, layers", [(2, 1), (1, 0), (-1, 1)])
def test_drafts_that_a_model_cannot_make_are_refused(drafts, layers):
    with pytest.raises(ValueError, match="^drafts = "):
        Engine(agreeing(replace(SMALL, n_mtp_layers=layers)), drafts=drafts)
