"""A tokenizer's training: the same merges each time, from as much text as is asked for."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizer_checks import COMMITTED, LIBRARY, TEXTS

import minids.tokenizer as program
from minids.base.command_line import run_program
from minids.text import tokenizer as module
from minids.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import sys
from pathlib import Path
from minids.tokenizer import Tokenizer
Tokenizer.train([Path(path).read_text("utf-8") for path in sys.argv[2:]], 2048).save(sys.argv[1])
"""


@pytest.mark.slow
def test_order_threads_and_hash_seed_change_no_merge(tmp_path):
    """Rare pairs of a small text often tie, so an unstable order would show."""
    paths = sorted(LIBRARY.glob("a*.py"))
    here = Tokenizer.train([path.read_text("utf-8") for path in paths], 2048)
    env = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", TRAIN, tmp_path, *reversed(paths)], check=True, env=env)
    there = Tokenizer.load(tmp_path)
    assert here.n_tokens == 2048 and list(here.ranks.items()) == list(there.ranks.items())


def test_training_twice_gives_equal_files(small, tmp_path):
    again = Tokenizer.train(iter(TEXTS), 512, corpus="three files")
    for name, tokenizer in (("one", small), ("two", again)):
        tokenizer.save(tmp_path / name)
    for file in (module.RANKS, module.META):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    other = Tokenizer.train(TEXTS[:-1], 512, corpus="three files")  # wrong variant: another text
    assert other.made["sha256"] != small.made["sha256"] and other.ranks != small.ranks


def test_merges_follow_frequency_and_never_cross_a_cut():
    t = Tokenizer.train(["ab ab ab xy\nxy"], 300)  # ab 3 times, then a tie: xy and " ab" twice
    assert [piece for piece, token in t.ranks.items() if token >= 280] == [b"ab", b"xy", b" ab"]
    rare = Tokenizer.train(["once"], 4096)
    assert rare.n_tokens == 280  # a pair seen once is never merged
    assert not any(piece.isdigit() and len(piece) > 3 for piece in COMMITTED.ranks)


def test_a_lone_surrogate_does_not_stop_the_training():
    assert Tokenizer.train(["ab\ud800ab"], 300).n_tokens == 281


@pytest.mark.parametrize("size", [-1, 0, 256, 279])
def test_a_vocabulary_too_small_is_refused(size):
    with pytest.raises(ValueError, match=f"^vocab_size = {size} .* at least 280 "):
        Tokenizer.train(TEXTS, size)


@pytest.mark.parametrize("size", [280, 320, 321])
def test_the_rows_are_a_multiple_of_64(size):
    t = Tokenizer.train(TEXTS, size)
    assert t.n_tokens == size and t.vocab_size % 64 == 0 and 0 <= t.vocab_size - size < 64


SHORT = ["def a():\n", "é = 1", "not read"]  # few tokens, so that one byte more or less shows


@dataclasses.dataclass
class FakeCorpus:
    train: list
    valid: list


def test_the_command_builds_and_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("minids.tokenizer.open_corpus",
                        lambda name: FakeCorpus(TEXTS[2:], SHORT))
    size = len("".join(SHORT[:2]).encode())  # the text that exceeds the limit is the last
    args = program.TokenizerArgs(vocab_size=400, out=str(tmp_path / "t"), max_bytes=size - 1)
    built = program.build(args)
    assert Tokenizer.load(tmp_path / "t").fingerprint == built.fingerprint
    expected = size / sum(len(built.encode(text)) for text in SHORT[:2])
    assert f"validation text: {expected:.3f} bytes per token" in capsys.readouterr().out


def test_a_stream_is_read_no_further_than_asked():
    endless = iter(lambda: "abcd", "")
    assert list(program.first_bytes(endless, 10)) == ["abcd"] * 3
    assert list(program.first_bytes(endless, 8)) == ["abcd"] * 3  # the one that exceeds, too
    assert list(program.first_bytes(["a", "b"], 10)) == ["a", "b"]


@pytest.mark.parametrize("flags, named", [
    (["--vocab-size", "100"], "vocab_size = 100"),
    (["--out", str(ROOT / "minids"), "--data", "nosuch"], "out = "),
    (["--vocab"], "--vocab-size"), (["--data", "nosuch"], "nosuch"), (["--max-bytes", "0"], "0")])
def test_the_command_refuses_in_one_line(monkeypatch, capsys, tmp_path, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tokenizer", *flags])
    with pytest.raises(SystemExit) as done:
        run_program("minids.tokenizer", program.main)
    error = capsys.readouterr().err
    assert done.value.code == 2 and named in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []
