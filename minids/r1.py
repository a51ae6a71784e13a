"""DeepSeek-R1 from random weights, with all stages in one run folder (arXiv 2501.12948, section 2).

    python -m minids.r1                           minutes on two CPU cores
    python -m minids.r1 --seed 1 --out runs/r1-1  another seed
    python -m minids.r1 --controls                and what each claim is compared with
    python -m minids.r1 --preset countdown        a harder task, ten times as long
    python -m minids.r1 --out runs/r1             continue a run that was stopped

Each stage is a run of its own in the folder; a finished one is skipped, an interrupted one goes on:
    base        a model of the family is trained on worked examples and bare answers, as text
    sft         cold start: conversations, most of them answered without a thought
    rl          GRPO on right answers and form; the model itself decides whether to think
    rejected    base again, fine-tuned on the right replies of rl and on answers without a thought
    final       GRPO in all modes: told to think, told not to, and free to choose
    student     a smaller base model, trained on less
    distilled   the student, fine-tuned on the final model's replies
    alone       the student with GRPO alone, for as many steps as the teacher had

The tag that a reply begins with is learnt like any other token. A model that is free to choose
therefore thinks about as often as its corpus does, and the greedy choice at a half is a coin toss.
Nor can GRPO in the two told modes settle it, because there the prompt ends with the tag. R1's
corpus is three quarters reasoning, 600,000 of 800,000 samples (section 2.3.3), and its last RL
covers all scenarios (section 2.3.4); so do ours.

With --controls also:
    zero        R1-Zero: GRPO on base, in plain text, without a cold start
    shuffled    rl with the rewards shuffled among the replies
    direct      base, fine-tuned on bare answers for as many tokens as sft and rl saw together
    early       base before it could calculate, with a short cold start and GRPO: it plateaus
"""

import importlib
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minids.base.command_line import Stopped, parse, run_program
from minids.base.fields import MOST, option
from minids.base.files import read_sealed, sealed, write_whole
from minids.base.tables import format_table
from minids.distill import CorpusArgs, check_corpus, write_corpus
from minids.grpo import GrpoArgs, grpo
from minids.plots.runs import grpo_figure
from minids.rl.examination import Asking, examine_modes, pass_curve
from minids.runs.checkpoints import newest_checkpoint
from minids.runs.folders import LOCK, locked
from minids.runs.loggers import Mirror
from minids.runs.metrics import read_metrics
from minids.runs.open import is_run, open_model, read_config, refuse_changes
from minids.runs.settings import LearnArgs, Logged, TrainArgs
from minids.runs.starting import alone
from minids.sft import SftArgs, sft
from minids.text.chat import MODES
from minids.text.tasks import open_task
from minids.train import train

SETTINGS = {train: TrainArgs, sft: SftArgs, grpo: GrpoArgs}


class Stage(NamedTuple):
    """A run of the pipeline."""

    label: str  # in the table of marks
    program: Callable
    template: str  # form of the prompts, also when it is examined
    before: str = ""  # stage whose weights it begins with
    teacher: str = ""  # stage whose right replies it learns from; none: examples of the task
    like: str = ""  # stage whose settings it has; none: its own
    changed: dict = {}  # settings that differ from those


STAGES = {
    "base": Stage("base", train, "plain"),
    "sft": Stage("cold start", sft, "chat", "base"),
    "rl": Stage("reasoning RL", grpo, "chat", "sft"),
    "rejected": Stage("rejection SFT", sft, "chat", "base", teacher="rl"),
    "final": Stage("RL, all modes", grpo, "chat", "rejected"),
    "student": Stage("student's base", train, "plain"),
    "distilled": Stage("distilled", sft, "chat", "student", teacher="final"),
    "alone": Stage("student, RL only", grpo, "plain", "student"),
}
CONTROLS = {
    "zero": Stage("R1-Zero", grpo, "plain", "base", like="rl"),
    "shuffled": Stage("RL, rewards shuffled", grpo, "chat", "sft", like="rl",
                      changed=dict(reward="shuffled")),
    "direct": Stage("direct answers only", sft, "chat", "base", like="sft",
                    changed=dict(think=0.0, examples=65536)),  # for `equal_steps`
    # after 200 steps, and 60 of its cold start, it cannot calculate
    "early": Stage("early base", train, "plain", like="base", changed=dict(steps=200)),
    "early-sft": Stage("early, cold start", sft, "chat", "early", like="sft",
                       changed=dict(steps=60)),
    "early-rl": Stage("early, RL", grpo, "chat", "early-sft", like="rl"),
}
ALL = STAGES | CONTROLS
TO_FINAL = "base", "sft", "rl", "rl.jsonl", "rejected", "final"
KEYS = {"preset", "seed", *ALL, *(f"{stage.teacher}.jsonl" for stage in ALL.values())}
SAMPLES = 32  # replies to a problem, for pass@k

