"""Reinforcement learning with group relative policy optimization (GRPO) and rewards by rule.

    python -m minids.grpo --from runs/base-sft                        the calculator, on a CPU
    python -m minids.grpo --from runs/base --template plain           R1-Zero: no cold start
    python -m minids.grpo --from runs/base-sft --objective v3.2
    python -m minids.grpo --from DeepSeek-V2-Lite --preset r1 --task gsm8k --device cuda
    python -m minids.grpo --resume --out runs/base-sft-grpo

GRPO (DeepSeekMath, arXiv 2402.03300; R1, arXiv 2501.12948, section 2.2) departs from the usual
PPO with human feedback in four points:

    1. No critic. The model answers every question with a group of replies, and a reply's advantage
       is its reward less the group's mean.
    2. No reward model. Rules score answer, format, language and length (`minids.rl.rewards`).
    3. The KL to a reference model is a term of the loss, not of the reward. `minids.rl.objectives`
       has the loss and the variants of the papers: --objective names one, and each of its settings
       is a flag too.
    4. The trainer routes tokens to the experts that the sampler chose, and leaves out the tokens
       that top-k and top-p cut off, so that both mean the same distribution (V3.2, arXiv
       2512.02556, section 3.1).

A loss of 0 is not a fault: on a fresh rollout every ratio is 1, the advantages of a group add up to
0, and the KL begins at 0. The gradient is not 0. Watch the reward. If every reply to each question
earns the same reward there is no signal, and a line says why.

torchrun spreads the model and each step's questions over many processes, with the numbers of one: a
rank samples with all weights, which it gathers, and draws for a question what one process would.

    torchrun --nproc-per-node 2 -m minids.grpo --from runs/base-sft --device cpu

Simplified: the process that trains also samples, and a batch of replies is decoded until its last
one ends. The gates' biases are frozen.
"""

import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minids.base.command_line import parse, run_program
from minids.base.fields import MOST, option, require
from minids.config import ModelArgs
from minids.infer.sampling import COLDEST, Sampler
from minids.parallel.layout import DataLayout, Layout
from minids.parallel.parts import Parts
from minids.parallel.team import speaking_first, world_size
from minids.rl.examination import Asking, check_room, examine_modes
from minids.rl.objectives import OBJECTIVES, ObjectiveArgs, advantages, objective, token_weights
from minids.rl.rewards import accuracy, consistency, well_formed
from minids.rl.rollout import Rollout, log_probs, roll_out
from minids.runs.learner import Learner
from minids.runs.open import Source, settings
from minids.runs.settings import LearnArgs
from minids.runs.starting import content, learn
from minids.text.chat import MODES, TEMPLATES, Reply
from minids.text.tasks import TASKS, Problem, open_task
from minids.text.tokenizer import Tokenizer

# R1: 32 questions with 16 replies each per step, lr 3e-6, KL 0.001, at most 32,768 tokens; one
# rollout of 8,192 replies serves 16 steps.
R1 = dict(steps=10_400, questions=512, group=16, updates=16, lr=3e-6, kl_beta=0.001, mode="think",
          format_weight=1.0, max_new_tokens=32768, eval_every=100, save_every=100)
PRESETS = {"tiny": dict(dtype="fp32"), "r1": R1}
QUIET = 50  # steps between two lines that say why there is no signal


