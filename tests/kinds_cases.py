"""Make the instances of `kinds_table`: what they begin with, what disturbs them, what is right."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kinds import Case, Ended, metrics_of, run, start, wait, works

SMALL = "--threads 1 --keep-last 1"
TRAIN = f"train --preset nano --data text:texts --tokenizer tok --batch-size 2 --seq-len 32 " \
        f"--eval-tokens 64 {SMALL}"
ANSWERS = f"{SMALL} --eval-problems 2 --max-new-tokens 4"
SFT = f"sft --from nano --examples 16 --batch-size 2 {ANSWERS}"
TALK = f"sft --from nano --steps 1 --batch-size 1 {SMALL} --out other --data jsonl:talk.jsonl"
GRPO = f"grpo --from sft --questions 2 --group 2 --updates 1 {ANSWERS}"
HOME = (
    "tokenizer --out tok --data text:texts --vocab-size 300",
    f"{TRAIN} --out nano --steps 3",
    f"{SFT} --out sft --steps 3",
    "hf --run nano --out hf",
)


def texts() -> list[str]:
    """Return texts with letters of several scripts."""
    words, dice = "the cat sat on a mat and héllo wörld 日本 ran far".split(), random.Random(0)
    return [" ".join(dice.choices(words, k=200)) for _ in range(30)]


def talk(*more: dict, **answer) -> str:
    """Return a line of a file of conversations: a question, its answer, and `more` messages."""
    messages = [{"role": "user", "content": "1+2"},
                {"role": "assistant", "content": "3"} | answer, *more]
    return json.dumps(dict(messages=messages), ensure_ascii=False) + "\n"


def ask(question: str = "1+2", answer: str = "3") -> str:
    """Return a line of a file of questions."""
    return json.dumps(dict(question=question, answer=answer), ensure_ascii=False) + "\n"


QUESTIONS = "".join(ask(f"{i}+1", str(i + 1)) for i in range(40))


def write_inputs(folder: Path) -> None:
    """Write the files of conversations and questions."""
    (folder / "talk.jsonl").write_text(talk() * 4, "utf-8")
    (folder / "ask.jsonl").write_text(QUESTIONS, "utf-8")


def put(name: str, content: str | bytes, times: int = 1) -> Callable[[], None]:
    """Return a change that writes a file."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda: (Path(name).parent.mkdir(exist_ok=True, parents=True),
                    Path(name).write_bytes(data * times))


def edit(name: str, **values) -> Callable[[], None]:
    """Return a change of a JSON file: `a__b=1` sets the key b below a; ... removes it."""
    def change() -> None:
        found = json.loads(Path(name).read_text("utf-8"))
        for path, value in values.items():
            *above, last = path.split("__")
            at = found
            for key in above:
                at = at[key]
            at.pop(last, None) if value is ... else at.update({last: value})
        Path(name).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return change


