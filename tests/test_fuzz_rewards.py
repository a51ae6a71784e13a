"""Replies written at random are judged: no exception, bounded time and memory, one answer at most.

The same replies every time; MINIDS_FUZZ adds other ones, as in `test_fuzz_files`.
"""

import random
import time

import pytest
from hypothesis import strategies as st
from test_fuzz_files import damaged, fuzz, peak, randoms

from minids.rl.rewards import accuracy, consistency, well_formed
from minids.text.chat import MODES, TEMPLATES, Reply
from minids.text.tasks import Calculator, Countdown, Problem, Questions, Task
from minids.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
BOUND = 256  # MiB that all replies of a test may add to the process's peak
SECONDS = 2.0  # of the processor, for one reply; the slowest takes some 20 ms

BYTES = Tokenizer.open("bytes")
# No two of them are the same answer.
ANSWERS = ["5", "-5", "1/2", "2", "50", "6 km", "6 m", "$7", "€7", "1,234", "1.234", "0", "1e999",
           "1e-999", "9^999", "Paris", "2 or 3", "(5)", "5x", "1,5", "nan", "-inf", "B-52"]
WORDS = Questions("words", [("How many?", "5")], [("Who?", "I")])
TASKS = [Calculator(), Countdown(), WORDS]
PROBLEMS = {task.name: task.some(9, "train", 0) for task in TASKS}
PROBLEMS[WORDS.name] = [Problem("How many?", "", answer) for answer in ANSWERS]

PIECES = [*ANSWERS, *"0123456789+-−–±*/×÷^=.,:;!?%$€°()[]{}\\_#<> \n\t\u00a0\u202f\u200b½⅓²³⁻٥５𝟓√",
          "e", "E", "x", "\\boxed{", "\\frac{1}{2}", "\\text{ km}", "\\times 10^{8}", "####", "**",
          "the answer is ", "Answer:", "it is ", " or ", " km", " apples", " percent", " thousand",
          "e999999999", "e-999999999", "^999999999", "/0", "9" * 300, "0" * 300, "(" * 300,
          "-" * 300, "1e999" * 40, "\\boxed{" * 99, "\x00", "\ud800", "NaN", "Infinity",
          "__import__('os')"]
pieces = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
texts = (pieces | st.text(max_size=60)
         | st.tuples(pieces, st.sampled_from([2, 50, 3000])).map(lambda pair: pair[0] * pair[1])
         | st.tuples(st.sampled_from(ANSWERS), randoms).map(
             lambda pair: damaged(pair[0].encode(), pair[1]).decode("utf-8", "replace")))


@pytest.fixture(autouse=True)
def bounded_memory():
    before = peak()
    yield
    assert peak() - before < BOUND


def judged(task: Task, problem: Problem, reply: Reply) -> float:
    """Return the accuracy of a reply; every reward is a number, in time, and the same again."""
    started = time.process_time()
    paid, form = accuracy(task, problem, reply), well_formed(reply)
    share = consistency(problem.question, reply.thought or "")
    assert time.process_time() - started < SECONDS
    assert paid in (0.0, 1.0) and form in (0.0, 1.0) and 0.0 <= share <= 1.0
    assert paid <= form and paid == accuracy(task, problem, reply)
    return paid


def check(thought: str, answer: str) -> None:
    """Judge a reply to every task; it is right for one of `ANSWERS` at most, and if it ends."""
    for task in TASKS:
        paid = sum(judged(task, problem, Reply(thought, answer, True, 9))
                   for problem in PROBLEMS[task.name])
        assert paid <= 1 or task is not WORDS
        assert not judged(task, PROBLEMS[task.name][0], Reply(thought, answer, False, 9))


@fuzz(texts, texts)
def test_texts(thought, answer):
    check(thought, answer)


@fuzz(st.sampled_from(list(TEMPLATES)), st.sampled_from(MODES), texts, randoms)
def test_tokens(template, mode, text, rng: random.Random):
    """A text as tokens, some of them replaced by ids of any kind."""
    ids = [*BYTES.encode(text.encode("utf-8", "replace")), BYTES.eos_id]
    if rng.random() < 0.5:
        ids = rng.choice([[BYTES.think_id], [BYTES.think_id, BYTES.end_think_id],
                          [BYTES.end_think_id]]) + ids
    for _ in range(rng.randrange(4)):
        ids[rng.randrange(len(ids))] = rng.randrange(-3, BYTES.vocab_size + 3)
    reply = TEMPLATES[template](BYTES).read(ids, mode)
    for task in TASKS:
        for problem in PROBLEMS[task.name][:3]:
            judged(task, problem, reply)


def test_the_check_notices_a_judge_that_pays_too_much(monkeypatch):
    for wrong, answer in ((lambda expected, answer: answer in expected, "5"),
                          (lambda expected, answer: 1 / len(answer), "55"),
                          (lambda expected, answer: random.random() < 0.5, "5")):
        check("", answer)
        monkeypatch.setattr("minids.text.tasks.same_answer", wrong)
        with pytest.raises(AssertionError):
            check("", answer)
        monkeypatch.undo()
