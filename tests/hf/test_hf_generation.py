"""generation_config.json: what ends a text, how one is drawn; and what an export says of both."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_folders import edit, folder_of, from_pretrained
from small_models import LITTLE, scrambled
from transformers import AutoTokenizer

from minids.base.command_line import run_program
from minids.generate import generate
from minids.generate import main as generate_program
from minids.hf import save_hf
from minids.hf.__main__ import HfArgs, convert
from minids.hf.names import CONFIG
from minids.rl.examination import Asking, ask
from minids.runs.open import open_model
from minids.text.bpe import GENERATION
from minids.text.chat import Chat
from minids.tokenizer import Tokenizer

BYTES = Tokenizer.open("bytes")
ARGS = replace(LITTLE, vocab_size=BYTES.vocab_size, n_mtp_layers=0)
QUESTION = "3*7+5"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model that writes no unused id when it takes the likeliest."""
    model = scrambled(ARGS, dtype=torch.float32)
    model.head.weight.data[BYTES.n_tokens:] = 0
    save_hf(model, tmp_path / "in", tokenizer=BYTES)
    return tmp_path / "in"


def say(folder: Path, capsys, monkeypatch, *words) -> tuple[str, str]:
    """Return what the program prints for a folder, and the last line on stderr."""
    words = ["--run", folder, "--prompt", "3*", "--max-new-tokens", 30, "--threads", 1, *words]
    monkeypatch.setattr(sys, "argv", ["minids.generate", *map(str, words)])
    try:
        run_program("minids.generate", generate_program)
    except SystemExit as end:
        assert end.code in (0, None, 2)
    said = capsys.readouterr()
    return said.out, said.err.strip().rpartition("\n")[2]


@pytest.mark.parametrize("name", [CONFIG, GENERATION])
@pytest.mark.parametrize("places", [[4], [9, 3], [20, 12, 6]])
def test_any_eos_of_a_folder_ends_what_the_programs_write(name, places, folder, capsys,
                                                          monkeypatch):
    run = open_model(folder)
    [free] = generate(run.model, [[BYTES.bos_id, *BYTES.encode("3*")]], 30).tokens
    ends = [free[place] for place in places]
    edit(folder / name, {"eos_token_id": [BYTES.eos_id, *ends]})
    stop = min(free.index(token) for token in ends)
    _, told = say(folder, capsys, monkeypatch, "--temperature", 0)
    assert told.startswith(f"{stop + 1} tokens after 3 ")
    again = open_model(folder)
    assert again.tokenizer.eos_ids == [BYTES.eos_id, *dict.fromkeys(ends)]
    # examinations, as of solve, sft and grpo
    prompt = Chat(BYTES).prompt(QUESTION, "direct")
    [free] = generate(run.model, [prompt], 30).tokens
    edit(folder / name, {"eos_token_id": [free[place] for place in places]})
    again = open_model(folder)
    [reply] = ask(again.model, again.tokenizer, [QUESTION], Asking("direct", max_new_tokens=30))
    stop = min(free.index(free[place]) for place in places)
    assert reply.ended and reply.tokens == stop + 2  # the forced tag, and EOS


OWN = {
    "as DeepSeek-V3 has it": ({"do_sample": True, "temperature": 0.6, "top_p": 0.95},
                              (0.6, 0, 0.95)),
    "temperature alone": ({"temperature": 1.3}, (1.3, 0, 0.95)),
    "nucleus alone": ({"top_p": 0.5, "temperature": None}, (0.8, 0, 0.5)),
    "top_k as a float": ({"top_k": 3.0, "temperature": 1}, (1.0, 3, 0.95)),
    "greedy": ({"do_sample": False, "temperature": 0.6}, (0.0, 0, 0.95)),
    "nothing": ({"max_new_tokens": 7, "do_sample": None}, (0.8, 0, 0.95)),
}


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if i % 2 == 0 else pytest.mark.slow) for i, kind in enumerate(OWN)])
def test_a_folders_defaults_stand_unless_a_flag_says_otherwise(kind, folder, capsys, monkeypatch):
    given, how = OWN[kind]
    edit(folder / GENERATION, given)
    run = open_model(folder)

    def expected(temperature, top_k, top_p) -> str:
        [row] = generate(run.model, [[BYTES.bos_id, *BYTES.encode("3*")]], 30, temperature, top_k,
                         top_p, 0, BYTES.eos_id).tokens
        return "3*" + BYTES.decode([t for t in row if t != BYTES.eos_id]) + "\n"

    assert say(folder, capsys, monkeypatch)[0] == expected(*how)
    flags = ["--temperature", 0.9, "--top-p", 0.7, "--top-k", 9]
    assert say(folder, capsys, monkeypatch, *flags)[0] == expected(0.9, 9, 0.7) != expected(*how)
    # `ask` measures as it is told
    how = Asking("free", max_new_tokens=9)
    asked = ask(run.model, run.tokenizer, [QUESTION], how)
    (folder / GENERATION).unlink()
    assert asked == ask(run.model, open_model(folder).tokenizer, [QUESTION], how)


