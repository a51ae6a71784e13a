"""GRPO: the loss worked out on paper, zeros that are exact, and runs that end with equal bytes.

The learning itself takes minutes and is `python -m minids.r1`; here a few steps of an untrained
model.
"""

import contextlib
import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch
from kill_and_resume import differences

from minids import grpo as grpo_module
from minids.base.command_line import run_program
from minids.grpo import (
    OBJECTIVES,
    GrpoArgs,
    Reinforcer,
    advantages,
    mean_by_reply,
    objective,
    token_weights,
)
from minids.runs.checkpoints import load_weights, newest_checkpoint, resolve
from minids.runs.learner import model_and_tokenizer
from minids.runs.settings import TrainArgs
from minids.sft import SftArgs, sft
from minids.train import train

SMALL = dict(questions=4, group=4, max_new_tokens=12, eval_problems=8, eval_every=2, threads=1,
             save_every=1, keep_last=0)

# Four replies to one question, with rewards 1, 0, 1, 0, of 1, 2, 1 and 2 tokens.
REPLY = torch.tensor([0, 1, 1, 2, 3, 3])
RATIO = torch.tensor([1.5, 0.5, 1.0, 1.1, 2.0, 1.0], dtype=torch.float64)
ADVANTAGE = torch.tensor([0.5, -0.5, -0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 1, 2])


def paper_args(**changed) -> GrpoArgs:
    return GrpoArgs(**dict(advantage="mean", clip_low=0.2, clip_high=0.2, kl_beta=0.1) | changed)


def paper_loss(ref: torch.Tensor | None = None, longest: int = 4, **changed):
    args = paper_args(**changed)
    weight = token_weights(LENGTHS, args.normalise, longest).double()[REPLY]
    return objective(RATIO.log(), torch.zeros(6, dtype=torch.float64), ref, ADVANTAGE, REPLY,
                     weight, args)


# min(r A, clip(r) A) of each token, with r clipped to 0.8 .. 1.2:
#     0.6 | -0.4  -0.5 | 0.55 | -1.0  -0.5
# The replies' means: 0.6, -0.45, 0.55, -0.75; their mean: -0.0125. The sum: -1.25.
@pytest.mark.parametrize("normalise, loss", [
    ("sequence", 0.0125),          # DeepSeekMath: the mean of the means, negated
    ("tokens", 1.25 / 6),          # DAPO: over six tokens
    ("constant", 1.25 / 16)])      # Dr. GRPO: over four replies of four tokens at most
def test_the_loss_of_four_replies_is_the_one_on_paper(normalise, loss):
    # 1/6 in FP32
    assert paper_loss(normalise=normalise).loss.item() == pytest.approx(loss, abs=1e-7)


def test_kl_of_four_replies_is_the_one_on_paper():
    """The reference finds the first token twice as likely: k3 = 2 - log 2 - 1, in one of four
    replies; with the ratio, 1.5 times that."""
    ref = RATIO.log() + torch.tensor([math.log(2), 0, 0, 0, 0, 0], dtype=torch.float64)
    k3 = 1 - math.log(2)
    assert paper_loss(ref).loss.item() == pytest.approx(0.0125 + 0.1 * k3 / 4, abs=1e-12)
    unbiased = paper_loss(ref, kl="unbiased").loss.item()
    assert unbiased == pytest.approx(0.0125 + 0.1 * 1.5 * k3 / 4, abs=1e-12)
    assert paper_loss(ref).kl == pytest.approx(k3 / 6, abs=1e-12)


def test_bounds_on_paper():
    """Two of six tokens are clipped: the first, and the second, whose ratio is below 0.8."""
    assert paper_loss().clipped == pytest.approx(2 / 6)
    # R1's 10 lets all through: -(0.75 - (0.25 + 0.5) / 2 + 0.55 - (1.0 + 0.5) / 2) / 4
    assert paper_loss(clip_low=10.0, clip_high=10.0).loss.item() == pytest.approx(-0.04375)
    # A bad reply's ratio of 2 counts as 1.5 only: -1.0 becomes -0.75.
    assert paper_loss(clip_both=1.5).loss.item() == pytest.approx((-0.6 + 0.45 - 0.55 + 0.625) / 4)


