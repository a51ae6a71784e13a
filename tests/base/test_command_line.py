"""Command lines: flags from fields, help that says everything, and mistakes in one line."""

import json  # noqa: F401, as some below: a program's body needs it
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch

from minids.base.command_line import Stopped, flag_of, parse, run_program  # noqa: F401
from minids.base.fields import bounds, option
from minids.config import ModelArgs
from minids.runs.settings import TrainArgs


@dataclass
class Recipe:
    """How to bake."""

    minutes: int = option(40, "time in the oven, minutes")
    heat: float = option(180.0, "temperature, degrees; 100% is 250")
    tin: str = option("", "path of the tin")
    fan: bool = option(False, "whether the fan turns")
    grain: str = option("rye", "what the flour is made of", ("rye", "wheat"))


def test_parse_returns_only_the_flags_that_were_given():
    given = parse("x", "Bake.", Recipe, ModelArgs,
                  argv="--minutes 5 --fan --grain wheat --n-heads 2 --gate-bias off".split())
    assert given == [dict(minutes=5, fan=True, grain="wheat"), dict(n_heads=2, gate_bias=False)]
    assert parse("x", "Bake.", Recipe, argv=[]) == [{}]


@pytest.mark.parametrize("argv, words", [
    ("--minuts 5", ["unknown flag --minuts", "did you mean '--minutes'?"]),
    ("--n-head 2", ["unknown flag --n-head", "did you mean '--n-heads'?"]),
    ("--min 5", ["unknown flag --min"]),  # an abbreviation is a guess
    ("--zzzzz", ["unknown flag --zzzzz", "--help lists them all"]),
    ("--minutes soon", ["--minutes", "'soon'", "int"]),
    ("--minutes", ["--minutes", "expected one argument"]),
    ("--grain oats", ["--grain", "'oats'", "rye", "wheat"]),
    ("--fan perhaps", ["--fan", "'perhaps' is neither true nor false"]),
    ("--fan\npan", ["unknown flag --fan"]),
])
def test_a_wrong_flag_is_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("bakery", "Bake.", Recipe, ModelArgs, argv=argv.split(" "))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("python -m bakery: ") and err.count("\n") == 1
    assert all(word in err for word in words)


TINY = TrainArgs.for_preset("tiny")


def undocumented(text: str, cls) -> list[str]:
    """Fields whose meaning (with unit) or default a help text lacks."""
    entries, flag = {}, ""  # flag -> its words, which start on its own line or on the next
    for line in text.splitlines():
        words = line.split()
        flag = words[0] if words and words[0].startswith("--") else flag if words else ""
        entries[flag] = f"{entries.get(flag, '')} {' '.join(words)}"
    faults = []
    for f in fields(cls):
        told = entries.get(flag_of(f), "")
        default = f.default if f.default != "" else "none"
        if cls is TrainArgs and getattr(TINY, f.name) != f.default:
            default = f"{default}; tiny: {getattr(TINY, f.name)}"
        valid = f"; {bounds(f)}" if bounds(f) else ""
        if f"{f.metadata['help']}{valid} [{default}]" not in told:
            faults.append(f.name)
    return faults


