"""Checkpoints: saved whole or not at all, and checked before they are read.

A run folder holds `checkpoints/step_NNNNNN/`, each with three files:
    model.safetensors   the weights, for any tool that reads safetensors
    state.pt            optimizer, loader, random-number and schedule state, to resume from
    manifest.json       step, metric, versions; size and SHA-256 of the other two, and its own seal

Why: a training process is killed, a disk fills up, a copy is cut short. A checkpoint is therefore
written under a temporary name, each file flushed to the disk, and renamed when it is complete; the
folder is flushed as well, for without that a rename may be lost or overtake the data that it names
(Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). A reader recomputes the
checksums, names what it refuses, and falls back on the checkpoint before it. Nothing here unpickles
an arbitrary object: `state.pt` holds tensors and plain values only.

Simplified: one process writes to a run at a time, and it holds all the weights. A sharded save
would be `torch.distributed.checkpoint`.
"""

import hashlib
import json
import math
import pickle
import random
import re
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minids.base.fields import nearest
from minids.base.files import digest, discard, flush, publish, write_flushed
from minids.config import ModelArgs
from minids.model.transformer import Transformer
from minids.text.tokenizer import Tokenizer

FORMAT = 1
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
NAME = re.compile(r"step_(\d{6,})(\.replaced)?")
PLAIN = (str, bytes, bool, int, float, type(None))


def save_checkpoint(run: Path, step: int, weights: dict[str, Tensor], state: dict,
                    keep_last: int = 3, metric: float | None = None) -> Path:
    """Write `checkpoints/step_NNNNNN` whole, then remove the checkpoints that are not to be kept.

    A kill at any moment leaves the old checkpoints, or the old ones and the new one. One of the
    same step is replaced.

    run: the run's folder, made if absent
    step: optimizer steps done
    weights: name -> tensor of any dtype, layout and device; tied tensors are written twice
    state: tensors and plain values, nested in dicts, lists and tuples
    keep_last: newest checkpoints that are kept, beside the best one; 0 keeps all
    metric: what "best" is judged by, lower is better
    Returns the checkpoint's folder.
    Raises `ValueError` for a state that could not be read back or a metric that is not finite;
    `OSError` when the disk refuses, with the checkpoints before it intact.
    """
    check_plain(state, "state")
    if metric is not None and not math.isfinite(metric):
        raise ValueError(f"metric = {metric!r} is not valid: it must be finite, or None")
    folder = Path(run) / "checkpoints"
    final = folder / f"step_{step:06d}"
    temp = folder / f".tmp_{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flush(folder.parent)
        sweep(folder)
        temp.mkdir()
        write_files(temp, step, weights, state, metric)
        publish(temp, final)
    except (OSError, SafetensorError) as error:
        raise OSError(explain_failure(final, error)) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    prune(run, final, keep_last)
    return final


def own_copy(tensor: Tensor) -> Tensor:
    """The values in contiguous CPU memory of their own: safetensors refuses shared memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def check_plain(value, where: str) -> None:
    """Raise `ValueError` naming the first entry that `torch.load(weights_only=True)` would refuse.

    Found here, it costs a run its start; found on resuming, it would cost the run.
    """
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, entry in enumerate(value):
            check_plain(entry, f"{where}[{i}]")
    elif type(value) not in PLAIN and not isinstance(value, Tensor):
        raise ValueError(f"{where} = {value!r} of type {type(value).__name__} cannot be saved: "
                         "it must be a tensor, a number, a string, None, or a dict or list of them")


def write_files(folder: Path, step: int, weights: dict, state: dict, metric: float | None) -> None:
    """The three files of a checkpoint, the manifest last, all flushed to the disk."""
    copies = {name: own_copy(tensor) for name, tensor in weights.items()}
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    save_state(folder / STATE, state)
    files = {}
    for name in (WEIGHTS, STATE):
        flush(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    body = {"format": FORMAT, "step": step, "metric": metric, "torch": torch.__version__,
            "files": files}
    write_flushed(folder / MANIFEST, sealed(body))
    flush(folder)


def save_state(file: Path, state: dict) -> None:
    """`torch.save` that raises the disk's own error, which torch hides behind one of its own."""
    with open(file, "wb") as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            raise error.__context__ or error from None


def sealed(body: dict) -> bytes:
    """The manifest's exact bytes: `body` and a checksum of it, so that any changed byte shows."""
    seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"seal": seal}, indent=2) + "\n").encode()


