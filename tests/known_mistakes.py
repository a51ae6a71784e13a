"""Write minids/lab/mistakes.json: what is wrong with an answer that equals a known wrong one.

    python tests/known_mistakes.py

A key is a digest of the results in all cases of one check, so the file ships no answer. Left out
are results that two different mistakes share, and those that say little: errors, and a property's
verdicts on fewer than six versions.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import test_graders  # noqa: E402

from minids.lab import compare, lesson  # noqa: E402

FILE = Path(compare.__file__).with_name("mistakes.json")


def keys_of(exercise, answer: str) -> set[str]:
    """Return the digests of the checks that refuse an answer, as far as they say something."""
    found, given = set(), lesson.problems

    def problems(function, cases):
        cases, verdicts = list(cases), []
        lesson.judge(function, cases, lambda kind, value: verdicts.append(value))
        few = all(type(expected) is bool for _, expected, _ in cases) and len(cases) < 6
        if any(words for words, *_ in verdicts) and not few and all(
                what != "error" for _, what, _ in verdicts):
            found.add(compare.digest(function.__name__, [mark for *_, mark in verdicts]))
        return given(function, cases)

    try:
        lesson.problems = problems
        test_graders.grade(exercise, answer)
    finally:
        lesson.problems = given
    return found


def table() -> dict[str, str]:
    """Return digest -> what is wrong."""
    told: dict[str, set[str]] = {}
    for exercise in test_graders.ALL:
        for what, source in test_graders.wrong_answers(exercise).items():
            for key in keys_of(exercise, source):
                told.setdefault(key, set()).add(" ".join(what.split()))
    return {key: min(what) for key, what in sorted(told.items()) if len(what) == 1}


if __name__ == "__main__":
    from minids.lab import checker
    checker.forks, checker.PATIENCE = lambda: False, 60.0
    FILE.write_text(json.dumps(table(), indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
