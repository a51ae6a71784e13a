"""Checkpoints: saved whole or not at all, and verified before they are read.

A run folder holds `checkpoints/step_NNNNNN/`, each with three files:
    model.safetensors   the weights, for any tool that reads safetensors
    state.pt            optimizer, loader, random-number and schedule state, to resume from
    manifest.json       step, metric, versions; size and SHA-256 of the other two, its own seal;
                        the run's config.json at that time, and what metrics.jsonl held

Why so careful? A training process is killed, a disk fills up, a copy is cut short. A checkpoint is
therefore written under a temporary name, each file is flushed, and the folder is renamed when it is
complete. Its parent is flushed as well: otherwise a rename may be lost, or reach the disk before
the data that it names (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). A
reader recomputes the checksums, names what it refuses, and falls back on the checkpoint before it.
`state.pt` holds tensors and plain values only: reading it runs no foreign code.

Simplified: one process writes to a run at a time, and holds all the weights; where many ranks
share them, `minids.runs.sharded` writes, with other files under the same manifest.
"""

import contextlib
import json
import math
import pickle
import random
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minids.base.fields import demand, nearest
from minids.base.files import digest, discard, flush, is_sealed, publish, sealed, write_flushed
from minids.base.tensors import save_tensors
from minids.parallel.parts import Parts

FORMAT, SHARDED = 1, 2  # SHARDED: written by many ranks, see `minids.runs.sharded`
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
PLAIN_STATE = "state.json"  # of many ranks, beside their parts of tensors
NAME = re.compile(r"step_(\d{6,})(\.replaced)?")


def save_checkpoint(run: Path, step: int, weights: dict[str, Tensor], state: dict,
                    keep_last: int = 3, metric: float | None = None,
                    record: dict | None = None) -> Path:
    """Write `checkpoints/step_NNNNNN` whole, then remove older checkpoints; returns its folder.

    A kill at any moment leaves the old checkpoints, or the old ones and the new one, which replaces
    one of the same step.

    run: the run's folder, made if absent; step: optimizer steps done
    weights: name -> tensor of any dtype, layout and device; tied tensors are written twice
    state: tensors and plain values, nested in dicts, lists and tuples
    keep_last: newest checkpoints to keep, beside the best one; 0 keeps all
    metric: what the best one is judged by, lower is better
    record: what else the manifest is to hold, such as the run's configuration
    Raises `ValueError` for a state that could not be read back or a metric that is not finite;
    `OSError` when the disk refuses, with the checkpoints before it intact.
    """
    check_plain(state, "state")
    demand("metric", metric, metric is None or math.isfinite(metric), "finite, or None")
    final, temp = places(run, step)
    try:
        with telling(run, final):
            make_folder(temp)
            write_files(temp, step, weights, state, metric, record)
            publish(temp, final)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    prune(run, final, keep_last)
    return final


def places(run: Path, step: int) -> tuple[Path, Path]:
    """Return the folder of a checkpoint, and the one in which it is made."""
    folder = Path(run) / "checkpoints"
    return folder / f"step_{step:06d}", folder / f".tmp_step_{step:06d}"


def make_folder(temp: Path) -> None:
    """Make the folder in which a checkpoint is written."""
    temp.parent.mkdir(parents=True, exist_ok=True)
    flush(temp.parent.parent)
    remove_leftovers(temp.parent)
    temp.mkdir()


@contextlib.contextmanager
def telling(run: Path, final: Path) -> Iterator[None]:
    """Turn an error of writing into one that says which checkpoint failed and which is intact."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, before = getattr(error, "strerror", None) or error, newest_checkpoint(run)
        intact = f"{before}, the one before it, is intact" if before else "there is none before it"
        raise OSError(f"checkpoint {final} could not be written: {reason}; {intact}") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and prunings that were killed have left among the checkpoints."""
    for leftover in folder.glob(".tmp_*"):
        shutil.rmtree(leftover)
    for aside in folder.glob("*.replaced"):
        if aside.with_suffix("").exists():
            discard(aside)


