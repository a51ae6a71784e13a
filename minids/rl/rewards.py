"""Rewards by rule."""

import unicodedata

from minids.text.chat import Reply
from minids.text.tasks import Problem, Task


def accuracy(task: Task, problem: Problem, reply: Reply) -> float:
    """1 for a right answer in a reply that ends, else 0."""
    return float(reply.answer is not None and reply.ended and task.right(problem, reply.answer))


def well_formed(reply: Reply) -> float:
    """1 for a reply of one thought, or none, and one answer, that ends; else 0."""
    return float(reply.answer is not None and reply.ended and bool(reply.answer.strip()))


def scripts(text: str) -> set[str]:
    """The scripts that a text's letters are of: LATIN, CJK, GREEK .."""
    return {unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha()}


def consistency(question: str, thought: str) -> float:
    """Share of a thought's words that are in the question's script (R1's language consistency).

    Words without letters count as consistent; a broken character does not.
    """
    known = scripts(question) or {"LATIN"}
    words = thought.split()
    good = sum(scripts(word) <= known and "\ufffd" not in word for word in words)
    return good / len(words) if words else 1.0
