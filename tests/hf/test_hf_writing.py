"""Folders are written in shards, in little memory, whole or not at all."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_folders import (
    CLEAN,
    V2,
    V32,
    all_equal,
    folder_of,
    from_pretrained,
)
from safetensors.torch import load_file
from small_models import LITTLE, scrambled

from minids import hf
from minids.hf import config_from_args, load_hf, save_hf
from minids.hf.names import CONFIG, INDEX, WEIGHTS
from minids.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")



def test_shards_are_below_the_limit_and_the_index_says_where_all_is(tmp_path):
    folder, limit = folder_of(LITTLE, tmp_path / "out", shard_bytes=20_000), 20_000
    index = json.loads((folder / INDEX).read_text())
    files = sorted(folder.glob("model-*"))
    held = {file.name: load_file(file) for file in files}
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= limit and sum(sizes) == index["metadata"]["total_size"]
    assert index["weight_map"] == {name: file for file in held for name in held[file]} | {}
    assert not (folder / WEIGHTS).exists()
    assert all_equal(load_hf(folder).state_dict(),
                     scrambled(LITTLE, dtype=torch.float32).state_dict())
    assert from_pretrained(folder)[1] == CLEAN


MEASURE = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from safetensors.torch import load_file
from minids import hf
from minids import ModelArgs, Transformer

args = ModelArgs(vocab_size=1024, dim=512, inter_dim=512, moe_inter_dim=512, n_layers=2, n_heads=2,
                 n_dense_layers=0, n_routed_experts=16, n_mtp_layers=0)
folder, mb = {folder!r}, 2 ** 20

def status(field):
    [line] = [line for line in open("/proc/self/status") if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024

def growth(function, prepare=lambda: None):
    \"\"\"MiB by which a fresh process that runs it grows at most, after preparing.\"\"\"
    read, write = os.pipe()
    if os.fork() == 0:
        hf.save_hf(Transformer(ModelArgs.preset("nano")), folder + "-small", overwrite=True)
        hf.load_hf(folder + "-small")  # the code of both directions is in memory now
        prepared = prepare()
        before = status("VmRSS")
        kept = function(prepared)
        os.write(write, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    found = int(os.read(read, 100))
    os.wait()
    return found / mb

def made():
    model = hf.names.skeleton(args).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model

def load_all(_):
    held = load_file(folder + "/model.safetensors")
    return hf.load_hf(folder), {{name: tensor.clone() for name, tensor in held.items()}}

def load_mapped(_):
    \"\"\"The file stays open while its tensors are read.\"\"\"
    with hf.reading.safe_open(folder + "/model.safetensors", "pt") as stream:
        hf.reading.stored = lambda header: stream.get_tensor(header.name)
        return hf.load_hf(folder)

def save(shard_bytes):
    return lambda model: hf.save_hf(model, folder, overwrite=True, shard_bytes=shard_bytes)

shapes = hf.names.skeleton(args).state_dict().values()
grown = dict(size=sum(4 * t.numel() for t in shapes) / mb, save=growth(save(8 * mb), made),
             save_whole=growth(save(10**9), made), load=growth(lambda _: hf.load_hf(folder)),
             mapped=growth(load_mapped), all=growth(load_all))
print(json.dumps(grown))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
def test_memory_stays_below_the_model_and_a_tensor(tmp_path):
    tests = Path(__file__).resolve().parents[1]
    source = MEASURE.format(root=str(tests.parent), tests=str(tests), folder=str(tmp_path / "m"))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    largest, other = 2, 6  # MiB: the embedding; what else a process needs
    assert 90 < grown["size"] < 130
    assert grown["load"] < grown["size"] + largest + other, grown
    assert grown["mapped"] > 1.5 * grown["size"] and grown["all"] > 1.5 * grown["size"], grown
    # A shard of 8, and what the allocator does not give back between two; all at once is the model.
    assert grown["save"] < 8 + 2 * other < grown["size"] - other < grown["save_whole"], grown


def test_a_bad_argument_of_save_is_named(tmp_path):
    model = scrambled(LITTLE)
    with pytest.raises(ValueError, match="quantize = 'fp4' is not valid"):
        save_hf(model, tmp_path / "out", quantize="fp4")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is not valid: it is a file"):
        save_hf(model, tmp_path / "file", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_shared_experts_are_an_empty_layer():
    args = replace(LITTLE, n_shared_experts=0)
    model = scrambled(args)
    added = {name: tuple(tensor.shape) for name, tensor in hf.writing.complete(model).items()
             if name not in model.state_dict()}
    experts = "ffn.shared_experts.{}.weight"
    shapes = {"w1": (0, args.dim), "w2": (args.dim, 0), "w3": (0, args.dim)}
    assert added == {f"{block}.{experts.format(part)}": shape for part, shape in shapes.items()
                     for block in ("layers.1", "mtp.0.block")}


def test_begin_and_end_are_the_given_tokenizers(tmp_path):
    model, tokenizer = scrambled(replace(LITTLE, vocab_size=300)), Tokenizer.open("bytes")

    def ends(given) -> tuple:
        config = hf.writing.saved_config(model, None, given, None)
        return config["bos_token_id"], config["eos_token_id"]

    assert ends(None) == (None, None)  # absent, transformers would assume V3's
    assert ends(tokenizer) == (tokenizer.bos_id, tokenizer.eos_id) != (None, None)
    for stored, found in ((dict(bos_token_id=7, eos_token_id=9, pad_token_id=4), (7, 9)),
                          (dict(eos_token_id=[9, 8]), (None, [9, 8]))):
        (tmp_path / CONFIG).write_text(json.dumps(stored))
        assert ends(tmp_path) == found
        assert "pad_token_id" not in hf.writing.saved_config(model, None, tmp_path, None)


def test_other_files_are_never_lost(tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out", shard_bytes=60_000)
    (folder / "README.md").write_text("mine")
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "a.txt").write_text("mine too")
    (folder / "link").symlink_to("notes")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="it holds files already"):
        folder_of(V2, folder)
    assert sorted(p.name for p in folder.iterdir()) == before
    folder_of(replace(V2, n_mtp_layers=0), folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", CONFIG, "link", WEIGHTS, "notes"]
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "link" / "deep" / "a.txt").read_text() == "mine too"
    assert load_hf(folder).args == replace(V2, n_mtp_layers=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken_and_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    folder_of(LITTLE, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_hf(tmp_path / "real").args == LITTLE


def test_a_folder_that_looks_put_aside_is_never_removed(tmp_path):
    folder_of(LITTLE, tmp_path / "out")
    mine = folder_of(V2, tmp_path / "out.replaced")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match="out.replaced is in the way|holds files"):
            folder_of(V32, tmp_path / "out", overwrite=overwrite)
    assert load_hf(mine).args == V2 and load_hf(tmp_path / "out").args == LITTLE


def save_in_place(model, folder: Path) -> None:
    """The wrong variant."""
    hf.writing.write_weights(model, folder, None, 60_000, None)
    (folder / CONFIG).write_text(json.dumps(config_from_args(model.args)))


def save_over(model, folder: Path) -> None:
    save_hf(model, folder, overwrite=True, shard_bytes=150_000)  # two shards, and fewer calls


CALLS = [(os, "rename"), (os, "fsync"), (os, "link"), (shutil, "rmtree"),
         (hf.writing, "save_tensors"), (Path, "write_text"), (Path, "mkdir")]


def stopped(save, folder: Path, stop_at: int, killed: bool) -> bool:
    """Run a save that stops before its call number `stop_at`; whether it came that far.

    killed: the process ends there and cleans up nothing; else the call raises
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    counter, once = iter(range(10**6)), []
    def stopping(function):
        def call(*args, **kwargs):
            if next(counter) == stop_at and not once:
                once.append(True)
                if killed:
                    os._exit(9)
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        return call
    for module, name in CALLS:
        setattr(module, name, stopping(getattr(module, name)))
    status = 1
    with contextlib.suppress(BaseException):
        try:
            save(scrambled(V2, dtype=torch.float32), folder)
            status = 0
        except KeyboardInterrupt:
            status = 9
    os._exit(status)


