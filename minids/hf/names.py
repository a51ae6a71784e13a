"""Names of files and tensors in a Hugging Face folder; the tables serve both directions.

A folder holds `config.json` and the weights, in `model.safetensors` or in shards that
`model.safetensors.index.json` lists. Each expert's matrices are separate tensors there and slices
of one stacked tensor here. The MTP modules are layers n_layers, n_layers + 1, ..

transformers ignores layer 61, V3's MTP module, and no other layer. A model of 61 layers therefore
stores its module among the other weights, with copies of embedding and head, as V3 was released.
Any other model stores its modules in `mtp.safetensors`, which the index does not list and
transformers does not read.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minids.apply.stored import SCALE
from minids.config import ModelArgs
from minids.model.transformer import Transformer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, MTP = "model.safetensors.index.json", "mtp.safetensors"

# Ours -> theirs, outside the blocks.
OUTSIDE = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
           "head.weight": "lm_head.weight"}
MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Inside block N, after "layers.N." and "model.layers.N."; MTP module K is layer n_layers + K there.
NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq.weight": "self_attn.q_proj.weight", "attn.wo.weight": "self_attn.o_proj.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn.wkv_b.weight": "self_attn.kv_b_proj.weight",
    **{f"attn.indexer.{same}": f"self_attn.indexer.{same}" for same in (
        "wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")},
    "ffn.gate.weight": "mlp.gate.weight", "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn.{w}.weight": f"mlp.{proj}.weight" for w, proj in MLP.items()},
    **{f"ffn.experts.{w}": f"mlp.experts.{{e}}.{proj}.weight" for w, proj in MLP.items()},
    **{f"ffn.shared_experts.{w}.weight": f"mlp.shared_experts.{proj}.weight"
       for w, proj in MLP.items()},
    # of MTP modules
    **{same: same for same in ("enorm.weight", "hnorm.weight", "eh_proj.weight")},
    "norm.weight": "shared_head.norm.weight",
}
WIDE = ("embed_tokens", "head", "mlp.gate", "eh_proj", "weights_proj")  # matrices never in FP8


def to_hf(args: ModelArgs, tensors: dict[str, Tensor], first_expert: int = 0
          ) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors under their released names, stacked experts one by one, as views.

    tensors: our name -> tensor, as in `state_dict()`; may be gradients. In a model of 61 layers
        "mtp.0.block.attn.wo.weight" becomes "model.layers.61.self_attn.o_proj.weight". The scales
        of a matrix in FP8 have its name and `SCALE`, here and there.
    first_expert: number of the first one in stacks of some experts only
    """
    for name, tensor in tensors.items():
        name, scale = name.removesuffix(SCALE), SCALE if name.endswith(SCALE) else ""
        if name in OUTSIDE:
            yield OUTSIDE[name], tensor
            continue
        kind, number, inside = name.split(".", 2)
        layer = int(number) + (args.n_layers if kind == "mtp" else 0)
        theirs = f"model.layers.{layer}.{NAMES[inside.removeprefix('block.')]}"
        if "{e}" in theirs:
            yield from ((theirs.replace("{e}", str(e)) + scale, own)
                        for e, own in enumerate(tensor, first_expert))
        else:
            yield theirs + scale, tensor


def copies(args: ModelArgs) -> dict[str, str]:
    """Return the copies that released MTP layers have of embedding and head: theirs -> ours."""
    return {f"model.layers.{args.n_layers + k}.{theirs}": ours for k in range(args.n_mtp_layers)
            for theirs, ours in (("embed_tokens.weight", "embed.weight"),
                                 ("shared_head.head.weight", "head.weight"))}


def skeleton(args: ModelArgs) -> Transformer:
    """Return a model of shapes without values, on the meta device."""
    with torch.device("meta"):
        return Transformer(args)


def shapes(args: ModelArgs) -> dict[str, list[int]]:
    """Return the shape of every tensor of a model, by its released name."""
    return {name: list(t.shape) for name, t in to_hf(args, skeleton(args).state_dict())}


def own_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, at least FP32 for a gate's bias: BF16 would choose other experts."""
    is_bias = name.endswith(("gate.bias", "e_score_correction_bias"))
    return torch.promote_types(dtype, torch.float32) if is_bias else dtype


def goes_to_fp8(name: str, shape: Sequence[int]) -> bool:
    """Return whether released FP8 files store this tensor in FP8."""
    return len(shape) == 2 and 0 not in shape and not name.removesuffix(".weight").endswith(WIDE)
