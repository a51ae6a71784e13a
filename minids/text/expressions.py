"""Read arithmetic in answers safely: it is parsed and never executed.

A model's answer is untrusted input. The parser knows four operations and parentheses, limits the
number of characters, digits and levels, and refuses everything else within microseconds.
"""

import re
from fractions import Fraction

LONGEST_ANSWER, LONGEST_NUMBER, DEEPEST = 200, 9, 30  # characters, digits, nested parentheses
TOKEN = rf"\d{{1,{LONGEST_NUMBER}}}(?!\d)|[-+*/()]"  # a whole number or a sign
TOKENS = re.compile(rf"(?:\s*(?:{TOKEN}))* *", re.ASCII)


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the value of an arithmetic expression and the numbers in it, or None if it is invalid.

    "(4*7)+2" gives 30 and [4, 7, 2]. An expression consists of whole numbers, + - * /, parentheses
    and signs before a term. Invalid are also one beyond the limits and a division by zero.
    """
    if len(text) > LONGEST_ANSWER or not TOKENS.fullmatch(text):
        return None
    tokens = re.findall(TOKEN, text, re.ASCII)
    try:
        parser = Parser(tokens)
        value = parser.sum(0)
        return (value, parser.numbers) if parser.at == len(tokens) else None
    except (ValueError, ZeroDivisionError):
        return None


class Parser:
    """Recursive descent: sums of products of terms. Raises `ValueError` for invalid syntax."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.numbers = tokens, 0, []

    def accept(self, signs: str) -> str:
        """Consume and return the next token if it is one of these signs, else return ''."""
        if self.at < len(self.tokens) and self.tokens[self.at] in signs:
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def sum(self, depth: int) -> Fraction:
        """product + product - .."""
        value = self.product(depth)
        while sign := self.accept("+-"):
            value = value + self.product(depth) if sign == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        """term * term / .."""
        value = self.term(depth)
        while sign := self.accept("*/"):
            value = value * self.term(depth) if sign == "*" else value / self.term(depth)
        return value

    def term(self, depth: int) -> Fraction:
        """A number, a sum in parentheses, or either after a minus sign."""
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        if self.accept("-"):
            return -self.term(depth + 1)
        if self.accept("("):
            value = self.sum(depth + 1)
            if not self.accept(")"):
                raise ValueError("missing )")
            return value
        if self.at == len(self.tokens) or not self.tokens[self.at].isdecimal():
            raise ValueError("missing number")
        self.numbers.append(int(self.tokens[self.at]))
        self.at += 1
        return Fraction(self.numbers[-1])
