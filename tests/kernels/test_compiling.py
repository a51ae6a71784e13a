"""Every Triton kernel compiles for the GPUs that people have, on a machine that has none."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from minids.kernels import few_tokens_gpu

OF_TRAINING = {"look_ahead_kernel", "move_kernel", "adamw_kernel", "loss_and_gradient_kernel",
               "sum_slots_kernel", "sums_kernel", "gradient_kernel", "choose_kernel"}
ROOT = Path(__file__).resolve().parents[2]
# A block's shared memory, bytes at most (CUDA C++ Programming Guide, table of capabilities).
SHARED = {75: 64 << 10, 86: 99 << 10, 90: 227 << 10}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None,
                    reason="Triton is not installed: pip install 'triton==3.6.*'")
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile(capability, tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)],
        capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}
    used = {name: size for name, size in shared.items()  # decoding's do not run on older cards
            if divmod(capability, 10) >= few_tokens_gpu.OLDEST or name in OF_TRAINING}
    assert OF_TRAINING < shared.keys() and max(used.values()) <= SHARED[capability], used
