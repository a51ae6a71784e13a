"""DeepSeek-R1 from random weights, with all stages in one run folder (arXiv 2501.12948, section 2).

    python -m minids.r1                           minutes on two CPU cores
    python -m minids.r1 --seed 1 --out runs/r1-1  another seed
    python -m minids.r1 --controls                and what each claim is compared with
    python -m minids.r1 --preset countdown        a harder task, ten times as long
    python -m minids.r1 --out runs/r1             continue a run that was stopped

Each stage is a run of its own in the folder:
    base        a model of the family is trained on worked examples and bare answers, as text
    sft         cold start: conversations, most of them answered without a thought
    rl          GRPO on right answers and form; the model itself decides whether to think
    rejected    base again, fine-tuned on the right replies of the last stage and on answers without
                a thought
    final       GRPO in both modes
    student     a smaller base model, trained on less
    distilled   the student, fine-tuned on the final model's replies
    alone       the student with GRPO alone, for as many steps as the teacher had

With --controls also:
    zero        R1-Zero: GRPO on base, in plain text, without a cold start
    shuffled    `rl` with the rewards shuffled among the replies
    direct      base, fine-tuned on bare answers for as many tokens as the model of `rl` went
                through in all stages
    early       base before it could calculate, with a short cold start and GRPO: a recipe that
                plateaus

A finished stage is skipped, an interrupted one continues. Each is also a program of its own:
`minids.train`, `sft`, `grpo`, `distill`; PRESETS has the settings.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minids import plots
from minids.base.command_line import Stopped, parse, run_program
from minids.base.fields import Settings, option
from minids.base.files import read_json, write_json
from minids.base.tables import format_table
from minids.distill import CorpusArgs, told, write_corpus
from minids.grpo import GrpoArgs, grpo
from minids.rl.examination import Asking, examine, pass_curve
from minids.runs.checkpoints import newest_checkpoint
from minids.runs.device import prepare_cpu
from minids.runs.learner import read_metrics
from minids.runs.open import open_model
from minids.runs.settings import LearnArgs, TrainArgs
from minids.sft import SftArgs, sft
from minids.text.chat import MODES
from minids.text.tasks import open_task
from minids.train import train

SAMPLES = 32  # replies to a problem, for pass@k
EARLY, EARLY_SFT = 200, 60  # steps of base, and of its cold start, after which it cannot calculate

# For each preset: the model's preset, the fields in which the student differs from it, and for each
# stage the settings that differ from the program's defaults.
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
class R1Args(Settings):
    """Stages, folder and device."""

    preset: str = option("tiny", "task and settings of all stages: tiny calculates, countdown"
                                 " searches and takes longer", tuple(PRESETS))
    out: str = option("runs/r1", "run folder; a run that is there continues")
    controls: bool = option(False, "run the controls too")
    problems: int = option(400, "held-out problems that the table is measured on", low=1)
    seed: int = option(0, "decides weights, data and samples", low=0,
                      high=2 ** 32 - 1)
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(1, "CPU threads; with two, a busy neighbour slows everything down",
                          low=0, high=1024)


class Pipeline:
    """The stages of one run folder; each is run when it is asked for, unless it is there."""

    def __init__(self, args: R1Args):
        self.args, self.run = args, Path(args.out)
        self.preset = PRESETS[args.preset]
        self.task = open_task(self.preset["task"])

    def common(self, stage: str) -> dict:
        """Return the settings that all programs share."""
        return dict(out=str(self.run / stage), resume=True, seed=self.args.seed,
                    device=self.args.device, threads=self.args.threads)

    def base(self, stage: str, model: dict, given: dict) -> None:
        """Pre-train on examples of the task; `model` overrides fields of the preset's model."""
        args = TrainArgs.for_preset(self.preset["model"], data=f"task:{self.task.name}",
                                    **self.common(stage), **given)
        self.finish(stage, args, lambda: train(args, model))

    def tune(self, stage: str, before: str, data: str, given: dict) -> None:
        """Fine-tune the run `before` on `data`, see `SftArgs`."""
        args = SftArgs.for_preset(from_run=str(self.run / before), task=self.task.name, data=data,
                                  **self.common(stage), **given)
        self.finish(stage, args, lambda: sft(args))

    def reinforce(self, stage: str, before: str, given: dict) -> None:
        """Train the run `before` with GRPO."""
        args = GrpoArgs.for_preset(from_run=str(self.run / before), task=self.task.name,
                                   **self.common(stage), **given)
        self.finish(stage, args, lambda: grpo(args))

    def finish(self, stage: str, args: LearnArgs, program: Callable) -> None:
        """Run a stage to its last step, unless it is there."""
        done = newest_checkpoint(self.run / stage)
        if done is not None and done.name == f"step_{args.steps:06d}":
            return
        print(f"\n{stage}", flush=True)
        with self.timed(stage):
            program()

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall-clock time spent within to what the stage has taken so far."""
        start = time.perf_counter()
        try:
            yield
        finally:
            times = self.seconds()
            times[stage] = times.get(stage, 0.0) + time.perf_counter() - start
            write_json(self.run / "times.json", times)

    def seconds(self) -> dict[str, float]:
        """Return the time of each stage, including loading, measuring and saving."""
        file = self.run / "times.json"
        return read_json(file) if file.exists() else {}

    def answers(self, teacher: str) -> str:
        """Return the corpus of a stage's right answers, as `SftArgs.data`; make it if needed."""
        path = self.run / f"{teacher}.jsonl"
        if not path.exists():
            given = dict(teacher=str(self.run / teacher), corpus=str(path), about=self.task.name,
                         draws=self.args.seed, on=self.args.device)
            with self.timed(path.name):
                counts = write_corpus(CorpusArgs(**given | self.preset["corpus"]))
            print(told(counts, str(path)), flush=True)
        return f"jsonl:{path}"

    def stages(self) -> None:
        """Make R1, its distilled student, and the student alone."""
        preset, examples = self.preset, f"task:{self.task.name}"
        self.base("base", {}, preset["base"])
        self.tune("sft", "base", examples, preset["sft"])
        self.reinforce("rl", "sft", preset["rl"])
        self.tune("rejected", "base", self.answers("rl"), preset["rejected"])
        self.reinforce("final", "rejected", preset["final"])
        self.base("student", preset["student"], preset["studied"])
        self.tune("distilled", "student", self.answers("final"), preset["distilled"])
        self.reinforce("alone", "student", dict(template="plain") | preset["alone"])

    def controls(self) -> None:
        """Make what the claims are compared with."""
        preset, examples = self.preset, f"task:{self.task.name}"
        self.reinforce("zero", "base", dict(template="plain") | preset["rl"])
        self.reinforce("shuffled", "sft", dict(reward="shuffled") | preset["rl"])
        self.tune("direct", "base", examples, preset["sft"] | dict(
            think=0.0, examples=65536, steps=self.equal_steps()))
        self.base("early", {}, preset["base"] | dict(steps=EARLY))
        self.tune("early-sft", "early", examples, preset["sft"] | dict(steps=EARLY_SFT))
        self.reinforce("early-rl", "early-sft", preset["rl"])

    def equal_steps(self) -> int:
        """Return the steps of fine-tuning that process as many tokens as sft and rl did together.

        A rollout's tokens count twice: they are sampled, and trained on.
        """
        rl = GrpoArgs.for_preset(**self.preset["rl"])
        lengths = [line["length"] for line in read_metrics(self.run / "rl")]
        seen = sum(lengths) * rl.questions * rl.group * 2
        row = SftArgs.for_preset(**self.preset["sft"])
        return row.steps + round(seen / (row.batch_size * row.seq_len))

    def marks(self) -> dict[str, dict]:
        """Return the marks of every stage that is there, in every mode; each is measured once."""
        file, count = self.run / "marks.json", self.args.problems
        found = read_json(file) if file.exists() else {}
        longest = self.preset["rl"].get("max_new_tokens", GrpoArgs.max_new_tokens)
        for stage, template in TABLE.items():
            key = f"{stage} {count}"
            if key in found or not (self.run / stage).exists():
                continue
            run = open_model(self.run / stage)
            how = Asking(template=template, max_new_tokens=longest)
            found[key] = {mode: examine(run.model, run.tokenizer, self.task, count,
                                        replace(how, mode=mode))._asdict() for mode in MODES}
            if stage in ("sft", "rl"):
                curve = pass_curve(run.model, run.tokenizer, self.task, count // 4, SAMPLES,
                                   replace(how, mode=self.preset["curve"], temperature=1.0))
                found[key]["pass"] = {str(k): share for k, share in curve.items()}
            write_json(file, found)
        return {stage: found[key] for stage in TABLE if (key := f"{stage} {count}") in found}


