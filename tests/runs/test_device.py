"""Where a program runs: the precision that "auto" picks, threads, allocator and memory."""

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from minids.runs import device as module
from minids.runs.device import memory_mib, pick_dtype, prepare_cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("avx512, amx, dtype", [
    (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_auto_is_bf16_only_where_a_cpu_multiplies_it(monkeypatch, avx512, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert pick_dtype("auto", CPU) == dtype


@pytest.mark.parametrize("able, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_is_bf16_only_where_a_gpu_multiplies_it(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    assert pick_dtype("auto", CUDA) == dtype


def test_a_named_precision_is_taken_as_named():
    assert pick_dtype("fp32", CUDA) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16


def test_threads_are_set_when_a_number_is_given(monkeypatch):
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("", ""))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (2, 0, 1, 0):
            prepare_cpu(threads)
            found.append(torch.get_num_threads())
        assert found == [2, 2, 1, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [-1, 9, 1000, 100_000])
def test_threads_are_a_small_multiple_of_the_cores(monkeypatch, threads):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    with pytest.raises(ValueError, match=f"^threads = {threads} is not valid: it must be between "
                                         "0 and 8, four per core here$"):
        prepare_cpu(threads)


@pytest.mark.parametrize("libc, settings", [
    ("glibc", {(-4, 0), (-1, 2**30), (-2, 2**26)}),  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    ("", set())])
def test_glibc_alone_is_told_to_keep_memory(monkeypatch, libc, settings):
    told = set()
    monkeypatch.setattr(module.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: SimpleNamespace(
        mallopt=lambda *setting: told.add(setting)))
    prepare_cpu(0)
    assert told == settings


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_the_processs_in_mib(monkeypatch, platform, unit):
    """getrusage counts in KiB on Linux, in bytes on macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(
        ru_maxrss=(300 * 2**20 + 5) // unit if who == resource.RUSAGE_SELF else 0))
    assert memory_mib(CPU) == 300
