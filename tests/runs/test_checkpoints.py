"""Checkpoints: contents come back as they were, which ones are kept, what a user may name."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import assert_holds, flip_one, small, steps

from minids.runs import checkpoints as checkpoint
from minids.runs.checkpoints import (
    MANIFEST,
    STATE,
    WEIGHTS,
    load_state,
    load_weights,
    newest_checkpoint,
    prune,
    resolve,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

# Weights and state come back as they were.

def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def awkward_weights() -> dict[str, torch.Tensor]:
    """Tied, transposed, expanded, sliced, empty, scalar and low-precision tensors."""
    torch.manual_seed(0)
    table = torch.randn(6, 4)
    odd = torch.tensor([0x7FC1, 0x8000, 0xFF80 - 2**16], dtype=torch.int32).to(torch.int16)
    return {
        "embed": table, "head": table, "rows": table[1:3], "transposed": table.T,
        "strided": table[::2, ::3], "expanded": torch.randn(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)), "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5), "bf16": torch.randn(5, 3).bfloat16().T,
        "half": torch.randn(4).half(), "fp8": torch.randn(8).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]), "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "nan payload, -0 and -inf": odd.view(torch.bfloat16),
    }


def test_weights_return_bit_for_bit(tmp_path):
    weights = awkward_weights()
    path = save_checkpoint(tmp_path, 7, weights, {})
    for loaded in (load_weights(path), load_file(path / WEIGHTS)):
        assert loaded.keys() == weights.keys()
        for name, tensor in weights.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
            assert bits(loaded[name]) == bits(tensor.detach()), name
    with pytest.raises((RuntimeError, ValueError)):  # without copies, safetensors refuses the tie
        save_file(weights, tmp_path / "tied.safetensors")


def test_same_content_gives_same_bytes(tmp_path):
    first = save_checkpoint(tmp_path / "a", 3, *small(3), metric=1.25)
    again = save_checkpoint(tmp_path / "b", 3, *small(3), metric=1.25)
    other = save_checkpoint(tmp_path / "c", 3, *small(4), metric=1.25)
    for name in (WEIGHTS, STATE, MANIFEST):
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


def test_optimizer_state_returns(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, layer.state_dict(), {"optimizer": optimizer.state_dict()})
    fresh = torch.optim.AdamW(layer.parameters())
    fresh.load_state_dict(load_state(path)["optimizer"])
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x"), len, {3, 4}])
def test_state_that_could_not_be_read_back_is_refused_when_saved(tmp_path, value):
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] = .* cannot be saved"):
        save_checkpoint(tmp_path, 1, {}, {"a": [1, value]})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_metric_must_be_finite(tmp_path, metric):
    with pytest.raises(ValueError, match="metric = .* must be finite"):
        save_checkpoint(tmp_path, 1, {}, {}, metric=metric)


# Random generators.

def draw() -> list:
    random.gauss(0, 1)
    np.random.standard_normal()
    values = [random.gauss(0, 1), random.random(), np.random.standard_normal(),
              np.random.random(), *torch.randn(3).tolist()]
    if torch.cuda.is_available():
        values += torch.randn(3, device="cuda").tolist()
    return values


def resumes(tmp_path, get_state) -> bool:
    """Return whether a state that went through a checkpoint repeats the draws that followed it."""
    draw()
    random.gauss(0, 1)  # gauss makes two and keeps one: the kept one is state too
    np.random.standard_normal()
    path = save_checkpoint(tmp_path, 1, {}, {"rng": get_state()})
    expected = draw()
    draw()
    set_rng_state(load_state(path)["rng"])
    return draw() == expected


def test_rng_state_resumes(tmp_path):
    assert resumes(tmp_path, rng_state)


def test_rng_check_notices_a_stale_generator(tmp_path):
    stale = rng_state()
    for name in ("python", "numpy", "torch"):
        draw()
        assert not resumes(tmp_path, lambda name=name: rng_state() | {name: stale[name]}), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_weights_and_generator_return(tmp_path):
    weights = {"w": torch.randn(4, 3, device="cuda").T}
    path = save_checkpoint(tmp_path, 1, weights, {"momentum": weights["w"], "rng": rng_state()})
    expected = torch.randn(5, device="cuda")
    set_rng_state(load_state(path)["rng"])
    assert torch.equal(torch.randn(5, device="cuda"), expected)
    assert load_weights(path)["w"].device.type == "cpu"
    assert torch.equal(load_weights(path)["w"], weights["w"].cpu())
    assert torch.equal(load_state(path)["momentum"], weights["w"].cpu())


# Which ones are kept.

METRICS = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None, 6: 4.0}


def kept(run: Path, keep_last: int, forget=prune) -> list[int]:
    for step, metric in METRICS.items():
        path = save_checkpoint(run, step, *small(step), keep_last=0, metric=metric)
        forget(run, path, keep_last)
    return steps(run)


@pytest.mark.parametrize("keep_last, expected",
                         [(0, [1, 2, 3, 4, 5, 6]), (1, [2, 6]), (3, [2, 4, 5, 6])])
def test_last_and_best_are_kept(tmp_path, keep_last, expected):
    assert kept(tmp_path, keep_last) == expected
    assert newest_checkpoint(tmp_path).name == "step_000006"


def test_pruning_check_notices_a_lost_best(tmp_path):
    def forget_all_but_last(run, saved, keep_last):
        for path in checkpoint.all_checkpoints(run)[keep_last:]:
            shutil.rmtree(path)
    assert kept(tmp_path, 1, forget_all_but_last) == [6]


def test_save_prunes(tmp_path):
    for step, metric in METRICS.items():
        save_checkpoint(tmp_path, step, *small(step), keep_last=1, metric=metric)
    assert steps(tmp_path) == [2, 6]


def test_of_equal_metrics_the_newest_is_best(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *small(step), metric=1.0, keep_last=1)
    assert steps(tmp_path) == [3]  # were an older one the best, it would stay too


def test_save_at_an_earlier_step_survives_its_own_pruning(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, *small(step), keep_last=1)
    path = save_checkpoint(tmp_path, 15, *small(15), keep_last=1)
    assert steps(tmp_path) == [15, 30]
    assert_holds(path, 15)


def test_damaged_one_is_replaced_by_a_save_of_its_step(tmp_path):
    path = save_checkpoint(tmp_path, 1, *small(1))
    flip_one(path / STATE)
    assert newest_checkpoint(tmp_path) is None
    assert save_checkpoint(tmp_path, 1, *small(1)) == newest_checkpoint(tmp_path) == path
    assert steps(tmp_path) == [1]


def test_what_a_save_replaced_comes_after_it(tmp_path):
    names = "step_000003", "step_000003.replaced", "step_000002"
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == [*names]


def test_steps_of_more_than_six_digits_are_newer(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, *small(step))
    assert newest_checkpoint(tmp_path).name == "step_1000000"


# What a user may name.

def test_resolve_takes_a_run_or_a_checkpoint(tmp_path):
    paths = [save_checkpoint(tmp_path, step, *small(step)) for step in (1, 2)]
    assert resolve(tmp_path) == resolve(str(tmp_path)) == paths[1]
    assert [resolve(path) for path in paths] == paths


def refusals(runs: Path) -> dict[str, str]:
    """A path that is no run -> what the message must hold."""
    save_checkpoint(runs / "python", 100, *small(1))
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    damaged = save_checkpoint(runs / "damaged", 1, *small(1))
    flip_one(damaged / WEIGHTS)
    return {"pyton": "did you mean 'python'?", "python/checkpoints/step_000010":
            "did you mean 'step_000100'?", "nothing/like/it": "is not a folder", "file":
            "is not a folder", "empty": "holds no checkpoint", "damaged": "no whole checkpoint"}


def test_resolve_says_what_would_work(tmp_path):
    for name, expected in refusals(tmp_path).items():
        with pytest.raises(ValueError) as caught:
            resolve(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message and expected in message and "\n" not in message


def test_run_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
