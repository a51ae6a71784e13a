"""Names: which tensors are FP8, and a model that returns bit for bit."""

from dataclasses import replace

import pytest
import torch
from hf_folders import KINDS, all_equal, folder_of
from small_models import LITTLE, random_tokens, scrambled

from minids import ModelArgs, hf
from minids.hf import load_hf, save_hf, to_hf

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")



def released_numbers(preset: str) -> dict[str, int]:
    """Return how many numbers of each precision a released FP8 checkpoint has, by our tables."""
    args, sizes = ModelArgs.preset(preset), {"F8": 0, "BF16": 0, "F32": 0}
    state = hf.names.skeleton(args).state_dict()
    shapes = hf.names.shapes(args)
    shapes |= {name: list(state[ours].shape) for name, ours in hf.names.copies(args).items()}
    assert hf.writing.mtp_among_others(args)
    for name, shape in shapes.items():
        if hf.names.goes_to_fp8(name, shape):
            sizes["F8"] += shape[0] * shape[1]
            sizes["F32"] += -(-shape[0] // 128) * -(-shape[1] // 128)
        else:
            wide = hf.names.own_dtype(name, torch.bfloat16) == torch.float32
            sizes["F32" if wide else "BF16"] += torch.Size(shape).numel()
    return sizes


def test_the_released_precisions_are_reproduced_to_the_number(monkeypatch):
    released = {"F8": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert released_numbers("v3") == released
    assert sum(released_numbers("v3.2").values()) == 685_396_921_376
    wide = hf.names.WIDE
    for kept in (wide[:3], (*wide, "o_proj")):  # wrong: eh_proj in FP8; wo not
        monkeypatch.setattr(hf.names, "WIDE", kept)
        assert released_numbers("v3") != released


def test_gradients_are_named_as_the_weights_are():
    model = scrambled(LITTLE)
    tokens = random_tokens(LITTLE, 3, 21)
    model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    grads = dict(to_hf(LITTLE, {name: p.grad for name, p in model.named_parameters()}))
    biases = {name for name in hf.names.shapes(LITTLE) if name.endswith("e_score_correction_bias")}
    assert grads.keys() | biases == hf.names.shapes(LITTLE).keys() and len(biases) == 2
    own = model.layers[1].ffn.experts.w2.grad[5]
    assert torch.equal(grads["model.layers.1.mlp.experts.5.down_proj.weight"], own)
    assert not torch.equal(grads["model.layers.1.mlp.experts.4.down_proj.weight"], own)
    own = model.mtp[0].block.attn.wo.weight.grad
    assert torch.equal(grads["model.layers.2.self_attn.o_proj.weight"], own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [
    torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_a_model_returns_bit_for_bit(kind, dtype, tmp_path, monkeypatch):
    args = KINDS[kind]
    model = scrambled(args, dtype=dtype)
    for bias in model.gate_biases():  # as every program of ours keeps them
        bias.data = bias.to(torch.promote_types(dtype, torch.float32))
    save_hf(model, tmp_path / "one")
    back = load_hf(tmp_path / "one", dtype)
    expected = model.state_dict()
    if kind == "no bias":
        expected |= {name: torch.zeros_like(bias) for name, bias in back.state_dict().items()
                     if name.endswith("gate.bias")}
    assert all_equal(back.state_dict(), expected)
    assert back.args == replace(args, gate_bias=args.gate_bias or kind == "no bias")
    save_hf(back, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    # wrong: gate and up projections exchanged on the way in
    names = hf.names.NAMES | {"ffn.w1.weight": hf.names.NAMES["ffn.w3.weight"],
                        "ffn.w3.weight": hf.names.NAMES["ffn.w1.weight"]}
    monkeypatch.setattr(hf.names, "NAMES", names)
    assert not all_equal(load_hf(tmp_path / "one", dtype).state_dict(), expected)


def test_a_gate_bias_is_never_rounded_to_bf16(tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out", dtype=torch.float32)
    biases = scrambled(LITTLE, dtype=torch.float32).gate_biases()
    loaded = load_hf(folder, torch.bfloat16)
    assert loaded.head.weight.dtype == torch.bfloat16
    assert all(map(torch.equal, loaded.gate_biases(), biases))
    assert not torch.equal(biases[0].bfloat16().float(), biases[0])
    save_hf(scrambled(LITTLE, dtype=torch.float32), tmp_path / "bf16", dtype=torch.bfloat16)
    assert all(map(torch.equal, load_hf(tmp_path / "bf16").gate_biases(), biases))
