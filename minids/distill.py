"""Rejection sampling and distillation: a teacher's right answers train another model.

    python -m minids.distill --teacher runs/r1/final --corpus teacher.jsonl
    python -m minids.distill --teacher runs/r1/final --corpus teacher.jsonl \\
        --from runs/r1/student --out runs/distilled

The teacher answers problems from the training side. A reply that is right, well formed, short
enough and in the question's language is accepted, at most one per problem. This is the third stage
of R1 (arXiv 2501.12948, section 2.3.3), where the corpus trains the base model, and also its
distillation (section 2.4), where it trains smaller ones. R1 adds answers without reasoning, a
quarter of the corpus, so that the model keeps both ways of answering.

Without --from the program only writes the corpus: lines {"messages": [..]}, and CORPUS.json beside
it with the counts. With --from it also fine-tunes a student on it, with the flags of `minids.sft`.
"""

import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minids.base.command_line import Stopped, parse, run_program
from minids.base.fields import MOST, Settings, check_writable, option, require
from minids.base.files import digest, read_sealed, sealed, write_whole
from minids.infer.sampling import COLDEST
from minids.rl.examination import BATCH, Asking, ask, parts
from minids.rl.rewards import accuracy, consistency, well_formed
from minids.runs.device import pick_device, prepare_cpu
from minids.runs.open import open_model, settings
from minids.runs.starting import alone
from minids.sft import SftArgs, conversation, sft
from minids.text.chat import TEMPLATES, Reply
from minids.text.tasks import TASKS, Problem, Task, open_task


@dataclass(frozen=True)
class CorpusArgs(Settings):
    """The teacher and what it answers."""

    teacher: str = option("", "run folder, checkpoint, or Hugging Face folder")
    corpus: str = option("", "file to write, one JSON object per line")
    about: str = option("calculator", f"task: {TASKS}")
    problems: int = option(2048, "problems that the teacher answers, from the training side", low=1,
                           high=MOST)
    tries: int = option(1, "replies to each problem; the first good one is accepted", low=1)
    template: str = option("chat", "form of the prompt", tuple(TEMPLATES))
    temperature: float = option(1.0, "divides the logits; R1 recommends 0.6 to its users", low=0)
    top_p: float = option(1.0, "draw from the fewest tokens of this probability", above=0, high=1)
    longest: int = option(48, "maximum length of a reply, tokens; longer ones are rejected", low=1)
    direct: float = option(0.25, "share of the corpus without a thought, below 1", low=0)
    draws: int = option(0, "seed of problems and replies", low=0, high=2 ** 32 - 1)
    on: str = option("auto", "the teacher's device: auto, cpu, cuda or mps")

    def __post_init__(self):
        super().__post_init__()
        require(self, "teacher", bool(self.teacher), "a run or a Hugging Face folder")
        require(self, "corpus", bool(self.corpus), "a file to write")
        require(self, "corpus", not Path(self.corpus).is_dir(), "a file, and it is a folder")
        require(self, "corpus", not any(path.is_file() for path in Path(self.corpus).parents),
                "in a folder, and it is below a file")
        require(self, "tries", self.tries == 1 or self.temperature >= COLDEST,
                "1 at temperature 0, where all replies are the same")
        require(self, "direct", self.direct < 1, "0 or more and below 1")


VERDICTS = "kept", "wrong", "malformed", "other_language"  # on a reply: accepted, or why not


def verdict(task: Task, problem: Problem, reply: Reply) -> str:
    """Return one of `VERDICTS`; a truncated reply is malformed."""
    if not well_formed(reply) or reply.thought is None:
        return "malformed"
    if not accuracy(task, problem, reply):
        return "wrong"
    return "kept" if consistency(problem.question, reply.thought) == 1 else "other_language"


