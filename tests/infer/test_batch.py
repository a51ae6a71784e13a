"""Continuous batching: the same text alone and in a batch, and what each step did."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_models import LITTLE, random_tokens, scrambled

from minids.apply import graphs
from minids.base import command_line
from minids.generate import generate
from minids.infer import batch as module
from minids.infer import decoding, sampling, slots
from minids.infer.batch import Batch, Job, Request, draw
from minids.infer.slots import WORTH, Slots, common

LONG = replace(LITTLE, max_seq_len=600)
MODELS = {
    "folded": replace(LITTLE, n_heads=2), "not folded": LITTLE,
    "indexer": replace(LITTLE, index_n_heads=16, index_head_dim=16, index_topk=6),
    "dense": replace(LITTLE, n_heads=2, n_routed_experts=0)}
POWERS = replace(LITTLE, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
SPARSE_POWERS = replace(POWERS, index_n_heads=16, index_head_dim=16, index_topk=6)
PROMPTS = [[5, 9, 2, 33, 7], [8], [1, 2, 3], [4, 60, 50, 40, 30]]
WAYS = [dict(), dict(temperature=1.0, seed=3), dict(temperature=1.3, top_k=9, seed=4),
        dict(temperature=0.7, top_p=0.6, seed=5)]


class Reply:
    """A request, and what came of it."""

    def __init__(self, prompt: list[int], max_tokens: int, number: int = 0, **settings):
        self.tokens, self.reason, self.error = [], None, None
        self.settings = dict(take=self.take, end=self.end) | settings
        request = Request(prompt, max_tokens, **self.settings)
        self.job = Job(number, request, random.Random(request.seed))

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def take(self, token) -> bool:
        self.tokens.append(token)

    def end(self, reason, error) -> None:
        assert self.reason is None, "a reply ends once"
        self.reason, self.error = reason, error


def serve(batch: Batch, replies: list[Reply], steps: int = 10_000) -> None:
    """Let the replies join together, and take steps until all is done."""
    batch.waiting.extend(reply.job for reply in replies)
    with torch.inference_mode():
        while batch.busy and steps:
            batch.step()
            steps -= 1


def some(count: int = 6, new: int = 20) -> list[Reply]:
    """Replies of unequal prompts, lengths and ways to draw."""
    return [Reply(PROMPTS[i % 4] + [i], new - 2 * i, i, **WAYS[i % 4]) for i in range(count)]


def alone(model, replies: list[Reply], rows: int = 1) -> list[list[int]]:
    """Return each reply's text with the model to itself."""
    found = []
    for reply in replies:
        again = Reply(reply.job.request.prompt, reply.job.request.max_tokens, **{
            k: v for k, v in vars(reply.job.request).items()
            if k in ("temperature", "top_k", "top_p", "seed")})
        serve(Batch(model, rows, model.args.max_seq_len), [again])
        found.append(again.ids)
    return found


def as_graphs(monkeypatch, on: bool = True) -> None:
    """Let passes run as a GPU captures them: on tensors that stay where they are."""
    for where in (graphs, decoding):
        monkeypatch.setattr(where, "graphed", lambda device: on)
    monkeypatch.setattr(graphs, "SMALLEST", 8)
    monkeypatch.setattr(slots, "WIDTHS", (2, 5, 16))


