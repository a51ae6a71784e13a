"""Save and load what many ranks share: each writes its own parts, any number of ranks reads them.

    model-00001-of-00004.safetensors       the first rank's parts of the weights
    optimizer-00001-of-00004.safetensors   and of the optimizers' state, as NAME/exp_avg, ..
    reference-00001-of-00004.safetensors   of GRPO the reference, and a rollout that is in use
    state.json                             loader, random-number and schedule state
    manifest.json                          as of one process, with format 2

Tensors that several ranks hold alike are written by the first of them. `minids.parallel.parts`
says how parts are put together.

Simplified: all ranks see one file system.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minids.base.files import digest, publish, write_flushed
from minids.parallel.parts import Part, Parts, own_parts, write_parts
from minids.parallel.shards import local, own_part
from minids.parallel.team import Team
from minids.runs import checkpoints

STEP = "step"  # AdamW's count, a scalar that no rank shares

Read = Callable[[str, tuple[slice, ...] | None], Tensor]  # a tensor's region, or all of it


def named_states(model: nn.Module, optimizers: list) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's state, as NAME/exp_avg and the like."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            yield from ((f"{names[id(p)]}/{key}", tensor) for key, tensor in state.items())


def states_by_name(saved: list[dict], model: nn.Module, optimizers: list) -> dict[str, Tensor]:
    """Return by name what the state_dicts of whole optimizers, built for `model`, hold."""
    names = {id(p): name for name, p in model.named_parameters()}
    flat = {}
    for states, optimizer in zip(saved, optimizers, strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, state in states["state"].items():
            flat |= {f"{names[id(params[i])]}/{key}": tensor for key, tensor in state.items()}
    return flat


@torch.no_grad()
def load_states(model: nn.Module, optimizers: list, names: Iterable[str], read: Read,
                written_as: Callable[[str], str] = lambda name: name) -> None:
    """Give optimizers the state that `named_states` saved, whoever held which part of it.

    names: of all tensors saved; written_as: the name under which a parameter was saved
    """
    keys: dict[str, list[str]] = {}
    for name in names:
        parameter, _, key = name.rpartition("/")
        keys.setdefault(parameter, []).append(key)
    named = {id(p): written_as(name) for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state, name = {}, named[id(p)]
                for key in keys.get(name, []):
                    if key == STEP:
                        count = read(f"{name}/{key}", None)
                        state[key] = count.to(p.device) if group.get("fused") else count.clone()
                        continue
                    part = read(f"{name}/{key}", own_part(p))
                    fill(moment := torch.zeros_like(p, dtype=part.dtype), part)
                    state[key] = moment
                if state:
                    optimizer.state[p] = state


def load_weights(model: nn.Module, weights: Parts | dict[str, Tensor]) -> None:
    """Load this rank's parts of the weights, from parts that any layout of ranks wrote."""
    weights = weights if isinstance(weights, Parts) else Parts.of(weights)
    for name, tensor in model.state_dict().items():
        fill(tensor, weights.read(name, own_part(tensor)))


@torch.no_grad()
def fill(tensor: Tensor, part: Tensor) -> None:
    """Copy a part that was read into this rank's part of a tensor; ValueError if it does not fit.
    """
    own = local(tensor)
    if own.numel() and own.shape != part.shape:
        raise ValueError(f"a tensor has the shape {tuple(part.shape)} in the checkpoint, and "
                         f"{tuple(own.shape)} in this model")
    if own.numel():
        own.copy_(part)


def held_parts(team: Team, kinds: dict[str, dict[str, Tensor | Part]]
               ) -> dict[str, dict[str, Part]]:
    """Return what this rank has to write, by the names of its files, copied to the host's memory.

    kinds: this rank's parts of tensors by kind, "model", "optimizer" and what else there is
    """
    place = team.ranks.dense.get_local_rank
    return {f"{kind}-{team.rank + 1:05d}-of-{team.world:05d}.safetensors":
            own_parts(tensors, place("replicate"), place("fsdp"))
            for kind, tensors in kinds.items()}


def save(team: Team, run: Path, step: int, held: dict[str, dict[str, Part]], plain: dict,
         keep_last: int, metric: float | None, record: dict | None) -> Path:
    """Write `checkpoints/step_NNNNNN` whole, by all ranks of a team; returns its folder.

    held: of `held_parts`; plain: state that JSON can hold
    The other arguments, and what is raised, are those of `checkpoints.save_checkpoint`.
    """
    final, temp = checkpoints.places(run, step)
    entries = {}
    try:
        with team.together(), checkpoints.telling(run, final):
            if team.first:
                checkpoints.make_folder(temp)
        with team.together(), checkpoints.telling(run, final):
            for name, parts in held.items():
                entries[name] = write_parts(temp / name, parts)
        files = {name: entry for each in team.gathered(entries) for name, entry in each.items()}
        with team.together(), checkpoints.telling(run, final):
            if team.first:
                write_flushed(file := temp / checkpoints.PLAIN_STATE, json.dumps(plain).encode())
                files[file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
                checkpoints.write_manifest(temp, checkpoints.SHARDED, step, metric, files, record)
                publish(temp, final)
                checkpoints.prune(run, final, keep_last)
    finally:
        if team.first:
            shutil.rmtree(temp, ignore_errors=True)
    return final


def merge(learner) -> Path:
    """Write a run's newest checkpoint, which many ranks wrote, again as one process does.

    learner: of one process, new
    Returns its folder; a checkpoint of one process stays as it is.
    """
    learner.restore()
    newest = checkpoints.resolve(learner.run)
    if not checkpoints.is_sharded(newest):
        return newest
    return learner.save(checkpoints.read_manifest(newest)["metric"])
