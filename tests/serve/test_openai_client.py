"""OpenAI's own client against the server: every field, streams, sixteen at once, its exceptions."""

import asyncio

import pytest
from running import running

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")

ASK = dict(model="r1-rl", temperature=0,
           messages=[dict(role="user", content="3*7+5-2*4+1*3")])


@pytest.fixture(scope="module")
def server():
    with running(rows=8, queue=16, limits=dict(key="sk-test")) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    # Retries would hide a 500 or a 429.
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=0) as made:
        yield made


def test_a_reply_and_its_stream(client):
    reply = client.chat.completions.create(**ASK, reasoning_effort="high", seed=1, n=2, top_p=0.9,
                                           stop=["x"], logprobs=True, top_logprobs=2,
                                           max_completion_tokens=60)
    message = reply.choices[0].message
    assert message.content.isdigit() and message.reasoning_content.startswith("3*7=1")
    assert reply.choices[1].message == message  # greedy
    assert reply.usage.completion_tokens_details.reasoning_tokens > 10
    assert reply.choices[0].logprobs.content[0].token == message.content
    chunks = [*client.chat.completions.create(**ASK, reasoning_effort="high", stream=True,
                                              stream_options=dict(include_usage=True))]
    assert chunks[-1].usage.total_tokens and not chunks[-1].choices
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == message.reasoning_content
    direct = client.chat.completions.create(**ASK, extra_body=dict(thinking=dict(type="disabled")))
    assert direct.choices[0].message.content and direct.usage.completion_tokens == 2


def test_models_and_completions(client):
    [model] = client.models.list()
    assert client.models.retrieve(model.id).id == model.id == "r1-rl"
    done = client.completions.create(model=model.id, prompt=["1+1", "2"], max_tokens=4, logprobs=2,
                                     temperature=0)
    assert [choice.index for choice in done.choices] == [0, 1]
    assert len(done.choices[0].logprobs.tokens) == 4
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(
        model=model.id, prompt="1+1", max_tokens=4, temperature=0, stream=True))
    assert text == done.choices[0].text


def test_sixteen_at_once(server):
    async def ask() -> list:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-test",
                                      max_retries=0) as client:
            asked = [client.chat.completions.create(**ASK | dict(temperature=1, seed=i))
                     for i in range(16)]
            return await asyncio.gather(*asked)

    first, again = asyncio.run(ask()), asyncio.run(ask())
    assert [r.choices[0].message for r in first] == [r.choices[0].message for r in again]


def test_a_stream_that_is_closed_midway_frees_its_row(client, server):
    stream = client.chat.completions.create(**ASK, stream=True, reasoning_effort="high")
    next(stream)
    stream.close()
    server.ended()
    assert server.engine.state()["running"] == 0
    assert client.chat.completions.create(**ASK).choices


def test_errors_are_the_clients_own(client, server):
    def create(**fields):
        return client.chat.completions.create(**ASK | fields)

    with pytest.raises(openai.BadRequestError) as refused:
        create(tools=[dict(type="function", function=dict(name="f"))])
    assert refused.value.param == "tools" and refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as refused:
        create(messages=[dict(role="user", content="x" * 300)])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-4")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with server.standing():
        replies = [client.chat.completions.create(**ASK, stream=True, n=8) for _ in range(3)]
        server.asked(24)
        with pytest.raises(openai.RateLimitError) as refused:
            create()
        assert int(refused.value.response.headers["retry-after"]) >= 1
    assert all(len([*reply]) > 10 for reply in replies)


def test_an_error_inside_a_stream_is_raised(client, server, monkeypatch):
    def broken(*given):
        raise RuntimeError("a body that fails")

    monkeypatch.setattr(server.engine.batch.slots, "step", broken)
    with pytest.raises(openai.APIError, match="the server failed"):
        list(client.chat.completions.create(**ASK, stream=True))
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**ASK)
