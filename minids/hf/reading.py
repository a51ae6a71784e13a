"""Read a Hugging Face folder: check everything from the headers, then load each tensor."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minids.base.fields import nearest
from minids.base.files import read_json
from minids.config import ModelArgs
from minids.fp8 import BLOCK, dequantize
from minids.hf.names import (
    ANGLES,
    CONFIG,
    COPY,
    INDEX,
    MTP,
    WEIGHTS,
    Slot,
    own_dtype,
    skeleton,
    slots,
)
from minids.hf.settings import args_from_config, check_quantization
from minids.model.transformer import Transformer

BAND = 8 * BLOCK  # rows of an FP8 matrix that are dequantised at a time
WIDE_DTYPES = ("F64", "F32", "BF16", "F16")


class Header(NamedTuple):
    """What a file says of a tensor: dtype in safetensors' words ("BF16", "F8_E4M3")."""

    file: Path
    dtype: str
    shape: list[int]


class Source(NamedTuple):
    """A folder that was checked and fits together.

    args: its settings, with the MTP modules that its files have
    headers: released name -> header, everything that the files hold
    slots: released name -> place, of a model of these settings
    """

    folder: Path
    config: dict
    args: ModelArgs
    headers: dict[str, Header]
    slots: dict[str, Slot]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what is not FP8, the embedding's."""
        name = self.headers["model.embed_tokens.weight"].dtype
        return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}.get(
            name, torch.bfloat16)


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32,
            device: torch.device | str = "cpu") -> Transformer:
    """A released model, or one of transformers or of `save_hf`.

    folder: with config.json and the safetensors files. Where the configuration promises an MTP
        module that the files do not have, the model has none either.
    dtype: of all weights; the gates' biases are never narrower than FP32
    Raises `ValueError` naming the file and the field or tensor that is not right; no weight has
    been read then.
    """
    return read_model(inspect(folder), dtype, device)


