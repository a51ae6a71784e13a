"""Open a run folder, one of its checkpoints, or a Hugging Face folder: one way for all programs.

`open_source` reads all but the weights and checks that it fits together; `open_model` goes on to
the model. `stored_run` has the rules of resuming.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minids import hf
from minids.base.fields import nearest
from minids.base.files import digest, is_sealed, read_json
from minids.config import ModelArgs
from minids.model.transformer import Transformer
from minids.runs.checkpoints import load_weights, read_manifest, recorded, resolve
from minids.runs.settings import LearnArgs
from minids.text.bpe import TOKENIZER_CONFIG
from minids.text.tokenizer import Tokenizer

CONFIG = "config.json"
PROGRAMS = "train", "sft", "grpo"
# The keys of config.json and the types of their values.
KINDS = {"source": dict, "model": dict, **dict.fromkeys(PROGRAMS, dict), "tokenizer": str,
         "files": dict, "data": str, "dtype": str, "versions": dict, "seal": str}


class Source(NamedTuple):
    """Where weights are, and what belongs to them.

    folder: the run folder, or a Hugging Face folder; path: the run's checkpoint, or the folder
    config: the run's config.json; of a Hugging Face folder only {"model": ..}
    model: ready for use, if `open_model` has loaded it
    """

    folder: Path
    path: Path
    args: ModelArgs
    tokenizer: Tokenizer
    config: dict
    model: Transformer | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, on the CPU."""
        is_hf = hf.is_hf_folder(self.path)
        return hf.load_hf(self.path).state_dict() if is_hf else load_weights(self.path)

    def describe(self) -> dict[str, str]:
        """Return the path, and a checkpoint's SHA-256, for the config.json of a run after it."""
        found = dict(checkpoint=str(self.path))
        if not hf.is_hf_folder(self.path):
            files = read_manifest(self.path)["files"]  # a manifest of many ranks has many
            found["sha256"] = files.get("model.safetensors", files[min(files)])["sha256"]
        return found


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run: its config.json is written last."""
    return (Path(folder) / CONFIG).exists()


def read_config(run: Path, program: str = "", cls: type | None = None) -> dict:
    """Return a run's config.json; raise `ValueError` naming it if missing, damaged or changed.

    program, cls: require a run of this program whose settings `cls` accepts

    Its seal shows any changed byte, and the manifests of the run's checkpoints which field it was;
    they also show the config.json of another run. Runs of an earlier version have neither: of
    theirs only keys, types and bounds are checked.
    """
    path = Path(run) / CONFIG
    if not path.exists():
        raise ValueError(f"{run} is not a run folder: it has no {CONFIG}")
    before = recorded(run, "config") or {}
    try:
        config = read_json(path, data := path.read_bytes() if path.is_file() else b"")
        changed = list(changes(config, before))
        if ("seal" in config or before) and not is_sealed(data, config):
            raise ValueError(was_changed(changed))
        kept = {"model", "tokenizer", "files", program if cls else ""}  # by a resumed run
        if changed := [c for c in changed if c.was is not None and c.section in kept and not (
                cls and c.section == program and c.field in cls.may_change)]:
            raise ValueError(was_changed(changed))
        for key, value in config.items():
            if type(value) is not KINDS.get(key):
                raise ValueError(f"{key!r} is not valid there: {nearest(key, KINDS)}or its value "
                                 "is of another type")
        ModelArgs(**config["model"])
        if cls:
            cls(**config[program])
    except (ValueError, KeyError, TypeError) as error:
        kind = f"minids, or not a run of minids.{program}" if program else "minids"
        raise ValueError(f"{path} is damaged, changed, of another version of {kind}: {error}"
                         ) from error
    return config


class Change(NamedTuple):
    """A value in config.json that is not the one in a checkpoint's manifest."""

    section: str
    field: str
    found: Any
    was: Any

    def __str__(self) -> str:
        name = f"{self.section}.{self.field}" if self.field else self.section
        return f"{name} is {self.found!r} and was {self.was!r}"


