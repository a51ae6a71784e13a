"""Tasks whose answers a rule can check (R1, arXiv 2501.12948, section 2.2.2).

    calculator:6      3*7+5-2*4..., six operations from left to right, each result modulo 10
    countdown:3       4,7,2>30: reach the target with each of three numbers once
    gsm8k             8,792 word problems from the hub (needs a network and `datasets`)
    jsonl:PATH        your own: lines with "question" and "answer"

A seed generates an endless stream of problems. A hash of its question decides whether a problem
belongs to training or is held out, so that no seed ever trains on a held-out problem.
"""

import hashlib
import operator
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minids.base.fields import nearest
from minids.base.files import read_jsonl
from minids.text.answers import same_answer
from minids.text.expressions import parse_expression
from minids.text.hub import check_network

TASKS = "calculator[:OPERATIONS], countdown[:NUMBERS], gsm8k or jsonl:PATH"
HELD_OUT = 10  # one question in this many, by its hash
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def held_out(key: str, one_in: int) -> bool:
    """Return whether the hash of a path, text or question holds it out, as one in `one_in`."""
    raw = key.encode("utf-8", "surrogatepass")  # JSON can hold lone surrogates
    return int(hashlib.sha256(raw).hexdigest()[:8], 16) % one_in == 0


class Problem(NamedTuple):
    """A question, its solution in steps, and a right answer."""

    question: str
    thought: str
    answer: str


def plain_text(question: str, thought: str | None, answer: str) -> str:
    """Return a worked example as a document, or without the thought if that is None."""
    return f"{question}: {thought} = {answer}" if thought is not None else f"{question} = {answer}"


