"""Hugging Face checkpoints: read the released models' files, write files that others read.

    python -m minids.hf --run runs/tiny --out tiny-hf           # a run as a Hugging Face folder
    python -m minids.hf --folder tiny-hf                        # check and describe: headers only
    python -m minids.generate --run tiny-hf --prompt "def "     # such a folder serves as a run
    python -m minids.hf --run runs/tiny --out tiny-fp8 --quantize fp8
    python -m minids.hf --folder DeepSeek-V3 --out V3-bf16 --dtype bf16       # FP8 made BF16

A folder holds `config.json` and the weights, in `model.safetensors` or in shards that
`model.safetensors.index.json` lists. The classes are DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
(V3, R1, V3.1, Moonlight, Kimi K2) and DeepseekV32ForCausalLM. `NAMES` is the one table of names,
used in both directions; each expert's matrices are tensors of their own there, and slices of one
stacked tensor here.

Reading: all names, shapes and settings are checked from the files' headers before a weight is
read, so that a model is loaded whole or not at all. Then each tensor goes straight to its place:
memory peaks at the model and the largest tensor. FP8 weights are multiplied by their block scales
(V3, arXiv 2412.19437, section 3.3.2; `weight_scale_inv` in the files, FP32 or UE8M0).

Writing: into a folder beside the target, which takes the target's place when it is whole on the
disk. The MTP modules are the checkpoint's layers from n_layers on. transformers leaves out a layer
61, and no other, so only a model of 61 layers has its MTP module among the other weights, with
copies of embedding and head, as released; any other model has its own in `mtp.safetensors`, which
the index does not list, transformers does not read, and `load_hf` does.

Settings that no released configuration has words for (YaRN's, where YaRN is off; the indexer's
Hadamard turn and FP8 rounding) stand under "minids" in `config.json`, if they are not the defaults.

Simplified: one process holds the whole model.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, option
from minids.base.tables import format_table
from minids.costs import count_parameters
from minids.hf.reading import inspect, read_model
from minids.hf.settings import CLASSES, QUANTIZE, demand, model_type_of
from minids.hf.writing import check_target, save_hf, tokenizer_files
from minids.runs.checkpoints import load_run, pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def describe(folder: str | Path) -> str:
    """What a folder holds, from its headers alone; checked as for loading."""
    source = inspect(folder)
    args, count = source.args, count_parameters(source.args)
    sizes = {}
    for header in source.headers.values():
        sizes[header.dtype] = sizes.get(header.dtype, 0) + torch.Size(header.shape).numel()
    context = f"YaRN, {args.rope_factor:g} times {args.original_seq_len:,}"
    names = [path.name for path in tokenizer_files(source.folder)]
    lines = [f"{source.folder}: {CLASSES[model_type_of(args)]}, {args.n_layers} layers, "
             f"{args.max_seq_len:,} positions ({context if args.yarn else 'no YaRN'})",
             f"MTP modules: {args.n_mtp_layers}; FP8: {'yes' if 'F8_E4M3' in sizes else 'no'}; "
             f"tokenizer: {', '.join(names) or 'none'}"]
    rows = [("parameters", "total", "active"), ("main model", count.total, count.active),
            ("MTP modules", count.mtp, ""), ("", "", ""), ("numbers stored", "", "")]
    rows += [(dtype, size, "") for dtype, size in sorted(sizes.items())]
    return "\n".join([*lines, "", format_table(rows)])


@dataclass(frozen=True)
class HfArgs:
    """What to read and what to write"""

    run: str = option("", "run folder, or one of its checkpoint folders, to export")
    folder: str = option("", "Hugging Face folder to describe, or with --out to convert")
    out: str = option("", "folder to write")
    overwrite: bool = option(False, "replace the model in --out; other files there stay")
    dtype: str = option("", "precision of the weights written: fp32 or bf16; none: as they are",
                        ("", *DTYPES))
    quantize: str = option("", "matrices in FP8: fp8 as V3, fp8-ue8m0 as V3.1 and V3.2",
                           ("", *QUANTIZE))
    shard_bytes: int = option(5_000_000_000, "largest weight file, bytes")

    def __post_init__(self):
        check_types(self)
        demand("shard_bytes", self.shard_bytes, self.shard_bytes >= 1, "at least 1")
        if bool(self.run) == bool(self.folder):
            raise ValueError("give either --run, to export it, or --folder, to describe it")
        if not self.out and (self.run or self.overwrite or self.dtype or self.quantize):
            raise ValueError("out = '' is not valid: name the folder to write")


def convert(args: HfArgs) -> str:
    """Read what --run or --folder names, write it to --out; what came of it."""
    check_target(Path(args.out).resolve(), args.overwrite)
    if args.run:
        run = load_run(args.run, pick_device("cpu"))
        model, tokenizer = run.model, run.tokenizer
    else:
        source = inspect(args.folder)
        model = read_model(source, DTYPES.get(args.dtype, source.dtype), "cpu")
        tokenizer = source.folder
    save_hf(model, args.out, args.overwrite, DTYPES.get(args.dtype), args.shard_bytes, tokenizer,
            args.quantize or None)
    return describe(args.out)


def main() -> None:
    """The command line."""
    [given] = parse("minids.hf", __doc__, HfArgs)
    args = HfArgs(**given)
    print(convert(args) if args.out else describe(args.folder))


if __name__ == "__main__":
    run_program("minids.hf", main)
