"""DeepSeek-R1 from random weights, all stages in one run folder (arXiv 2501.12948, section 2).

    python -m minids.r1                           minutes on two CPU cores
    python -m minids.r1 --seed 1 --out runs/r1-1  another seed
    python -m minids.r1 --controls                and what each claim is compared with
    python -m minids.r1 --preset countdown        a harder task, ten times as long
    python -m minids.r1 --out runs/r1             a run that was stopped goes on

The stages, each a run of its own in the folder:
    base        a model of the family reads worked examples and bare answers, as text
    sft         cold start: conversations, most of them answered without a thought
    rl          GRPO on right answers and form; the model itself decides whether to think
    rejected    base again, fine-tuned on what the last stage wrote and a rule found right, and on
                answers without thought
    final       GRPO for both modes
    student     a smaller base model that has read less
    distilled   the student, fine-tuned on the final model's replies
    alone       the student, by GRPO alone, as many steps as the teacher had

With --controls also:
    zero        R1-Zero: GRPO on base, in plain text, without a cold start
    shuffled    `rl` with the rewards shuffled among the replies
    direct      base, fine-tuned on bare answers for as many tokens as the model of `rl` went
                through in all stages
    early       base as it was before it could calculate, a short cold start, and GRPO: a recipe
                that plateaus

A stage that is done is skipped, one that was cut off goes on. Each is a program of its own too:
`minids.train`, `sft`, `grpo`, `distill`; the settings are in STAGES.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minids import plots
from minids.base.command_line import Stopped, parse, run_program
from minids.base.fields import check_types, option, require
from minids.base.files import write_json
from minids.base.tables import format_table
from minids.distill import CorpusArgs, told, write_corpus
from minids.grpo import GrpoArgs, grpo
from minids.rl.examination import examine, pass_curve
from minids.runs.checkpoints import newest_checkpoint
from minids.runs.device import prepare_cpu
from minids.runs.learner import read_metrics
from minids.runs.open import open_model
from minids.runs.settings import TrainArgs
from minids.sft import SftArgs, sft
from minids.text.chat import MODES
from minids.text.tasks import open_task
from minids.train import train

SAMPLES = 32  # replies to a problem, for pass@k
EARLY, EARLY_SFT = 200, 60  # steps of base, and of its cold start, after which it cannot calculate

# By preset: the model's preset, the fields of the student's that differ, and by stage the settings
# that differ from the programs' defaults.
PRESETS = {
    "tiny": dict(
        task="calculator", model="micro",
        student=dict(dim=48, inter_dim=96, moe_inter_dim=48, n_heads=3),
        base={}, sft={}, rl={},
        rejected={}, final=dict(steps=20, lr=1e-4, mode="both"),
        studied=dict(steps=250), distilled={}, alone=dict(steps=60),
        corpus=dict(direct=0.5), curve="free"),
    "countdown": dict(
        task="countdown", model="micro",
        student=dict(dim=48, inter_dim=96, moe_inter_dim=48, n_heads=3),
        base=dict(steps=1000), sft=dict(examples=8192, max_new_tokens=120),
        rl=dict(steps=100, max_new_tokens=120),
        rejected=dict(max_new_tokens=120),
        final=dict(mode="both", max_new_tokens=120),
        studied=dict(steps=500), distilled=dict(max_new_tokens=120),
        alone=dict(steps=100, max_new_tokens=120),
        corpus=dict(problems=4096, longest=120, direct=0.5), curve="think"),
}


@dataclass(frozen=True)
class R1Args:
    """What is run, and where."""

    preset: str = option("tiny", "task and settings of all stages: tiny calculates, countdown"
                                 " searches and takes longer", tuple(PRESETS))
    out: str = option("runs/r1", "run folder; a run that is there goes on")
    controls: bool = option(False, "run the controls too")
    problems: int = option(400, "held-out problems that the table is measured on")
    seed: int = option(0, "decides weights, data and samples")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(1, "CPU threads; with two a busy neighbour slows all of it down")

    def __post_init__(self):
        check_types(self)
        require(self, "problems", self.problems >= 1, "at least 1")
        for name in "seed threads".split():
            require(self, name, getattr(self, name) >= 0, "0 or more")


class Pipeline:
    """The stages of one run folder, each made when it is asked for and not there yet."""

    def __init__(self, args: R1Args):
        self.args, self.run = args, Path(args.out)
        self.preset = PRESETS[args.preset]
        self.task = open_task(self.preset["task"])
        self.common = dict(seed=args.seed, device=args.device, threads=args.threads)

    def path(self, stage: str) -> str:
        """The folder of a stage."""
        return str(self.run / stage)

    def learn(self, stage: str, cls, program: Callable, model: dict | None = None, /,
              **given) -> None:
        """Run one stage to its end, unless it is there."""
        out = self.path(stage)
        args = (TrainArgs.for_preset(self.preset["model"], out=out, resume=True, **self.common,
                                     **given) if cls is TrainArgs else
                cls.for_preset(out=out, resume=True, **self.common, **given))
        done = newest_checkpoint(self.run / stage)
        if done is not None and done.name == f"step_{args.steps:06d}":
            return
        print(f"\n{stage}", flush=True)
        with self.timed(stage):
            program(args, model) if model is not None else program(args)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time within to what the stage has taken so far, by the clock on the wall."""
        file, start = self.run / "times.json", time.perf_counter()
        try:
            yield
        finally:
            times = json.loads(file.read_text()) if file.exists() else {}
            times[stage] = times.get(stage, 0.0) + time.perf_counter() - start
            write_json(file, times)

    def base(self, stage: str, model: dict, **given) -> None:
        """Pre-training on examples of the task."""
        self.learn(stage, TrainArgs, train, model, data=f"task:{self.task.name}", **given)

    def tune(self, stage: str, before: str, data: str = "", **given) -> None:
        """Fine-tuning of the run `before`, on the task or a corpus."""
        self.learn(stage, SftArgs, sft, from_run=self.path(before), task=self.task.name,
                   data=data or f"task:{self.task.name}", **given)

    def reinforce(self, stage: str, before: str, **given) -> None:
        """GRPO on the run `before`."""
        self.learn(stage, GrpoArgs, grpo, from_run=self.path(before), task=self.task.name, **given)

    def answers(self, teacher: str) -> str:
        """The corpus of a stage's right answers, made if it is not there; what `data` says of it"""
        path = self.run / f"{teacher}.jsonl"
        if not path.exists():
            given = dict(teacher=self.path(teacher), corpus=str(path), about=self.task.name,
                         draws=self.args.seed, on=self.args.device)
            with self.timed(path.name):
                counts = write_corpus(CorpusArgs(**given | self.preset["corpus"]))
            print(told(counts, str(path)), flush=True)
        return f"jsonl:{path}"

    def stages(self) -> None:
        """R1, its distilled student, and the student alone."""
        preset = self.preset
        self.base("base", {}, **preset["base"])
        self.tune("sft", "base", **preset["sft"])
        self.reinforce("rl", "sft", **preset["rl"])
        self.tune("rejected", "base", self.answers("rl"), **preset["rejected"])
        self.reinforce("final", "rejected", **preset["final"])
        self.base("student", preset["student"], **preset["studied"])
        self.tune("distilled", "student", self.answers("final"), **preset["distilled"])
        self.reinforce("alone", "student", template="plain", **preset["alone"])

    def controls(self) -> None:
        """What the claims are compared with."""
        preset = self.preset
        self.reinforce("zero", "base", template="plain", **preset["rl"])
        self.reinforce("shuffled", "sft", reward="shuffled", **preset["rl"])
        self.tune("direct", "base", **preset["sft"] | dict(think=0.0, examples=65536,
                                                           steps=self.equal_steps()))
        self.base("early", {}, **preset["base"] | dict(steps=EARLY))
        self.tune("early-sft", "early", **preset["sft"] | dict(steps=EARLY_SFT))
        self.reinforce("early-rl", "early-sft", **preset["rl"])

    def equal_steps(self) -> int:
        """Steps of fine-tuning in which a model sees as many tokens as that of `rl` did in all.

        A rollout's tokens count twice: they are sampled, and learnt from.
        """
        rl = GrpoArgs.for_preset(**self.preset["rl"])
        lengths = [line["length"] for line in read_metrics(self.run / "rl")]
        seen = sum(lengths) * rl.questions * rl.group * 2
        row = SftArgs.for_preset(**self.preset["sft"])
        return row.steps + round(seen / (row.batch_size * row.seq_len))

    def marks(self) -> dict[str, dict]:
        """What every stage that is there is worth, in every mode; measured once."""
        kept = self.run / "marks.json"
        found = json.loads(kept.read_text()) if kept.exists() else {}
        for stage, template in TABLE.items():
            key = f"{stage} {self.args.problems}"
            if key in found or not (self.run / stage).exists():
                continue
            run = open_model(self.run / stage)
            how = dict(template=template, max_new_tokens=self.longest())
            found[key] = {mode: examine(run.model, run.tokenizer, self.task, self.args.problems,
                                        mode=mode, **how)._asdict() for mode in MODES}
            if stage in ("sft", "rl"):
                curve = pass_curve(run.model, run.tokenizer, self.task, self.args.problems // 4,
                                   SAMPLES, temperature=1.0, mode=self.preset["curve"], **how)
                found[key]["pass"] = {str(k): share for k, share in curve.items()}
            write_json(kept, found)
        return {stage: found[key] for stage in TABLE
                if (key := f"{stage} {self.args.problems}") in found}

    def longest(self) -> int:
        """Tokens of a reply at most."""
        return self.preset["rl"].get("max_new_tokens", GrpoArgs.max_new_tokens)

    def seconds(self) -> dict[str, float]:
        """Time that each stage has taken, loading, measuring and saving included."""
        return json.loads((self.run / "times.json").read_text())