def test_replies_left_behind_count_no_more():
    """Bad replies' mean log(old / new): log 2 / 2 and -log 2 / 2. Above 0.3 is the first alone:
    its -0.45 is left out, and its KL is not."""
    found = paper_loss(off_policy_delta=0.3)
    assert found.loss.item() == pytest.approx(-(0.6 + 0.55 - 0.75) / 4)
    assert found.left_out == pytest.approx(2 / 6)
    ref = RATIO.log() + torch.tensor([0, math.log(2), 0, 0, 0, 0], dtype=torch.float64)
    more = paper_loss(ref, off_policy_delta=0.3).loss - found.loss
    assert more.item() == pytest.approx(0.1 * (1 - math.log(2)) / 2 / 4)


def test_mean_by_reply():
    values = torch.tensor([1.0, 2.0, 4.0, 5.0, 7.0, 9.0])
    assert mean_by_reply(values, REPLY).tolist() == [1, 3, 3, 5, 8, 8]


def test_the_gradient_of_a_fresh_rollout_is_the_policy_gradient():
    """At ratio 1 nothing is clipped, and the gradient is -weight A d log pi."""
    logp = torch.randn(6, dtype=torch.float64, requires_grad=True)
    weight = token_weights(LENGTHS, "sequence", 4).double()[REPLY]
    objective(logp, logp.detach(), None, ADVANTAGE, REPLY, weight, paper_args()).loss.backward()
    torch.testing.assert_close(logp.grad, -weight * ADVANTAGE, rtol=1e-12, atol=0)


