"""Conversations as tokens: DeepSeek's turns, thinking or not, and replies read back.

    BOS system <｜User｜> question <｜Assistant｜> <think> thought </think> answer EOS
    BOS system <｜User｜> question <｜Assistant｜> </think> answer EOS

The same model answers in both ways, and the prompt's last token decides (DeepSeek-V3.1's hybrid
template): <think> makes it think, </think> makes it answer at once; left out, the model chooses. In
the history every reply is without its thought, and the closing tag stays. Each tag is one id,
placed by number: no text of a user can become one (`minids.text.tokenizer`).

A base model knows no tags. R1-Zero asked it in plain text (arXiv 2501.12948, section 2.2.1); ours
is asked in the form of the worked examples that it has read:

    3*7+5: 3*7=1+5=6 = 6        with a thought
    3*7+5 = 6                   without
"""

from typing import NamedTuple

from minids.base.fields import nearest
from minids.text.tokenizer import Tokenizer

MODES = ("think", "direct", "free")


class Reply(NamedTuple):
    """What a model answered.

    thought: None if it did not think; answer: None where the form is broken
    ended: whether it ended by itself; tokens: its length, EOS and a forced tag counted
    """

    thought: str | None
    answer: str | None
    ended: bool
    tokens: int


class Chat:
    """DeepSeek's template; raises `ValueError` for a tokenizer without its tags."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = t = tokenizer
        if None in (t.bos_id, t.eos_id, t.user_id, t.assistant_id, t.think_id, t.end_think_id):
            raise ValueError("tokenizer is not valid: it lacks one of <｜User｜>, <｜Assistant｜>, "
                             "<think> and </think>")
        self.forced = {"think": [t.think_id], "direct": [t.end_think_id], "free": []}

    def prompt(self, messages: str | list[dict], mode: str = "think") -> list[int]:
        """The ids that the model goes on from.

        messages: a question, or {"role": .., "content": ..} with the roles system (first, if at
            all), user and assistant by turns, a user's last
        mode: "think", "direct" or "free"
        """
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r} is not valid: {nearest(mode, MODES)}it must be one "
                             f"of {', '.join(MODES)}")
        messages = checked(messages)
        if messages[-1]["role"] != "user":
            raise ValueError("messages: the last one must be a user's, for the model to answer")
        return self.turns(messages)[0] + self.forced[mode]

    def sample(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """A whole conversation to learn from, and which of its tokens are to be learnt.

        messages: as above, but an assistant's last; an assistant's may have a "thought". Learnt
            are the assistant's tokens, its tags and EOS among them, of the last turn, and of those
            before it that had no thought: the others stand there without theirs, which nobody
            would have said.
        """
        messages = checked(messages)
        if messages[-1]["role"] != "assistant":
            raise ValueError("messages: the last one must be an assistant's, to learn from")
        return self.turns(messages)

    def turns(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """The ids of all turns, and whether each is to be learnt."""
        t = self.tokenizer
        ids, learnt = [t.bos_id], [False]
        for message in messages:
            text, last = t.encode(message["content"]), message is messages[-1]
            if message["role"] == "assistant":
                thought = message.get("thought")
                shown = [t.think_id, *t.encode(thought)] if thought is not None and last else []
                new = [*shown, t.end_think_id, *text, t.eos_id]
                learn = last or thought is None
            else:
                user = message["role"] == "user"
                new = [t.user_id, *text, t.assistant_id] if user else text
                learn = False
            ids += new
            learnt += [learn] * len(new)
        return ids, learnt

    def read(self, ids: list[int], mode: str = "free") -> Reply:
        """What the model wrote after a prompt of that mode."""
        t, size = self.tokenizer, len(ids) + len(self.forced[mode])
        ids, ended = ended_by(self.forced[mode] + ids, t.eos_id)
        if ids[:1] == [t.end_think_id]:
            thought, answer = None, ids[1:]
        elif ids[:1] == [t.think_id] and t.end_think_id in ids:
            end = ids.index(t.end_think_id)
            thought, answer = text_of(t, ids[1:end]), ids[end + 1:]
            if thought is None:
                return Reply(None, None, ended, size)
        else:
            thought = text_of(t, ids[1:]) if ids[:1] == [t.think_id] else None
            return Reply(thought, None, ended, size)
        return Reply(thought, text_of(t, answer), ended, size)


class Plain:
    """The form of worked examples, for a model that knows no tags."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.forced = {"think": ":", "direct": " =", "free": ""}

    def prompt(self, question: str, mode: str = "think") -> list[int]:
        """The ids that the model goes on from."""
        t = self.tokenizer
        return [t.bos_id, *t.encode(question), *t.encode(self.forced[mode])]

    def read(self, ids: list[int], mode: str = "free") -> Reply:
        """What the model wrote after a prompt of that mode."""
        t = self.tokenizer
        size, (ids, ended) = len(ids), ended_by(ids, t.eos_id)
        text = text_of(t, ids)
        if text is None:
            return Reply(None, None, ended, size)
        text = self.forced[mode] + text
        if text.startswith(" ="):
            return Reply(None, text[2:].strip(), ended, size)
        thought, equals, answer = text.removeprefix(":").rpartition(" = ")
        if not text.startswith(":") or not equals:
            return Reply(text[1:] if text.startswith(":") else None, None, ended, size)
        return Reply(thought.strip(), answer.strip(), ended, size)


TEMPLATES = {"chat": Chat, "plain": Plain}


def checked(messages: str | list[dict]) -> list[dict]:
    """The messages, after a look at roles, order and types; a text is one question."""
    if isinstance(messages, str):
        return [dict(role="user", content=messages)]
    if not messages:
        raise ValueError("messages: there are none")
    body = messages[1:] if messages[0].get("role") == "system" else messages
    for i, message in enumerate(body):
        wanted = ("user", "assistant")[i % 2]
        if message.get("role") != wanted:
            raise ValueError(f"messages: role {message.get('role')!r} is not valid at turn {i + 1}:"
                             f" it must be {wanted!r} (user and assistant by turns)")
    for message in messages:
        for name in ("content", "thought"):
            text = message.get(name, "" if name == "thought" else None)
            if not isinstance(text, str | None) or (name == "content" and text is None):
                raise ValueError(f"messages: {name} = {text!r} is not valid: it must be a text")
    if not body:
        raise ValueError("messages: there is a system's only")
    return messages


def ended_by(ids: list[int], eos_id: int) -> tuple[list[int], bool]:
    """The ids up to EOS, and whether there is one."""
    return (ids[:ids.index(eos_id)], True) if eos_id in ids else (ids, False)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str | None:
    """The text of the ids; None if one of them is special or in no vocabulary."""
    special = set(tokenizer.special.values())
    if any(token in special or not 0 <= token < tokenizer.vocab_size for token in ids):
        return None
    return tokenizer.decode(ids)
