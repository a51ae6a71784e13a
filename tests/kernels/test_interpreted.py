"""Kernels in Triton, by its interpreter: the tests that an everyday process skips.

One subprocess goes through all of them, since importing torch and Triton takes seconds.
"""

from pathlib import Path

import pytest
import triton_interpreter

HERE = Path(__file__).parent
TESTS = [*(str(HERE / f"test_{name}.py") for name in ("fp8_kernels", "triton", "triton_sparse")), *(
    f"{HERE / 'test_bodies.py'}::test_{name}"
    for name in ("a_body_equals_its_plain_definition", "a_broken_body_is_noticed",
                 "a_fallback_in_silence_is_noticed"))]


@pytest.mark.slow
def test_by_the_interpreter():
    """Each body as it is and broken, at small shapes and all others."""
    triton_interpreter.run(*TESTS, mark="not exhaustive")
