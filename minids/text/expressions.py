"""Answers read safely: arithmetic is parsed, never run."""

import re
from fractions import Fraction

LONGEST_ANSWER, LONGEST_NUMBER, DEEPEST = 200, 9, 30  # characters, digits, brackets in brackets
RULER = re.compile(r"\s*(?:(\d+)|([-+*/()]))", re.ASCII)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?", re.ASCII)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, 1,234.5 as 1234.5; None if there is none."""
    found = NUMBER.findall(text[-LONGEST_ANSWER:])
    return Fraction(found[-1].replace(",", "")) if found else None


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression and the numbers in it; None if it is none.

    "(4*7)+2" gives 30 and [4, 7, 2]. Known are whole numbers, + - * /, brackets and a sign before
    a term; refused are more than LONGEST_ANSWER characters, LONGEST_NUMBER digits or DEEPEST
    levels, and a division by zero.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    words, at = [], 0
    text = text.rstrip(" ")
    while at < len(text):
        match = RULER.match(text, at)
        if match is None or len(match[1] or "") > LONGEST_NUMBER:
            return None
        words.append(match[1] or match[2])
        at = match.end()
    try:
        reader = Reader(words)
        value = reader.sum(0)
        return (value, reader.numbers) if reader.at == len(words) else None
    except (ValueError, ZeroDivisionError):
        return None


class Reader:
    """Reads an expression by descending: sums of products of terms. ValueError where it is none."""

    def __init__(self, words: list[str]):
        self.words, self.at, self.numbers = words, 0, []

    def next_is(self, *signs: str) -> str:
        """Take the next word if it is one of these; else nothing."""
        if self.at < len(self.words) and self.words[self.at] in signs:
            self.at += 1
            return self.words[self.at - 1]
        return ""

    def sum(self, depth: int) -> Fraction:
        """product + product - .."""
        value = self.product(depth)
        while sign := self.next_is("+", "-"):
            value = value + self.product(depth) if sign == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        """term * term / .."""
        value = self.term(depth)
        while sign := self.next_is("*", "/"):
            value = value * self.term(depth) if sign == "*" else value / self.term(depth)
        return value

    def term(self, depth: int) -> Fraction:
        """A number, a sum in brackets, or either with a sign"""
        if depth > DEEPEST:
            raise ValueError("too deep")
        if self.next_is("-"):
            return -self.term(depth + 1)
        if self.next_is("("):
            value = self.sum(depth + 1)
            if not self.next_is(")"):
                raise ValueError("a bracket is open")
            return value
        if self.at == len(self.words) or not self.words[self.at].isdecimal():
            raise ValueError("a number is missing")
        self.numbers.append(int(self.words[self.at]))
        self.at += 1
        return Fraction(self.numbers[-1])