@dataclass(frozen=True)
class GrpoArgs(ObjectiveArgs, LearnArgs):
    """The settings of one reinforcement-learning run."""

    preset: str = option("tiny", "tiny, or r1: the paper's", tuple(PRESETS))
    task: str = option("calculator", TASKS)
    template: str = option("chat", "turns with tags, or plain for a base model", tuple(TEMPLATES))
    mode: str = option("free", "free: the model decides whether to think; think, direct: the prompt"
                               " does; both: these two in turn; all: the three in turn",
                       (*MODES, "both", "all"))
    steps: int = option(40, "optimizer steps", low=1)
    questions: int = option(16, "questions in a rollout", low=1, high=MOST)
    group: int = option(16, "replies to each question, judged by comparison", low=2, high=MOST)
    updates: int = option(1, "optimizer steps that share a rollout, each on a part of it", low=1)
    micro_batch: int = option(256, "replies that go through the model together", low=1)
    max_new_tokens: int = option(48, "maximum length of a reply, tokens", low=1)
    temperature: float = option(1.0, "divides the logits in sampling", low=COLDEST)
    top_k: int = option(0, "draw from this many likeliest tokens; 0: all", low=0)
    top_p: float = option(1.0, "draw from the fewest tokens of this probability", above=0, high=1)
    reference_every: int = option(0, "steps between renewals of the reference; 0: none", low=0)
    keep_routing: bool = option(True, "train with the experts that sampling chose")
    keep_mask: bool = option(True, "train with the tokens that top-k and top-p left")
    accuracy_weight: float = option(1.0, "reward of a right answer", low=0)
    format_weight: float = option(0.1, "reward of a well-formed reply", low=0)
    language_weight: float = option(0.0, "reward of a thought in the question's language", low=0)
    length_weight: float = option(0.0, "penalty on a reply of the maximum length", low=0)
    reward: str = option("task", "the task's, or shuffled: a control", ("task", "shuffled"))
    eval_every: int = option(10, "steps between evaluations; 0: only at the end", low=0)
    eval_problems: int = option(200, "held-out problems in an evaluation", low=1, high=MOST)
    lr: float = option(2e-4, "peak learning rate of AdamW", above=0)

    may_change = LearnArgs.may_change | {"micro_batch", "eval_every", "eval_problems"}

    def __post_init__(self):
        super().__post_init__()
        require(self, "updates", self.questions % self.updates == 0,
                f"a divisor of questions = {self.questions}")

    @property
    def modes(self) -> tuple[str, ...]:
        """Return the modes of the prompts, which take turns."""
        return dict(both=("think", "direct"), all=MODES).get(self.mode, (self.mode,))

    @classmethod
    def for_preset(cls, preset: str = "tiny", objective: str = "r1", **given) -> "GrpoArgs":
        """Return the settings of preset and objective, overridden by those that are given."""
        named = OBJECTIVES.get(objective, {}) | PRESETS.get(preset, {})
        return cls(**named | dict(preset=preset, objective=objective) | given)


class Batch(NamedTuple):
    """This rank's share of a rollout, and what all ranks know of all B replies, group by group.

    rewards: (questions, group); lengths: (B,) int64, tokens that the model wrote
    advantage: (B,), over the whole group; kept: (B,) bool, the replies that are in the loss
    metrics: of the whole rollout
    """

    rollout: Rollout
    rewards: Tensor
    lengths: Tensor
    advantage: Tensor
    kept: Tensor
    metrics: dict


def why_no_signal(metrics: dict) -> str:
    """Return the likeliest reason that no group of a step has a signal; "" if one has."""
    share = defaultdict(float, metrics)
    if share["groups_without_signal"] < 1:
        return ""
    if share["truncated"] > 0.5:
        return "most replies ran into max_new_tokens: raise it, or fine-tune first"
    if share["groups_all_wrong"] == 1:
        return "no reply is right: take an easier task, or fine-tune first"
    if share["groups_all_right"] == 1:
        return "every reply is right: take a harder task"
    if share["groups_all_right"] + share["groups_all_wrong"] > 0.999:
        return "each question's replies are all right or all wrong: ask more --questions"
    return "the weights of accuracy, format, language and length cancel out"


