"""The server's addresses, shapes and streams, and clients that leave, over a real connection."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
from running import LONGEST, ROOT, running, until

from minids.generate import generate
from minids.infer.batch import Batch
from minids.serve.__main__ import ServeArgs, bind, listen
from minids.text.chat import Chat

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

QUESTION = "3*7+5-2*4+1*3"
JSON = {"content-type": "application/json"}
ASK = dict(messages=[dict(role="user", content=QUESTION)], temperature=0)


@pytest.fixture(scope="module")
def server():
    with running(rows=4, queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=LONGEST) as made:
        yield made


def chat(client, **fields) -> dict:
    answer = client.post("/v1/chat/completions", json=ASK | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client, path: str = "/v1/chat/completions", **fields) -> list[dict]:
    """Return the chunks of a stream, which must end with [DONE]."""
    own = ASK if "chat" in path else {}
    with client.stream("POST", path, json=own | dict(stream=True) | fields) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def error(answer, status: int, param=None, code=None) -> dict:
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert list(found) == ["error"] and set(found["error"]) == {"message", "type", "param", "code"}
    assert (found["error"]["param"], found["error"]["code"]) == (param, code)
    assert "Traceback" not in answer.text
    return found["error"]


def test_addresses(client):
    for start in ("", "/v1"):
        [model] = client.get(f"{start}/models").json()["data"]
        assert model["id"] == "r1-rl" and model["object"] == "model" and model["chat"]
        assert client.get(f"{start}/models/r1-rl").json() == model
    assert len(model["questions"]) == 4 and model["max_model_len"] == 256
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["cache_bytes"] == 4 * 256 * 512
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    error(client.get("/v1/models/other"), 404, "model", "model_not_found")
    error(client.get("/v1/nothing"), 404)
    error(client.get("/v1/chat/completions"), 405)


def test_a_reply_is_that_of_generate(server, client):
    run, mode = server.served, "think"
    prompt = Chat(run.tokenizer).prompt(QUESTION, mode)
    ids = generate(server.engine.batch.model, [prompt], 100, eos_id=run.tokenizer.eos_ids).tokens[0]
    reply = Chat(run.tokenizer).read(ids, mode)
    found = chat(client, thinking=dict(type="enabled"))
    [choice] = found["choices"]
    assert choice["message"] == dict(role="assistant", content=reply.answer, refusal=None,
                                     reasoning_content=reply.thought)
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    thinking = ids.index(run.tokenizer.end_think_id) + 1
    usage = found["usage"]
    assert usage["completion_tokens_details"] == dict(reasoning_tokens=thinking)
    assert usage["completion_tokens"] == len(ids) and usage["prompt_tokens"] == len(prompt)
    assert usage["total_tokens"] == len(ids) + len(prompt)
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    direct = chat(client, thinking=dict(type="disabled"))
    assert "reasoning_content" not in direct["choices"][0]["message"]
    assert direct["usage"]["completion_tokens_details"] == dict(reasoning_tokens=0)


def test_a_thought_that_is_cut_off_is_all_thought(client):
    [choice] = chat(client, reasoning_effort="high", max_tokens=5)["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
    assert len(choice["message"]["reasoning_content"]) == 5


def test_the_order_of_a_stream(client):
    whole = chat(client)["choices"][0]["message"]
    chunks = events(client, stream_options=dict(include_usage=True))
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *deltas, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 5
    assert all(c["usage"] is None for c in deltas)
    assert deltas[0]["choices"][0]["delta"] == dict(role="assistant", content="")
    assert deltas[-1]["choices"][0]["delta"] == {}
    assert [c["choices"][0]["finish_reason"] for c in deltas] == [*[None] * (len(deltas) - 1),
                                                                 "stop"]
    kinds = [[*c["choices"][0]["delta"]] for c in deltas[1:-1]]
    assert all(len(kind) == 1 for kind in kinds)
    assert [a for a, b in pairwise([*kinds, [None]]) if a != b] == [
        ["reasoning_content"], ["content"]]
    for name in ("reasoning_content", "content"):
        text = "".join(c["choices"][0]["delta"].get(name, "") for c in deltas)
        assert text == whole[name]
    assert "usage" not in events(client)[0]


def test_several_choices_come_by_index(client):
    fields = dict(n=3, temperature=2, seed=7)
    whole = [c["message"] for c in chat(client, **fields)["choices"]]
    alone = [chat(client, **fields | dict(n=1, seed=7 + i))["choices"][0]["message"]
             for i in range(3)]
    assert whole == alone and len({str(message) for message in whole}) > 1
    chunks = events(client, **fields)
    for i in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["delta"].get("content", "") for c in own) == whole[i]["content"]
        assert own[-1]["finish_reason"] in ("stop", "length")
    order = [c["choices"][0]["index"] for c in chunks[3:]]
    assert order != sorted(order)  # they come as they are written


def test_log_probabilities(client):
    chunks = events(client, logprobs=True, top_logprobs=2, experts=True)
    whole = chat(client, logprobs=True, top_logprobs=2, experts=True)["choices"][0]
    for name in ("content", "reasoning_content"):
        entries = whole["logprobs"][name]
        assert "".join(e["token"] for e in entries) == whole["message"][name]
        assert [e for c in chunks if (found := c["choices"][0]["logprobs"])
                for e in found.get(name) or []] == entries
        for entry in entries:
            assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
            assert len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0
            assert len(entry["experts"]) == 1 and len(entry["experts"][0]) == 2
            assert bytes(entry["bytes"]).decode() == entry["token"]


def alike(a, b) -> bool:
    """Return whether two JSON values are equal, numbers up to FP32's rounding in another batch."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return abs(a - b) < 1e-3 if isinstance(a, float) else a == b


