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

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, nearest, option
from minids.base.files import flush
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.fp8 import BLOCK, dequantize, quantize_weight
from minids.model.transformer import Transformer
from minids.runs.checkpoints import MANIFEST, Run, load_run, own_copy, pick_device, publish
from minids.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, MTP = "model.safetensors.index.json", "mtp.safetensors"
OURS = "minids"  # the key of config.json for what only we know
OWN_FILE = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|mtp\.safetensors"
                      r"|model\.safetensors\.index\.json")
TOKENIZER_FILE = re.compile(
    r"tokenizer\w*\.(json|model)|tokenization_\w+\.py|special_tokens_map\.json|vocab\.json"
    r"|generation_config\.json|chat_template\.jinja|tiktoken\.model|merges\.txt")
RELEASED_LAYERS = 61  # V3's; what transformers takes for the number of its MTP layer
BAND = 8 * BLOCK  # rows of an FP8 matrix that are dequantised at a time

# Ours -> theirs: whole names of the model's own tensors, then names inside block N, which stand
# after layers.N and model.layers.N, then those of MTP module K, which is block n_layers + K there.
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",

    "attn_norm.weight": "input_layernorm.weight",
    "attn.wq.weight": "self_attn.q_proj.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
    "attn.indexer.wq_b.weight": "self_attn.indexer.wq_b.weight",
    "attn.indexer.wk.weight": "self_attn.indexer.wk.weight",
    "attn.indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "attn.indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "attn.indexer.weights_proj.weight": "self_attn.indexer.weights_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w1.weight": "mlp.gate_proj.weight",
    "ffn.w2.weight": "mlp.down_proj.weight",
    "ffn.w3.weight": "mlp.up_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.experts.w1": "mlp.experts.{e}.gate_proj.weight",
    "ffn.experts.w2": "mlp.experts.{e}.down_proj.weight",
    "ffn.experts.w3": "mlp.experts.{e}.up_proj.weight",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",

    "mtp.enorm.weight": "enorm.weight",
    "mtp.hnorm.weight": "hnorm.weight",
    "mtp.eh_proj.weight": "eh_proj.weight",
    "mtp.norm.weight": "shared_head.norm.weight",
}
MTP_COPIES = {  # inside a released MTP layer: the main model's own, once more
    "embed_tokens.weight": "embed.weight",
    "shared_head.head.weight": "head.weight",
}
COPY = re.compile(r"model\.layers\.(\d+)\.(" + "|".join(map(re.escape, MTP_COPIES)) + ")")
ANGLES = "rotary_emb.inv_freq"  # tables in some older files; the model computes its own
KEPT_WIDE = ("embed_tokens", "head", "mlp.gate", "eh_proj", "weights_proj")  # matrices never in FP8

FIELDS = {  # settings: ours -> theirs
    "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings", "dim": "hidden_size",
    "inter_dim": "intermediate_size", "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers", "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads", "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts", "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor", "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
    "norm_eps": "rms_norm_eps", "n_mtp_layers": "num_nextn_predict_layers",
    "init_std": "initializer_range",
}
ROPE_FIELDS = {"rope_factor": "factor", "original_seq_len": "original_max_position_embeddings",
               "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale"}
INDEX_FIELDS = ("index_n_heads", "index_head_dim", "index_topk")
DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "num_nextn_predict_layers": 0,
            "rope_theta": 10000.0, "beta_fast": 32.0, "beta_slow": 1.0}
NULL_IS_ZERO = ("q_lora_rank", "n_shared_experts")
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1,
         "rope_interleave": True, "tie_word_embeddings": False}
FIXED_ROPE = {"attention_factor": (None, 1.0), "truncate": (None, True),
              "partial_rotary_factor": (None, 1.0)}
CARRIED = (*ROPE_FIELDS, *INDEX_FIELDS, "n_dense_layers", "index_hadamard", "index_fp8")

CLASSES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
           "deepseek_v32": "DeepseekV32ForCausalLM"}
ALIASES = {"kimi_k2": "deepseek_v3"}  # the same class under another model_type
V2_GATE = {"scoring_func": ("softmax",), "norm_topk_prob": (False,),
           "topk_method": ("greedy", "group_limited_greedy")}
V3_GATE = {"scoring_func": ("sigmoid",), "norm_topk_prob": (True,), "topk_method": ("noaux_tc",)}
FP8_CONFIG = {"quant_method": ("fp8",), "fmt": ("e4m3", None),
              "weight_block_size": ([BLOCK, BLOCK],), "scale_fmt": (None, "float", "ue8m0"),
              "activation_scheme": ("dynamic", None)}
