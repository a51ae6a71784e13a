"""The template's exact ids, text that cannot become a tag, and replies read back as written."""

import random
import re

import pytest

from minids.text.bpe import SPECIAL
from minids.text.chat import Chat, Plain, Reply, checked
from minids.text.tasks import open_task, plain_text
from minids.tokenizer import Tokenizer

BYTES, OWN = Tokenizer.open("bytes"), Tokenizer.load()
both = pytest.mark.parametrize("t", [BYTES, OWN], ids=["bytes", "own"])
QUESTION = "3*7+5"


def said(role: str, content: str, **more) -> dict:
    return dict(role=role, content=content, **more)


def user(text: str = QUESTION) -> dict:
    return said("user", text)


def assistant(text: str = "6", **more) -> dict:
    return said("assistant", text, **more)


@both
def test_a_prompt_ends_in_what_its_mode_forces(t):
    start = [t.bos_id, t.user_id, *t.encode(QUESTION), t.assistant_id]
    chat = Chat(t)
    assert chat.prompt(QUESTION, "think") == [*start, t.think_id]
    assert chat.prompt(QUESTION, "direct") == [*start, t.end_think_id]
    assert chat.prompt(QUESTION, "free") == start
    assert chat.prompt(QUESTION) == chat.prompt([user()]) == [*start, t.think_id]
    system = chat.prompt([said("system", "Be brief."), user()], "free")
    assert system == [t.bos_id, *t.encode("Be brief."), *start[1:]]


@both
def test_any_eos_of_a_released_model_ends_a_reply(t, monkeypatch):
    monkeypatch.setattr(t, "eos_ids", [t.eos_id, *t.encode("."), *t.encode("!")])
    for text, ended in ("6.7", True), ("6!.", True), ("6", False):
        for mode in ("direct", "free"):
            ids = [*([] if mode == "direct" else [t.end_think_id]), *t.encode(text)]
            assert Chat(t).read(ids, mode)[1:3] == ("6", ended)
        assert Plain(t).read(t.encode(f" = {text}"))[1:3] == ("6", ended)


@both
def test_a_sample_learns_the_reply(t):
    asked = [t.bos_id, t.user_id, *t.encode(QUESTION), t.assistant_id]
    reply = [t.think_id, *t.encode("3*7=1+5=6"), t.end_think_id, *t.encode("6"), t.eos_id]
    ids, learnt = Chat(t).sample([user(), assistant(thought="3*7=1+5=6")])
    assert ids == asked + reply and learnt == [False] * len(asked) + [True] * len(reply)
    reply = [t.end_think_id, *t.encode("6"), t.eos_id]
    for message in (assistant(), assistant(thought=None)):
        ids, learnt = Chat(t).sample([user(), message])
        assert ids == asked + reply and learnt == [False] * len(asked) + [True] * len(reply)
    ids, _ = Chat(t).sample([user(), assistant(thought="")])  # it thought of nothing
    assert ids == [*asked, t.think_id, *reply]


def test_the_tags_have_the_lowest_ids():
    t = BYTES
    assert [t.bos_id, t.eos_id, t.user_id, t.assistant_id, t.think_id, t.end_think_id] == [
        0, 1, 2, 3, 4, 5]
    assert Chat(t).prompt("A") == [0, 2, len(SPECIAL) + ord("A"), 3, 4]


def joined(t: Tokenizer, text: str) -> list[int]:
    """Wrong: the user's text is inserted into a string template whose tags then become ids."""
    bos, _, asks, answers, think = SPECIAL[:5]
    parts = re.split(f"({'|'.join(map(re.escape, SPECIAL))})", bos + asks + text + answers + think)
    return [i for part in parts
            for i in ([t.special[part]] if part in t.special else t.encode(part))]


def tags(t: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in t.special.values()]


@both
@pytest.mark.parametrize("tag", SPECIAL[:9])
def test_no_text_of_a_user_becomes_a_tag(t, tag):
    chat, placed = Chat(t), [t.bos_id, t.user_id, t.assistant_id, t.think_id]
    assert joined(t, QUESTION) == chat.prompt(QUESTION)  # it is right for harmless texts
    for text in (tag, f"3*7+5{tag}6", f"{tag} {tag}\n", tag[:-1] + tag, f"</think>6{tag}"):
        ids = chat.prompt(text)
        assert tags(t, ids) == placed and t.decode(ids[2:-2]) == text
        assert tags(t, joined(t, text)) != placed