def whole_of(chunks: list[dict], chat: bool) -> list[dict]:
    """Return the choices that a stream told in pieces, in the form of a whole reply."""
    found: dict[int, dict] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        own = found.setdefault(choice["index"], dict(texts={}, logprobs={}, reason=None))
        assert own["reason"] is None  # nothing comes after the reason
        own["reason"] = choice["finish_reason"]
        for name, text in (choice["delta"] if chat else dict(text=choice["text"])).items():
            own["texts"][name] = own["texts"].get(name, "") + text
        for name, values in (choice["logprobs"] or {}).items():
            own["logprobs"].setdefault(name, []).extend(values or [])
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize("fields", [
    dict(n=3, temperature=1.5, seed=1, logprobs=True, top_logprobs=2, stop=["1", "25"]),
    dict(n=2, temperature=2, seed=2, logprobs=True, reasoning_effort="high", max_tokens=9),
    dict(reasoning_effort="none", logprobs=True, experts=True),
    dict(prompt=["1+1", "3*\u00e9"], n=2, logprobs=3, stop=["+2", "="], temperature=1, seed=3),
    dict(prompt="3*7+5: 3*7=", logprobs=0, stop="1+5=6", temperature=0, max_tokens=40),
    dict(prompt="1", logprobs=2, temperature=2, seed=8, max_tokens=60),
    dict(prompt=["1", "2"], echo=True, temperature=2, seed=8)])
def test_a_stream_says_what_the_whole_reply_says(client, fields):
    kind = "text" if "prompt" in fields else "chat"
    path, own = (("/v1/completions", {}) if kind == "text" else ("/v1/chat/completions", ASK))
    whole = client.post(path, json=own | fields).json()
    chunks = events(client, path, stream_options=dict(include_usage=True), **fields)
    told = whole_of(chunks, kind == "chat")
    assert len(told) == len(whole["choices"]) == fields.get("n", 1) * (
        len(fields["prompt"]) if isinstance(fields.get("prompt"), list) else 1)
    for choice, pieces in zip(whole["choices"], told, strict=True):
        assert choice["finish_reason"] == pieces["reason"]
        said = choice["message"] if kind == "chat" else dict(text=choice["text"])
        for mine, its in ((pieces["texts"], said), (pieces["logprobs"], choice["logprobs"] or {})):
            assert alike({k: v for k, v in mine.items() if v}, {k: v for k, v in its.items() if v})
        if kind == "text" and choice["logprobs"]:
            for token, at in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"],
                                 strict=True):
                assert "\ufffd" in token or choice["text"][at:].startswith(token)
    cached = whole["usage"].pop("prompt_tokens_details")
    assert chunks[-1]["usage"].pop("prompt_tokens_details").keys() == cached.keys()
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["usage"]["completion_tokens"] >= len(told)


