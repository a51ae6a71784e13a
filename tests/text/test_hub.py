"""Data sets of the hub: streamed, resumed within a file, and one line without network."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_tokens import write_rows
from local_hub import serve

from minids.sft import SftArgs, open_conversations
from minids.text import hub
from minids.text.corpora import open_corpus
from minids.text.tasks import open_task

ROOT = Path(__file__).resolve().parents[2]


def hub_folder(root: Path) -> None:
    """Write two data sets with the layout of the real ones: one with a validation split, one with
    configurations."""
    stories, web = root / "roneneldan" / "TinyStories", root / "HuggingFaceFW" / "fineweb-edu"
    for i in range(3):
        write_rows(stories / f"data/train-0000{i}-of-00003.parquet",
                   text=[f"story {i}.{j} " + "and then " * (j % 5) for j in range(50)])
        write_rows(web / f"sample/10BT/00{i}_00000.parquet",
                   text=[f"web {i}.{j}" for j in range(40)], id=[str(j) for j in range(40)])
    write_rows(stories / "data/validation-00000-of-00001.parquet",
               text=[f"valid {j}" for j in range(9)])
    write_rows(web / "data/CC-MAIN-2013-20/train-0.parquet", text=["all"] * 5, id=["1"] * 5)
    write_rows(root / "some" / "exam" / "data" / "test-00000-of-00001.parquet", text=["a"])
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
    from minids.text import hub, loaders
    from minids.text.corpora import open_corpus
    from byte_tokens import TOKENIZER, RAMP, decode, equal, split_documents, take
    hub.HUB_VALID_DOCUMENTS, loaders.SHUFFLE_BLOCK, loaders.STREAM_DOCUMENTS = 10, 16, 5

    def opened(spec, **settings):
        return loaders.open_data(spec, TOKENIZER, 64, cache=Path("cache"), **settings)

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

    web = open_corpus("hf:HuggingFaceFW/fineweb-edu:sample-10BT")
    train, valid = list(web.train), list(web.valid)
    assert valid == [f"web 0.{j}" for j in range(10)]
    assert train == [f"web {i}.{j}" for i in range(3) for j in range(40)][10:]
    revision = web.fingerprint.split("@")[1][:40]
    pinned = open_corpus(f"hf:HuggingFaceFW/fineweb-edu@{revision}:sample-10BT:text")
    assert pinned.fingerprint == web.fingerprint
    ids = open_corpus("hf:HuggingFaceFW/fineweb-edu:sample-10BT:id")
    assert list(ids.valid) == [str(j) for j in range(10)]

    for spec, reason in {
        "hf:roneneldan/TinyStory": "doesn't exist on the Hub",
        "hf:roneneldan/TinyStories:en": "Available: ['default']",
        "hf:HuggingFaceFW/fineweb-edu:sample-10B": "did you mean 'sample-10BT'",
        "hf:HuggingFaceFW/fineweb-edu:sample-10BT:txt": "did you mean 'text'? its columns are text",
        "hf:roneneldan/TinyStories@0123456": "doesn't exist",
        "hf:some/exam": "the data set has no split train, only test",
        "hf:a b/c": "Repo id must use",
    }.items():
        try:
            open_corpus(spec)
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
    from minids.text.corpora import open_corpus
    stories = open_corpus("hf:roneneldan/TinyStories")
    assert len(list(stories.train)) == 150 and len(list(stories.valid)) == 9
    print(stories.fingerprint)
    try:
        open_corpus("hf:some/other")
    except ValueError as error:
        assert "some/other" in str(error), error
        print("all good")
"""


@pytest.mark.slow
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
@pytest.mark.parametrize("ask", [
    lambda: open_corpus("hf:roneneldan/TinyStories"), lambda: open_task("gsm8k"),
    lambda: open_corpus("task:gsm8k"), lambda: open_conversations(SftArgs(data="task:gsm8k"))])
def test_without_network_it_says_so(ask, answer, monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    answered = threading.Event()
    if answer == "silent":  # a name server that does not answer; no timeout bounds its look-up
        def look_up(*_, **__):
            answered.wait(600)
            raise OSError("no answer")
        monkeypatch.setattr(hub.socket, "create_connection", look_up)
        monkeypatch.setattr(hub, "PATIENCE", 0.1)
    with pytest.raises(ValueError, match="no network: .* use pystdlib or text:PATH"):
        ask()
    answered.set()


def test_two_seconds_are_not_waited_for_the_network():
    assert 0.5 < hub.PATIENCE < 2


def test_a_process_that_stood_still_asks_on(monkeypatch):
    """Its time is over when it goes on, and the answer comes a moment later."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    join, joins = threading.Thread.join, []

    def stopped_once(thread, timeout):
        joins.append(timeout)
        join(thread, 0 if len(joins) == 1 else timeout)

    connect = socket.create_connection
    monkeypatch.setattr(hub.socket, "create_connection", lambda *a, **k: (
        time.sleep(0.1), connect(*a, **k))[1])
    monkeypatch.setattr(hub.threading.Thread, "join", stopped_once)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.check_network()
    assert sum(joins) == pytest.approx(hub.PATIENCE)


class Rows(list):
    """Stands for a stream of the library."""

    def take(self, count: int) -> "Rows":
        return Rows(self[:count])

    def skip(self, count: int) -> "Rows":
        return Rows(self[count:])


@pytest.fixture
def library(monkeypatch):
    """Let the library open these splits, or fail; returns what it was asked for."""
    errors = SimpleNamespace(DatasetNotFoundError=type("NotFound", (Exception,), {}))
    asked = []

    def put(splits: dict | Exception) -> list:
        def load_dataset_builder(name, config, revision):
            asked[:] = [name, config, revision]
            if isinstance(splits, Exception):
                raise splits
            return SimpleNamespace(as_streaming_dataset=lambda: splits, hash="h",
                                   config=SimpleNamespace(name="default"))
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
            load_dataset_builder=load_dataset_builder,
            disable_progress_bars=lambda: asked.append("no bars")))
        return asked
    monkeypatch.setitem(sys.modules, "datasets.exceptions", errors)
    monkeypatch.setattr(hub, "check_network", lambda: None)
    return put


def test_validation_is_the_first_of_a_set_without_such_a_split(library):
    rows = Rows(dict(text=f"text {n}", id=n) for n in range(hub.HUB_VALID_DOCUMENTS + 3))
    asked = library({"train": rows})
    train, valid, name = hub.open_hub("some/set@12ab")
    assert asked == ["some/set", None, "12ab"] and name == "some/set@h:default:text"
    assert list(valid.dataset) == rows[:-3] and list(train.dataset) == rows[-3:]
    library({"train": rows, "test": Rows(rows[:2])})
    train, valid, name = hub.open_hub("some/set:part:text")
    assert asked == ["some/set", "part", None]
    assert list(valid.dataset) == rows[:2] and list(train.dataset) == rows


@pytest.mark.parametrize("given, spec, words", [
    ({"test": Rows()}, "some/set", "no split train, only test"),
    ({"train": Rows([dict(id=1)])}, "some/set", "choose with hf:NAME:CONFIG:COLUMN"),
    (ValueError("BuilderConfig 'prat' not found. Available: ['part', 'all']"), "some/set:prat",
     "did you mean 'part'.*choose with hf:some/set:CONFIG"),
    (OSError("no room\nfor it"), "some/set", "no room for it")])
def test_what_the_library_says_becomes_one_line(library, given, spec, words):
    library(given)
    with pytest.raises(ValueError, match=words) as error:
        hub.open_hub(spec)
    assert "\n" not in str(error.value)
