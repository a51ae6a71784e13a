"""Triton's interpreter: kernels run on a CPU, in a process of its own, with tiny shapes.

`TRITON_INTERPRET` counts when a kernel is defined, so tests that need it are run again by a
subprocess (`run`), where `running()` holds. They are skipped where Triton is not installed.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def running() -> bool:
    """Return whether kernels run here, by the interpreter; prepares it the first time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if not hasattr(patch, "before"):
        # numpy 2.4 makes no int of an array of one number, which Triton 3.6 has as a loop's bound
        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        patched.before = patch
        interpreter._patch_lang_tensor = patched
    return True


def run(file: str, *arguments: str) -> None:
    """Run a file's tests in a subprocess with the interpreter; skip without Triton."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", file,
         *arguments], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