# For each preset: the model's preset, the fields in which the student differs from it, and for each
# stage the settings that differ from the program's defaults; those of the teachers' corpora, and
# the mode of pass@k.
SMALLER = dict(dim=48, inter_dim=96, moe_inter_dim=48, n_heads=3)
LONG = dict(max_new_tokens=120)
PRESETS = {
    "tiny": dict(
        task="calculator", model="micro", smaller=SMALLER, corpus={}, curve="free",
        base={}, sft={}, rl={}, rejected={}, final=dict(steps=20, lr=5e-5, mode="all"),
        student=dict(steps=250), distilled={}, alone=dict(steps=60)),
    "countdown": dict(
        task="countdown", model="micro", smaller=SMALLER, curve="think",
        corpus=dict(problems=4096, longest=120), base=dict(steps=1000),
        sft=dict(examples=8192, **LONG), rl=dict(steps=100, **LONG), rejected=LONG,
        final=dict(mode="all", **LONG), student=dict(steps=500), distilled=LONG,
        alone=dict(steps=100, **LONG)),
}


@dataclass(frozen=True)
class R1Args(Logged):
    """Stages, folder and device."""

    preset: str = option("tiny", "tiny calculates; countdown searches, for longer", tuple(PRESETS))
    out: str = option("runs/r1", "run folder; a run that is there continues", folder=True)
    controls: bool = option(False, "run the controls too")
    problems: int = option(400, "held-out problems that the table is measured on", low=1, high=MOST)
    seed: int = option(0, "decides weights, data and samples", low=0, high=2 ** 32 - 1)
    threads: int = option(1, "CPU threads; 0: torch's choice, one per core", low=0, high=1024)


class Pipeline:
    """The stages of one run folder; each is run when it is asked for, unless it is there.

    Raises `ValueError` if the folder belongs to another preset or seed.
    """

    def __init__(self, args: R1Args):
        self.args, self.run, self.preset = args, Path(args.out), PRESETS[args.preset]
        self.task = open_task(self.preset["task"])
        given = dict(preset=args.preset, seed=args.seed)
        refuse_changes(self.run, self.stored("r1.json") or given, given)
        for left in self.run.glob(".tmp_*.json"):  # by a kill in the middle of `store`
            left.unlink()
        self.store("r1.json", given)

    def stored(self, name: str) -> dict:
        """Return the object in a JSON file of the run; {} if there is none yet."""
        path = self.run / name
        return read_sealed(path, lambda key: key.split()[0] in KEYS) if path.exists() else {}

    def store(self, name: str, found: dict) -> None:
        """Write an object to a JSON file of the run."""
        write_whole(self.run / name, sealed(found))

    def make(self, name: str, stage: Stage) -> None:
        """Run a stage to its last step, unless it is there."""
        args, examples = self.args, f"task:{self.task.name}"
        given = dict(self.preset[stage.like or name], **stage.changed, out=str(self.run / name),
                     resume=True, seed=args.seed, device=args.device, threads=args.threads,
                     bodies=args.bodies, log=args.log)
        if stage.before:
            given |= dict(from_run=str(self.run / stage.before), task=self.task.name)
        if stage.program is train:
            given |= dict(name=self.preset["model"], data=examples)
        elif stage.program is sft:
            given |= dict(data=self.answers(stage.teacher) if stage.teacher else examples)
        else:
            given |= dict(template=stage.template)
        if name == "direct":
            given |= dict(steps=self.equal_steps())
        settings = SETTINGS[stage.program].for_preset(**given)
        if not self.is_done(name, settings):
            refuse_another_recipe(self.run / name, stage.program.__name__, settings)
            print(f"\n{name}", flush=True)
            model = [self.preset["smaller"]] if name == "student" else []
            self.timed(name, stage.program, settings, *model)

    def is_done(self, name: str, settings: LearnArgs) -> bool:
        """Return whether a stage came to its end; one that was killed there has a lock left."""
        folder = self.run / name
        done = newest_checkpoint(folder)
        ended = isinstance(settings, TrainArgs) <= (folder / "sample.txt").exists()
        return (done is not None and done.name == f"step_{settings.steps:06d}" and ended
                and not (folder / LOCK).exists())

    def timed(self, name: str, work: Callable, *given) -> None:
        """Call `work`, and add its wall-clock time to what the stage has taken so far."""
        start = time.perf_counter()
        try:
            work(*given)
        finally:
            times = self.stored("times.json")
            times[name] = times.get(name, 0.0) + time.perf_counter() - start
            self.store("times.json", times)

    def answers(self, teacher: str) -> str:
        """Return the corpus of a stage's right answers, as `SftArgs.data`; make it if needed."""
        path = self.run / f"{teacher}.jsonl"
        if path.exists():
            check_corpus(path)
        else:
            self.timed(path.name, write_corpus, CorpusArgs(
                teacher=str(self.run / teacher), corpus=str(path), about=self.task.name,
                draws=self.args.seed, on=self.args.device, **self.preset["corpus"]))
        return f"jsonl:{path}"

    def equal_steps(self) -> int:
        """Return the steps of fine-tuning that process as many tokens as sft and rl did together.

        A rollout's tokens count twice: they are sampled, and trained on.
        """
        rl = GrpoArgs.for_preset(**self.preset["rl"])
        row = SftArgs.for_preset(**self.preset["sft"])
        lengths = [line["length"] for line in read_metrics(self.run / "rl")]
        seen = sum(lengths) * rl.questions * rl.group * 2
        return row.steps + round(seen / (row.batch_size * row.seq_len))

    def marks(self) -> dict[str, dict]:
        """Return the marks of every stage that is there, in every mode; each is measured once."""
        found, count = self.stored("marks.json"), self.args.problems
        longest = self.preset["rl"].get("max_new_tokens", GrpoArgs.max_new_tokens)
        keys = {name: f"{name} {count}" for name in ALL}
        for name, stage in ALL.items():
            if keys[name] in found or not (self.run / name).exists():
                continue
            run = open_model(self.run / name)
            how = Asking(template=stage.template, max_new_tokens=longest)
            row = examine_modes(run.model, run.tokenizer, self.task, count, how)
            if name in ("sft", "rl"):
                curve = pass_curve(run.model, run.tokenizer, self.task, count // 4, SAMPLES,
                                   how._replace(mode=self.preset["curve"], temperature=1.0))
                row["pass"] = {str(k): share for k, share in curve.items()}
            found[keys[name]] = row
            self.store("marks.json", found)
        return {name: found[key] for name, key in keys.items() if key in found}


