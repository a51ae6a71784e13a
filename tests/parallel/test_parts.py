"""Files of many ranks: regions put together from pieces, and what is refused."""

import json
import shutil
from math import prod
from pathlib import Path

import pytest
import torch

from minids.base.files import digest
from minids.parallel.parts import Part, Parts, write_parts
from minids.runs import checkpoints

WHOLE = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)


def cut(tensor: torch.Tensor, *slices: slice) -> Part:
    """The part of a tensor that a rank has."""
    return Part(tensor[slices], list(tensor.shape), [s.start for s in slices])


def boxes(rows: list[slice], columns: list[slice]) -> list[Part]:
    """WHOLE in rows by columns, whose last ones are shorter."""
    return [cut(WHOLE, a, b, slice(0, 5)) for a in rows for b in columns]


def write(folder: Path, parts: list[dict[str, Part]]) -> list[Path]:
    """One file for each rank."""
    files = [folder / f"model-{i}.safetensors" for i in range(len(parts))]
    for file, own in zip(files, parts, strict=True):
        write_parts(file, own)
    return files


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Six ranks: WHOLE in six boxes, a vector in two parts, a scalar in one file."""
    found = boxes([slice(0, 3), slice(3, 4)], [slice(0, 2), slice(2, 4), slice(4, 6)])
    parts = [{"w": part} for part in found]
    parts[0]["v"], parts[5]["v"] = (cut(torch.arange(7.0), s) for s in (slice(0, 4), slice(4, 7)))
    parts[2]["step"] = Part(torch.tensor(3.0), [], [])
    return write(tmp_path, parts)


@pytest.mark.parametrize("region", [
    (slice(0, 4), slice(0, 6), slice(0, 5)), (slice(1, 4), slice(1, 5), slice(2, 3)),
    (slice(0, 1), slice(0, 1), slice(0, 5)), (slice(3, 4), slice(5, 6), slice(4, 5)),
    (slice(2, 2), slice(0, 6), slice(0, 5))])
def test_any_region_is_put_together(files, region):
    found = Parts(files).read("w", region)
    assert torch.equal(found.view(WHOLE[region].shape), WHOLE[region])


def test_all_is_put_together(files):
    whole = Parts(files).whole()
    assert whole.keys() == {"w", "v", "step"} and torch.equal(whole["w"], WHOLE)
    assert torch.equal(whole["v"], torch.arange(7.0)) and whole["step"] == 3
    memory = Parts.of(whole)
    assert torch.equal(memory.read("w", (slice(1, 2), slice(0, 6), slice(0, 5))), WHOLE[1:2])
    assert memory.read("step") == 3


def test_a_part_that_no_file_holds_is_named(files):
    rest = Parts(files[:4])
    size = prod(WHOLE.shape)
    with pytest.raises(ValueError, match=rf"hold 100 of {size} numbers of w"):
        rest.read("w")
    assert torch.equal(rest.read("w", (slice(0, 3), slice(0, 6), slice(0, 5))), WHOLE[:3])
    with pytest.raises(ValueError, match="no file of this checkpoint holds u"):
        rest.read("u")


def test_a_file_without_places_is_named(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, 1, {"w": WHOLE}, {}) / "model.safetensors"
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        Parts([path])


def sharded(run: Path, step: int) -> Path:
    """A checkpoint of two ranks."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    for kind, tensor in (("model", WHOLE + step), ("optimizer", WHOLE - step)):
        name = "w" if kind == "model" else "w/exp_avg"
        for i, rows in enumerate((slice(0, 2), slice(2, 4)), start=1):
            part = cut(tensor, rows, slice(0, 6), slice(0, 5))
            write_parts(folder / f"{kind}-0000{i}-of-00002.safetensors", {name: part})
    state = dict(step=step, rng=checkpoints.rng_state())
    state["rng"]["torch"] = state["rng"]["torch"].tolist()
    (folder / "state.json").write_text(json.dumps(state))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}
             for path in sorted(folder.iterdir())}
    checkpoints.write_manifest(folder, checkpoints.SHARDED, step, None, files, None)
    return folder


def test_a_checkpoint_of_many_ranks_reads_as_one(tmp_path):
    path = sharded(tmp_path, 2)
    assert checkpoints.resolve(tmp_path) == path
    assert torch.equal(checkpoints.load_weights(path)["w"], WHOLE + 2)
    state = checkpoints.load_state(path)
    assert state["step"] == 2
    assert torch.equal(state["optimizers"].read("w/exp_avg"), WHOLE - 2)
    before = checkpoints.rng_state()
    checkpoints.set_rng_state(state["rng"])
    assert str(checkpoints.rng_state()) == str(before)


def spoil(file: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {"missing": Path.unlink, "changed": spoil,
           "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
           "another rank's": lambda file: shutil.copy(
               file.with_name(file.name.replace("00001", "00002")), file)}


DAMAGED = [(name, damage) for damage in DAMAGES for name in (
    "model-00001-of-00002.safetensors", "optimizer-00001-of-00002.safetensors", "state.json")
    if (name, damage) != ("state.json", "another rank's")]


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_a_damaged_part_is_named_and_the_checkpoint_before_it_used(tmp_path, capsys, name, damage):
    before, newest = sharded(tmp_path, 1), sharded(tmp_path, 2)
    DAMAGES[damage](newest / name)
    load = checkpoints.load_weights if name.startswith("model") else checkpoints.load_state
    with pytest.raises(ValueError, match=name):
        load(newest)
    assert checkpoints.newest_checkpoint(tmp_path) == before
    assert name in capsys.readouterr().err