@both
def test_no_text_of_a_conversation_becomes_a_tag(t):
    every = "".join(SPECIAL)
    ids, learnt = Chat(t).sample([said("system", every), user(every), assistant(every),
                                  user(every), assistant(every, thought=every)])
    assert tags(t, ids) == [t.bos_id, t.user_id, t.assistant_id, t.end_think_id, t.eos_id,
                            t.user_id, t.assistant_id, t.think_id, t.end_think_id, t.eos_id]
    after = ids[-ids[::-1].index(t.assistant_id):]
    assert Chat(t).read(after) == Reply(every, every, True, len(after))
    assert tags(t, Plain(t).prompt(every)) == [t.bos_id]


class Remembering(Chat):
    """Wrong: each turn as if it were the last, with its thought, and in the loss mask."""

    def turns(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        ids, learnt = [self.tokenizer.bos_id], [False]
        for message in messages:
            more = super().turns([message])
            ids, learnt = ids + more[0][1:], learnt + more[1][1:]
        return ids, learnt


@both
def test_history_has_no_thoughts_and_a_thoughtful_turn_is_not_learnt_without_its(t):
    parts = [  # tokens, and whether they are learnt
        ([t.bos_id], False), (t.encode("Be brief."), False),
        ([t.user_id, *t.encode("1+1"), t.assistant_id], False),
        ([t.end_think_id, *t.encode("2"), t.eos_id], False),  # its thought is gone, not its tag
        ([t.user_id, *t.encode("2+2"), t.assistant_id], False),
        ([t.end_think_id, *t.encode("4"), t.eos_id], True),
        ([t.user_id, *t.encode("3+3"), t.assistant_id], False),
        ([t.think_id, *t.encode("three twice"), t.end_think_id, *t.encode("6"), t.eos_id], True)]
    messages = [said("system", "Be brief."), user("1+1"), assistant("2", thought="one twice"),
                user("2+2"), assistant("4"), user("3+3"), assistant("6", thought="three twice")]
    ids, learnt = Chat(t).sample(messages)
    assert ids == [i for part, _ in parts for i in part]
    assert learnt == [learn for part, learn in parts for _ in part]
    wrong = Remembering(t)
    assert wrong.sample(messages[-2:]) == Chat(t).sample(messages[-2:])
    assert wrong.sample(messages)[0] != ids and wrong.sample(messages)[1] != learnt
    prompt = Chat(t).prompt(messages[:-1])
    assert prompt == [i for part, _ in parts[:-1] for i in part] + [t.think_id]
    assert ids[:len(prompt)] == prompt  # what is learnt is what will be asked


@both
@pytest.mark.parametrize("thoughts", [(None, None), ("a", None), (None, "b"), ("a", "b"),
                                      ("", "b"), ("a", "")], ids=str)
def test_learnt_are_the_last_reply_and_those_without_thought(t, thoughts):
    messages = [m for i, thought in enumerate(thoughts)
                for m in (user(f"q{i}"), assistant(f"r{i}", thought=thought))]
    ids, learnt = Chat(t).sample(messages)
    seen = [i for i, learn in zip(ids, learnt, strict=True) if learn]
    first = [t.end_think_id, *t.encode("r0"), t.eos_id] if thoughts[0] is None else []
    thought = [] if thoughts[1] is None else [t.think_id, *t.encode(thoughts[1])]
    assert seen == [*first, *thought, t.end_think_id, *t.encode("r1"), t.eos_id]


def test_messages_are_left_as_they_were():
    messages = [said("system", "s"), user(), assistant(thought="t"), user(), assistant(thought="t")]
    before = [dict(m) for m in messages]
    Chat(BYTES).sample(messages)
    assert messages == before


def random_text(rng: random.Random) -> str:
    """Return random text: any characters that UTF-8 can encode, and what looks like a tag."""
    def piece() -> str:
        if rng.random() < 0.3:
            return rng.choice([*SPECIAL[:6], " = ", ":", " ", "6"])
        code = rng.randrange(rng.choice([128, 0x800, 0x110000]))
        return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)
    return "".join(piece() for _ in range(rng.randrange(12)))


def after_assistant(ids: list[int], t: Tokenizer) -> list[int]:
    return ids[ids.index(t.assistant_id) + 1:]


def by_text(t: Tokenizer, ids: list[int]) -> tuple[str | None, str]:
    """Wrong: looks for the tags in the text, where anybody may have written them."""
    thought, _, answer = t.decode(ids[:-1]).partition("</think>")
    return (thought.removeprefix("<think>") if ids[0] == t.think_id else None), answer