def changes(config: dict, before: dict) -> Iterator[Change]:
    """Yield the differences between a config.json and the one that a manifest has, if any."""
    for section, was in before.items():
        found = config.get(section)
        if isinstance(was, dict) and isinstance(found, dict):
            yield from (Change(section, field, found.get(field), was.get(field))
                        for field in was | found if found.get(field) != was.get(field))
        elif found != was:
            yield Change(section, "", found, was)


def was_changed(changed: list[Change]) -> str:
    """Return what was changed in a config.json, and the flags that are meant for it."""
    flags = ["--" + c.field.removesuffix("_run").replace("_", "-")
             for c in changed if c.section in ("model", *PROGRAMS)]
    return (("; ".join(map(str, changed[:3])) or "it does not match its seal") + "; put it back"
            + (f": such values are set with {', '.join(flags[:3])}" if flags else ""))


def tokenizer_files(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a run's tokenizer, by its place in the run."""
    return {f"tokenizer/{file.name}": digest(file)
            for file in sorted((run / "tokenizer").glob("*")) if file.is_file()}


def folder_of(path: str | Path) -> Path:
    """Return the run or Hugging Face folder that `path` belongs to; `ValueError` if none does."""
    path = Path(path)
    if hf.is_hf_folder(path):
        return Path(os.path.abspath(path))
    return Path(os.path.abspath(resolve(path))).parent.parent  # links are not followed


def open_run(run: Path, path: Path) -> Source:
    """Return the source of a run folder, whose weights are in `path`; its tokenizer is checked."""
    config, tokenizer = read_config(run), Tokenizer.load(run / "tokenizer")
    changed = [name for name, sha256 in config.get("files", {}).items()
               if digest(run / name) != sha256]
    if tokenizer.fingerprint != config["tokenizer"]:
        raise ValueError(f"tokenizer in {run} is not the run's: its fingerprint is "
                         f"{tokenizer.fingerprint}, the run's is {config['tokenizer']}; put back "
                         f"{', '.join(changed) or 'that one'}")
    if changed:
        raise ValueError(f"{run / changed[0]} was changed: its SHA-256 is not the one in {CONFIG}; "
                         "put the file back")
    return Source(run, path, ModelArgs(**config["model"]), tokenizer, config)


def open_source(path: str | Path) -> Source:
    """Open what `path` names, without its weights.

    path: a run folder (its newest whole checkpoint), a checkpoint, or a Hugging Face folder
    Raises `ValueError` naming what is missing, damaged or does not fit.
    """
    path = Path(path)
    if hf.is_hf_folder(path):
        args, tokenizer = hf.inspect(path).args, Tokenizer.load(path)
        if tokenizer.n_tokens > args.vocab_size:
            raise ValueError(f"{path}: its tokenizer has {tokenizer.n_tokens} tokens and its model "
                             f"only {args.vocab_size}")
        return Source(path, path, args, tokenizer, {"model": dataclasses.asdict(args)})
    path = resolve(path)
    return open_run(folder_of(path), path)


def open_model(path: str | Path, device: torch.device | str = "cpu",
               dtype: torch.dtype | None = None, keep_fp8: bool = False,
               cut: Callable[[Transformer], int] | None = None) -> Source:
    """Load the model that `path` names, and its tokenizer; see `open_source`.

    dtype: precision of a Hugging Face folder's weights; None: as they are stored, with FP8 as BF16,
        and FP32 on a CPU. A run's weights are FP32.
    keep_fp8: keep matrices that the folder stores in FP8 as they are (`minids.apply.stored`)
    cut: leaves a rank's part of a model on the meta device, and returns the number of its first
        expert; of a Hugging Face folder no more is read. None: the whole model
    """
    source, first = open_source(path), 0
    with torch.device("meta"):
        model = Transformer(source.args)
    if cut is not None:
        first = cut(model)
    if hf.is_hf_folder(source.path):
        folder = hf.inspect(source.path)
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else folder.dtype
        model = hf.read_model(folder, dtype, device, model, first, keep_fp8)
    else:
        with fitting(source.path):
            weights = source.weights()
            if cut is not None:
                weights = own_part(weights, model, first)
            model.load_state_dict(weights, assign=True)
        model = model.to(device).eval()
    return source._replace(model=model)


def own_part(weights: dict[str, Tensor], model: Transformer, first: int) -> dict[str, Tensor]:
    """Return copies of those weights that a part of their model has; first: its first expert."""
    own = {}
    for name, wanted in model.state_dict().items():
        stack = slice(first, first + len(wanted)) if ".experts." in name else slice(None)
        own[name] = weights[name][stack].clone()
    return own


def talks(source: Source) -> bool:
    """Return whether a model was trained on conversations, as its run or its folder says."""
    if not hf.is_hf_folder(source.path):
        return "sft" in source.config or source.config.get("grpo", {}).get("template") == "chat"
    file = source.folder / TOKENIZER_CONFIG
    return (source.folder / "chat_template.jinja").exists() or (
        file.is_file() and bool(read_json(file).get("chat_template")))


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raise a one-line `ValueError` if weights of `path` have other names or sizes than a model."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1].split()) if "\n\t" in str(error) else error
        raise ValueError(f"{path}: its weights do not fit the model of {CONFIG}: {reason}"
                         ) from None


def resumes(args: LearnArgs) -> bool:
    """Return whether a run continues: it is asked to, and its folder is complete."""
    return args.resume and bool(args.out) and is_run(Path(args.out))


def source_of(args: LearnArgs) -> Source | None:
    """Return what a run works with: itself when resumed, else what it begins with, if anything."""
    if resumes(args):
        return open_run(Path(args.out), Path(args.out))
    return open_source(args.from_run) if args.from_run else None


def stored_run(program: str, cls: type[LearnArgs], given: dict) -> tuple[LearnArgs, dict] | None:
    """Return the settings and the config.json of the run that the flags resume; None if it is new.

    program: its name in config.json; cls: its settings
    given: flags; only those in `cls.may_change` may differ from the stored settings
    """
    out, resume = given.get("out", ""), given.get("resume", False)
    if not (out or resume):
        return None
    run = Path(out) if out else newest_run(program, given.get("preset", ""))
    if not is_run(run):
        return None
    if not resume:
        refuse_a_run(run)
    config = read_config(run, program, cls)
    stored = cls(**config[program])
    refuse_changes(run, vars(stored), {k: v for k, v in given.items() if k not in cls.may_change})
    return dataclasses.replace(stored, **given | {"out": str(run)}), config


def settings(program: str, cls: type[LearnArgs], given: dict) -> LearnArgs:
    """Return the settings of a run that begins with another one's weights, or is resumed.

    program, cls, given: see `stored_run`
    """
    if stored := stored_run(program, cls, given):
        return stored[0]
    if not given.get("from_run"):
        raise ValueError("from = '' is not valid: name the run to begin with, --from RUN")
    return cls.for_preset(**given)


def refuse_changes(run: Path, stored: dict, given: dict) -> None:
    """Raise `ValueError` for a flag that differs from what the run began with."""
    for name, value in given.items():
        if stored[name] != value:
            raise ValueError(f"{name} = {value!r} is not valid: the run in {run} has "
                             f"{stored[name]!r}, and a resumed run keeps its configuration; name "
                             "another folder with --out")


def refuse_a_run(folder: Path) -> None:
    """Raise `ValueError` if a folder for a new run holds one."""
    if is_run(folder):
        raise ValueError(f"out = {str(folder)!r} holds a run already: continue it with --resume, "
                         "or name another folder")


def newest_run(program: str, preset: str = "") -> Path:
    """Return the run in runs/ that this program wrote to last, of this preset unless it is ""."""
    found = []
    for file in Path("runs").glob(f"*/{CONFIG}"):
        try:
            stored = read_json(file).get(program, {})
            if stored and preset in ("", stored.get("preset")):
                found.append(file)
        except (ValueError, AttributeError) as error:
            print(f"left out {file.parent}: {error}", file=sys.stderr)
    if not found:
        kind = f" with preset {preset!r}" if preset else ""
        raise ValueError(f"resume: runs/ holds no run of minids.{program}{kind}; name its folder "
                         "with --out")
    return max(found, key=lambda file: file.stat().st_mtime).parent