# The rows of the table, and the form in which each is asked.
TABLE = {"base": "plain", "sft": "chat", "rl": "chat", "rejected": "chat", "final": "chat",
         "student": "plain", "distilled": "chat", "alone": "plain", "zero": "plain",
         "shuffled": "chat", "direct": "chat", "early": "plain", "early-sft": "chat",
         "early-rl": "chat"}
NAMES = {"sft": "cold start", "rl": "reasoning RL", "rejected": "rejection SFT",
         "final": "RL, both modes", "student": "student's base", "alone": "student, RL only",
         "zero": "R1-Zero", "shuffled": "RL, rewards shuffled", "direct": "direct answers only",
         "early": "early base", "early-sft": "early, cold start", "early-rl": "early, RL"}


TO_FINAL = "base", "sft", "rl", "rl.jsonl", "rejected", "final"


def table(marks: dict[str, dict]) -> str:
    """The stages by row: accuracy in each mode, and what the model does when it may choose."""
    rows = [["stage", "thinking", "not thinking", "free", "thinks when free", "tokens"]]
    for stage, by_mode in marks.items():
        free = by_mode["free"]
        rows.append([NAMES.get(stage, stage), *(f"{by_mode[mode]['accuracy']:.3f}"
                                                for mode in MODES),
                     f"{free['thinking']:.2f}", f"{free['tokens']:.1f}"])
    return format_table(rows)


