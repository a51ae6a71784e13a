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
        interpreter._convert_float = cast
        interpreter.InterpreterBuilder.create_fma = multiply_and_add
    return True


def cast(numbers, before, after, rounding):
    """Cast as torch and a GPU do (`cvt.rn`): to the nearest number, and of two to the even one.

    Triton 3.6's own moves a half away from zero, loses the carry of a mantissa that it rounds up,
    truncates to subnormal numbers of E4M3, and truncates FP32 to BF16.
    """
    import torch

    types = dict(fp8e4nv=torch.float8_e4m3fn, fp8e5=torch.float8_e5m2, bf16=torch.bfloat16,
                 fp16=torch.float16, fp32=torch.float32, fp64=torch.float64)
    bits = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
    size = before.primitive_bitwidth, after.primitive_bitwidth
    source = torch.from_numpy(numbers.copy().reshape(-1).view(f"i{size[0] // 8}"))
    done = source.view(types[str(before)]).to(types[str(after)]).view(bits[size[1]])
    return done.numpy().view(f"u{size[1] // 8}").reshape(numbers.shape)


def multiply_and_add(builder, x, y, z):
    """Round x y + z once, as a GPU does; Triton's own rounds the product, too."""
    return builder.ternary_op(x, y, z, lambda a, b, c: (
        a.astype("f8") * b.astype("f8") + c.astype("f8")).astype(a.dtype))


def run(*tests: str, mark: str = "not slow and not exhaustive") -> None:
    """Run tests of a mark in a subprocess with the interpreter; skip without Triton."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", mark, "-p",
         "no:cacheprovider", "-p", "no:nbval", *tests],  # nbval takes seconds to import
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
