"""Where a program runs: the precision that "auto" picks, threads, allocator and memory."""

import os
import resource
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minids import ModelArgs
from minids.base import command_line
from minids.costs import count_parameters
from minids.parallel.layout import Layout
from minids.runs import device as module
from minids.runs import starting, together
from minids.runs.device import (
    check_memory,
    memory_mib,
    pick_device,
    pick_dtype,
    prepare_cpu,
    written_in,
)
from minids.runs.learner import Learner

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.mark.parametrize("avx512, amx, dtype", [
    (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_auto_is_bf16_only_where_a_cpu_multiplies_it(monkeypatch, avx512, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert pick_dtype("auto", CPU) == dtype


def card(monkeypatch, name: str, capability: tuple[int, int]) -> None:
    """Let torch see this GPU; like torch, count converted BF16 as supported unless asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or capability[0] >= 8)


@pytest.mark.parametrize("name, capability, dtype", [
    ("NVIDIA H100 80GB HBM3", (9, 0), torch.bfloat16), ("NVIDIA RTX 3090", (8, 6), torch.bfloat16),
    ("Tesla T4", (7, 5), torch.float16), ("Tesla V100", (7, 0), torch.float16),
    ("Tesla P100", (6, 0), torch.float32)])
def test_auto_is_what_the_cards_tensor_cores_multiply(monkeypatch, name, capability, dtype):
    card(monkeypatch, name, capability)
    assert pick_dtype("auto", CUDA) == dtype


def test_bf16_is_refused_on_a_card_that_would_convert_every_number(monkeypatch):
    card(monkeypatch, "Tesla T4", (7, 5))
    with pytest.raises(ValueError, match="^dtype = 'bf16' is not valid: Tesla T4 does not multiply "
                                         "BF16; use --dtype auto, fp16 or fp32$"):
        pick_dtype("bf16", CUDA)


def test_a_named_precision_is_taken_as_named():
    assert pick_dtype("fp32", CUDA) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("fp16", CPU) == torch.float16


def test_text_is_written_in_fp32_unless_a_gpu_or_the_user_has_another_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # it would train in BF16
    card(monkeypatch, "NVIDIA H100 80GB HBM3", (9, 0))
    for name, device, dtype in (("auto", CPU, torch.float32), ("auto", MPS, torch.float32),
                                ("auto", CUDA, torch.bfloat16), ("bf16", CPU, torch.bfloat16),
                                ("fp32", CUDA, torch.float32)):
        made = written_in(name, device)
        assert made.args == (device.type, dtype)
        assert made.keywords == dict(enabled=dtype != torch.float32)


def test_apples_gpu_is_taken_by_name_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (pick_device("mps"), pick_device("auto")) == (MPS, CPU)
    assert (pick_dtype("auto", MPS), pick_dtype("bf16", MPS)) == (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="^dtype = 'fp16' is not valid on mps: "):
        pick_dtype("fp16", MPS)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 300 * 2**20 + 5)
    assert memory_mib(MPS) == 300
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^device = 'mps' is not valid: torch sees no Apple GPU"):
        pick_device("mps")


TOO_OLD = ("CUDA initialization: The NVIDIA driver on your system is too old (found version "
           "11040). Please update your GPU driver by downloading and installing a new version")
BROKEN = ("CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up "
          "environment. Setting the available devices to be zero.")


def warned(monkeypatch, warning: str, cuda: str | None = "13.0") -> None:
    """Let torch find no GPU, with a warning or without one."""
    def is_available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(command_line, "SAID", set())


@pytest.mark.parametrize("warning, reason", [
    (TOO_OLD, "the NVIDIA driver is too old for this torch: it runs CUDA 11.4, and this torch is "
              "built for 13.0; update the driver, or install a torch built for CUDA 11.4 "
              "(pytorch.org/get-started/previous-versions)"),
    (BROKEN, "CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up "
             "environment")])
def test_a_gpu_that_torch_cannot_use_is_told_in_one_line(monkeypatch, capsys, warning, reason):
    warned(monkeypatch, warning)
    with pytest.raises(ValueError) as error:
        pick_device("cuda")
    assert str(error.value) == f"device = 'cuda' is not valid: {reason}"
    assert [pick_device("auto"), pick_device("auto")] == [CPU, CPU]
    assert capsys.readouterr().err == f"on the CPU, because {reason}\n"  # said once
    assert pick_device("cpu") == CPU and capsys.readouterr().err == ""


def test_a_machine_without_a_gpu_says_nothing(monkeypatch, capsys):
    warned(monkeypatch, "", cuda=None)
    assert pick_device("auto") == CPU and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="torch sees no GPU here; use --device cpu, or install"):
        pick_device("cuda")


def test_threads_are_set_when_a_number_is_given(monkeypatch):
    kept = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: kept.append(True))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (2, 0, 1, 0):
            prepare_cpu(threads)
            found.append(torch.get_num_threads())
        assert found == [2, 2, 1, 1] and kept == [True] * 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [-1, 9, 1000, 100_000])
def test_threads_are_a_small_multiple_of_the_cores(monkeypatch, threads):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    with pytest.raises(ValueError, match=f"^threads = {threads} is not valid: it must be between "
                                         "0 and 8, four per core here$"):
        prepare_cpu(threads)


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_the_processs_in_mib(monkeypatch, platform, unit):
    """getrusage counts in KiB on Linux, in bytes on macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(
        ru_maxrss=(300 * 2**20 + 5) // unit if who == resource.RUSAGE_SELF else 0))
    assert memory_mib(CPU) == 300


def test_all_weights_on_each_rank_count_as_memory(monkeypatch):
    args = ModelArgs.preset("tiny")
    count = count_parameters(args)
    room = 20 * (count.total + count.mtp)  # 16 bytes per parameter, and 4 on each of two ranks
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else room)
    check_memory(args, CPU, ranks=2)
    with pytest.raises(ValueError, match="and all weights on each rank to write replies with"):
        check_memory(args, CPU, ranks=2, whole=True)
    check_memory(args, CPU, each=12, ranks=2, whole=True)


@pytest.mark.parametrize("ranks, on, refused", [(1, MPS, False), (2, MPS, True), (2, CUDA, False)])
def test_several_ranks_are_refused_on_apples_gpu(monkeypatch, ranks, on, refused):
    class Started(Exception):
        pass

    def start(layout, kind):
        raise Started(kind)

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(together, "started", start)
    machine = SimpleNamespace(device=on.type, prepare=lambda: on)
    told = (ValueError, "device = 'mps' is not valid: it must be cpu or cuda over several ranks")
    kind, words = told if refused else (Started, on.type)
    with pytest.raises(kind, match=words):
        together.opened("run", machine, SimpleNamespace(layout=lambda ranks: None)).__enter__()


@pytest.mark.parametrize("ranks, first", [(1, True), (2, True), (2, False)])
def test_ranks_cut_a_model_and_keep_what_is_stored(monkeypatch, capsys, ranks, first):
    """Matrices in FP8 stay so over several ranks, and else if asked for; the first rank speaks."""
    team = SimpleNamespace(device=CPU, first=first, ranks="the ranks", together=nullcontext,
                           alike=lambda advice: nullcontext()) if ranks > 1 else None
    monkeypatch.setattr(together, "started", lambda layout, kind: nullcontext(team))
    monkeypatch.setattr(together, "open_model", lambda *inputs, **options: (inputs, options))
    machine, found = SimpleNamespace(device="cpu", prepare=lambda: CPU), []
    for kept in (False, True):
        spread = SimpleNamespace(layout=lambda ranks: None, keep_fp8=kept)
        with together.opened("a run", machine, spread) as ((inputs, options), own):
            assert inputs == ("a run", CPU) and own is team
            found.append(options)
            print("a remark", file=sys.stderr)
    assert capsys.readouterr().err == "a remark\n" * 2 * first
    assert [options["keep_fp8"] for options in found] == [ranks > 1, True]
    cut = [options["cut"].keywords for options in found if "cut" in options]
    assert cut == [dict(ranks="the ranks")] * 2 * (ranks > 1)


def test_a_program_of_one_process_refuses_a_second(monkeypatch):
    starting.alone("r1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes are not valid: minids.r1 runs in one"):
        starting.alone("r1")


def test_a_run_starts_with_the_layout_and_device_that_were_asked_for(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(starting, "prepare_cpu", lambda threads, bodies: None)
    monkeypatch.setattr(starting, "started", lambda *inputs: nullcontext(found.append(inputs)))
    args = SimpleNamespace(threads=1, bodies="auto", device="cpu", out=str(tmp_path / "run"))
    layout = Layout(schedule="GPipe")
    run = starting.in_folder(args, lambda: None, Learner, layout, lambda *run: found.append(run))
    assert found == [(layout.fitted(1), "cpu"), (run, Learner)] and run == tmp_path / "run"


def test_a_run_that_is_given_no_folder_is_named_after_the_one_before(monkeypatch):
    monkeypatch.setattr(starting, "folder_of", Path)
    monkeypatch.setattr(starting, "in_folder", lambda args, default, *_: default())
    args = SimpleNamespace(from_run="elsewhere/x", out="")
    assert starting.learn(Learner, args, "-sft") == Path("runs/x-sft")