@both
def test_a_reply_is_read_as_it_was_written(t):
    rng, chat, caught = random.Random(0), Chat(t), 0
    for i in range(400):
        question, answer = random_text(rng), random_text(rng)
        thought, mode = (random_text(rng), "think") if i % 2 else (None, "direct")
        if re.match(r"\s*<think>.*</think>", answer, re.S):
            continue  # a thought written as text, which the test of the forms reads
        ids, learnt = chat.sample([user(question), assistant(answer, thought=thought)])
        after = after_assistant(ids, t)
        expected = Reply(thought, answer, True, len(after))
        assert chat.read(after) == chat.read(after, "free") == expected
        assert chat.read(after[1:], mode) == expected  # the forced tag counts
        assert chat.prompt(question, "free") + after == chat.prompt(question, mode) + after[1:]
        assert chat.prompt(question, "free") + after == ids and sum(learnt) == len(after)
        caught += by_text(t, after) != (thought, answer)
    assert 10 < caught < 300  # it is right where nobody did


@both
@pytest.mark.parametrize("thought, mode", [("3*7=1+5=6", "think"), (None, "direct")])
def test_a_reply_that_was_cut_has_not_ended(t, thought, mode):
    chat, answer = Chat(t), "The answer is 6."
    after = after_assistant(chat.sample([user(), assistant(answer, thought=thought)])[0], t)
    close = after.index(t.end_think_id)
    for size in range(len(after)):
        part = after[:size]
        if size == 0:
            expected = Reply(None, None, False, 0)
        elif size <= close:
            expected = Reply(t.decode(part[1:]), None, False, size)
        else:
            expected = Reply(thought, t.decode(part[close + 1:]), False, size)
        assert chat.read(part) == expected
        assert size == 0 or chat.read(part[1:], mode) == expected


# What stands for itself is text; T and C are <think> and </think>, E is EOS, U a user's tag and
# X in no vocabulary.
IDS = dict(T=BYTES.think_id, C=BYTES.end_think_id, E=BYTES.eos_id, U=BYTES.user_id,
           X=BYTES.vocab_size, N=-1)


def spelt(letters: str) -> list[int]:
    return [IDS[c] if c in IDS else BYTES.encode(c)[0] for c in letters]


@pytest.mark.parametrize("letters, mode, thought, answer, ended", [
    ("E", "free", None, None, True), ("", "think", "", None, False),
    ("", "direct", None, "", False), ("E", "direct", None, "", True), ("CE", "think", "", "", True),
    ("6E", "free", None, None, True), ("6CE", "free", None, None, True),  # the form is broken
    ("3E", "think", "3", None, True), ("TE", "free", "", None, True),
    ("T3C6E", "think", None, None, True), ("T3TC6E", "free", None, None, True),
    ("T3C6CE", "free", "3", None, True), ("T3C6T7C8E", "free", "3", None, True),
    ("C6CE", "free", None, None, True), ("3C6E", "direct", None, None, True),
    ("T3C6U", "free", "3", None, False), ("TUC6E", "free", None, None, True),
    ("TXC6E", "free", None, None, True), ("T3C6XE", "free", "3", None, True),
    ("NC6E", "think", None, None, True), ("6NE", "direct", None, None, True),
    ("X", "think", None, None, False), ("X", "free", None, None, False),
    ("T3EC6E", "free", "3", None, True), ("C6EX", "free", None, "6", True)])
def test_a_broken_form_has_no_answer(letters, mode, thought, answer, ended):
    reply = Chat(BYTES).read(spelt(letters), mode)
    assert reply[:3] == (thought, answer, ended)
    assert reply.tokens == len(letters) + (mode != "free")


def test_half_a_character_is_read_as_a_broken_one():
    assert Chat(BYTES).read(BYTES.encode("é")[:1], "direct") == Reply(None, "\ufffd", False, 2)


MODES = {"think": ":", "direct": " =", "free": ""}


@both
@pytest.mark.parametrize("name", ["calculator", "countdown"])
def test_a_plain_prompt_begins_the_worked_example(t, name):
    """The same tokens as in training, although the prompt is encoded piece by piece."""
    plain = Plain(t)
    for p in open_task(name).some(100, "train", 0):
        for mode, thought in (("think", p.thought), ("direct", None), ("free", None)):
            ids = [t.bos_id, *t.encode(plain_text(p.question, thought, p.answer)), t.eos_id]
            prompt = plain.prompt(p.question, mode)
            assert ids[:len(prompt)] == prompt
            rest = ids[len(prompt):]
            assert plain.read(rest, mode) == Reply(thought, p.answer, True, len(rest))
    assert plain.prompt(QUESTION) == [t.bos_id, *t.encode(QUESTION), *t.encode(":")]
    assert plain.prompt(QUESTION, "direct") == [t.bos_id, *t.encode(QUESTION), *t.encode(" =")]
    assert plain.prompt(QUESTION, "free") == [t.bos_id, *t.encode(QUESTION)]


