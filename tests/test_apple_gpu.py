"""Apple's GPU, which no test has: what a notebook runs needs no float64 and no missing kernel.

Training runs on torch's meta device, which is neither CPU nor CUDA, so that it takes the way of any
other device; generation, which has to read tokens, runs on a CPU by its plain definitions. Every
operation on the way is noted and looked up in the table of kernels that comes with torch.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torchgen
from small_models import scrambled
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minids import ModelArgs, Transformer
from minids.generate import generate
from minids.infer import sampling
from minids.infer.validation import evaluate
from minids.kernels.registry import using
from minids.model.sparse_attention import freeze_all_but_indexers
from minids.rl.rollout import log_probs, roll_out
from minids.runs import checkpoints, optimizers
from minids.runs.optimizers import build_optimizers, clip_gradients
from minids.runs.settings import TrainArgs

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
NANO = ModelArgs.preset("nano")
SPARSE = replace(NANO, index_n_heads=2, index_head_dim=16, index_topk=8, q_lora_rank=24)
LACKING = torch.float64, torch.complex128  # types that Apple's GPU has not


@cache
def kernels() -> dict[str, str]:
    """Operation -> its entry in torch's table."""
    entries = re.split(r"^- func: ", TABLE.read_text("utf-8"), flags=re.M)[1:]
    return {entry.split("(", 1)[0]: entry for entry in entries}


def runs_on_apple(name: str) -> bool:
    """Return whether an operation has a kernel there, or is made of others."""
    if name not in kernels():
        return False
    entry = kernels()[name]
    if delegate := re.search(r"^  structured_delegate: (\S+)", entry, re.M):
        return runs_on_apple(delegate[1])
    keys = re.findall(r"^    ([\w, ]+):", entry, re.M)
    found = {key.strip() for group in keys for key in group.split(",")}
    return "MPS" in found or not found or any(key.startswith("Composite") for key in found)


class Noted(TorchDispatchMode):
    """Notes the operations, the types that a GPU would not have, and those that mix devices."""

    def __init__(self):
        super().__init__()
        self.names, self.faults = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        name = func.name().removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        kinds = {t.device.type for t in tensors if t.dim()} - {"mps"}  # what `narrow` pretends
        if len(kinds) > 1:
            self.faults.add(f"{name} mixes {sorted(kinds)}")
        self.faults |= {f"{name} makes {t.dtype}" for t in results if t.dtype in LACKING}
        if not name.startswith("profiler::"):
            self.names.add(name)
        return out

    def wrong(self) -> list[str]:
        """Return what Apple's GPU would refuse."""
        return sorted(self.faults | {f"{name} has no kernel" for name in self.names
                                     if not runs_on_apple(name)})


@pytest.fixture
def elsewhere(monkeypatch):
    """Let the meta device run what has to read numbers: it has none, and no fused AdamW. Triton
    counts as installed, so that a kernel of CUDA's would be tried if a body asked only for that."""
    for name, module in list(sys.modules.items()):
        if name.startswith("minids.kernels.") and hasattr(module, "TRITON"):
            monkeypatch.setattr(module, "TRITON", True)
    adamw = optimizers.AdamW
    monkeypatch.setattr(optimizers, "AdamW", lambda *given, fused, **more: adamw(*given, **more))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: [1] * t.numel())  # rows of each expert
    for number in ("item", "__float__"):
        monkeypatch.setattr(torch.Tensor, number, lambda t: 1.0)


def train(args: ModelArgs, stage: str = "", alter: Callable = lambda model: None) -> Noted:
    """Take a training step on the meta device; return what ran."""
    with torch.device("meta"):
        model = Transformer(args)
        tokens = torch.zeros(2, 32, dtype=torch.int64)
    if stage == "warmup":
        freeze_all_but_indexers(model)
    optimizers = build_optimizers(model, TrainArgs.for_preset("nano"), torch.float32)
    alter(model)
    with Noted() as noted:
        losses = model.loss(tokens, tokens, 0.3, 1e-4, "expert", stage)
        losses.total.backward()
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.update_gate_bias(losses.loads, 0.001)
    return noted


@pytest.mark.parametrize("args, stage", [
    (NANO, ""), (replace(NANO, score_func="softmax", gate_bias=False), ""), (SPARSE, "warmup"),
    (SPARSE, "sparse")])
def test_a_training_step_needs_nothing_that_apples_gpu_lacks(elsewhere, args, stage):
    noted = train(args, stage)
    assert {"mm", "bmm"} <= noted.names and noted.wrong() == []
    assert runs_on_apple("_fused_adamw_")


def decode(**settings) -> Noted:
    """Generate with the plain definitions; return what ran."""
    model = scrambled(NANO, dtype=torch.float32)
    with Noted() as noted, using("off"):
        generate(model, [[1, 2, 3], [4, 5]], 4, **settings)
    return noted


@pytest.fixture
def narrow(monkeypatch):
    """Draw tokens as on Apple's GPU, where this CPU would have wider numbers."""
    draw = sampling.Sampler.draw

    class Elsewhere(torch.Tensor):
        device = torch.device("mps")

    def drawn(self, probs):
        with pytest.MonkeyPatch.context() as patch:
            rand = torch.rand
            patch.setattr(torch, "rand", lambda *size, device, **more: rand(*size, **more))
            return draw(self, probs.as_subclass(Elsewhere)).as_subclass(torch.Tensor)

    monkeypatch.setattr(sampling.Sampler, "draw", drawn)


@pytest.mark.parametrize("settings", [
    dict(temperature=0), dict(temperature=0.8, top_k=20, top_p=0.9), dict(temperature=0.8,
                                                                          speculative=1)])
def test_generation_needs_nothing_that_apples_gpu_lacks(narrow, settings):
    noted = decode(**settings)
    assert "embedding" in noted.names and noted.wrong() == []


def test_validation_and_rollouts_need_nothing_that_apples_gpu_lacks(narrow):
    model, text = scrambled(NANO, dtype=torch.float32), torch.arange(200) % 90
    with Noted() as noted, using("off"):
        evaluate(model, text, torch.ones(NANO.vocab_size, dtype=torch.int64), 32, 2)
        rollout = roll_out(model, [[1, 2, 3], [4, 5]], 4, sampling.Sampler(1.0), {0})
        log_probs(model, rollout, 1.0, True, True)
    assert noted.wrong() == []


def test_what_it_lacks_is_noticed(elsewhere):
    """Wrong variants: a float64 weight, a tensor on the CPU, an operation without a kernel."""
    def wide(model):
        model.norm.weight.data = model.norm.weight.data.double()

    assert any("float64" in fault for fault in train(NANO, alter=wide).wrong())
    with Noted() as noted:
        torch.zeros(3, device="meta").index_put((torch.zeros(1, dtype=torch.int64),),
                                                torch.ones(1, device="meta"))
    assert noted.wrong() == ["index_put mixes ['cpu', 'meta']"]
    assert not runs_on_apple("geqrf") and not runs_on_apple("no_such_thing")


def test_a_cpus_draws_would_not_do():
    assert any("float64" in fault for fault in decode(temperature=0.8).wrong())


def test_generators_of_apples_gpu_are_saved_and_restored(monkeypatch):
    held = [torch.arange(4, dtype=torch.uint8)]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: held[0].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", partial(held.__setitem__, 0))
    state = checkpoints.rng_state()
    held[0] = torch.zeros(4, dtype=torch.uint8)
    checkpoints.set_rng_state(state)
    assert held[0].tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    checkpoints.set_rng_state(state)  # a run that goes on elsewhere
