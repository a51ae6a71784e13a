"""Read a Hugging Face folder: check everything by the headers, then load one tensor at a time.

A folder with an error is refused before any weight is read. Each tensor goes straight into the
model's memory, so the peak is the model plus its largest tensor. FP8 weights are multiplied by
their block scales (V3, arXiv 2412.19437, section 3.3.2; `weight_scale_inv` in the files, FP32 or
UE8M0).
"""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minids.apply.stored import FP8, SCALE, keep_blocks
from minids.base.fields import demand, nearest
from minids.base.files import read_json
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.fp8 import BLOCK, dequantize_into
from minids.hf.names import CONFIG, INDEX, MTP, WEIGHTS, copies, own_dtype, shapes, skeleton, to_hf
from minids.hf.settings import args_from_config
from minids.model.transformer import Transformer

WIDE = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Header(NamedTuple):
    """The header of one tensor; `name` in its file, `dtype` as safetensors names it, "BF16"."""

    file: Path
    name: str
    dtype: str
    shape: list[int]


class Source(NamedTuple):
    """A checked folder: its settings, with the MTP modules that its files hold, and its headers."""

    folder: Path
    args: ModelArgs
    headers: dict[str, Header]

    @property
    def dtype(self) -> torch.dtype:
        """Return the embedding's precision; released files store all that is not FP8 in it."""
        return WIDE.get(self.headers["model.embed_tokens.weight"].dtype, torch.bfloat16)

    def is_fp8(self, name: str) -> bool:
        """Return whether a weight is stored in FP8."""
        return name in self.headers and self.headers[name].dtype == "F8_E4M3"


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32,
            device: torch.device | str = "cpu") -> Transformer:
    """Load a released model, or one saved by transformers or `save_hf`.

    folder: holds config.json and the safetensors files; an MTP module that they lack is left out
    dtype: of all weights, except that the gates' biases are at least FP32
    Raises `ValueError` naming the file and the wrong field or tensor, before any weight is read.
    """
    return read_model(inspect(folder), dtype, device)


