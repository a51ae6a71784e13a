"""Conversations as tokens, thinking or not, in DeepSeek's template; and replies read back.

    BOS system <｜User｜> question <｜Assistant｜> <think> thought </think> answer EOS
    BOS system <｜User｜> question <｜Assistant｜> </think> answer EOS

One model answers in both ways, and the last token of the prompt decides which (DeepSeek-V3.1's
hybrid template): after <think> it thinks, after </think> it answers at once, and with neither the
model chooses. Earlier replies stand in the history without their thoughts but with the closing tag.

A base model has never seen a tag. R1-Zero asked it in plain text (arXiv 2501.12948, section 2.2.1);
we ask it in the form of the worked examples that it was trained on:

    3*7+5: 3*7=1+5=6 = 6        with a thought
    3*7+5 = 6                   without one
"""

import re
from typing import NamedTuple

from minids.base.fields import nearest
from minids.text.tokenizer import Tokenizer

MODES = ("think", "direct", "free")
# The template in transformers' language, for exports: `thinking` is the mode, true or false.
JINJA = """{{ bos_token }}{% for m in messages -%}
{% if m.role == 'user' %}{{ '<｜User｜>' + m.content + '<｜Assistant｜>' }}
{%- elif m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}
{%- if loop.last and m.reasoning_content is string %}{{ '<think>' + m.reasoning_content }}
{%- elif loop.last and parts | length > 1 %}{{ parts[0] }}{% endif %}
{{- '</think>' + parts[-1] + eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt and thinking is defined %}{{ '<think>' if thinking else '</think>' }}
{%- endif %}"""
THOUGHTS = ("thought", "reasoning_content")  # names of an assistant's thought in a message


class Reply(NamedTuple):
    """A model's reply, taken apart.

    thought: None if the model did not think; answer: None if the reply is malformed
    ended: whether the model ended it with EOS
    tokens: its length, with EOS and a tag that the prompt forced
    """

    thought: str | None
    answer: str | None
    ended: bool
    tokens: int


