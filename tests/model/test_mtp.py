"""Multi-token prediction against an explicit loop over depths and positions."""

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from small_models import LITTLE, gap, random_tokens, scrambled

from minids import Transformer
from minids.model.mtp import MTPModule

EXACT = 1e-12  # FP64 sums in another order
ONE, TWO = (replace(LITTLE, n_mtp_layers=depths) for depths in (1, 2))


def text(args, batch: int = 2, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and targets, (batch, length) each, of a text of length + 1 tokens."""
    ids = random_tokens(args, batch, length + 1)
    return ids[:, :-1], ids[:, 1:]


class Reading(NamedTuple):
    """How V3's equations 21 to 25 are read; the defaults are right.

    embeds: depth k embeds token i + k + embeds
    predicts: depth k predicts token i + k + 1 + predicts
    chained: depth k continues from depth k - 1, not from the main model
    after_norm: depth 1 reads the main model's state after its final norm
    over_all: the sum is divided by T, not by the number of predictions
    averaged: the depths' losses are averaged, not added up
    """

    embeds: int = 0
    predicts: int = 0
    chained: bool = True
    after_norm: bool = True
    over_all: bool = True
    averaged: bool = True


def explicit(model: Transformer, tokens, targets, reading: Reading) -> tuple:
    """The MTP loss and the states of each depth, (B, T - k, D)."""
    ids = torch.cat([tokens[:, :1], targets], dim=1)  # (B, T + 1), the text
    length = tokens.size(1)
    before_norm = []
    hook = model.norm.register_forward_hook(lambda m, inputs, out: before_norm.append(inputs[0]))
    main = previous = model.hidden(tokens)[0]
    hook.remove()
    if not reading.after_norm:
        main = previous = before_norm[0]
    losses, states = [], []
    for k, module in enumerate(model.mtp, start=1):
        n = length - k
        embedded = model.embed(ids[:, k + reading.embeds:][:, :n])
        previous, *_ = module((previous if reading.chained else main)[:, :n], embedded,
                              model.context(tokens[:, :n]))
        states += [previous]
        terms = []
        for i in range(n):
            target = ids[:, min(i + k + 1 + reading.predicts, length)]
            logits = previous[:, i] @ model.head.weight.T
            terms += [F.cross_entropy(logits, target)]
        losses += [sum(terms) / (length if reading.over_all else n)]
    return sum(losses) / (len(losses) if reading.averaged else 1), states


def loss_error(args, reading: Reading) -> float:
    """Return how far the model's MTP loss is from the explicit one under a reading."""
    model, (tokens, targets) = scrambled(args), text(args)
    return gap(model.loss(tokens, targets).mtp, explicit(model, tokens, targets, reading)[0])


@pytest.mark.parametrize("args", [ONE, TWO], ids=["one depth", "two depths"])
def test_the_loss_is_the_explicit_sum(args):
    assert loss_error(args, Reading()) < EXACT


@pytest.mark.parametrize("depths, wrong", [
    (1, dict(embeds=-1)), (1, dict(embeds=1)), (1, dict(predicts=-1)), (1, dict(predicts=1)),
    (1, dict(after_norm=False)), (1, dict(over_all=False)), (2, dict(embeds=-1)),
    (2, dict(predicts=1)), (2, dict(chained=False)), (2, dict(averaged=False)),
    (2, dict(over_all=False))], ids=str)
def test_another_reading_is_caught(depths, wrong):
    assert loss_error((ONE, TWO)[depths - 1], Reading(**wrong)) > 1e-3


@pytest.mark.parametrize("args", [ONE, TWO], ids=["one depth", "two depths"])
def test_every_parameter_has_the_gradient_of_the_explicit_sum(args):
    model, (tokens, targets) = scrambled(args), text(args)
    parameters = dict(model.named_parameters())

    def gradients(loss):
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, grads, strict=True))

    ours = gradients(model.loss(tokens, targets).mtp)
    exact = gradients(explicit(model, tokens, targets, Reading())[0])
    assert all(grad is not None for grad in ours.values())
    # FP64; through every layer, MTP modules and the shared embedding and head.
    assert max(gap(ours[name], exact[name]) for name in parameters) < 1e-10
    reached = {name for name, grad in ours.items() if grad.abs().max() > 0}
    assert {n for n in parameters if n.startswith("mtp.")} <= reached
    assert {"embed.weight", "head.weight", "norm.weight", "layers.0.attn.wo.weight"} <= reached


def module_states(model: Transformer, tokens, targets) -> list[torch.Tensor]:
    """What each MTP module hands to the head while the model computes its loss."""
    states = []
    hooks = [m.register_forward_hook(lambda m, i, out: states.append(out[0])) for m in model.mtp]
    model.loss(tokens, targets)
    for hook in hooks:
        hook.remove()
    return states


