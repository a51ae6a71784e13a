"""Weights that stay in FP8 compute what the dequantized ones do, and take half of BF16's memory."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, gap, random_tokens, scrambled

from minids import fp8, hf
from minids.generate import generate

# Matrices of one block and of several, some ragged; every kind of layer.
ARGS = replace(LITTLE, dim=136, n_layers=3, n_mtp_layers=1)


def bytes_of(model: torch.nn.Module) -> int:
    """The bytes of the blocks' matrices and their scales."""
    return sum(tensor.numel() * tensor.element_size() for block in model.blocks()
               for name, tensor in block.state_dict().items()
               if tensor.dim() > 1 and "gate" not in name)


@pytest.mark.parametrize("form, indexer", [("fp8", 0), ("fp8-ue8m0", 4)])
@torch.no_grad()
def test_weights_in_fp8_compute_what_dequantized_ones_do(form, indexer, tmp_path, monkeypatch):
    args = replace(ARGS, index_n_heads=indexer, index_head_dim=16, index_topk=5)
    hf.save_hf(scrambled(args, dtype=torch.float32), tmp_path / "out", quantize=form)
    folder = hf.inspect(tmp_path / "out")
    monkeypatch.setattr(fp8, "BAND", 128)  # small matrices too take several bands
    wanted = hf.read_model(folder, torch.float64, "cpu")
    kept = hf.read_model(folder, torch.float64, "cpu", keep_fp8=True)
    tokens, prompts = random_tokens(args, 2, 30), [[5, 9, 2, 33, 7], [8]]
    assert gap(kept(tokens), wanted(tokens)) < 1e-12  # FP64: sums in another order
    for how in (dict(), dict(speculative=1), dict(temperature=1.0)):
        assert kept.eager and not hasattr(wanted, "eager")  # no graph holds a band's workspace
        texts = [generate(model, prompts, 8, **how).tokens for model in (kept, wanted)]
        assert texts[0] == texts[1], how
    for module in kept.modules():  # wrong: the scales of other blocks
        if hasattr(module, "w1_scale_inv"):
            module.w1_scale_inv = module.w1_scale_inv.roll(1, 0)
    assert gap(kept(tokens), wanted(tokens)) > 1e-3


def test_memory_is_half_of_bf16s(tmp_path):
    hf.save_hf(scrambled(ARGS, dtype=torch.float32), tmp_path / "out", quantize="fp8")
    folder = hf.inspect(tmp_path / "out")
    wide, kept = (bytes_of(hf.read_model(folder, torch.bfloat16, "cpu", keep_fp8=keep))
                  for keep in (False, True))
    assert 0.5 <= kept / wide < 0.52  # a scale per block, and the smallest have few numbers
