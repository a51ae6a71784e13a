"""Rewards by rule: accuracy, format and language (R1, arXiv 2501.12948, section 2.2.2).

A reward is a pure function of a problem and a reply. No model judges, so there is none to fool.
"""

import unicodedata

from minids.text.chat import Reply
from minids.text.tasks import Problem, Task


def accuracy(task: Task, problem: Problem, reply: Reply) -> float:
    """Return 1.0 for a right answer in a reply that ends, else 0.0."""
    return float(reply.answer is not None and reply.ended and task.right(problem, reply.answer))


def well_formed(reply: Reply) -> float:
    """Return 1.0 for a reply of at most one thought and one answer that ends, else 0.0."""
    return float(reply.answer is not None and reply.ended and bool(reply.answer.strip()))


def scripts(text: str) -> set[str]:
    """Return the scripts of a text's letters: LATIN, CJK, GREEK .."""
    return {unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha()}


def consistency(question: str, thought: str) -> float:
    """Return the share of a thought's words in the question's script (R1's language consistency).

    Words without letters count as consistent; a word with a broken character does not.
    """
    known = scripts(question) or {"LATIN"}
    words = thought.split()
    good = sum(scripts(word) <= known and "\ufffd" not in word for word in words)
    return good / len(words) if words else 1.0