def refuse_another_recipe(stage: Path, program: str, now: LearnArgs) -> None:
    """Raise `ValueError` if a stage that was stopped began with other settings, say of an older
    version: half of it would follow each. Paths may differ, because a run can be moved."""
    if is_run(stage):
        stored = type(now)(**read_config(stage, program, type(now))[program])
        free = now.may_change | {"from_run", "data"}
        refuse_changes(stage, vars(stored), {k: v for k, v in vars(now).items() if k not in free})


def table(marks: dict[str, dict]) -> str:
    """Return a row per stage: accuracy in each mode, and what the model does when it may choose."""
    rows = [["stage", "thinking", "not thinking", "free", "thinks when free", "tokens"]]
    for name, row in marks.items():
        rows.append([ALL[name].label, *(f"{row[mode]['accuracy']:.3f}" for mode in MODES),
                     f"{row['free']['thinking']:.2f}", f"{row['free']['tokens']:.1f}"])
    return format_table(rows)


def r1(args: R1Args) -> dict[str, dict]:
    """Run all stages that are not there yet, and return the marks of each.

    Raises `ValueError` for settings that do not fit, and `Stopped` after a signal.
    """
    args.prepare()
    importlib.import_module("matplotlib")  # the figure at the end needs it
    Mirror(args.log, Path(args.out))  # the stages need its package
    with locked([Path(args.out)]):
        return run_stages(Pipeline(args))


def run_stages(pipeline: Pipeline) -> dict[str, dict]:
    """Run what is not there yet, print and draw the results, and return the marks."""
    args = pipeline.args
    for name, stage in (ALL if args.controls else STAGES).items():
        pipeline.make(name, stage)
    marks = pipeline.marks()
    text = table(marks)
    for name in ("sft", "rl"):
        curve = "  ".join(f"{k}: {share:.3f}" for k, share in marks[name]["pass"].items())
        text += (f"\npass@k, {pipeline.preset['curve']}, temperature 1, {STAGES[name].label}   "
                 f"{curve}")
    times = pipeline.stored("times.json")
    to_final = sum(times.get(name, 0) for name in TO_FINAL)
    print(f"\n{text}\n\n{args.problems} held-out problems, greedy; {to_final:.0f} s from random "
          f"weights to the final model, {sum(times.values()):.0f} s in all")
    write_whole(pipeline.run / "table.txt", text + "\n")
    drawn = [name for name in ("rl", "zero", "shuffled", "early-rl", "alone") if name in marks]
    grpo_figure({ALL[name].label: read_metrics(pipeline.run / name) for name in drawn},
                pipeline.run / "r1.png")
    return marks


def main() -> None:
    alone("r1")
    [given] = parse("minids.r1", __doc__, R1Args)
    try:
        r1(R1Args(**given))
    except (Stopped, KeyboardInterrupt) as stopped:  # within a stage, or between two
        raise Stopped(getattr(stopped, "number", signal.SIGINT), sys.argv[1:]) from None


if __name__ == "__main__":
    run_program("minids.r1", main, lasting=True)
