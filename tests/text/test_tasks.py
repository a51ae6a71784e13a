"""Problems that are right, a split that leaks nothing, answers read safely, rewards unbroken.

A wrong variant of what a check looks at fails the same check.
"""

import json
import operator
import random
import re
import time
from collections import Counter, defaultdict
from fractions import Fraction

import pytest

from minids.text import chat as chat_module
from minids.text import tasks
from minids.text.chat import Chat, Reply
from minids.text.splits import held_out
from minids.text.tasks import (
    HELD_OUT,
    Calculator,
    Countdown,
    Problem,
    Questions,
    Task,
    accuracy,
    consistency,
    open_task,
    parse_expression,
    well_formed,
)
from minids.tokenizer import Tokenizer

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def drawn(task: Task, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [task.draw(rng) for _ in range(count)]


def right_tape(problem: Problem, level: int) -> bool:
    """Whether every step and the answer are the last digits of results in whole numbers."""
    steps = re.findall(r"([-+*])(\d)=(\d)", problem.thought)
    exact, question, tape = int(problem.question[0]), problem.question[0], problem.question[0]
    for sign, digit, _ in steps:
        exact = SIGNS[sign](exact, int(digit))
        question += sign + digit
        tape += f"{sign}{digit}={exact % 10}"
    return (len(steps) == level and question == problem.question and tape == problem.thought
            and problem.answer == str(exact % 10))


class Precedence(Calculator):
    """Wrong: products before sums."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(answer=str(eval(problem.question) % 10))


class Slip(Calculator):
    """Wrong: the first step, though the answer is right."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(thought=re.sub(r"=\d", "=0", problem.thought, count=1))


class OneMore(Calculator):
    """Wrong: an operation more than the level says."""

    def draw(self, rng: random.Random) -> Problem:
        return Calculator(self.level + 1).draw(rng)


@pytest.mark.parametrize("level", [1, 2, 6, 32])
def test_the_calculator_counts_from_left_to_right(level):
    assert all(right_tape(p, level) for p in drawn(Calculator(level), 500))


@pytest.mark.parametrize("wrong", [Precedence, Slip, OneMore])
def test_a_wrong_calculator_is_caught(wrong):
    assert not all(right_tape(p, 6) for p in drawn(wrong(6), 500))


class AnyProduct(Calculator):
    """Wrong: a product by 0 or 5 leaves one or two results."""

    DIGITS = dict.fromkeys("+-*", "0123456789")


def best_guess(task: Task) -> float:
    """How often the answer is the most frequent one after the same two last operations.

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


def split_up(problem: Problem) -> tuple[list[int], int]:
    """The numbers, sorted, and the target."""
    numbers, target = problem.question.split(">")
    return sorted(map(int, numbers.split(","))), int(target)


def right_answer(problem: Problem) -> bool:
    """Whether Python says that the answer has the target's value, with each number once."""
    numbers, target = split_up(problem)
    assert re.fullmatch(r"[\d()*+-]+", problem.answer)
    return (eval(problem.answer) == target
            and sorted(map(int, re.findall(r"\d+", problem.answer))) == numbers)


def right_chains(problem: Problem) -> bool:
    """Whether each chain is right arithmetic with each number once, and the last one, and no
    other, reaches the target."""
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
    """Wrong: goes on after the chain that reaches the target."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem._replace(thought=";".join(problem.thought.split(";")[::-1]))


class Miscounting(Countdown):
    """Wrong: a chain's second number stands there as another."""

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
    """Wrong: whatever the numbers."""

    def right(self, problem: Problem, answer: str) -> bool:
        found = parse_expression(answer)
        return found is not None and found[0] == split_up(problem)[1]


class BySet(Countdown):
    """Wrong: however often."""

    def right(self, problem: Problem, answer: str) -> bool:
        found = parse_expression(answer)
        return (found is not None and found[0] == split_up(problem)[1]
                and set(found[1]) == set(split_up(problem)[0]))


class Literal(Countdown):
    """Wrong: only the answer that the task has itself."""

    right = Task.right


def test_any_right_expression_counts_and_no_other():
    assert all(verdicts(Countdown(), ACCEPTED)) and not any(verdicts(Countdown(), REFUSED))
    assert any(verdicts(ByValue(), REFUSED)) and any(verdicts(BySet(), REFUSED))
    assert not all(verdicts(Literal(), ACCEPTED))


class Unhashed:
    """Wrong: the two sides are told apart by their seeds only."""

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
                                         (Countdown(3), UnhashedCountdown(3))],
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
    kept = [q for q in asked if held_out(q.encode(), HELD_OUT)]
    assert abs(len(kept) / len(asked) - 0.1) < 0.01  # deviation 0.002


