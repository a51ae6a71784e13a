"""Corpora: the same documents in every run, each on one side; bad input in one line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokens import TOKENIZER, fails, write_rows

from minids.text import corpora
from minids.text.corpora import HOLD_OUT, library_files, open_corpus, read_parquet
from minids.text.loaders import open_data
from minids.text.tasks import held_out


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
    assert not any(held_out(t, HOLD_OUT) for t in texts)
    for text in texts:
        (tmp_path / f"{text[0]}.txt").write_text(text)
    corpus = open_corpus(f"text:{tmp_path}")
    assert corpus.train == [texts[0], texts[1], "c" * 170] and corpus.valid == ["c" * 30]


def test_examples_of_a_task_are_split_and_partly_worked_out(monkeypatch):
    monkeypatch.setattr(corpora, "EXAMPLES", 2000)
    corpus, again = open_corpus("task:calculator:3"), open_corpus("task:calculator:3")
    assert (len(corpus.train), len(corpus.valid)) == (2000, 100)
    assert (corpus.train, corpus.valid) == (again.train, again.valid)
    assert corpus.fingerprint == again.fingerprint != open_corpus("task:calculator").fingerprint
    questions = [{re.split(r":| =", text)[0] for text in side}
                 for side in (corpus.train, corpus.valid)]
    assert not questions[0] & questions[1]
    # 40 % of a calculator's examples are worked out; five standard deviations of a binomial count
    worked = sum(": " in text for text in corpus.train)
    assert abs(worked - 800) < 5 * (0.4 * 0.6 * 2000) ** 0.5


def test_a_character_across_two_blocks_of_a_file_is_read(tmp_path):
    """A file is checked in blocks of 1 MiB; é starts with the last byte of the first one."""
    (tmp_path / "long.txt").write_text("x" * (2**20 - 1) + "é\n" + "y\n" * 2**18, "utf-8")
    assert open_corpus(f"text:{tmp_path}").note == ""
    (tmp_path / "zero.txt").write_bytes(b"x" * 2**20 + b"\0")
    assert "zero.txt is binary" in open_corpus(f"text:{tmp_path}").note


BAD_FILES = {
    "empty.txt": b"", "blank.md": b" \n\n", "binary.txt": b"ab\0cd", "latin.py": b"caf\xe9 \n",
    "cut.txt": "é".encode()[:1], "bad.jsonl": b'{"text": "a"}\n{"text": \n',
    "list.jsonl": b"[1]\n", "columns.jsonl": b'{"title": "a", "body": "b", "n": 1}\n',
    "later.jsonl": b'{"text": "a"}\n\n{"body": "b"}\n', "bad.parquet": b"not parquet",
    "data.csv": b"a,b\n", "one.txt": b"x", "number.jsonl": b'{"text": "a"}\n{"text": 5}\n',
    "cut.parquet": b"PAR1" + bytes(99) + b"PAR1", "deep.jsonl": b'{"text": "a"}\n' + b"[" * 10**5,
    "long.jsonl": b'{"text": ' + b"9" * 5000 + b"}",
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
    "text:HERE/later.jsonl": "line 3 has no 'text', only ['body']",
    "text:HERE/bad.parquet": "not a parquet file", "text:HERE/two.parquet": "columns are a, b, n",
    "text:HERE/data.csv": "a file .csv is not read", "text:HERE/one.txt": "too short",
    "text:HERE/number.jsonl": "number.jsonl line 2: text = 5 is not text",
    "text:HERE/cut.parquet": "cut.parquet is damaged or not a parquet file",
    "text:HERE/deep.jsonl": "deep.jsonl line 2 is not JSON",
    "text:HERE/long.jsonl": "long.jsonl line 1 is not JSON",
    "text:HERE/lists.parquet": "its columns are words (not text)",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_input_is_one_line_that_says_what_would_work(spec, tmp_path):
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "hollow").mkdir()
    write_rows(tmp_path / "two.parquet", a=["x"], b=["y"], n=[1])
    write_rows(tmp_path / "lists.parquet", words=[["x"], ["y"]])
    with pytest.raises(ValueError) as error:
        open_corpus(spec.replace("HERE", str(tmp_path)))
    message = str(error.value)
    assert BAD_SPECS[spec].replace("HERE", str(tmp_path)) in message and "\n" not in message


@pytest.mark.parametrize("kind", [
    pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string())], ids=str)
def test_a_column_of_text_may_have_any_of_arrows_types(kind, tmp_path):
    """pandas writes a category as a dictionary."""
    texts = ["one é", None, "two", "one é"] * 50
    table = pa.table({"n": range(200), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    assert [*read_parquet(tmp_path / "a.parquet")] == [text or "" for text in texts]


REPEATED = "the same words " * 200_000  # 3 MB


def repeated_file(path: Path, form: str) -> None:
    """Write one text again and again in a few kB: 3 GB as a dictionary, 300 MB as it is."""
    if form == "dictionary":
        text = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array([REPEATED]))
        pq.write_table(pa.table({"text": text}), path, compression="zstd", store_schema=False)
    else:
        table = pa.table({"text": [REPEATED] * (100 if form == "group" else 10)})
        how = dict(compression="zstd", use_dictionary=False)
        with pq.ParquetWriter(path, table.schema, **how) as writer:
            for _ in range(1 if form == "group" else 10):
                writer.write_table(table, row_group_size=1000)


MEASURED = """
import resource, sys
from minids.text.corpora import open_corpus
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_corpus(f"text:{sys.argv[1]}")
except ValueError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, error)
"""


@pytest.mark.parametrize("form", [
    "dictionary", "groups", pytest.param("group", marks=pytest.mark.slow)])  # is half in memory
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_in_little_memory(form, tmp_path):
    repeated_file(tmp_path / "a.parquet", form)
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True,
                          text=True)
    used, _, error = done.stdout.partition(" ")
    assert "a.parquet unpacks to more than 100 times its size" in error, done.stderr
    assert int(used) < 700  # MiB; the texts before the bound, 256 MiB, are held to be split


def test_bad_settings(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 20)
    for settings_, reason in [(dict(seq_len=5000), "seq_len = 5000 is longer than the text"),
                              (dict(seq_len=0), "seq_len = 0"),
                              (dict(seq_len=8, fim_rate=1.5), "fim_rate = 1.5")]:
        with pytest.raises(ValueError, match=reason):
            open_data(f"text:{tmp_path}", TOKENIZER, cache=tmp_path / "cache", **settings_)
