"""FP8 files hold what our rounding gives, in both scale formats, ragged blocks included."""

import json
from dataclasses import replace

import pytest
import torch
from hf_folders import (
    RAGGED,
    all_equal,
    edit,
    folder_of,
    rounded,
)
from safetensors.torch import load_file, save_file
from small_models import LITTLE, scrambled
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from minids import fp8, hf
from minids.fp8 import dequantize, quantize_weight
from minids.hf import load_hf, save_hf, to_hf
from minids.hf.names import CONFIG, INDEX, MTP, WEIGHTS

TINY = replace(LITTLE, dim=12, inter_dim=16, moe_inter_dim=8, n_heads=2, n_routed_experts=4,
               n_activated_experts=2, n_expert_groups=2, n_limited_groups=1, q_lora_rank=8,
               kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6)
FORMS = ["fp8", "fp8-ue8m0"]


def transposed(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Wrong: rows of blocks taken for columns."""
    flipped = scale.T if scale.shape[0] == scale.shape[1] else scale.flatten().view_as(scale.T).T
    return dequantize(q, flipped.reshape(scale.shape))


def without_ragged(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Wrong: the last, partial blocks take the scales of the whole ones before them."""
    rows, columns = (torch.arange(n).clamp(max=max(size // 128, 1) - 1)
                     for n, size in zip(scale.shape, q.shape, strict=True))
    return dequantize(q, scale[rows][:, columns])


@pytest.mark.parametrize("form", FORMS)
def test_fp8_files_hold_what_our_rounding_gives(form, tmp_path, monkeypatch):
    model = scrambled(RAGGED, dtype=torch.float32)
    model.layers[0].ffn.w1.weight.data *= torch.linspace(0.1, 9, RAGGED.inter_dim)[:, None]
    monkeypatch.setattr(fp8, "BAND", 128)  # small matrices too take several bands
    save_hf(model, tmp_path / "out", quantize=form)
    stored = load_file(tmp_path / "out" / WEIGHTS) | load_file(tmp_path / "out" / MTP)
    kinds = {tensor.dtype for name, tensor in stored.items() if "scale" not in name}
    assert kinds == {torch.float8_e4m3fn, torch.float32}
    for name, tensor in stored.items():
        wide = name.endswith(("norm.weight", "bias")) or any(
            part in name for part in ("embed", "lm_head", "mlp.gate.", "eh_proj", "weights_proj"))
        assert (tensor.dtype == torch.float8_e4m3fn) == (not wide and "scale" not in name), name
    loaded = dict(to_hf(RAGGED, load_hf(tmp_path / "out").state_dict()))
    assert all_equal(loaded, rounded(model, form == "fp8-ue8m0"))
    for wrong in (transposed, without_ragged):
        assert not all_equal(loaded, rounded(model, form == "fp8-ue8m0", wrong))
    assert not all_equal(loaded, rounded(model, form == "fp8"))


def test_fp8_of_more_rows_than_a_band(tmp_path):
    args = replace(TINY, inter_dim=2 * fp8.BAND + 70, n_routed_experts=0)
    model = scrambled(args, dtype=torch.float32)
    model.layers[0].ffn.w1.weight.data *= torch.linspace(0.1, 3, args.inter_dim)[:, None]
    save_hf(model, tmp_path / "out", quantize="fp8")
    loaded = load_hf(tmp_path / "out").layers[0].ffn.w1.weight
    own = model.layers[0].ffn.w1.weight
    assert torch.equal(loaded, dequantize(*quantize_weight(own)))
    q, scale = quantize_weight(own)
    assert not torch.equal(loaded, dequantize(q, scale.roll(1, 0)))  # wrong: a band too late


def test_scales_may_be_stored_as_exponents(tmp_path):
    folder = folder_of(RAGGED, tmp_path / "out", quantize="fp8-ue8m0")
    expected = load_hf(folder).state_dict()
    stored = load_file(folder / WEIGHTS)
    scales = {name for name in stored if name.endswith("_scale_inv")}
    narrow = {name: stored[name].to(torch.float8_e8m0fnu) for name in scales}
    assert all(torch.equal(narrow[name].float(), stored[name]) for name in scales)
    save_file(stored | narrow, folder / WEIGHTS, metadata={"format": "pt"})
    assert all_equal(load_hf(folder).state_dict(), expected)
    # wrong: scales that are no powers of two do not survive this
    stored = load_file(folder_of(RAGGED, tmp_path / "fp32", quantize="fp8") / WEIGHTS)
    assert not all(torch.equal(stored[name].to(torch.float8_e8m0fnu).float(), stored[name])
                   for name in scales)


def test_transformers_undoes_fp8_alike():
    """Its rule for whole blocks; it refuses the ragged ones that released files have."""
    torch.manual_seed(0)
    q, scale = quantize_weight(torch.randn(256, 384))
    theirs = Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    assert torch.equal(theirs, dequantize(q, scale))
    assert not torch.equal(theirs, dequantize(q, scale.roll(1, 1)))


def test_a_released_v3_folder_is_read_as_it_is(tmp_path):
    """Kimi K2's model_type, FP8 with BF16, an MTP layer with its copies, tables of angles."""
    args = replace(RAGGED, index_n_heads=0)
    model = scrambled(args, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.writing, "mtp_among_others", lambda args: True)
        save_hf(model, tmp_path / "out", quantize="fp8", shard_bytes=100_000)
    edit(tmp_path / "out" / CONFIG, {"model_type": "kimi_k2", "minids": ..., "mlp_bias": ...})
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    angles = "model.layers.0.self_attn.rotary_emb.inv_freq"
    index["weight_map"][angles] = "angles.safetensors"
    save_file({angles: torch.ones(3)}, tmp_path / "out" / "angles.safetensors")
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    back = load_hf(tmp_path / "out", torch.bfloat16)
    assert len(back.mtp) == 1 and "model.layers.2.embed_tokens.weight" in index["weight_map"]
    expected = {name: t.to(hf.names.own_dtype(name, torch.bfloat16))
                for name, t in rounded(model, False).items()}
    for name, bias in expected.items():
        if name.endswith("correction_bias"):  # this model's were BF16 before they were saved
            expected[name] = bias.float()
    assert all_equal(dict(to_hf(args, back.state_dict())), expected)