QUANTIZE = {"fp8": {}, "fp8-ue8m0": {"scale_fmt": "ue8m0"}}  # our word -> what the file adds
WIDE_DTYPES = ("F64", "F32", "BF16", "F16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# Settings.


def args_from_config(config: dict) -> ModelArgs:
    """The settings that a released `config.json` describes.

    config: what the file holds; YaRN under "rope_scaling", as released, or "rope_parameters", as
        transformers 5 writes it. Without YaRN original_seq_len = max_seq_len.
    Raises `ValueError` naming the field, in their words, its value and what is valid.
    """
    model_type = read_type(config)
    check_fixed(config, model_type)
    args = make_args(read_fields(config, model_type) | read_rope(config))
    if model_type == "deepseek_v2":
        demand("hidden_size", args.dim, args.dim % args.n_heads == 0,
               f"a multiple of num_attention_heads = {args.n_heads} (DeepseekV2Config's own rule)")
    if OURS not in config:
        return args
    carried = config[OURS]
    demand(OURS, carried, isinstance(carried, dict) and set(carried) <= set(CARRIED),
           f"an object whose fields are among {', '.join(CARRIED)}")
    full = replace(args, **carried)
    demand(OURS, carried, released_fields(full) == released_fields(args),
           "without a say in what the other fields decide")
    return full


def config_from_args(args: ModelArgs) -> dict:
    """What `config.json` says of a model: the inverse of `args_from_config`.

    A sigmoid gate without a bias is one with a bias of zero, and is read back as such.
    Raises `ValueError` naming what no class of transformers can express.
    """
    check_expressible(args)
    config = released_fields(args)
    back = args_from_config(config)
    carried = {name: getattr(args, name) for name in CARRIED
               if getattr(args, name) != getattr(back, name)}
    return config | ({OURS: carried} if carried else {})


def demand(name: str, value, holds: bool, valid: str) -> None:
    """Raise the one-line `ValueError` that names a field of config.json."""
    if not holds:
        raise ValueError(f"{name} = {value!r} is not valid: it must be {valid}")


def read_type(config: dict) -> str:
    """The model_type, Kimi K2's as the V3 that it is."""
    given = config.get("model_type")
    known = [*CLASSES, *ALIASES]
    if given not in known:
        raise ValueError(f"model_type = {given!r} is not valid: {nearest(str(given), known)}"
                         f"valid are {', '.join(known)}")
    model_type = ALIASES.get(given, given)
    names = config.get("architectures", [CLASSES[model_type]])
    demand("architectures", names, names == [CLASSES[model_type]], f"[{CLASSES[model_type]!r}]")
    return model_type


def check_fixed(config: dict, model_type: str) -> None:
    """What other models vary and this family does not."""
    for name, valid in FIXED.items():
        demand(name, config.get(name), config.get(name, valid) == valid, f"{valid!r}, or absent")
    for name, valid in (V2_GATE if model_type == "deepseek_v2" else V3_GATE).items():
        demand(name, config.get(name), config.get(name, valid[0]) in valid,
               f"{' or '.join(map(repr, valid))} in a {CLASSES[model_type]}")
    heads = config.get("num_attention_heads")
    demand("num_key_value_heads", config.get("num_key_value_heads"),
           config.get("num_key_value_heads") in (None, heads),
           f"num_attention_heads = {heads}, or absent: the latent is expanded for every head")


def read_fields(config: dict, model_type: str) -> dict:
    """The fields of ModelArgs that have a field of their own there, and the gate's."""
    greedy = model_type == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy"
    given = config | ({"n_group": 1, "topk_group": 1} if greedy else {})  # it looks at no groups
    found = {ours: read_field(given, theirs) for ours, theirs in FIELDS.items()}
    dense, layers = found["n_dense_layers"], found["n_layers"]
    if type(dense) is type(layers) is int:
        found["n_dense_layers"] = min(dense, layers)  # a larger one says that all layers are dense
    found["gate_bias"] = model_type != "deepseek_v2"
    found["score_func"] = "sigmoid" if found["gate_bias"] else "softmax"
    if model_type == "deepseek_v32":
        found |= {name: read_field(config, name) for name in INDEX_FIELDS}
        heads, latent = found["index_n_heads"], found["q_lora_rank"]
        demand("index_n_heads", heads, heads != 0, "at least 1 in a DeepseekV32ForCausalLM")
        demand("q_lora_rank", latent, latent != 0, "at least 1 in a DeepseekV32ForCausalLM")
    return found


def read_field(config: dict, name: str, where: str = ""):
    """A field, or its default. Raises `ValueError` where there is neither."""
    if config.get(name) is None and name in NULL_IS_ZERO and name in config:
        return 0
    if name not in config and name not in DEFAULTS:
        raise ValueError(f"{where}{name} is missing")
    return config.get(name, DEFAULTS.get(name))


def read_rope(config: dict) -> dict:
    """Rotary frequencies and YaRN."""
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(where) or {}
    demand(where, rope, isinstance(rope, dict), "an object, null or absent")
    theta = rope.get("rope_theta", read_field(config, "rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    length = read_field(config, "max_position_embeddings")
    demand(f"{where}.type", kind, kind in ("default", "yarn"), "'yarn', or there is no scaling")
    for name, valid in FIXED_ROPE.items():
        demand(f"{where}.{name}", rope.get(name), rope.get(name) in valid, f"{valid[1]}, or absent")
    if kind == "default":
        return {"rope_theta": theta, "original_seq_len": length}
    found = {ours: read_field(rope, theirs, where + ".") for ours, theirs in ROPE_FIELDS.items()}
    # Frequencies are stretched and the softmax scale corrected; angles are never scaled.
    both = found["mscale"], rope.get("mscale_all_dim")
    demand(f"{where}.mscale", both[0], both[0] == both[1] and both[0] != 0,
           f"equal to mscale_all_dim = {both[1]!r}, and not 0")
    start = found["original_seq_len"]
    demand("max_position_embeddings", length,
           not (type(length) is type(start) is int) or length > start,
           f"above {where}.original_max_position_embeddings = {start}, where YaRN is on")
    return {"rope_theta": theta} | found


def make_args(given: dict) -> ModelArgs:
    """ModelArgs, whose errors come out in the words of config.json."""
    words = FIELDS | {ours: f"rope_scaling.{theirs}" for ours, theirs in ROPE_FIELDS.items()}
    try:
        return ModelArgs(**given)
    except ValueError as error:
        pattern = r"\b(" + "|".join(words) + r")\b"
        raise ValueError(re.sub(pattern, lambda m: words[m[0]], str(error))) from None


def model_type_of(args: ModelArgs) -> str:
    """The class that a model is of; one without experts is a V3."""
    if args.has_indexer:
        return "deepseek_v32"
    return "deepseek_v2" if args.has_moe and args.score_func == "softmax" else "deepseek_v3"


def check_expressible(args: ModelArgs) -> None:
    """Raise `ValueError` naming the field for which transformers has no class."""
    name = CLASSES[model_type_of(args)]
    v2, yarn_without = model_type_of(args) == "deepseek_v2", args.yarn and args.mscale == 0
    rules = [
        ("q_lora_rank", not args.has_indexer or args.q_lora_rank, f"at least 1 in a {name}"),
        ("score_func", v2 or not args.has_moe or args.score_func == "sigmoid",
         f"'sigmoid' in a {name}"),
        ("gate_bias", not (v2 and args.gate_bias), f"False in a {name}"),
        ("gate_bias", v2 or not args.has_moe or args.gate_bias or args.n_expert_groups == 1,
         f"True in a {name} with groups: it scores a group by its best two"),
        ("n_routed_experts", v2 or args.n_routed_experts != 1, f"0, or at least 2 in a {name}"),
        ("dim", not v2 or args.dim % args.n_heads == 0,
         f"a multiple of n_heads = {args.n_heads} in a {name}"),
        ("mscale", not yarn_without, "other than 0 where YaRN is on")]
    for field, holds, valid in rules:
        if not holds:
            raise ValueError(f"{field} = {getattr(args, field)!r} cannot be saved for transformers:"
                             f" it must be {valid}")


def released_fields(args: ModelArgs) -> dict:
    """config.json without what only we know."""
    model_type = model_type_of(args)
    config = {"architectures": [CLASSES[model_type]], "model_type": model_type} | FIXED
    config |= {theirs: getattr(args, ours) for ours, theirs in FIELDS.items()}
    config |= {"num_key_value_heads": args.n_heads, "q_lora_rank": args.q_lora_rank or None}
    config |= {name: valid[0] for name, valid in
               (V2_GATE if model_type == "deepseek_v2" else V3_GATE).items()}
    if model_type == "deepseek_v2" and args.n_expert_groups > 1:
        config["topk_method"] = "group_limited_greedy"
    if not args.has_moe:
        config["first_k_dense_replace"] = args.n_layers + args.n_mtp_layers
    if args.has_indexer:
        config |= {name: getattr(args, name) for name in INDEX_FIELDS}
    scaling = None
    if args.yarn:
        scaling = {"type": "yarn", "mscale_all_dim": args.mscale}
        scaling |= {theirs: getattr(args, ours) for ours, theirs in ROPE_FIELDS.items()}
    return config | {"rope_theta": args.rope_theta, "rope_scaling": scaling}


# Names.


def hf_name(args: ModelArgs, name: str) -> str:
    """The released name of one of our tensors, with {e} for the expert's number in a stack.

    Of "mtp.0.block.attn.wo.weight", in a model of 61 layers:
    "model.layers.61.self_attn.o_proj.weight".
    """
    if name in NAMES:
        return NAMES[name]
    kind, number, inside = name.split(".", 2)
    layer = int(number) + (args.n_layers if kind == "mtp" else 0)
    if kind == "mtp":
        block = inside.startswith("block.")
        inside = inside.removeprefix("block.") if block else f"mtp.{inside}"
    return f"model.layers.{layer}.{NAMES[inside]}"


def to_hf(args: ModelArgs, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under their released names, stacked experts one by one, as views.

    tensors: our name -> tensor, as in `state_dict()`; gradients serve as well
    """
    for name, tensor in tensors.items():
        theirs = hf_name(args, name)
        if "{e}" not in theirs:
            yield theirs, tensor
            continue
        for e, own in enumerate(tensor.unbind()):
            yield theirs.replace("{e}", str(e)), own


class Slot(NamedTuple):
    """Where a released tensor goes: `name` of ours, row `expert` of it, or all; its shape."""

    name: str
    expert: int | None
    shape: list[int]


def slots(args: ModelArgs) -> dict[str, Slot]:
    """Released name -> its place, for every tensor that a model of these settings has."""
    found = {}
    for name, tensor in skeleton(args).state_dict().items():
        theirs, shape = hf_name(args, name), list(tensor.shape)
        if "{e}" not in theirs:
            found[theirs] = Slot(name, None, shape)
            continue
        found |= {theirs.replace("{e}", str(e)): Slot(name, e, shape[1:]) for e in range(shape[0])}
    return found


def skeleton(args: ModelArgs) -> Transformer:
    """A model without numbers: shapes only."""
    with torch.device("meta"):
        return Transformer(args)


# Reading.


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


def read_json(file: Path) -> dict:
    """The object in a JSON file; `ValueError` naming the file if there is none."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, not an object of fields")
    return found


def check_quantization(config: dict) -> bool:
    """Whether weights may be FP8. Raises `ValueError` for another form of it than released."""
    given = config.get("quantization_config")
    if given is None:
        return False
    demand("quantization_config", given, isinstance(given, dict), "an object, or absent")
    for name, valid in FP8_CONFIG.items():
        demand(f"quantization_config.{name}", given.get(name), given.get(name) in valid,
               " or ".join(map(repr, valid)))
    return True


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


def own_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """A gate's bias stays in FP32: rounded to BF16 it would choose other experts."""
    is_bias = name.endswith(("gate.bias", "e_score_correction_bias"))
    return torch.promote_types(dtype, torch.float32) if is_bias else dtype


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


# Writing.


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


def mtp_among_others(args: ModelArgs) -> bool:
    """Whether transformers leaves this model's MTP layer out by itself."""
    return (args.n_layers == RELEASED_LAYERS and args.n_mtp_layers == 1
            and model_type_of(args) != "deepseek_v2")


def mtp_copies(args: ModelArgs, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Embedding and head once more, as a released MTP layer has them."""
    for theirs, ours in MTP_COPIES.items():
        yield f"model.layers.{args.n_layers}.{theirs}", state[ours]


def stored_forms(name: str, tensor: Tensor, dtype: torch.dtype,
                 quantize: str | None) -> Iterator[tuple[str, Tensor]]:
    """What is stored for a tensor: itself in the precision asked for, or FP8 and its scales."""
    if quantize is None or not goes_to_fp8(name, tensor.shape):
        yield name, tensor.to(own_dtype(name, dtype))
        return
    q, scale = quantize_weight(tensor, ue8m0=quantize == "fp8-ue8m0")
    yield name, q
    yield f"{name}_scale_inv", scale


def goes_to_fp8(name: str, shape: Sequence[int]) -> bool:
    """Whether released FP8 files have this tensor in FP8."""
    return (len(shape) == 2 and 0 not in shape
            and not name.removesuffix(".weight").endswith(KEPT_WIDE))


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


# Programs.


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
