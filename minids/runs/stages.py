"""A run that begins with another one's weights: its settings, its folder, and the model they fit.

The stages of pre-training: a longer context with YaRN (V3, arXiv 2412.19437, section 4.3), indexers
and sparse attention (V3.2, arXiv 2512.02556, section 2.1.1), or more of the same.
"""

import dataclasses
import re
from pathlib import Path

from minids.base.fields import require
from minids.config import ModelArgs
from minids.runs import open as runs
from minids.runs.settings import TrainArgs
from minids.text.tokenizer import Tokenizer

# Fields of the model that may differ from those of the run before: its weights still fit.
MAY_VARY = {"max_seq_len", "original_seq_len", "rope_factor", "beta_fast", "beta_slow", "mscale",
            "attention_factor", "index_topk", "index_hadamard", "index_fp8"}
STAGE_FIELDS = {"out", "resume", "from_run", "dsa", "context"}  # which no run has from another


def settings_after(given: dict) -> TrainArgs:
    """Return the settings of a run after another: that run's, under the stage's and `given`."""
    run = runs.folder_of(given["from_run"])
    before = dataclasses.asdict(TrainArgs(**runs.read_config(run, "train", TrainArgs)["train"]))
    if given.get("preset", before["preset"]) != before["preset"]:
        raise ValueError(f"preset = {given['preset']!r} is not valid: the run in {run} has "
                         f"{before['preset']!r}, and this one begins with its weights")
    if given.get("tokenizer"):
        raise ValueError(f"tokenizer = {given['tokenizer']!r} is not valid with --from: the model "
                         f"knows the one in {run}")
    inherited = {k: v for k, v in before.items() if k not in STAGE_FIELDS}
    return TrainArgs.for_preset(before["preset"], inherited, **given)


def default_folder(args: TrainArgs) -> Path:
    """Return the folder of a run that names none: if it is taken, the run takes NAME-2, .."""
    if not args.from_run:
        return Path("runs") / args.preset
    run = runs.folder_of(args.from_run)
    # x-warm for the warm-up of run x, x-sparse for the stage after it, x-32768 for a longer context
    # and x-131072 for the next, else x-more.
    suffix = {"warmup": "-warm", "sparse": "-sparse"}.get(args.dsa, "-more")
    if args.context:
        return run.with_name(f"{re.sub('-[0-9]{3,}$', '', run.name)}-{args.context}")
    return run.with_name(run.name.removesuffix("-warm") + suffix)


def model_after(args: TrainArgs, given: dict, source: runs.Source) -> dict:
    """Return the fields of a model that begins with another's weights and may differ in `given`.

    Adds an indexer if the stage needs one and there is none, and YaRN for a longer context.
    """
    before = dataclasses.asdict(source.args)
    fixed = given.keys() - MAY_VARY
    if not before["index_n_heads"]:
        fixed -= {"index_n_heads", "index_head_dim"}
    for name in sorted(fixed):
        if given[name] != before[name]:
            raise ValueError(f"{name} = {given[name]!r} is not valid: the weights in "
                             f"{source.folder} have {before[name]!r}")
    base = before["original_seq_len"]
    if source.args.yarn and given.get("original_seq_len", base) != base:
        raise ValueError(f"original_seq_len = {given['original_seq_len']} is not valid: YaRN in "
                         f"{source.folder} stretches {base} tokens, and cannot begin anew")
    if args.dsa and not before["index_n_heads"]:
        given = default_indexer(before, args.seq_len) | given
    if args.context:
        given = stretched(args, given, source) | given
    return before | given


def stretched(args: TrainArgs, given: dict, source: runs.Source) -> dict:
    """Return the fields of YaRN for `args.context` tokens; given: those that the user gave.

    The sequences of the run before are the length that YaRN stretches, unless it did so already. It
    stretches at once as far as it ever will: V3 has a factor of 40 at 32K and at 128K.
    """
    before = source.args
    trained = source.config.get("train", {}).get("seq_len", before.original_seq_len)
    require(args, "context", args.context > trained,
            f"more than the {trained} tokens of a sequence in {source.folder}")
    base = before.original_seq_len if before.yarn else given.get("original_seq_len", trained)
    factor = given.get("rope_factor", before.rope_factor)
    require(args, "context", args.context <= factor * base,
            f"at most rope_factor x original_seq_len = {factor:g} x {base} = {factor * base:g}")
    return dict(original_seq_len=base, max_seq_len=int(factor * base))


def default_indexer(model: dict, seq_len: int) -> dict:
    """Return the fields of an indexer in V3.2's proportions; it selects an eighth of the context.

    For "v3" and the paper's 131,072 tokens it is V3.2's own: 64 heads of width 128, 2,048 tokens.
    """
    return dict(index_n_heads=max(model["n_heads"] // 2, 4),
                index_head_dim=2 * model["qk_rope_head_dim"],
                index_topk=min(max(seq_len // 8, 1), 2048))


def fit_model(args: TrainArgs, given: dict, tokenizer: Tokenizer) -> ModelArgs:
    """Return the preset's model with the tokenizer's vocabulary and `given`, if they fit."""
    preset = ModelArgs.preset(args.preset)
    # Released models have YaRN; theirs began without, on sequences of the original length.
    length = min(preset.max_seq_len, preset.original_seq_len)
    model_args = dataclasses.replace(
        preset, **dict(vocab_size=tokenizer.vocab_size, max_seq_len=length) | given)
    require(model_args, "vocab_size", model_args.vocab_size >= tokenizer.vocab_size,
            f"at least {tokenizer.vocab_size}, the tokenizer's")
    if model_args.has_indexer and not args.dsa:
        raise ValueError(f"index_n_heads = {model_args.index_n_heads} is not valid without --dsa: "
                         "an indexer learns from a trained model; train with index_n_heads = 0, "
                         "then continue with --from RUN --dsa warmup")
    require(args, "seq_len", args.seq_len <= model_args.max_seq_len,
            f"at most max_seq_len = {model_args.max_seq_len}")
    require(args, "seq_len", args.seq_len > model_args.n_mtp_layers,
            f"above n_mtp_layers = {model_args.n_mtp_layers}")
    return model_args
