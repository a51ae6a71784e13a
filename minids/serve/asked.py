"""Parse a request: check its JSON body field by field, and return prompts and settings.

A field that would change the result and is not supported is refused by name, and so is
an unknown one: a misspelt `temperature` would otherwise be ignored in silence.
"""

import json
import math
import secrets
from dataclasses import dataclass, field
from typing import Any

from minids.base.fields import nearest
from minids.serve.errors import Refused, invalid
from minids.serve.served import Served
from minids.text.tokenizer import Tokenizer

SHARED = ("model", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream",
          "stream_options", "logprobs", "experts")
FIELDS = {
    "chat": (*SHARED, "messages", "max_completion_tokens", "top_logprobs", "thinking",
             "reasoning_effort"),
    "text": (*SHARED, "prompt", "echo", "suffix")}
# Without effect on the reply.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention")
# Supported only where they change nothing: these values, or null.
NEUTRAL = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "repetition_penalty": (1,), "logit_bias": ({},), "modalities": (["text"],), "min_p": (0,),
    "best_of": (1,), "audio": (), "prediction": (), "web_search_options": (), "verbosity": ()}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
STOPS, LONGEST_STOP = 16, 256
MESSAGES = 1000
TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Asked:
    """A request that is valid; the names are those of the API.

    kind: "chat" or "text"; prompts: ids of each
    echo: of a completion, by prompt, the text before its reply
    mode: of the reply's tags, as in `minids.text.replies`
    top_logprobs: likeliest tokens to name; -1: no log-probabilities
    """

    kind: str
    prompts: list[list[int]]
    mode: str
    max_tokens: int
    sampling: dict[str, Any]
    seed: int
    stop: tuple[str, ...]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int = -1
    experts: bool = False
    echo: list[str] = field(default_factory=list)


class Body:
    """The fields of a body; a null is an absent field."""

    def __init__(self, raw: bytes, kind: str):
        self.given = {k: v for k, v in parsed(raw).items() if v is not None}
        known = [*FIELDS[kind], *IGNORED, *NEUTRAL]
        for name, value in self.given.items():
            if name not in known:
                raise invalid(name, f"unknown field; {nearest(name, known)}"
                                    f"known are {', '.join(FIELDS[kind])}", "unknown_parameter")
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise invalid(name, "this server does not support it", "unsupported_parameter")

    def get(self, name: str, kind: type | tuple, default, what: str):
        """Return a field of one of these types; true is no number."""
        value = self.given.get(name, default)
        if value is not default and (not isinstance(value, kind)
                                     or isinstance(value, bool) and kind is not bool):
            raise invalid(name, f"it must be {what}")
        return value

    def number(self, name: str, default, low: float, high: float, whole: bool = True):
        """Return a number within its bounds."""
        kind, what = (int, "a whole number") if whole else ((int, float), "a number")
        what = f"{what} from {low} to {high}"
        value = self.get(name, kind, default, what)
        if value is not default and not (math.isfinite(value) and low <= value <= high):
            raise invalid(name, f"{value} is not valid: it must be {what}")
        return value


def parsed(raw: bytes) -> dict:
    """Return the object that a body holds."""
    def refuse(word: str):
        raise ValueError(f"{word} is no number in JSON")

    try:
        found = json.loads(raw.decode(), parse_constant=refuse)
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(400, "the body must be a JSON object")
    return found


def read_asked(raw: bytes, kind: str, served: Served) -> Asked:
    """Return what a body asks for; raise `Refused` naming the first field that is not valid."""
    body = Body(raw, kind)
    name = body.get("model", str, served.name, "a string")
    if name != served.name:
        raise Refused(404, f"The model {name!r:.80} does not exist; this server has "
                           f"{served.name!r}", "model", "model_not_found")
    mode, echo = "", []
    if kind == "chat":
        mode = chat_mode(body)
        prompts = [chat_prompt(body, mode, served)]
    else:
        prompts, echo = text_prompts(body, served)
    n, most = body.number("n", 1, 1, served.rows), served.rows + served.queue
    if n * len(prompts) > most:
        raise invalid("n" if n > 1 else "prompt", f"{n * len(prompts)} replies are too many: at "
                                                  f"most {most} fit the cache and the queue")
    stream = body.get("stream", bool, False, "true or false")
    return Asked(
        kind, prompts, mode, max_tokens(body, kind, prompts, served), sampling(body, served),
        body.number("seed", secrets.randbits(32), -2 ** 63, 2 ** 64), stops(body), n, stream,
        include_usage(body, stream), top_logprobs(body, kind),
        body.get("experts", bool, False, "true or false"), echo)


