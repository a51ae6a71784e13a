"""What the sampler and the trainer say of the same tokens, and who goes to which expert."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, gap, scrambled

from minids.generate import generate
from minids.infer.sampling import Sampler
from minids.kernels import few_tokens
from minids.kernels.attention import one_key_for_all_heads
from minids.kernels.registry import recorded
from minids.model.transformer import Transformer
from minids.parallel.parts import Parts, write_parts
from minids.parallel.team import Alone
from minids.rl.rollout import Rollout, log_probs, roll_out

EOS = 1
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15], [8, 20], [9], [33, 2, 41]]
SHAPES = {"experts in groups": LITTLE, "no query latent": replace(LITTLE, q_lora_rank=0),
          "folded": replace(LITTLE, kv_lora_rank=8),
          "dense": replace(LITTLE, n_routed_experts=0)}


def sampled(model: Transformer, seed: int = 0, temperature: float = 1.0, top_k: int = 0,
            top_p: float = 1.0, new: int = 20) -> Rollout:
    sampler = Sampler(temperature, top_k, top_p, torch.Generator().manual_seed(seed))
    return roll_out(model, PROMPTS, new, sampler, EOS)


def worst(model: Transformer, found: Rollout, **how) -> float:
    """The largest difference between trainer and sampler, nats."""
    with torch.no_grad():
        logp, _ = log_probs(model, found, **how)
    return (logp - found.logp[found.written]).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
# FP32 rounds at 6e-8, and a sum of some hundred products of size one a few times that; log-softmax
# of logits up to 10 adds 1e-6.
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("how", [dict(), dict(temperature=0.7), dict(top_k=5), dict(top_p=0.8)],
                         ids=str)
def test_sampler_and_trainer_agree(shape, dtype, allowed, how):
    model = scrambled(SHAPES[shape], dtype=dtype)
    found = sampled(model, **how)
    assert worst(model, found, temperature=how.get("temperature", 1.0)) < allowed


def test_many_sequences_take_other_products(monkeypatch):
    """From `attention.MANY` sequences on attention is two batched products."""
    model = scrambled(replace(LITTLE, kv_lora_rank=8))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    with recorded() as record:
        found = roll_out(model, PROMPTS * 3, 20, Sampler(1.0), EOS)
    assert record["transformer.Block.forward", "folded_block"] > 0
    assert worst(model, found) < 1e-12
    # Wrong variant: what follows a sequence's end is seen.
    monkeypatch.setattr(few_tokens, "one_key_for_all_heads", lambda q, latent, visible, scale:
                        one_key_for_all_heads(q, latent, None, scale))
    assert worst(model, roll_out(model, PROMPTS * 3, 20, Sampler(1.0), EOS)) > 1e-3


def test_without_the_mask_they_disagree():
    model = scrambled(LITTLE)
    for how in (dict(top_k=5), dict(top_p=0.8)):
        assert worst(model, sampled(model, **how), keep_mask=False) > 0.01
    assert worst(model, sampled(model, temperature=0.7)) > 0.01  # the trainer's is 1 here


def test_kept_routing_is_the_samplers():
    """A model whose gates have changed since: kept routing takes the old experts, and free routing
    does not."""
    model = scrambled(LITTLE)
    found = sampled(model)
    for bias in model.gate_biases():
        bias.add_(torch.linspace(-1, 1, LITTLE.n_routed_experts))
    assert worst(model, found) < 1e-12  # biases choose, and weigh nothing
    assert worst(model, found, keep_routing=False) > 1e-3


def test_recorded_routes_are_those_of_a_pass_over_the_whole_text():
    model = scrambled(LITTLE)
    found = sampled(model)
    for row, tokens in enumerate(found.tokens):
        last = found.written[row].nonzero().max().item() + 1
        routings = model.hidden(tokens[None, :last])[1]
        for layer, routing in zip(found.routes, routings, strict=True):
            chosen = found.routes[layer][row, :last].sort(-1).values
            assert torch.equal(chosen, routing.indices[0].sort(-1).values)


def test_text_is_aligned_from_position_0():
    found = sampled(scrambled(LITTLE))
    for row, prompt in enumerate(PROMPTS):
        assert found.tokens[row, :len(prompt)].tolist() == prompt
        first = found.written[row].nonzero().min().item()
        assert first == len(prompt) - 1
    for reply in found.replies():
        assert 1 <= len(reply) <= 20 and EOS not in reply[:-1]
        assert reply[-1] == EOS or len(reply) == 20


def test_a_part_is_cut_to_its_longest_reply():
    found = sampled(scrambled(LITTLE))
    lengths = [len(p) + len(r) for p, r in zip(PROMPTS, found.replies(), strict=True)]
    assert len(set(lengths)) > 1
    for rows in (slice(None), slice(1, 2), slice(0, 3)):
        part = found.part(rows)
        assert part.tokens.size(1) == max(lengths[rows])
        assert {t.size(1) for t in (part.written, part.logp, *part.routes.values())} == {
            max(lengths[rows]) - 1}
        assert part.replies() == found.replies()[rows]


@pytest.mark.parametrize("how", [dict(), dict(temperature=1e-39), dict(top_k=5), dict(top_p=0.8)],
                         ids=str)
def test_logits_that_are_no_numbers_are_an_error(how):
    model = scrambled(LITTLE)
    with torch.no_grad():
        model.embed.weight[20] = float("nan")  # only the fourth prompt has this token
    with pytest.raises(ValueError, match="^reply 4, token 1: no token can be drawn"):
        sampled(model, **how)


def test_a_temperature_near_zero_is_greedy():
    model = scrambled(LITTLE)
    replies = sampled(model, temperature=1e-39).replies()
    assert replies == generate(model, PROMPTS, 20, eos_id=EOS).tokens


def test_tokens_after_the_end_count_nowhere():
    found = sampled(scrambled(LITTLE), new=40)
    assert any(reply[-1] == EOS and len(reply) < 20 for reply in found.replies())
    assert found.logp[~found.written].eq(0).all()
    assert found.written.sum() == sum(map(len, found.replies()))


def test_the_text_is_what_generate_writes():
    model = scrambled(LITTLE)
    found = sampled(model, seed=3, temperature=0.9)
    plain = generate(model, PROMPTS, 20, temperature=0.9, seed=3, eos_id=EOS)
    assert found.replies() == plain.tokens


def test_the_check_notices_a_misplaced_probability():
    """Wrong variant: probabilities of the token before."""
    model = scrambled(LITTLE)
    found = sampled(model)
    assert worst(model, found._replace(logp=found.logp.roll(1, dims=1))) > 0.1


def test_gradients_are_those_of_plain_cross_entropy():
    model = scrambled(LITTLE)
    found = sampled(model).part(slice(0, 2))
    log_probs(model, found)[0].sum().backward()
    by_replay = model.layers[1].attn.wo.weight.grad.clone()
    model.zero_grad()
    logp = model(found.tokens[:, :-1]).log_softmax(-1)
    picked = logp.gather(-1, found.tokens[:, 1:, None]).squeeze(-1)
    picked[found.written].sum().backward()
    assert gap(by_replay, model.layers[1].attn.wo.weight.grad) < 1e-12


def test_entropy_is_that_of_the_distribution():
    model = scrambled(LITTLE)
    found = sampled(model, top_k=1)
    assert log_probs(model, found)[1].abs().max() == 0  # one token is left
    found = sampled(model)
    probs = model(found.tokens[:, :-1]).softmax(-1)[found.written]
    expected = torch.distributions.Categorical(probs).entropy()
    torch.testing.assert_close(log_probs(model, found)[1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("places", [[2], [5, 3], [9, 6, 4]])
def test_any_of_several_eos_ends_a_reply(places):
    model = scrambled(LITTLE)

    def drawn(ends) -> Rollout:
        generator = torch.Generator().manual_seed(0)
        return roll_out(model, PROMPTS, 20, Sampler(1.0, generator=generator), ends)

    free = drawn(-1)
    ends = [free.replies()[0][place] for place in places]
    found = drawn(ends)
    cut = [next((row[:i + 1] for i, t in enumerate(row) if t in ends), row)
           for row in free.replies()]
    assert found.replies() == cut != free.replies()
    assert worst(model, found) < 1e-12


class Rank(Alone):
    """One of several ranks, which does not meet the others."""

    def __init__(self, rank: int, world: int, longest: int):
        self.rank, self.world, self.longest = rank, world, longest

    def joined(self, items: list) -> list:
        return [*items, self.longest]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_rollout_in_parts_is_read_by_other_ranks(tmp_path, top_p):
    """Two and three ranks write six replies, some padded; one to six ranks read them."""
    whole = sampled(scrambled(LITTLE), top_p=top_p)
    rows = torch.arange(6)
    for world in (2, 3):
        files = []
        for rank in range(world):
            team = Rank(rank, world, whole.tokens.size(1))
            own = whole.part(team.share(rows))  # cut to its own longest
            files.append(tmp_path / f"{world}-{rank}")
            write_parts(files[-1], own.parts(1, team))
        saved = Parts(files)
        for other in (1, 2, 3, 6):
            for rank in range(other):
                team = Rank(rank, other, 0)
                found = Rollout.of_parts(saved, 1, team)
                wanted = whole.each(team.share)
                assert found.replies() == wanted.replies()  # what stands behind them is lost
                written, theirs = found.named(), wanted.named()
                assert written.keys() == theirs.keys()
                for name in written.keys() - {"tokens", "written"}:
                    assert torch.equal(written[name][found.written], theirs[name][wanted.written])


def test_each_rank_reads_its_share_of_each_update(tmp_path):
    whole = sampled(scrambled(LITTLE))
    rows = torch.arange(6).view(3, 2)  # three updates of two replies
    for rank in range(2):
        own = whole.each(lambda values, rank=rank: values[rows[:, rank]])
        write_parts(tmp_path / str(rank), own.parts(3, Rank(rank, 2, 0)))
    saved = Parts([tmp_path / "0", tmp_path / "1"])
    assert torch.equal(Rollout.of_parts(saved, 3, Alone()).tokens, whole.tokens)
    for rank in range(2):
        found = Rollout.of_parts(saved, 3, Rank(rank, 2, 0))
        assert torch.equal(found.tokens, whole.tokens[rows[:, rank]])
    # Wrong variant: as if the reply of each rank stood one after the other.
    assert not torch.equal(Rollout.of_parts(saved, 3, Rank(0, 2, 0)).tokens, whole.tokens[:3])