@pytest.mark.parametrize("static", [False, True], ids=["plain", "as graphs"])
@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
def test_alone_and_in_a_batch_the_same_text(args, static, monkeypatch):
    """In FP32, as it is served."""
    as_graphs(monkeypatch, static)
    model, replies = scrambled(args, dtype=torch.float32), some()
    serve(Batch(model, 3, args.max_seq_len, chunk=4), replies)
    assert [reply.ids for reply in replies] == alone(model, replies)
    assert {reply.reason for reply in replies} == {"length"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures on a GPU only")
@pytest.mark.parametrize("name", [*MODELS, "Triton", "Triton, indexer"])
def test_on_a_gpu_alone_and_in_a_batch_the_same_text(name, monkeypatch, capsys):
    """Experts in FP32 outside of Triton ask for their numbers of rows: those passes stay as they
    are, and a line says so."""
    monkeypatch.setattr(graphs, "SMALLEST", 8)
    monkeypatch.setattr(command_line, "SAID", set())
    args = (MODELS | {"Triton": POWERS, "Triton, indexer": SPARSE_POWERS})[name]
    model, replies = scrambled(args, dtype=torch.float32).cuda(), some(12, 26)  # 26 to 4 tokens
    batch, captures = Batch(model, 3, args.max_seq_len, chunk=4), name[:6] in ("dense", "Triton")
    serve(batch, replies, steps=400)
    assert {reply.reason for reply in replies} == {"length"}
    assert [reply.ids for reply in replies] == alone(model, replies)
    assert (batch.slots.captured >= 4) == captures  # of prompts and of steps, of some sizes
    assert ("without CUDA graphs" in capsys.readouterr().err) != captures


@pytest.mark.parametrize("static", [False, True], ids=["plain", "as graphs"])
def test_greedy_text_is_that_of_generate(static, monkeypatch):
    model = scrambled(LITTLE)
    expected = generate(model, PROMPTS, 16).tokens
    as_graphs(monkeypatch, static)
    replies = [Reply(prompt, 16, i) for i, prompt in enumerate(PROMPTS)]
    batch = Batch(model, 4, 40)
    serve(batch, replies)
    assert [reply.ids for reply in replies] == expected
    assert batch.passes == batch.written == 4 * 15  # the first token comes of the prompt's pass


@pytest.mark.parametrize("wrong", ["rows not moved", "one random number for all", "stale lengths"])
def test_wrong_batches_are_caught(wrong, monkeypatch):
    model, replies = scrambled(LITTLE), some()
    expected = alone(model, replies)
    if wrong == "rows not moved":
        monkeypatch.setattr(Slots, "stores", lambda self: [])
    if wrong == "one random number for all":
        for reply in replies:
            reply.job.random = replies[1].job.random
    if wrong == "stale lengths":
        monkeypatch.setattr(decoding.LatentCache, "truncate", lambda self, lengths, longest=None: (
            vars(self).update(length=int(lengths.min()), lengths=None)))
    serve(Batch(model, 3, 40), replies)
    assert [reply.ids for reply in replies] != expected


def test_a_request_that_comes_late_gets_its_first_token_soon():
    model = scrambled(LONG, dtype=torch.float32)
    batch, long = Batch(model, 2, 600, chunk=8), Reply([3, 4], 512)
    serve(batch, [long], steps=20)
    late = Reply(random_tokens(LONG, 1, 30)[0].tolist(), 4, number=1)
    serve(batch, [late])
    log = list(batch.log)
    read = [n for n, step in enumerate(log) if 1 in step.read]
    first = next(n for n, step in enumerate(log) if 1 in step.wrote)
    assert read == [20, 21, 22, 23] and sum(step.read.get(1, 0) for step in log) == 30
    assert first - read[-1] <= 3
    assert all(0 in step.wrote for step in log[:512])  # and nobody waited for it
    assert long.reason == late.reason == "length" and len(long.ids) == 512


def test_freed_rows_are_used_while_others_run():
    batch = Batch(scrambled(LITTLE), 2, 48)
    replies = [Reply([3, 4], 40), *(Reply([5 + i], 5, 1 + i) for i in range(6))]
    serve(batch, replies)
    assert len(batch.log) == 40  # all six in the other row, beside the long one
    assert [len(reply.ids) for reply in replies] == [40, *[5] * 6]
    assert max(step.waiting for step in batch.log) == 5


@pytest.mark.parametrize("length", [9, 30, 43])
def test_a_prompt_near_the_end_of_the_cache_is_read(length, monkeypatch):
    """A graph reads more tokens than the prompt has, and looks at more slots than are filled."""
    model, prompt = scrambled(LITTLE), random_tokens(LITTLE, 1, length)[0].tolist()
    expected = generate(model, [prompt], 5).tokens[0]
    as_graphs(monkeypatch)
    monkeypatch.setattr(graphs, "SMALLEST", 256)
    reply = Reply(prompt, 5)
    serve(Batch(model, 2, LITTLE.max_seq_len, chunk=7), [reply])
    assert reply.error is None and reply.ids == expected


@pytest.mark.parametrize("wrong", ["before", "after"])
def test_a_wrong_desk_is_caught(wrong, monkeypatch):
    model, replies, compute = scrambled(LITTLE), some(), Slots.compute_read
    expected = alone(model, replies)

    def forgetful(self, *how):  # what the row held, or what it gets
        if wrong == "before":
            self.desk.latents.zero_()
        compute(self, *how)
        if wrong == "after":
            self.desk.latents.zero_()

    as_graphs(monkeypatch)
    monkeypatch.setattr(Slots, "compute_read", forgetful)
    serve(Batch(model, 3, 40, chunk=4), replies)
    assert [reply.ids for reply in replies] != expected


@pytest.mark.parametrize("static", [False, True], ids=["plain", "as graphs"])
@pytest.mark.parametrize("together", [True, False], ids=["at once", "one after the other"])
def test_a_shared_prefix_is_read_once(together, static, monkeypatch):
    model, system = scrambled(LITTLE), random_tokens(LITTLE, 1, 20)[0].tolist()
    replies = [Reply([*system, 7 * i % 60, i], 6, i) for i in range(5)]
    as_graphs(monkeypatch, static)
    batch = Batch(model, 3, 40)
    for part in [replies] if together else [[reply] for reply in replies]:
        serve(batch, part)
    read = [sum(step.read.get(i, 0) for step in batch.log) for i in range(5)]
    assert read == [22, 2, 2, 2, 2]
    assert sum(sum(step.copied.values()) for step in batch.log) == 4 * 20
    as_graphs(monkeypatch, False)
    assert [reply.ids for reply in replies] == alone(model, replies)


def test_a_conversation_goes_on_where_it_was():
    model = scrambled(LITTLE)
    batch, first = Batch(model, 2, 48), Reply([*range(10)], 8)
    serve(batch, [first])
    history = [*range(10), *first.ids]
    second = Reply([*history, 9], 5, 1)
    serve(batch, [second])
    assert batch.log[-5].copied == {1: len(history) - 1}  # the last token was never read
    assert second.ids == alone(model, [second])[0]
    third = Reply([*range(WORTH - 1), 50], 2, 2)  # too little in common
    serve(batch, [third])
    assert batch.log[-2].copied == {2: 0}


def test_who_leaves_frees_the_row_also_before_the_first_token():
    model = scrambled(LONG, dtype=torch.float32)
    batch = Batch(model, 1, 600, chunk=4)
    running, reading, waiting, last = (
        Reply([3] * 2, 500), Reply([*range(40)], 5, 1), Reply([2, 3], 5, 2), Reply([9, 8], 5, 3))
    serve(batch, [running, waiting, reading, last], steps=10)
    running.job.cancelled = waiting.job.cancelled = True
    serve(batch, [], steps=3)
    assert batch.reading is reading.job and not reading.ids
    reading.job.cancelled = True
    serve(batch, [])
    assert [r.reason for r in (running, waiting, reading, last)] == [*["cancelled"] * 3, "length"]
    assert len(running.ids) == 10 and len(last.ids) == 5
    assert batch.jobs == [None] and batch.running == 0
    assert last.ids == alone(model, [last])[0]


def test_ends_and_stops_end_a_reply():
    model = scrambled(LITTLE)
    ids = alone(model, [Reply([3, 4], 12)])[0]
    end, stop = Reply([3, 4], 12, ends=frozenset(ids[5:6])), Reply([3, 4], 12, 1)
    stop.settings["take"] = lambda token: stop.take(token) or len(stop.ids) == 3
    stop.job.request = replace(stop.job.request, take=stop.settings["take"])
    serve(Batch(model, 2, 40), [end, stop])
    assert end.reason == stop.reason == "stop"
    assert end.ids == ids[:ids.index(ids[5]) + 1] and stop.ids == ids[:3]


@pytest.mark.parametrize("where", ["take", "model", "prompt", "nan"])
def test_one_that_fails_ends_alone(where, monkeypatch):
    model, replies = scrambled(LITTLE, dtype=torch.float32), some(4, 14)
    expected = alone(model, replies)
    bad = min({*range(64)} - set(sum(expected + PROMPTS, [*range(6)])))  # nobody writes it
    broken, good = Reply([1, 2], 9, 9), replies
    if where == "take":
        request = replace(broken.job.request, take=lambda token: 1 / 0)
        broken.job.request = request
    elif where == "nan":
        broken = Reply([1, bad], 9, 9)
        with torch.no_grad():
            model.embed.weight[bad] = float("nan")
    else:
        broken = Reply([1, bad] if where == "prompt" else [1, 2], 9, 9)
        embed = model.embed.forward

        def forward(tokens):
            if bad in tokens:
                raise RuntimeError("a body that fails")
            return embed(tokens)

        monkeypatch.setattr(model.embed, "forward", forward)
    batch = Batch(model, 5, 48)
    serve(batch, [*good[:2], broken, *good[2:]], steps=3)
    if where == "model":  # in the middle of the batch
        broken.job.newest = bad
    serve(batch, [])
    assert broken.reason == "error" and isinstance(broken.error, Exception)
    assert [reply.ids for reply in good] == expected
    assert {reply.reason for reply in good} == {"length"} and not any(batch.jobs)
    again = [Reply([5, 9, 2], 5, i) for i in range(5)]  # in every row, also where NaN was
    serve(batch, again)
    assert {tuple(reply.ids) for reply in again} == {tuple(alone(model, again[:1])[0])}


def test_log_probabilities_and_experts():
    model = scrambled(LITTLE)
    reply, other = Reply([5, 9, 2], 6, top_logprobs=3, **WAYS[1]), Reply([7], 6, 1)
    serve(Batch(model, 2, 40), [reply, other])
    text = torch.tensor([[5, 9, 2, *reply.ids[:-1]]])
    with torch.no_grad():
        found = model.hidden(text)
        logp = model.head(found.states)[0, 2:].log_softmax(-1)
    assert torch.tensor([t.logp for t in reply.tokens]).double().allclose(
        logp[range(6), reply.ids], atol=1e-6)
    for token, row in zip(reply.tokens, logp, strict=True):
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()
    experts = torch.stack([r.indices[0, 2:] for r in found.routings], dim=1).sort(-1).values
    assert torch.tensor([t.experts for t in reply.tokens]).sort(-1).values.equal(experts)
    assert other.tokens[0].logp is None and other.tokens[0].experts == ()


def test_replies_that_are_drawn_alike_share_a_draw(monkeypatch):
    drawn = []
    monkeypatch.setattr(sampling, "pick", lambda probs, number: drawn.append(number) or torch.zeros(
        len(probs), dtype=torch.int64))
    jobs = [Reply([1], 2, i, temperature=t, seed=s).job
            for i, (t, s) in enumerate([(1, 5), (0, 5), (1, 5), (0.5, 6), (1e-7, 1)])]
    draw(jobs, torch.randn(5, 1, 9))
    assert [len(number) for number in drawn] == [2, 1] and len(set(drawn[0].tolist()[0])) == 1
    assert drawn[0][0] == drawn[0][1]  # the same seed


def test_what_two_sequences_have_in_common():
    assert common([1, 2, 3], [1, 2, 4]) == 2 and common([1], [1, 2]) == 1
    assert common([], [1]) == 0 == common([2], [1])


def test_a_reply_moves_the_mean_time_by_a_tenth_of_the_difference(monkeypatch):
    batch, reply = Batch(scrambled(LITTLE, dtype=torch.float32), 1, 8), Reply([1], 2)
    monkeypatch.setattr(module.time, "monotonic", lambda: reply.job.arrived + 21)
    serve(batch, [reply])
    assert batch.seconds == pytest.approx(1 + (21 - 1) / 10)


def test_a_step_reads_as_many_tokens_of_prompts_as_it_may():
    batch = Batch(scrambled(LITTLE, dtype=torch.float32), 3, 48, chunk=4)
    serve(batch, [Reply([7] * length, 5, i) for i, length in enumerate((3, 5, 2))])
    assert [step.read for step in batch.log if step.read] == [{0: 3, 1: 1}, {1: 4}, {2: 2}]


def test_what_is_no_token_is_drafted_after_as_if_it_were_the_last(monkeypatch):
    """Such a reply ends with an error; the others of its step go on."""
    asked = []
    monkeypatch.setattr(module, "draft", lambda jobs, logits: None)
    made = SimpleNamespace(model=SimpleNamespace(args=LITTLE), slots=SimpleNamespace(
        guess=lambda *given: asked.append(given)))
    jobs = [SimpleNamespace(row=2, draft=-1), SimpleNamespace(row=3, draft=4)]
    assert Batch.guess(made, jobs, [[5, LITTLE.vocab_size], [63]]) == []
    assert asked == [(2, 4, [[5, LITTLE.vocab_size - 1], [63]], True)]
