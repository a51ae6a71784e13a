"""Bodies of requests: what is read, and what is refused by the field's name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from minids.serve import served
from minids.serve.asked import FIELDS, IGNORED, NEUTRAL, read_asked
from minids.serve.errors import Refused
from minids.serve.served import SMALLEST, Served, fills_in, name_of
from minids.text.chat import Chat
from minids.tokenizer import Tokenizer

T = Tokenizer.open("bytes")
ENGINE = SimpleNamespace(batch=SimpleNamespace(jobs=[None] * 4), max_len=100)
SERVED = Served("m", ENGINE, T, Chat(T), True, {"temperature": 0.6}, [], "fp", queue=2)
BASE = Served("base", ENGINE, T, None, False, {}, [], "fp", queue=2)
ASK = [{"role": "user", "content": "hi"}]


def ask(kind: str = "chat", served: Served = SERVED, **fields):
    own = dict(messages=ASK) if kind == "chat" else dict(prompt="hi")
    return read_asked(json.dumps(own | fields).encode(), kind, served)


def refusal(kind: str = "chat", served: Served = SERVED, raw: bytes = b"", **fields) -> tuple:
    """Return status, param and code of what is refused."""
    with pytest.raises(Refused) as refused:
        _ = read_asked(raw, kind, served) if raw else ask(kind, served, **fields)
    body = json.loads(refused.value.body())["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    assert "\n" not in body["message"]
    return refused.value.status, body["param"], body["code"]


def test_each_status_has_the_kind_of_error_that_clients_look_for():
    def kind(status: int) -> str:
        return json.loads(Refused(status, "no").body())["error"]["type"]

    assert {status: kind(status) for status in (401, 403, 404, 429)} == {
        401: "authentication_error", 403: "permission_error", 404: "not_found_error",
        429: "rate_limit_error"}
    assert {kind(status) for status in (400, 402, 413, 499)} == {"invalid_request_error"}
    assert {kind(status) for status in (500, 503, 504)} == {"server_error"}


def test_what_a_client_usually_sends():
    asked = ask(model="m", max_completion_tokens=7, temperature=0.2, top_p=0.9, n=3, seed=5,
                stop="x", stream=True, stream_options={"include_usage": True}, logprobs=True,
                top_logprobs=2, user="me", tools=[], presence_penalty=0.0, logit_bias=None)
    assert asked.prompts == [SERVED.chat.prompt("hi", "free")]
    assert asked.sampling == dict(temperature=0.2, top_p=0.9, top_k=0)
    assert (asked.max_tokens, asked.n, asked.seed, asked.stop) == (7, 3, 5, ("x",))
    assert asked.stream and asked.include_usage and asked.top_logprobs == 2
    plain = ask()
    assert plain.max_tokens == 100 - len(plain.prompts[0]) and plain.top_logprobs == -1
    assert plain.sampling["temperature"] == 0.6  # the folder's own default
    assert ask("text").max_tokens == 16 and ask("text").prompts == [[T.bos_id, *T.encode("hi")]]


@pytest.mark.parametrize("fields, mode", [
    ({}, "free"), ({"thinking": {"type": "enabled"}}, "think"),
    ({"reasoning_effort": "low"}, "think"),
    ({"thinking": {"type": "disabled"}}, "direct"), ({"reasoning_effort": "none"}, "direct"),
    ({"thinking": {"type": "enabled"}, "reasoning_effort": "high"}, "think")])
def test_thinking_is_what_the_prompt_ends_with(fields, mode):
    asked = ask(**fields)
    assert asked.mode == mode and asked.prompts == [SERVED.chat.prompt("hi", mode)]


def test_contents_of_every_form():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    system = [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Yes."}]
    history = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
               {"role": "assistant", "content": None, "reasoning_content": "c", "tool_calls": []}]
    asked = ask(messages=[*system, *history, {"role": "user", "content": parts, "name": "me"}])
    expected = [dict(role="system", content="Be brief.\n\nYes."),
                dict(role="user", content="a\n\nb"),
                dict(role="assistant", content="", reasoning_content="c"), *ASK]
    assert asked.prompts == [SERVED.chat.prompt(expected, "free")]


def test_tags_in_a_message_stay_text():
    text = "<｜User｜></think><｜end▁of▁sentence｜>"
    [prompt] = ask(messages=[{"role": "user", "content": text}]).prompts
    assert [token for token in prompt if token in T.special.values()] == [
        T.bos_id, T.user_id, T.assistant_id]


def test_prompts_of_completions():
    t = T
    two = [[t.bos_id, *t.encode("a")], [t.bos_id, *t.encode("bc")]]
    assert ask("text", prompt=["a", "bc"]).prompts == two
    assert ask("text", prompt=[0, 30, 31]).prompts == [[0, 30, 31]]
    assert ask("text", prompt=[[0, 30], [31]]).prompts == [[0, 30], [31]]
    assert ask("text", prompt="hi", echo=True).echo == ["hi"]
    assert ask("text", prompt="a", suffix="b").prompts == [
        [t.bos_id, t.fim_begin_id, *t.encode("a"), t.fim_hole_id, *t.encode("b"), t.fim_end_id]]
    assert ask("text", prompt="").prompts == [[t.bos_id]]
    assert ask("text", logprobs=0).top_logprobs == 0


VALUES = {
    "model": 5, "max_tokens": 0, "temperature": -1, "top_p": 0, "top_k": -1, "n": 0, "seed": 1.5,
    "stop": [""], "stream": "yes", "stream_options": {"include_usage": True}, "logprobs": "x",
    "experts": 1, "messages": [], "max_completion_tokens": True, "top_logprobs": 5,
    "thinking": {"type": "maybe"}, "reasoning_effort": "hard", "prompt": [], "echo": "x",
    "suffix": 5}


@pytest.mark.parametrize("kind, name", [(k, name) for k in FIELDS for name in FIELDS[k]])
def test_each_field_is_refused_by_its_name(kind, name):
    status, param, _ = refusal(kind, **{name: VALUES[name]})
    assert (status, param) == (400, name)


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_would_change_the_result_is_refused_by_name(name):
    assert refusal(**{name: [5]}) == (400, name, "unsupported_parameter")
    for value in NEUTRAL[name]:
        ask(**{name: value})


@pytest.mark.parametrize("fields, found", [
    (dict(temprature=1), (400, "temprature", "unknown_parameter")),
    (dict(model="gpt-4"), (404, "model", "model_not_found")),
    (dict(max_tokens=100), (400, "max_tokens", "context_length_exceeded")),
    (dict(messages=[{"role": "user", "content": "x" * 200}]),
     (400, "messages", "context_length_exceeded")),
    (dict(temperature=2.1), (400, "temperature", None)), (dict(n=5), (400, "n", None)),
    (dict(stop=["x"] * 17), (400, "stop", None)), (dict(stop="x" * 300), (400, "stop", None)),
    (dict(max_tokens=3, max_completion_tokens=4), (400, "max_tokens", None)),
    (dict(thinking={"type": "enabled"}, reasoning_effort="none"), (400, "reasoning_effort", None)),
    (dict(messages=ASK * 1001), (400, "messages", None)),
    (dict(messages=["hi"]), (400, "messages", None)),
    (dict(messages=[{"role": "tool", "content": "x"}]), (400, "messages", None)),
    (dict(messages=[{"role": "assistant", "content": "x"}]), (400, "messages", None)),
    (dict(messages=[*ASK, {"role": "system", "content": "x"}, *ASK]), (400, "messages", None)),
    (dict(messages=[{"role": "user", "content": 5}]), (400, "messages", None)),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
     (400, "messages", None)),
    (dict(messages=[{"role": "assistant", "tool_calls": [{}]}, *ASK]),
     (400, "messages", "unsupported_parameter"))])
def test_bad_conversations_are_refused(fields, found):
    assert refusal(**fields) == found


@pytest.mark.parametrize("fields, found", [
    (dict(prompt=["a"] * 7), (400, "prompt", None)), (dict(prompt=[320]), (400, "prompt", None)),
    (dict(prompt=["a", 5]), (400, "prompt", None)), (dict(prompt=[[]]), (400, "prompt", None)),
    (dict(prompt=["a"] * 4, n=2), (400, "n", None)), (dict(prompt=[True]), (400, "prompt", None)),
    (dict(prompt="x" * 99), (400, "prompt", "context_length_exceeded")),
    (dict(logprobs=1, echo=True), (400, "echo", "unsupported_parameter")),
    (dict(prompt=[5], suffix="x"), (400, "suffix", "unsupported_parameter"))])
def test_bad_completions_are_refused(fields, found):
    assert refusal("text", **fields) == found


def test_a_base_model_has_no_conversations_and_fills_nothing_in():
    assert refusal(served=BASE) == (400, "messages", "no_chat_template")
    assert refusal("text", BASE, suffix="x") == (400, "suffix", "unsupported_parameter")
    assert ask("text", BASE).prompts


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"temperature": NaN}', b'{"temperature": Infinity}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": [{"role": "user", "content": "\xff"}]}'])
def test_bodies_that_are_no_json_are_refused(raw):
    assert refusal(raw=raw or b" ") == (400, None, None)


@pytest.mark.parametrize("fields, name", [
    (dict(prompt="a\udc00"), "prompt"), (dict(prompt=["a", "\udc00"]), "prompt"),
    (dict(prompt="a", suffix="\udc00"), "suffix")])
def test_text_that_a_vocabulary_cannot_write_is_refused(fields, name, monkeypatch):
    def encode(text: str) -> list[int]:
        if "\udc00" in text:
            raise ValueError("byte 0xed has no token in this vocabulary")
        return [5]

    monkeypatch.setattr(T, "encode", encode, raising=False)
    assert refusal("text", **fields) == (400, name, None)


def test_infinite_numbers_are_refused():
    assert refusal(raw=b'{"messages": [], "temperature": 1e999}')[:2] in [
        (400, "messages"), (400, "temperature")]
    assert refusal("text", raw=b'{"prompt": "x", "temperature": 1e999}')[:2] == (400, "temperature")


def test_a_run_fills_in_if_it_learnt_to(tmp_path):
    def answer(begin: int | None, **train) -> bool:
        tags = SimpleNamespace(fim_begin_id=begin, fim_hole_id=6, fim_end_id=7)
        return fills_in(SimpleNamespace(tokenizer=tags, path=tmp_path, config=dict(train=train)))

    assert answer(5, fim_rate=0.1)
    assert not (answer(None, fim_rate=0.1) or answer(5, fim_rate=0.0) or answer(5))


def test_a_name_is_the_folders():
    assert [name_of(Path(p)) for p in ("runs/r1/final", "runs/tiny", "data/r1/rl", "/x")] == [
        "r1-final", "tiny", "r1-rl", "x"]
    assert len(set(IGNORED) & set(NEUTRAL)) == 0


@pytest.mark.parametrize("config, talking, size, task", [
    ({"grpo": {"task": "countdown:3"}}, True, 9, "countdown:3"),
    ({"sft": {"data": "task:calculator:2"}}, True, 9, "calculator:2"),
    ({"sft": {"data": "jsonl:x"}}, True, 9, None), ({"grpo": {"task": "gsm8k"}}, True, 9, None),
    ({}, True, SMALLEST, "calculator"), ({}, False, SMALLEST, None), ({}, True, 9, None),
    ({"grpo": {"task": "gsm8k"}}, True, SMALLEST, None)])
def test_the_pages_questions_are_of_the_runs_task(monkeypatch, config, talking, size, task):
    """A folder without a run that talks in bytes is taken for one of `minids.r1`."""
    problems = SimpleNamespace(some=lambda count, side, seed: [SimpleNamespace(
        question=f"{side} {seed}")] * count)
    opened = []
    monkeypatch.setattr(served, "open_task", lambda name: opened.append(name) or problems)
    monkeypatch.setattr(served, "talks", lambda source: talking)
    source = SimpleNamespace(config=config, tokenizer=SimpleNamespace(n_tokens=size))
    found = served.questions_for(source, "")
    assert opened == [task] * bool(task) and found == ["held-out 0"] * (
        served.QUESTIONS if task else 0)
    assert served.questions_for(source, "countdown") and opened[-1] == "countdown"
