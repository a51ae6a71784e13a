"""Hugging Face checkpoints: export a run, describe a folder, convert between precisions.

    python -m minids.hf --run runs/tiny --out tiny-hf           # a run as a Hugging Face folder
    python -m minids.hf --folder tiny-hf                        # check and describe: headers only
    python -m minids.generate --run tiny-hf --prompt "def "     # such a folder serves as a run
    python -m minids.hf --run runs/tiny --out tiny-fp8 --quantize fp8
    python -m minids.hf --folder DeepSeek-V3 --out V3-bf16 --dtype bf16       # FP8 made BF16

`transformers` reads such a folder, and so does every program here that takes --run. The export of
an sft or grpo run has a chat template, and its tokenizer reads the template's tags as tokens. A
folder is checked by its headers before any weight is read, and written whole or not at all: an
interrupted save leaves the old folder or the new one.

Simplified: one process holds the whole model.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option
from minids.base.tables import format_table
from minids.costs import count_parameters
from minids.hf.reading import inspect, is_hf_folder, read_model
from minids.hf.settings import CLASSES, QUANTIZE, model_type_of
from minids.hf.writing import check_target, save_hf, tokenizer_files
from minids.runs.open import open_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HfArgs(Settings):
    """Input and output"""

    run: str = option("", "run folder, or one of its checkpoint folders, to export")
    folder: str = option("", "Hugging Face folder to describe, or with --out to convert")
    out: str = option("", "folder to write", folder=True)
    overwrite: bool = option(False, "replace the model in --out; other files there stay")
    dtype: str = option("", "precision of the weights written: fp32 or bf16; none: unchanged",
                        ("", *DTYPES))
    quantize: str = option("", "matrices in FP8: fp8 as V3, fp8-ue8m0 as V3.1 and V3.2",
                           ("", *QUANTIZE))
    shard_bytes: int = option(5_000_000_000, "largest weight file, bytes", low=1)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.run) == bool(self.folder):
            raise ValueError("give either --run, to export it, or --folder, to describe it")
        if not self.out and (self.run or self.overwrite or self.dtype or self.quantize):
            raise ValueError("out = '' is not valid: name the folder to write")


def describe(folder: str | Path) -> str:
    """Return what a folder holds, from its headers alone; raises `ValueError` as `load_hf` does."""
    source = inspect(folder)
    args, count, sizes = source.args, count_parameters(source.args), Counter()
    for header in source.headers.values():
        sizes[header.dtype] += torch.Size(header.shape).numel()
    context = f"YaRN, {args.rope_factor:g} times {args.original_seq_len:,}"
    names = [path.name for path in tokenizer_files(source.folder)]
    rows = [("parameters", "total", "active"), ("main model", count.total, count.active),
            ("MTP modules", count.mtp, ""), ("", "", ""), ("values stored", "", ""),
            *((dtype, size, "") for dtype, size in sorted(sizes.items()))]
    return (f"{source.folder}: {CLASSES[model_type_of(args)]}, {args.n_layers} layers, "
            f"{args.max_seq_len:,} positions ({context if args.yarn else 'no YaRN'})\n"
            f"MTP modules: {args.n_mtp_layers}; FP8: {'yes' if 'F8_E4M3' in sizes else 'no'}; "
            f"tokenizer: {', '.join(names) or 'none'}\n\n{format_table(rows)}")


def convert(args: HfArgs) -> str:
    """Read --run or --folder, write it to --out, and return the description of the result."""
    check_target(Path(args.out).resolve(), args.overwrite)
    dtype, chat = DTYPES.get(args.dtype), False
    if args.run:
        run = open_model(args.run)
        model, tokenizer = run.model, run.folder if is_hf_folder(run.folder) else run.tokenizer
        chat = "sft" in run.config or run.config.get("grpo", {}).get("template") == "chat"
    else:
        source = inspect(args.folder)
        model, tokenizer = read_model(source, dtype or source.dtype, "cpu"), source.folder
    save_hf(model, args.out, args.overwrite, dtype, args.shard_bytes, tokenizer,
            args.quantize or None, chat)
    return describe(args.out)


def main() -> None:
    [given] = parse("minids.hf", __doc__, HfArgs)
    args = HfArgs(**given)
    print(convert(args) if args.out else describe(args.folder))


if __name__ == "__main__":
    run_program("minids.hf", main, lasting=True)