def r1(args: R1Args) -> dict[str, dict]:
    """Run all stages that are not there yet; the marks of each.

    Raises `ValueError` for settings that do not fit, and `Stopped` after a signal.
    """
    prepare_cpu(args.threads)
    pipeline = Pipeline(args)
    check_same(pipeline.run, args)
    pipeline.stages()
    if args.controls:
        pipeline.controls()
    marks = pipeline.marks()
    text = table(marks)
    for stage in ("sft", "rl"):
        curve = "  ".join(f"{k}: {share:.3f}" for k, share in marks[stage]["pass"].items())
        text += f"\npass@k, {pipeline.preset['curve']}, temperature 1, {NAMES[stage]}   {curve}"
    times = pipeline.seconds()
    to_final = sum(times[stage] for stage in TO_FINAL)
    print(f"\n{text}\n\n{args.problems} held-out problems, greedy; {to_final:.0f} s from random "
          f"weights to the final model, {sum(times.values()):.0f} s in all")
    (pipeline.run / "table.txt").write_text(text + "\n")
    stages = {NAMES.get(s, s): read_metrics(pipeline.run / s) for s in ("rl", "zero", "shuffled",
              "early-rl", "alone") if (pipeline.run / s).exists()}
    plots.grpo_figure(stages, pipeline.run / "r1.png")
    return marks


def check_same(run: Path, args: R1Args) -> None:
    """A run folder belongs to one preset and seed."""
    given = dict(preset=args.preset, seed=args.seed)
    path = run / "r1.json"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, given)
    stored = json.loads(path.read_text())
    for name, value in given.items():
        if stored.get(name) != value:
            raise ValueError(f"{name} = {value!r} is not valid: the run in {run} has "
                             f"{stored.get(name)!r}; name another folder with --out")


def main() -> None:
    """The command line."""
    [given] = parse("minids.r1", __doc__, R1Args)
    args = R1Args(**given)
    try:
        r1(args)
    except Stopped as stopped:
        raise Stopped(stopped.number, sys.argv[1:]) from None


if __name__ == "__main__":
    run_program("minids.r1", main)