def test_unbiased_kl_has_the_gradient_of_the_kl():
    """Over a whole distribution, drawn from an old one, the mean of each estimator's gradient: the
    one with the ratio is the gradient of KL(pi, ref); the plain one is not (V3.2 section 3.1)."""
    torch.manual_seed(0)
    logits, old, ref = (torch.randn(7, dtype=torch.float64) for _ in range(3))

    def estimate(kind: str) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(-1)
        args = paper_args(kl=kind, kl_beta=1.0)
        objective(logp, old.log_softmax(-1), ref.log_softmax(-1), torch.zeros(7), torch.arange(7),
                  old.softmax(-1), args).loss.backward()
        return leaf.grad

    leaf = logits.clone().requires_grad_()
    p = leaf.log_softmax(-1)
    (p.exp() * (p - ref.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(estimate("unbiased"), leaf.grad, rtol=1e-9, atol=1e-12)
    assert (estimate("k3") - leaf.grad).abs().max() > 0.01


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.float64)
    assert advantages(rewards, "mean").tolist() == [[0.5, -0.5, -0.5, 0.5],
                                                    [-0.25, -0.25, -0.25, 0.75]]
    by_std = advantages(rewards, "std")
    for row, group in zip(by_std.tolist(), rewards.tolist(), strict=True):
        expected = [(r - fmean(group)) / (pstdev(group) + 1e-6) for r in group]
        assert row == pytest.approx(expected)
    # Wrong variant: over the whole batch a group of equal rewards has a signal.
    batch = torch.cat([rewards[:1], torch.zeros(1, 4)])
    assert advantages(batch, "std")[1].eq(0).all()
    assert ((batch - batch.mean()) / batch.std())[1].ne(0).all()


@pytest.mark.parametrize("kind", ["mean", "std"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1.1, 0.7])
def test_equal_rewards_have_exactly_no_advantage(kind, reward):
    for group in (3, 7, 16):
        assert advantages(torch.full((2, group), reward), kind).eq(0).all()


def test_rounding_would_give_equal_rewards_an_advantage():
    """Wrong variant: the mean of equal numbers need not be that number."""
    rewards = torch.full((1, 7), 0.1)
    naive = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    found = [torch.full((1, n), x) for n in (3, 7, 11, 13) for x in (0.1, 1 / 3, 1.1, 0.7)]
    assert any((r - r.mean()).ne(0).any() for r in found) or naive.ne(0).any()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that has learnt the form of a reply, and not how to calculate."""
    home = tmp_path_factory.mktemp("grpo")
    with contextlib.redirect_stdout(io.StringIO()):
        train(TrainArgs.for_preset("micro", out=str(home / "base"), steps=10, eval_every=0,
                                   threads=1))
        sft(SftArgs.for_preset(from_run=str(home / "base"), out=str(home / "sft"), steps=20,
                               examples=512, eval_every=0, eval_problems=1, threads=1))
    return home / "sft"


def learner(base: Path, out: Path, **changed) -> Reinforcer:
    args = GrpoArgs.for_preset(**SMALL | dict(from_run=str(base), out=str(out)) | changed)
    model_args, tokenizer, _ = model_and_tokenizer(args)
    made = Reinforcer(args, model_args, out, tokenizer)
    made.begin_from(resolve(base))
    return made


def gradients(made: Reinforcer) -> dict[str, torch.Tensor]:
    made.batch = made.sample(0)
    made.accumulate(0)
    return {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}


def test_equal_rewards_give_exactly_no_gradient(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Reinforcer, "reward", lambda *_: 0.1)
    for changed in (dict(kl_beta=0.0), dict(kl_beta=1.0), dict(kl_beta=1.0, kl="unbiased")):
        made = learner(base, tmp_path / "run", **changed)
        found = gradients(made)
        assert found and all(grad.eq(0).all() for grad in found.values())
        shutil.rmtree(tmp_path / "run")
    monkeypatch.undo()
    made = learner(base, tmp_path / "run", length_weight=1.0)
    assert any(grad.ne(0).any() for grad in gradients(made).values())


def test_kl_to_itself_is_exactly_zero(base, tmp_path):
    made = learner(base, tmp_path / "run", kl_beta=1.0)
    made.batch = made.sample(0)
    assert made.accumulate(0)["kl"] == 0.0
    with torch.no_grad():
        made.model.layers[0].attn.wo.weight.mul_(1.01)
    assert made.accumulate(0)["kl"] > 0


@pytest.mark.parametrize("normalise", ["sequence", "tokens", "constant"])
def test_micro_batches_add_up(base, tmp_path, normalise):
    found = [gradients(learner(base, tmp_path / str(size), micro_batch=size, normalise=normalise,
                               reward="shuffled", format_weight=1.0, length_weight=1.0))
             for size in (16, 3)]
    for name, grad in found[0].items():
        # FP32 sums in another order: some hundred terms
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def test_sampler_gap_of_a_fresh_rollout_is_rounding(base, tmp_path):
    made = learner(base, tmp_path / "run", top_p=0.9)
    made.batch = made.sample(0)
    assert made.accumulate(0)["sampler_gap_max"] < 1e-5


def test_one_part_of_a_rollout_a_step(base, tmp_path):
    """Each of `updates` steps learns from other questions; a wrong one would see all each time."""
    made = learner(base, tmp_path / "run", updates=4, clip_low=0.2, clip_high=0.2)
    made.batch = made.sample(0)
    seen = []
    part = made.batch.rollout.part
    made.batch = made.batch._replace(rollout=Recorder(made.batch.rollout, part, seen))
    for share in range(4):
        made.accumulate(share)
    assert torch.cat(seen).tolist() == list(range(16))


class Recorder:
    """A rollout that notes which replies it is asked for."""

    def __init__(self, rollout, part, seen: list):
        self.rollout, self._part, self.seen = rollout, part, seen

    def __getattr__(self, name: str):
        return getattr(self.rollout, name)

    def part(self, rows: torch.Tensor):
        self.seen.append(rows)
        return self._part(rows)


def test_the_reference_is_renewed(base, tmp_path):
    made = learner(base, tmp_path / "run", reference_every=2, format_weight=1.0,
                   length_weight=1.0, lr=1e-2)
    same = []
    for _ in range(4):
        made.train_step()
        same.append(all(torch.equal(a, b) for a, b in zip(
            made.model.state_dict().values(), made.reference.state_dict().values(), strict=True)))
    assert same == [False, True, False, True]


def test_objectives_by_name():
    r1, v32 = (GrpoArgs.for_preset(objective=name) for name in ("r1", "v3.2"))
    assert (r1.advantage, r1.kl, r1.clip_high, r1.reference_every) == ("std", "k3", 10.0, 400)
    assert (v32.advantage, v32.kl) == ("mean", "unbiased") and v32.off_policy_delta > 0
    assert v32.length_weight > GrpoArgs.for_preset(objective="speciale").length_weight > 0
    dapo = GrpoArgs.for_preset(objective="dapo")
    assert (dapo.clip_low, dapo.clip_high, dapo.normalise, dapo.kl_beta) == (0.2, 0.28, "tokens", 0)
    assert GrpoArgs.for_preset(objective="dr-grpo", kl_beta=0.5).kl_beta == 0.5  # a flag wins
    paper = GrpoArgs.for_preset("r1")
    assert paper.questions * paper.group == 8192 and paper.updates == 16
    assert (paper.lr, paper.kl_beta, paper.max_new_tokens) == (3e-6, 0.001, 32768)


def run_grpo(*flags: str) -> tuple[int, str, str]:
    """`python -m minids.grpo` with these flags, in this process: status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["minids.grpo", *flags])
        run_program("minids.grpo", grpo_module.main)
    return end.value.code, out.getvalue(), err.getvalue()