def inspect(folder: str | Path) -> Source:
    """Read the settings and the files' headers, and check them against each other."""
    folder = checked_folder(Path(folder))
    config = read_json(folder / CONFIG)
    try:
        args = args_from_config(config)
        has_fp8 = check_quantization(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    headers = read_headers(folder)
    mtp = f"model.layers.{args.n_layers}."
    if args.n_mtp_layers and not any(name.startswith(mtp) for name in headers):
        args = replace(args, n_mtp_layers=0)
    source = Source(folder, config, args, headers, slots(args))
    check_names(source)
    check_shapes(source, has_fp8)
    return source


def checked_folder(folder: Path) -> Path:
    """The folder, or what a save that was killed has put aside for it."""
    found = folder if folder.exists() else aside_of(folder)
    if not found.is_dir():
        names = [p.name for p in folder.parent.glob("*") if p.is_dir()]
        raise ValueError(f"{folder} is not a folder: {nearest(folder.name, names)}"
                         f"give one with {CONFIG} and {WEIGHTS}, or shards and their index")
    if found != folder:
        print(f"{folder} is missing: a save of it was interrupted; reading {found}",
              file=sys.stderr)
    return found


def aside_of(folder: Path) -> Path:
    """Where the old folder is while a new one takes its place; `publish` calls it so."""
    return folder.with_name(folder.name + ".replaced")


def read_headers(folder: Path) -> dict[str, Header]:
    """The headers of every file that belongs to the model, in the files' order."""
    if (folder / WEIGHTS).is_file():
        found = read_header(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        found = read_shard_headers(folder)
    else:
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    more = read_header(folder / MTP) if (folder / MTP).is_file() else {}
    if twice := found.keys() & more.keys():
        raise ValueError(f"{folder / MTP}: {min(twice)} stands in another file too")
    return found | more


def read_header(file: Path) -> dict[str, Header]:
    """The headers of one file; `ValueError` if it is missing or cut short."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        with safe_open(file, "pt") as stream:
            parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            return {name: Header(file, part.get_dtype(), part.get_shape())
                    for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ValueError(f"{file} is not a whole safetensors file, {size:,} bytes: "
                         f"{error}") from None


def read_shard_headers(folder: Path) -> dict[str, Header]:
    """The headers of all shards, which hold exactly what the index says."""
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise ValueError(f"{index}: weight_map is not a table of tensors and files beside it")
    found = {}
    for shard in sorted(set(places.values())):
        headers = read_header(folder / shard)
        listed = {name for name, file in places.items() if file == shard}
        for name in sorted(listed ^ headers.keys()):
            problem = "is missing, and the index lists it" if name in listed else (
                "is not one that the index lists there")
            raise ValueError(f"{folder / shard}: tensor {name} {problem}")
        found |= headers
    return found


def is_spare(source: Source, name: str) -> bool:
    """Whether a tensor of the files is one that the model does without."""
    copy = COPY.fullmatch(name)
    empty = "shared_experts" in name and 0 in source.headers[name].shape
    return empty or name.endswith(ANGLES) or bool(copy and int(copy[1]) >= source.args.n_layers)


def weight_of(name: str) -> str:
    """The weight that a block scale belongs to."""
    return name.removesuffix("_scale_inv")


def is_fp8(source: Source, name: str) -> bool:
    """Whether a weight is stored in FP8."""
    return name in source.headers and source.headers[name].dtype == "F8_E4M3"


def check_names(source: Source) -> None:
    """Every tensor of the model is there, with its scales, and no other."""
    headers, wanted = source.headers, source.slots
    missing = [name for name in wanted if name not in headers]
    missing += [f"{name}_scale_inv" for name in wanted
                if is_fp8(source, name) and f"{name}_scale_inv" not in headers]
    extra = [name for name in headers if name not in wanted and not is_spare(source, name)
             and not (name.endswith("_scale_inv") and is_fp8(source, weight_of(name)))]
    for names, problem in ((missing, "is missing"), (extra, "is extra")):
        if names:
            single = source.folder / WEIGHTS
            file = headers[names[0]].file if names is extra else (
                single if single.is_file() else source.folder / INDEX)
            more = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
            raise ValueError(f"{file}: tensor {names[0]} {problem}{more}, by {CONFIG} "
                             f"({source.args.n_layers} layers, {source.args.n_routed_experts} "
                             f"experts, {source.args.n_mtp_layers} MTP)")


def check_shapes(source: Source, has_fp8: bool) -> None:
    """Every tensor has the shape that the settings ask for, in a precision that we read."""
    for name, slot in source.slots.items():
        header = source.headers[name]
        expect(header, name, "shape", header.shape, [slot.shape])
        expect(header, name, "dtype", header.dtype,
               [*WIDE_DTYPES, *(["F8_E4M3"] if has_fp8 and len(slot.shape) == 2 else [])])
        if header.dtype == "F8_E4M3":
            scale, blocks = f"{name}_scale_inv", [-(-n // BLOCK) for n in slot.shape]
            expect(source.headers[scale], scale, "shape", source.headers[scale].shape, [blocks])
            expect(source.headers[scale], scale, "dtype", source.headers[scale].dtype,
                   ["F32", "F8_E8M0"])


def expect(header: Header, name: str, what: str, found, valid: list) -> None:
    """Raise the one-line `ValueError` about a tensor."""
    if found not in valid:
        raise ValueError(f"{header.file}: tensor {name} has {what} {found}, and {CONFIG} asks for "
                         f"{' or '.join(map(str, valid))}")


def read_model(source: Source, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """Room for the model first; then each tensor into its place, one at a time."""
    model = skeleton(source.args)
    state = {name: torch.empty(tensor.shape, dtype=own_dtype(name, dtype), device=device)
             for name, tensor in model.state_dict().items()}
    order = [name for name in source.headers if name in source.slots]
    for name in tqdm(order, desc="load", unit="tensor", disable=None, delay=1):
        slot = source.slots[name]
        target = state[slot.name] if slot.expert is None else state[slot.name][slot.expert]
        read_into(target, source, name)
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_into(target: Tensor, source: Source, name: str) -> None:
    """Copy a tensor to its place, in the place's precision."""
    if not is_fp8(source, name):
        with opened(source, name) as tensor:
            target.copy_(tensor)
        return
    with opened(source, name) as q, opened(source, f"{name}_scale_inv") as scale:
        q, scale = q.to(target.device), scale.to(target.device)
        for start in range(0, len(q), BAND):
            rows = slice(start, start + BAND)
            blocks = slice(start // BLOCK, (start + BAND) // BLOCK)
            target[rows].copy_(dequantize(q[rows], scale[blocks]))


@contextlib.contextmanager
def opened(source: Source, name: str) -> Iterator[Tensor]:
    """A tensor in its file. The file is closed at once: its pages count as this process's memory
    while it is mapped, and a shard has gigabytes of them."""
    with safe_open(source.headers[name].file, "pt") as stream:
        yield stream.get_tensor(name)
