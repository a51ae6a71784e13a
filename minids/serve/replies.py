"""Replies in OpenAI's shapes, whole or as a stream, from the tokens that the engine writes.

The worker's thread turns tokens into text (`Choice`) and hands it to the event loop; torch's work
stays out of the loop, and the loop's out of the worker.
"""

import asyncio
import json
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from typing import Any

from minids.infer.batch import Job, Request, Token
from minids.infer.engine import Full, Stopped
from minids.serve.asked import Asked
from minids.serve.errors import Refused
from minids.serve.served import Served
from minids.text.replies import THOUGHT, Piece, ReplyText


class Choice:
    """One reply of a request, as its tokens come.

    index: its number; prompt: the number of its prompt
    """

    def __init__(self, index: int, prompt: int, asked: Asked, served: Served, put):
        self.index, self.prompt, self.asked, self.put = index, prompt, asked, put
        self.tokenizer = served.tokenizer
        self.text = ReplyText(served.tokenizer, asked.mode, asked.stop)
        self.tokens, self.reason, self.error = 0, None, None

    def take(self, token: Token) -> bool:
        """Note a token; return whether a stop string ended the reply. The worker calls this."""
        self.tokens += 1
        note = None if token.logp is None else self.describe(token, self.text.length)
        self.give(self.text.add(token.id, note))
        return self.text.stopped

    def end(self, reason: str, error: Exception | None) -> None:
        """Note the end. The worker calls this."""
        self.give(self.text.flush())
        self.put((self, reason, error))

    def give(self, pieces: list[Piece]) -> None:
        """Hand pieces of text to the loop."""
        for piece in pieces:
            self.put((self, piece, None))

    def describe(self, token: Token, start: int) -> dict:
        """Return a token with its log-probability, in the form of chat replies.

        start: characters of the reply before it
        """
        def entry(number: int, logp: float) -> dict:
            raw = self.tokenizer.decode_bytes([number])
            return dict(token=raw.decode("utf-8", "replace"), logprob=logp, bytes=[*raw])

        found = entry(token.id, token.logp)
        found["top_logprobs"] = [entry(number, logp) for number, logp in token.top]
        if self.asked.kind == "text":
            found["text_offset"] = start
        if self.asked.experts:
            found["experts"] = [[*layer] for layer in token.experts]
        return found