def torn(save, folder: Path, killed: bool) -> list[str]:
    """Stop a save that replaces a V3 by a V2 before each of its calls; what a reader then misses.

    Read is the old model or the new one, whole, with the other file; and a save of the next minute
    works, and leaves nothing else.
    """
    both = {args.score_func: scrambled(args, dtype=torch.float32).state_dict()
            for args in (LITTLE, V2)}
    lost, seen, start = [], set(), folder.with_name("start")
    folder_of(LITTLE, start)
    (start / "README.md").write_text("mine")
    for stop_at in range(80):
        for left in folder.parent.iterdir():
            if left != start:
                shutil.rmtree(left)
        shutil.copytree(start, folder)
        if not stopped(save, folder, stop_at, killed):
            assert seen == {"sigmoid", "softmax"} or save is save_in_place
            return lost
        try:
            found = load_hf(folder)
            seen.add(found.args.score_func)
            whole = all_equal(found.state_dict(), both[found.args.score_func])
            readme = (hf.reading.checked_folder(folder) / "README.md").read_text()
            if not whole or readme != "mine":
                lost.append(f"call {stop_at}: not whole")
            if hf.reading.aside_of(folder).exists() and not killed:
                lost.append(f"call {stop_at}: {hf.reading.aside_of(folder)} is left behind")
            save_over(scrambled(V2, dtype=torch.float32), folder)
            assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, "start"]
            if (folder / "README.md").read_text() != "mine":
                lost.append(f"call {stop_at}: the next save loses the other file")
        except ValueError as error:
            lost.append(f"call {stop_at}: {error}")
    raise AssertionError("the save did not end within 80 calls")


@pytest.mark.parametrize("killed", [
    pytest.param(True, id="killed"),
    pytest.param(False, id="interrupted", marks=pytest.mark.slow)])
def test_an_interrupted_save_leaves_the_old_folder_or_the_new(killed, tmp_path):
    assert torn(save_over, tmp_path / "out", killed) == []


def test_the_check_notices_a_save_in_place(tmp_path):
    assert torn(save_in_place, tmp_path / "out", killed=True)


def test_a_disk_that_refuses_leaves_the_old_folder(tmp_path):
    folder = folder_of(LITTLE, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written, and nothing there was changed"):
            save_over(scrambled(V2), folder)
        with pytest.raises(OSError, match="could not be written"):
            folder_of(V2, tmp_path / "new/folder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_hf(folder).args == LITTLE and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(os.fstat(handle).st_ino),
                                                     fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    def unflushed() -> set[str]:
        order.clear()
        folder = folder_of(LITTLE, tmp_path / f"out{len(list(tmp_path.iterdir()))}",
                           shard_bytes=60_000)
        last = len(order) - order[::-1].index("rename")
        return {path.name for path in (folder, *folder.iterdir())
                if path.stat().st_ino not in order[:last]}
    assert unflushed() == set()
    monkeypatch.setattr(hf.writing, "flush", lambda path: None)  # wrong
    assert any(name.endswith(".safetensors") for name in unflushed())
