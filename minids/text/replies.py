"""A reply's tokens as text, while they come: thought and answer apart, whole characters only.

A token may end inside a UTF-8 character, which then waits for the next one. A stop string may begin
in one token and end in another, so text that could be its beginning is held back. It is looked for
in the answer only: stop strings never cut a thought.
"""

import codecs
from collections import deque
from typing import Any, NamedTuple

from minids.text.tokenizer import Tokenizer

THOUGHT, ANSWER = "thought", "answer"


class Piece(NamedTuple):
    """Some text of a reply; kind: THOUGHT or ANSWER; notes: what belongs to its tokens"""

    kind: str
    text: str
    notes: list


class ReplyText:
    """Turns the tokens of one reply into pieces of text.

    mode: how the prompt ended, as in `minids.text.chat`: "think" inside a thought, "direct" after
        it, "free" before the model chose; "" for text without tags
    stop: strings that end the reply and are not part of it
    stopped: whether one of them was found; thinking: tokens of the thought, its tags included
    length: characters of the text so far, those that are held back included
    """

    def __init__(self, tokenizer: Tokenizer, mode: str = "", stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.mode = tokenizer, stop, mode
        self.kind = THOUGHT if mode == "think" else ANSWER
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.chosen, self.stopped, self.thinking = mode != "free", False, 0
        self.held, self.length = "", 0  # text that may be the beginning of a stop string
        self.notes: deque[tuple[int, Any]] = deque()  # with the characters of each, not yet given

    def add(self, token: int, note=None) -> list[Piece]:
        """Return the text that a token completes; note: is given back with its text."""
        t, first, self.chosen = self.tokenizer, not self.chosen, True
        if token in t.eos_ids:
            return []
        if self.kind == THOUGHT:
            self.thinking += 1
        if first and token == t.think_id:
            self.kind, self.thinking = THOUGHT, 1
            return []
        if first and token == t.end_think_id:
            return []
        if self.kind == THOUGHT and token == t.end_think_id:
            ended = self.flush()
            self.kind = ANSWER
            return ended
        return self.put(self.decoder.decode(t.decode_bytes([token])), note)

    def put(self, text: str, note) -> list[Piece]:
        """Return new text as far as no stop string can begin in it."""
        self.held += text
        self.length += len(text)
        self.notes.append((len(text), note))
        if self.kind == THOUGHT:
            return self.give(len(self.held))
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        if found:
            self.stopped = True
            return self.give(min(found))
        return self.give(len(self.held) - longest_beginning(self.held, self.stop))

    def give(self, count: int) -> list[Piece]:
        """Return the first `count` characters that were held, and the notes of their tokens."""
        text, self.held, notes, left = self.held[:count], self.held[count:], [], count
        while self.notes and self.notes[0][0] <= left:
            size, note = self.notes.popleft()
            left -= size
            notes += [note] if note is not None else []
        if self.notes and left:
            size, note = self.notes.popleft()
            self.notes.appendleft((size - left, note))
        return [Piece(self.kind, text, notes)] if text or notes else []

    def flush(self) -> list[Piece]:
        """Return what was held back, at the end; an incomplete character becomes U+FFFD."""
        if self.stopped:
            return []
        self.held += self.decoder.decode(b"", final=True)
        return self.give(len(self.held))


def longest_beginning(text: str, stop: tuple[str, ...]) -> int:
    """Return how many last characters of a text are the beginning of a stop string, at most.

    >>> longest_beginning("one tw", ("two", "x"))
    2
    """
    longest = max(map(len, stop), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1)
                 if any(s.startswith(text[-n:]) for s in stop)), 0)