# The rows of the table, with the template in which each stage is asked.
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
    """Return a row per stage: accuracy in each mode, and what the model does when it may choose."""
    rows = [["stage", "thinking", "not thinking", "free", "thinks when free", "tokens"]]
    for stage, by_mode in marks.items():
        free = by_mode["free"]
        rows.append([NAMES.get(stage, stage), *(f"{by_mode[mode]['accuracy']:.3f}"
                                                for mode in MODES),
                     f"{free['thinking']:.2f}", f"{free['tokens']:.1f}"])
    return format_table(rows)


def r1(args: R1Args) -> dict[str, dict]:
    """Run all stages that are not there yet, and return the marks of each.

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
    """Raise `ValueError` if the run folder belongs to another preset or seed."""
    file, given = run / "r1.json", dict(preset=args.preset, seed=args.seed)
    stored = read_json(file) if file.exists() else given
    for name, value in given.items():
        if stored.get(name) != value:
            raise ValueError(f"{name} = {value!r} is not valid: the run in {run} has "
                             f"{stored.get(name)!r}; name another folder with --out")
    run.mkdir(parents=True, exist_ok=True)
    write_json(file, given)


def main() -> None:
    """Run the command line."""
    [given] = parse("minids.r1", __doc__, R1Args)
    try:
        r1(R1Args(**given))
    except Stopped as stopped:
        raise Stopped(stopped.number, sys.argv[1:]) from None


if __name__ == "__main__":
    run_program("minids.r1", main)
