"""Translate between `config.json` of a Hugging Face folder and `ModelArgs`.

DeepseekV3ForCausalLM serves V3, R1, V3.1, Moonlight and Kimi K2. A field that two readers could
take differently is refused. Settings that no released configuration can express (YaRN's where YaRN
is off, the indexer's Hadamard transform and FP8 rounding) go under the key "minids" if they differ
from what the other fields imply.
"""

import math
import re
from dataclasses import replace

from minids.base.fields import demand, nearest, require
from minids.config import ModelArgs
from minids.fp8 import BLOCK

FIELDS = {  # ours -> theirs
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
               "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
SOFTMAX_FIELDS = {"mscale": "mscale_all_dim", "attention_factor": "attention_factor"}
INDEX_FIELDS = {name: name for name in ("index_n_heads", "index_head_dim", "index_topk")}
OWN_KEY = "minids"
OWN_FIELDS = (*ROPE_FIELDS, *SOFTMAX_FIELDS, *INDEX_FIELDS, "n_dense_layers", "index_hadamard",
              "index_fp8")
DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "num_nextn_predict_layers": 0,
            "rope_theta": 10000.0, "beta_fast": 32.0, "beta_slow": 1.0}
# What null means in these fields; in those of DEFAULTS it means the default.
NULLS = {"q_lora_rank": 0, "n_shared_experts": 0, "n_group": 1}
SPELLINGS = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts",
             "num_experts": "n_routed_experts", "type": "rope_type"}

CLASSES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
           "deepseek_v32": "DeepseekV32ForCausalLM"}
ALIASES = {"kimi_k2": "deepseek_v3"}  # the same class under another model_type
# Fields with few valid values. An absent field has the first, which is also what we write.
COMMON = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None),
          "mlp_bias": (False, None), "moe_layer_freq": (1, None), "rope_interleave": (True,),
          "tie_word_embeddings": (False, True, None)}
V2_GATE = {"scoring_func": ("softmax", None), "norm_topk_prob": (False, None),
           "topk_method": ("greedy", "group_limited_greedy")}
V3_GATE = {"scoring_func": ("sigmoid", None), "norm_topk_prob": (True,),
           "topk_method": ("noaux_tc", None)}
FIXED = {kind: {"architectures": ([name], None)} | COMMON | (V2_GATE if "V2" in name else V3_GATE)
         for kind, name in CLASSES.items()}  # by model_type
FIXED_ROPE = {"truncate": (None, True), "partial_rotary_factor": (None, 1.0)}
# Names that may stand beside rope_scaling, and in it.
OUTER_ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
ROPE_KEYS = ("rope_type", *ROPE_FIELDS.values(), *SOFTMAX_FIELDS.values(), "mscale", "rope_theta",
             *FIXED_ROPE)
FP8_CONFIG = {"quant_method": ("fp8",), "weight_block_size": ([BLOCK, BLOCK],),
              "fmt": ("e4m3", None), "activation_scheme": ("dynamic", None),
              "scale_fmt": (None, "float", "ue8m0")}
QUANTIZE = {"fp8": {}, "fp8-ue8m0": {"scale_fmt": "ue8m0"}}  # our word -> what the file adds


def args_from_config(config: dict) -> ModelArgs:
    """Return the settings that a released `config.json` describes.

    config: the file's object, with YaRN under "rope_scaling", as released, or "rope_parameters",
        as transformers 5 writes it. Without YaRN original_seq_len = max_seq_len.
    Raises `ValueError` naming the field as the file does, its value and what is valid.
    """
    model_type = read_type(config)
    found = read_fields(config, model_type)
    found |= read_rope(config, found["max_seq_len"])
    try:
        args = ModelArgs(**found)
        check_expressible(args, model_type)
    except ValueError as error:  # its message has our names
        theirs = FIELDS | {ours: f"rope_scaling.{name}" for ours, name in
                           (ROPE_FIELDS | SOFTMAX_FIELDS).items()}
        pattern = r"\b(" + "|".join(theirs) + r")\b"
        raise ValueError(re.sub(pattern, lambda m: theirs[m[0]], str(error))) from None
    own = config.get(OWN_KEY, {})
    demand(OWN_KEY, own, isinstance(own, dict) and set(own) <= set(OWN_FIELDS),
           f"an object whose fields are among {', '.join(OWN_FIELDS)}")
    full = replace(args, **own)
    demand(OWN_KEY, own, released_fields(full) == released_fields(args),
           "consistent with the other fields")
    return full


