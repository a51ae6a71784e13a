"""Steps of a GPU are read when the next one is under way."""

from types import SimpleNamespace

import pytest
import torch

from minids.infer import decoding


class OnGpu(torch.Tensor):
    """Numbers of the CPU that say they lie on a GPU."""

    device = torch.device("cuda")


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