class Task:
    """Problems of one kind; a subclass defines `draw`, and `right` if answers are not unique.

    kind: its name in a task's specification, such as the "calculator" of "calculator:6"
    level: how hard its problems are, out of `levels`; each kind says what it counts
    name: the specification that `open_task` turns into the same task
    worked: share of a base model's examples that are worked out in steps
    """

    kind, levels, level, worked = "", range(1), 0, 0.4

    def __init__(self, level: int | None = None):
        if level is not None:
            self.level = level
        self.name = f"{self.kind}:{self.level}"
        if self.level not in self.levels:
            raise ValueError(f"the level must be from {self.levels[0]} to {self.levels[-1]}")

    def draw(self, rng: random.Random) -> Problem:
        """Return one problem, from either side of the split."""
        raise NotImplementedError

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield problems of a split ("train" or "held-out") without end, drawn by the seed."""
        rng = random.Random(f"{self.name} {split} {seed}")
        while True:
            problem = self.draw(rng)
            if held_out(problem.question, HELD_OUT) == (split == "held-out"):
                yield problem

    def some(self, count: int, split: str, seed: int) -> list[Problem]:
        """Return the first `count` of `problems`."""
        return list(islice(self.problems(split, seed), count))

    def right(self, problem: Problem, answer: str) -> bool:
        """Return whether `answer` solves the problem."""
        return answer.strip() == problem.answer


class Calculator(Task):
    """A pocket calculator without precedence: from left to right, every result modulo 10.

    No factor is 0 or 5, so that the last operations alone do not reveal the result: the best guess
    from the last two is right in one case out of six. level: operations
    """

    kind, levels, level = "calculator", range(1, 33), 6
    DIGITS = {"+": "0123456789", "-": "0123456789", "*": "12346789"}

    def draw(self, rng: random.Random) -> Problem:
        """Return a problem whose thought states the result of each operation: 3*7=1+5=6."""
        value = rng.randrange(10)
        question = thought = str(value)
        for _ in range(self.level):
            sign = rng.choice("+-*")
            digit = rng.choice(self.DIGITS[sign])
            value = SIGNS[sign](value, int(digit)) % 10
            question += sign + digit
            thought += f"{sign}{digit}={value}"
        return Problem(question, thought, str(value))


class Countdown(Task):
    """Reach a target with +, - and *, using each number once: 4,7,2>30 has the answer (4*7)+2.

    The thought tries chains of operations until one reaches the target:
    7-2=5*4=20;4*7=28+2=30. level: numbers
    """

    kind, levels, level, worked = "countdown", range(2, 7), 3, 0.8
    TRIES, LARGEST = 4, 99

    def draw(self, rng: random.Random) -> Problem:
        """Return a problem whose thought tries up to three wrong chains before the right one."""
        numbers = [rng.randrange(1, 10) for _ in range(self.level)]
        chains = [self.chain(numbers, rng) for _ in range(rng.randrange(1, self.TRIES + 1))]
        tape, answer, target = chains.pop()
        wrong = [work for work, _, end in chains if end != target]
        order = rng.sample(numbers, len(numbers))
        question = f"{','.join(map(str, order))}>{target}"
        return Problem(question, ";".join([*wrong, tape]), answer)

    def chain(self, numbers: list[int], rng: random.Random) -> tuple[str, str, int]:
        """Return a random chain: its tape 4*7=28+2=30, expression (4*7)+2, and result 30."""
        while True:
            first, *rest = rng.sample(numbers, len(numbers))
            tape, text, value, results = str(first), str(first), first, []
            for number in rest:
                sign = rng.choice("+-*")
                value = SIGNS[sign](value, number)
                tape += f"{sign}{number}={value}"
                text = f"{f'({text})' if results else text}{sign}{number}"
                results.append(value)
            if all(0 <= result <= self.LARGEST for result in results) and value > 0:
                return tape, text, value

    def right(self, problem: Problem, answer: str) -> bool:
        """Accept any expression that equals the target and uses each number once."""
        numbers, _, target = problem.question.partition(">")
        found = parse_expression(answer)
        return (found is not None and found[0] == int(target)
                and sorted(found[1]) == sorted(map(int, numbers.split(","))))


class Questions(Task):
    """Questions in words whose answer is a number or a word; `ValueError` for a side without any.

    train, test: (question, solution) of each side of the split; as in GSM8K, a solution may be
        worked out and end in "#### 42"
    """

    kind = "questions"

    def __init__(self, name: str, train: list[tuple[str, str]], test: list[tuple[str, str]]):
        super().__init__()
        self.name, self.sides = name, {"train": train, "held-out": test}
        for side, rows in self.sides.items():
            if not rows:
                raise ValueError(f"it has no {side} questions")

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield all questions of a side in a random order, then again in another."""
        rng = random.Random(f"{self.name} {split} {seed}")
        while True:
            rows = self.sides[split]
            for question, solution in rng.sample(rows, len(rows)):
                thought, _, answer = solution.rpartition("####")
                yield Problem(question, thought.strip(), answer.strip())

    def right(self, problem: Problem, answer: str) -> bool:
        """Compare what both state, exactly (`minids.text.answers`)."""
        return same_answer(problem.answer, answer)


def open_task(spec: str) -> Task:
    """Return the task that `spec` names (see above); raises `ValueError` for any other."""
    kind, _, rest = spec.partition(":")
    try:
        for known in (Calculator, Countdown):
            if kind == known.kind and (not rest or rest.isdecimal()):
                return known(int(rest) if rest else None)
        if spec == "gsm8k":  # Cobbe et al., arXiv 2110.14168; split as published
            check_network()
            from datasets import load_dataset  # nothing else needs it
            sides = load_dataset("openai/gsm8k", "main")
            return Questions(spec, *([(row["question"], row["answer"]) for row in sides[side]]
                                     for side in ("train", "test")))
        if kind == "jsonl" and rest:
            return Questions(spec, *read_questions(Path(rest)))
        valid = ["calculator", "countdown", "gsm8k", "jsonl"]
        raise ValueError(f"{nearest(kind, valid)}valid are {TASKS}")
    except ValueError as error:
        raise ValueError(f"task = {spec!r} is not valid: {error}") from None


def read_questions(path: Path) -> tuple[list, list]:
    """Return a file's lines {"question": .., "answer": ..} as pairs, split by hash."""
    sides: tuple[list, list] = [], []
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    for number, row in read_jsonl(path):
        match row:
            case {"question": str(question), "answer": str(answer)}:
                sides[held_out(question, HELD_OUT)].append((question, answer))
            case _:
                raise ValueError(f"{path} line {number} must be an object with the strings "
                                 '"question" and "answer"')
    return sides
