"""Write a Hugging Face folder, whole or not at all.

All files go to a folder beside the target, which takes the target's name once it is complete on
the disk. `minids.hf.names` describes where MTP modules are stored.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from minids.base.fields import demand
from minids.base.files import flush, inside, new_folder, publish, read_json, write_json
from minids.base.tensors import save_tensors
from minids.config import ModelArgs
from minids.fp8 import quantize_weight
from minids.hf.names import CONFIG, INDEX, MTP, WEIGHTS, copies, goes_to_fp8, own_dtype, to_hf
from minids.hf.reading import aside_of
from minids.hf.settings import FP8_CONFIG, QUANTIZE, config_from_args, model_type_of
from minids.model.transformer import Transformer
from minids.text.bpe import GENERATION
from minids.text.chat import JINJA
from minids.text.corpora import check_file
from minids.text.tokenizer import Tokenizer

OWN_FILE = (r"config\.json|model(-\d+-of-\d+)?\.safetensors|mtp\.safetensors"
            r"|model\.safetensors\.index\.json")
TOKENIZER_FILE = (
    r"tokenizer\w*\.(json|model)|tokenization_\w+\.py|special_tokens_map\.json|vocab\.json"
    r"|generation_config\.json|chat_template\.jinja|tiktoken\.model|merges\.txt")
ENDS = "bos_token_id", "eos_token_id"


def save_hf(model: Transformer, folder: str | Path, overwrite: bool = False,
            dtype: torch.dtype | None = None, shard_bytes: int = 5_000_000_000,
            tokenizer: Tokenizer | Path | None = None, quantize: str | None = None,
            chat: bool = False) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` and `load_hf` read.

    folder: one that holds files is refused unless `overwrite` is set; then the model in it is
        replaced, and its tokenizer if one is given, and all other files stay. A save killed at any
        moment leaves the old folder whole, or the new one; between two renames the old one is
        FOLDER.replaced.
    dtype: of the weights; None: the model's own. The gates' biases are at least FP32.
    shard_bytes: largest file, bytes; that much is held in memory while it is written
    tokenizer: saved with the model; or a folder whose tokenizer files are copied unchanged
    quantize: "fp8" or "fp8-ue8m0": matrices in E4M3 with a scale per 128 x 128 block, as V3 is
        released, or with powers of two as scales, as V3.1 and V3.2. Embedding, head, gates, norms,
        eh_proj and weights_proj stay wide.
    chat: whether the tokenizer gets the template of conversations
    Raises `ValueError` for a model that cannot be expressed or a folder that is taken; `OSError`
    when the disk refuses, with the folder unchanged.
    """
    folder = Path(folder).resolve()
    config = saved_config(model, dtype, tokenizer, quantize)
    copied = tokenizer_files(tokenizer) if isinstance(tokenizer, Path) else []
    check_target(folder, overwrite)
    own = f"{OWN_FILE}|{TOKENIZER_FILE}" if tokenizer else OWN_FILE
    with new_folder(folder.parent), replacing(folder, own) as temp:
        write_weights(model, temp, dtype, shard_bytes, quantize)
        write_json(temp / CONFIG, config)
        if isinstance(tokenizer, Tokenizer):
            tokenizer.save_hf(temp, chat)
            if chat:
                (temp / "chat_template.jinja").write_text(JINJA, "utf-8")
        for file in copied:
            shutil.copy2(file, temp)
        if tokenizer and not (temp / GENERATION).exists():
            write_json(temp / GENERATION, {name: config[name] for name in ENDS})


