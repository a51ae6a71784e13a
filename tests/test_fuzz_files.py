"""Files from the world, changed at random: read, or refused in one line, in bounded memory.

500 changes a test, the same every time. MINIDS_FUZZ=10 goes on with other ones for ten minutes,
those of `test_fuzz_rewards` included, and -s prints how many there were:

    MINIDS_FUZZ=10 pytest -m slow -s tests/test_fuzz_files.py tests/test_fuzz_rewards.py
"""

import copy
import functools
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from small_models import LITTLE, scrambled

from minids import hf
from minids.base.command_line import told
from minids.runs.open import read_config
from minids.sft import SftArgs, open_conversations
from minids.text.corpora import read_parquet, read_plain, read_rows
from minids.text.tasks import open_task
from minids.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
BOUND = 1024  # MiB that all files of a kind may add to the process's peak
TESTS = 7  # that share the minutes: five here, two in test_fuzz_rewards
SECONDS = 60 * float(os.environ.get("MINIDS_FUZZ", "0")) / TESTS
EXAMPLES = 100 if SECONDS else 500  # of a round; short ones end in time
ROUND = settings(max_examples=EXAMPLES, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck))


def fuzz(*strategies) -> Callable:
    """Give a test `EXAMPLES` instances, and more of them, by other seeds, for `SECONDS`."""
    def decorate(test: Callable) -> Callable:
        count = 0

        @ROUND
        @given(*strategies)
        @functools.wraps(test)
        def once(*args, **kwargs):
            nonlocal count
            count += 1
            test(*args, **kwargs)

        @functools.wraps(once)
        def rounds(**fixtures):
            begin, number = time.monotonic(), 17
            while number == 17 or time.monotonic() - begin < SECONDS:
                seed(number)(once)(**fixtures)
                number += 1
            print(f"{test.__name__}: {count} instances in {time.monotonic() - begin:.0f} s")
        return rounds
    return decorate


values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=9) | st.floats() | st.integers(-9, 99)
    | st.sampled_from([2**31, 2**63, 10**9, 10**30, -1, 1e308, "\ud800", "<think>a</think>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3), max_leaves=5)


def peak() -> int:
    """The process's peak memory, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.fixture(autouse=True)
def bounded_memory():
    before = peak()
    yield
    assert peak() - before < BOUND


def refuses_or_reads(read, *args) -> str:
    """Return a program's one-line error about a file, '' if it reads it; raise anything else."""
    try:
        read(*args)
        return ""
    except Exception as error:
        line = told(error)
        if not line or isinstance(error, MemoryError | RuntimeError):
            raise
        assert "\n" not in line
        return line


def put(obj, path: list, value) -> None:
    """Set a value deep in a JSON object; a path leads through keys by their number."""
    while True:
        keys = list(obj) if isinstance(obj, dict) else list(range(len(obj)))
        key = keys[path[0] % len(keys)]
        if len(path) == 1 or not isinstance(obj[key], dict | list) or not obj[key]:
            obj[key] = value
            return
        obj, path = obj[key], path[1:]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, cut, doubled, or replaced by what has a meaning somewhere."""
    for _ in range(rng.randrange(1, 4)):
        at, size = rng.randrange(len(raw) + 1), rng.randrange(1, 40)
        new = rng.choice([bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))), b"[" * 999,
                          b"9" * 99, b"\xff\xff\xff\x7f", b"\xe2\x80\xa8", b"\n", b"\0", b'"', b""])
        raw = rng.choice([raw[:at] + new + raw[at + len(new):], raw[:at] + new + raw[at:], raw[:at],
                          raw[:at] + raw[at + size:], raw[:at] + raw[at:at + size] * 3 + raw[at:]])
    return raw


changes = st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=5), values),
                   min_size=1, max_size=3)
randoms = st.integers(0, 2**32).map(random.Random)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    made = tmp_path_factory.mktemp("hf") / "model"
    hf.save_hf(scrambled(LITTLE), made)
    Tokenizer.train(["some words and some more words, again and again"] * 5, 300).save_hf(made)
    return made


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A tokenizer's folder."""
    made = tmp_path_factory.mktemp("own")
    Tokenizer.train(["some words and some more words, again and again"] * 5, 300).save(made)
    return made


def changed(path: Path, how) -> bytes:
    """Return a JSON file's content after `changes`, or any file's after `damaged`."""
    if isinstance(how, random.Random):
        return damaged(path.read_bytes(), how)
    spec = json.loads(path.read_text("utf-8"))
    for place, value in how:
        put(spec, place, copy.deepcopy(value))
    return json.dumps(spec).encode()


def tried(path: Path, how, read, *args) -> str:
    """Return the error message after a change of a file, then restore the file."""
    whole = path.read_bytes()
    try:
        path.write_bytes(changed(path, how))
        return refuses_or_reads(read, *args)
    finally:
        path.write_bytes(whole)


@fuzz(changes | randoms)
def test_configurations(folder, how):
    tried(folder / "config.json", how, hf.inspect, folder)
    tried(folder / "config.json", how, read_config, folder)


@fuzz(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), changes | randoms)
def test_released_tokenizers(folder, name, how):
    tried(folder / name, how, lambda: Tokenizer.load(folder).encode("a word"))


@fuzz(st.sampled_from(["meta.json", "ranks.tiktoken"]), changes | randoms)
def test_own_tokenizers(own, name, how):
    if name == "ranks.tiktoken" and not isinstance(how, random.Random):
        how = random.Random(str(how))
    tried(own / name, how, lambda: Tokenizer.load(own).encode("a word"))


ROWS = [{"text": "a\u2028b", "n": 1}, {"question": "1+1", "answer": "2"}, {"messages": [
    {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
    {"role": "assistant", "reasoning_content": "t", "content": "a"}]}]


@fuzz(st.sampled_from(ROWS), changes | randoms)
def test_jsonl(tmp_path_factory, row, how):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode())
    one = changed(path, how)
    path.write_bytes(path.read_bytes() + b"\n" + one + b"\n")
    for read in (lambda: [*read_rows(path)], lambda: open_task(f"jsonl:{path}").some(3, "train", 0),
                 lambda: open_conversations(SftArgs(data=f"jsonl:{path}")),
                 lambda: [*read_plain(path)]):
        refuses_or_reads(read)


@fuzz(st.sampled_from(["none", "zstd", "snappy", "gzip"]), st.booleans(), randoms)
def test_parquet(tmp_path_factory, codec, dictionary, how):
    path = tmp_path_factory.getbasetemp() / "rows.parquet"
    texts = [f"text {i % 7} " * (i % 5) for i in range(200)]
    pq.write_table(pa.table({"text": texts, "n": range(200)}), path, compression=codec,
                   use_dictionary=dictionary, row_group_size=90)
    tried(path, how, lambda: [*read_parquet(path)])


def test_the_check_notices_an_error_that_is_ours():
    assert refuses_or_reads(lambda: int("x")) and refuses_or_reads(open, "/no/such/file")
    for ours in (KeyError("a"), RecursionError(), MemoryError(), AttributeError("'str'")):
        def read(error=ours):
            raise error
        with pytest.raises(type(ours)):
            refuses_or_reads(read)