def seen(states_of, depth: int, length: int = 7) -> list[set[int]]:
    """For each position of a depth, the tokens of the text that move its state."""
    args = TWO
    ids = random_tokens(args, 1, length + 1)
    before = states_of(ids[:, :-1], ids[:, 1:])[depth - 1]
    result = [set() for _ in range(length - depth)]
    for j in range(length + 1):
        other = ids.clone()
        other[:, j] = (other[:, j] + 1) % args.vocab_size
        states = states_of(other[:, :-1], other[:, 1:])[depth - 1]
        change = (states - before).abs().amax(dim=(0, 2))  # (length - depth,)
        for i in (change > 1e-9).nonzero().flatten().tolist():
            result[i].add(j)
    return result


@torch.no_grad()
def test_position_i_of_depth_k_sees_the_tokens_up_to_i_plus_k_and_no_later_one():
    model = scrambled(TWO)
    for depth in (1, 2):
        assert seen(lambda *ids: module_states(model, *ids), depth) == [
            set(range(i + depth + 1)) for i in range(7 - depth)]


@torch.no_grad()
@pytest.mark.parametrize("off", [1, -1])
def test_an_embedding_one_token_off_is_caught(off):
    """One further and the module sees the token it has to predict; one less and it is blind."""
    model = scrambled(TWO)
    views = seen(lambda *ids: explicit(model, *ids, Reading(embeds=off))[1], 1)
    assert all(max(view) == i + 1 + off for i, view in enumerate(views))
    assert views != [set(range(i + 2)) for i in range(6)]


def joined_error(module: MTPModule) -> float:
    """Return how far a module is from M [enorm(embedding) ; hnorm(hidden)], block, norm."""
    model = scrambled(ONE)
    torch.manual_seed(0)
    hidden, embedding = torch.randn(2, 2, 6, ONE.dim, dtype=torch.float64)
    context = model.context(torch.zeros(2, 6, dtype=torch.int64))
    left, right = module.eh_proj.weight.split(ONE.dim, dim=1)
    x = module.enorm(embedding) @ left.T + module.hnorm(hidden) @ right.T
    expected = module.norm(module.block(x, context)[0])
    return gap(module(hidden, embedding, context)[0], expected)


class HiddenFirst(MTPModule):
    """The paper's order, [hnorm(hidden) ; enorm(embedding)]."""

    def forward(self, hidden, embedding, context):
        joined = torch.cat([self.hnorm(hidden), self.enorm(embedding)], dim=-1)
        x, *found = self.block(self.eh_proj(joined), context)
        return self.norm(x), *found


class NormsExchanged(MTPModule):
    """enorm on the hidden state and hnorm on the embedding."""

    def forward(self, hidden, embedding, context):
        joined = torch.cat([self.hnorm(embedding), self.enorm(hidden)], dim=-1)
        x, *found = self.block(self.eh_proj(joined), context)
        return self.norm(x), *found


class NoFinalNorm(MTPModule):
    """The block's output straight to the head."""

    def forward(self, hidden, embedding, context):
        joined = torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)
        return self.block(self.eh_proj(joined), context)


@torch.no_grad()
def test_a_module_joins_embedding_first():
    module = scrambled(ONE).mtp[0]
    assert joined_error(module) < EXACT
    for wrong in (HiddenFirst, NormsExchanged, NoFinalNorm):
        module.__class__ = wrong
        assert joined_error(module) > 1e-2


def test_without_weight_or_modules_there_is_no_mtp_loss():
    model, (tokens, targets) = scrambled(ONE), text(ONE)
    model.loss(tokens, targets, mtp_weight=0.0).total.backward()
    assert all(p.grad is None for p in model.mtp.parameters())
    assert model.loss(tokens, targets, mtp_weight=0.0).mtp == 0
    bare = scrambled(replace(LITTLE, n_mtp_layers=0))
    assert bare.loss(tokens, targets).mtp == 0 and len(bare.mtp) == 0


def test_the_modules_do_not_touch_the_main_loss():
    model, (tokens, targets) = scrambled(TWO), text(TWO)
    other = copy.deepcopy(model)
    for parameter in other.mtp.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(model.loss(tokens, targets).main, other.loss(tokens, targets).main)
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_text_too_short_for_a_depth_costs_nothing_there(length):
    model, (tokens, targets) = scrambled(TWO), text(TWO, 2, length)
    losses = model.loss(tokens, targets)
    losses.total.backward()
    assert losses.mtp.isfinite() and (losses.mtp > 0) == (length > 1)