def config_from_args(args: ModelArgs) -> dict:
    """Return the `config.json` of a model: the inverse of `args_from_config`.

    A sigmoid gate without a bias is saved as one with a bias of zero, and read back as such.
    Raises `ValueError` naming a setting that no class of transformers can express.
    """
    check_expressible(args, model_type_of(args))
    config = released_fields(args)
    back = args_from_config(config)
    own = {name: getattr(args, name) for name in OWN_FIELDS
           if getattr(args, name) != getattr(back, name)}
    return config | ({OWN_KEY: own} if own else {})


def demand_each(given: dict, valid: dict[str, tuple], where: str = "", note: str = "") -> None:
    """Demand one of the valid values of each field."""
    for name, values in valid.items():
        value = given.get(name, values[0])
        demand(where + name, value, value in values, " or ".join(map(repr, values)) + note)


def read_type(config: dict) -> str:
    """Return the model_type, an alias resolved, after checking what this family never varies."""
    given, known = config.get("model_type"), [*CLASSES, *ALIASES]
    if given not in known:
        raise ValueError(f"model_type = {given!r} is not valid: {nearest(str(given), known)}"
                         f"valid are {', '.join(known)}")
    model_type = ALIASES.get(given, given)
    demand_each(config, FIXED[model_type], note=f" where model_type = {model_type!r}")
    heads, key_heads = map(config.get, ("num_attention_heads", "num_key_value_heads"))
    demand("num_key_value_heads", key_heads, key_heads in (None, heads),
           f"num_attention_heads = {heads}, or absent: the latent is expanded for every head")
    fp8 = config.get("quantization_config")
    demand("quantization_config", fp8, fp8 is None or isinstance(fp8, dict), "an object, or absent")
    if fp8 is not None:
        demand_each(dict.fromkeys(FP8_CONFIG) | fp8, FP8_CONFIG, "quantization_config.")
    return model_type


def read_fields(config: dict, model_type: str) -> dict:
    """Return the fields of ModelArgs, except those of the rotation."""
    config = together({"": config})
    if model_type == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy":
        config |= {"n_group": 1, "topk_group": 1}  # it ignores the groups
    if config.get("n_group", 0) in (None, 1) and config.get("topk_group") is None:
        config["topk_group"] = 1
    found = read(config, FIELDS | (INDEX_FIELDS if model_type == "deepseek_v32" else {}))
    dense, layers = found["n_dense_layers"], found["n_layers"]
    if type(dense) is type(layers) is int:
        found["n_dense_layers"] = min(dense, layers)  # a larger one: all layers are dense
    demand("index_n_heads", 0, found.get("index_n_heads") != 0, f"at least 1 in a {model_type}")
    v2 = model_type == "deepseek_v2"
    return found | {"gate_bias": not v2, "score_func": "softmax" if v2 else "sigmoid"}


def together(parts: dict[str, dict]) -> dict:
    """Return the fields of all parts, in one spelling; refuse a field with two values.

    parts: what messages put before a field's name -> fields
    """
    found, source = {}, {}
    for where, fields in parts.items():
        for name, value in fields.items():
            own = SPELLINGS.get(name, name)
            before = found.get(own)
            demand(where + name, value, value is None or before is None or value == before,
                   f"equal to {source.get(own)} = {before!r}")
            if before is None:
                found[own], source[own] = value, where + name
    return found


def read(given: dict, names: dict[str, str], where: str = "") -> dict:
    """Return each field's value or default, by our name; `ValueError` for one that has neither."""
    given = {name: (DEFAULTS | NULLS).get(name) if value is None else value
             for name, value in (DEFAULTS | given).items()}
    for name in names.values():
        if name not in given:
            raise ValueError(f"{where}{name} is missing")
    return {ours: whole(given[theirs]) for ours, theirs in names.items()}


def whole(value):
    """Return a float without a fraction as an int: a file may write a size as 64.0."""
    return int(value) if type(value) is float and value.is_integer() else value