def tree(rng: random.Random, depth: int) -> tuple[Fraction, str, list[int], str]:
    """A random expression: its value, text, numbers and outermost sign (n for a number).

    The value comes from the tree. Brackets are where the tree is not what precedence makes of the
    text, and here and there where it is.
    """
    def pad(sign: str) -> str:
        return rng.choice(["", "", " "]) + sign + rng.choice(["", "", " ", "  "])

    def shown(part: tuple, needs: bool) -> str:
        return (pad("(") + part[1] + pad(")")) if needs or rng.random() < 0.15 else part[1]

    if depth == 0 or rng.random() < 0.15:
        number = rng.choice([rng.randrange(10), rng.randrange(1000), rng.randrange(10**9)])
        return Fraction(number), str(number), [number], "n"
    sign = rng.choice("+-*/m")
    a = tree(rng, depth - 1)
    if sign == "m":  # minus
        return -a[0], "-" + shown(a, a[3] in "+-*/"), a[2], "m"
    b = tree(rng, depth - 1)
    left = shown(a, sign in "*/" and a[3] in "+-")
    right = shown(b, b[3] in "+-" or (sign in "*/" and b[3] in "*/"))
    value = a[0] / b[0] if sign == "/" else SIGNS[sign](a[0], b[0])
    return value, left + pad(sign) + right, a[2] + b[2], sign


def expressions(count: int) -> list[tuple]:
    """(text, (value, numbers)) as the parser should have it."""
    rng, found = random.Random(0), []
    while len(found) < count:
        try:
            value, text, numbers, _ = tree(rng, rng.randrange(1, 5))
        except ZeroDivisionError:
            continue
        if len(text) <= tasks.LONGEST_ANSWER:
            found.append((text, (value, numbers)))
    return found


class FromTheRight(tasks.Reader):
    """Wrong: 5-3-1 as 5-(3-1)."""

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        sign = self.next_is("+", "-")
        return SIGNS[sign](value, self.sum(depth)) if sign else value


class Flat(tasks.Reader):
    """Wrong: 1+2*3 as (1+2)*3."""

    def sum(self, depth: int) -> Fraction:
        value = self.term(depth)
        while sign := self.next_is(*"+-*/"):
            term = self.term(depth)
            value = value / term if sign == "/" else SIGNS[sign](value, term)
        return value


def test_expressions_are_read_as_they_were_built(monkeypatch):
    cases = expressions(500)
    assert all(sign in "".join(text for text, _ in cases) for sign in "+-*/() ")
    assert any(value.denominator > 1 for _, (value, _) in cases)
    for text, expected in cases:
        assert parse_expression(text) == expected, text
    for wrong in (FromTheRight, Flat):
        monkeypatch.setattr(tasks, "Reader", wrong)
        assert any(parse_expression(text) != expected for text, expected in cases), wrong


