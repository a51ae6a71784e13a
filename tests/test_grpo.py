"""GRPO: gradients that are exactly zero, and runs that end with equal bytes.

The learning itself takes minutes and is `python -m minids.r1`; here a few steps of an untrained
model.
"""

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from kill_and_resume import differences
from training_runs import no_picture, short_sample

from minids import grpo as grpo_module
from minids.base.command_line import run_program
from minids.grpo import GrpoArgs, Reinforcer
from minids.rl import examination
from minids.rl.examination import Asking, Marks
from minids.rl.objectives import OBJECTIVES
from minids.runs.checkpoints import load_weights, newest_checkpoint, resolve
from minids.runs.open import open_source
from minids.runs.settings import TrainArgs
from minids.sft import SftArgs, sft
from minids.text import corpora
from minids.train import train

SMALL = dict(questions=4, group=4, max_new_tokens=12, eval_problems=8, eval_every=2, threads=1,
             save_every=1, keep_last=0)
PARTS = "accuracy", "format", "language", "length"  # of a reward


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that has learnt the form of a reply but not how to calculate."""
    home = tmp_path_factory.mktemp("grpo")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "EXAMPLES", 2000)
        patch.setattr("minids.train.loss_curve", no_picture)
        patch.setattr("minids.train.Trainer.sample", short_sample)
        train(TrainArgs.for_preset("micro", out=str(home / "base"), steps=10, batch_size=8,
                                   eval_every=0, threads=1))
        sft(SftArgs.for_preset(from_run=str(home / "base"), out=str(home / "sft"), steps=20,
                               batch_size=4, examples=512, eval_every=0, eval_problems=1,
                               max_new_tokens=8, threads=1))
    return home / "sft"


def learner(base: Path, out: Path, **changed) -> Reinforcer:
    args = GrpoArgs.for_preset(**SMALL | dict(from_run=str(base), out=str(out)) | changed)
    source = open_source(base)
    made = Reinforcer(args, source.args, out, source.tokenizer)
    made.begin_from(source)
    return made


def gradients(made: Reinforcer) -> dict[str, torch.Tensor]:
    made.batch = made.judge(0, made.sample(0))
    made.learn(0)
    return {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}


def test_equal_rewards_give_exactly_no_gradient(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Reinforcer, "reward", lambda *_: dict.fromkeys(PARTS, 0.1))
    for changed in (dict(kl_beta=0.0), dict(kl_beta=1.0), dict(kl_beta=1.0, kl="unbiased")):
        made = learner(base, tmp_path / "run", **changed)
        found = gradients(made)
        assert found and all(grad.eq(0).all() for grad in found.values())
    monkeypatch.undo()
    made = learner(base, tmp_path / "run", length_weight=1.0)
    assert any(grad.ne(0).any() for grad in gradients(made).values())


def test_kl_to_itself_is_exactly_zero(base, tmp_path):
    made = learner(base, tmp_path / "run", kl_beta=1.0)
    made.batch = made.judge(0, made.sample(0))
    assert made.learn(0)["kl"] == 0.0
    with torch.no_grad():
        made.model.layers[0].attn.wo.weight.mul_(1.01)
    assert made.learn(0)["kl"] > 0


@pytest.mark.parametrize("normalise", ["sequence", "tokens", "constant"])
def test_micro_batches_add_up(base, tmp_path, normalise):
    found, told = [], []
    for size in (16, 3):
        made = learner(base, tmp_path / str(size), micro_batch=size, normalise=normalise,
                       reward="shuffled", format_weight=1.0, length_weight=1.0, top_p=0.9)
        made.batch = made.judge(0, made.sample(0))
        with torch.no_grad():
            made.model.layers[0].attn.wo.weight.mul_(1.1)  # else KL and clipping are 0
        told.append(made.learn(0))
        found.append({n: p.grad for n, p in made.model.named_parameters() if p.grad is not None})
    assert told[0]["kl"] > 0 < told[0]["sampler_gap"] < told[0]["sampler_gap_max"]
    for name, grad in found[0].items():
        # FP32 sums in another order: some hundred terms
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)
    for name, value in told[0].items():  # means over tokens, however they are split
        assert told[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_sampler_gap_of_a_fresh_rollout_is_rounding(base, tmp_path):
    made = learner(base, tmp_path / "run", top_p=0.9)
    made.batch = made.judge(0, made.sample(0))
    assert made.learn(0)["sampler_gap_max"] < 1e-5


def written(made: Reinforcer, number: int, texts: list[str | None]) -> list[list[int]]:
    """Return ids of replies that answer directly with each text; None leaves out EOS."""
    t = made.tokenizer
    answers = [p.answer for p, _ in made.asked(number)]
    return [[t.end_think_id, *t.encode(answer if text == "right" else text or answer),
             *([t.eos_id] if text is not None else [])]
            for text, answer in zip(texts, answers, strict=True)]


def rewards_of(made: Reinforcer, replies: list[list[int]]) -> dict[str, list[float]]:
    """Return the parts of the rewards of rollout 0, had it been these replies."""
    found = [made.reward(problem, made.template.read(ids, mode))
             for (problem, mode), ids in zip(made.asked(0), replies, strict=True)]
    return {name: [reward[name] for reward in found] for name in PARTS}


def test_rewards_are_the_weighted_sum_of_what_the_rules_say(base, tmp_path):
    """Weights are powers of 2, so that each part shows in the sum, and its sign."""
    made = learner(base, tmp_path / "run", accuracy_weight=1.0, format_weight=0.5,
                   language_weight=0.25, length_weight=0.125, questions=2, group=4,
                   max_new_tokens=8)
    texts = ["right", "x", None, "right", "xyz", "x", "right", None]
    replies = written(made, 0, texts)
    batch = made.judge(0, SimpleNamespace(replies=lambda: replies))
    parts = rewards_of(made, replies)
    right, formed = ([float(text in good) for text in texts]
                     for good in (("right",), ("right", "x", "xyz")))
    sizes = [len(ids) / 8 for ids in replies]
    assert parts == dict(accuracy=right, format=formed, language=[1.0] * 8, length=sizes)
    expected = [r + 0.5 * f + 0.25 - 0.125 * size
                for r, f, size in zip(right, formed, sizes, strict=True)]
    assert batch.rewards.tolist() == [expected[:4], expected[4:]]
    told = batch.metrics
    assert told["reward"] == pytest.approx(fmean(expected)) and told["thinking"] == 0
    assert told["reward_accuracy"] == 3 / 8 and told["groups_without_signal"] == 0
    assert told["length"] == fmean(map(len, replies))
    alike = written(made, 0, ["x"] * 4 + texts[4:])
    again = made.judge(0, SimpleNamespace(replies=lambda: alike))
    assert again.metrics["groups_without_signal"] == 0.5


def test_language_rewards_the_thought(base, tmp_path):
    made = learner(base, tmp_path / "run", questions=1, group=2, language_weight=1.0)
    t = made.tokenizer
    replies = [[t.think_id, *t.encode(thought), t.end_think_id, *t.encode("1"), t.eos_id]
               for thought in ("one two", "one \u4e8c")]
    batch = made.judge(0, SimpleNamespace(replies=lambda: replies))
    assert rewards_of(made, replies)["language"] == [1.0, 0.5]
    assert batch.metrics["reward_language"] == 0.75 and batch.metrics["thinking"] == 1


def test_each_rollout_asks_other_questions_each_for_a_whole_group(base, tmp_path):
    for mode, turns in (("both", ["think", "direct"] * 2), ("direct", ["direct"] * 4),
                        ("all", ["think", "direct", "free", "think"])):
        made = learner(base, tmp_path / mode, mode=mode)
        asked = [made.asked(number) for number in (0, 1)]
        for rollout in asked:
            groups = [rollout[i:i + 4] for i in range(0, 16, 4)]
            assert all(len(set(group)) == 1 for group in groups)  # one question, one mode
            assert [group[0][1] for group in groups] == turns
            assert len({problem for problem, _ in rollout}) == 4
        assert not {p for p, _ in asked[0]} & {p for p, _ in asked[1]}
        assert made.asked(0) == asked[0]


def test_marks_are_taken_now_and_then_and_the_best_has_the_least_error(base, tmp_path,
                                                                       monkeypatch):
    right, asked = {"think": 0.75, "direct": 0.25, "free": 0.5}, []
    monkeypatch.setattr(examination, "examine", lambda model, tokenizer, task, count, how, team: (
        asked.append((count, how)), Marks(right[how.mode], 1.0, 0.5, 9.0))[1])
    made = learner(base, tmp_path / "run", eval_every=2)
    found = []
    for made.step in range(1, 5):
        found.append(made.measure({}, last=False))
    assert found == [None, 0.5, None, 0.5]
    assert asked == [(8, Asking("free", "chat", 12))] * 2  # in the mode of training
    made.step, record = 5, {}
    assert made.measure(record, last=True) == 0.25  # at the end in all modes
    assert {mode: record[mode]["accuracy"] for mode in record} == right
    both = learner(base, tmp_path / "both", eval_every=0, mode="both")
    both.step, record = 4, {}
    assert both.measure(record, last=False) is None and record == {}
    both.args = replace(both.args, eval_every=4)
    assert both.measure(record, last=False) == 0.25 and list(record) == ["think", "direct"]
    every = learner(base, tmp_path / "all", mode="all")
    every.step = 4
    assert every.measure(record, last=False) == 0.25 and list(record) == ["think", "direct", "free"]


def test_one_part_of_a_rollout_a_step(base, tmp_path):
    """Each of the `updates` steps learns from its own questions; a wrong one would see all."""
    made = learner(base, tmp_path / "run", updates=4, clip_low=0.2, clip_high=0.2)
    made.batch = made.judge(0, made.sample(0))
    seen = []
    part = made.batch.rollout.part
    made.batch = made.batch._replace(rollout=Recorder(made.batch.rollout, part, seen))
    for share in range(4):
        made.learn(share)
    assert torch.cat(seen).tolist() == list(range(16))


class Recorder:
    """A rollout that records which replies it is asked for."""

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
              "groups_without_signal", "groups_all_right", "groups_all_wrong", "truncated",
              "sampler_gap", "sampler_gap_max", "grad_norm", "lr"}
    assert len(lines) == 2 and all(wanted <= line.keys() for line in lines)
    assert {"accuracy", "form", "thinking", "tokens"} <= lines[-1]["free"].keys()
    assert (lines[0]["kl"] == 0) and "free" in lines[1] and "free" not in lines[0]
    weights = json.loads((tmp_path / "run/config.json").read_text())["grpo"]
    for line in lines:
        total = sum(weights[f"{name}_weight"] * line[f"reward_{name}"]
                    for name in ("accuracy", "format", "language"))
        assert line["reward"] == pytest.approx(
            total - weights["length_weight"] * line["reward_length"], abs=1e-6)
        assert 0 < line["reward_length"] <= 1 and line["entropy"] > 0


@pytest.fixture(scope="module")
def unbroken(base) -> Path:
    """A finished run of three rollouts, which no test changes."""
    run = base.parent / "unbroken"
    assert run_grpo("--from", str(base), "--out", str(run), *as_flags(FLAGS))[0] == 0
    (run / "sample.txt").write_text("")  # only pre-training writes one
    return run


@pytest.mark.parametrize("step", [0, 2, 3])  # before the first rollout, after one, within one
def test_a_resumed_run_ends_with_the_same_bytes(unbroken, tmp_path, step):
    again = shutil.copytree(unbroken, tmp_path / "again")
    for path in (again / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    status, _, err = run_grpo("--resume", "--out", str(again))
    assert (status, err) == (0, "") and differences(unbroken, again) == []


def test_the_reference_of_step_0_is_the_model(base, tmp_path):
    """Also where an earlier version saved a random one."""
    made = learner(base, tmp_path / "run")
    wrong = {name: torch.zeros_like(w) for name, w in made.reference.state_dict().items()}
    made.restore_more(made.more_state() | dict(reference=wrong, step=0))
    weights = made.model.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in made.reference.state_dict().items())


def test_questions_that_were_changed_since_are_refused(base, tmp_path):
    questions, run = tmp_path / "questions.jsonl", tmp_path / "run"
    questions.write_text("".join(json.dumps(dict(question=f"{n}+1", answer=str(n + 1))) + "\n"
                                 for n in range(100)))
    assert run_grpo("--from", str(base), "--out", str(run), "--task", f"jsonl:{questions}",
                    *as_flags(SMALL | dict(steps=1)))[0] == 0
    questions.write_text(questions.read_text().replace('"answer": "5"', '"answer": "6"'))
    status, _, err = run_grpo("--resume", "--out", str(run), "--steps", "2")
    assert status == 2 and f"the data of the run in {run} was changed since it began" in err


def test_the_check_of_a_resumed_run_notices_a_new_rollout(unbroken, tmp_path, monkeypatch):
    """Wrong variant: a new rollout is drawn in the middle of one."""
    def restore_more(self, state: dict) -> None:
        self.model.load_state_dict(load_weights(resolve(self.run)))
        self.reference.load_state_dict(state["reference"])
        number = state["step"] // self.args.updates
        self.batch = self.judge(number, self.sample(number))

    monkeypatch.setattr(Reinforcer, "restore_more", restore_more)
    with pytest.raises(AssertionError):
        test_a_resumed_run_ends_with_the_same_bytes(unbroken, tmp_path, 3)


def test_shuffled_rewards_are_the_same_numbers(base, tmp_path):
    both = [learner(base, tmp_path / name, reward=name, length_weight=1.0)
            for name in ("task", "shuffled")]
    plain, shuffled = (made.judge(0, made.sample(0)) for made in both)
    assert plain.rollout.replies() == shuffled.rollout.replies()
    assert not torch.equal(plain.rewards, shuffled.rewards)
    assert torch.equal(plain.rewards.flatten().sort()[0], shuffled.rewards.flatten().sort()[0])


@pytest.mark.parametrize("flags, named", [
    (["--group", "1"], "group = 1 is not valid: it must be between 2 and 1000000"),
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
    assert "name its folder with --out" in run_grpo("--resume")[2]
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Reinforcer, "reward", lambda *_: dict.fromkeys(PARTS, float("nan")))
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
    assert "not a run of minids.grpo" in run_grpo("--resume", "--out", str(base))[2]


def test_settings_vary_one_at_a_time():
    args = GrpoArgs.for_preset(objective="v3.2")
    assert replace(args, kl="k3").kl == "k3"
    with pytest.raises(ValueError, match="kl = 'k4' is not valid"):
        replace(args, kl="k4")
