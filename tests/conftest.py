"""Settings of the whole suite; read before torch is imported.

Notebook kernels and the programs that tests start are children of the workers and inherit them.
"""

import gc
import os
import resource
import subprocess

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of the two workers computes on one thread

# Many processes import the package: the first one compiles it, also where an image says not to.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What a tensor leaves stays with the process (glibc reads these when one starts). Else a step of
# training gives its logits back and asks for them again: page faults, a sixth of its time.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2 ** 25))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2 ** 28))
os.environ.setdefault("MALLOC_TOP_PAD_", str(2 ** 26))

# What takes longest comes first, so that the last minute is left to what is short. A check of an
# answer copies its process, so the files of checks come before anything that fills memory.
FIRST = ("tests/lab/test_checker.py", "tests/lab/test_grading.py", "tests/test_graders.py",
         "tests/lab/test_lesson.py", "tests/lab/test_mine.py", "tests/lab/test_variants.py",
         "notebooks/", "tests/parallel/", "tests/kernels/", "tests/test_readme.py", "tests/runs/",
         "tests/test_stages_train.py", "tests/test_r1.py", "tests/infer/",
         "tests/test_parity_hf.py", "tests/test_mistakes_train.py", "tests/test_train.py",
         "tests/test_grpo.py", "tests/test_sft.py", "tests/test_crash_points.py",
         "tests/test_dryrun.py", "tests/test_generate.py", "tests/plots/", "tests/apply/",
         "tests/hf/", "tests/text/", "tests/lab/")


def pytest_collection_modifyitems(items: list) -> None:
    """Order the files; within a file the tests stay as they stand."""
    def place(item) -> int:
        return next((i for i, start in enumerate(FIRST) if item.nodeid.startswith(start)),
                    len(FIRST))

    items.sort(key=place)


def pytest_collection() -> None:
    """Collect without looking for garbage: modules stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what collecting made, modules for the most part, out of every later collection."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def small_files():
    """No file may pass 100 kB: a disk error that every user can have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts an empty file system of so many MB, and returns its folder; skips without root."""
    mounted = []

    def mount(megabytes: int):
        (disk := tmp_path / "disk").mkdir()
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)],
                           check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system needs root")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)