HOSTILE = {
    "nested": "(" * 10_000 + "1" + ")" * 10_000, "open": "(" * 10_000, "tower": "9**9**9**9",
    "power": "2**3", "code": "__import__('os').system('x')", "null": "1\x00", "bell": "\x071+1",
    "escape": "1+\x1b1", "separator": "1\x1c+2", "zero": "1/0", "hidden zero": "1/(2-2)",
    "empty": "", "space": "   ", "brackets": "()", "two": "1 2", "arabic": "٣+٤", "square": "²",
    "fullwidth": "１+１", "no-break": "1\xa0+1", "ones": "1" * 10**6, "spaces": " " * 10**6,
    "sums": "1" + "+1" * 500_000, "long": "12345678901234567890", "ten": "1234567890+1",
    "float": "1e9", "point": "1.5", "hex": "0x1", "under": "1_000", "minus": "--" * 100,
    "minuses": "-" * 199 + "1", "deep": "(" * 40 + "1" + ")" * 40, "start": "*1", "end": "1+",
    "close": "1)", "wrong way": ")1(", "slash": "6//2", "remainder": "6%4", "equal": "1=1"}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_answer_is_refused_at_once(text):
    started = time.process_time()
    assert parse_expression(text) is None
    # It takes microseconds; the clock is the processor's, so that other programs do not count.
    assert time.process_time() - started < 0.1


def test_the_limits_are_where_they_are_said_to_be():
    deepest, longest = tasks.DEEPEST, tasks.LONGEST_NUMBER
    for more in (0, 1):
        for text in ("(" * (deepest + more) + "7" + ")" * (deepest + more),
                     "-" * (deepest + more) + "7", "7" * (longest + more),
                     "7" + " " * (tasks.LONGEST_ANSWER - 1 + more)):
            assert (parse_expression(text) is None) == bool(more), text


def test_without_limits_brackets_would_break_it(monkeypatch):
    monkeypatch.setattr(tasks, "LONGEST_ANSWER", 10**7)
    monkeypatch.setattr(tasks, "DEEPEST", 10**7)
    with pytest.raises(RecursionError):
        parse_expression(HOSTILE["nested"])


def test_nothing_makes_the_parser_raise():
    rng, read = random.Random(0), 0
    for _ in range(3000):
        raw = rng.randbytes(rng.randrange(40))
        like = "".join(rng.choices("0123456789+-*/() .e_x\x00\n", k=rng.randrange(12)))
        for text in (raw.decode("latin-1"), raw.decode("utf-8", "replace"), like):
            found = parse_expression(text)
            assert found is None or type(found[0]) is Fraction
            read += found is not None
    assert read > 50  # some are expressions


BYTES = Tokenizer.open("bytes")
CHAT = Chat(BYTES)
# Capitals are ids that no text has; the rest is text, a token a character.
IDS = {"T": BYTES.think_id, "C": BYTES.end_think_id, "E": BYTES.eos_id, "B": BYTES.bos_id,
       "U": BYTES.user_id, "A": BYTES.assistant_id, "F": BYTES.fim_hole_id,
       "N": -1, "M": -10**12, "V": BYTES.vocab_size, "W": 2**63}
FORCED = {"think": "T", "direct": "C", "free": ""}
SEVEN = Problem("3+4", "3+4=7", "7")


def spelt(letters: str) -> list[int]:
    return [IDS[c] if c in IDS else BYTES.encode(c)[0] for c in letters]


def expected(letters: str, mode: str) -> tuple[float, float]:
    """Accuracy and form of a reply to SEVEN, by one regular expression."""
    match = re.match("(?:T[^A-Z]*)?C([^A-Z]*)E", FORCED[mode] + letters)
    answer = match[1].strip() if match else ""
    return float(answer == "7"), float(answer != "")


def replies(count: int) -> list[str]:
    rng = random.Random(0)
    return ["", *("".join(rng.choices("TCE7" * 5 + "3+ " + "BUAFNMVW", k=rng.randrange(9)))
                  for _ in range(count))]


def rewards(letters: str, mode: str, accuracy=accuracy) -> tuple[float, float]:
    reply = CHAT.read(spelt(letters), mode)
    return accuracy(Calculator(), SEVEN, reply), well_formed(reply)


def unfinished(task: Task, problem: Problem, reply: Reply) -> float:
    """Wrong: a reply that was cut counts."""
    return float(reply.answer is not None and task.right(problem, reply.answer))


