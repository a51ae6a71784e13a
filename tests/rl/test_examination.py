"""How models are asked, marks, and pass@k."""

from itertools import combinations
from types import SimpleNamespace

import pytest

from minids.rl import examination
from minids.rl.examination import Asking, Marks, ask, examine, mark, pass_at, pass_curve
from minids.text.chat import Reply
from minids.text.tasks import Problem, open_task
from minids.text.tokenizer import Tokenizer


def test_pass_at_k_against_all_subsets():
    for right in range(6):
        replies = [True] * right + [False] * (5 - right)
        for k in range(1, 6):
            subsets = list(combinations(replies, k))
            assert pass_at(k, right, 5) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    # Wrong variant: as if replies were drawn with replacement.
    assert 1 - (1 - 2 / 5) ** 2 != pytest.approx(pass_at(2, 2, 5))


def test_marks_are_means_over_the_replies():
    task, problem = open_task("calculator"), Problem("1+1", "1+1=2", "2")
    replies = [Reply("1+1=2", "2", True, 9), Reply(None, "3", True, 3),
               Reply("1+1", None, False, 12), Reply(None, "2", False, 4)]  # the last one was cut
    assert mark(task, [problem] * 4, replies) == Marks(0.25, 0.5, 0.5, 7.0)
    with pytest.raises(ValueError):
        mark(task, [problem] * 3, replies)


@pytest.fixture
def by_rule(monkeypatch):
    """A model that answers problem i rightly in the first i + 1 of four tries."""
    task, seen = open_task("calculator"), []
    answers = {p.question: p.answer for p in task.some(100, "held-out", 0)}
    order = list(answers)

    def answer(model, tokenizer, questions, how):
        tries = {}
        for question in questions:
            tries[question] = tries.get(question, 0) + 1
            good = tries[question] <= order.index(question) + 1
            seen.append(how)
            yield Reply(None, answers[question] if good else "?", True, 3)

    monkeypatch.setattr(examination, "ask", lambda *given: list(answer(*given)))
    return task, seen


def test_pass_at_k_of_held_out_problems(by_rule):
    task, seen = by_rule
    how = Asking("think", temperature=1.0)
    curve = pass_curve(None, None, task, 2, 4, how)  # right in one and in two of four tries
    assert curve == {1: pytest.approx((1 / 4 + 2 / 4) / 2), 2: pytest.approx((1 / 2 + 5 / 6) / 2),
                     4: 1.0}
    assert seen == [how] * 8
    assert list(pass_curve(None, None, task, 1, 6, how)) == [1, 2, 4]
    assert examine(None, None, task, 5, how) == Marks(1.0, 1.0, 0.0, 3.0)


def test_questions_are_asked_in_parts_each_with_a_seed_of_its_own(monkeypatch):
    tokenizer = Tokenizer.open("bytes")
    monkeypatch.setattr(examination, "BATCH", 2)
    questions = ["1+1", "2+2", "3*3", "4-4", "5+5"]
    calls = []
    monkeypatch.setattr(examination, "generate", lambda model, prompts, longest, temperature,
                        top_p, seed, eos_id: (
        calls.append((prompts, longest, temperature, top_p, seed, eos_id)),
        SimpleNamespace(tokens=[[tokenizer.eos_id]] * len(prompts)))[1])
    replies = ask(None, tokenizer, questions, Asking("direct", "chat", 7, 0.5, 0.9, 3))
    assert replies == [Reply(None, "", True, 2)] * 5
    assert [len(call[0]) for call in calls] == [2, 2, 1]
    assert [call[1:] for call in calls] == [(7, 0.5, 0.9, 3 + i, tokenizer.eos_ids)
                                           for i in range(3)]
    assert all(prompt[-1] == tokenizer.end_think_id for call in calls for prompt in call[0])