@pytest.mark.parametrize("given, named", [
    ({"temperature": "hot"}, "temperature = 'hot'"), ({"temperature": -1.0}, "temperature = -1.0"),
    ({"top_p": 0}, "top_p = 0.0"), ({"top_k": 2.5}, "top_k = 2.5"), ({"top_k": -1}, "top_k = -1"),
    ({"top_p": [0.9]}, "top_p = [0.9]"), ({"do_sample": "no"}, "do_sample = 'no'"),
    ({"temperature": float("nan")}, "temperature = nan")], ids=str)
def test_a_default_that_is_not_valid_is_told_with_its_file(given, named, folder, capsys,
                                                           monkeypatch):
    edit(folder / GENERATION, given)
    out, told = say(folder, capsys, monkeypatch)
    assert out == ""
    assert told.startswith(f"python -m minids.generate: {folder / GENERATION}: {named}")


def test_an_export_says_what_ends_a_text(folder, tmp_path):
    given = json.loads((folder / GENERATION).read_text())
    assert given == {"bos_token_id": BYTES.bos_id, "eos_token_id": BYTES.eos_id}
    assert from_pretrained(folder)[0].generation_config.eos_token_id == BYTES.eos_id
    edit(folder / CONFIG, {"eos_token_id": [1, 30]})
    (folder / GENERATION).unlink()
    convert(HfArgs(folder=str(folder), out=str(tmp_path / "converted")))
    save_hf(scrambled(ARGS), tmp_path / "saved", tokenizer=Tokenizer.load(folder))
    for out in (tmp_path / "converted", tmp_path / "saved"):
        for name in (CONFIG, GENERATION):
            assert json.loads((out / name).read_text())["eos_token_id"] == [1, 30]
        assert open_model(out).tokenizer.eos_ids == [1, 30]
    assert not (folder_of(LITTLE, tmp_path / "without") / GENERATION).exists()


TALKS = {
    "a question": [("user", "3*7+5")],
    "a system message": [("system", "Be brief."), ("user", "2")],
    "an answer": [("user", "2"), ("assistant", "4")],
    "a thought": [("user", "2"), ("assistant", "4", "2+2=4")],
    "an empty thought": [("user", "2"), ("assistant", "4", "")],
    "an earlier thought": [("user", "2"), ("assistant", "4", "2+2"), ("user", "3")],
    "turns": [("system", "S"), ("user", "a"), ("assistant", "b", "t"), ("user", "c"),
              ("assistant", "d", "u")],
    "an earlier one in tags": [("user", "2"), ("assistant", "<think>t</think>4"), ("user", "3")],
    "a thought in tags": [("user", "2"), ("assistant", "<think>t</think>4")],
}


@pytest.mark.parametrize("talk", TALKS)
def test_the_exported_template_writes_what_ours_does(talk, tmp_path):
    save_hf(scrambled(ARGS), tmp_path / "out", tokenizer=BYTES, chat=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [dict(zip(("role", "content", "reasoning_content"), turn, strict=False))
                for turn in TALKS[talk]]

    def ids(**how) -> list[int]:
        return theirs.apply_chat_template(messages, return_dict=False, **how)

    if messages[-1]["role"] == "assistant":
        assert ids() == Chat(BYTES).sample(messages)[0]
        return
    for mode, how in ("free", {}), ("think", {"thinking": True}), ("direct", {"thinking": False}):
        assert ids(add_generation_prompt=True, **how) == Chat(BYTES).prompt(messages, mode)


def test_only_a_model_of_conversations_has_the_template(folder, tmp_path):
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    text = "<｜User｜>"
    assert len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]) == len(text.encode())
    save_hf(scrambled(ARGS), tmp_path / "out", tokenizer=BYTES, chat=True)
    for copy in (tmp_path / "out", tmp_path / "again"):
        theirs = AutoTokenizer.from_pretrained(copy)
        assert theirs(text)["input_ids"] == [BYTES.user_id]
        reply = [BYTES.think_id, 90, BYTES.end_think_id, 91, BYTES.eos_id]
        assert theirs.decode(reply, skip_special_tokens=True) == BYTES.decode(reply[:-1])
        assert open_model(copy).tokenizer.encode(text) == BYTES.encode(text)
        if copy == tmp_path / "out":
            convert(HfArgs(run=str(copy), out=str(tmp_path / "again")))