def sampling(body: Body, served: Served) -> dict[str, Any]:
    """Return how tokens are drawn, by the names of the engine."""
    default = dict(temperature=1.0, top_p=1.0, top_k=0) | served.defaults
    top_p = body.number("top_p", default["top_p"], 0, 1, whole=False)
    if top_p == 0:
        raise invalid("top_p", "0 is not valid: it must be above 0 and at most 1")
    return dict(temperature=body.number("temperature", default["temperature"], 0, 2, whole=False),
                top_p=top_p, top_k=body.number("top_k", default["top_k"], 0, 2 ** 31))


def max_tokens(body: Body, kind: str, prompts: list[list[int]], served: Served) -> int:
    """Return the length of a reply, at most, tokens."""
    longest, source = max(map(len, prompts)), "messages" if kind == "chat" else "prompt"
    room = served.max_len - longest
    given = [name for name in ("max_completion_tokens", "max_tokens") if name in body.given]
    if len(given) == 2 and len({body.given[name] for name in given}) == 2:
        raise invalid("max_tokens", "it differs from max_completion_tokens")
    wanted = (body.number(given[0], None, 1, 2 ** 31) if given
              else max(room, 1) if kind == "chat" else 16)
    if wanted > room:
        raise Refused(
            400, f"This model's maximum context length is {served.max_len} tokens. However, you "
                 f"requested {longest + wanted} tokens ({longest} in the {source}, {wanted} in the "
                 "completion).", source if room < 1 or not given else given[0],
            "context_length_exceeded")
    return wanted


def stops(body: Body) -> tuple[str, ...]:
    """Return the strings that end a reply."""
    what = f"a string, or a list of at most {STOPS}, of 1 to {LONGEST_STOP} characters each"
    found = body.get("stop", (str, list), [], what)
    found = [found] if isinstance(found, str) else found
    if len(found) > STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP
                                     for stop in found):
        raise invalid("stop", f"it must be {what}")
    return tuple(found)


def include_usage(body: Body, stream: bool) -> bool:
    """Return whether a stream ends with the usage."""
    options = body.get("stream_options", dict, {}, "an object")
    if options and not stream:
        raise invalid("stream_options", "it is allowed only where stream is true")
    usage = options.get("include_usage", False)
    if set(options) - {"include_usage", "include_obfuscation"} or not isinstance(usage, bool):
        raise invalid("stream_options", "it must be {\"include_usage\": true or false}")
    return usage


def top_logprobs(body: Body, kind: str) -> int:
    """Return how many of the likeliest tokens to name; -1: no log-probabilities."""
    if kind == "text":
        return body.number("logprobs", -1, 0, TOP_LOGPROBS)
    count = body.number("top_logprobs", 0, 0, TOP_LOGPROBS)
    if body.get("logprobs", bool, False, "true or false"):
        return count
    if "top_logprobs" in body.given:
        raise invalid("top_logprobs", "it is allowed only where logprobs is true")
    return -1


def chat_mode(body: Body) -> str:
    """Return whether the reply thinks: DeepSeek's `thinking`, or `reasoning_effort`."""
    thinking = body.get("thinking", dict, {}, '{"type": "enabled" or "disabled"}').get("type")
    if "thinking" in body.given and thinking not in ("enabled", "disabled"):
        raise invalid("thinking", 'it must be {"type": "enabled" or "disabled"}')
    effort = body.get("reasoning_effort", str, None, f"one of {', '.join(EFFORTS)}")
    if effort not in (None, *EFFORTS):
        raise invalid("reasoning_effort", f"{effort!r:.40} is not valid: it must be one of "
                                          f"{', '.join(EFFORTS)}")
    asked = {thinking and thinking == "enabled", effort and effort != "none"} - {None}
    if len(asked) == 2:
        raise invalid("reasoning_effort", "it contradicts thinking")
    return {(): "free", (True,): "think", (False,): "direct"}[tuple(asked)]


