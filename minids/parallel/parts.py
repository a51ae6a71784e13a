"""Files that hold parts of tensors: each rank writes its own, and any number of ranks reads them.

A file is a safetensors file whose header says, under "parts", where its tensors lie in the whole
ones. A reader takes the region that it needs from the files that hold pieces of it, so 8 ranks may
write and 4 or 1 read, sharded otherwise or not at all.
"""

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minids.base.files import digest, flush
from minids.base.tensors import save_tensors
from minids.parallel.shards import is_sharded, local, own_part


class Part(NamedTuple):
    """One rank's part of a tensor, and where it lies in the whole."""

    tensor: Tensor
    shape: list[int]  # of the whole
    offsets: list[int]


def own_parts(tensors: dict[str, Tensor | Part], replica: int, shard: int) -> dict[str, Part]:
    """Return the parts that this rank has to write, copied to the host's memory.

    replica, shard: this rank's place among those that hold the same, and among those that share
    """
    parts = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Part):
            held = tensor.tensor.to("cpu", copy=True).contiguous()
            parts[name] = tensor._replace(tensor=held)
            continue
        mine = local(tensor.detach())
        if replica == 0 and mine.numel() and (is_sharded(tensor) or shard == 0):
            offsets = [cut.start for cut in own_part(tensor)]
            held = mine.to("cpu", copy=True).contiguous()
            parts[name] = Part(held, list(tensor.shape), offsets)
    return parts


def write_parts(file: Path, parts: dict[str, Part]) -> dict:
    """Write and flush a rank's parts; return the file's size and SHA-256."""
    places = {name: [part.shape, part.offsets] for name, part in parts.items()}
    held = {name: part.tensor.contiguous() for name, part in parts.items()}
    save_tensors(held, file, {"parts": json.dumps(places)})
    flush(file)
    return {"bytes": file.stat().st_size, "sha256": digest(file)}


class Parts:
    """Tensors that files hold in parts, or that are whole in memory."""

    def __init__(self, files: list[Path]):
        """Read the files' headers; raise ValueError for a file that is no such file."""
        self.files, self.found, self.memory = {}, {}, {}
        for path in files:
            try:
                self.files[path] = safe_open(path, "pt")
                places = json.loads(self.files[path].metadata()["parts"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            for name, place in places.items():
                self.found.setdefault(name, []).append((path, *place))

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Parts":
        """Return whole tensors in the form of parts."""
        parts = cls([])
        parts.memory, parts.found = tensors, dict.fromkeys(tensors, [])
        return parts

    def whole(self) -> dict[str, Tensor]:
        """Return all tensors by name, put together."""
        return {name: self.read(name) for name in self.found}

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return a region of a tensor, or all of it.

        Raises ValueError if the files lack a part of it.
        """
        if name not in self.found:
            raise ValueError(f"no file of this checkpoint holds {name}")
        if name in self.memory:
            whole = self.memory[name]
            return whole if region is None else whole[region]
        region = region or tuple(slice(0, size) for size in self.found[name][0][1])
        result, covered = None, 0
        for path, _, offsets in self.found[name]:
            piece = self.files[path].get_slice(name)
            sizes = piece.get_shape()
            cuts = [slice(max(want.start, start), min(want.stop, start + size))
                    for want, start, size in zip(region, offsets, sizes, strict=True)]
            if all(cut.start < cut.stop for cut in cuts):
                inside = tuple(slice(cut.start - start, cut.stop - start)
                               for cut, start in zip(cuts, offsets, strict=True))
                data = piece[inside] if inside else self.files[path].get_tensor(name)
                if result is None:
                    result = data.new_empty([want.stop - want.start for want in region])
                result[tuple(slice(cut.start - want.start, cut.stop - want.start)
                             for cut, want in zip(cuts, region, strict=True))] = data
                covered += data.numel()
        size = prod(want.stop - want.start for want in region)
        if covered != size:
            raise ValueError(f"the files of this checkpoint hold {covered} of {size} numbers of "
                             f"{name}")
        return torch.empty(0) if result is None else result
