"""Command lines: the fields of a dataclass become flags, and a user's mistake becomes one line."""

import argparse
import contextlib
import errno
import functools
import io
import os
import re
import shlex
import sys
import traceback
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NoReturn

from minids.base.fields import bounds, check_folder, check_writable, nearest

# torch's RuntimeErrors
NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory"
                       "|Storage size calculation overflowed|_STATUS_ALLOC_FAILED")
# Other RuntimeErrors of torch and Triton that the machine is to blame for, and what to do.
MACHINE = {
    re.compile("no kernel image is available"): (
        "this torch has no code for this GPU; install a build that has "
        "(pytorch.org/get-started/previous-versions), or use --device cpu"),
    re.compile("driver (on your system is too old|version is insufficient)"): (
        "the NVIDIA driver is too old for this torch; update it, install an older torch "
        "(pytorch.org/get-started/previous-versions), or use --device cpu"),
    re.compile(r"No working C\+\+ compiler|Failed to find C compiler|Python\.h|TritonMissing"
               "|Cannot find a working triton|Command .*(gcc|g\\+\\+|clang)"): (
        "torch.compile finds no C compiler, Python headers or Triton to compile with; install "
        "gcc and python3-dev, or use --compile false"),
    re.compile("not currently implemented for the MPS device"): (
        "Apple's GPU lacks an operation; set PYTORCH_ENABLE_MPS_FALLBACK=1 to run it on the CPU, "
        "or use --device cpu"),
}
SAID: set[str] = set()

OUTSIDE = {"safetensors", "safetensors_rust", "pyarrow", "datasets", "huggingface_hub", "httpx",
           "httpcore"}

UNNAMED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # of a write: no path


class Stopped(Exception):
    """Signal `number` stopped the program, which has saved its state; `flags` continue it."""

    def __init__(self, number: int, flags: list[str]):
        super().__init__(number)
        self.number, self.flags = number, flags


def one_line(text: object) -> str:
    """Return a text in one line: a message may quote a file's name that has two."""
    return " ".join(str(text).split())


def say_once(line: str) -> None:
    """Tell on stderr, once per process, that something runs in another way than one would expect:
    without the GPU, or without a CUDA graph."""
    if line not in SAID:
        SAID.add(line)
        print(one_line(line), file=sys.stderr, flush=True)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, with the nearest valid flag, and status 2."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0]
            flags = [f for action in self._actions for f in action.option_strings]
            message = f"unknown flag {word}: {nearest(word, flags)}--help lists them all"
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def to_bool(text: str) -> bool:
    """Return the truth value of 'true', 'false' or one of their usual spellings."""
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def to_choice(switch: tuple[str, str], text: str) -> str:
    """Return the choice that a text names, or means as a truth value; see `option`."""
    try:
        return switch[to_bool(text)]
    except argparse.ArgumentTypeError:
        return text


def flag_of(f) -> str:
    """Return the flag of a dataclass's field."""
    return "--" + (f.metadata["flag"] or f.name.replace("_", "-"))


def add_flags(parser: argparse.ArgumentParser, cls, title: str) -> None:
    """Add one flag per field of the dataclass `cls`; an absent flag leaves no attribute."""
    group = parser.add_argument_group(title.rstrip("."))
    tiny = cls.for_preset("tiny") if hasattr(cls, "for_preset") else cls
    for f in fields(cls):
        if f.default is MISSING:
            continue
        default = f.default if f.default != "" else "none"
        if getattr(tiny, f.name) != f.default:
            default = f"{default}; tiny: {getattr(tiny, f.name)}"
        valid = f"; {bounds(f)}" if bounds(f) else ""
        text = f"{f.metadata['help']}{valid} [{default}]".replace("%", "%%")
        spec = dict(dest=f.name, default=argparse.SUPPRESS, help=text)
        spec |= dict(type=f.type, metavar=f.type.__name__.upper())
        if f.type is bool:
            spec |= dict(type=to_bool, nargs="?", const=True)
        if f.metadata["choices"]:
            spec |= dict(choices=f.metadata["choices"], metavar=None)
        if switch := f.metadata["switch"]:
            spec |= dict(type=functools.partial(to_choice, switch), nargs="?", const=switch[True])
        group.add_argument(flag_of(f), **spec)