class Reinforcer(Learner):
    """One reinforcement-learning run. Its loop: ask, sample, judge, learn; `Learner` updates."""

    program, over_ranks, replies = "grpo", "minids.rl.over_ranks:ReinforcerOverRanks", True

    def __init__(self, args: GrpoArgs, model_args: ModelArgs, run: Path, tokenizer: Tokenizer):
        pieces = args.updates * self.team.world
        require(args, "questions", args.questions % pieces == 0,
                f"a multiple of {pieces}: {self.team.world} ranks x {args.updates} updates")
        self.template, self.task = TEMPLATES[args.template](tokenizer), open_task(args.task)
        check_room(args, model_args.max_seq_len, self.template, self.task)
        super().__init__(args, model_args, run, tokenizer)
        self.more_config = content(args.task)
        self.reference = self.build(model_args)
        for _, parameter in self.reference.named_parameters():
            parameter.requires_grad_(False)
        self.batch: Batch | None = None
        self.resumed: Rollout | None = None  # which a checkpoint held
        self.quiet_until = 0

    def accumulate(self) -> tuple[dict, None]:
        """Sample a rollout, unless `updates` has steps left for the last one; learn from a part."""
        number, part = divmod(self.step - 1, self.args.updates)
        start = time.perf_counter()
        if part == 0:
            self.batch = self.judge(number, self.sample(number))
            self.tell_silence()
        elif self.batch is None:
            self.batch = self.judge(number, self.resumed)
        sampled = dict(sampling_s=round(time.perf_counter() - start, 3))
        return self.learn(part) | self.batch.metrics | sampled, None

    def tell_silence(self) -> None:
        """Print now and then why no group has a signal, unless the run has learned all there is."""
        found = self.batch.metrics
        why, learned = why_no_signal(found), any(not why_no_signal(r) for r in self.metrics)
        done = learned and found["groups_all_right"] == 1
        if why and self.step >= self.quiet_until and not done:
            self.quiet_until = self.step + QUIET
            tqdm.write(f"step {self.step}: no signal: all replies to each question earned the same "
                       f"reward, because {why}")

    def asked(self, number: int) -> list[tuple[Problem, str]]:
        """Return the problem and mode of each reply of rollout `number`."""
        args = self.args
        problems = self.task.some(args.questions, "train", seed=args.seed * 1_000_003 + number)
        return [(p, args.modes[i % len(args.modes)])
                for i, p in enumerate(problems) for _ in range(args.group)]

    def own(self) -> Tensor:
        """Return which replies of a rollout are this rank's: of each update an equal share."""
        args = self.args
        rows = torch.arange(args.questions * args.group).view(args.updates, -1)
        return self.team.share(rows.T).T.flatten()

    def sample(self, number: int) -> Rollout:
        """Draw this rank's share of rollout `number`; the same weights always give the same one."""
        args, asked, own = self.args, self.asked(number), self.own()
        prompts = [self.template.prompt(asked[i][0].question, asked[i][1]) for i in own.tolist()]
        generator = torch.Generator(self.device).manual_seed(args.seed * 1_000_003 + number)
        rows = None if len(own) == len(asked) else own.to(self.device)
        sampler = Sampler(args.temperature, args.top_k, args.top_p, generator, len(asked), rows)
        with self.whole_model() as model, self.autocast(), self.team.together():
            return roll_out(model, prompts, args.max_new_tokens, sampler, self.tokenizer.eos_ids)

    def judge(self, number: int, rollout: Rollout) -> Batch:
        """Return rollout `number` with its rewards; raises `ValueError` if one is NaN or Inf.

        Each rank judges its share. All then know all rewards and lengths, so that advantages,
        weights of tokens and metrics are those of one process.
        """
        args, asked, told = self.args, self.asked(number), []
        with self.team.together():
            for i, ids in zip(self.own().tolist(), rollout.replies(), strict=True):
                problem, mode = asked[i]
                reply = self.template.read(ids, mode)
                told.append((i, self.reward(problem, reply), reply.ended,
                             reply.thought is not None, reply.tokens, len(ids)))
        told = sorted(self.team.joined(told), key=itemgetter(0))
        _, found, ended, thinking, tokens, lengths = zip(*told, strict=True)
        weights = dict(accuracy=args.accuracy_weight, format=args.format_weight,
                       language=args.language_weight, length=-args.length_weight)
        parts = {name: torch.tensor([reward[name] for reward in found], dtype=torch.float32)
                 for name in weights}
        rewards = sum(weights[name] * part for name, part in parts.items())  # (B,)
        if not rewards.isfinite().all():
            bad = int((~rewards.isfinite()).nonzero()[0])
            raise ValueError(f"step {self.step}: the reward of reply {bad + 1} is "
                             f"{rewards[bad].item()}; the rewards of task {args.task!r} must be "
                             "finite numbers")
        if args.reward == "shuffled":
            rewards = rewards[random.Random(number).sample(range(len(rewards)), len(rewards))]
        rewards = rewards.view(args.questions, args.group)
        advantage = advantages(rewards.double(), args.advantage).flatten().float()
        ended = torch.tensor(ended)
        kept = ended | (not args.mask_truncated)
        silent = (advantage * kept).view_as(rewards).eq(0).all(1)
        right = parts["accuracy"].view_as(rewards)
        means = {f"reward_{name}": part.mean().item() for name, part in parts.items()}
        return Batch(rollout, rewards, torch.tensor(lengths), advantage, kept, dict(
            reward=rewards.mean().item(), **means,
            thinking=fmean(thinking), length=fmean(tokens),
            truncated=1 - ended.float().mean().item(),
            groups_all_right=right.amin(1).eq(1).float().mean().item(),
            groups_all_wrong=right.amax(1).eq(0).float().mean().item(),
            groups_without_signal=silent.float().mean().item()))

    def reward(self, problem: Problem, reply: Reply) -> dict[str, float]:
        """Return the parts of a reply's reward, by rule."""
        return dict(accuracy=accuracy(self.task, problem, reply), format=well_formed(reply),
                    language=consistency(problem.question, reply.thought or ""),
                    length=reply.tokens / self.args.max_new_tokens)

    def learn(self, part: int) -> dict:
        """Compute the gradients of one part of the rollout, in micro-batches; returns metrics.

        A token's weight, and its part in the metrics' means, follow from the replies of all ranks.
        """
        args, (rollout, _, lengths, advantage, kept, _) = self.args, self.batch
        size = len(lengths) // args.updates
        rows = slice(part * size, (part + 1) * size)  # of all ranks
        weights = torch.zeros(len(lengths))
        weights[rows] = token_weights(lengths[rows], args.normalise, args.max_new_tokens,
                                      kept[rows])
        advantage, weights = (t[self.own()].to(self.device) for t in (advantage, weights))  # (b,)
        how = args.temperature, args.keep_routing, args.keep_mask
        metrics, total = defaultdict(float), int(lengths[rows].sum())
        own = torch.arange(len(weights), device=self.device).chunk(args.updates)[part]
        for chosen in own.split(args.micro_batch):
            some = rollout.part(chosen)  # expert parallelism needs one shape on all ranks
            some = some.padded(max(self.team.joined([some.tokens.size(1)])))
            reply = some.written.nonzero()[:, 0]  # (M,)
            ref_logp, old_logp = None, some.logp[some.written]
            with self.autocast():
                logp, entropy = log_probs(self.model, some, *how)  # (M,), (M,)
                if args.kl_beta:
                    with torch.no_grad():
                        ref_logp, _ = log_probs(self.reference, some, *how)
            found = objective(logp, old_logp, ref_logp, advantage[chosen][reply], reply,
                              weights[chosen][reply], args)
            self.scaler.scale(found.loss).backward()
            gap = (logp.detach() - old_logp).abs()
            metrics["loss"] += found.loss.item()
            means = dict(kl=found.kl, clip_fraction=found.clipped, left_out=found.left_out,
                         entropy=entropy.mean().item(), sampler_gap=gap.mean().item())
            for name, value in means.items():
                metrics[name] += value * len(reply) / total
            metrics["sampler_gap_max"] = max(metrics["sampler_gap_max"], gap.max().item())
        each = self.team.joined([dict(metrics)])
        return {name: (max if name == "sampler_gap_max" else sum)(m[name] for m in each)
                for name in metrics}

    def after_update(self, loads: None) -> None:
        if self.args.reference_every and self.step % self.args.reference_every == 0:
            self.reference.load_state_dict(self.model.state_dict())

    def lighter(self) -> list[str]:
        size = self.args.micro_batch
        return [f"--micro-batch={size // 2}"] if size > 1 else []

    def begin_from(self, source: Source) -> None:
        super().begin_from(source)
        self.reference.load_state_dict(self.model.state_dict())

    def in_use(self) -> bool:
        """Return whether the rollout has steps to serve."""
        return self.batch is not None and self.step % self.args.updates > 0

    def more_state(self) -> dict:
        return dict(reference={n: w.cpu() for n, w in self.reference.state_dict().items()},
                    rollout=self.batch.rollout._asdict() if self.in_use() else None)

    def restore_more(self, state: dict) -> None:
        # Earlier versions saved step 0 before its reference was set: it is the model itself.
        if state["step"]:
            self.load_into(self.reference, state["reference"])
        else:
            self.reference.load_state_dict(self.model.state_dict())
        saved = state.get("rollout")
        if isinstance(saved, Parts):
            self.resumed = Rollout.of_parts(saved, self.args.updates, self.team)
        elif saved is not None:
            self.resumed = Rollout(**saved).each(lambda values: values[self.own()])
        if self.resumed:
            self.resumed = self.resumed.each(lambda values: values.to(self.device))

    def measure(self, record: dict, last: bool) -> float | None:
        """Score greedy replies to held-out problems: in the modes of training, at the end in all.

        The best checkpoint is the one with the lowest error in its best mode.
        """
        args = self.args
        if not (last or (args.eval_every and self.step % args.eval_every == 0)):
            return None
        how = Asking(template=args.template, max_new_tokens=args.max_new_tokens)
        with self.whole_model() as model, self.autocast():
            found = examine_modes(model, self.tokenizer, self.task, args.eval_problems, how,
                                  MODES if last else args.modes, self.team)
        record.update(found)
        return 1 - max(marks["accuracy"] for marks in found.values())

    def finish(self) -> None:
        """Print a line if most of the steps had no signal."""
        reasons = Counter(filter(None, map(why_no_signal, self.metrics)))
        if 2 * reasons.total() > len(self.metrics):
            print(f"{reasons.total()} of {len(self.metrics)} steps had no signal, mostly because "
                  f"{reasons.most_common(1)[0][0]}")

    def describe(self) -> str:
        args = self.args
        return (f"{args.task}, {args.questions} questions with {args.group} replies each, "
                f"objective {args.objective}")

    def line(self, record: dict) -> str:
        marks = ", ".join(f"{m} {record[m]['accuracy']:.3f}" for m in MODES if m in record)
        return (f"reward {record['reward']:.3f}, thinking {record['thinking']:.2f}, "
                f"{record['length']:.1f} tokens, KL {record['kl']:.3f}"
                + (f", held out {marks}" if marks else ""))


def grpo(args: GrpoArgs, layout: Layout | None = None) -> Path:
    """Reinforce a model; see `minids.runs.starting.learn`."""
    return learn(Reinforcer, args, "-grpo", layout)


def main() -> None:
    with speaking_first():
        given, layout = parse("minids.grpo", __doc__, GrpoArgs, DataLayout)
        args, layout = settings("grpo", GrpoArgs, given), Layout(**layout).fitted(world_size())
    grpo(args, layout)


if __name__ == "__main__":
    run_program("minids.grpo", main, lasting=True)