def inspect(folder: str | Path) -> Source:
    """Read settings and headers, and check them; raises `ValueError` as `load_hf` does."""
    folder = checked_folder(Path(folder))
    config = read_json(folder / CONFIG)
    try:
        args = args_from_config(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    headers = read_headers(folder)
    total, there = count_parameters(args).total, sum(math.prod(h.shape) for h in headers.values())
    if total > 2 * there:  # told here, since `check_tensors` lists all of the model's tensors
        raise ValueError(f"{folder / CONFIG}: its sizes make {total:,} parameters, and the files "
                         f"have {there:,}")
    args, spare = matched_mtp(args, headers)
    headers = {name: header for name, header in headers.items() if name not in spare}
    source = Source(folder, args, tied(folder, config, headers))
    check_tensors(source, config.get("quantization_config") is not None)
    if spare:
        print(f"{folder}: MTP modules beyond those in {CONFIG} are not read", file=sys.stderr)
    return source


def matched_mtp(args: ModelArgs, headers: dict[str, Header]) -> tuple[ModelArgs, set[str]]:
    """Return the settings with at most the MTP modules that the files hold, and the names of the
    tensors of modules that the settings do not have."""
    layers = {}
    for name in headers:
        if found := re.match(r"model\.layers\.(\d{1,9})\.", name):
            layers.setdefault(int(found[1]) - args.n_layers, []).append(name)
    spare = [names for module, names in layers.items() if module >= args.n_mtp_layers
             and any(name.endswith(".eh_proj.weight") for name in names)]
    count = min(args.n_mtp_layers, sum(module >= 0 for module in layers))
    return replace(args, n_mtp_layers=count), set().union(*spare)


def tied(folder: Path, config: dict, headers: dict[str, Header]) -> dict[str, Header]:
    """Return the headers, with the embedding's for a tied head that the files leave out.

    Raises `ValueError` if they hold a tied head that is not equal to the embedding.
    """
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if not config.get("tie_word_embeddings") or embed not in headers:
        return headers
    ends = headers[embed], headers.get(head, headers[embed])
    same = ends[0][2:] == ends[1][2:] and torch.equal(*map(stored, ends))
    demand(f"{folder / CONFIG}: tie_word_embeddings", True, same, f"False where {head} differs")
    return headers | {head: ends[1]}


def checked_folder(folder: Path) -> Path:
    """Return the folder, or the old one that a killed save has set aside."""
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
    """Return where `publish` keeps the old folder while a new one takes its name."""
    return folder.with_name(folder.name + ".replaced")


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the headers of all files of the model; shards must hold what the index lists."""
    files, index = {WEIGHTS: None}, folder / INDEX
    if not (folder / WEIGHTS).is_file():
        if not index.is_file():
            raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in listed.values()):
            raise ValueError(f"{index}: weight_map is not a table of tensors and files beside it")
        files = {shard: {name for name, file in listed.items() if file == shard}
                 for shard in sorted(set(listed.values()))}
    if (folder / MTP).is_file():
        files.setdefault(MTP)
    found = {}
    for file, names in files.items():
        headers = read_header(folder / file)
        for name in sorted((names or headers.keys()) ^ headers.keys()):
            problem = "is missing, and the index lists it" if name in names else (
                "is not one that the index lists there")
            raise ValueError(f"{folder / file}: tensor {name} {problem}")
        if twice := found.keys() & headers.keys():
            raise ValueError(f"{folder / file}: {min(twice)} is in another file too")
        found |= headers
    return found


def read_header(file: Path) -> dict[str, Header]:
    """Return the headers of one file; `ValueError` if it is missing or truncated."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        with safe_open(file, "pt") as stream:
            parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            return {name: Header(file, name, part.get_dtype(), part.get_shape())
                    for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file, {file.stat().st_size:,} bytes: "
                         f"{error}") from None


def check_tensors(source: Source, has_fp8: bool) -> None:
    """Raise `ValueError` unless the files hold exactly the model's tensors, in readable types."""
    args, headers, expected = source.args, source.headers, {}
    for name, shape in shapes(args).items():
        narrow = ["F8_E4M3"] if has_fp8 and len(shape) == 2 else []
        expected[name] = shape, [*WIDE, *narrow]
        if source.is_fp8(name):
            blocks = [-(-size // BLOCK) for size in shape]
            expected[name + SCALE] = blocks, ["F32", "F8_E8M0"]
    # Spare are copies in an MTP layer, empty shared experts, and tables of angles in older files.
    known = expected.keys() | copies(args).keys()
    extra = [name for name, header in headers.items() if name not in known
             and not ("shared_experts" in name and 0 in header.shape)
             and not name.endswith("rotary_emb.inv_freq")]
    missing = [name for name in expected if name not in headers]
    if names := missing or extra:
        index = source.folder / (WEIGHTS if (source.folder / WEIGHTS).is_file() else INDEX)
        file, problem = (index, "missing") if missing else (headers[names[0]].file, "extra")
        more = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
        raise ValueError(f"{file}: tensor {names[0]} is {problem}{more}, by {CONFIG} "
                         f"({args.n_layers} layers, {args.n_routed_experts} experts, "
                         f"{args.n_mtp_layers} MTP)")
    for name, (shape, dtypes) in expected.items():
        file, _, dtype, stored_shape = headers[name]
        for what, found, valid in ("shape", stored_shape, [shape]), ("dtype", dtype, dtypes):
            if found not in valid:
                raise ValueError(f"{file}: tensor {name} has {what} {found}, and {CONFIG} "
                                 f"asks for {' or '.join(map(str, valid))}")


def read_model(source: Source, dtype: torch.dtype, device: torch.device | str,
               part: Transformer | None = None, first_expert: int = 0,
               keep_fp8: bool = False) -> Transformer:
    """Allocate the model's memory, then read one tensor after another into it.

    part: on the meta device, what a rank has of the model, under the whole model's names; no other
        tensors are read; first_expert: number of the first one in its stacks. None: the whole model
    keep_fp8: keep the blocks' FP8 matrices as they are stored (`minids.apply.stored`)
    """
    model = skeleton(source.args) if part is None else part
    if keep_fp8:
        def is_fp8(name: str, tensor: Tensor) -> bool:
            return all(map(source.is_fp8, dict(to_hf(source.args, {name: tensor}, first_expert))))

        keep_blocks(model, dtype, is_fp8)
    state = {}
    for name, tensor in model.state_dict().items():
        kept = tensor.dtype == FP8 or name.endswith(SCALE)  # a matrix in FP8, or its scales
        state[name] = torch.empty_like(tensor, device=device, dtype=tensor.dtype if kept
                                       else own_dtype(name, dtype))
    targets = dict(to_hf(source.args, state, first_expert))  # views of it
    order = [name for name in source.headers if name in targets]
    for name in tqdm(order, desc="load", unit="tensor", disable=None, delay=1):
        read_into(targets[name], source, name)
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_into(target: Tensor, source: Source, name: str) -> None:
    """Copy a stored tensor into `target`, in the target's precision."""
    if not source.is_fp8(name) or target.dtype == FP8:
        target.copy_(stored(source.headers[name]))
        return
    q, scale = (stored(source.headers[name + end]).to(target.device) for end in ("", SCALE))
    dequantize_into(target, q, scale)


def stored(header: Header) -> Tensor:
    """Return a tensor as its file stores it.

    The file is open for this tensor alone, because the pages of a mapped file count as the
    process's memory, and a shard has gigabytes of them.
    """
    with safe_open(header.file, "pt") as stream:
        return stream.get_tensor(header.name)


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder is a Hugging Face folder, not a run or one of its checkpoints."""
    path = path if path.exists() else aside_of(path)
    if (path / "manifest.json").exists() or not (path / CONFIG).is_file():
        return False
    has_weights = any(path.glob("*.safetensors")) or (path / INDEX).is_file()
    return has_weights or b'"model_type"' in (path / CONFIG).read_bytes()  # no run has the field