def sift(args: CorpusArgs) -> tuple[list[list[dict]], Counter]:
    """Return the accepted conversations, and the number of replies by verdict.

    Their thoughts and answers are the teacher's; those without a thought have the task's answer.
    """
    task, run = open_task(args.about), open_model(args.teacher, pick_device(args.on))
    kept, counts = [], Counter(dict.fromkeys(VERDICTS, 0))
    batches = [*parts(task.some(args.problems, "train", args.draws), BATCH)]
    for number, left in enumerate(tqdm(batches, unit="batch", desc="answers", disable=None)):
        for attempt in range(args.tries):
            how = Asking("think", args.template, args.longest, args.temperature, args.top_p,
                         args.draws * 1_000_003 + number * args.tries + attempt)
            replies = ask(run.model, run.tokenizer, [p.question for p in left], how)
            found = [(p, r, verdict(task, p, r)) for p, r in zip(left, replies, strict=True)]
            counts.update(name for _, _, name in found)
            kept += [conversation(p._replace(thought=r.thought, answer=r.answer), think=True)
                     for p, r, name in found if name == "kept"]
            left = [p for p, _, name in found if name != "kept"]
    without = round(len(kept) * args.direct / (1 - args.direct))
    kept += [conversation(problem, think=False)
             for problem in task.some(without, "train", args.draws + 1)]
    random.Random(args.draws).shuffle(kept)
    return kept, counts


def write_corpus(args: CorpusArgs) -> None:
    """Make the corpus, write it, whole or not at all, and print the counts.

    Raises `ValueError` if no reply was good: there would be nothing to learn from.
    """
    check_writable("corpus", args.corpus)
    conversations, counts = sift(args)
    kept, wrong, malformed, other_language = counts.values()
    if not kept:
        raise ValueError(f"teacher = {args.teacher!r} is not valid: none of {counts.total()} "
                         f"replies was kept ({wrong} wrong, {malformed} malformed)")
    path = Path(args.corpus)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dict(messages=messages), ensure_ascii=False) + "\n"
                   for messages in conversations)
    write_whole(counts_of(path), sealed(dict(
        counts, conversations=len(conversations), teacher=args.teacher, task=args.about,
        sha256=hashlib.sha256(text.encode()).hexdigest())))
    write_whole(path, text)
    print(f"corpus  {kept} of {counts.total()} replies kept: {wrong} wrong, {malformed} malformed "
          f"or too long, {other_language} in another language; {args.corpus}", flush=True)


def counts_of(corpus: Path) -> Path:
    """Return the file beside a corpus that has the counts."""
    return corpus.with_name(corpus.name + ".json")


def check_corpus(path: Path) -> None:
    """Raise `ValueError` if a corpus is not the one that was written; CORPUS.json has its hash.

    A corpus of an earlier version has none there, and one from elsewhere no such file.
    """
    known = {*VERDICTS, "conversations", "teacher", "task"}
    if counts_of(path).exists():
        sha256 = read_sealed(counts_of(path), known.__contains__).get("sha256")
        if sha256 not in (None, digest(path)):
            raise ValueError(f"{path} was changed: its SHA-256 is not the one in {counts_of(path)};"
                             " an edited corpus is trained on with minids.sft --data jsonl:FILE")


def main() -> None:
    alone("distill")
    given, for_student = parse("minids.distill", __doc__, CorpusArgs, SftArgs)
    args = CorpusArgs(**given)
    if "data" in for_student:
        raise ValueError(f"data = {for_student['data']!r} is not valid here: the corpus is "
                         "--corpus")
    student = None
    if for_student.get("from_run") or for_student.get("resume"):
        student = settings("sft", SftArgs, for_student | dict(data=f"jsonl:{args.corpus}",
                                                              task=args.about))
    prepare_cpu(for_student.get("threads", 0))
    if Path(args.corpus).exists():
        if student is None:
            raise ValueError(f"corpus = {args.corpus!r} is not valid: the file exists already")
        check_corpus(Path(args.corpus))
    else:
        write_corpus(args)
    try:
        if student is not None:
            sft(student, "-distilled")
    except Stopped as stopped:
        raise Stopped(stopped.number, [*sys.argv[1:], "--resume"]) from None


if __name__ == "__main__":
    run_program("minids.distill", main, lasting=True)
