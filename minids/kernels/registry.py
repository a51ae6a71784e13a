"""Which body of a function runs: the plain definition, or a faster one that computes the same.

The plain definition stands in `minids.model` and names its bodies, best first:

    @bodies(norm.written_out, norm.fused)
    def rms_norm(x, weight, eps): ...

A body takes the same arguments and states when it runs, by device, type and size:

    @body(lambda x, weight, eps: torch.is_grad_enabled())
    def written_out(x, weight, eps): ...

The first whose condition holds is called; where none does, and inside `using("off")`, the plain
definition. `recorded` tells which one ran, so that tests and benchmarks see a fallback. A compiler
chooses once, while it traces, and that is when a choice in compiled code is counted.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator

from torch.compiler import is_compiling

SETTINGS = "auto", "off"
REGISTRY: dict[str, Callable] = {}  # "moe.combine" -> the function that picks a body

_setting = "auto"
_recording = False  # compiled code depends on this, and not on what the record holds
_record: Counter | None = None
_watch: Callable | None = None


def body(when: Callable[..., bool]):
    """Declare a body. when: of the function's own arguments, whether this body can run and pays"""
    def declare(function: Callable) -> Callable:
        function.when = when
        return function
    return declare


def bodies(*candidates: Callable):
    """Register a plain definition and its bodies; the result has attributes `plain`, `bodies`."""
    def register(plain: Callable) -> Callable:
        name = f"{plain.__module__.rpartition('.')[2]}.{plain.__qualname__}"

        @functools.wraps(plain)
        def pick(*args, **named):
            chosen = plain
            if _setting == "auto":
                for candidate in candidates:
                    if candidate.when(*args, **named):
                        chosen = candidate
                        break
            if _recording:
                note(name, chosen.__name__ if chosen is not plain else "plain")
                if not is_compiling() and _watch is not None:
                    _watch(name, chosen, args, named)
            return chosen(*args, **named)

        pick.plain, pick.bodies = plain, candidates
        REGISTRY[name] = pick
        return pick
    return register


def mention(name: str, chosen: str) -> None:
    """Count a choice that no definition makes, if there is a record."""
    if _recording:
        note(name, chosen)


def note(name: str, chosen: str) -> None:
    """Count a choice."""
    _record[name, chosen] += 1


# What `torch.compiler.assume_constant_result` does, without importing the compiler: it calls this
# as it traces, and leaves no trace of it in the compiled code.
note._dynamo_marked_constant = True


def use(setting: str) -> None:
    """Let bodies run where they can ("auto"), or the plain definitions everywhere ("off")."""
    global _setting
    assert setting in SETTINGS, setting
    _setting = setting


def current_setting() -> str:
    """Return the setting that `use` made."""
    return _setting


@contextlib.contextmanager
def using(setting: str) -> Iterator[None]:
    """Apply `use` within the block only."""
    before = _setting
    use(setting)
    try:
        yield
    finally:
        use(before)


@contextlib.contextmanager
def recorded(watch: Callable | None = None) -> Iterator[Counter]:
    """Count what runs within the block: (function, body's name or "plain") -> calls.

    watch: called before each call with the function's name, what runs, and its arguments
    """
    global _record, _watch, _recording
    before, _record, _watch, _recording = (_record, _watch), Counter(), watch, True
    try:
        yield _record
    finally:
        _record, _watch = before
        _recording = _record is not None