def sweep(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for leftover in folder.glob(".tmp_*"):
        shutil.rmtree(leftover)
    for aside in folder.glob("*.replaced"):
        if aside.with_suffix("").exists():
            discard(aside)


def explain_failure(final: Path, error: Exception) -> str:
    """One line: what could not be written, why, and which checkpoint stands."""
    reason = getattr(error, "strerror", None) or str(error)
    before = newest_checkpoint(final.parent.parent)
    stands = f"{before}, the one before it, is intact" if before else "there is none before it"
    return f"checkpoint {final} could not be written: {reason}; {stands}"


def prune(run: Path, saved: Path, keep_last: int) -> None:
    """Keep the one just saved, the `keep_last` newest and the best; 0 keeps all."""
    if keep_last == 0:
        return
    found = checkpoints(run)
    kept = {saved, *found[:keep_last], *by_metric(found)[:1]}
    for path in found:
        if path not in kept:
            discard(path)


def checkpoints(run: Path) -> list[Path]:
    """The folders named like checkpoints, newest first, whole or not."""
    found = [p for p in (Path(run) / "checkpoints").glob("step_*") if NAME.fullmatch(p.name)]
    return sorted(found, key=age, reverse=True)


def age(path: Path) -> tuple[int, bool]:
    """Sorts checkpoints: by step, and one put aside below the one that replaces it."""
    step, replaced = NAME.fullmatch(path.name).groups()
    return int(step), replaced is None


def by_metric(found: list[Path]) -> list[Path]:
    """Those with a readable manifest and a metric, best first; of equal ones the newest."""
    metrics = {}
    for path in found:
        try:
            metrics[path] = read_manifest(path)["metric"]
        except (ValueError, OSError):
            continue
    return sorted((p for p in metrics if metrics[p] is not None), key=metrics.get)


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint folder; `ValueError` if missing, unreadable or changed."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
        version = manifest["format"]
        body = {key: value for key, value in manifest.items() if key != "seal"}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file} is not a readable manifest ({len(data)} bytes)") from None
    if version != FORMAT:
        raise ValueError(f"{file} has format {version!r}: this version reads format {FORMAT}")
    if data != sealed(body):
        raise ValueError(f"{file} was changed: it does not match its seal")
    return manifest


def check_file(path: Path, name: str) -> Path:
    """One file of a checkpoint, after comparing its size and checksum with the manifest's."""
    file, recorded = Path(path) / name, read_manifest(path)["files"][name]
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    size = file.stat().st_size
    if size != recorded["bytes"]:
        raise ValueError(f"{file} has {size} bytes, its manifest says {recorded['bytes']}")
    if digest(file) != recorded["sha256"]:
        raise ValueError(f"{file} was changed: its SHA-256 is not the manifest's")
    return file


def verify(path: Path) -> dict:
    """The manifest of a whole checkpoint; `ValueError` naming the file that is wrong, and how."""
    for name in (WEIGHTS, STATE):
        check_file(path, name)
    return read_manifest(path)


def first_whole(found: list[Path]) -> Path | None:
    """The first one that verifies; those refused before it are named on stderr."""
    for path in found:
        try:
            verify(path)
            return path
        except (ValueError, OSError) as error:
            print(f"refused checkpoint {path.name}: {error}", file=sys.stderr)
    return None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; one line on stderr for each that is refused."""
    return first_whole(checkpoints(run))


def best_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of the lowest metric; None when no checkpoint recorded one."""
    return first_whole(by_metric(checkpoints(run)))


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights on the CPU; `ValueError` when the file is not the one that was saved."""
    return load_file(check_file(path, WEIGHTS))


def load_state(path: Path) -> dict:
    """The state on the CPU; `ValueError` when it is not what was saved, or holds other objects."""
    file = check_file(path, STATE)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} holds more than tensors and plain values: {reason}") from None


def resolve(path: Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest whole one of a run folder.

    Raises `ValueError` naming the folder and what would work.
    """
    path = Path(path)
    if not path.is_dir():
        names = [p.name for p in path.parent.glob("*") if p.is_dir()]
        raise ValueError(f"{path} is not a folder: {nearest(path.name, names)}"
                         "give a run folder or one of its checkpoints")
    if (path / MANIFEST).exists() or NAME.fullmatch(path.name):
        return path
    if not checkpoints(path):
        raise ValueError(f"{path} holds no checkpoint: "
                         "give a run folder, with checkpoints/step_NNNNNN in it, or a checkpoint")
    if (newest := newest_checkpoint(path)) is None:
        raise ValueError(f"{path} holds no whole checkpoint: all {len(checkpoints(path))} of them "
                         "were refused, as said above")
    return newest


class Run(NamedTuple):
    """A run as its folder describes it.

    config: what config.json holds; checkpoint: the folder that the weights are from
    """

    model: Transformer
    tokenizer: Tokenizer
    config: dict
    checkpoint: Path


def load_run(path: str | Path, device: torch.device | str = "cpu") -> Run:
    """The model of a run, ready to be used, and what belongs to it.

    path: a run folder, whose newest whole checkpoint is taken, or one of its checkpoint folders
    Raises `ValueError` naming what is missing, damaged or does not fit.
    """
    checkpoint = resolve(Path(path))
    folder = checkpoint.parent.parent
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} is no run folder: it has no config.json")
    config = json.loads(file.read_text())
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.fingerprint != config["tokenizer"]:
        raise ValueError(f"{folder / 'tokenizer'} does not match the checkpoint: its fingerprint "
                         f"is {tokenizer.fingerprint}, and the run was trained with "
                         f"{config['tokenizer']}")
    with torch.device("meta"):
        model = Transformer(ModelArgs(**config["model"]))
    model.load_state_dict(load_weights(checkpoint), assign=True)
    return Run(model.to(device).eval(), tokenizer, config, checkpoint)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device = {name!r} is not valid: {nearest(name, ['cpu', 'cuda', 'auto'])}"
                         "valid are auto, cpu and cuda")
    if name == "cuda" and not has_gpu:
        raise ValueError("device = 'cuda' is not valid: torch sees no GPU here; use --device cpu, "
                         "or install the CUDA build of torch")
    return torch.device(name)


def rng_state() -> dict:
    """Where the random generators stand: Python's, numpy's, torch's on the CPU and each GPU."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
             "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    """Put the generators back where `rng_state` found them, as far as this machine has them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, gpu in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
        torch.cuda.set_rng_state(gpu, device)


