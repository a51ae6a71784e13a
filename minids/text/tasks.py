"""Tasks whose answers a rule can check, and the rewards for them (R1, arXiv 2501.12948, 2.2.2).

    calculator:6      3*7+5-2*4..., six operations from left to right, each result modulo 10
    countdown:3       4,7,2>30: reach the target with each of three numbers once
    gsm8k             8,792 questions in words, from the hub (needs a network and `datasets`)
    jsonl:PATH        your own: lines with "question" and "answer"

Problems are drawn from a seed, without end. Whether a problem belongs to training or is held out
is decided by a hash of its question, so that no held-out problem is ever seen, whatever the seed.

A reward is a pure function of a problem and a reply: accuracy and format apart, by rule, nothing
learnt. Answers are read, never run: `parse_expression` knows four operations and brackets, takes
so many characters, digits and levels and no more, and refuses the rest, so that a hostile answer
costs microseconds and earns 0.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minids.base.fields import nearest
from minids.base.files import read_jsonl
from minids.text.expressions import last_number, parse_expression
from minids.text.splits import held_out

HELD_OUT = 10  # one question in this many, by its hash


class Problem(NamedTuple):
    """One problem.

    question: what is asked; thought: it worked out in steps; answer: a right answer
    """

    question: str
    thought: str
    answer: str


def plain_text(question: str, thought: str | None, answer: str) -> str:
    """A worked example as a document, or one with its answer only."""
    return f"{question}: {thought} = {answer}" if thought is not None else f"{question} = {answer}"


class Task:
    """Problems of one kind. A kind has a name, `draw`, and `right` where answers are not unique.

    level: how hard; what it counts says the kind
    worked: share of the examples that a base model reads that are worked out in steps
    """

    kind, levels, level, worked = "", range(1), 0, 0.4

    def __init__(self, level: int | None = None):
        if level is not None:
            self.level = level
        if self.level not in self.levels:
            raise ValueError(f"task = '{self.kind}:{self.level}' is not valid: the level must be "
                             f"from {self.levels[0]} to {self.levels[-1]}")

    @property
    def name(self) -> str:
        """What `open_task` makes the same task from."""
        return f"{self.kind}:{self.level}"

    def draw(self, rng: random.Random) -> Problem:
        """One problem, of either side of the split."""
        raise NotImplementedError

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Problems without end.

        split: "train" or "held-out"; seed: decides which, and their order
        """
        rng = random.Random(f"{self.name} {split} {seed}")
        while True:
            problem = self.draw(rng)
            if held_out(problem.question.encode(), HELD_OUT) == (split == "held-out"):
                yield problem

    def some(self, count: int, split: str, seed: int) -> list[Problem]:
        """The first `count` of `problems`."""
        return list(islice(self.problems(split, seed), count))

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether this answer is right."""
        return answer.strip() == problem.answer


class Calculator(Task):
    """A pocket calculator without precedence: from left to right, and every result modulo 10.

    A product is by neither 0 nor 5, so that the last operations alone do not tell the result: the
    best guess from the last two is right in one case of six. level: operations
    """

    kind, levels, level = "calculator", range(1, 33), 6
    DIGITS = {"+": "0123456789", "-": "0123456789", "*": "12346789"}

    def draw(self, rng: random.Random) -> Problem:
        """The thought restates each operation with its result: 3*7=1+5=6."""
        value = rng.randrange(10)
        question = thought = str(value)
        for _ in range(self.level):
            sign = rng.choice("+-*")
            digit = rng.choice(self.DIGITS[sign])
            value = apply(sign, value, int(digit)) % 10
            question += sign + digit
            thought += f"{sign}{digit}={value}"
        return Problem(question, thought, str(value))


class Countdown(Task):
    """Reach a target with each of some numbers once, by +, - and *: 4,7,2>30 is (4*7)+2.

    The thought tries chains, a result after each operation, until one reaches the target:
    7-2=5*4=20;4*7=28+2=30. level: numbers
    """

    kind, levels, level, worked = "countdown", range(2, 7), 3, 0.8
    TRIES, LARGEST = 4, 99

    def draw(self, rng: random.Random) -> Problem:
        """A right chain at a random place among wrong ones."""
        numbers = [rng.randrange(1, 10) for _ in range(self.level)]
        chains = [self.chain(numbers, rng) for _ in range(rng.randrange(1, self.TRIES + 1))]
        steps, target = chains.pop()
        wrong = [work for work, end in chains if end != target]
        order = rng.sample(numbers, len(numbers))
        question = f"{','.join(map(str, order))}>{target}"
        return Problem(question, ";".join(map(running, [*wrong, steps])), bracketed(steps))

    def chain(self, numbers: list[int], rng: random.Random) -> tuple[list, int]:
        """The numbers in some order with operations between: [(sign, number, result), ..]; every
        result is from 0 to LARGEST. The second thing is the last result."""
        while True:
            first, *rest = rng.sample(numbers, len(numbers))
            value, steps = first, [("", first, first)]
            for number in rest:
                sign = rng.choice("+-*")
                value = apply(sign, value, number)
                steps.append((sign, number, value))
            if all(0 <= result <= self.LARGEST for _, _, result in steps) and value > 0:
                return steps, value

    def right(self, problem: Problem, answer: str) -> bool:
        """Any expression counts that has the target's value and each number once."""
        numbers, _, target = problem.question.partition(">")
        found = parse_expression(answer)
        return (found is not None and found[0] == int(target)
                and sorted(found[1]) == sorted(map(int, numbers.split(","))))


