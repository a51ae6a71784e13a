"""Text to batches: nothing lost, nothing repeated, nothing leaked, and every position resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import serve

from minids.text import data as data_module
from minids.text.data import (
    Corpus,
    PackedLoader,
    StreamLoader,
    Tokens,
    cached_tokens,
    encode_documents,
    library_files,
    open_corpus,
    open_data,
    pieces,
    token_dtype,
)

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = 8


class ByteTokenizer:
    """Each UTF-8 byte is a token, after eight reserved ids."""

    bos_id, eos_id, fim_begin_id, fim_hole_id, fim_end_id = range(5)

    def __init__(self, fingerprint: str = "bytes", vocab_size: int = 264):
        self.fingerprint, self.vocab_size = fingerprint, vocab_size
        self.n_bytes = torch.tensor([0] * SPECIAL + [1] * 256)
        self.encoded = 0

    def encode(self, text: str) -> list[int]:
        return [SPECIAL + b for b in text.encode()]

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        self.encoded += len(texts)
        return [self.encode(t) for t in texts]


TOKENIZER = ByteTokenizer()


def decode(ids) -> str:
    return bytes(int(i) - SPECIAL for i in ids).decode()


def split_documents(ids) -> list[list[int]]:
    """The documents of a row of tokens; asserts that each stands between BOS and EOS."""
    documents, current = [], None
    for token in map(int, ids):
        if token == TOKENIZER.bos_id:
            assert current is None, "a document begins inside another"
            current = []
        elif token == TOKENIZER.eos_id:
            documents.append(current)
            current = None
        else:
            current.append(token)  # fails on None: a token outside every document
    assert current is None, "the last document has no end"
    return documents


def fails(check, *args) -> bool:
    """Whether a check catches its wrong variant."""
    try:
        check(*args)
    except (AssertionError, AttributeError):
        return True
    return False


def write_rows(path: Path, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)


def counting(n: int, parts: int = 3) -> Tokens:
    """The tokens 0 .. n-1 in several arrays, so that each one tells its place."""
    return Tokens(np.array_split(np.arange(n, dtype="<u2"), parts))


def test_library_is_filtered_and_split_by_path():
    corpus, again = open_corpus("pystdlib"), open_corpus("pystdlib")
    assert corpus.train == again.train and corpus.fingerprint == again.fingerprint
    everything = corpus.train + corpus.valid
    assert not set(corpus.train) & set(corpus.valid)
    assert len(set(everything)) == len(everything)
    assert not any("\r\n" in text or len(text.encode()) < 256 for text in everything)
    # 7.6 to 8.1 MB in CPython 3.10 to 3.13; some distributions ship less
    assert 4e6 < sum(map(len, everything)) < 12e6
    assert 0.02 < len(corpus.valid) / len(everything) < 0.10


def test_library_filter_on_a_made_up_library(tmp_path):
    body = "x = 1  # " + "long enough to be kept " * 12
    files = {"a.py": body + "a", "b/c.py": body + "c\r\n", "b/test/d.py": body + "d",
             "tests/e.py": body + "e", "short.py": "x = 1", "z_copy.py": body + "a",
             "encodings/cp037.py": body + "f", "encodings/aliases.py": body + "g",
             "_sysconfigdata_x.py": body + "h", "site-packages/i.py": body + "i",
             "pydoc_data/topics.py": body + "j", "note.txt": body + "k"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "latin.py").write_bytes(("é" + body).encode("latin-1"))
    found = dict(library_files(tmp_path))
    assert list(found) == ["a.py", "b/c.py", "encodings/aliases.py"]
    assert found["b/c.py"] == body + "c\n"


@pytest.fixture
def folder(tmp_path):
    """Text in every format: 60 documents, some twice."""
    root = tmp_path / "texts"
    for i in range(20):
        (root / "deep").mkdir(parents=True, exist_ok=True)
        (root / "deep" / f"{i:02d}{('.txt', '.md', '.py')[i % 3]}").write_text(f"file {i}\n" * 3)
    rows = [json.dumps({"id": i, "content": f"line {i} é"}) for i in [*range(20), 3, 4]]
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n")
    write_rows(root / "table.parquet", id=list(range(20)), body=[f"row {i}" for i in range(20)])
    (root / "ignored.bin").write_bytes(b"\0\1")
    (root / ".hidden.txt").write_text("hidden")
    return root


def check_disjoint(train, valid):
    assert not set(train) & set(valid)


def test_text_folder_reads_every_format_and_splits_by_hash(folder):
    corpus = open_corpus(f"text:{folder}")
    train, valid = list(corpus.train), list(corpus.valid)
    assert len(train) + len(valid) == 62 and valid
    check_disjoint(train, valid)
    assert list(corpus.train) == train  # a second reading
    assert {"line 3 é", "row 7", "file 2\n" * 3} <= set(train + valid)
    # Wrong: every twentieth document by its number puts the two copies on different sides.
    everything = ["twin", *map(str, range(18)), "twin"]
    assert fails(check_disjoint, everything[:19], everything[19:])


def test_text_follows_content_not_place(folder, tmp_path):
    before = open_corpus(f"text:{folder}").fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert open_corpus(f"text:{tmp_path / 'copy'}").fingerprint == before
    (folder / "deep" / "00.txt").write_text("changed")
    assert open_corpus(f"text:{folder}").fingerprint != before


def test_text_glob_and_files_left_out(folder):
    def text():
        return "".join([*corpus.train, *corpus.valid])

    corpus = open_corpus(f"text:{folder}/**/*.txt")
    assert text() == "".join(f"file {i}\n" * 3 for i in range(0, 20, 3)) and corpus.note == ""
    (folder / "empty.txt").write_text("\n")
    corpus = open_corpus(f"text:{folder}/**/*.txt")
    assert text().count("file") == 21
    assert "1 of 8 files" in corpus.note and "empty.txt" in corpus.note


def test_single_document_keeps_its_last_part_for_validation(tmp_path):
    text = "".join(f"line {i}\n" for i in range(400))
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    corpus = open_corpus(f"text:{tmp_path / 'one.txt'}")
    (train,), (valid,) = corpus.train, corpus.valid
    assert train + valid == text and train.endswith("\n")
    assert 0.04 < len(valid) / len(text) < 0.07  # 5 %, moved to the end of a line


def test_several_documents_none_held_out(tmp_path):
    texts = [name * 200 for name in "abc"]
    assert not any(data_module.held_out(t.encode()) for t in texts)
    for text in texts:
        (tmp_path / f"{text[0]}.txt").write_text(text)
    corpus = open_corpus(f"text:{tmp_path}")
    assert corpus.train == [texts[0], texts[1], "c" * 170] and corpus.valid == ["c" * 30]


BAD_FILES = {
    "empty.txt": b"", "blank.md": b" \n\n", "binary.txt": b"ab\0cd", "latin.py": b"caf\xe9 \n",
    "cut.txt": "é".encode()[:1], "bad.jsonl": b'{"text": "a"}\n{"text": \n',
    "list.jsonl": b"[1]\n", "columns.jsonl": b'{"title": "a", "body": "b", "n": 1}\n',
    "later.jsonl": b'{"text": "a"}\n{"body": "b"}\n', "bad.parquet": b"not parquet",
    "data.csv": b"a,b\n", "one.txt": b"x",
}
BAD_SPECS = {
    "": "valid are pystdlib", "pystdlb": "did you mean 'pystdlib'", "text:": "valid are",
    "txt:a": "did you mean 'text:PATH'", "hf:": "valid are",
    "HERE": "did you mean 'text:HERE'", "text:HERE/none.txt": "did you mean 'one.txt'",
    "text:HERE/nowhere/x": "there is no file or folder", "text:HERE/*.rst": "matches no text",
    "text:HERE/hollow": "the folder holds no text; valid are .txt .md .py .jsonl .parquet",
    "text:HERE/empty.txt": "is empty", "text:HERE/blank.md": "is empty",
    "text:HERE/binary.txt": "is binary", "text:HERE/latin.py": "is binary or not UTF-8",
    "text:HERE/cut.txt": "cut short", "text:HERE/bad.jsonl": "bad.jsonl line 2 is not JSON",
    "text:HERE/list.jsonl": "must be a JSON object",
    "text:HERE/columns.jsonl": "its columns are title, body, n (not text)",
    "text:HERE/later.jsonl": "line 2 has no 'text', only ['body']",
    "text:HERE/bad.parquet": "not a parquet file", "text:HERE/two.parquet": "columns are a, b, n",
    "text:HERE/data.csv": "a file .csv is not read", "text:HERE/one.txt": "too short",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_input_is_one_line_that_says_what_would_work(spec, tmp_path):
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "hollow").mkdir()
    write_rows(tmp_path / "two.parquet", a=["x"], b=["y"], n=[1])
    with pytest.raises(ValueError) as error:
        open_corpus(spec.replace("HERE", str(tmp_path)))
    message = str(error.value)
    assert BAD_SPECS[spec].replace("HERE", str(tmp_path)) in message and "\n" not in message


def test_bad_settings(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 20)
    for settings_, reason in [(dict(seq_len=5000), "seq_len = 5000 is longer than the text"),
                              (dict(seq_len=0), "seq_len = 0"),
                              (dict(seq_len=8, fim_rate=1.5), "fim_rate = 1.5")]:
        with pytest.raises(ValueError, match=reason):
            open_data(f"text:{tmp_path}", TOKENIZER, cache=tmp_path / "cache", **settings_)


TEXTS = ["first document\n", "zwei, é and 語\n", "x", "def f():\n    return 1\n" * 3]


def check_packing(ids):
    assert [decode(d) for d in split_documents(ids)] == TEXTS


def test_documents_stand_between_bos_and_eos():
    ids = encode_documents(TEXTS, TOKENIZER)
    check_packing(ids)
    # Wrong: without EOS, without BOS, a token lost.
    for wrong in (ids[ids != TOKENIZER.eos_id], ids[ids != TOKENIZER.bos_id], np.delete(ids, 3)):
        assert fails(check_packing, wrong)


@given(st.text(alphabet="ab\n é"), st.integers(1, 9))
def test_pieces_are_the_text(text, longest):
    parts = list(pieces(text, longest))
    assert "".join(parts) == text and all(0 < len(p) <= longest for p in parts)


def reassemble(document: list[int]) -> str:
    """A document from its tokens in PSM order: begin prefix hole suffix end middle."""
    t = TOKENIZER
    if t.fim_begin_id not in document:
        return decode(document)
    assert document[0] == t.fim_begin_id
    hole, end = document.index(t.fim_hole_id), document.index(t.fim_end_id)
    assert hole < end
    return decode(document[1:hole]) + decode(document[end + 1:]) + decode(document[hole + 1:end])


def check_fim(ids, texts):
    assert [reassemble(d) for d in split_documents(ids)] == texts


def test_fim_reassembles_to_the_document():
    texts = [f"document {i} é\nwith text" for i in range(200)]
    ids = encode_documents(texts, TOKENIZER, fim_rate=0.5, seed=3)
    check_fim(ids, texts)
    assert np.array_equal(ids, encode_documents(texts, TOKENIZER, fim_rate=0.5, seed=3))
    assert not np.array_equal(ids, encode_documents(texts, TOKENIZER, fim_rate=0.5, seed=4))
    # A document's cut depends on its number, not on the batch that it came in.
    halves = [encode_documents(texts[a:b], TOKENIZER, a, 0.5, 3) for a, b in ((0, 77), (77, 200))]
    assert np.array_equal(ids, np.concatenate(halves))
    # Wrong: suffix before prefix (hole and begin exchanged); the end marker lost.
    swap = {TOKENIZER.fim_begin_id: TOKENIZER.fim_hole_id,
            TOKENIZER.fim_hole_id: TOKENIZER.fim_begin_id}
    assert fails(check_fim, [swap.get(i, i) for i in ids.tolist()], texts)
    with pytest.raises(ValueError):
        check_fim(ids[ids != TOKENIZER.fim_end_id], texts)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_fim_rate(rate):
    def check(count):
        # five standard deviations of a binomial count: one failure in two million seeds
        assert abs(count - rate * n) <= 5 * (rate * (1 - rate) * n) ** 0.5

    n = 2000
    ids = encode_documents(["some text"] * n, TOKENIZER, fim_rate=rate)
    check(int((ids == TOKENIZER.fim_begin_id).sum()))
    assert fails(check, int((rate + 0.1) * n))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_tokens_read_across_arrays_and_round_the_end(lengths, draw):
    n = sum(lengths)
    tokens = Tokens(np.split(np.arange(n), np.cumsum(lengths)[:-1]))
    start, count = draw.draw(st.integers(0, n - 1)), draw.draw(st.integers(0, 2 * n))
    assert tokens.read(start, count).tolist() == [(start + i) % n for i in range(count)]


def check_epoch(batches, n: int, seq_len: int):
    """One epoch holds every token at most once, and all but n % seq_len of them."""
    seen = torch.cat([tokens for tokens, _ in batches]).flatten().tolist()
    assert len(seen) == n // seq_len * seq_len
    assert len(set(seen)) == len(seen)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 300), st.integers(1, 19), st.integers(0, 5))
def test_epoch_has_every_sequence_once(n, seq_len, seed):
    loader = PackedLoader(counting(n), seq_len, seed)
    for _ in range(2):
        check_epoch([loader.next_batch(1) for _ in range(n // seq_len)], n, seq_len)


def test_check_epoch_catches_sampling_with_replacement():
    n, seq_len = 100, 10
    rng = np.random.default_rng(0)
    starts = rng.integers(0, n - seq_len, size=n // seq_len)
    drawn = [(torch.arange(s, s + seq_len), None) for s in starts]
    assert fails(check_epoch, drawn, n, seq_len)


def check_targets(tokens, targets, n: int):
    assert torch.equal(targets, (tokens + 1) % n)


def test_targets_are_one_token_ahead():
    loader = PackedLoader(counting(97), 8)
    for _ in range(30):
        tokens, targets = loader.next_batch(3)
        assert tokens.shape == targets.shape == (3, 8)
        assert tokens.dtype == targets.dtype == torch.int64
        check_targets(tokens, targets, 97)
    assert fails(check_targets, tokens, (tokens + 2) % 97, 97)
    assert fails(check_targets, tokens, tokens, 97)


def take(loader, sizes) -> list[torch.Tensor]:
    return [torch.stack(loader.next_batch(size)) for size in sizes]


def equal(one, two) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def test_seed_decides_the_order_and_epochs_differ():
    def rows(seed):
        return take(PackedLoader(counting(200), 9, seed), [22, 22])

    assert equal(rows(1), rows(1)) and not equal(rows(1), rows(2))
    first, second = rows(1)
    cuts = [set(epoch[0, :, 0].remainder(200).tolist()) for epoch in (first, second)]
    assert cuts[0] != cuts[1]  # another offset cuts elsewhere, not only in another order


class ListStream:
    """Documents of a list, with the interface of HubDocuments."""

    def __init__(self, texts):
        self.texts, self.place = texts, 0

    def read_from(self, state):
        self.place = state["place"] if state else 0
        while self.place < len(self.texts):
            self.place += 1
            yield self.texts[self.place - 1]

    def state_dict(self):
        return {"place": self.place}


STREAM_TEXTS = [f"<{i}> " + "abc"[i % 3] * (i % 17) for i in range(150)]


def packed_loader(seed=0, **place):
    return PackedLoader(counting(230), 7, seed, **place)


def stream_loader(seed=0, **place):
    return StreamLoader(ListStream(STREAM_TEXTS), TOKENIZER, 7, seed, fim_rate=0.3, **place)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(data_module, "SHUFFLE_BLOCK", 40)
    monkeypatch.setattr(data_module, "STREAM_DOCUMENTS", 6)


RAMP = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]  # 231 sequences: seven epochs packed, one streamed


@pytest.mark.parametrize("make", [packed_loader, stream_loader])
@pytest.mark.parametrize("done", range(len(RAMP)))
def test_resume_gives_the_same_batches(make, done, small_blocks):
    whole = take(make(), RAMP)

    def check(state_of):
        loader, resumed = make(), make()
        assert equal(take(loader, RAMP[:done]), whole[:done])
        resumed.load_state_dict(json.loads(json.dumps(state_of(loader))))
        assert equal(take(resumed, RAMP[done:]), whole[done:])

    check(lambda loader: loader.state_dict())
    if done:
        # Wrong: a state that has lost one of its parts.
        parts = {"position"} if make is packed_loader else {"leftover", "taken"}
        for part in parts & set(make().state_dict()):
            if loader_has(make, done, part):
                blank = [] if part == "leftover" else 0
                assert fails(check, lambda loader, p=part, b=blank: {**loader.state_dict(), p: b})


def loader_has(make, done: int, part: str) -> bool:
    """Whether that part of the state is not blank at this point."""
    loader = make()
    take(loader, RAMP[:done])
    return bool(loader.state_dict()[part])


def test_resume_refuses_another_text_or_setting(small_blocks):
    state = PackedLoader(counting(99), 7, 0, identity={"data": "a"}).state_dict()
    for other, name in [(PackedLoader(counting(99), 8, 0, identity={"data": "a"}), "seq_len"),
                        (PackedLoader(counting(99), 7, 1, identity={"data": "a"}), "seed"),
                        (PackedLoader(counting(99), 7, 0, identity={"data": "b"}), "data"),
                        (stream_loader(), "kind")]:
        with pytest.raises(ValueError, match=f"^{name} = "):
            other.load_state_dict(state)


@pytest.mark.parametrize("make", [packed_loader, stream_loader])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_batch_of_one(make, world, small_blocks):
    def check(ranks):
        single = make()
        for size in (2, 5, 9, 16, 16):
            parts = [rank.next_batch(size)[0] for rank in ranks]
            assert torch.equal(torch.cat(parts), single.next_batch(size * world)[0])

    check([make(rank=r, world=world) for r in range(world)])
    # Wrong: every rank believes it is the first.
    if world > 1:
        assert fails(check, [make(rank=0, world=world) for _ in range(world)])


def test_stream_loses_and_repeats_nothing(small_blocks):
    loader = stream_loader()
    length = len(encode_documents(STREAM_TEXTS, TOKENIZER))
    row = torch.cat([loader.next_batch(10)[0].flatten() for _ in range(2 * length // 70 + 20)])
    ends = [0, *(np.flatnonzero(row == TOKENIZER.eos_id) + 1)]
    first, second = (row[ends[a]:ends[a + 150]] for a in (0, 150))

    def order(ids):
        return [reassemble(d) for d in split_documents(ids)]

    def check(ids):
        assert sorted(order(ids)) == sorted(STREAM_TEXTS)

    check(first)
    check(second)
    assert order(first) != STREAM_TEXTS and order(second) not in (STREAM_TEXTS, order(first))
    assert fails(check, torch.cat([row[ends[1]:ends[150]], row[ends[1]:ends[2]]]))


def test_stream_seed_and_targets(small_blocks):
    assert equal(take(stream_loader(1), RAMP), take(stream_loader(1), RAMP))
    assert not equal(take(stream_loader(1), RAMP), take(stream_loader(2), RAMP))
    tokens, targets = stream_loader().next_batch(50)
    tokens, targets = tokens.flatten(), targets.flatten()
    assert torch.equal(tokens[1:], targets[:-1]) and not torch.equal(tokens[2:], targets[:-2])


def test_empty_stream_is_refused():
    with pytest.raises(ValueError, match="no document left to train on"):
        StreamLoader(ListStream([]), TOKENIZER, 4).next_batch(1)


def read_all(tokens: Tokens) -> np.ndarray:
    return tokens.read(0, len(tokens))


@pytest.fixture
def corpus():
    texts = [f"text {i} " * (i % 9 + 1) for i in range(60)]
    return Corpus("made up", texts[:50], texts[50:], "f" * 64)


def test_cache_is_made_once_and_read_back(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "SHARD_TOKENS", 100)
    monkeypatch.setattr(data_module, "BATCH_CHARACTERS", 64)
    tokenizer = ByteTokenizer()
    tokens = cached_tokens(corpus, tokenizer, tmp_path, fim_rate=0.3, seed=5)
    expected = encode_documents(corpus.train, tokenizer, fim_rate=0.3, seed=5)
    assert np.array_equal(read_all(tokens["train"]), expected)
    assert np.array_equal(read_all(tokens["valid"]), encode_documents(corpus.valid, tokenizer))
    sizes = [len(a) for a in tokens["train"].arrays]
    assert set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    encoded = tokenizer.encoded
    again = cached_tokens(corpus, tokenizer, tmp_path, fim_rate=0.3, seed=5)
    assert tokenizer.encoded == encoded
    assert np.array_equal(read_all(again["train"]), expected)


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
    assert token_dtype(2**16).itemsize == 2 and token_dtype(2**16 + 1).itemsize == 4
    tokens = cached_tokens(corpus, ByteTokenizer(vocab_size=2**16 + 1), tmp_path)
    assert tokens["train"].arrays[0].dtype == np.dtype("<u4")
    assert np.array_equal(read_all(tokens["train"]), encode_documents(corpus.train, TOKENIZER))


def damage_cut(folder):
    os.truncate(folder / "train_00000.bin", 50)


def damage_flip(folder):
    raw = bytearray((folder / "train_00000.bin").read_bytes())
    raw[7] ^= 1
    (folder / "train_00000.bin").write_bytes(raw)


def damage_lose(folder):
    (folder / "valid_00000.bin").unlink()


def damage_index(folder):
    (folder / "index.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_lose, damage_index])
def test_damaged_cache_is_made_again(corpus, tmp_path, damage):
    good = read_all(cached_tokens(corpus, TOKENIZER, tmp_path)["train"])
    (folder,) = cache_folders(tmp_path)
    assert data_module.read_index(folder)
    damage(folder)
    assert data_module.read_index(folder) is None
    assert np.array_equal(read_all(cached_tokens(corpus, TOKENIZER, tmp_path)["train"]), good)


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
    from test_data import ByteTokenizer
    from pathlib import Path
    from minids.text import data
    data.BATCH_CHARACTERS = 50
    class Slow(ByteTokenizer):
        def encode_batch(self, texts, threads):
            print("batch", flush=True)
            time.sleep(0.05)
            return super().encode_batch(texts, threads)
    texts = [f"text {{i}} " * (i % 9 + 1) for i in range(2000)]
    corpus = data.Corpus("made up", texts[:50], texts[50:], "f" * 64)
    data.cached_tokens(corpus, Slow(), Path({cache!r}))
"""


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
    assert data_module.read_index(half) is None
    tokens = cached_tokens(corpus, TOKENIZER, tmp_path)  # the dead owner's lock is free
    assert np.array_equal(read_all(tokens["train"]), encode_documents(corpus.train, TOKENIZER))
    assert [p.suffix for p in cache_folders(tmp_path)] == [""]