class Reply:
    """All choices of one request, and what they are made into."""

    def __init__(self, asked: Asked, served: Served):
        self.asked, self.served, loop = asked, served, asyncio.get_running_loop()
        self.arriving: asyncio.Queue = asyncio.Queue()

        def put(item: tuple) -> None:
            loop.call_soon_threadsafe(self.arriving.put_nowait, item)

        numbers = range(len(asked.prompts) * asked.n)
        self.choices = [Choice(i, i // asked.n, asked, served, put) for i in numbers]
        chat = asked.kind == "chat"
        self.head = dict(id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
                         object="chat.completion" if chat else "text_completion",
                         created=int(time.time()), model=served.name,
                         system_fingerprint=served.fingerprint)
        self.jobs: list[Job] = []

    def begin(self) -> None:
        """Submit the request to the engine; raise `Refused` if it has no place for it."""
        asked, top = self.asked, self.asked.top_logprobs
        requests = [Request(asked.prompts[choice.prompt], asked.max_tokens, **asked.sampling,
                            seed=asked.seed + choice.index % asked.n, top_logprobs=top,
                            ends=frozenset(self.served.tokenizer.eos_ids), take=choice.take,
                            end=choice.end)
                    for choice in self.choices]
        try:
            self.jobs = self.served.engine.submit(*requests)
        except Full as error:
            raise Refused(429, f"The server is busy: {error}", code="rate_limit_exceeded",
                          headers={"retry-after": str(error.seconds)}) from None
        except Stopped as error:
            raise stopped(error) from None

    def cancel(self) -> None:
        """Free the rows of what is not done."""
        self.served.engine.cancel(*self.jobs)

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece | None]]:
        """Yield each piece of text, and None at the end of each choice; raise what ended one."""
        left = len(self.choices)
        while left:
            choice, found, error = await self.arriving.get()
            if error is not None or found == "cancelled":
                raise failed(error)
            if isinstance(found, str):
                choice.reason, left = found, left - 1
            yield choice, None if isinstance(found, str) else found

    def usage(self) -> dict:
        """Return what was read and written, in tokens."""
        prompt = sum(map(len, self.asked.prompts))
        written = sum(choice.tokens for choice in self.choices)
        firsts = self.jobs[::self.asked.n]
        found = dict(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written,
                     prompt_tokens_details=dict(cached_tokens=sum(j.copied for j in firsts)))
        if self.asked.kind == "chat":
            thinking = sum(choice.text.thinking for choice in self.choices)
            found["completion_tokens_details"] = dict(reasoning_tokens=thinking)
        return found

    async def whole(self) -> dict:
        """Return the reply as one object."""
        found: dict[Choice, list[Piece]] = {choice: [] for choice in self.choices}
        async for choice, piece in self.pieces():
            found[choice] += [piece] if piece else []
        form = self.chat_choice if self.asked.kind == "chat" else self.text_choice
        return self.head | dict(choices=[form(*item) for item in found.items()],
                                usage=self.usage())

    def chat_choice(self, choice: Choice, pieces: list[Piece]) -> dict:
        """Return one choice of a conversation's reply."""
        thought, answer = ([p for p in pieces if (p.kind == THOUGHT) == is_thought]
                           for is_thought in (True, False))
        message: dict[str, Any] = dict(role="assistant", content=joined(answer), refusal=None)
        if thought or choice.text.thinking:
            message["reasoning_content"] = joined(thought)
        return dict(index=choice.index, message=message, finish_reason=choice.reason,
                    logprobs=self.chat_logprobs(answer, thought))

    def chat_logprobs(self, answer: list[Piece], thought: list[Piece]) -> dict | None:
        """Return the tokens of the answer and, as in DeepSeek's API, those of the thought."""
        if self.asked.top_logprobs < 0:
            return None
        found = dict(content=notes(answer), refusal=None)
        return found | (dict(reasoning_content=notes(thought)) if thought else {})

    def text_choice(self, choice: Choice, pieces: list[Piece]) -> dict:
        """Return one choice of a completion."""
        text = self.asked.echo[choice.prompt] + joined(pieces)
        return dict(index=choice.index, text=text, finish_reason=choice.reason,
                    logprobs=self.text_logprobs(notes(pieces)))

    def text_logprobs(self, entries: list[dict]) -> dict | None:
        """Return tokens in the form of completions."""
        if self.asked.top_logprobs < 0:
            return None
        return dict(tokens=[e["token"] for e in entries],
                    text_offset=[e["text_offset"] for e in entries],
                    token_logprobs=[e["logprob"] for e in entries],
                    top_logprobs=[{t["token"]: t["logprob"] for t in e["top_logprobs"]}
                                  for e in entries],
                    **({"experts": [e["experts"] for e in entries]} if self.asked.experts else {}))

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the reply as events: per choice its role, text as it comes, the reason it ended;
        then the usage if it was asked for, and [DONE]. An error is an event too, the last."""
        chat = self.asked.kind == "chat"
        extra = dict(usage=None) if self.asked.include_usage else {}
        head = self.head | (dict(object="chat.completion.chunk") if chat else {})

        def chunk(choice: Choice, logprobs: dict | None = None, **changed) -> bytes:
            own = dict(index=choice.index, logprobs=logprobs, finish_reason=choice.reason)
            return event(head | dict(choices=[own | changed]) | extra)

        try:
            for choice in self.choices:
                if chat:
                    yield chunk(choice, delta=dict(role="assistant", content=""))
                elif echo := self.asked.echo[choice.prompt]:
                    yield chunk(choice, text=echo)
            async for choice, piece in self.pieces():
                if piece is None:
                    yield chunk(choice, **(dict(delta={}) if chat else dict(text="")))
                elif chat:
                    thought = piece.kind == THOUGHT
                    name = "reasoning_content" if thought else "content"
                    logprobs = self.chat_logprobs(*([[], [piece]] if thought else [[piece], []]))
                    yield chunk(choice, logprobs, delta={name: piece.text})
                else:
                    logprobs = self.text_logprobs(piece.notes)
                    yield chunk(choice, logprobs, text=piece.text)
            if self.asked.include_usage:
                yield event(head | dict(choices=[], usage=self.usage()))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield b"data: " + told(error).body() + b"\n\n"


def joined(pieces: list[Piece]) -> str:
    """Return the text of pieces."""
    return "".join(piece.text for piece in pieces)


def notes(pieces: list[Piece]) -> list[dict]:
    """Return what was noted of the tokens of pieces."""
    return [note for piece in pieces for note in piece.notes]


def event(body: dict) -> bytes:
    """Return an object as one event of a stream."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def stopped(error: Exception | None) -> Refused:
    """Return the refusal of a server that is being shut down."""
    return Refused(503, str(error or "the server is shutting down"), code="server_shutting_down")


def failed(error: Exception | None) -> Refused:
    """Return what a client is told of what ended its reply; a fault is printed here."""
    if error is None or isinstance(error, Stopped):
        return stopped(error)
    traceback.print_exception(error, file=sys.stderr)
    return told(error)


def told(error: Exception) -> Refused:
    """Return what a client is told of an error: a bug's words stay here."""
    if isinstance(error, Refused):
        return error
    return Refused(500, str(error) if isinstance(error, ValueError)
                   else "the server failed on this request", code="internal_error")
