"""Compile every Triton kernel for a GPU that is not there; print each one's shared memory.

    PYTHONPATH=.:tests python tests/kernels/compile_kernels.py 90    compute capability 9.0

The functions that launch kernels are called as they are; a launch ends where the program for the
GPU exists. What the interpreter does not see, such as a type that a loop changes, ends here.
"""

import importlib
import pkgutil
import sys

import torch
from gpu_cases import (
    BF16,
    F32,
    entropy,
    gate,
    index_scores,
    loss_over_all,
    loss_over_selection,
    routed,
    selected,
)
from test_bodies import (
    INDEXER,
    all_loss_case,
    joined_case,
    scores_case,
    selected_case,
    selected_loss_case,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import minids.kernels
from minids.kernels import (
    few_tokens_gpu,
    fp8,
    indexer,
    precision,
    triton_adamw,
    triton_choice,
    triton_experts,
    triton_muon,
)
from minids.kernels.cross_entropy import chunked_on_gpu
from minids.kernels.registry import REGISTRY
from minids.kernels.routing import balance_in_one_pass, choose_in_one_kernel
from minids.model.transformer import Block

SPARSE = {"triton_selected", "triton_indexer", "triton_choice", "triton_index_loss"}
V3_WIDTHS = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


class Absent:
    """The driver of a GPU that is not there."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def is_hopper(capability: int) -> bool:
    """Return whether a card multiplies in FP8, and has the shared memory that is taken here."""
    return capability >= 90


def kernels(capability: int) -> set[str]:
    """The names of all kernels of the package, for Hopper those of FP8 and sparse attention too."""
    modules = [importlib.import_module(f"minids.kernels.{found.name}") for found in
               pkgutil.iter_modules(minids.kernels.__path__) if found.name.startswith("triton_")
               and (is_hopper(capability) or not (found.name.startswith("triton_fp8")
                                                  or found.name in SPARSE))
               and (capability == 90 or "hopper" not in found.name)]
    return {name for module in modules for name, value in vars(module).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel")}


def launch_fp8() -> None:
    """Call what rounds to E4M3 and multiplies: one matrix and several, and each layout."""
    counts = torch.tensor([130, 0, 126])
    for dtype in (F32, BF16):
        x = torch.randn(256, 384, dtype=dtype)
        fp8.round_activation(x, True, 1e-4)
        for weight, groups in ((torch.randn(1, 256, 384), []),
                               (torch.randn(3, 256, 384), fp8.group_tiles(counts, 256))):
            w, scale, *turned = fp8.round_weights([weight.to(dtype)], True, True)
            for source in (None, torch.arange(256)) if groups else (None,):
                _, *kept = fp8.forward(x, w, scale, 256, True, list(groups), source)
                fp8.backward(torch.randn(256, 256, dtype=dtype), *kept, *turned, 1, 384, dtype,
                             True, True, list(groups), source)


def launch_hopper() -> None:
    """Call what only compute capability 9.0 runs."""
    from minids.kernels import triton_fp8, triton_fp8_hopper
    triton_fp8.in_gluon = lambda x: True
    x, counts = torch.randn(256, 384, dtype=BF16), torch.tensor([130, 0, 126])
    groups = fp8.group_tiles(counts, 256)
    triton_fp8.round_tiles(x, True, triton_fp8.OF_X, groups=groups)
    q, scale, *turned = triton_fp8.round_tiles(x, True, triton_fp8.OF_ROUNDED, groups=groups,
                                               source=torch.arange(256))
    w, w_scale, *_ = triton_fp8.round_blocks([torch.randn(3, 256, 384, dtype=BF16)], columns=True)
    triton_fp8.round_tiles(x.float(), True, triton_fp8.OF_ROUNDED)
    for dtype in (F32, BF16):
        triton_fp8_hopper.product(q, scale, w, w_scale, 256, 256, dtype, groups)
        triton_fp8_hopper.over_tokens(*turned, *turned, 384, 384, dtype, groups)


def launch_hopper_attention() -> None:
    """Attention to latents in Gluon: a selection's, in one piece and in several, and all."""
    from minids.kernels import triton_selected_hopper
    slots = torch.zeros(2, 1, dtype=torch.int64)
    for rank, rope, dtype in ((512, 64, BF16), (256, 32, torch.float16)):
        q, latents = (torch.randn(2, n, rank + rope, dtype=dtype) for n in (128, 700))
        tokens = torch.zeros(2, 1, 200, dtype=torch.int32)
        for kind, pieces in ((dtype, 1), (F32, 2)):
            out, sums = torch.empty(pieces, 2, 128, rank, dtype=kind), torch.empty(pieces, 2, 128)
            for given in (tokens, None):
                triton_selected_hopper.attend(q, latents, given, slots, out, sums, 200, 128, 0.1,
                                              128)


def joined_block():
    """Return the body of a whole block."""
    return next(body for body in Block.forward.bodies if body.__name__ == "joined_block")


def launch_all() -> None:
    """Call everything that launches a kernel; what it returns means nothing."""
    for dtype in (F32, BF16):
        rows, slot = torch.randn(13, 1500, dtype=dtype), torch.randint(13, (5, 3))
        triton_experts.sum_slots(rows, slot)
        triton_experts.sum_slots(rows, slot, torch.rand(5, 3))
        chunked_on_gpu(*entropy(dtype, "cpu")).backward()
    choose_in_one_kernel(*gate(F32, "cpu"))
    balance_in_one_pass(*routed(F32, "cpu")).backward()
    for step in (F32, BF16):
        weights = [torch.randn(1, 3000) for _ in range(3)]
        triton_muon.look_ahead(*weights[:2], 0.95, torch.empty(1, 1, 3000, dtype=step))
        triton_muon.move(weights[2], torch.randn(1, 3000, dtype=step), 0.9, 0.02)
    for stack in (torch.randn(2, 136, 72, dtype=BF16), torch.randn(2, 72, 136, dtype=BF16).mT):
        triton_muon.mirrored(stack, 1.0, 0.0)
        triton_muon.mirrored(torch.randn(2, 136, 136, dtype=BF16), 2.0, -4.0)
    moments = [torch.randn(3000, dtype=BF16) for _ in range(2)]
    triton_adamw.move(torch.randn(3000), torch.randn(3000), dict(
        zip(("exp_avg", "exp_avg_sq", "step"), (*moments, torch.ones(())), strict=True)),
        dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    joined = joined_block()
    with torch.inference_mode():
        for count, shape in (
                (1, {}), (20, {}), (2, dict(q_lora_rank=0)),
                (3, dict(score_func="softmax", gate_bias=False, n_shared_experts=0)),
                (3, dict(n_routed_experts=12, n_expert_groups=3, n_shared_experts=2))):
            joined(*joined_case(count, **shape).call())
        for count in (1, 20):
            joined(*joined_case(count, dtype=BF16, **V3_WIDTHS).call())


def launch_sparse() -> None:
    """The same for sparse attention: FP32 in small widths, BF16 in V3.2's."""
    cases = {"sparse_attention.index_scores": (scores_case(F32, 2, 9, 40), index_scores),
             "mla.selected_attention": (selected_case(5, 19, 7), selected),
             "sparse_attention.indexer_loss": (all_loss_case(7), loss_over_all),
             "sparse_attention.selected_indexer_loss": (selected_loss_case(5, 19, 7),
                                                        loss_over_selection)}
    for name, (small, wide) in cases.items():
        for arguments in (small.call(), wide(BF16, "cpu")):
            learns = any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
            with torch.set_grad_enabled(learns):
                out = REGISTRY[name].bodies[0](*arguments)
            if learns:
                out.backward(torch.ones_like(out))
    with torch.inference_mode():
        numbers = index_scores(BF16, "cpu")
        for visible in (None, torch.ones(1, 700, 700, dtype=torch.bool)):
            for triton_choice.SHORT in (0, 16384):
                indexer.best_in_pieces(*numbers, visible, 200)
        indexer.best_tokens(*numbers, torch.zeros(2, 700, dtype=torch.int64), 200)
        indexer.best_in_pieces(*numbers, None, 200, True)
        for dtype, widths in ((F32, {}), (BF16, V3_WIDTHS | dict(index_n_heads=64,
                                                                index_head_dim=128))):
            joined_block()(*joined_case(1, dtype=dtype, **INDEXER | widths).call())
        q, latent, rank, *chosen, scale = selected(BF16, "cpu")
        attend = REGISTRY["mla.selected_attention"].bodies[0]
        attend(q[:, :1].detach(), latent.detach(), rank, *(t[:, :1] for t in chosen), scale)


def main(capability: int) -> None:
    """Compile; print a line for each kernel: its name, bytes of shared memory at most."""
    driver.set_active(Absent(capability))
    compiled, run = {}, JITFunction.run

    def only_compile(kernel: JITFunction, *args, grid, warmup, **named):
        found = run(kernel, *args, grid=grid, warmup=True, **named)
        assert found.asm["cubin"], kernel
        compiled[kernel.__name__] = max(found.metadata.shared, compiled.get(kernel.__name__, 0))
        return found

    JITFunction.run = only_compile
    few_tokens_gpu.INTERPRETED = precision.INTERPRETED = True  # then they take a CPU's tensors
    few_tokens_gpu.is_chained = lambda x: is_hopper(capability)
    launch_all()
    if is_hopper(capability):
        launch_fp8()
        launch_sparse()
    if capability == 90:
        launch_hopper()
        launch_hopper_attention()
    wanted = kernels(capability)
    assert compiled.keys() == wanted, compiled.keys() ^ wanted
    for name, shared in sorted(compiled.items()):
        print(name, shared)


if __name__ == "__main__":
    main(int(sys.argv[1]))
