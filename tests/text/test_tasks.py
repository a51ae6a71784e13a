"""Problems that are right, a split that leaks nothing, answers marked by rule.

A wrong variant of what a check looks at fails the same check.
"""

import json
import operator
import random
import re
import time
from collections import Counter, defaultdict

import pytest

from minids.rl.rewards import accuracy
from minids.text.chat import Reply
from minids.text.expressions import parse_expression
from minids.text.tasks import (
    HELD_OUT,
    Calculator,
    Countdown,
    Problem,
    Questions,
    Task,
    held_out,
    open_task,
)

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def drawn(task: Task, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [task.draw(rng) for _ in range(count)]


def right_tape(problem: Problem, level: int) -> bool:
    """Return whether every step and the answer are the last digits of exact results."""
    steps = re.findall(r"([-+*])(\d)=(\d)", problem.thought)
    exact, question, tape = int(problem.question[0]), problem.question[0], problem.question[0]
    for sign, digit, _ in steps:
        exact = SIGNS[sign](exact, int(digit))
        question += sign + digit
        tape += f"{sign}{digit}={exact % 10}"
    return (len(steps) == level and question == problem.question and tape == problem.thought
            and problem.answer == str(exact % 10))


class Precedence(Calculator):
    """Wrong: multiplies before it adds."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(answer=str(eval(problem.question) % 10))


class Slip(Calculator):
    """Wrong: an error in the first step, although the answer is right."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(thought=re.sub(r"=\d", "=0", problem.thought, count=1))


class OneMore(Calculator):
    """Wrong: one operation more than the level says."""

    def draw(self, rng: random.Random) -> Problem:
        return Calculator(self.level + 1).draw(rng)


@pytest.mark.parametrize("level", [1, 2, 6, 32])
def test_the_calculator_counts_from_left_to_right(level):
    assert all(right_tape(p, level) for p in drawn(Calculator(level), 500))


@pytest.mark.parametrize("wrong", [Precedence, Slip, OneMore])
def test_a_wrong_calculator_is_caught(wrong):
    assert not all(right_tape(p, 6) for p in drawn(wrong(6), 500))


class AnyProduct(Calculator):
    """Wrong: factors 0 and 5, whose products have one or two possible last digits."""

    DIGITS = dict.fromkeys("+-*", "0123456789")


def best_guess(task: Task) -> float:
    """Return how often the answer is the most frequent one after the same last two operations.

    Half of the draws say which that is, the other half whether it is right: on the same draws,
    some 30 for each of 784 endings, a guess is by 0.06 too good.
    """
    seen, draws = defaultdict(Counter), drawn(task, 50_000)
    for p in draws[::2]:
        seen[p.question[-4:]][p.answer] += 1
    guess = {end: answers.most_common(1)[0][0] for end, answers in seen.items()}
    return sum(guess.get(p.question[-4:]) == p.answer for p in draws[1::2]) / len(draws[1::2])


def test_the_last_two_operations_do_not_tell_the_result():
    # Standard deviation 0.003. A guess at random is right in 0.1.
    assert 0.1 < best_guess(Calculator(6)) < 0.2 < best_guess(AnyProduct(6))
    assert not any(re.search(r"\*[05]", p.question) for p in drawn(Calculator(6), 5000))
    firsts = {re.match(r"\d+", p.question)[0] for p in drawn(Calculator(6), 500)}
    assert firsts == set("0123456789")


def split_up(problem: Problem) -> tuple[list[int], int]:
    """Return the sorted numbers and the target."""
    numbers, target = problem.question.split(">")
    return sorted(map(int, numbers.split(","))), int(target)


def right_answer(problem: Problem) -> bool:
    """Return whether Python evaluates the answer to the target, with each number used once."""
    numbers, target = split_up(problem)
    assert re.fullmatch(r"[\d()*+-]+", problem.answer)
    return (eval(problem.answer) == target
            and sorted(map(int, re.findall(r"\d+", problem.answer))) == numbers)


def right_chains(problem: Problem) -> bool:
    """Return whether each chain is correct arithmetic with each number once, and only the last one
    reaches the target."""
    numbers, target = split_up(problem)
    ends = []
    for chain in problem.thought.split(";"):
        first, *steps = re.findall(r"(^|[-+*])(\d+)(?:=(\d+))?", chain)
        value, tape = int(first[1]), first[1]
        for sign, number, _ in steps:
            value = SIGNS[sign](value, int(number))
            tape += f"{sign}{number}={value}"
            if not 0 <= value <= Countdown.LARGEST:
                return False
        if tape != chain or sorted(int(number) for _, number, _ in (first, *steps)) != numbers:
            return False
        ends.append(value)
    return ends[-1] == target > 0 and target not in ends[:-1]


class Bare(Countdown):
    """Wrong: an answer without its brackets."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(answer=re.sub("[()]", "", problem.answer))


class Backwards(Countdown):
    """Wrong: continues after the chain that reaches the target."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(thought=";".join(problem.thought.split(";")[::-1]))


class Miscounting(Countdown):
    """Wrong: one number in a chain is replaced by another."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(thought=re.sub(r"\+\d=", "+3=", problem.thought, count=1))


@pytest.mark.parametrize("level", Countdown.levels)
def test_countdown_problems_are_solved_rightly(level):
    task = Countdown(level)
    problems = drawn(task, 400)
    assert all(right_answer(p) and right_chains(p) for p in problems)
    assert all(len(split_up(p)[0]) == level and task.right(p, p.answer) for p in problems)
    assert {p.thought.count(";") for p in problems} == {0, 1, 2, 3}  # wrong chains before


def test_wrong_countdown_problems_are_caught():
    wrong = drawn(Bare(3), 400)
    assert not all(map(right_answer, wrong)) and all(map(right_chains, wrong))
    assert not all(Countdown(3).right(p, p.answer) for p in wrong)
    for kind in (Backwards, Miscounting):
        wrong = drawn(kind(3), 400)
        assert all(map(right_answer, wrong)) and not all(map(right_chains, wrong))


ACCEPTED = {
    "4,7,2>30": ["(4*7)+2", "4*7+2", "2+7*4", " 2 + ( 7 * 4 ) ", "((2)+((4*7)))", "--2+4*7",
                 "2--4*7", "4*7+2   "],
    "8,2,6>24": ["8/2*6", "6/(2/8)", "(8*6)/2"],  # 2/8 is no whole number
    "5,5,1>24": ["5*5-1", "-1+5*5"]}
REFUSED = {
    "4,7,2>30": ["4*7+4-2", "4*7+1+1", "30", "4*7-2", "4*7", "2*4*7", "4*7+2=30", "= 4*7+2",
                 "it is 4*7+2", "4*7+2.", "\\boxed{4*7+2}", "4×7+2", "4*7+2+0", "4*7+2+4-4",
                 "(4*7+2", "4*7+2)", "4*7;2", "", " ", "(4*7)2", "4.0*7+2", "2*15"],
    "4,7,2>28": ["4*7"], "4,7,2>45": ["47-2"], "5,5,1>4": ["5-1"]}


def verdicts(task: Countdown, cases: dict) -> list[bool]:
    return [task.right(Problem(question, "", "?"), answer)
            for question, answers in cases.items() for answer in answers]


class ByValue(Countdown):
    """Wrong: accepts any numbers."""

    def right(self, problem: Problem, answer: str) -> bool:
        found = parse_expression(answer)
        return found is not None and found[0] == split_up(problem)[1]


class BySet(Countdown):
    """Wrong: accepts a number used any number of times."""

    def right(self, problem: Problem, answer: str) -> bool:
        found = parse_expression(answer)
        return (found is not None and found[0] == split_up(problem)[1]
                and set(found[1]) == set(split_up(problem)[0]))


class Literal(Countdown):
    """Wrong: accepts only the task's own answer."""

    right = Task.right


def test_any_right_expression_counts_and_no_other():
    assert all(verdicts(Countdown(), ACCEPTED)) and not any(verdicts(Countdown(), REFUSED))
    assert any(verdicts(ByValue(), REFUSED)) and any(verdicts(BySet(), REFUSED))
    assert not all(verdicts(Literal(), ACCEPTED))


class Unhashed:
    """Wrong: only the seeds distinguish the two sides."""

    def problems(self, split: str, seed: int):
        rng = random.Random(f"{self.name} {split} {seed}")
        while True:
            yield self.draw(rng)


class UnhashedCalculator(Unhashed, Calculator):
    pass


class UnhashedCountdown(Unhashed, Countdown):
    pass


def questions(task: Task, split: str, seeds: range) -> list[str]:
    return [p.question for seed in seeds for p in task.some(1000, split, seed)]


@pytest.mark.parametrize("task, wrong", [(Calculator(2), UnhashedCalculator(2)),
                                         (Countdown(2), UnhashedCountdown(2)),
                                         pytest.param(Countdown(3), UnhashedCountdown(3),
                                                      marks=pytest.mark.slow)],
                         ids=lambda task: task.name)
def test_no_held_out_question_is_trained_on_whatever_the_seed(task, wrong):
    train, kept = questions(task, "train", range(4)), questions(task, "held-out", range(3))
    assert len(set(train)) < len(train)  # questions do repeat
    assert set(train).isdisjoint(kept)
    assert not set(questions(wrong, "train", range(4))).isdisjoint(
        questions(wrong, "held-out", range(3)))


@pytest.mark.parametrize("name", ["calculator:6", "countdown:3"])
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_the_seed_decides_the_problems(name, split):
    problems = open_task(name).some(50, split, 3)
    assert open_task(name).some(50, split, 3) == problems
    assert open_task(name).some(20, split, 3) == problems[:20]
    for other in (4, -3, 33):
        assert not set(open_task(name).some(50, split, other)) & set(problems)  # no shift either


def test_one_question_in_ten_is_held_out():
    asked = {p.question for p in drawn(Calculator(6), 20_000)}
    kept = [q for q in asked if held_out(q, HELD_OUT)]
    assert abs(len(kept) / len(asked) - 0.1) < 0.01  # deviation 0.002


def words(*rows: tuple[str, str]) -> Questions:
    return Questions("some", list(rows) or [("What?", "7")], [("Who?", "I")])


@pytest.mark.parametrize("solution, right, wrong", [
    ("6*7=42\n#### 42", ["42", "#### 42", "so 41+1\n#### 42", "42.", "42 apples", "$42", "042"],
     ["41", "#### 41", "42 or 43", "-42", "4 2", "4.2", "421", "", "many", "٤٢", "four"]),
    ("#### 1,234", ["1234", "1,234", "1,234.0", "$1,234.", "in all: 1234"],
     ["1", "234", "1 234", "in all 1 235: 1234", "−1234"]),
    ("#### 1234", ["1,234"], ["1.234"]),
    ("7", ["\\boxed{7}", "$\\boxed{7}$", "the answer is 7.", "7.0", "7.00", "5+2=7", " 7\n"],
     ["\\boxed{8}", "5+3=7", "−7", "7 or 8", "the answer is 8.", "7.5", "7.01", "17", "70"]),
    ("#### -3", ["-3", "it is -3.", "-3.0"], ["3", "-30"]), ("0.5", ["0.50", "0.5."], ["5"]),
    ("#### Paris", ["paris", " PARIS\n", "Paris"], ["London", "", "Paris, Texas", "#### 42"]),
    ("Straße", ["STRASSE"], ["Strase"])])
def test_the_value_counts_or_else_the_words(solution, right, wrong):
    task = words(("What?", solution))
    problem = task.some(1, "train", 0)[0]
    for answer in right:
        assert task.right(problem, answer), answer
    for answer in wrong:
        assert not task.right(problem, answer), answer


def test_a_hostile_answer_in_words_is_wrong_at_once():
    task, started = words(("What?", "7")), time.process_time()
    problem = task.some(1, "train", 0)[0]
    for text in ("7" * 10**6, "7," * 10**6, "-" * 10**6, "7." * 10**6 + "8", "1" * 5000):
        assert not task.right(problem, text)  # Python itself reads no number of 4301 digits
    assert time.process_time() - started < 0.5  # it takes a millisecond


def test_the_way_to_an_answer_is_the_thought():
    task = words(("What?", "6 * 7 = 42 #### of\n#### 42 "))
    assert task.some(1, "train", 0) == [Problem("What?", "6 * 7 = 42 #### of", "42")]
    assert task.some(1, "held-out", 0) == [Problem("Who?", "", "I")]


def test_questions_come_in_rounds_each_in_another_order():
    task = words(*((f"q{i}", str(i)) for i in range(30)))
    asked = [p.question for p in task.some(90, "train", 0)]
    rounds = [asked[i:i + 30] for i in (0, 30, 60)]
    assert all(sorted(part) == sorted(f"q{i}" for i in range(30)) for part in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert [p.question for p in task.some(90, "train", 1)] != asked
    assert {p.question for p in task.some(5, "held-out", 0)} == {"Who?"}


def test_gsm8k_is_split_as_published(monkeypatch):
    sides = {"train": [{"question": f"t{i}", "answer": f"{i} it is\n#### 1,00{i}"}
                       for i in range(5)],
             "test": [{"question": f"h{i}", "answer": f"#### {i}"} for i in range(3)]}
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args: asked.append(args) or sides)
    monkeypatch.setattr("minids.text.tasks.check_network", lambda: asked.append("network"))
    task = open_task("gsm8k")
    assert asked == ["network", ("openai/gsm8k", "main")] and task.name == "gsm8k"
    train, kept = (sorted(task.some(count, split, 0))
                   for count, split in ((5, "train"), (3, "held-out")))
    assert train == [Problem(f"t{i}", f"{i} it is", f"1,00{i}") for i in range(5)]
    assert kept == [Problem(f"h{i}", "", str(i)) for i in range(3)]
    reply = Reply(None, "that is 1003.", True, 9)
    assert [accuracy(task, p, reply) for p in train] == [0, 0, 0, 1, 0]


def rows_of(side: bool, count: int = 5) -> list[dict]:
    """Return questions that the hash puts on this side."""
    return [row for i in range(1000)
            if held_out((row := dict(question=f"Was ist {i}+1?", answer=str(i + 1)))
                        ["question"], HELD_OUT) == side][:count]


def write(path, *lines: str | dict) -> str:
    """Write the lines and return the name of the task that reads them."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                            for line in lines), "utf-8")
    return f"jsonl:{path}"


def test_your_own_questions_are_split_by_hash(tmp_path):
    train, kept = rows_of(False), rows_of(True)
    task = open_task(write(tmp_path / "own.jsonl", *kept, *train, train[0]))  # one of them twice
    for split, rows in (("train", [*train, train[0]]), ("held-out", kept)):
        found = task.some(len(rows), split, 0)
        assert Counter(found) == Counter(Problem(r["question"], "", r["answer"]) for r in rows)
        assert all(task.right(p, f"{p.answer}.0") for p in found)
    assert open_task(task.name).some(9, "train", 4) == task.some(9, "train", 4)


@pytest.mark.parametrize("spec, name", [
    ("calculator", "calculator:6"), ("calculator:2", "calculator:2"), ("countdown", "countdown:3"),
    ("calculator:32", "calculator:32"), ("countdown:6", "countdown:6")])
def test_a_name_opens_the_task(spec, name):
    assert open_task(spec).name == open_task(name).name == name


def complaint(spec: str) -> str:
    with pytest.raises(ValueError) as error:
        open_task(spec)
    message = str(error.value)
    start = f"task = {spec!r} is not valid: "
    assert message.startswith(start) and "\n" not in message
    return message.removeprefix(start)


@pytest.mark.parametrize("spec, said", [
    ("calculater", "did you mean 'calculator'? valid are calculator[:OPERATIONS], "),
    ("cuntdown:3", "did you mean 'countdown'? "), ("gsm", "did you mean 'gsm8k'? "),
    ("zzz", "valid are calculator[:OPERATIONS], countdown[:NUMBERS], gsm8k or jsonl:PATH"),
    ("", "valid are calculator"), ("calculator:six", "valid are "), ("calculator:-1", "valid are "),
    ("calculator:²", "valid are "), ("jsonl:", "jsonl:PATH"), ("two\nlines", "valid are "),
    ("calculator:0", "the level must be from 1 to 32"),
    ("calculator:99", "the level must be from 1 to 32"),
    ("countdown:0", "the level must be from 2 to 6"),
    ("countdown:1", "the level must be from 2 to 6"),
    ("countdown:99", "the level must be from 2 to 6")])
def test_a_wrong_name_is_one_line(spec, said):
    assert said in complaint(spec)


def test_a_missing_file_is_one_line(tmp_path):
    assert complaint(f"jsonl:{tmp_path}/none") == f"there is no file {tmp_path}/none"
    assert complaint(f"jsonl:{tmp_path}") == f"there is no file {tmp_path}"


@pytest.mark.parametrize("line", [
    "[1]", "7", "null", '"text"', "{}", '{"question": "a"}', '{"answer": "a"}',
    '{"question": 1, "answer": "b"}', '{"question": "a", "answer": null}'])
def test_a_wrong_line_is_told_by_its_number(line, tmp_path):
    path = tmp_path / "own.jsonl"
    assert complaint(write(path, *rows_of(False), line, *rows_of(True))) == (
        f'{path} line 6 must be an object with the strings "question" and "answer"')
    write(path, *rows_of(False), "{", *rows_of(True))
    assert complaint(f"jsonl:{path}").startswith(f"{path} line 6 is not JSON: ")


def test_a_line_separator_does_no_harm_and_a_blank_line_is_told_by_its_number(tmp_path):
    path, rows = tmp_path / "own.jsonl", [*rows_of(False), *rows_of(True)]
    spec = write(path, *rows, '{"question": "a\u2028b", "answer": "c"}')
    assert sum(map(len, open_task(spec).sides.values())) == 5 + 5 + 1
    assert complaint(write(path, *rows[:5], "", *rows[5:])) == f"{path} line 6 is blank"


@pytest.mark.parametrize("side, missing", [(False, "held-out"), (True, "train")])
def test_an_empty_side_is_told(side, missing, tmp_path):
    path = tmp_path / "own.jsonl"
    assert complaint(write(path, *rows_of(side))) == f"it has no {missing} questions"
    assert complaint(write(path)) == "it has no train questions"


def test_a_hash_decides_and_is_always_the_same():
    # Pinned, the same in every version. Python's own hash would hold out others in each process.
    assert [n for n in range(100) if held_out(str(n), 10)] == [
        11, 46, 70, 74, 76, 78, 79, 81, 92]
    assert [n for n in range(200) if held_out(str(n), 20)] == [
        46, 70, 78, 79, 81, 121, 127]
