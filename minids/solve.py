"""Put problems to a model and mark its replies by rule, thinking and not.

    python -m minids.solve --run runs/r1/final
    python -m minids.solve --run runs/r1/base --template plain
    python -m minids.solve --run runs/r1/sft --mode free --temperature 1 --samples 32

The problems are held out: no training has seen them. Modes are those of `minids.text.chat`:
think and direct force the reply's first tag, free leaves the choice to the model. With several
samples per problem, pass@k is the chance that one of k replies is right, without bias (Chen et al.,
arXiv 2107.03374, section 2.1).
"""

from dataclasses import dataclass

import torch

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, option, require
from minids.base.tables import format_table
from minids.rl.examination import ask, mark, pass_curve
from minids.runs.device import pick_device
from minids.runs.open import open_model
from minids.text.chat import MODES, TEMPLATES
from minids.text.tasks import open_task


@dataclass(frozen=True)
class SolveArgs:
    """The problems and how they are put"""

    run: str = option("runs/r1/final", "run folder, checkpoint, or Hugging Face folder")
    task: str = option("calculator", "calculator[:OPERATIONS], countdown[:NUMBERS], gsm8k or"
                                     " jsonl:PATH")
    template: str = option("chat", "form of the prompt: turns with tags, or plain text for a base"
                                   " model", tuple(TEMPLATES))
    mode: str = option("", "only this mode; none: all three", ("", *MODES))
    problems: int = option(400, "held-out problems")
    max_new_tokens: int = option(64, "length of a reply at most, tokens")
    temperature: float = option(0.0, "divides the logits; 0 takes the likeliest token")
    top_p: float = option(1.0, "draw from the likeliest tokens of this probability together")
    samples: int = option(1, "replies to each problem; pass@k of more than one")
    show: int = option(0, "print so many replies")
    seed: int = option(0, "decides the draws")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice, one a core")

    def __post_init__(self):
        check_types(self)
        for name in "problems samples max_new_tokens".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in "show seed threads temperature".split():
            require(self, name, getattr(self, name) >= 0, "0 or more")
        require(self, "samples", self.samples == 1 or self.temperature > 0,
                "1 at temperature 0, where all replies are the same")


def report(args: SolveArgs) -> str:
    """The table that the program prints."""
    task, run = open_task(args.task), open_model(args.run, pick_device(args.device))
    how = dict(template=args.template, max_new_tokens=args.max_new_tokens, seed=args.seed,
               temperature=args.temperature, top_p=args.top_p)
    rows = [["mode", "accuracy", "well formed", "thinks", "tokens"]]
    for mode in [args.mode] if args.mode else MODES:
        problems = task.some(args.problems, "held-out", seed=0)
        replies = ask(run.model, run.tokenizer, [p.question for p in problems], mode, **how)
        m = mark(task, problems, replies)
        rows += [[mode, f"{m.accuracy:.3f}", f"{m.form:.3f}", f"{m.thinking:.3f}",
                  f"{m.tokens:.1f}"]]
        for problem, reply in list(zip(problems, replies, strict=True))[:args.show]:
            print(f"{problem.question}   thought {reply.thought!r}   answer {reply.answer!r}, "
                  f"right is {problem.answer!r}")
        if args.samples > 1:
            curve = pass_curve(run.model, run.tokenizer, task, args.problems, args.samples,
                               mode=mode, **how)
            print(f"{mode}: " + "  ".join(f"pass@{k} {p:.3f}" for k, p in curve.items()))
    return format_table(rows)


def main() -> None:
    """The command line."""
    [given] = parse("minids.solve", __doc__, SolveArgs)
    args = SolveArgs(**given)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(report(args))


if __name__ == "__main__":
    run_program("minids.solve", main)
