"""glibc keeps freed memory, and no other allocator is told anything."""

from types import SimpleNamespace

import pytest

from minids.base import memory


@pytest.mark.parametrize("libc, settings", [
    ("glibc", {(-4, 0), (-1, 2**30), (-2, 2**26)}),  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    ("", set())])
def test_glibc_alone_is_told_to_keep_memory(monkeypatch, libc, settings):
    told = set()
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(
        mallopt=lambda *setting: told.add(setting)))
    memory.keep_freed_memory()
    assert told == settings
