r"""Read the one value that an answer states, as an exact fraction with its unit.

    5   5.0   +5   −5   1,234.5   .5   1/2   \frac{1}{2}   ½   1 1/2   50%   2.5e3   3×10^8   2^10
    $5   5 km   5 apples   x = 5   4+1 = 5   it is 5.   **5**   the answer is 5   \boxed{5}   #### 5

An answer stands alone, after a lead-in or an equation, or where it is marked: in \boxed{}, after
#### or "answer is". R1 (arXiv 2501.12948, section 2.2.2) asks for a form too, because no rule can
judge free text. Text that has no reading here, or two, has no value and is never paid: "2 or 3",
"1,5", "(5)", "5x", "5 thousand", "at least 5". A comma separates thousands.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from minids.text.expressions import LONGEST_ANSWER, parse_expression

LONGEST_TEXT, MOST_MARKS = 20_000, 20  # characters, and marks in them
BOLD = re.compile(r"(?<![\w)*])\*\*([^*]+)\*\*(?![\w(*])")
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
MARK = re.compile(r"####|\banswer\s*(?:is\b\s*:?|[:=])", re.I)
LEAD = re.compile(r"^\s*(?:(?:so|thus|hence|therefore|then|the|this|that|it|final|total|result|sum"
                  r"|value|in|all|[a-z])\b[ ,]*)*(?:\b(?:is|equals)\b|:)", re.I)
NAME = re.compile(r"\s*(?:(?:so|thus|hence|therefore|then|the)[ ,]+)*[a-z]+\s*", re.I | re.A)

# Characters and markup that stand for others.
CHARACTERS = {ord(c) + 0xFEE0: c for c in map(chr, range(33, 127))}  # full-width forms
CHARACTERS |= str.maketrans("‐‑‒–−﹣⁄∕×", "------//*")
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
MARKUP = [(re.compile(pattern, re.A), new) for pattern, new in (
    (r"^\s*\$([^$]*[^$\\])\$(\s*\.?\s*)$", r"\1\2"),  # $5$
    (r"\\[()\[\],;: ]", " "), (r"\\([$%])", r"\1"), (r"\{,\}", ","), (r"\\(?:times|cdot)\b", "*"),
    (r"\\(?:text|mathrm)\s*\{([A-Za-z/ ]*)\}", r"\1"), (r"\^\{(-?\d+)\}", r"^\1"),
    (r"\\[dt]?frac\s*\{(-?[\d.,]+)\}\s*\{([\d.,]+)\}", r" \1/\2"))]

WHOLE = r"(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?:[\u00a0\u2009\u202f]\d{3})+)|\d+)"  # 1234 or 1,234
DECIMAL = rf"(?:{WHOLE}(?:\.\d+)?|\.\d+)"


def exact(number: str) -> Fraction:
    """Return the value of a decimal number whose digits may be in groups."""
    return Fraction(re.sub(r"[,\s]", "", number))


def mixed(whole: str, top: str, bottom: str) -> Fraction:
    """Return the value of a mixed number; raise `ValueError` unless its fraction is below 1."""
    if int(top) >= int(bottom):
        raise ValueError("an improper fraction")
    return exact(whole) + Fraction(int(top), int(bottom))


NUMBERS = [(re.compile(pattern, re.A | re.I), value) for pattern, value in (
    (rf"({WHOLE})\s+(\d\d?)/(\d+)", mixed),
    (rf"({DECIMAL})\s*/\s*({DECIMAL})", lambda top, bottom: exact(top) / exact(bottom)),
    (rf"({DECIMAL})(?:e|\s*[*x]\s*10\^)([-+]?\d{{1,3}})",
     lambda number, power: exact(number) * Fraction(10) ** int(power)),
    (r"([1-9]\d{0,8})\^(-?\d{1,3})", lambda base, power: exact(base) ** int(power)),
    (rf"({DECIMAL})", exact))]

MONEY = "[$€£¥₹]"
START = re.compile(rf"\s*({MONEY}?)\s*([-+]?)\s*({MONEY}?)\s*")
UNIT = re.compile(rf"{MONEY}|[°¢%]|°?[^\W\d_]+(?:\^\d)?(?:/[^\W\d_]+(?:\^\d)?)?")
ALIKE = dict(dollar="$", dollars="$", euro="€", euros="€", percent="%")
# Words behind a number that change it, or its meaning.
NO_UNITS = set("""and or nor not no never to minus plus times over under off more less than least
    most at if of but so is are was maybe perhaps wrong about ish hundred thousand million billion
    trillion dozen lakh crore grand bn mn mil half halves third thirds quarter quarters fourths
    fifths sixths eighths tenths hundredths squared cubed factorial mod pi pct cent""".split())


class Answer(NamedTuple):
    """The value that an answer states, and its unit.

    unit: its words and signs; plain: whether it can be left out, as in "5 apples" or "$5", since it
        is no variable, power or scale
    """

    value: Fraction
    unit: list[str]
    plain: bool


def same_answer(expected: str, answer: str) -> bool:
    """Return whether an answer states what is expected: a value and its unit, or else words.

    If no unit is expected, the answer may have one, in words or money: the question has named it.
    """
    wanted, found = read_answer(expected), read_answer(answer)
    if wanted is None:
        words, said = ([part.strip().casefold() for part in marked(text)]
                       for text in (expected, answer))
        return words == said != []
    return (found is not None and found.value == wanted.value
            and (found.unit == wanted.unit or not wanted.unit and found.plain))


def marked(text: str) -> list[str]:
    r"""Return what stands in \boxed{}, and behind each other mark; the whole text without any."""
    if len(text) > LONGEST_TEXT:
        return []
    text = BOLD.sub(r"\1", text)
    first, *parts = MARK.split(text)
    return BOX.findall(text) + [part for part in parts or [first]
                                if part.strip() and not BOX.search(part)]


def read_answer(text: str) -> Answer | None:
    """Return the one answer that a text states, however often; None if there is no such thing."""
    parts = marked(text)
    if len(parts) > MOST_MARKS or any(len(part) > LONGEST_ANSWER for part in parts):
        return None
    found = [read_statement(part) for part in parts]
    return found[0] if found and all(one == found[0] for one in found) else None


def read_statement(text: str) -> Answer | None:
    """Return the quantity in "it is 5.", in "x = 5 km", or in "4+1 = 5", whose sides must agree."""
    text = re.sub("[¼½¾⅐-⅞]", lambda part: " " + unicodedata.normalize("NFKC", part[0]), text)
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda power: "^" + power[0].translate(RAISED), text)
    text = text.translate(CHARACTERS)
    for pattern, new in MARKUP:
        text = pattern.sub(new, text)
    *before, last = text.strip().removesuffix(".").split("=")
    found = read_quantity(LEAD.sub("", last))
    for side in before if found else ():
        value = parse_expression(side.strip()) or read_quantity(side)
        if not (value[0] == found.value if value else NAME.fullmatch(side)):
            return None
    return found


def read_quantity(text: str) -> Answer | None:
    """Return what "-5", "$5", "1 1/2 km" or "50%" states, None for anything else."""
    start = START.match(text)
    found = ((pattern.match(text, start.end()), value) for pattern, value in NUMBERS)
    number, value = next((pair for pair in found if pair[0]), (None, None))
    if number is None:
        return None
    rest = text[number.end():]
    words = [word for word in (start[1], start[3], *rest.split()) if word]
    lower = [word.casefold() for word in words]
    if len(words) > 3 or NO_UNITS & set(lower) or not all(map(UNIT.fullmatch, words)):
        return None
    unit = [ALIKE.get(low, word if len(word) < 4 else low)  # mW is not MW
            for word, low in zip(words, lower, strict=True)]
    try:
        amount = value(*number.groups()) * (-1 if start[2] == "-" else 1)
    except (ValueError, ZeroDivisionError):
        return None
    if "%" in unit:
        unit.remove("%")
        amount /= 100
    plain = not rest[:1].isalpha() and all(
        word in "$€£¥₹°¢" or word.isalpha() and len(word) > 1 for word in unit)
    return Answer(amount, unit, plain)
