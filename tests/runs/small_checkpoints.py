"""Small checkpoints that several test files save, damage and check."""

from pathlib import Path

import torch

from minids.runs import checkpoints as checkpoint
from minids.runs.checkpoints import (
    load_state,
    load_weights,
    prune,
    verify,
)


def small(step: int) -> tuple[dict, dict]:
    """Weights and state that tell the step."""
    weights = {"w": torch.full((4, 8), float(step)), "b": torch.arange(3) + step}
    return weights, {"step": step, "optimizer": {"momentum": [torch.full((5,), -float(step))]}}


def steps(run: Path) -> list[int]:
    """The steps of all that lies in the folder, which must all be checkpoints."""
    return sorted(int(checkpoint.NAME.fullmatch(path.name)[1])
                  for path in (run / "checkpoints").iterdir())


def assert_holds(path: Path, step: int) -> None:
    """The checkpoint reads back as `small(step)`, bit for bit."""
    weights, state = small(step)
    assert verify(path)["step"] == step
    torch.testing.assert_close(load_weights(path), weights, rtol=0, atol=0)
    torch.testing.assert_close(load_state(path), state, rtol=0, atol=0)


def save_in_place(run: Path, step: int, weights: dict, state: dict, keep_last=3, metric=None):
    """The wrong variant: writes under the final name from the start."""
    path = Path(run) / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True, exist_ok=True)
    checkpoint.write_files(path, step, weights, state, metric)
    prune(run, path, keep_last)
    return path


def flip_one(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def torn(run: Path) -> list[str]:
    """The refusals: what is wrong with each folder that has a checkpoint's name and is not one."""
    refusals = []
    for path in checkpoint.all_checkpoints(run):
        try:
            verify(path)
        except ValueError as error:
            refusals.append(str(error))
    return refusals
