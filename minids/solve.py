"""Put problems to a model and mark its replies by rule, thinking and not.

    python -m minids.solve --run runs/r1/final
    python -m minids.solve --run runs/r1/base --template plain
    python -m minids.solve --run runs/r1/sft --mode free --temperature 1 --samples 32

The problems are held out, so no training has seen them. Modes are those of `minids.text.chat`:
think and direct force the first tag of the reply, free leaves the choice to the model. With several
samples, pass@k is the probability that one of k replies is right (`minids.rl.examination`).
"""

from dataclasses import dataclass

from minids.base.command_line import parse, run_program
from minids.base.fields import MOST, option, require
from minids.base.tables import format_table
from minids.infer.sampling import COLDEST
from minids.parallel.layout import Spread
from minids.parallel.team import speaking_first
from minids.rl.examination import Asking, ask, mark, pass_curve
from minids.runs.device import Machine
from minids.runs.open import Source
from minids.runs.together import opened
from minids.text.chat import MODES, TEMPLATES
from minids.text.tasks import TASKS, Task, open_task


@dataclass(frozen=True)
class SolveArgs(Machine):
    """The problems and how they are asked."""

    run: str = option("runs/r1/final", "run folder, checkpoint, or Hugging Face folder")
    task: str = option("calculator", TASKS)
    template: str = option("chat", "turns with tags, or plain for a base model", tuple(TEMPLATES))
    mode: str = option("", "only this mode; none: all three", ("", *MODES))
    problems: int = option(400, "held-out problems", low=1, high=MOST)
    max_new_tokens: int = option(64, "maximum length of a reply, tokens", low=1)
    temperature: float = option(0.0, "divides the logits; 0 takes the likeliest token", low=0)
    top_p: float = option(1.0, "draw from the fewest tokens of this probability", above=0, high=1)
    samples: int = option(1, "replies to each problem; more than one also give pass@k", low=1,
                          high=MOST)
    show: int = option(0, "number of replies to print", low=0)
    seed: int = option(0, "decides the samples", low=0, high=2 ** 32 - 1)

    def __post_init__(self):
        super().__post_init__()
        require(self, "samples", self.samples == 1 or self.temperature >= COLDEST,
                "1 at temperature 0, where all replies are the same")


def report(run: Source, task: Task, args: SolveArgs) -> str:
    """Return the table of marks; print some replies, and pass@k, on the way."""
    problems = task.some(args.problems, "held-out", seed=0)
    rows = [["mode", "accuracy", "well formed", "thinks", "tokens"]]
    for mode in [args.mode] if args.mode else MODES:
        how = Asking(mode, args.template, args.max_new_tokens, args.temperature, args.top_p,
                     args.seed)
        replies = ask(run.model, run.tokenizer, [p.question for p in problems], how)
        m = mark(task, problems, replies)
        rows.append([mode, *(f"{share:.3f}" for share in m[:3]), f"{m.tokens:.1f}"])
        for problem, reply in list(zip(problems, replies, strict=True))[:args.show]:
            print(f"{problem.question}   thought {reply.thought!r}   answer {reply.answer!r}, "
                  f"right is {problem.answer!r}")
        if args.samples > 1:
            curve = pass_curve(run.model, run.tokenizer, task, args.problems, args.samples, how)
            print(f"{mode}: " + "  ".join(f"pass@{k} {p:.3f}" for k, p in curve.items()))
    return format_table(rows)


def main() -> None:
    with speaking_first():
        given, spread = parse("minids.solve", __doc__, SolveArgs, Spread)
        args, spread = SolveArgs(**given), Spread(**spread)
        task = open_task(args.task)
    with opened(args.run, args, spread) as (run, _):
        print(report(run, task, args))


if __name__ == "__main__":
    run_program("minids.solve", main)
