"""Reinforcement learning by group relative policy optimization, with rewards that a rule gives.

    python -m minids.grpo --from runs/base-sft                        the calculator, on a CPU
    python -m minids.grpo --from runs/base --template plain           R1-Zero: no cold start
    python -m minids.grpo --from runs/base-sft --objective v3.2
    python -m minids.grpo --from DeepSeek-V2-Lite --preset r1 --task gsm8k --device cuda
    python -m minids.grpo --resume --out runs/base-sft-grpo

For each question the model writes a group of replies; a reply's advantage is its reward less the
group's mean. No critic, and no learnt reward. The loss of token t of reply i is

    -M_i min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) + beta KL_t,
    r_t = pi(o_t) / pi_old(o_t)

where pi_old is what the sampler drew from, KL compares pi with a reference model by the estimator
k3 = pi_ref/pi - log(pi_ref/pi) - 1 (DeepSeekMath, arXiv 2402.03300, section 4.1), and M is 1.

--objective names the variants of the papers; each of their settings is also a flag:
    r1         R1 and V3: A over the group's standard deviation; clip at 10; reference replaced
               every 400 steps (Nature 645:633, Methods)
    v3.2       A without it; KL times r, which makes its gradient unbiased; M is 0 for a bad reply
               that the model has left behind; routing and sampling mask kept; a penalty on length
               (arXiv 2512.02556, section 3.1)
    speciale   the same with the penalty relaxed; how much is not published
    deepseekmath   clip at 0.2, beta 0.04 (arXiv 2402.03300)
    dapo       a higher upper clip, every token of the batch weighs the same, no KL (2503.14476)
    dr-grpo    no standard deviation, a constant in place of the reply's length (2503.20783)

Simplified: replies of a batch are sampled together until the last one ends, by the process that
trains. The gates' biases rest.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from minids.base.command_line import parse, run_program
from minids.base.fields import option, require
from minids.config import ModelArgs
from minids.infer.sampling import Sampler
from minids.model.transformer import Transformer
from minids.rl.examination import examine
from minids.rl.objectives import OBJECTIVES, ObjectiveArgs, advantages, objective, token_weights
from minids.rl.rewards import accuracy, consistency, well_formed
from minids.rl.rollout import Rollout, log_probs, roll_out
from minids.runs.device import prepare_cpu
from minids.runs.learner import Learner, run_learner
from minids.runs.open import Source, source_of
from minids.runs.resume import settings
from minids.runs.settings import LearnArgs
from minids.text.chat import MODES, TEMPLATES, Reply
from minids.text.tasks import Problem, open_task
from minids.text.tokenizer import Tokenizer

# R1: 32 questions of 16 replies a step, lr 3e-6, KL 0.001, at most 32,768 tokens; a rollout of
# 8,192 replies serves 16 steps.
PRESETS = {"tiny": dict(dtype="fp32"),
           "r1": dict(steps=10_400, questions=512, group=16, updates=16, lr=3e-6, kl_beta=0.001,
                      format_weight=1.0, max_new_tokens=32768, mode="think",
                      eval_every=100, save_every=100)}


@dataclass(frozen=True)
class GrpoArgs(ObjectiveArgs, LearnArgs):
    """The settings of one reinforcement learning."""

    preset: str = option("tiny", "tiny, or r1: the paper's", tuple(PRESETS))
    task: str = option("calculator", "calculator[:OPERATIONS], countdown[:NUMBERS], gsm8k or"
                                     " jsonl:PATH")
    template: str = option("chat", "chat, or plain: text without tags, for a base model (R1-Zero)",
                           tuple(TEMPLATES))
    mode: str = option("free", "who decides whether to think: the model (free), or the prompt:"
                               " think, direct, or both by turns", (*MODES, "both"))
    steps: int = option(40, "optimizer steps", low=1)
    questions: int = option(16, "questions in a rollout")
    group: int = option(16, "replies to each question, two at least")
    updates: int = option(1, "optimizer steps that share a rollout, each on a part of it")
    micro_batch: int = option(256, "replies that go through the model together")
    max_new_tokens: int = option(48, "length of a reply at most, tokens")
    temperature: float = option(1.0, "divides the logits in sampling")
    top_k: int = option(0, "draw from so many likeliest tokens; 0: all")
    top_p: float = option(1.0, "draw from the likeliest tokens of this probability together")
    reference_every: int = option(0, "steps after which the reference becomes the model as it is;"
                                     " 0: never")
    keep_routing: bool = option(True, "train with the experts that sampling chose")
    keep_mask: bool = option(True, "train with the tokens that top-k and top-p left")
    accuracy_weight: float = option(1.0, "reward of a right answer")
    format_weight: float = option(0.1, "reward of a well-formed reply")
    language_weight: float = option(0.0, "reward of a thought in the question's language")
    length_weight: float = option(0.0, "penalty on a reply of the greatest length")
    reward: str = option("task", "the task's, or shuffled among a rollout's replies: a control",
                         ("task", "shuffled"))
    eval_every: int = option(10, "steps between measurements; 0: only at the end")
    eval_problems: int = option(200, "held-out problems in a measurement")
    lr: float = option(2e-4, "peak learning rate of AdamW", above=0)

    may_change = LearnArgs.may_change | {"micro_batch", "eval_every", "eval_problems"}

    def __post_init__(self):
        super().__post_init__()
        for name in "questions updates micro_batch max_new_tokens eval_problems".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "group", self.group >= 2, "at least 2: a reply is judged by the others")
        require(self, "temperature", self.temperature > 0, "above 0")
        require(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        for name in ("top_k reference_every accuracy_weight format_weight language_weight "
                     "length_weight eval_every").split():
            require(self, name, getattr(self, name) >= 0, "0 or more")
        require(self, "updates", self.questions % self.updates == 0,
                f"a divisor of questions = {self.questions}")

    @classmethod
    def for_preset(cls, preset: str = "tiny", objective: str = "r1", **given) -> "GrpoArgs":
        """The settings of preset and objective, varied by those that are given."""
        named = OBJECTIVES.get(objective, {}) | PRESETS.get(preset, {})
        return cls(**named | dict(preset=preset, objective=objective) | given)


class Batch(NamedTuple):
    """A rollout with its rewards.

    replies: B = questions * group of them; those of a group stand together
    parts: by kind of reward, (B,); rewards: their weighted sum, (Q, G)
    """

    rollout: Rollout
    replies: list[Reply]
    parts: dict[str, Tensor]
    rewards: Tensor


class Reinforcer(Learner):
    """One reinforcement learning: model, reference and questions, and where it stands."""

    program = "grpo"

    def __init__(self, args: GrpoArgs, model_args: ModelArgs, run: Path, tokenizer: Tokenizer):
        self.template = TEMPLATES[args.template](tokenizer)
        self.task = open_task(args.task)
        check_lengths(args, model_args, self.task, self.template)
        super().__init__(args, model_args, run, tokenizer)
        self.reference = Transformer(model_args).to(self.device).requires_grad_(False)
        self.batch: Batch | None = None

    def begin_from(self, source: Source) -> None:
        """The reference begins as the model does."""
        super().begin_from(source)
        self.renew_reference()

    def renew_reference(self) -> None:
        """From now on KL is to the model as it is."""
        self.reference.load_state_dict(self.model.state_dict())

    def more_state(self) -> dict:
        """The reference's weights, and a rollout that has more steps to serve."""
        begun = self.batch is not None and self.step % self.args.updates
        return dict(reference={n: w.cpu() for n, w in self.reference.state_dict().items()},
                    rollout=self.batch.rollout._asdict() if begun else None)

    def restore_more(self, state: dict) -> None:
        """Take both back."""
        self.reference.load_state_dict(state["reference"])
        if state["rollout"] is not None:
            rollout = Rollout(**state["rollout"]).to(self.device)
            self.batch = self.judge(state["step"] // self.args.updates, rollout)

    def accumulate(self) -> tuple[dict, None]:
        """Gradients of one share of a rollout; a new rollout before the first of `updates`."""
        number, share = divmod(self.step - 1, self.args.updates)
        start = time.perf_counter()
        if share == 0:
            self.batch = self.sample(number)
        sampled = time.perf_counter() - start
        return self.learn(share) | self.describe_batch() | dict(sampling_s=round(sampled, 3)), None

    def after_update(self, loads: None) -> None:
        """Renew the reference now and then."""
        every = self.args.reference_every
        if every and self.step % every == 0:
            self.renew_reference()

    def asked(self, number: int) -> list[tuple[Problem, str]]:
        """Problem and mode of each reply of rollout `number`."""
        args = self.args
        problems = self.task.some(args.questions, "train", seed=args.seed * 1_000_003 + number)
        return [(p, ("think", "direct")[i % 2] if args.mode == "both" else args.mode)
                for i, p in enumerate(problems) for _ in range(args.group)]

    def sample(self, number: int) -> Batch:
        """Draw and judge rollout `number`; the same whenever the weights are the same."""
        args = self.args
        prompts = [self.template.prompt(p.question, mode) for p, mode in self.asked(number)]
        generator = torch.Generator(self.device).manual_seed(args.seed * 1_000_003 + number)
        with self.autocast():
            rollout = roll_out(self.model, prompts, args.max_new_tokens,
                               Sampler(args.temperature, args.top_k, args.top_p, generator),
                               self.tokenizer.eos_id)
        return self.judge(number, rollout)

    def judge(self, number: int, rollout: Rollout) -> Batch:
        """The rewards of rollout `number`."""
        args = self.args
        problems, modes = zip(*self.asked(number), strict=True)
        replies = [self.template.read(ids, mode)
                   for ids, mode in zip(rollout.replies(), modes, strict=True)]
        parts = {name: torch.tensor([self.reward(name, p, r) for p, r in
                                     zip(problems, replies, strict=True)], dtype=torch.float32)
                 for name in ("accuracy", "format", "language", "length")}
        rewards = self.total(parts)
        if args.reward == "shuffled":
            order = random.Random(number).sample(range(len(rewards)), len(rewards))
            rewards = rewards[order]
        return Batch(rollout, replies, parts, rewards.view(args.questions, args.group))

    def reward(self, name: str, problem: Problem, reply: Reply) -> float:
        """One part of a reply's reward, by rule."""
        if name == "accuracy":
            return accuracy(self.task, problem, reply)
        if name == "format":
            return well_formed(reply)
        if name == "language":
            return consistency(problem.question, reply.thought or "")
        return reply.tokens / self.args.max_new_tokens

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the parts, (B,); ValueError where it is no number."""
        args = self.args
        rewards = (args.accuracy_weight * parts["accuracy"] + args.format_weight * parts["format"]
                   + args.language_weight * parts["language"]
                   - args.length_weight * parts["length"])
        if not rewards.isfinite().all():
            bad = int((~rewards.isfinite()).nonzero()[0])
            raise ValueError(f"step {self.step}: the reward of reply {bad + 1} is "
                             f"{rewards[bad].item()}; the rewards of task {args.task!r} must be "
                             "finite numbers")
        return rewards

    def learn(self, share: int) -> dict:
        """Gradients of one part of the rollout, in micro-batches; its line of metrics."""
        args, rollout = self.args, self.batch.rollout
        size = len(rollout.tokens) // args.updates
        rows = torch.arange(share * size, (share + 1) * size, device=self.device)
        advantage = advantages(self.batch.rewards.double(), args.advantage).flatten().float()
        advantage = advantage.to(self.device)
        lengths = rollout.written.sum(1)
        weights = torch.zeros(len(lengths), device=self.device)
        weights[rows] = token_weights(lengths[rows], args.normalise, args.max_new_tokens)
        sums = dict.fromkeys(("loss", "kl", "clip_fraction", "left_out", "entropy",
                              "sampler_gap"), 0.0)
        worst, total = 0.0, int(lengths[rows].sum())
        for part in rows.split(args.micro_batch):
            some = rollout.part(part)
            reply = some.written.nonzero()[:, 0]  # (M,)
            how = dict(temperature=args.temperature, keep_routing=args.keep_routing,
                       keep_mask=args.keep_mask)
            with self.autocast():
                logp, entropy = log_probs(self.model, some, **how)
                ref_logp = None
                if args.kl_beta:
                    with torch.no_grad():
                        ref_logp = log_probs(self.reference, some, **how)[0]
            old = some.logp[some.written]
            found = objective(logp, old, ref_logp, advantage[part][reply], reply,
                              weights[part][reply], args)
            found.loss.backward()
            gap = (logp.detach() - old).abs()
            worst = max(worst, gap.max().item())
            sums["loss"] += found.loss.item()
            for name, value in (("kl", found.kl), ("clip_fraction", found.clipped),
                                ("left_out", found.left_out), ("entropy", entropy.mean().item()),
                                ("sampler_gap", gap.mean().item())):
                sums[name] += value * len(reply) / total
        return sums | dict(sampler_gap_max=worst)

    def describe_batch(self) -> dict:
        """What is told about a rollout."""
        batch, tokens = self.batch, [reply.tokens for reply in self.batch.replies]
        silent = (batch.rewards.amax(1) == batch.rewards.amin(1)).float().mean().item()
        return dict(reward=batch.rewards.mean().item(),
                    **{f"reward_{name}": part.mean().item() for name, part in batch.parts.items()},
                    thinking=fmean(reply.thought is not None for reply in batch.replies),
                    length=fmean(tokens), groups_without_signal=silent)

    def measure(self, record: dict, last: bool) -> float | None:
        """Marks on held-out problems, greedy, the model left to choose, and in both modes at the
        end; judged by the error."""
        every = self.args.eval_every
        if not (last or (every and self.step % every == 0)):
            return None
        modes = MODES if last else ("think", "direct") if self.args.mode == "both" else (
            self.args.mode,)
        with self.autocast():
            for mode in modes:
                record[mode] = examine(self.model, self.tokenizer, self.task,
                                       self.args.eval_problems, mode=mode,
                                       template=self.args.template,
                                       max_new_tokens=self.args.max_new_tokens)._asdict()
        judged = [record[mode]["accuracy"] for mode in modes]
        return 1 - max(judged)

    def brief(self, record: dict) -> str:
        """What the progress bar says beside the count."""
        return f"reward {record['reward']:.3f}, {record['length']:.0f} tokens"

    def line(self, record: dict) -> str:
        """What a log file shows in place of a progress bar."""
        marks = "".join(f", {mode} {record[mode]['accuracy']:.3f}" for mode in MODES
                        if mode in record)
        return (f"step {record['step']}/{self.args.steps}: reward {record['reward']:.3f}, "
                f"thinking {record['thinking']:.2f}, {record['length']:.1f} tokens, "
                f"KL {record['kl']:.3f}, held out{marks.removeprefix(',')}")


def check_lengths(args: GrpoArgs, model_args: ModelArgs, task, template) -> None:
    """Refuse replies that are longer than the context leaves room for."""
    prompt = max(len(template.prompt(p.question, "think")) for p in task.some(64, "train", 0))
    room = model_args.max_seq_len - prompt
    if args.max_new_tokens > room:
        raise ValueError(f"max_new_tokens = {args.max_new_tokens} is not valid: it must be at most "
                         f"{room}: max_seq_len is {model_args.max_seq_len}, and the questions "
                         f"have up to {prompt} tokens")


def grpo(args: GrpoArgs) -> Path:
    """Reinforce a model, or go on with a run when `args.resume` is set; returns the run's folder.

    Raises `ValueError` for settings that do not fit, before anything is written.
    """
    prepare_cpu(args.threads)
    source = source_of(args)
    learner = Reinforcer(args, source.args, Path(args.out), source.tokenizer)
    print(f"grpo    {args.task}, {args.questions} questions of {args.group} replies, objective "
          f"{args.objective}; run {args.out}, on {learner.device}", flush=True)
    run_learner(learner, source)
    return learner.run


def main() -> None:
    """The command line."""
    [given] = parse("minids.grpo", __doc__, GrpoArgs)
    grpo(settings("grpo", GrpoArgs, given, "-grpo"))


if __name__ == "__main__":
    run_program("minids.grpo", main)
