"""GRPO: truncated replies left out of the loss, and steps that have nothing to learn from.

The released cold start of `data/r1` answers, so nothing is trained first.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_grpo import PARTS, SMALL, as_flags, learner, run_grpo

from minids import grpo as grpo_module
from minids.grpo import Reinforcer, why_no_signal
from minids.rl.objectives import token_weights
from minids.rl.rollout import log_probs

BASE = Path("data/r1/sft")


def with_truncated(out: Path, **changed) -> Reinforcer:
    """A learner in FP64 with a rollout, half of whose replies have an end, of unequal lengths."""
    made = learner(BASE, out, max_new_tokens=6, format_weight=1.0, length_weight=1.0,
                   mask_truncated=True, kl_beta=0.0, advantage="mean", **changed)
    made.model.double()
    rollout = made.sample(0)
    for row, written in enumerate(rollout.written[::2]):
        last = written.nonzero()[row % int(written.sum())].item()
        written[last + 1:] = False
        rollout.tokens[2 * row, last + 1] = made.tokenizer.eos_id
    for tokens, written in zip(rollout.tokens[1::2], rollout.written[1::2], strict=True):
        written[tokens[1:].eq(made.tokenizer.eos_id)] = False  # an end is none any more
    with torch.no_grad():
        logp, _ = log_probs(made.model, rollout)
    rollout.logp[rollout.written] = logp.to(rollout.logp.dtype)
    made.batch = made.judge(0, rollout)
    return made


def by_hand(made: Reinforcer, normalise: str) -> dict[str, torch.Tensor]:
    """The gradient of -sum w A log pi over the replies with an end, reply by reply."""
    rollout, rewards = made.batch.rollout, made.batch.rewards.double()
    advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()  # over the whole group
    ended = [ids[-1] == made.tokenizer.eos_id for ids in rollout.replies()]
    sizes = [len(ids) for ids, end in zip(rollout.replies(), ended, strict=True) if end]
    logp, _ = log_probs(made.model, rollout)
    logps, loss = logp.split(rollout.written.sum(1).tolist()), 0.0
    for end, one, a in zip(ended, logps, advantage, strict=True):
        weight = {"sequence": 1 / (len(sizes) * len(one)), "tokens": 1 / sum(sizes),
                  "constant": 1 / (len(ended) * made.args.max_new_tokens)}[normalise]
        loss = loss - end * weight * a * one.sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    return found


def gap(made: Reinforcer, expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of the gradients, as a share of the largest gradient."""
    made.learn(0)
    largest = max(grad.abs().max() for grad in expected.values())
    return max((p.grad - expected[n]).abs().max() / largest
               for n, p in made.model.named_parameters() if n in expected).item()


@pytest.mark.parametrize("normalise", ["sequence", "tokens", "constant"])
def test_truncated_replies_are_left_out(tmp_path, normalise, monkeypatch):
    made = with_truncated(tmp_path / "run", normalise=normalise, micro_batch=5)
    assert made.batch.kept.tolist() == [True, False] * 8 and made.batch.metrics["truncated"] == 0.5
    expected = by_hand(made, normalise)
    assert gap(made, expected) < 1e-6  # weights, advantages and log pi_old are FP32
    made.model.zero_grad()
    monkeypatch.setattr(grpo_module, "token_weights", lambda *given: (  # masked after normalising
        token_weights(*given[:3]) * given[3]))
    assert (gap(made, expected) > 0.01) == (normalise != "constant")
    plain = learner(BASE, tmp_path / "plain", max_new_tokens=6)
    assert plain.judge(0, made.batch.rollout).kept.all()  # by default they count


def test_a_rollout_without_any_end_has_no_gradient_and_no_signal(tmp_path):
    made = learner(BASE, tmp_path / "run", mask_truncated=True, max_new_tokens=2, kl_beta=1.0)
    rollout = made.sample(0)
    rollout.tokens[rollout.tokens == made.tokenizer.eos_id] = made.tokenizer.bos_id
    made.batch = made.judge(0, rollout)
    made.learn(0)
    grads = [p.grad for p in made.model.parameters() if p.grad is not None]
    assert grads and all(grad.eq(0).all() for grad in grads)
    told = made.batch.metrics
    assert told["truncated"] == told["groups_without_signal"] == told["groups_all_wrong"] == 1


@pytest.mark.parametrize("told, reason", [
    (dict(groups_without_signal=0.75, groups_all_wrong=1.0), ""),
    (dict(groups_without_signal=1.0, groups_all_wrong=1.0, truncated=0.9), "ran into max_new"),
    (dict(groups_without_signal=1.0, groups_all_wrong=1.0, truncated=0.5), "no reply is right"),
    (dict(groups_without_signal=1.0, groups_all_right=1.0), "every reply is right"),
    (dict(groups_without_signal=1.0, groups_all_right=1 / 3, groups_all_wrong=2 / 3), "all wrong"),
    (dict(groups_without_signal=1.0, groups_all_right=0.25), "weights of accuracy"),
    (dict(groups_without_signal=1.0, groups_all_right=0.5, groups_all_wrong=0.499), "weights of"),
    (dict(groups_without_signal=1.0), "weights of accuracy")])  # of an earlier version
def test_why_there_is_no_signal(told, reason):
    assert reason in why_no_signal(told) and bool(reason) == bool(why_no_signal(told))


def silent_lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if "no signal" in line]


@pytest.mark.parametrize("reward, reason", [(0.0, "no reply is right"),
                                            (1.0, "every reply is right")])
def test_a_run_without_signal_says_why_now_and_then(tmp_path, monkeypatch, reward, reason):
    monkeypatch.setattr(Reinforcer, "reward", lambda *_: dict.fromkeys(PARTS, reward))
    monkeypatch.setattr(grpo_module, "QUIET", 3)
    monkeypatch.setattr(grpo_module, "why_no_signal", lambda told: why_no_signal(
        told | dict(truncated=0.0)))  # an untrained model rarely ends a reply
    status, out, err = run_grpo("--from", str(BASE), "--out", str(tmp_path / "run"),
                                *as_flags(SMALL | dict(steps=5, eval_every=0)))
    *lines, end = silent_lines(out)
    assert (status, err) == (0, "") and [line[:7] for line in lines] == ["step 1:", "step 4:"]
    assert all(reason in line for line in (*lines, end)) and end.startswith("5 of 5 steps had no")


def test_a_run_with_a_signal_says_nothing(tmp_path):
    status, out, err = run_grpo("--from", str(BASE), "--out", str(tmp_path / "run"), *as_flags(
        SMALL | dict(steps=2, eval_every=0, length_weight=1.0)))
    assert (status, err) == (0, "") and silent_lines(out) == []


def test_a_run_that_has_learned_all_says_nothing(tmp_path, capsys):
    made = learner(BASE, tmp_path / "run")
    right = dict(groups_without_signal=1.0, groups_all_right=1.0)
    made.batch, made.step = SimpleNamespace(metrics=right), 30
    made.metrics = [dict(groups_without_signal=0.5)] * 9
    made.tell_silence()
    made.finish()
    assert capsys.readouterr().out == ""
    made.metrics += [right] * 10  # but most of its steps were for nothing
    made.finish()
    assert capsys.readouterr().out.startswith("10 of 19 steps had no signal, mostly because every")