def test_open_data_on_a_folder(folder, tmp_path, capsys):
    def opened(**settings_):
        return open_data(f"text:{folder}", TOKENIZER, 16, cache=tmp_path / "cache", **settings_)

    data = opened(fim_rate=0.5)
    corpus = open_corpus(f"text:{folder}")
    assert data.n_train_tokens == len(data.loader.tokens)
    assert data.valid.dtype == torch.int64 and data.valid.ndim == 1
    assert [decode(d) for d in split_documents(data.valid)] == list(corpus.valid)  # never FIM
    assert str(folder) in data.describe() and "\n" not in data.describe()
    assert corpus.fingerprint[:12] in data.describe()
    assert equal(take(data.loader, RAMP), take(opened(fim_rate=0.5).loader, RAMP))
    state = data.loader.state_dict()
    with pytest.raises(ValueError, match="fim_rate = 0.0 does not fit"):
        opened().loader.load_state_dict(state)
    assert capsys.readouterr().err == ""  # no progress bar off a terminal


def hub_folder(root: Path) -> None:
    """Two data sets laid out as the real ones: with a validation split, and with configurations."""
    stories, web = root / "roneneldan" / "TinyStories", root / "HuggingFaceFW" / "fineweb-edu"
    for i in range(3):
        write_rows(stories / f"data/train-0000{i}-of-00003.parquet",
                   text=[f"story {i}.{j} " + "and then " * (j % 5) for j in range(50)])
        write_rows(web / f"sample/10BT/00{i}_00000.parquet",
                   text=[f"web {i}.{j}" for j in range(40)], id=[str(j) for j in range(40)])
    write_rows(stories / "data/validation-00000-of-00001.parquet",
               text=[f"valid {j}" for j in range(9)])
    write_rows(web / "data/CC-MAIN-2013-20/train-0.parquet", text=["all"] * 5, id=["1"] * 5)
    (web / "README.md").write_text(textwrap.dedent("""\
        ---
        configs:
        - config_name: default
          data_files:
          - split: train
            path: data/*/*
        - config_name: sample-10BT
          data_files:
          - split: train
            path: sample/10BT/*
        ---
        """))