@pytest.mark.parametrize("mode", FORCED)
def test_rewards_are_those_of_the_form_and_the_answer(mode, monkeypatch):
    cases = replies(10_000)
    seen = Counter()
    for letters in cases:
        got = rewards(letters, mode)
        assert got == expected(letters, mode) and set(map(type, got)) == {float}, letters
        assert got[0] == 0 or "E" in letters
        seen[got] += 1
    # Enough of each: a right answer, a wrong one, none.
    assert min(seen[1.0, 1.0], seen[0.0, 1.0], seen[0.0, 0.0]) > 10
    assert any(rewards(c, mode, unfinished) != expected(c, mode) for c in cases)
    # Wrong: ids that are no text are left out when a reply is read.
    monkeypatch.setattr(chat_module, "text_of", lambda t, ids: t.decode(
        [i for i in ids if 0 <= i < t.vocab_size and i not in t.special.values()]))
    assert any(rewards(c, mode) != expected(c, mode) for c in cases)


@pytest.mark.parametrize("letters, mode, right, form", [
    ("T3+4=7C7E", "free", 1, 1), ("3+4=7C7E", "think", 1, 1), ("7E", "direct", 1, 1),
    ("C7E", "free", 1, 1), ("TC7E", "free", 1, 1), ("C 7 E", "free", 1, 1), ("C8E", "free", 0, 1),
    ("C7", "free", 0, 0), ("T7E", "free", 0, 0), ("T3+4", "free", 0, 0), ("", "free", 0, 0),
    ("E", "direct", 0, 0), (" E", "direct", 0, 0), ("7E", "free", 0, 0), ("TTC7E", "free", 0, 0),
    ("TCT7E", "free", 0, 0), ("CC7E", "free", 0, 0), ("C7CE", "free", 0, 0),
    ("TC7CE", "free", 0, 0), ("T<C7E", "think", 0, 0), ("C7VE", "free", 0, 0),
    ("C7NE", "free", 0, 0), ("TWC7E", "free", 0, 0), ("7C7E", "direct", 0, 0),
    ("C7EC8E", "free", 1, 1), ("CE7E", "free", 0, 0)])
def test_rewards_of_some_replies(letters, mode, right, form):
    assert rewards(letters, mode) == (right, form) == expected(letters, mode)


def words(*rows: tuple[str, str]) -> Questions:
    return Questions("some", list(rows) or [("What?", "7")], [("Who?", "I")])


@pytest.mark.parametrize("task", [Calculator(), Countdown(), words()], ids=lambda task: task.kind)
def test_no_ids_make_a_reward_raise(task):
    rng, vocab = random.Random(0), BYTES.vocab_size
    problems, rows = task.some(20, "train", 0), range(-5, vocab + 5)
    for i in range(2000):
        ids = rng.choices(rows, k=rng.randrange(30)) + rng.choice([[], [BYTES.eos_id]])
        ids = rng.choice([[], [BYTES.think_id], [BYTES.end_think_id]]) + ids
        reply = CHAT.read(ids, rng.choice(list(FORCED)))
        got = accuracy(task, problems[i % 20], reply)
        assert type(got) is float and got in (0, 1) and well_formed(reply) in (0, 1)
        assert reply.ended or got == well_formed(reply) == 0
        assert 0 <= consistency("Why?", reply.thought or "") <= 1


CONSISTENT = [
    ("What is 3*7?", "we 乘 numbers 数字", 0.5), ("What is 3*7?", "3*7=21 ; 21", 1.0),
    ("What is 3*7?", "", 1.0), ("What?", " \n ", 1.0), ("What?", "naïve façade", 1.0),
    ("What?", "twenty-one Ω=3", 0.5), ("三乘七?", "三乘七是 21", 1.0), ("三乘七?", "it is", 0.0),
    ("三 is what?", "it is 三 двадцать", 0.75), ("3*7", "three", 1.0), ("3*7", "три", 0.0),
    ("What?", "three \ufffd 3\ufffd se\ufffdven", 0.25), ("3*7", "3*7=2\ufffd", 0.0)]


def only_letters(question: str, thought: str) -> float:
    """Wrong: what is no letter is not looked at, broken or not."""
    return consistency(question, thought.replace("\ufffd", ""))


def only_ascii(question: str, thought: str) -> float:
    """Wrong: every question is English and no word has an accent."""
    found = thought.split()
    return sum(map(str.isascii, found)) / len(found) if found else 1.0


