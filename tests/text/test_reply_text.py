"""Replies as text while they come: thought apart, whole characters, stop strings across tokens."""

import itertools
import random

import pytest

from minids.text.chat import Chat
from minids.text.replies import ReplyText, longest_beginning
from minids.tokenizer import Tokenizer

BYTES, OWN = Tokenizer.open("bytes"), Tokenizer.load()
both = pytest.mark.parametrize("t", [BYTES, OWN], ids=["bytes", "own"])


def read(t, ids, mode="", stop=()) -> tuple[str, str, ReplyText]:
    """Return thought and answer of a reply, and its reader."""
    text, found = ReplyText(t, mode, tuple(stop)), {"thought": "", "answer": ""}
    for token in ids:
        pieces = text.add(token)
        for piece in pieces:
            assert piece.text
            found[piece.kind] += piece.text
        if text.stopped:
            break
    for piece in text.flush():
        found[piece.kind] += piece.text
    return *found.values(), text


@both
def test_thought_and_answer_are_those_of_the_whole_reply(t):
    thought, answer = "3*7=1 日本 höher", "🙂 is 6"
    for mode, forced in Chat(t).forced.items():
        ids = [t.think_id, *t.encode(thought), t.end_think_id, *t.encode(answer), t.eos_id]
        if mode == "direct":
            ids, thought = [t.end_think_id, *t.encode(answer), t.eos_id], ""
        ids = ids[len(forced):]
        found = read(t, ids, mode)
        whole = Chat(t).read(ids, mode)
        assert found[:2] == (whole.thought or "", whole.answer) == (thought, answer)
        assert found[2].thinking == (0 if mode == "direct" else ids.index(t.end_think_id) + 1)
        thought = "3*7=1 日本 höher"


def test_the_model_may_choose_not_to_think():
    t = BYTES
    assert read(t, [t.end_think_id, *t.encode("6")], "free")[:2] == ("", "6")
    assert read(t, t.encode("6"), "free")[:2] == ("", "6")
    # Only the first token chooses; later tags are text.
    assert read(t, [*t.encode("6"), t.think_id], "free")[:2] == ("", "6<think>")


def test_a_thought_that_is_cut_off_is_all_thought():
    thought, answer, text = read(BYTES, BYTES.encode("3*7=1"), "think")
    assert (thought, answer, text.thinking) == ("3*7=1", "", 5)


@both
@pytest.mark.parametrize("stop, left", [(["two"], "one "), (["four", "e t"], "on"), (["x"], "all"),
                                        (["one"], ""), (["threes", "three!"], "all"),
                                        (["日本"], "one two "), (["ee 日"], "all")])
def test_stop_strings_across_tokens(t, stop, left):
    whole = "one two 日本 three"
    thought, answer, text = read(t, t.encode(whole), stop=stop)
    left = whole if left == "all" else left
    assert (thought, answer) == ("", left)
    assert text.stopped == (left != whole)


def test_a_thought_is_not_cut():
    t = BYTES
    ids = [*t.encode("a=b"), t.end_think_id, *t.encode("c=d")]
    assert read(t, ids, "think", ["="])[:2] == ("a=b", "c")


def test_incomplete_characters_wait_for_the_rest():
    ids, text = BYTES.encode("🙂!"), ReplyText(BYTES)
    given = [[piece.text for piece in text.add(token)] for token in ids]
    assert given == [[], [], [], ["🙂"], ["!"]]
    assert read(BYTES, ids[:2])[1] == "\ufffd"
    assert read(BYTES, [*ids[:2], *BYTES.encode("a")])[1] == "\ufffda"


def test_random_stops_cut_where_the_whole_text_says():
    rng = random.Random(0)
    for _ in range(300):
        whole = "".join(rng.choice("ab🙂") for _ in range(12))
        stop = ["".join(rng.choice("ab🙂") for _ in range(rng.randint(1, 4))) for _ in range(2)]
        # The earliest end of a stop string ends the reply; text before that string stays.
        ends = [whole.find(s) + len(s) for s in stop if s in whole]
        seen = whole[:min(ends)] if ends else whole
        left = min([seen.find(s) for s in stop if s in seen], default=len(whole))
        assert read(BYTES, BYTES.encode(whole), stop=stop)[1] == whole[:left], (whole, stop)


def test_notes_come_with_their_text():
    text, given = ReplyText(BYTES, stop=("cd",)), []
    for token, note in zip(BYTES.encode("abcxcd"), "abcxcd", strict=True):
        given += [(piece.text, piece.notes) for piece in text.add(token, note)]
    assert given == [("a", ["a"]), ("b", ["b"]), ("cx", ["c", "x"])]
    assert text.stopped and text.flush() == []


def test_a_note_comes_with_the_last_of_its_tokens_text():
    """Also where a stop string may begin within a token, whose text then comes in two pieces."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = ["".join(rng.choice("abcd") for _ in range(rng.randint(1, 4))) for _ in range(6)]
        text, given, notes = ReplyText(BYTES, stop=("bca", "dd")), "", []
        for number, token in enumerate(tokens):
            pieces = [] if text.stopped else text.put(token, number)
            given += "".join(piece.text for piece in pieces)
            notes += [note for piece in pieces for note in piece.notes]
            ends = list(itertools.accumulate(map(len, tokens)))
            assert notes == [i for i, end in enumerate(ends) if end <= len(given)], (tokens, given)


def test_what_may_begin_a_stop_string():
    assert longest_beginning("one tw", ("two", "x")) == 2
    assert longest_beginning("aab", ("abc", "b")) == 2 and longest_beginning("abc", ()) == 0