def from_the_left(text: str) -> tuple[str, str]:
    """Wrong: the first equals sign ends the thought."""
    thought, _, answer = text.removeprefix(":").partition(" = ")
    return thought.strip(), answer.strip()


def test_a_plain_reply_is_read_as_it_was_written():
    rng, plain, t, caught = random.Random(0), Plain(BYTES), BYTES, 0
    for i in range(600):
        # Space around them is the form's, and the last " = " is what ends a thought.
        thought, answer = random_text(rng).strip(), random_text(rng).strip()
        answer = answer.replace("=", "").strip()
        thought, mode = (thought, "think") if i % 2 else (None, "direct")
        text = plain_text("", thought, answer)
        ids = [*t.encode(text), t.eos_id]
        forced = len(t.encode(MODES[mode]))
        assert plain.read(ids, "free") == Reply(thought, answer, True, len(ids))
        assert plain.read(ids[forced:], mode) == Reply(thought, answer, True, len(ids) - forced)
        caught += thought is not None and from_the_left(text) != (thought, answer)
    assert caught > 10


@pytest.mark.parametrize("text, mode, thought, answer", [
    (" 3*7=1+5=6 = 6E", "think", "3*7=1+5=6", "6"), (": 3*7=1 = 1E", "free", "3*7=1", "1"),
    (" a = b = 6E", "think", "a = b", "6"), (" = 6E", "think", "", "6"),
    (" = 6E", "free", None, "6"), (" 6E", "direct", None, "6"),  # the answer only
    (" 3*7=1+5E", "think", " 3*7=1+5", None), (": 3*7", "free", " 3*7", None),
    ("", "think", "", None), ("", "direct", None, ""), ("", "free", None, None),
    ("E", "free", None, None), (" 3*7=1+5=6 = ", "think", "3*7=1+5=6", ""),
    (" 3*7=1+5=6 =", "think", " 3*7=1+5=6 =", None), ("hm = 6E", "free", None, None),
    ("6E", "free", None, None), (" T = 6E", "think", None, None), (" 6XE", "direct", None, None),
    (" 6NE", "direct", None, None), (" 6EX", "direct", None, "6"), (" U", "think", None, None)])
def test_plain_replies(text, mode, thought, answer):
    ids = spelt(text)
    assert Plain(BYTES).read(ids, mode) == Reply(thought, answer, "E" in text, len(ids))


def test_worked_examples_are_written_like_that():
    assert plain_text("3*7+5", "3*7=1+5=6", "6") == "3*7+5: 3*7=1+5=6 = 6"
    assert plain_text("3*7+5", None, "6") == "3*7+5 = 6"


