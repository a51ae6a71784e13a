"""A profile puts each kernel under one kind; measurements outlive the machine that made them."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from minids.config import ModelArgs
from minids.lab import profiling
from minids.lab.bench_setup import Bench
from minids.lab.profiling import KINDS, by_kind, fitted, kind_of, profile_table
from minids.plots.speed import COLOURS, IDLE

NANO = replace(ModelArgs.preset("nano"), n_mtp_layers=0)
# Names as an H100 with torch 2.11 tells them, cut short.
KERNELS = {
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel"
    "::GemmUniversal<cutlass::gemm::GroupProblemShape<cute::tuple<int": "grouped products",
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT": "products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96": "attention",
    "fmha_cutlassB_bf16_aligned_128x64_k128_sm80": "attention",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
    "namespace)::FusedAdamMathFunctor": "optimizer",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
    "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}": "copies and casts",
    "Memcpy DtoH (Device -> Pinned)": "copies and casts",
    "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::"
    "silu_kernel(at::TensorIteratorBase&)::{lambda()#1}": "norms and elementwise",
    "void at::native::radixSortKVInPlace<2, -1, 32, 4, long, long, unsigned int>": "routing",
    "void at::native::_scatter_gather_elementwise_kernel<128, 8": "routing",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>": "cross-entropy",
    "triton_poi_fused__to_copy_index_mul_silu_3": "norms and elementwise",
    "void cudnn::fusion::compute_dot_do_o<true>(void const*, void const*": "attention",
    "attend_kernel": "attention", "up_kernel": "grouped products", "choose_kernel": "routing",
    "normalise_kernel": "norms and elementwise", "sum_slots_kernel": "routing",
    "aten::mm": "products", "aten::_grouped_mm": "grouped products",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kinds_of_kernels(name):
    assert kind_of(name) == KERNELS[name]


def test_every_kind_has_a_colour():
    assert {*KINDS, IDLE} == set(COLOURS)


def event(name: str, us: float, device=DeviceType.CUDA) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_type=device, self_cpu_time_total=us,
                           time_range=SimpleNamespace(elapsed_us=lambda: us))


def test_a_gpu_s_kernels_are_added_up_and_stretches_of_time_are_not():
    events = [event("nvjet_tst_256", 3000), event("nvjet_tst_128", 1000),
              event("vectorized_elementwise_kernel<silu::{lambda()#1}>", 500),
              event("Optimizer.step#AdamW.step", 9000), event("ProfilerStep*", 9000),
              event("aten::mm", 700, DeviceType.CPU)]
    done = SimpleNamespace(events=lambda: events)
    assert by_kind(done, 2) == {"products": 2.0, "norms and elementwise": 0.25}
    done = SimpleNamespace(events=lambda: events[-1:])
    assert by_kind(done, 2) == {"products": 0.35}  # without a GPU, a CPU's operations


def test_kernels_side_by_side_are_no_longer_than_their_step():
    assert fitted({"products": 3.0, "routing": 1.0}, 2.0) == {"products": 1.5, "routing": 0.5}
    assert fitted({"products": 3.0, "routing": 1.0}, 8.0) == {"products": 3.0, "routing": 1.0}
    assert fitted({}, 2.0) == {}


def test_only_the_later_steps_are_profiled(monkeypatch):
    """Three of six tokens: what a step before them needed is over, and so is the prompt."""
    said = []
    done = SimpleNamespace(start=lambda: said.append("start"), stop=lambda: said.append("stop"))

    def generate(model, prompts, new_tokens, on_token):
        for token in range(new_tokens):
            on_token(0, token)
            said.append(token)
    monkeypatch.setattr(profiling, "generate", generate)
    profiling.profiled_steps(None, [[1]], 3, [], make=lambda activities: done)
    assert said == [0, 1, "start", 2, 3, 4, "stop", 5]


def test_what_a_profile_says_of_a_step(monkeypatch):
    """The steps in the middle count, not those that compile; kinds are no longer than their step"""
    ends = iter([9, 10, 20, 20.1, 20.3, 20.6, 99, 99, 99])
    program = SimpleNamespace(seconds=0.0)
    program.train_step = lambda: setattr(program, "seconds", next(ends))
    settings = SimpleNamespace(command="", device="cpu", preset="nano", prompt=7)
    bench = SimpleNamespace(settings=settings, decoder=lambda: None, prompts=lambda n: [[1]] * n)
    for name, value in dict(
            trainer=lambda *_: program, profile=lambda activities: contextlib.nullcontext(),
            by_kind=lambda done, steps: {"products": 1200 / steps, "routing": 0.0},
            generate=lambda *_: None, seconds_per_step=lambda *_: 0.025,
            profiled_steps=lambda *_: None).items():
        monkeypatch.setattr(profiling, name, value)
    assert profiling.training_profile(bench) == dict(
        what="train", ms=200.0, kinds={"products": 200.0, "routing": 0.0})
    assert profiling.decoding_profile(bench) == dict(
        what="nano, batch 1, 7 tokens before", ms=25.0, kinds={"products": 25.0, "routing": 0.0})


def test_profile_table(settings, tmp_path, monkeypatch):
    timed, measure = [], profiling.seconds_per_step
    monkeypatch.setattr(profiling, "PROFILED", {"training": 1, "decoding": 3})
    monkeypatch.setattr(profiling, "seconds_per_step", lambda model, prompts, steps: (
        timed.append(steps), measure(model, prompts, steps))[1])
    file = tmp_path / "new" / "profile.json"
    command = f"--preset nano --batch-size 2 --seq-len 32 --data {settings.data}"
    bench = Bench(replace(settings, record=str(file), command=command, label="one"), NANO)
    head, *rows = profile_table(bench)
    assert head[1:] == ["training, one", "decoding, one"]
    assert [row[0] for row in rows] == ["in all", *KINDS, IDLE]
    kept = json.loads(file.read_text())
    assert timed == [6]  # as many steps as the profile's generation has
    assert kept["one"]["training"]["what"] == command and "torch" in kept["one"]["where"]
    assert kept["one"]["training"]["kinds"]["products"] > 0
    first = file.with_suffix(".png").read_bytes()

    kept["two"] = json.loads(json.dumps(kept["one"]))
    kept["two"]["training"]["ms"] *= 2
    file.write_text(json.dumps(kept))
    head, *rows = profile_table(Bench(replace(settings, record=str(file)), NANO))  # draws only
    assert head[1:] == ["training, one", "training, two", "decoding, one", "decoding, two"]
    assert float(rows[0][2]) == pytest.approx(2 * float(rows[0][1]), abs=0.03)  # both rounded
    assert file.with_suffix(".png").read_bytes() != first and json.loads(file.read_text()) == kept


def test_a_file_without_measurements_is_named(settings, tmp_path):
    file = tmp_path / "none.json"
    with pytest.raises(ValueError, match="record"):
        next(profile_table(Bench(replace(settings, record=str(file)), NANO)))
    assert not file.exists()