def read_rope(config: dict, length: int) -> dict:
    """Return the fields of ModelArgs that describe the rotation: rope_theta and YaRN's."""
    parts = {"": {name: config[name] for name in OUTER_ROPE if name in config}}
    for where in ("rope_scaling", "rope_parameters"):
        parts[f"{where}."] = fields = config.get(where) or {}
        demand(where, fields, isinstance(fields, dict), "an object, null or absent")
    rope, where = together(parts), "rope_scaling." if parts["rope_scaling."] else "rope_parameters."
    for name, value in rope.items():
        demand(where + name, value, value is None or name in ROPE_KEYS,
               f"absent: {nearest(name, ROPE_KEYS)}known are {', '.join(ROPE_KEYS)}")
    kind = rope.get("rope_type") or "default"
    demand(f"{where}type", kind, kind in ("default", "yarn"), "'yarn', or there is no scaling")
    demand_each(rope, FIXED_ROPE, where)
    found = read(rope, {"rope_theta": "rope_theta"})
    if kind == "default":
        demand_each(rope, {"attention_factor": (None, 1.0)}, where)
        return found | {"original_seq_len": length}
    start = whole(rope.get("original_max_position_embeddings"))
    if type(length) is type(start) is int and start > 0:
        demand("max_position_embeddings", length, length > start,
               f"above {where}original_max_position_embeddings = {start}, where YaRN is on")
        if rope.get("factor", 1) is None and length < 2 ** 63:
            rope["factor"] = length / start
    return found | read(rope, ROPE_FIELDS, where) | read_softmax(rope, where)


def read_softmax(rope: dict, where: str) -> dict:
    """Return YaRN's weight in the softmax scale, and its factor on queries and keys.

    transformers reads mscale as 1 unless mscale_all_dim is given too; DeepSeek's own code does not.
    A file that the two would read differently is refused.
    """
    for name in ("factor", "mscale", "mscale_all_dim", "attention_factor"):
        value = rope.get(name)
        demand(where + name, value, value is None or type(value) in (int, float)
               and 0 <= value < 2 ** 63, "a number from 0 on")
    factor, weight, softmax, given = map(rope.get, ("factor", "mscale", *SOFTMAX_FIELDS.values()))

    def correction(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor and factor > 1 else 1.0

    theirs = correction(weight) / correction(softmax) if weight and softmax else correction(1)
    released = correction(1 if weight is None else weight) / correction(softmax or 0)
    if given is None:
        demand(f"{where}mscale", weight, math.isclose(theirs, released),
               f"given together with mscale_all_dim, now {softmax!r}, or both be absent")
    else:
        demand(f"{where}attention_factor", given, weight is None or math.isclose(given, theirs),
               f"{theirs}, as mscale has it, or absent")
    return {"mscale": softmax or 0.0, "attention_factor": theirs if given is None else given}


def model_type_of(args: ModelArgs) -> str:
    """Return the model_type that expresses a model; one without experts is a V3."""
    if args.has_indexer:
        return "deepseek_v32"
    return "deepseek_v2" if args.has_moe and args.score_func == "softmax" else "deepseek_v3"


def check_expressible(args: ModelArgs, model_type: str) -> None:
    """Raise `ValueError` naming the first setting that this class of transformers cannot have."""
    v2, v3_gate = model_type == "deepseek_v2", model_type != "deepseek_v2" and args.has_moe
    for field, holds, valid in (
            ("q_lora_rank", not args.has_indexer or args.q_lora_rank > 0, "at least 1"),
            ("score_func", not v3_gate or args.score_func == "sigmoid", "'sigmoid'"),
            ("gate_bias", not (v2 and args.gate_bias), "False"),
            ("gate_bias", not v3_gate or args.gate_bias or args.n_expert_groups == 1,
             "True where n_expert_groups > 1 (a group's score is that of its best two)"),
            ("n_routed_experts", v2 or args.n_routed_experts != 1, "0, or at least 2"),
            ("dim", not v2 or args.dim % args.n_heads == 0,
             f"a multiple of n_heads = {args.n_heads}")):
        require(args, field, holds, f"{valid}, in a {CLASSES[model_type]}")


def released_fields(args: ModelArgs) -> dict:
    """Return config.json without the key "minids"."""
    model_type = model_type_of(args)
    config = {"architectures": [CLASSES[model_type]], "model_type": model_type}
    config |= {name: values[0] for name, values in FIXED[model_type].items()}
    config |= {theirs: getattr(args, ours) for ours, theirs in FIELDS.items()}
    config |= {"num_key_value_heads": args.n_heads, "q_lora_rank": args.q_lora_rank or None}
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
        plain = args.mscale != 0 and args.attention_factor == 1
        scaling |= {"mscale": args.mscale} if plain else {"attention_factor": args.attention_factor}
    return config | {"rope_theta": args.rope_theta, "rope_scaling": scaling}
