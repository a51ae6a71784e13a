"""Open a run, a checkpoint or a Hugging Face folder."""

import contextlib
from dataclasses import asdict
from pathlib import Path

import torch

from minids.base.files import read_json
from minids.hf.names import CONFIG, INDEX
from minids.hf.reading import aside_of, inspect, read_model
from minids.runs.checkpoints import MANIFEST, Run, load_run
from minids.text.tokenizer import Tokenizer


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is of this kind, and no run or one of its checkpoints."""
    path = path if path.exists() else aside_of(path)
    if (path / MANIFEST).exists() or not (path / CONFIG).is_file():
        return False
    if any(path.glob("*.safetensors")) or (path / INDEX).is_file():
        return True
    with contextlib.suppress(ValueError):
        return "model_type" in read_json(path / CONFIG)
    return False


def open_model(path: str | Path, device: torch.device | str = "cpu",
               dtype: torch.dtype | None = None) -> Run:
    """The model that `path` means, and its tokenizer.

    path: a run folder, one of its checkpoint folders, or a Hugging Face folder; the Run of the
        last has no "train" in its config
    dtype: of a Hugging Face folder's weights; None: as they are stored, FP8 as BF16, and on a CPU
        FP32
    Raises `ValueError` naming what is missing, damaged or does not fit.
    """
    path = Path(path)
    if not is_hf_folder(path):
        return load_run(path, device)
    source, tokenizer = inspect(path), Tokenizer.load(path)
    if tokenizer.n_tokens > source.args.vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.n_tokens} tokens and its model "
                         f"only {source.args.vocab_size}")
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else source.dtype
    model = read_model(source, dtype, device)
    return Run(model, tokenizer, {"model": asdict(model.args)}, path)