def check_plain(value, where: str) -> None:
    """Raise `ValueError` naming the first entry that `load_state` would later refuse."""
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, entry in enumerate(value):
            check_plain(entry, f"{where}[{i}]")
    elif not isinstance(value, Tensor | None) and type(value) not in (str, bytes, bool, int, float):
        raise ValueError(f"{where} = {value!r} of type {type(value).__name__} cannot be saved: "
                         "it must be a tensor, a number, a string, None, or a dict or list of them")


def write_files(folder: Path, step: int, weights: dict, state: dict, metric: float | None,
                record: dict | None = None) -> None:
    """Write and flush the three files of a checkpoint, the manifest last."""
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous()
              for name, tensor in weights.items()}  # safetensors refuses shared memory
    save_tensors(copies, folder / WEIGHTS)
    with open(folder / STATE, "wb") as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:  # it hides the disk's own error
            raise error.__context__ or error from None
    files = {}
    for name in (WEIGHTS, STATE):
        flush(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    write_manifest(folder, FORMAT, step, metric, files, record)


def write_manifest(folder: Path, version: int, step: int, metric: float | None, files: dict,
                   record: dict | None) -> None:
    """Write the last file of a checkpoint; files: size and SHA-256 of the others."""
    write_flushed(folder / MANIFEST, sealed({"format": version, "step": step, "metric": metric,
                                             "torch": torch.__version__, "files": files}
                                            | (record or {})))
    flush(folder)


def prune(run: Path, saved: Path, keep_last: int) -> None:
    """Remove all but the one just saved, the `keep_last` newest and the best; 0 keeps all."""
    if keep_last == 0:
        return
    found, metrics = all_checkpoints(run), {}
    for path in found:
        with contextlib.suppress(ValueError, OSError):
            metrics[path] = read_manifest(path)["metric"]
    measured = (path for path in found if metrics.get(path) is not None)
    best = min(measured, key=metrics.get, default=None)  # of equals the newest
    for path in found:
        if path not in (saved, best, *found[:keep_last]):
            discard(path)


def all_checkpoints(run: Path) -> list[Path]:
    """Return the folders named like checkpoints, whole or not, newest first."""
    found = []
    for path in (Path(run) / "checkpoints").glob("step_*"):
        if match := NAME.fullmatch(path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def forget_beginning(run: Path) -> None:
    """Remove the step 0 of a run that was killed before it began; another run may take its place.

    Raises `ValueError` for later checkpoints: they belong to a run whose config.json is lost.
    """
    for path in all_checkpoints(run):
        if int(NAME.fullmatch(path.name)[1]):
            raise ValueError(f"out = {str(run)!r} is not valid: it holds {path.name} but no "
                             "config.json; put that back, or name another folder")
        discard(path)


def read_manifest(path: Path) -> dict:
    """Read a checkpoint's manifest; raise `ValueError` if missing, unreadable or changed."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
        version = manifest["format"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{file} is not a readable manifest ({len(data)} bytes)") from None
    if version not in (FORMAT, SHARDED):
        raise ValueError(f"{file} has format {version!r}: this version reads formats {FORMAT} and "
                         f"{SHARDED}")
    if not is_sealed(data, manifest):
        raise ValueError(f"{file} was changed: it does not match its seal")
    return manifest


def recorded(run: Path, name: str, checkpoint: Path | None = None) -> dict | None:
    """Return what a manifest holds under `name`; None if it holds nothing, as of earlier versions.

    checkpoint: whose manifest; None: the newest one that can be read
    """
    for path in [checkpoint] if checkpoint else all_checkpoints(run):
        try:
            return read_manifest(path).get(name)
        except (ValueError, OSError):
            if checkpoint:
                raise
    return None


def verify(path: Path, kind: str = "") -> dict:
    """Check the files whose names begin with `kind`, all by default, and return the manifest.

    Raises `ValueError` naming a damaged file.
    """
    manifest = read_manifest(path)
    for name in manifest["files"]:
        if not name.startswith(kind):
            continue
        file, recorded = Path(path) / name, manifest["files"][name]
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if (size := file.stat().st_size) != recorded["bytes"]:
            raise ValueError(f"{file} has {size} bytes, its manifest says {recorded['bytes']}")
        if digest(file) != recorded["sha256"]:
            raise ValueError(f"{file} was changed: its SHA-256 is not the manifest's")
    return manifest


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and why each newer one is refused."""
    refused = []
    for path in all_checkpoints(run):
        try:
            verify(path)
            return path, refused
        except (ValueError, OSError) as error:
            refused.append(f"refused checkpoint {path.name}: {error}")
    return None, refused


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint that verifies; name on stderr those that it stands in for."""
    newest, refused = newest_whole(run)
    if newest:
        for line in refused:
            print(line, file=sys.stderr)
    return newest


def is_sharded(path: Path) -> bool:
    """Return whether many ranks wrote a checkpoint, each its own parts."""
    return read_manifest(path)["format"] == SHARDED


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the weights on the CPU; raise `ValueError` if a file is not the one saved."""
    if is_sharded(path):
        return open_parts(path, "model").whole()
    verify(path, WEIGHTS)
    return load_file(Path(path) / WEIGHTS)


def open_parts(path: Path, kind: str) -> Parts:
    """Return the verified tensors of a checkpoint that many ranks wrote; kind: "model", .."""
    names = [name for name in verify(path, kind)["files"] if name.startswith(kind)]
    return Parts([Path(path) / name for name in names])


def load_state(path: Path) -> dict:
    """Load the state on the CPU; raise `ValueError` if it is not the one saved, or not plain.

    Its "optimizers" are their state_dicts or, of many ranks, `Parts` of tensors named
    PARAMETER/exp_avg and the like; so are other kinds of tensors.
    """
    if is_sharded(path):
        verify(path, PLAIN_STATE)
        state = json.loads((Path(path) / PLAIN_STATE).read_bytes())
        python, numbers = state["rng"]["python"], state["rng"]["torch"]
        state["rng"] |= dict(python=(python[0], tuple(python[1]), python[2]),
                             torch=torch.tensor(numbers, dtype=torch.uint8))
        kinds = {name.partition("-")[0] for name in read_manifest(path)["files"]}
        kinds -= {"model", "optimizer", PLAIN_STATE}
        return state | dict(optimizers=open_parts(path, "optimizer"),
                            **{kind: open_parts(path, kind) for kind in kinds})
    verify(path, STATE)
    file = Path(path) / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} holds more than tensors and plain values: {reason}") from None


def resolve(path: Path) -> Path:
    """Return the checkpoint that `path` names: itself, or a run folder's newest whole one."""
    path = Path(path)
    if not path.is_dir():
        names = [p.name for p in path.parent.glob("*") if p.is_dir()]
        raise ValueError(f"{path} is not a folder: {nearest(path.name, names)}"
                         "give a run folder or one of its checkpoints")
    if (path / MANIFEST).exists() or NAME.fullmatch(path.name):
        return path
    if not all_checkpoints(path):
        raise ValueError(f"{path} holds no checkpoint: "
                         "give a run folder, with checkpoints/step_NNNNNN in it, or a checkpoint")
    if newest := newest_checkpoint(path):
        return newest
    raise ValueError(f"{path} holds no whole checkpoint: {'; '.join(newest_whole(path)[1][:3])}")


def rng_state() -> dict:
    """Return the state of Python's, numpy's and torch's generators, on the CPU and each GPU."""
    name, keys, *rest = np.random.get_state()
    gpus = {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}
    gpus |= {"mps": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {}
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
            "torch": torch.get_rng_state()} | gpus


def set_rng_state(state: dict) -> None:
    """Restore the generators that this machine has to a state from `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, gpu in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
        torch.cuda.set_rng_state(gpu, device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
