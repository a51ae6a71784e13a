"""Check when decoding steps are read, what fits into a graph, and how a generation is timed."""

from types import SimpleNamespace

import pytest
import torch
from small_models import LITTLE, OnGpu, scrambled

from minids.apply.graphs import Steps
from minids.infer import decoding, generation


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_gpu_s_step_is_read_one_late_and_waited_for(count, monkeypatch):
    told, numbers, empty = [], iter(range(count)), torch.empty

    def event() -> SimpleNamespace:
        number = next(numbers)
        return SimpleNamespace(record=lambda: told.append(f"after {number}"),
                               synchronize=lambda: told.append(f"wait for {number}"))

    def steps():
        for number in range(count):
            told.append(f"step {number}")
            yield torch.tensor([number, 7]).as_subclass(OnGpu)

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    for row in decoding.one_step_late(steps()):
        told.append(f"read {row}")
    wanted = []
    for number in range(count + 1):
        wanted += [f"step {number}", f"after {number}"] if number < count else []
        wanted += [f"wait for {number - 1}", f"read {[number - 1, 7]}"] if number else []
    assert told == wanted


def test_a_cpu_s_step_is_read_at_once():
    steps = (torch.tensor([number]) for number in range(3))
    assert list(decoding.one_step_late(steps)) == [[0], [1], [2]]


def test_a_graph_s_step_leaves_room_for_the_token_that_it_adds_and_for_drafts():
    session = SimpleNamespace(static=True, cache=SimpleNamespace(latents=torch.empty(1, 1, 20, 1)),
                              model=SimpleNamespace(head=torch.nn.Linear(1, 1)))
    generator = torch.Generator()
    for drafts, most in ((0, 19), (2, 17)):
        made = decoding.Session.steps(session, print, generator, drafts)
        assert isinstance(made, Steps) and (made.most, made.generator) == (most, generator)
    session.static = False
    assert decoding.Session.steps(session, print, None) is print


def test_a_generation_takes_the_time_from_its_prompts_to_its_end(monkeypatch):
    clock = iter((5.0, 7.5))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(clock))
    done = generation.generate(scrambled(LITTLE), [[1, 2], [3]], 5)
    assert (done.seconds, done.tokens_per_second, done.prompt_tokens) == (2.5, 4.0, 3)


def test_prompts_are_read_whole_or_on_a_gpu_in_pieces(monkeypatch):
    tokens = torch.empty(4, 9000)
    assert decoding.piece(tokens) == 9000
    monkeypatch.setattr(decoding, "graphed", lambda device: True)
    assert [decoding.piece(tokens[:rows]) for rows in (1, 4)] == [2 ** 15, 2 ** 13]
    assert decoding.piece(torch.empty(129, 9000)) == 256  # and no shorter ones