class Questions(Task):
    """Questions in words with a number, or a word, for an answer.

    rows: (question, answer) of each side of the split; an answer may end in "#### 42", after the
    way to it, as GSM8K's do
    """

    kind = "questions"

    def __init__(self, name: str, train: list[tuple[str, str]], test: list[tuple[str, str]]):
        super().__init__()
        self._name, self.sides = name, {"train": train, "held-out": test}
        for side, rows in self.sides.items():
            if not rows:
                raise ValueError(f"task = {name!r} is not valid: it has no {side} questions")

    @property
    def name(self) -> str:
        """As it was asked for."""
        return self._name

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """All questions of a side in a random order, then again in another."""
        rng = random.Random(f"{self.name} {split} {seed}")
        while True:
            rows = self.sides[split]
            for question, solution in rng.sample(rows, len(rows)):
                thought, _, answer = solution.rpartition("####")
                yield Problem(question, thought.strip(), answer.strip())

    def right(self, problem: Problem, answer: str) -> bool:
        """The last number of the answer, boxed or not, is the right one; or the words are."""
        expected = last_number(problem.answer)
        if expected is None:
            return answer.strip().casefold() == problem.answer.casefold()
        return last_number(answer) == expected


def open_task(spec: str) -> Task:
    """The task that `spec` names, see above; `ValueError` naming what is valid."""
    kind, _, rest = spec.partition(":")
    for known in (Calculator, Countdown):
        if kind == known.kind and (not rest or rest.isdecimal()):
            return known(int(rest) if rest else None)
    if spec == "gsm8k":
        return open_gsm8k()
    if kind == "jsonl" and rest:
        return open_questions(spec, Path(rest))
    valid = ["calculator", "countdown", "gsm8k", "jsonl"]
    raise ValueError(f"task = {spec!r} is not valid: {nearest(kind, valid)}valid are "
                     "calculator[:OPERATIONS], countdown[:NUMBERS], gsm8k and jsonl:PATH")


def open_gsm8k() -> Questions:
    """GSM8K (Cobbe et al., arXiv 2110.14168) from the hub, split as published."""
    from datasets import load_dataset  # on first use: whoever calculates does without
    sides = load_dataset("openai/gsm8k", "main")
    train, test = ([(row["question"], row["answer"]) for row in sides[side]]
                   for side in ("train", "test"))
    return Questions("gsm8k", train, test)


def open_questions(spec: str, path: Path) -> Questions:
    """Lines {"question": .., "answer": ..}, split by hash; `ValueError` naming a wrong line."""
    sides: tuple[list, list] = [], []
    if not path.is_file():
        raise ValueError(f"task = {spec!r} is not valid: {path} is no file")
    try:
        for number, row in read_jsonl(path):
            match row:
                case {"question": str(question), "answer": str(answer)}:
                    sides[held_out(question.encode(), HELD_OUT)].append((question, answer))
                case _:
                    raise ValueError(f"{path} line {number} is no object with the texts "
                                     '"question" and "answer"')
    except ValueError as error:
        raise ValueError(f"task = {spec!r} is not valid: {error}") from None
    return Questions(spec, *sides)


def apply(sign: str, a: int, b: int) -> int:
    """a + b, a - b or a * b"""
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def running(steps: list) -> str:
    """A chain as a pocket calculator's tape: 4*7=28+2=30"""
    first, *rest = steps
    return f"{first[1]}" + "".join(f"{sign}{number}={result}" for sign, number, result in rest)


def bracketed(steps: list) -> str:
    """A chain as an expression: (4*7)+2"""
    text = str(steps[0][1])
    for i, (sign, number, _) in enumerate(steps[1:]):
        text = f"{text if i == 0 else f'({text})'}{sign}{number}"
    return text
