"""Write a Hugging Face folder, whole or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minids.base.fields import nearest
from minids.base.files import flush, publish, read_json
from minids.fp8 import BLOCK, quantize_weight
from minids.hf.names import (
    CONFIG,
    INDEX,
    MTP,
    OWN_FILE,
    TOKENIZER_FILE,
    WEIGHTS,
    goes_to_fp8,
    mtp_among_others,
    mtp_copies,
    own_dtype,
    to_hf,
)
from minids.hf.reading import aside_of
from minids.hf.settings import QUANTIZE, config_from_args
from minids.model.transformer import Transformer
from minids.runs.checkpoints import own_copy
from minids.text.tokenizer import Tokenizer


def save_hf(model: Transformer, folder: str | Path, overwrite: bool = False,
            dtype: torch.dtype | None = None, shard_bytes: int = 5_000_000_000,
            tokenizer: Tokenizer | Path | None = None, quantize: str | None = None) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` and `load_hf` read.

    For the place of MTP modules see the module's docstring.

    folder: made; one that holds files already is refused, unless `overwrite`: then a model that
        was there is replaced, and a tokenizer if one is given; all other files stay. Killed at any
        moment, a save leaves the old folder whole, or the new one; between two renames the old one
        is FOLDER.replaced.
    dtype: of the weights; None: the model's own. The gates' biases are never narrower than FP32
    shard_bytes: of one file at most, held in memory while it is written
    tokenizer: goes along; or a folder whose tokenizer files are copied as they are
    quantize: "fp8" or "fp8-ue8m0": matrices in E4M3 with a scale for each 128 x 128 block, as V3
        is released, or with scales that are powers of two, as V3.1 and V3.2. Embedding, head,
        gates, norms, eh_proj and weights_proj stay wide.
    Raises `ValueError` for what cannot be expressed or a folder that is taken; `OSError` when the
    disk refuses, with the folder as it was.
    """
    folder = Path(folder).resolve()
    config = saved_config(model, dtype, tokenizer, quantize)
    check_target(folder, overwrite)
    with replacing(folder, (OWN_FILE, *([TOKENIZER_FILE] if tokenizer else []))) as temp:
        write_weights(model, temp, dtype, shard_bytes, quantize)
        (temp / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if isinstance(tokenizer, Tokenizer):
            tokenizer.save_hf(temp)
        elif tokenizer is not None:
            for file in tokenizer_files(Path(tokenizer)):
                shutil.copy2(file, temp)


def saved_config(model: Transformer, dtype: torch.dtype | None,
                 tokenizer: Tokenizer | Path | None, quantize: str | None) -> dict:
    """config.json of a save: the model's, and what belongs to these files."""
    if quantize is not None and quantize not in QUANTIZE:
        raise ValueError(f"quantize = {quantize!r} is not valid: {nearest(quantize, QUANTIZE)}"
                         f"valid are {', '.join(QUANTIZE)}")
    dtype = dtype or model.head.weight.dtype
    config = config_from_args(model.args) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    ends = {"bos_token_id": None, "eos_token_id": None}  # else transformers takes V3's
    if isinstance(tokenizer, Tokenizer):
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        if tokenizer.n_tokens > model.args.vocab_size:
            raise ValueError(f"tokenizer has {tokenizer.n_tokens} tokens: it must have at most "
                             f"vocab_size = {model.args.vocab_size}")
    elif tokenizer is not None:
        given = read_json(Path(tokenizer) / CONFIG)
        ends = {name: given.get(name) for name in ends}
    if quantize is not None:
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK]} | QUANTIZE[quantize]
    return config | ends


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` unless the folder may be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out = {folder} is not valid: it is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"out = {folder} is not valid: it holds files already; name another "
                         "folder, or give --overwrite to replace the model in it")
    aside = aside_of(folder)
    if aside.exists():
        raise ValueError(f"{aside} is in the way: an interrupted save has left it, or it is yours; "
                         f"rename it to {folder.name} or remove it")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer consists of, and how to generate with it."""
    return sorted(path for path in folder.iterdir()
                  if path.is_file() and TOKENIZER_FILE.fullmatch(path.name))


@contextlib.contextmanager
def replacing(folder: Path, replaced: Sequence[re.Pattern]) -> Iterator[Path]:
    """A new folder to fill, which then takes this folder's place.

    replaced: names of the files that go with the old folder; all others are carried over
    """
    temp, aside = folder.with_name(f".tmp_{folder.name}"), aside_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in (temp, folder.with_name(f".tmp_removed_{aside.name}")):
            shutil.rmtree(left, ignore_errors=True)  # by a save that was killed
        temp.mkdir()
        yield temp
        if folder.exists():
            carry_over(folder, temp, replaced)
        for path in (*temp.iterdir(), temp):
            flush(path)
        publish(temp, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        done = folder.exists() and not temp.exists()
        problem = "is whole, but what it replaced could not be removed" if done else (
            "could not be written, and nothing there was changed")
        raise OSError(f"{folder} {problem}: {reason}") from error
    finally:
        if not folder.exists() and aside.exists():
            os.rename(aside, folder)
        for left in (temp, aside):  # this save's own: there was no such folder before
            shutil.rmtree(left, ignore_errors=True)


def carry_over(old: Path, new: Path, replaced: Sequence[re.Pattern]) -> None:
    """All other files and folders of the old folder, by hard links where the disk has them."""
    for path in old.iterdir():
        place, is_folder = new / path.name, path.is_dir() and not path.is_symlink()
        if place.exists():
            continue
        if is_folder:
            shutil.copytree(path, place, symlinks=True, copy_function=link)
        elif not any(pattern.fullmatch(path.name) for pattern in replaced):
            link(path, place)


def link(path: str | Path, place: str | Path) -> None:
    """The same file under a second name, or a copy."""
    try:
        os.link(path, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, place, follow_symlinks=False)


def write_weights(model: Transformer, folder: Path, dtype: torch.dtype | None, shard_bytes: int,
                  quantize: str | None) -> None:
    """All weight files, and their index if there are several."""
    args, state = model.args, complete(model)
    mtp = {name: state.pop(name) for name in list(state) if name.startswith("mtp.")}
    main, more = to_hf(args, state), to_hf(args, mtp)
    with tqdm(desc="save", unit="tensor", disable=None, delay=1) as bar:
        def stored(tensors):
            for name, tensor in tensors:
                yield from stored_forms(name, tensor, dtype or tensor.dtype, quantize)
                bar.update()
        if mtp and mtp_among_others(args):
            write_shards(folder, stored([*main, *more, *mtp_copies(args, state)]), shard_bytes)
        else:
            write_shards(folder, stored(main), shard_bytes)
            if mtp:
                write_file(folder / MTP, {n: own_copy(t) for n, t in stored(more)})


def complete(model: Transformer) -> dict[str, Tensor]:
    """The weights, and what transformers has where we have nothing: an empty layer for no shared
    experts, a zero bias for a sigmoid gate without one."""
    args, state = model.args, dict(model.state_dict())
    shapes = {"w1": (0, args.dim), "w2": (args.dim, 0), "w3": (0, args.dim)}
    for name in [name for name in state if name.endswith("ffn.gate.weight")]:
        prefix, gate = name.removesuffix("gate.weight"), state[name]
        if args.score_func == "sigmoid" and not args.gate_bias:
            bias = f"{prefix}gate.bias"
            state[bias] = gate.new_zeros(len(gate), dtype=own_dtype(bias, gate.dtype))
        if not args.n_shared_experts:
            state |= {f"{prefix}shared_experts.{part}.weight": gate.new_zeros(shape)
                      for part, shape in shapes.items()}
    return state


def stored_forms(name: str, tensor: Tensor, dtype: torch.dtype,
                 quantize: str | None) -> Iterator[tuple[str, Tensor]]:
    """What is stored for a tensor: itself in the precision asked for, or FP8 and its scales."""
    if quantize is None or not goes_to_fp8(name, tensor.shape):
        yield name, tensor.to(own_dtype(name, dtype))
        return
    q, scale = quantize_weight(tensor, ue8m0=quantize == "fp8-ue8m0")
    yield name, q
    yield f"{name}_scale_inv", scale


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """One file, or as many as it takes to keep each below `limit` bytes, and their index."""
    shard, size, written = {}, 0, []
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            written.append(write_part(folder, len(written), shard))
            shard, size = {}, 0
        shard[name] = own_copy(tensor)
        size += tensor.nbytes
    written.append(write_part(folder, len(written), shard))
    if len(written) == 1:
        os.rename(folder / "part-0", folder / WEIGHTS)
        return
    places, total = {}, 0
    for number, sizes in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        os.rename(folder / f"part-{number}", folder / file)
        places |= dict.fromkeys(sizes, file)
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_part(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    """A shard, before it is known how many there are; the bytes of its tensors."""
    write_file(folder / f"part-{number}", tensors)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def write_file(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that says, as transformers wants it, whose tensors they are."""
    save_file(tensors, file, metadata={"format": "pt"})