def no_words(question: str, thought: str) -> float:
    """Wrong: a share of the letters, of which there may be none."""
    letters = [c for c in thought if c.isalpha()]
    known = tasks.scripts(question)
    return sum(tasks.scripts(c) <= known for c in letters) / max(len(letters), 1)


@pytest.mark.parametrize("question, thought, share", CONSISTENT)
def test_consistency_is_the_share_of_words_in_the_questions_script(question, thought, share):
    assert consistency(question, thought) == share


@pytest.mark.parametrize("wrong", [only_letters, only_ascii, no_words])
def test_a_wrong_share_is_caught(wrong):
    assert any(wrong(question, thought) != share for question, thought, share in CONSISTENT)


@pytest.mark.parametrize("solution, right, wrong", [
    ("6*7=42\n#### 42", ["42", "#### 42", "so 41+1\n#### 42", "42.", "42 apples", "$42", "042"],
     ["41", "#### 41", "42 or 43", "-42", "4 2", "4.2", "421", "", "many", "٤٢", "four"]),
    ("#### 1,234", ["1234", "1,234", "1,234.0", "$1,234.", "in all 1 234: 1234"], ["1", "234"]),
    ("#### 1234", ["1,234"], ["1.234"]),
    ("7", ["\\boxed{7}", "$\\boxed{7}$", "the answer is 7.", "7.0", "7.00", "5+2=7", " 7\n"],
     ["\\boxed{8}", "the answer is 8.", "7.5", "7.01", "17", "70"]),
    ("#### -3", ["-3", "it is -3.", "-3.0"], ["3", "-30"]), ("0.5", ["0.50", "0.5."], ["5"]),
    ("#### Paris", ["paris", " PARIS\n", "Paris"], ["London", "", "Paris, Texas", "#### 42"]),
    ("Straße", ["STRASSE"], ["Strase"])])
def test_the_last_number_counts_or_else_the_words(solution, right, wrong):
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
    task = open_task("gsm8k")
    assert asked == [("openai/gsm8k", "main")] and task.name == "gsm8k"
    train, kept = (sorted(task.some(count, split, 0))
                   for count, split in ((5, "train"), (3, "held-out")))
    assert train == [Problem(f"t{i}", f"{i} it is", f"1,00{i}") for i in range(5)]
    assert kept == [Problem(f"h{i}", "", str(i)) for i in range(3)]
    reply = Reply(None, "that is 1003.", True, 9)
    assert [accuracy(task, p, reply) for p in train] == [0, 0, 0, 1, 0]


def rows_of(side: bool, count: int = 5) -> list[dict]:
    """Questions that the hash puts on this side."""
    return [row for i in range(1000)
            if held_out((row := dict(question=f"Was ist {i}+1?", answer=str(i + 1)))
                        ["question"].encode(), HELD_OUT) == side][:count]


def write(path, *lines: str | dict) -> str:
    """The name of the task that reads these lines."""
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
    ("zzz", "valid are calculator[:OPERATIONS], countdown[:NUMBERS], gsm8k and jsonl:PATH"),
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
    assert complaint(f"jsonl:{tmp_path}/none") == f"{tmp_path}/none is no file"
    assert complaint(f"jsonl:{tmp_path}") == f"{tmp_path} is no file"


@pytest.mark.parametrize("line", [
    "{", "", "[1]", "7", "null", '"text"', "{}", '{"question": "a"}', '{"answer": "a"}',
    '{"question": 1, "answer": "b"}', '{"question": "a", "answer": null}'])
def test_a_wrong_line_is_told_by_its_number(line, tmp_path):
    path = tmp_path / "own.jsonl"
    assert complaint(write(path, *rows_of(False), line, *rows_of(True))) == (
        f'line 6 of {path} is no object with the texts "question" and "answer"')


@pytest.mark.parametrize("side, missing", [(False, "held-out"), (True, "train")])
def test_an_empty_side_is_told(side, missing, tmp_path):
    path = tmp_path / "own.jsonl"
    assert complaint(write(path, *rows_of(side))) == f"it has no {missing} questions"
    assert complaint(write(path)) == "it has no train questions"