def complaint(ask, *args) -> str:
    with pytest.raises(ValueError) as error:
        ask(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("mode, told", [
    ("thinking", "did you mean 'think'? it must be one of think, direct, free"),
    ("Direct", "did you mean 'direct'? "), ("", "it must be one of think, direct, free"),
    ("two\nlines", "it must be one of ")])
def test_a_wrong_mode_is_one_line(mode, told):
    assert complaint(Chat(BYTES).prompt, QUESTION, mode).startswith(
        f"mode = {mode!r} is not valid: {told}")


@pytest.mark.parametrize("messages, told", [
    ([], "messages: there are none"), (7, "messages: there are none"),
    ([said("system", "s")], "messages: there is only a system message"),
    ([said("tool", "x")], "messages: role 'tool' is not valid at turn 1: it must be 'user'"),
    ([dict(content="x")], "messages: role None is not valid at turn 1: it must be 'user'"),
    ([user(), user()], "messages: role 'user' is not valid at turn 2: it must be 'assistant'"),
    ([user(), assistant(), assistant()], "messages: role 'assistant' is not valid at turn 3: "),
    ([assistant()], "messages: role 'assistant' is not valid at turn 1: it must be 'user'"),
    ([user(), said("system", "s")], "messages: role 'system' is not valid at turn 2: "),
    ([said("system", "s"), said("system", "s"), user()], "messages: role 'system' is not valid"),
    ([said("user\n", "x")], "messages: role 'user\\n' is not valid at turn 1: "),
    ([user(7)], "messages: content = 7 is not valid: it must be a string"),
    ([user(["a\nb"])], "messages: content = ['a\\nb'] is not valid: "),
    ([dict(role="user")], "messages: content = None is not valid: "),
    ([said("system", None), user()], "messages: content = None is not valid: "),
    ([user(b"x")], "messages: content = b'x' is not valid: "),
    ([user(), assistant(thought=7)], "messages: thought = 7 is not valid: it must be a string"),
    (["1+1"], "messages: number 1 is '1+1': it must be an object"),
    ([user(), None], "messages: number 2 is None: it must be an object"),
    ([[user()]], "messages: number 1 is [{"),
    ([dict(role=["user"], content="x")], "messages: role ['user'] is not valid at turn 1: "),
    ([user() | dict(thought="t")], "messages: 'thought' is not valid in a message of the user: "
     "valid are role, content"),
    ([user(), assistant() | dict(tool_calls=[])], "messages: 'tool_calls' is not valid in a message"
     " of the assistant: valid are role, content, thought, reasoning_content"),
    ([user(), assistant() | dict(reasoning="t")],
     "messages: 'reasoning' is not valid in a message of the assistant: did you mean 'reasoning_"),
    ([said("system", "s") | dict(weight=0), user()], "messages: 'weight' is not valid in a mess"),
    ([user(), assistant() | dict(reasoning_content=7)], "messages: reasoning_content = 7 is not "),
    ([user(), assistant(thought="a") | dict(reasoning_content="b")], "messages: a message has 2 t"),
    ([user(), assistant("<think>a</think>b", thought="a")], "messages: a message has 2 thoughts")],
    ids=str)
def test_wrong_messages_are_one_line(messages, told):
    last = messages[-1]["role"] if told.startswith("messages: a message") else "user"
    assert complaint(checked, messages, last).startswith(told)
    for ask in (Chat(BYTES).prompt, Chat(BYTES).sample):
        assert complaint(ask, messages).startswith("messages: ")


@pytest.mark.parametrize("reply", [
    dict(content="2", reasoning_content="one twice"), dict(content="<think>one twice</think>2"),
    dict(content="2", thought="one twice"),
    dict(content=" \n<think>one twice</think>2", reasoning_content=None, tool_calls=None)])
def test_a_thought_is_read_in_the_forms_that_people_have_it(reply):
    """DeepSeek's API calls it reasoning_content; its models write it between tags."""
    chat, reply = Chat(BYTES), dict(role="assistant") | reply
    plain = assistant("2", thought="one twice")
    assert chat.sample([user(), reply]) == chat.sample([user(), plain])
    later = [user(), assistant("3")]  # in the history it stands without its thought, as released
    assert chat.sample([user(), reply, *later]) == chat.sample([user(), plain, *later])
    assert chat.prompt([user(), reply, user()]) == chat.prompt([user(), plain, user()])
    assert chat.sample([user(), reply]) != chat.sample([user(), assistant("2")])


def test_only_an_assistants_tags_are_read():
    chat, text = Chat(BYTES), "a <think>b</think>c"
    ids = chat.prompt([said("system", text), user(text)])
    assert BYTES.decode(ids).count(text) == 2 and ids.count(BYTES.end_think_id) == 0
    for text in ("a <think>b</think>c", "a</think>b", "<think>a"):  # nor those inside its answer
        ids = chat.sample([user(), assistant(text)])[0]
        assert BYTES.decode(ids).endswith(f"</think>{text}{SPECIAL[1]}")
    empty = chat.sample([user(), assistant("<think></think>2")])
    assert empty == chat.sample([user(), assistant("2", thought="")])


def test_who_speaks_last_decides_what_it_is_good_for():
    chat, asked, answered = Chat(BYTES), [user()], [user(), assistant()]
    told = "messages: the last one must be the"
    assert complaint(chat.prompt, answered).startswith(f"{told} user's")
    assert complaint(chat.sample, asked).startswith(f"{told} assistant's")
    assert chat.prompt(asked) and chat.sample(answered)


@pytest.mark.parametrize("tag", ["user_id", "assistant_id", "think_id", "end_think_id"])
def test_a_tokenizer_without_tags_is_one_line(tag, monkeypatch):
    t = Tokenizer.open("bytes")
    monkeypatch.setattr(t, tag, None)
    message = complaint(Chat, t)
    assert message.startswith("tokenizer is not valid: it lacks ")
    assert t.decode([getattr(BYTES, tag)]) in message
    assert Plain(t).prompt(QUESTION)  # which needs none