def test_completions(client):
    ask = dict(prompt="1+1", temperature=0, max_tokens=6)
    found = client.post("/completions", json=ask | dict(logprobs=1)).json()
    [choice] = found["choices"]
    assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 1
    echo = client.post("/completions", json=ask | dict(echo=True)).json()["choices"][0]
    assert echo["text"] == "1+1" + choice["text"]
    many = client.post("/completions", json=ask | dict(prompt=["1+1", [0, 30], "2"], n=1)).json()
    assert [c["index"] for c in many["choices"]] == [0, 1, 2]
    assert many["choices"][0]["text"] == choice["text"]
    chunks = events(client, "/v1/completions", **ask)
    pieces = [c["choices"][0]["text"] for c in chunks]
    assert "".join(pieces) == choice["text"] and all(pieces[:-1])  # the last has the reason
    [first, *_] = events(client, "/v1/completions", **ask, echo=True)
    assert first["choices"][0]["text"] == "1+1"
    stop = choice["text"][2:4]
    cut = client.post("/completions", json=ask | dict(stop=[stop])).json()["choices"][0]
    assert cut["text"] == choice["text"][:choice["text"].find(stop)]
    assert cut["finish_reason"] == "stop"
    error(client.post("/completions", json=ask | dict(suffix="x")), 400, "suffix",
          "unsupported_parameter")


def test_sixteen_at_once_get_what_they_get_alone(client, server):
    fields = [dict(temperature=1.0, seed=i, max_tokens=20) for i in range(8)]
    alone = [chat(client, **f)["choices"] for f in fields]
    with ThreadPoolExecutor(8) as pool, server.standing():
        asked = [pool.submit(chat, client, **f) for f in fields]
        server.asked(8)
        server.still.set()
        assert [reply.result()["choices"] for reply in asked] == alone
    assert max(len(step.wrote) for step in server.engine.batch.log) == 4


def test_a_full_queue_says_when_to_come_back(client, server):
    with server.standing(), ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(chat, client) for _ in range(8)]
        server.asked(8)
        answer = client.post("/v1/chat/completions", json=ASK)
        error(answer, 429, code="rate_limit_exceeded")
        assert int(answer.headers["retry-after"]) >= 1
        server.still.set()
        assert len({str(reply.result()["choices"]) for reply in asked}) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_before_the_first_token_frees_the_place(client, server, stream):
    body = json.dumps(ASK | dict(stream=stream)).encode()
    with server.standing():
        wrote = sum(len(step.wrote) for step in server.engine.batch.log)
        gone = socket.create_connection(client.base_url.netloc.decode().split(":"))
        gone.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                     b"application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        batch = server.engine.batch
        until(lambda: batch.waiting)
        [job] = batch.waiting
        gone.close()
        until(lambda: job.cancelled)
    assert sum(len(step.wrote) for step in batch.log) == wrote


def test_who_leaves_a_stream_midway_frees_the_row(client, server):
    with server.standing_after(3) as stands:
        with client.stream("POST", "/v1/chat/completions", json=ASK | dict(stream=True)) as answer:
            lines = filter(None, answer.iter_lines())
            for _ in range(3):  # the role, and what followed the tag
                next(lines)
            stands()
            [job] = filter(None, server.engine.batch.jobs)
        until(lambda: job.cancelled)
    server.ended()
    assert job.written == 3 and chat(client)["choices"][0]["finish_reason"] == "stop"


