"""Initial weights of large models: drawn in blocks, of which each region needs its own."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from minids import ModelArgs, Transformer
from minids.model import initial
from minids.model.initial import ROWS, Blocks, initial_weights

NANO = ModelArgs.preset("nano")
SHAPES = {"embed.weight": torch.Size((5 * ROWS, 48)), "norm.weight": torch.Size((48,)),
          "w1": torch.Size((3, 2 * ROWS + 5, 40)), "w2": torch.Size((3, 40, 2 * ROWS + 5))}


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch):
    """No model of a test has two billion parameters."""
    monkeypatch.setattr(initial, "LARGE", 0)


def whole(threads: int = 1, seed: int = 5) -> dict[str, torch.Tensor]:
    """All values of the shapes above."""
    torch.manual_seed(seed)
    return {name: read(tuple(map(slice, SHAPES[name])))
            for name, read in initial_weights(SHAPES, 0.3, threads)}


def test_a_region_has_the_values_of_the_whole():
    cuts = {"embed.weight": (slice(70, 71), slice(0, 48)), "norm.weight": (slice(3, 9),),
            "w1": (slice(1, 3), slice(ROWS - 1, 2 * ROWS + 5), slice(0, 40)),
            "w2": (slice(2, 2), slice(0, 40), slice(0, 2 * ROWS + 5))}
    values = whole()
    torch.manual_seed(5)
    for name, read in initial_weights(SHAPES, 0.3, threads=3):
        assert torch.equal(read(cuts[name]), values[name][cuts[name]]), name


def test_threads_change_nothing_and_the_seed_all():
    values = whole()
    assert all(torch.equal(a, values[name]) for name, a in whole(threads=4).items())
    assert not torch.equal(whole(seed=6)["w1"], values["w1"])


def alike(values: dict[str, torch.Tensor]) -> list:
    """Pairs of rows of blocks, in any two matrices, that begin with the same numbers."""
    rows = {(name, e, at): matrix[at, :40] for name, tensor in values.items() if tensor.ndim > 1
            for e, matrix in enumerate(tensor.reshape(-1, *tensor.shape[-2:]))
            for at in range(0, len(matrix), ROWS)}
    return [pair for pair in combinations(rows, 2) if torch.equal(*(rows[p] for p in pair))]


def test_no_two_blocks_are_alike(monkeypatch):
    assert alike(whole()) == []

    class Again(Blocks):
        """Wrong: every matrix begins with the run's own seed."""

        def __init__(self, *how):
            super().__init__(*how)
            self.count = 0

    monkeypatch.setattr(initial, "Blocks", Again)
    assert alike(whole())


def test_a_large_model_is_drawn_from_the_runs_generator():
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Transformer(replace(NANO, init_std=0.5)).layers[1].ffn.experts.w1

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    # The estimate of a deviation from n numbers is off by less than 5 / sqrt(2 n).
    assert abs(first.std() / 0.5 - 1) < 5 / (2 * first.numel()) ** 0.5


@pytest.mark.parametrize("shape, each", [((ROWS, 4), 1), ((ROWS + 1, 4), 2), ((3, ROWS + 1, 4), 6),
                                         ((2, 3, 5, 4), 6)])
def test_a_stack_has_blocks_of_each_of_its_matrices(shape, each):
    assert Blocks(torch.Size(shape), 0.3, 0).count == each