def parse(program: str, doc: str, *classes, argv: list[str] | None = None) -> list[dict]:
    """Parse a program's command line; return one dict per class, with only the flags given.

    program: name after `python -m`, e.g. "minids.train"
    doc: the module's docstring; it opens the help
    classes: dataclasses whose fields are the flags
    argv: the words; None takes `sys.argv[1:]`
    """
    parser = OneLineParser(prog=f"python -m {program}", description=doc, allow_abbrev=False,
                           usage=f"python -m {program} [--flag VALUE ..]",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for cls in classes:
        add_flags(parser, cls, (cls.__doc__ or cls.__name__).strip().splitlines()[0])
    given = vars(parser.parse_args(argv))
    for f in (f for cls in classes for f in fields(cls)):
        if f.metadata.get("folder") and (folder := given.get(f.name, f.default)):
            check_folder(f.name, folder)
            check_writable(f.name, folder)
    return [{f.name: given[f.name] for f in fields(cls) if f.name in given} for cls in classes]


def told(error: Exception) -> str:
    """Return an error from outside in one line: a value, a file, memory, a package; "" for a bug.

    torch's errors are known by their text and those of `OUTSIDE` by their module: none is imported.
    """
    text = one_line(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "minids").split(".")[0]
        if package in sys.stdlib_module_names:
            return f"Python has no {package} on {sys.platform}: use Linux or macOS"
        return "" if package == "minids" else f"{package} is not installed: pip install {package}"
    if isinstance(error, OSError) and error.strerror:
        path = error.filename
        if path is None and error.errno in UNNAMED:
            path = file_in(error) or "standard output"
        return text if path is None else one_line(f"{path}: {error.strerror}")
    if isinstance(error, RecursionError):
        return f"something is nested too deeply: {text}"
    if lacks := no_memory(error):
        return f"{lacks}; take smaller sizes"
    if isinstance(error, RuntimeError):
        for known, line in MACHINE.items():
            if known.search(text):
                return line
    package = type(error).__module__.split(".")[0]
    if package.startswith("safetensors") and (path := file_in(error)):
        return one_line(f"{path}: {text}")
    known = isinstance(error, ValueError | OSError | OverflowError)
    return text if known or package in OUTSIDE else ""


def no_memory(error: Exception) -> str:
    """Return that there is not enough memory, and for how much, if an error says so; else ""."""
    text = one_line(error)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and NO_MEMORY.search(text):
        asked = re.search(r"allocate ([\d.]+ \w+)", text)
        return f"not enough memory{f' for {asked[1]}' if asked else ''}"
    return ""


def tell_import(kind: type, error: BaseException, trace) -> None:
    """Tell in one line why a program's imports ended: a package is missing, or Ctrl-C; a hook."""
    stopped = isinstance(error, KeyboardInterrupt)
    missing = told(error) if isinstance(error, ModuleNotFoundError) else ""
    if not (line := "interrupted" if stopped else missing):
        return sys.__excepthook__(kind, error, trace)
    print(f"python -m minids: {line}", file=sys.stderr, flush=True)
    os._exit(130 if stopped else 2)


def file_in(error: Exception) -> Path | None:
    """Return the file or path that the innermost frame of an error works on, if one has any."""
    inner = [*traceback.walk_tb(error.__traceback__)][1:]  # the first is run_program's
    for frame, _ in reversed(inner):
        for value in frame.f_locals.values():
            if isinstance(value, io.BufferedWriter | io.TextIOWrapper) and hasattr(value, "name"):
                value = Path(str(value.name))
            if isinstance(value, Path):
                return value
    return None


def silence(stream) -> None:
    """Send what a stream still holds, and all that follows, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Lasting:
    """A stream of a program that goes on when nobody reads it: a closed pipe or terminal is said
    on stderr, once."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.attempt(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, act, *given):
        try:
            return act(*given)
        except OSError as error:
            silence(self.stream)
            print(f"{self.stream.name} takes no more text ({error.strerror}); the program goes on",
                  file=sys.stderr, flush=True)


def leave(status: int, at_once: bool = False) -> NoReturn:
    """Exit with a status; a rank of several always exits at once, without the end of Python.

    Torch stops the threads of its process groups then, in any order, also of those that it has
    closed, and one that still runs aborts the process: its status becomes that of signal 6. So does
    a daemon thread that is inside torch, such as one that was writing a checkpoint.
    """
    if at_once or os.environ.get("WORLD_SIZE", "1") != "1":
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def run_program(program: str, main, lasting: bool = False) -> NoReturn:
    """Run `main()` and exit with its status.

    What `told` has a line for becomes that line on stderr and status 2; `Stopped` becomes the
    command that continues the program, and the signal's status.

    lasting: the program writes files, and goes on when nobody reads what it prints
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 ends no run
            stream.reconfigure(errors="backslashreplace")
    if lasting:
        sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        status = main() or 0
        sys.stdout.flush()  # what it still holds may find a full disk, or no reader
        leave(status)
    except SystemExit as ended:  # of argparse, or of a rank that leaves the word to another one
        leave(ended.code or 0)
    except Stopped as stopped:
        print(f"stopped; continue with: python -m {program} {shlex.join(stopped.flags)}")
        leave(128 + stopped.number)
    except BrokenPipeError:  # the reader, say `head`, has closed the pipe
        silence(sys.stdout)
        leave(0)
    except KeyboardInterrupt:
        print(f"python -m {program}: interrupted", file=sys.stderr)
        leave(130, at_once=True)
    except Exception as error:
        if not (line := told(error)):
            raise
        print(f"python -m {program}: {line}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            silence(sys.stdout)
        leave(2)