def test_a_worker_that_fails_on_one_goes_on_with_the_others(client, server, monkeypatch):
    draw = Batch.give

    def give(self, jobs, *found):
        if any(len(job.request.prompt) == 6 and job.written == 2 for job in jobs):
            for job in jobs:
                if len(job.request.prompt) == 6:
                    object.__setattr__(job.request, "take", lambda token: 1 / 0)
        draw(self, jobs, *found)

    expected = chat(client)["choices"]
    monkeypatch.setattr(Batch, "give", give)
    bad = dict(messages=[dict(role="user", content="abc")])
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(chat, client) for _ in range(3)]
        failed = client.post("/v1/chat/completions", json=bad | dict(max_tokens=50))
        assert all(reply.result()["choices"] == expected for reply in good)
    assert "division" not in error(failed, 500, code="internal_error")["message"]
    with client.stream("POST", "/v1/chat/completions", json=bad | dict(stream=True)) as answer:
        last = [line for line in answer.iter_lines() if line][-1]
    assert json.loads(last[6:])["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["in the body", "after the body", "in the reply"])
def test_at_no_moment_is_leaving_an_error(server, moment, stream):
    """The application itself: what it raises would be a traceback in the server's log."""
    from minids.serve.app import Limits, make_app

    app, sent, body = make_app(server.served, Limits()), [], json.dumps(ASK | dict(stream=stream))
    part = dict(type="http.request", body=body.encode(), more_body=moment == "in the body")
    asked = [part | (dict(body=part["body"][:9]) if part["more_body"] else {})]

    async def receive() -> dict:
        if asked:
            return asked.pop()
        while moment == "in the reply" and len(sent) < 2 and stream:
            await asyncio.sleep(0.001)
        return dict(type="http.disconnect")

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = dict(type="http", method="POST", path="/v1/chat/completions", headers=headers,
                 query_string=b"", root_path="")
    async def leave() -> None:
        async with asyncio.timeout(LONGEST):
            await app(scope, receive, send)

    with server.standing():  # which waits at its end until nobody is served
        asyncio.run(leave())
    if moment == "in the reply" and stream:
        assert sent[0]["status"] == 200 and b"assistant" in sent[1]["body"]
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_connection_goes_on_after_each_refusal(server, client):
    """Bodies that nobody read must not be taken for the next request."""
    line = http.client.HTTPConnection(client.base_url.host, client.base_url.port,
                                     timeout=LONGEST)
    body = json.dumps(ASK | dict(max_tokens=2)).encode()
    first = None
    for method, path, send, headers, status in (
            ("POST", "/v1/chat/completions", body, JSON, 200), ("HEAD", "/health", None, {}, 200),
            ("POST", "/v1/nothing", body * 50, JSON, 404), ("HEAD", "/", None, {}, 200),
            ("POST", "/v1/models", body * 50, JSON, 405), ("GET", "/v1/completions", None, {}, 405),
            ("OPTIONS", "/v1/completions", None, {}, 405),
            ("POST", "/v1/chat/completions", body * 50, JSON | {"host": "evil.example"}, 403),
            ("POST", "/v1/chat/completions", b"{", JSON, 400),
            ("POST", "/v1/chat/completions", body, {}, 415),
            ("POST", "/v1/chat/completions", body, {"content-type": "Application/JSON"}, 200)):
        line.request(method, path, send, headers)
        answer = line.getresponse()
        said = answer.read()
        assert answer.status == status, (method, path, said)
        first = first or line.sock
        assert line.sock is first and (not said if method == "HEAD" else said)
        if status >= 400:
            assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}
        if status == 405:
            assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]
    line.close()


def test_headers_that_are_too_large_end_one_connection_only(client):
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port)) as asked:
        asked.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        with contextlib.suppress(OSError):  # it may have closed before all is sent
            asked.sendall(b"x" * 200_000 + b"\r\n\r\n")
        with contextlib.suppress(OSError):
            assert asked.recv(1000).split(b" ")[1] in (b"400", b"431")
    assert client.get("/health").status_code == 200


def test_bodies_that_are_too_large(client):
    def hundred_megabytes():
        yield from [b" " * 2 ** 20] * 100

    for body in (b'{"user": "%s"}' % (b"x" * 2 ** 20), hundred_megabytes()):
        answer = client.post("/v1/chat/completions", content=body, headers=JSON)
        error(answer, 413, code="body_too_large")
    error(client.post("/v1/chat/completions", content=b"{}"), 415, code="content_type")
    error(client.post("/v1/chat/completions", content=b"{", headers=JSON), 400)