def chat_prompt(body: Body, mode: str, served: Served) -> list[int]:
    """Return the ids of a conversation."""
    if served.chat is None:
        raise invalid("messages", f"{served.name} has no chat template: it was not trained on "
                                  "conversations; use /v1/completions", "no_chat_template")
    messages = body.get("messages", list, None, "a list of messages")
    if not messages or len(messages) > MESSAGES:
        raise invalid("messages", f"it must be a list of 1 to {MESSAGES} messages")
    try:
        return served.chat.prompt(in_turns([plain(message) for message in messages]), mode)
    except ValueError as error:
        raise Refused(400, str(error), "messages") from None


def plain(message) -> dict:
    """Return a message whose content is one text."""
    if not isinstance(message, dict):
        raise invalid("messages", "each message must be an object")
    message = {key: value for key, value in message.items() if key not in ("name", "refusal")}
    if message.pop("tool_calls", None):
        raise invalid("messages", "tool_calls: this server does not support tools",
                      "unsupported_parameter")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise invalid("messages", f"role {role!r:.40} is not valid: it must be system, developer, "
                                  "user or assistant")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text"
                   and isinstance(part.get("text"), str) for part in content):
            raise invalid("messages", 'the parts of a content must be {"type": "text", "text": ..}')
        content = "".join(part["text"] for part in content)
    role = "system" if role == "developer" else role
    return message | dict(role=role, content="" if content is None else content)


def in_turns(messages: list[dict]) -> list[dict]:
    """Return messages in which no role speaks twice in a row: such texts are joined."""
    joined: list[dict] = []
    for message in messages:
        before = joined[-1] if joined else {}
        both = [before.get("content"), message["content"]]
        if (message["role"] == before.get("role") != "assistant"
                and all(isinstance(text, str) for text in both)):
            joined[-1] = before | dict(content="\n\n".join(both))
        else:
            joined.append(message)
    return joined


def encoded(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """Return the ids of a field's text; some vocabularies cannot write all of what JSON can."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise invalid(name, str(error)) from None


def text_prompts(body: Body, served: Served) -> tuple[list[list[int]], list[str]]:
    """Return the ids of each prompt, and what its reply begins with."""
    t, what = served.tokenizer, "a string, strings, token ids, or lists of token ids"
    given = body.get("prompt", (str, list), None, what)
    if isinstance(given, str) or given and all(type(token) is int for token in given):
        given = [given]
    if not given:
        raise invalid("prompt", f"it must be {what}")
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append([t.bos_id, *encoded(t, prompt, "prompt")])
        elif (isinstance(prompt, list) and prompt
              and all(type(token) is int and 0 <= token < t.vocab_size for token in prompt)):
            prompts.append(prompt)
        else:
            raise invalid("prompt", f"it must be {what}; ids are 0 to {t.vocab_size - 1}")
    suffix = body.get("suffix", str, "", "a string")
    if suffix:
        if not served.fills_in or not all(isinstance(prompt, str) for prompt in given):
            raise invalid("suffix", f"{served.name} was not trained to fill in the middle"
                          if not served.fills_in else "the prompt must be a string",
                          "unsupported_parameter")
        after = [t.fim_hole_id, *encoded(t, suffix, "suffix"), t.fim_end_id]
        prompts = [[t.bos_id, t.fim_begin_id, *prompt[1:], *after] for prompt in prompts]
    echo = body.get("echo", bool, False, "true or false")
    if echo and "logprobs" in body.given:
        raise invalid("echo", "log-probabilities of the prompt are not supported",
                      "unsupported_parameter")
    texts = [p if isinstance(p, str) else t.decode(p) for p in given]
    return prompts, texts if echo else [""] * len(prompts)