class Chat:
    """DeepSeek's template. Raises `ValueError` for a tokenizer without its tags."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = t = tokenizer
        if None in (t.bos_id, t.eos_id, t.user_id, t.assistant_id, t.think_id, t.end_think_id):
            raise ValueError("tokenizer is not valid: it lacks one of <｜User｜>, <｜Assistant｜>, "
                             "<think> and </think>")
        self.forced = {"think": [t.think_id], "direct": [t.end_think_id], "free": []}

    def prompt(self, messages: str | list[dict], mode: str = "think") -> list[int]:
        """Return the ids of a prompt, which the model continues.

        messages: a question, or [{"role": .., "content": ..}, ..]: optionally a system message,
            then user and assistant in turn, ending with the user; see `checked`
        mode: "think", "direct" or "free"
        Raises `ValueError` for another mode, and for messages that are not of this form.
        """
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r} is not valid: {nearest(mode, MODES)}it must be one "
                             f"of {', '.join(MODES)}")
        return self.turns(checked(messages, "user"))[0] + self.forced[mode]

    def sample(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole conversation and its loss mask.

        messages: as in `prompt`, but ending with the assistant, whose messages may have a "thought"
        The loss covers the assistant's tokens, tags and EOS included, except in earlier messages
        that had a thought: they stand in the history without it, and no model should learn to
        answer like that.
        """
        return self.turns(checked(messages, "assistant"))

    def turns(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """Return the ids of all turns, and their loss mask."""
        t = self.tokenizer
        ids, learnt = [t.bos_id], [False]
        for message in messages:
            text, last, learn = t.encode(message["content"]), message is messages[-1], False
            if message["role"] == "assistant":
                thought = message.get("thought")
                shown = [t.think_id, *t.encode(thought)] if thought is not None and last else []
                new = [*shown, t.end_think_id, *text, t.eos_id]
                learn = last or thought is None
            else:
                new = [t.user_id, *text, t.assistant_id] if message["role"] == "user" else text
            ids += new
            learnt += [learn] * len(new)
        return ids, learnt

    def read(self, ids: list[int], mode: str = "free") -> Reply:
        """Return the reply that the model generated after a prompt of this mode."""
        t, size = self.tokenizer, len(ids) + len(self.forced[mode])
        ids, ended = ended_by(self.forced[mode] + ids, t.eos_ids)
        end = ids.index(t.end_think_id) if t.end_think_id in ids else len(ids)
        thought = text_of(t, ids[1:end]) if ids[:1] == [t.think_id] else None
        closed = end < len(ids) and (end == 0 or thought is not None)
        return Reply(thought, text_of(t, ids[end + 1:]) if closed else None, ended, size)


class Plain:
    """The form of worked examples, for a base model."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.forced = {"think": ":", "direct": " =", "free": ""}

    def prompt(self, question: str, mode: str = "think") -> list[int]:
        """Return the ids of a prompt, which the model continues."""
        t = self.tokenizer
        return [t.bos_id, *t.encode(question), *t.encode(self.forced[mode])]

    def read(self, ids: list[int], mode: str = "free") -> Reply:
        """Return the reply that the model generated after a prompt of this mode."""
        t = self.tokenizer
        size, (ids, ended) = len(ids), ended_by(ids, t.eos_ids)
        text, thought, answer = text_of(t, ids), None, None
        text = "" if text is None else self.forced[mode] + text
        if text.startswith(" ="):
            answer = text[2:].strip()
        elif text.startswith(":"):
            before, equals, after = text[1:].rpartition(" = ")
            thought, answer = (before.strip(), after.strip()) if equals else (after, None)
        return Reply(thought, answer, ended, size)


TEMPLATES = {"chat": Chat, "plain": Plain}


def checked(messages: str | list[dict], last: str) -> list[dict]:
    """Return the messages with a role, a content and the assistant's thought each; checks the form.

    messages: a string is one question. The thought may also be called "reasoning_content", as in
        DeepSeek's API, or begin the content as <think>..</think>, as its models write
    last: the role of the last message
    Raises `ValueError` naming what is wrong: an unknown key too, unless it is null.
    """
    if isinstance(messages, str):
        messages = [dict(role="user", content=messages)]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: there are none")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"messages: number {i} is {message!r:.60}: it must be an object")
    given = [{key: value for key, value in m.items() if value is not None} for m in messages]
    body = given[1:] if given[0].get("role") == "system" else given
    for i, message in enumerate(body):
        wanted = ("user", "assistant")[i % 2]
        if message.get("role") != wanted:
            raise ValueError(f"messages: role {message.get('role')!r} is not valid at turn {i + 1}:"
                             f" it must be {wanted!r} (user and assistant in turn)")
    for message in given:
        valid = ["role", "content", *(THOUGHTS if message["role"] == "assistant" else [])]
        for name, text in ({"content": None} | message).items():
            if name not in valid:
                raise ValueError(f"messages: {name!r} is not valid in a message of the "
                                 f"{message['role']}: {nearest(name, valid)}valid are "
                                 f"{', '.join(valid)}")
            if not isinstance(text, str):
                raise ValueError(f"messages: {name} = {text!r:.60} is not valid: it must be a "
                                 "string")
    if not body:
        raise ValueError("messages: there is only a system message")
    if body[-1]["role"] != last:
        raise ValueError(f"messages: the last one must be the {last}'s")
    return [with_thought(message) for message in given]


def with_thought(message: dict) -> dict:
    """Return a message whose thought, if it is an assistant's and has one, is called so."""
    if message["role"] != "assistant":
        return message
    thoughts = [message[name] for name in THOUGHTS if name in message]
    if found := re.fullmatch("\\s*<think>(.*?)</think>(.*)", content := message["content"], re.S):
        thoughts, content = [*thoughts, found[1]], found[2]
    if len(thoughts) > 1:
        raise ValueError(f"messages: a message has {len(thoughts)} thoughts: thought, "
                         "reasoning_content and <think>..</think> are the same thing")
    return dict(role="assistant", content=content, thought=thoughts[0] if thoughts else None)


def ended_by(ids: list[int], eos_ids: list[int]) -> tuple[list[int], bool]:
    """Return the ids before the first EOS, and whether there is one."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    return ids[:end], end is not None


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str | None:
    """Return the text of the ids, or None if one is special or outside the vocabulary."""
    special = set(tokenizer.special.values())
    if any(token in special or not 0 <= token < tokenizer.vocab_size for token in ids):
        return None
    return tokenizer.decode(ids)