@pytest.mark.parametrize("host, status", [
    ("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 403),
    ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403), ("", 403)])
def test_the_host_header_is_this_machines(client, host, status):
    assert client.get("/v1/models", headers={"host": host}).status_code == status


def test_no_other_page_may_ask_unless_it_is_named(client):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    answer = client.options("/v1/chat/completions", headers=ask)
    assert "access-control-allow-origin" not in answer.headers


def test_a_key_and_named_pages():
    limits = dict(key="secret", cors=("https://a.example",), seconds=0.001)
    with running(limits=limits, rows=1) as server, httpx.Client(
            base_url=server.url, timeout=LONGEST) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            error(client.get("/v1/models", headers=headers), 401, code="invalid_api_key")
        assert client.get("/").status_code == client.get("/health").status_code == 200
        own = {"authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=own).status_code == 200
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            ask = {"origin": origin, "access-control-request-method": "POST"}
            answer = client.options("/v1/chat/completions", headers=ask)
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
        server.still.clear()
        error(client.post("/v1/chat/completions", json=ASK, headers=own), 504, code="timeout")
        chunks = client.post("/v1/chat/completions", json=ASK | dict(stream=True), headers=own)
        server.still.set()
        assert json.loads(chunks.text.split("data: ")[-1])["error"]["code"] == "timeout"
        server.ended()


def test_a_stopped_server_ends_its_streams_with_an_error():
    with running(rows=1) as server, httpx.Client(
            base_url=server.url, timeout=LONGEST) as client:
        server.still.clear()
        with client.stream("POST", "/v1/chat/completions", json=ASK | dict(stream=True)) as answer:
            threading.Thread(target=server.engine.stop).start()
            until(lambda: server.engine.stopping)
            server.still.set()
            last = [line for line in answer.iter_lines() if line][-1]
        assert json.loads(last[6:])["error"]["code"] == "server_shutting_down"
        error(client.post("/v1/chat/completions", json=ASK), 503, code="server_shutting_down")
        assert client.get("/health").status_code == 503


def test_a_base_model_completes_and_does_not_talk():
    with running("data/r1/base", rows=1) as server, httpx.Client(
            base_url=server.url, timeout=LONGEST) as client:
        error(client.post("/v1/chat/completions", json=ASK), 400, "messages", "no_chat_template")
        answer = client.post("/v1/completions", json=dict(prompt="3*7", temperature=0))
        assert answer.json()["choices"][0]["text"]
        assert not client.get("/v1/models").json()["data"][0]["chat"]


def test_nobody_comes_in_before_the_model_is_read():
    with bind(ServeArgs(port=0)) as at, pytest.raises(ConnectionRefusedError):
        socket.create_connection(at.getsockname())


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match="^port = "):
            bind(ServeArgs(port=taken.getsockname()[1]))
    with pytest.raises(ValueError, match="^host = "):
        bind(ServeArgs(host="no such host"))
    assert (ROOT / "data/r1/rl").is_dir()


@pytest.mark.parametrize("address, told", [
    (("127.0.0.1", 80), "127.0.0.1:80"), (("0.0.0.0", 8001), "127.0.0.1:8001"),
    (("::1", 8000, 0, 0), "[::1]:8000")])
def test_the_address_that_is_told_can_be_opened(address, told, monkeypatch, capsys):
    async def begin(server, sockets=None) -> None:
        """Listen to nobody."""

    server = pytest.importorskip("uvicorn").Server
    monkeypatch.setattr(server, "startup", begin)
    monkeypatch.setattr(server, "run", lambda own, sockets: asyncio.run(own.startup(sockets)))
    listen(SimpleNamespace(name="m", engine=None), ServeArgs(),
           SimpleNamespace(getsockname=lambda: address))
    assert capsys.readouterr().out == f"m: http://{told}  (Ctrl-C ends it)\n"