def as_flags(options: dict) -> list[str]:
    return [word for name, value in options.items()
            for word in ("--" + name.replace("_", "-"), str(value))]


FLAGS = dict(SMALL, steps=6, updates=2, top_p=0.9, format_weight=1.0, length_weight=1.0,
             reference_every=3)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_runs_and_logs_what_people_ask_for(base, tmp_path, objective):
    status, out, err = run_grpo("--from", str(base), "--out", str(tmp_path / "run"), "--objective",
                                objective, *as_flags(SMALL | dict(steps=2)))
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    wanted = {"reward", "reward_accuracy", "reward_format", "reward_language", "reward_length",
              "length", "thinking", "kl", "entropy", "clip_fraction", "left_out",
              "groups_without_signal", "sampler_gap", "sampler_gap_max", "grad_norm", "lr"}
    assert len(lines) == 2 and all(wanted <= line.keys() for line in lines)
    assert {"accuracy", "form", "thinking", "tokens"} <= lines[-1]["free"].keys()
    assert (lines[0]["kl"] == 0) and "free" in lines[1]


@pytest.mark.parametrize("step", [2, 3])  # between two rollouts, and in the middle of one
def test_a_resumed_run_ends_with_the_same_bytes(base, tmp_path, step):
    run, again = tmp_path / "run", tmp_path / "again"
    assert run_grpo("--from", str(base), "--out", str(run), *as_flags(FLAGS))[0] == 0
    shutil.copytree(run, again)
    for path in (again / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    status, _, err = run_grpo("--resume", "--out", str(again))
    assert (status, err) == (0, "")
    for folder in (run, again):
        (folder / "sample.txt").write_text("")  # only pre-training writes one
    assert [d for d in differences(run, again) if "sampling_s" not in d] == []


def test_the_check_of_a_resumed_run_notices_a_new_rollout(base, tmp_path, monkeypatch):
    """Wrong variant: in the middle of a rollout another one is drawn."""
    def restore_more(self, state: dict) -> None:
        self.model.load_state_dict(load_weights(resolve(self.run)))
        self.reference.load_state_dict(state["reference"])
        self.batch = self.sample(state["step"] // self.args.updates)

    monkeypatch.setattr(Reinforcer, "restore_more", restore_more)
    with pytest.raises(AssertionError):
        test_a_resumed_run_ends_with_the_same_bytes(base, tmp_path, 3)


def test_shuffled_rewards_are_the_same_numbers(base, tmp_path):
    plain, shuffled = (learner(base, tmp_path / name, reward=name, length_weight=1.0).sample(0)
                       for name in ("task", "shuffled"))
    assert plain.replies == shuffled.replies
    assert not torch.equal(plain.rewards, shuffled.rewards)
    assert torch.equal(plain.rewards.flatten().sort()[0], shuffled.rewards.flatten().sort()[0])


@pytest.mark.parametrize("flags, named", [
    (["--group", "1"], "group = 1 is not valid: it must be at least 2"),
    (["--task", "sudoku"], "task = 'sudoku' is not valid"),
    (["--max-new-tokens", "400"], "max_new_tokens = 400 is not valid: it must be at most 2"),
    (["--questions", "6", "--updates", "4"], "updates = 4 is not valid: it must be a divisor"),
    (["--clip-both", "0.5"], "clip_both = 0.5 is not valid"),
    (["--objective", "ppo"], "objective"),
    (["--temperature", "0"], "temperature = 0.0 is not valid"),
    (["--grup", "4"], "unknown flag --grup: did you mean '--group'?"),
    (["--template", "markdown"], "template")])
def test_mistakes_are_one_line_and_leave_nothing(base, tmp_path, flags, named):
    status, out, err = run_grpo("--from", str(base), "--out", str(tmp_path / "run"),
                                *as_flags(SMALL), *flags)
    assert status == 2 and err.count("\n") == 1 and named in err
    assert not (tmp_path / "run").exists()


def test_runs_that_are_no_runs(base, tmp_path):
    for folder, named in ((tmp_path / "nothing", "is not a folder"),
                          (Path("data/tokenizer"), "holds no checkpoint")):
        status, _, err = run_grpo("--from", str(folder), "--out", str(tmp_path / "run"))
        assert status == 2 and err.count("\n") == 1 and named in err
    assert "name the run to begin with" in run_grpo("--out", str(tmp_path / "run"))[2]
    assert "name the run's folder" in run_grpo("--resume")[2]
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Reinforcer, "reward", lambda *_: float("nan"))
    run = tmp_path / "run"
    status, _, err = run_grpo("--from", str(base), "--out", str(run), *as_flags(SMALL))
    assert status == 2 and err.count("\n") == 1
    assert "step 1: the reward of reply 1 is nan" in err
    assert newest_checkpoint(run).name == "step_000000"  # as it began
    before, after = load_weights(resolve(base)), load_weights(resolve(run))
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_taken_folder_and_a_changed_setting(base, tmp_path):
    run = tmp_path / "run"
    flags = ["--out", str(run), *as_flags(SMALL | dict(steps=1))]
    assert run_grpo("--from", str(base), *flags)[0] == 0
    assert "holds a run already" in run_grpo("--from", str(base), *flags)[2]
    status, _, err = run_grpo("--resume", "--out", str(run), "--group", "8")
    assert status == 2 and "group = 8 is not valid" in err and err.count("\n") == 1
    assert "no run of minids.grpo" in run_grpo("--resume", "--out", str(base))[2]


def test_settings_vary_one_at_a_time():
    args = GrpoArgs.for_preset(objective="v3.2")
    assert replace(args, kl="k3").kl == "k3"
    with pytest.raises(ValueError, match="kl = 'k4' is not valid"):
        replace(args, kl="k4")