def run_script(body: str, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """Run a script in a fresh process: the hub's address is read when its library is imported."""
    head = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run([sys.executable, "-c", head + textwrap.dedent(body)], cwd=cwd, text=True,
                          env={**clean, "HF_HOME": str(cwd / "hf"), **environment},
                          capture_output=True, timeout=120)


HUB_CHECKS = """
    import json
    from pathlib import Path
    from minids.text import data as d
    from test_data import TOKENIZER, RAMP, decode, equal, split_documents, take
    d.HUB_VALID_DOCUMENTS, d.SHUFFLE_BLOCK, d.STREAM_DOCUMENTS = 10, 16, 5

    def opened(spec, **settings):
        return d.open_data(spec, TOKENIZER, 64, cache=Path("cache"), **settings)

    def texts(documents):
        return [decode(part) for part in split_documents(documents)]

    stories = opened("hf:roneneldan/TinyStories", fim_rate=0.2)
    assert texts(stories.valid) == [f"valid {j}" for j in range(9)]
    assert stories.n_train_tokens is None and "a stream of" in stories.describe()
    whole = take(stories.loader, RAMP)
    for done in 5, 8:
        loader, resumed = (opened("hf:roneneldan/TinyStories", fim_rate=0.2).loader
                           for _ in range(2))
        take(loader, RAMP[:done])
        state = json.loads(json.dumps(loader.state_dict()))
        resumed.load_state_dict(state)
        assert equal(take(resumed, RAMP[done:]), whole[done:]), done
        if done == 8:  # Wrong: the stream starts at its front again
            resumed.load_state_dict({**state, "stream": None})
            assert not equal(take(resumed, RAMP[done:]), whole[done:])
    assert state["seen"] > 150, "the stream came to its end and began again"

    web = d.open_corpus("hf:HuggingFaceFW/fineweb-edu:sample-10BT")
    train, valid = list(web.train), list(web.valid)
    assert valid == [f"web 0.{j}" for j in range(10)]
    assert train == [f"web {i}.{j}" for i in range(3) for j in range(40)][10:]
    revision = web.fingerprint.split("@")[1][:40]
    pinned = d.open_corpus(f"hf:HuggingFaceFW/fineweb-edu@{revision}:sample-10BT:text")
    assert pinned.fingerprint == web.fingerprint
    ids = d.open_corpus("hf:HuggingFaceFW/fineweb-edu:sample-10BT:id")
    assert list(ids.valid) == [str(j) for j in range(10)]

    for spec, reason in {
        "hf:roneneldan/TinyStory": "doesn't exist on the Hub",
        "hf:roneneldan/TinyStories:en": "Available: ['default']",
        "hf:HuggingFaceFW/fineweb-edu:sample-10B": "did you mean 'sample-10BT'",
        "hf:HuggingFaceFW/fineweb-edu:sample-10BT:txt": "did you mean 'text'? its columns are text",
        "hf:roneneldan/TinyStories@0123456": "doesn't exist",
        "hf:a b/c": "Repo id must use",
    }.items():
        try:
            d.open_corpus(spec)
        except ValueError as error:
            assert reason in str(error) and "\\n" not in str(error), error
        else:
            raise AssertionError(spec)

    import datasets
    datasets.load_dataset("roneneldan/TinyStories")  # for the offline check that follows
    print("all good")
"""
OFFLINE_CHECKS = """
    import time
    from minids.text import data as d
    stories = d.open_corpus("hf:roneneldan/TinyStories")
    assert len(list(stories.train)) == 150 and len(list(stories.valid)) == 9
    print(stories.fingerprint)
    try:
        d.open_corpus("hf:some/other")
    except ValueError as error:
        assert "some/other" in str(error), error
        print("all good")
"""


def test_streams_from_a_hub_and_resumes_within_a_file(tmp_path):
    hub_folder(tmp_path / "hub")
    server = serve(tmp_path / "hub")
    result = run_script(HUB_CHECKS, tmp_path, HF_ENDPOINT=server.url)
    server.shutdown()
    server.server_close()
    assert result.stdout.endswith("all good\n"), result.stderr
    assert result.stderr == ""
    assert any("sample/10BT/002" in request for request in server.requests)
    offline = run_script(OFFLINE_CHECKS, tmp_path, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    assert offline.stdout.endswith("all good\n"), offline.stderr


@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_without_network_it_says_so_within_two_seconds(answer, monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if answer == "silent":  # a name server that does not answer; no timeout bounds its look-up
        def look_up(*_, **__):
            time.sleep(10)
            raise OSError("no answer")
        monkeypatch.setattr(data_module.socket, "create_connection", look_up)
    began = time.monotonic()
    with pytest.raises(ValueError, match="no network: .* use pystdlib or text:PATH"):
        open_corpus("hf:roneneldan/TinyStories")
    assert time.monotonic() - began < 2