def lines(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Callable[[], None]:
    """Return a change of a file's lines."""
    return lambda: Path(name).write_bytes(
        b"".join(change(Path(name).read_bytes().splitlines(keepends=True))))


def absent(*names: str) -> Callable[[], None]:
    """Return a hook: these packages are not installed."""
    return lambda: sys.modules.update(dict.fromkeys(names))


def send(number: int, at: str, signum: int = signal.SIGKILL) -> Callable[[], None]:
    """Return a hook: the program gets a signal before its n-th step or file operation."""
    def hook() -> None:
        calls = []

        def audit(event: str, args: tuple) -> None:
            if event == at or (at, event) == ("step", "open") and isinstance(args[1], str) and (
                    str(args[0]).endswith("metrics.jsonl") and args[1][0] == "a"):
                calls.append(1)
                if len(calls) == number:
                    os.kill(os.getpid(), signum)
        sys.addaudithook(audit)
    return hook


def killed(words: str, at: str, number: int) -> Callable[[], None]:
    """Return a change: a program that is killed before its n-th step or file operation."""
    return lambda: run(words, Path.cwd(), send(number, at))


def as_unbroken(words: str, out: str) -> Callable[[Ended], bool]:
    """Return the check that a run ended with the metrics of one that was never killed."""
    def check(end: Ended) -> bool:
        made = end.folder / out
        found = metrics_of(made)
        shutil.rmtree(made)
        return end.status == 0 and not run(words, end.folder).status and found == metrics_of(made)
    return check


def resumed(steps: int, name: str, words: str, listed: bool) -> Case:
    """Return the case of a run that is killed at a step, and goes on."""
    words += " --out made --steps 4 --eval-every 0"
    return Case("resumed", f"{words} --resume", as_unbroken(words, "made"),
                (killed(words, "step", steps),), listed)


def again(words: str, more: str, at: str, number: int, listed: bool = False) -> Case:
    """Return the case of a program that is killed at a file operation, and started again."""
    return Case("stuck", words + more, works(), (killed(words, at, number),), listed)


def beside(words: str) -> Callable[[], None]:
    """Return a change: a program that goes on for long has begun in the folder "made"."""
    def change() -> None:
        child = start(f"{words} --steps 100000 --out made --eval-every 0", Path.cwd(), lambda:
                      signal.alarm(40))
        while not Path("made/metrics.jsonl").exists():
            time.sleep(0.05)
        Path("child").write_text(str(child), "utf-8")
    return change


def refused_beside(end: Ended) -> bool:
    """Return whether a second program was refused in one line; ends the first."""
    child = int((end.folder / "child").read_text("utf-8"))
    os.kill(child, signal.SIGKILL)
    wait(child)
    return end.status == 2 and end.err.count("\n") == 1 and "made" in end.err


def signalled(number: int, status: int, words: str, listed: bool = False) -> Case:
    """Return the case of a run that a signal stops at its second step: the steps are saved."""
    def check(end: Ended) -> bool:
        return end.status == status and any((end.folder / "made/checkpoints").glob("step_*[1-9]"))
    return Case("signals", f"{words} --out made --steps 9 --save-every 9", check, (), listed,
                send(2, "step", number))


def deaf(words: str, names: tuple[str, ...], listed: bool = False) -> Case:
    """Return the case of a program whose output nobody reads."""
    def hook() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        for name in names:
            os.dup2(writer, {"out": 1, "err": 2}[name])
    return Case("signals", f"{words} --out made --steps 3", lambda end: end.status == 0 and len(
        metrics_of(end.folder / "made")) == 3, (), listed, hook)


def quoted(name: str, words: str, listed: bool = False) -> Case:
    """Return the case of a folder whose name a shell would read as something else."""
    def check(end: Ended) -> bool:
        said = [line for line in end.out.splitlines() if line.startswith(("next", "stopped"))]
        return end.status == 0 and all(f"runs/{name}" in shlex.split(line) for line in said[-1:])
    return Case("quoting", f"{words} --steps 1 --out {shlex.quote(f'runs/{name}')}", check, (),
                listed)


def paid(expected: str, reply: str, right: bool, listed: bool = False) -> Case:
    """Return the case of a reward: what an answer to a question of one's own is paid."""
    def hook() -> None:
        try:
            from minids.text.tasks import open_task
        except ImportError:
            from minids.tasks import open_task
        task = open_task("jsonl:ask.jsonl")
        problem = next(task.problems("train", 0))
        os._exit(40 + bool(task.right(problem, reply)))
    rows = "".join(ask(f"question {i}", expected) for i in range(60))
    return Case("rewards", f"solve --run {expected}~{reply}", lambda end: end.status == 40 + right,
                (put("ask.jsonl", rows),), listed, hook)


def sampled(value: float, temperature: float, listed: bool = False) -> Case:
    """Return the case of logits that hold a value that is no number: an error, not a draw."""
    def hook() -> None:
        import torch

        from minids import ModelArgs, Transformer
        from minids.generate import generate
        model = Transformer(ModelArgs.preset("nano"))
        model.head.register_forward_hook(lambda *given: torch.full_like(given[-1], value))
        try:
            generate(model, [[1, 2], [3]], 2, temperature=temperature)
        except (ValueError, FloatingPointError):
            os._exit(40)
        os._exit(41)
    return Case("temperatures", f"generate logits {value} at {temperature}",
                lambda end: end.status == 40, (), listed, hook)


def tables(make: str, words: str, right, listed: bool = False) -> Case:
    """Return the case of a parquet file of texts, with the column that `make` says."""
    def change() -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        found = texts() * 3
        pq.write_table(eval(make, dict(pa=pa, found=found)), "rows.parquet")
    return Case("parquet", words, right, (change,), listed)


def located(words: str, listed: bool = False) -> Case:
    """Return the case of a program under an ASCII locale, with text that is not ASCII."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def change() -> None:
        done = subprocess.run([sys.executable, "-m", *shlex.split(f"minids.{words}")],
                              env=os.environ | plain, capture_output=True)
        Path("status").write_text(f"{done.returncode} {done.stderr[-300:]}", "utf-8")
    return Case("locale", "costs", lambda end: (end.folder / "status").read_text("utf-8")[0] == "0",
                (change,), listed)