def saved_config(model: Transformer, dtype: torch.dtype | None,
                 tokenizer: Tokenizer | Path | None, quantize: str | None) -> dict:
    """Return the config.json of a save."""
    demand("quantize", quantize, quantize in (None, *QUANTIZE), f"None, {' or '.join(QUANTIZE)}")
    config = config_from_args(model.args)
    config["torch_dtype"] = str(dtype or model.head.weight.dtype).removeprefix("torch.")
    ends = dict.fromkeys(ENDS)  # if absent, transformers assumes V3's
    if isinstance(tokenizer, Tokenizer):
        eos = tokenizer.eos_ids if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos}
        if tokenizer.n_tokens > model.args.vocab_size:
            raise ValueError(f"tokenizer has {tokenizer.n_tokens} tokens: it must have at most "
                             f"vocab_size = {model.args.vocab_size}")
    elif tokenizer is not None:
        given = read_json(Path(tokenizer) / CONFIG)
        ends = {name: given.get(name) for name in ends}
    if quantize is not None:
        fp8 = {name: values[0] for name, values in FP8_CONFIG.items() if values[0]}
        config["quantization_config"] = fp8 | QUANTIZE[quantize]
    return config | ends


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` unless the folder may be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out = {folder} is not valid: it is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"out = {folder} is not valid: it holds files already; name another "
                         "folder, or give --overwrite to replace the model in it")
    if (aside := aside_of(folder)).exists() and not marker_of(folder).exists():
        raise ValueError(f"{aside} is in the way: a save puts the old folder there for a moment; "
                         f"rename it to {folder.name} or remove it")


def marker_of(folder: Path) -> Path:
    """Return the file that exists while the folder put aside is one that a save put there."""
    return folder.with_name(f".tmp_replacing_{folder.name}")


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that make up its tokenizer, with its generation settings.

    Raises `ValueError` for a file that is not a JSON object or not text, or a link out of the
    folder.
    """
    found = sorted(path for path in folder.iterdir()
                   if path.is_file() and re.fullmatch(TOKENIZER_FILE, path.name))
    for path in map(inside, found):
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix != ".model" and (problem := check_file(path)[1]) not in ("", "is empty"):
            raise ValueError(f"{path} {problem}")
    return found


@contextlib.contextmanager
def replacing(folder: Path, replaced: str) -> Iterator[Path]:
    """Yield a new folder to fill; at the end it takes over this one's name and remaining files.

    replaced: pattern of the names of files that it does not take over
    """
    temp, aside = folder.with_name(f".tmp_{folder.name}"), aside_of(folder)
    marker = marker_of(folder)
    try:
        put_back(aside, folder)  # of a save that was killed: `check_target` found no other
        for left in (temp, folder.with_name(f".tmp_removed_{aside.name}")):
            shutil.rmtree(left, ignore_errors=True)  # left by a killed save
        temp.mkdir()
        yield temp
        if folder.exists():
            gone = [path.name for path in folder.iterdir() if (temp / path.name).exists()
                    or not path.is_dir() and re.fullmatch(replaced, path.name)]
            shutil.copytree(folder, temp, symlinks=True, dirs_exist_ok=True, copy_function=link,
                            ignore=lambda where, names: gone if Path(where) == folder else [])
        for path in (*temp.iterdir(), temp):
            flush(path)
        marker.touch()
        publish(temp, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        done = folder.exists() and not temp.exists()
        problem = "is whole, but what it replaced could not be removed" if done else (
            "could not be written, and nothing there was changed")
        raise OSError(f"{folder} {problem}: {reason}") from error
    finally:
        put_back(aside, folder)
        shutil.rmtree(temp, ignore_errors=True)
        marker.unlink(missing_ok=True)


def put_back(aside: Path, folder: Path) -> None:
    """Rename the folder put aside back, or remove it if the new one has taken its name."""
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)
    shutil.rmtree(aside, ignore_errors=True)


def link(path: str | Path, new: str | Path) -> None:
    """Give a file a second name, or copy it where the disk has no hard links."""
    try:
        os.link(path, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, new, follow_symlinks=False)


def write_weights(model: Transformer, folder: Path, dtype: torch.dtype | None, shard_bytes: int,
                  quantize: str | None) -> None:
    """Write all weight files, and their index if there are several."""
    args, state = model.args, complete(model)
    mtp = {name: state.pop(name) for name in list(state) if name.startswith("mtp.")}
    main, more = to_hf(args, state), to_hf(args, mtp)
    if mtp and mtp_among_others(args):
        main = chain(main, more, ((theirs, state[ours]) for theirs, ours in copies(args).items()))
        mtp = {}
    write_shards(folder, stored(main, dtype, quantize), shard_bytes)
    if mtp:
        save_tensors(dict(stored(more, dtype, quantize)), folder / MTP)


def mtp_among_others(args: ModelArgs) -> bool:
    """Return whether transformers ignores this model's MTP layer; it ignores layer 61 only."""
    return (args.n_layers, args.n_mtp_layers) == (61, 1) and model_type_of(args) != "deepseek_v2"


def complete(model: Transformer) -> dict[str, Tensor]:
    """Return the weights, and those that only transformers has: an empty layer where there are no
    shared experts, and a zero bias for a sigmoid gate without one."""
    args, state = model.args, dict(model.state_dict())
    empty = {"w1": (0, args.dim), "w2": (args.dim, 0), "w3": (0, args.dim)}
    for name in [name for name in state if name.endswith("ffn.gate.weight")]:
        ffn, gate = name.removesuffix("gate.weight"), state[name]
        if args.score_func == "sigmoid" and not args.gate_bias:
            bias = f"{ffn}gate.bias"
            state[bias] = gate.new_zeros(len(gate), dtype=own_dtype(bias, gate.dtype))
        if not args.n_shared_experts:
            state |= {f"{ffn}shared_experts.{part}.weight": gate.new_zeros(shape)
                      for part, shape in empty.items()}
    return state


def stored(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None,
           quantize: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield what a file stores for each tensor: itself in `dtype`, or in FP8 with its scales.

    Each is a copy in CPU memory, because safetensors refuses shared memory.
    """
    for name, tensor in tqdm(tensors, desc="save", unit="tensor", disable=None, delay=1):
        if quantize is not None and goes_to_fp8(name, tensor.shape):
            q, scale = quantize_weight(tensor, ue8m0=quantize == "fp8-ue8m0")
            forms = {name: q, f"{name}_scale_inv": scale}
        else:
            forms = {name: tensor.to(own_dtype(name, dtype or tensor.dtype))}
        for key, form in forms.items():
            yield key, form.detach().to("cpu", copy=True).contiguous()


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """Write one file, or shards of at most `limit` bytes and their index."""
    shard_of, total, count = {}, 0, 0
    for count, shard in enumerate(grouped(tensors, limit), start=1):
        save_tensors(shard, folder / f"part-{count}")
        shard_of |= dict.fromkeys(shard, count)
        total += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # or two would be in memory while the next one fills
    files = {n: f"model-{n:05d}-of-{count:05d}.safetensors" if count > 1 else WEIGHTS
             for n in range(1, count + 1)}
    for n, file in files.items():
        os.rename(folder / f"part-{n}", folder / file)
    if count > 1:
        index = {"metadata": {"total_size": total},
                 "weight_map": {name: files[n] for name, n in sorted(shard_of.items())}}
        write_json(folder / INDEX, index)


def grouped(tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Yield dicts of tensors, each of at most `limit` bytes, or of one larger tensor."""
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
