"""The token cache: made once, read back equal, made again where damaged, never half."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from byte_tokens import TOKENIZER, ByteTokenizer
from filelock import FileLock

from minids.text import token_cache
from minids.text.corpora import Corpus
from minids.text.packing import encode_documents
from minids.text.token_cache import cached_tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus():
    texts = [f"text {i} " * (i % 9 + 1) for i in range(60)]
    return Corpus("made up", texts[:50], texts[50:], "f" * 64)


def test_cache_is_made_once_and_read_back(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 64)
    tokenizer = ByteTokenizer()
    tokens = cached_tokens(corpus, tokenizer, tmp_path, fim_rate=0.3, seed=5)
    expected = encode_documents(corpus.train, tokenizer, fim_rate=0.3, seed=5)
    assert np.array_equal(tokens["train"], expected)
    assert np.array_equal(tokens["valid"], encode_documents(corpus.valid, tokenizer))
    (folder,) = cache_folders(tmp_path)
    splits = json.loads((folder / "index.json").read_text())["splits"]
    assert [splits[name]["documents"] for name in ("train", "valid")] == [50, 10]
    encoded = tokenizer.encoded
    again = cached_tokens(corpus, tokenizer, tmp_path, fim_rate=0.3, seed=5)
    assert tokenizer.encoded == encoded
    assert np.array_equal(again["train"], expected)


def cache_folders(cache: Path) -> list[Path]:
    return sorted(p for p in cache.iterdir() if p.is_dir())


def test_cache_key_follows_everything_that_decides_the_bytes(corpus, tmp_path):
    def n_folders(*args, **kwargs):
        cached_tokens(*args, tmp_path, **kwargs)
        return len(cache_folders(tmp_path))

    other = Corpus("made up", corpus.train, corpus.valid, "e" * 64)
    assert n_folders(corpus, TOKENIZER) == 1
    assert n_folders(corpus, TOKENIZER, seed=1) == 1  # the seed matters to FIM only
    assert n_folders(corpus, ByteTokenizer("other")) == 2
    assert n_folders(other, TOKENIZER) == 3
    assert n_folders(corpus, TOKENIZER, fim_rate=0.1) == 4
    assert n_folders(corpus, TOKENIZER, fim_rate=0.1, seed=1) == 5
    assert n_folders(corpus, TOKENIZER) == 5


def test_wide_vocabulary_takes_four_bytes(corpus, tmp_path):
    narrow = cached_tokens(corpus, ByteTokenizer("narrow", vocab_size=2**16), tmp_path)
    assert narrow["train"].dtype == np.dtype("<u2")
    tokens = cached_tokens(corpus, ByteTokenizer(vocab_size=2**16 + 1), tmp_path)
    assert tokens["train"].dtype == np.dtype("<u4")
    assert np.array_equal(tokens["train"], encode_documents(corpus.train, TOKENIZER))


def damage_cut(folder):
    os.truncate(folder / "train.bin", 50)


def damage_flip(folder):
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[7] ^= 1
    (folder / "train.bin").write_bytes(raw)


def damage_lose(folder):
    (folder / "valid.bin").unlink()


def damage_index(folder):
    (folder / "index.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_lose, damage_index])
def test_damaged_cache_is_made_again(corpus, tmp_path, damage):
    good = cached_tokens(corpus, TOKENIZER, tmp_path)["train"].copy()  # damage reaches the map
    (folder,) = cache_folders(tmp_path)
    assert token_cache.is_whole(folder)
    damage(folder)
    assert not token_cache.is_whole(folder)
    assert np.array_equal(cached_tokens(corpus, TOKENIZER, tmp_path)["train"], good)


def test_an_empty_split_is_refused_and_leaves_nothing(corpus, tmp_path):
    with pytest.raises(ValueError, match="data has no document for valid"):
        cached_tokens(Corpus("made up", corpus.train, [], "f" * 64), TOKENIZER, tmp_path)
    assert cache_folders(tmp_path) == []


def test_failed_tokenisation_leaves_nothing(corpus, tmp_path):
    class Full(ByteTokenizer):
        def encode_batch(self, texts, threads):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cached_tokens(corpus, Full(), tmp_path)
    assert cache_folders(tmp_path) == []


KILLED = """
    import sys, time
    sys.path[:0] = {path!r}
    from byte_tokens import ByteTokenizer
    from pathlib import Path
    from minids.text import token_cache
    from minids.text.corpora import Corpus
    token_cache.BATCH_CHARACTERS = 50
    class Slow(ByteTokenizer):
        def encode_batch(self, texts, threads):
            print("batch", flush=True)
            time.sleep(0.05)
            return super().encode_batch(texts, threads)
    texts = [f"text {{i}} " * (i % 9 + 1) for i in range(2000)]
    corpus = Corpus("made up", texts[:50], texts[50:], "f" * 64)
    token_cache.cached_tokens(corpus, Slow(), Path({cache!r}))
"""


def test_what_a_killed_process_left_of_another_corpus_is_removed(corpus, tmp_path):
    """Unless somebody is making it at this moment."""
    for name in ("dead", "alive"):
        (tmp_path / f"{name}.tmp").mkdir()
        (tmp_path / f"{name}.tmp/train.bin").write_bytes(b"half")
    with FileLock(tmp_path / "alive.lock"):
        cached_tokens(corpus, ByteTokenizer(), tmp_path)
    assert not (tmp_path / "dead.tmp").exists() and (tmp_path / "alive.tmp/train.bin").exists()
    assert not (tmp_path / "dead.lock").exists()


def test_what_another_process_has_just_finished_is_no_error(tmp_path, monkeypatch):
    """It was there when the folder was listed, and has got its name since."""
    (tmp_path / "made.tmp").mkdir()

    @contextlib.contextmanager
    def holding(lock, timeout):
        (tmp_path / "made.tmp").rename(tmp_path / "made")
        yield

    monkeypatch.setattr(token_cache, "holding", holding)
    token_cache.remove_unfinished(tmp_path)
    assert (tmp_path / "made").is_dir()


def torn_after_one(error: Exception) -> Iterator[str]:
    yield "the first document"
    raise error


@pytest.mark.parametrize("name", ["none", "torn", "gone"])
def test_a_corpus_that_cannot_be_read_leaves_nothing(name, tmp_path):
    train = {"none": [], "torn": torn_after_one(ValueError("line 2 is not JSON")),
             "gone": torn_after_one(FileNotFoundError(2, "No such file", "a.txt"))}[name]
    with pytest.raises((ValueError, OSError)):
        cached_tokens(Corpus("made up", train, ["text"], "f" * 64), ByteTokenizer(),
                      tmp_path / "data/cache")
    assert list(tmp_path.iterdir()) == []


def test_kill_while_tokenising_leaves_no_usable_half(corpus, tmp_path):
    path = [str(ROOT), str(ROOT / "tests")]
    script = textwrap.dedent(KILLED.format(path=path, cache=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (half,) = cache_folders(tmp_path)
    assert half.suffix == ".tmp" and list(half.iterdir())
    # Wrong: had the folder had its final name, the missing index would still refuse it.
    assert not token_cache.is_whole(half)
    tokens = cached_tokens(corpus, TOKENIZER, tmp_path)  # the dead owner's lock is free
    assert np.array_equal(tokens["train"], encode_documents(corpus.train, TOKENIZER))
    assert [p.suffix for p in cache_folders(tmp_path)] == [""]
