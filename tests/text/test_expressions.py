"""Answers are read as they were built, and hostile ones are refused at once.

A wrong variant of what a check looks at fails the same check.
"""

import operator
import random
import time
from fractions import Fraction

import pytest

from minids.text import expressions
from minids.text.expressions import parse_expression

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def tree(rng: random.Random, depth: int) -> tuple[Fraction, str, list[int], str]:
    """Return a random expression: its value, text, numbers and outermost sign (n for a number).

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


def samples(count: int) -> list[tuple]:
    """Return (text, (value, numbers)) as the parser should read it."""
    rng, found = random.Random(0), []
    while len(found) < count:
        try:
            value, text, numbers, _ = tree(rng, rng.randrange(1, 5))
        except ZeroDivisionError:
            continue
        if len(text) <= expressions.LONGEST_ANSWER:
            found.append((text, (value, numbers)))
    return found


class FromTheRight(expressions.Parser):
    """Wrong: 5-3-1 as 5-(3-1)."""

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        sign = self.accept("+-")
        return SIGNS[sign](value, self.sum(depth)) if sign else value


class Flat(expressions.Parser):
    """Wrong: 1+2*3 as (1+2)*3."""

    def sum(self, depth: int) -> Fraction:
        value = self.term(depth)
        while sign := self.accept("+-*/"):
            term = self.term(depth)
            value = value / term if sign == "/" else SIGNS[sign](value, term)
        return value


def test_expressions_are_read_as_they_were_built(monkeypatch):
    cases = samples(500)
    assert all(sign in "".join(text for text, _ in cases) for sign in "+-*/() ")
    assert any(value.denominator > 1 for _, (value, _) in cases)
    for text, expected in cases:
        assert parse_expression(text) == expected, text
    for wrong in (FromTheRight, Flat):
        monkeypatch.setattr(expressions, "Parser", wrong)
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
    deepest, longest = expressions.DEEPEST, expressions.LONGEST_NUMBER
    for more in (0, 1):
        for text in ("(" * (deepest + more) + "7" + ")" * (deepest + more),
                     "-" * (deepest + more) + "7", "7" * (longest + more),
                     "7" + " " * (expressions.LONGEST_ANSWER - 1 + more)):
            assert (parse_expression(text) is None) == bool(more), text


def test_without_limits_brackets_would_break_it(monkeypatch):
    monkeypatch.setattr(expressions, "LONGEST_ANSWER", 10**7)
    monkeypatch.setattr(expressions, "DEEPEST", 10**7)
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
