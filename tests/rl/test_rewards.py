"""Rewards follow form and answer, and nothing that a model generates breaks them.

A wrong variant of what a check looks at fails the same check.
"""

import random
import re
from collections import Counter

import pytest

from minids.rl import rewards as rewards_module
from minids.rl.rewards import accuracy, consistency, well_formed
from minids.text import chat as chat_module
from minids.text.chat import Chat, Reply
from minids.text.tasks import Calculator, Countdown, Problem, Questions, Task
from minids.tokenizer import Tokenizer

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
    """Return accuracy and form of a reply to SEVEN, from one regular expression."""
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
    """Wrong: a truncated reply counts."""
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


WORDS = Questions("some", [("What?", "7")], [("Who?", "I")])


@pytest.mark.parametrize("task", [Calculator(), Countdown(), WORDS], ids=lambda task: task.kind)
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
    """Wrong: broken characters are ignored."""
    return consistency(question, thought.replace("\ufffd", ""))


def only_ascii(question: str, thought: str) -> float:
    """Wrong: assumes English questions and words without accents."""
    found = thought.split()
    return sum(map(str.isascii, found)) / len(found) if found else 1.0


def no_words(question: str, thought: str) -> float:
    """Wrong: a share of the letters, and there may be none."""
    letters = [c for c in thought if c.isalpha()]
    known = rewards_module.scripts(question)
    return sum(rewards_module.scripts(c) <= known for c in letters) / max(len(letters), 1)


@pytest.mark.parametrize("question, thought, share", CONSISTENT)
def test_consistency_is_the_share_of_words_in_the_questions_script(question, thought, share):
    assert consistency(question, thought) == share


@pytest.mark.parametrize("wrong", [only_letters, only_ascii, no_words])
def test_a_wrong_share_is_caught(wrong):
    assert any(wrong(question, thought) != share for question, thought, share in CONSISTENT)