def test_help_opens_with_the_docstring_and_shows_unit_and_default_of_every_flag(
        capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    with pytest.raises(SystemExit) as caught:
        parse("bakery", "Bake bread.\n\n    python -m bakery", Recipe, ModelArgs, TrainArgs,
              argv=["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Bake bread.\n\n    python -m bakery\n" in text and "How to bake:" in text
    assert [undocumented(text, cls) for cls in (Recipe, ModelArgs, TrainArgs)] == [[], [], []]
    assert undocumented(text.replace("[40]", ""), Recipe) == ["minutes"]
    assert undocumented(text.replace(", degrees", ""), Recipe) == ["heat"]


def end_of(body: str, capsys) -> tuple[int, str, str]:
    """Status, stdout and stderr of a program that evaluates `body`."""
    with pytest.raises(SystemExit) as end:
        run_program("bakery", lambda: eval(body, globals() | {"raise_": raise_}))
    return end.value.code, *capsys.readouterr()


def raise_(error: Exception):
    raise error


@pytest.mark.parametrize("body, status, err", [
    ("ModelArgs(n_heads=0)", 2,
     "python -m bakery: n_heads = 0 is not valid: it must be at least 1\n"),
    ("ModelArgs.preset('v33')", 2, "python -m bakery: preset 'v33' is unknown: did you mean"),
    ("open('/no/such/file')", 2, "python -m bakery: /no/such/file: No such file or directory"),
    ("open('/no\\nsuch/file')", 2, "python -m bakery: /no such/file: No such file or directory\n"),
    ("__import__('os').mkdir('/')", 2, "python -m bakery: /: File exists\n"),
    ("json.loads('[' * 10**6)", 2, "python -m bakery: something is nested too deeply: maximum"),
    ("bytearray(10**16)", 2, "python -m bakery: not enough memory; take smaller sizes\n"),
    ("torch.empty(10**15)", 2,
     "python -m bakery: not enough memory for 4000000000000000 bytes; take smaller sizes\n"),
    ("torch.empty(10**18, 10**5)", 2, "python -m bakery: not enough memory; take smaller sizes\n"),
    ("numpy.ones(10**15)", 2, "python -m bakery: not enough memory for 7.11 PiB; take smaller"),
    ("raise_(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ..'))",
     2, "python -m bakery: not enough memory for 20.00 GiB; take smaller sizes\n"),
    ("raise_(RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`'))",
     2, "python -m bakery: not enough memory; take smaller sizes\n"),
    ("raise_(RuntimeError('CUDA error: no kernel image is available for execution'))",
     2, "python -m bakery: this torch has no code for this GPU; install a build that has "),
    ("raise_(RuntimeError('The NVIDIA driver on your system is too old (found version 11040).'))",
     2, "python -m bakery: the NVIDIA driver is too old for this torch; update it, "),
    ("raise_(RuntimeError('InductorError: InvalidCxxCompiler: No working C++ compiler found in "
     "torch._inductor.config.cpp.cxx'))",
     2, "python -m bakery: torch.compile finds no C compiler, Python headers or Triton to "),
    ("raise_(RuntimeError('Failed to find C compiler. Please specify via CC environment'))",
     2, "python -m bakery: torch.compile finds no C compiler, Python headers or Triton to "),
    ("raise_(NotImplementedError('aten::cummax is not currently implemented for the MPS device'))",
     2, "python -m bakery: Apple's GPU lacks an operation; set PYTORCH_ENABLE_MPS_FALLBACK=1 "),
    ("safetensors.torch.load(bytes(20))", 2, "python -m bakery: Error while deserializing"),
    ("__import__('matplotlib.figure')", 2,
     "python -m bakery: matplotlib is not installed: pip install matplotlib\n"),
    ("__import__('resource')", 2, "python -m bakery: Python has no resource on "),
    ("(10**400) / 3", 2, "python -m bakery: integer division result too large for a float\n"),
    ("ModelArgs(max_seq_len=10**30)", 2, "python -m bakery: max_seq_len = 1000000000000000000000"),
    ("ModelArgs(moe_inter_dim=-2**63)", 2, "python -m bakery: moe_inter_dim = -9223372036854775808 "
     "is not valid: it must be a number of 64 bits\n"),
    ("None", 0, ""),
    ("3", 3, ""),
])
def test_a_program_ends_with_one_line_and_a_status(body, status, err, capsys, monkeypatch):
    for name in ("matplotlib", "resource"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    code, out, told = end_of(body, capsys)
    assert code == status and out == ""
    assert told.startswith(err) and told.count("\n") == bool(err)


def test_torchs_own_error_without_a_compiler_is_known(capsys):
    def compiled():
        with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"),
                                           "force_disable_caches": True}):
            torch.compile(lambda x: (x + 1).sin())(torch.ones(3))

    with pytest.raises(SystemExit) as end:
        run_program("bakery", compiled)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "python -m bakery: torch.compile finds no C compiler, Python headers or Triton to compile "
        "with; install gcc and python3-dev, or use --compile false\n")


@pytest.mark.parametrize("body, error", [
    ("1 / 0", ZeroDivisionError), ("__import__('minids.nothing')", ModuleNotFoundError),
    ("raise_(RuntimeError('sizes differ'))", RuntimeError), ("{}['a']", KeyError)])
def test_a_bug_of_ours_keeps_its_traceback(body, error):
    with pytest.raises(error):
        run_program("bakery", lambda: eval(body, globals() | {"raise_": raise_}))


def test_a_terminal_that_is_not_utf_8_ends_no_run():
    program = ("from minids.base.command_line import run_program\n"
               "run_program('bakery', lambda: print('\\u00e9\\ud800'))")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                         env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (run.returncode, run.stdout, run.stderr) == (0, "\\xe9\\ud800\n", "")


def test_a_stopped_program_says_how_to_continue_and_ends_with_the_signals_status(capsys):
    status, out, err = end_of("raise_(Stopped(15, ['--out', 'my runs/x']))", capsys)
    assert (status, err) == (143, "")
    assert out == "stopped; continue with: python -m bakery --out 'my runs/x'\n"


RANK = """
import atexit, os
from minids.base.command_line import Stopped, run_program
atexit.register(os.abort)  # as a thread of torch's does that Python's end finds at work
def main():
    print("so far")
    BODY
run_program("minids.bake", main)
"""


@pytest.mark.parametrize("body, status", [
    ("raise ValueError('heat')", 2), ("raise Stopped(15, ['--resume'])", 143),
    ("raise KeyboardInterrupt", 130), ("raise SystemExit(2)", 2), ("return", 0)])
def test_a_rank_ends_with_its_own_status_though_torch_would_abort_it(body, status):
    run = subprocess.run([sys.executable, "-c", RANK.replace("BODY", body)], text=True,
                         capture_output=True, cwd=Path(__file__).resolve().parents[2],
                         env=os.environ | {"WORLD_SIZE": "2"})
    assert run.returncode == status and run.stdout.startswith("so far\n"), run.stderr


def write(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(bytes(200_000))


def write_by_name(path: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(200_000 * "x")


def save(path: Path) -> None:
    safetensors.torch.save_file(dict(a=torch.zeros(100_000)), path)


@pytest.mark.parametrize("fill", [write, write_by_name, save])
def test_a_full_disk_is_told_with_the_files_name(fill, tmp_path, capsys, small_files):
    path = tmp_path / "the\nfile"
    with pytest.raises(SystemExit) as end:
        run_program("bakery", lambda: fill(path))
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1
    assert told.startswith(f"python -m bakery: {tmp_path}/the file: ") and "File too large" in told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
@pytest.mark.parametrize("body, said", [
    ("0", "standard output: No space left on device"),
    ("raise_(ValueError('no flour'))", "no flour")])
def test_what_was_printed_last_finds_a_full_disk(body, said):
    program = ("from minids.base.command_line import run_program\n"
               "def raise_(error): raise error\n"
               "run_program('bakery', lambda: print('bread') or BODY)")
    with open("/dev/full", "w", encoding="utf-8") as full:
        run = subprocess.run([sys.executable, "-c", program.replace("BODY", body)], stdout=full,
                             stderr=subprocess.PIPE, encoding="utf-8",
                             env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr == f"python -m bakery: {said}\n"


def shelf(default: str) -> type:
    """Settings with a folder to write."""
    place = option(default, "where it goes", folder=True)
    return dataclass(type("Shelf", (), {"__annotations__": {"out": str}, "out": place}))


@pytest.mark.parametrize("wanted, why", [
    ("/proc/no/x", "a path that can be written; /proc: "),
    ("x" * 300, "a path that can be written; .* too long"),
    ("/dev/null/x", "a folder, and /dev/null is not one"), ("/dev/null", "a folder, and /dev/null"),
    ("gone", "a folder, and gone is not one"), ("gone/x", "a folder, and gone is not one")])
def test_a_folder_that_cannot_be_made_is_refused_before_work(wanted, why, tmp_path, monkeypatch):
    """Given or a default, also to root, who may write everywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    for default, given in (("", ["--out", wanted]), (wanted, [])):
        with pytest.raises(ValueError, match=f"^out = '{wanted}' is not valid: it must be {why}"):
            parse("bakery", "Bake.", shelf(default), argv=given)
    assert [path.name for path in tmp_path.iterdir()] == ["gone"]


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
    for wanted in (str(tmp_path), str(tmp_path / "a/b")):
        assert parse("bakery", "Bake.", shelf(""), argv=["--out", wanted]) == [dict(out=wanted)]
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_read_only_is_refused(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(ValueError, match=f"can be written; {tmp_path}: Permission denied"):
        parse("bakery", "Bake.", shelf(""), argv=["--out", str(tmp_path / "a/b")])


@pytest.mark.parametrize("words, found", [
    ([], ("auto", "none")), (["--compile", "--recompute"], ("true", "blocks")),
    (["--compile", "false", "--recompute=no"], ("false", "none")),
    (["--compile=auto", "--recompute", "selective"], ("auto", "selective")),
    (["--compile", "yes", "--recompute", "on"], ("true", "blocks"))], ids=str)
def test_a_switch_that_has_more_than_two_positions(words, found):
    """A bare flag, and a value as of the truth value that it once was."""
    [given] = parse("minids.train", "", TrainArgs, argv=words)
    args = TrainArgs(**given)
    assert (args.compile, args.recompute) == found


def test_a_stored_truth_value_is_read_as_a_choice():
    assert TrainArgs(compile=True, recompute=False).recompute == "none"
    assert TrainArgs(compile=True, recompute=True).compile == "true"
    with pytest.raises(ValueError, match="one of none, blocks, selective"):
        TrainArgs(recompute="some")
