"""A released model's tokenizer.json: read as transformers reads it, or refused in one line."""

import codecs
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from released_tokenizer import LEARNT_FROM, MARKED, PAD, UNMARKED, UNUSED_BYTES, write_released
from tokenizer_checks import (
    BOS,
    EOS,
    EVERY,
    SPELLED,
    TEXTS,
    TRICKY,
    VALID,
    cut,
    differing,
    edit,
    empty,
    garbage,
    mixed,
    quick,
    same_tokenizer,
    text_is_kept,
)
from training_runs import no_picture, short_sample
from transformers import AutoTokenizer

from minids.runs.open import open_model
from minids.runs.settings import TrainArgs
from minids.text import bpe
from minids.text import tokenizer as module
from minids.text.bpe import SPECIAL
from minids.text.loaders import open_data
from minids.text.tokenizer import ReleasedTokenizer, Tokenizer
from minids.train import train


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Return the folder of a released model, without the model."""
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def copy(released, tmp_path) -> Path:
    """Return a copy of that folder, to be changed."""
    return Path(shutil.copytree(released, tmp_path / "copy"))


@pytest.fixture(scope="module")
def read(released) -> tuple[ReleasedTokenizer, object]:
    """Return the folder's tokenizer as minids and as transformers read it."""
    return Tokenizer.load(released), AutoTokenizer.from_pretrained(released)


def theirs_as_text(theirs, text: str) -> list[int]:
    """Encode with the library's pre-tokenizer and model, bypassing its search for added tokens."""
    engine = theirs.backend_tokenizer
    pieces = [piece for piece, _ in engine.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for piece in pieces for token in engine.model.tokenize(piece)]


def test_a_released_folder_is_read_as_transformers_reads_it(read):
    mine, theirs = read
    texts = [*TEXTS, *VALID[:5], LEARNT_FROM, *TRICKY[:-1]]
    assert differing(mine.encode, lambda text: theirs.encode(text, add_special_tokens=False),
                     texts) == []
    assert (mine.bos_id, mine.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert mine.n_tokens == len(theirs) == 700 + len(MARKED) + len(UNMARKED)
    assert mine.vocab_size == 768 and mine.vocab_size % 64 == 0
    assert mine.special == theirs.get_added_vocab() and len(mine.special) == 26
    for name, text in (("user_id", SPECIAL[2]), ("fim_end_id", SPECIAL[8])):
        assert getattr(mine, name) == theirs.convert_tokens_to_ids(text)


@quick
@given(text=mixed)
def test_any_text_is_read_as_transformers_reads_it(read, text):
    mine, theirs = read
    ids = mine.encode(text)
    assert ids == theirs_as_text(theirs, text)
    if not any(token in text for token in mine.special):
        assert ids == theirs.encode(text, add_special_tokens=False)
    assert mine.decode(ids) == text and text_is_kept(mine, text.encode())


@quick
@given(raw=st.binary(max_size=200))
def test_any_bytes_come_back_from_a_released_tokenizer(read, raw):
    assert text_is_kept(read[0], raw)


spelled = st.lists(st.sampled_from([*SPECIAL, PAD, "<|EOT|>", "<", "think>", " ", "a", "\uff5c"]),
                   max_size=12).map("".join)


@quick
@given(text=spelled)
def test_text_that_spells_added_tokens_stays_text(read, text):
    mine, theirs = read
    assert text_is_kept(mine, text.encode())
    assert mine.encode(text) == theirs_as_text(theirs, text)


@pytest.mark.parametrize("switch", [False, True])
def test_wrong_variant_that_leaves_added_tokens_in_is_caught(released, switch):
    """The library's own switch covers tokens marked special only."""
    mine = Tokenizer.load(released)
    assert text_is_kept(mine, SPELLED.encode())
    mine._engine = bpe.read_engine(mine.files[bpe.TOKENIZER])
    mine._engine.encode_special_tokens = switch
    assert mine.special[BOS] not in mine.encode(BOS) or not switch
    assert not text_is_kept(mine, SPELLED.encode())


def streamed(decode_bytes, ids) -> str:
    """Return what a reader sees when tokens arrive one by one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return "".join(decoder.decode(decode_bytes([token])) for token in ids)


def test_a_released_tokenizer_gives_bytes(read):
    mine, theirs = read
    for text in [*TEXTS, *TRICKY, "".join(EVERY[::37])]:
        ids = mine.encode(text)
        assert streamed(mine.decode_bytes, ids) == mine.decode(ids) == theirs.decode(ids) == text
    ids = mine.encode("\u0416\U0001f9ea")  # in several tokens each
    assert streamed(lambda ids: theirs.decode(ids).encode(), ids) != "\u0416\U0001f9ea"  # wrong
    every = [mine.bos_id, *mine.special.values(), mine.eos_id]
    assert mine.decode(every) == theirs.decode(every)
    assert mine.decode([mine.n_tokens]) == mine.decode([768]) == theirs.decode([768]) == ""


def test_the_rows_are_those_of_the_model_beside(copy):
    for rows, expected in ((1000, 1000), (723, 723), (722, 768), (None, 768), ("9", 768),
                           (163_840, 163_840)):  # as many as a released model has
        (copy / bpe.CONFIG).write_text(json.dumps({"vocab_size": rows}))
        t = Tokenizer.load(copy)
        assert t.n_tokens == 723 and t.vocab_size == len(t.n_bytes) == expected
        assert t.decode([expected - 1]) == (SPECIAL[13] if expected == 723 else "")
    (copy / bpe.CONFIG).write_text(json.dumps({"vocab_size": 10 ** 12}))
    assert Tokenizer.load(copy).decode([10 ** 12 - 1]) == ""  # rows alone take no memory


def test_a_vocabulary_without_the_unused_bytes_takes_all_text(tmp_path):
    alphabet = [c for c, byte in bpe.printable_bytes().items() if byte not in UNUSED_BYTES]
    t = Tokenizer.load(write_released(tmp_path, alphabet))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, *TRICKY[:-1], "".join(EVERY[::37])]
    assert differing(t.encode, lambda text: theirs.encode(text, add_special_tokens=False),
                     texts) == []
    assert all(text_is_kept(t, text.encode()) for text in texts)
    assert text_is_kept(t, b"caf\xc3") and len(t.ranks) == 697
    with pytest.raises(ValueError, match="^byte 0xff has no token in this vocabulary$"):
        t.encode(b"a\xff")


def test_what_the_file_adds_cuts_or_drops_is_left_out(copy):
    """Truncation, padding, BOS from a template and BPE dropout are ignored."""
    before = Tokenizer.load(copy)
    engine = tokenizers.Tokenizer.from_file(str(copy / bpe.TOKENIZER))
    engine.enable_truncation(3)
    engine.enable_padding(length=9)
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    engine.model.dropout = 0.9
    engine.save(str(copy / bpe.TOKENIZER))
    assert engine.encode("x").ids != before.encode("x")
    assert differing(before.encode, Tokenizer.load(copy).encode, [*TEXTS, *TRICKY]) == []


def ends(folder: Path) -> tuple[int, int]:
    """Return the ids of BOS and EOS."""
    t = Tokenizer.load(folder)
    assert {t.bos_id, t.eos_id} <= set(t.special.values())
    return t.bos_id, t.eos_id


def test_begin_and_end_are_taken_from_the_files_in_turn(copy):
    def write(name, value):
        (copy / name).write_text(json.dumps(value), "utf-8")

    tokenizer_config, config = bpe.TOKENIZER_CONFIG, bpe.CONFIG
    write(config, {"bos_token_id": 700, "eos_token_id": [701, 1]})
    assert ends(copy) == (0, 1)  # what tokenizer_config.json names goes first
    write(tokenizer_config, {"bos_token": PAD, "eos_token": {"content": "<|EOT|>"}})
    assert ends(copy) == (2, 710)
    write(tokenizer_config, {"bos_token": None, "eos_token": PAD})
    assert ends(copy) == (700, 2)
    (copy / tokenizer_config).unlink()
    assert ends(copy) == (700, 701)
    write(config, {"bos_token_id": None, "eos_token_id": []})
    assert ends(copy) == (0, 1)  # by DeepSeek's names
    (copy / config).unlink()
    assert ends(copy) == (0, 1)


@pytest.mark.parametrize("config, generation, expected, first", [
    ([1, 710], None, [1, 710], 1), (None, [701, 702], [1, 701, 702], 701),
    (700, 701, [1, 700, 701], 700), ([710, 1], [702, 710], [1, 710, 702], 710), ([], [], [1], 1)])
def test_every_eos_of_the_files_ends_a_text(config, generation, expected, first, copy, tmp_path):
    for name, value in (bpe.CONFIG, config), (bpe.GENERATION, generation):
        (copy / name).write_text(json.dumps({"eos_token_id": value}), "utf-8")
    t = Tokenizer.load(copy)
    assert t.eos_ids == expected and t.eos_id == 1
    t.save(tmp_path / "run")  # what is trained from it has them too
    assert Tokenizer.load(tmp_path / "run").eos_ids == expected
    (copy / bpe.TOKENIZER_CONFIG).unlink()
    assert Tokenizer.load(copy).eos_id == first  # of unnamed ones the first is the one to write


@pytest.mark.parametrize("name", [bpe.CONFIG, bpe.GENERATION])
@pytest.mark.parametrize("value", [-1, 5000, [1, 5000], ["1"], "1", [1.5], {"eos": 1}, [[1]], True],
                         ids=str)
def test_an_eos_that_is_no_token_is_refused_with_its_file(name, value, copy):
    (copy / name).write_text(json.dumps({"eos_token_id": value}), "utf-8")
    with pytest.raises(ValueError) as refused:
        Tokenizer.load(copy)
    assert f"{name}: eos_token_id = {value!r} is not in tokenizer.json" in str(refused.value)


def test_an_end_that_is_an_ordinary_entry_is_made_of_no_text(copy):
    """"<s>" stands in the vocabulary but not among the added tokens, and ends the text."""
    edit(copy, lambda spec: spec["model"]["vocab"].update({"<s>": 800}))
    edit(copy, lambda config: config.update(eos_token="<s>"), bpe.TOKENIZER_CONFIG)
    t = Tokenizer.load(copy)
    assert t.eos_id == t.special["<s>"] == 800 and t.n_tokens == 801
    assert text_is_kept(t, b"a<s>b") and t.n_bytes[800] == 0


def spec_harm(**changes):
    return lambda folder: edit(folder, lambda spec: spec.update(changes))


def model_harm(**changes):
    return lambda folder: edit(folder, lambda spec: spec["model"].update(changes))


def config_harm(**changes):
    return lambda folder: edit(folder, lambda spec: spec.update(changes), bpe.TOKENIZER_CONFIG)


def unnamed(folder):
    (folder / bpe.TOKENIZER_CONFIG).unlink()
    text = (folder / bpe.TOKENIZER).read_text("utf-8")
    (folder / bpe.TOKENIZER).write_text(text.replace(EOS, "<stop>"), "utf-8")


def numbered(value):
    def harm(folder):
        (folder / bpe.TOKENIZER_CONFIG).unlink()
        (folder / bpe.CONFIG).write_text(json.dumps({"bos_token_id": value}), "utf-8")
    return harm


def without_byte(folder):
    edit(folder, lambda spec: spec["model"].update(merges=[], vocab={
        token: i for token, i in spec["model"]["vocab"].items() if token != "q"}))


def written(text: bytes, file: str = bpe.TOKENIZER):
    return lambda folder: (folder / file).write_bytes(text)


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
             "split": True}
def far_token(id: int):
    return lambda folder: edit(folder, lambda spec: spec["added_tokens"].append(
        dict(spec["added_tokens"][0], id=id, content="<far>")) or spec["model"]["vocab"].update(
            {"<far>": id}))


def linked(folder):
    """Another file of the user, which would come out again in a run's tokenizer."""
    (folder.parent / "secret.json").write_text('{"password": "x"}', "utf-8")
    (folder / bpe.TOKENIZER_CONFIG).unlink()
    (folder / bpe.TOKENIZER_CONFIG).symlink_to(folder.parent / "secret.json")


HARMS = {
    "far": (far_token(10**9), "id = 1000000000 is not valid: .* below"),
    "link": (linked, "tokenizer_config.json is a link to .*secret.json, outside its folder"),
    "nested": (written(b"[" * 10**6), "tokenizer.json is not JSON"),
    "nested inside": (written(b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}"), "cannot be read"),
    "cut": (lambda f: cut(f / bpe.TOKENIZER), "tokenizer.json is not JSON"),
    "garbage": (lambda f: garbage(f / bpe.TOKENIZER), "tokenizer.json is not JSON"),
    "empty": (lambda f: empty(f / bpe.TOKENIZER), "tokenizer.json is not JSON"),
    "a list": (written(b"[]"), "tokenizer.json holds list"),
    "no model": (written(b"{}"), "tokenizer.json cannot be read: Model missing"),
    "config cut": (lambda f: cut(f / bpe.TOKENIZER_CONFIG), "tokenizer_config.json is not"),
    "config a list": (written(b"[]", bpe.CONFIG), "config.json holds list"),
    "merge unknown": (model_harm(merges=[["q!", "x"]]), "tokenizer.json cannot be read: Token"),
    "bos unknown": (config_harm(bos_token="<nix>"),
                    "tokenizer_config.json: bos_token = '<nix>' is not in tokenizer.json"),
    "bos a number": (config_harm(bos_token=5), "tokenizer_config.json: bos_token = 5 is not in"),
    "id too high": (numbered(5000), "config.json: bos_token_id = 5000 is not in tokenizer.json"),
    "id a text": (numbered("0"), "config.json: bos_token_id = '0' is not in tokenizer.json"),
    "nothing named": (unnamed, "tokenizer_config.json has no eos_token, config.json no "
                               f"eos_token_id, and {EOS} is not in tokenizer.json"),
    "words": (spec_harm(model={"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0},
                               "continuing_subword_prefix": "##",
                               "max_input_chars_per_word": 9}), "the model WordPiece"),
    "unigram": (spec_harm(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
                "the model Unigram"),
    "metaspace": (spec_harm(pre_tokenizer=METASPACE), "the pre_tokenizer Metaspace: only BPE"),
    "no cutter": (spec_harm(pre_tokenizer=None), "the pre_tokenizer null: only BPE"),
    "other letters": (model_harm(merges=[], vocab={"\u2581": 5}), "not byte-level.*'\u2581'"),
    "no q": (without_byte, "tokenizer.json does not keep all text"),
    "prefix": (model_harm(continuing_subword_prefix="x"), "has a continuing_subword_prefix"),
    "suffix": (model_harm(merges=[], end_of_word_suffix="</w>"), "does not keep all text"),
    "NFC": (spec_harm(normalizer={"type": "NFC"}), "does not keep all text"),
    "lower": (spec_harm(normalizer={"type": "Lowercase"}), "does not keep all text"),
    "strip": (spec_harm(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
              "does not keep all text"),
    "space first": (spec_harm(pre_tokenizer={
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        "does not keep all text"),
    "space dropped": (spec_harm(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "WhitespaceSplit"}, {"type": "ByteLevel", "add_prefix_space": False,
                                      "trim_offsets": True, "use_regex": False}]}),
        "does not keep all text"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_released_folder_that_does_not_fit_is_refused_in_one_line(copy, name):
    harm, message = HARMS[name]
    Tokenizer.load(copy)
    harm(copy)
    with pytest.raises(ValueError, match=f"^no usable tokenizer in .*{message}") as caught:
        Tokenizer.load(copy)
    assert "\n" not in str(caught.value)


def test_a_released_tokenizer_is_saved_as_it_was(copy, tmp_path):
    (copy / bpe.CONFIG).write_text(json.dumps({"vocab_size": 1000}))
    t = Tokenizer.load(copy)
    for _ in range(2):  # again over itself
        t.save(tmp_path / "run" / "tokenizer")
    back = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert back.files == t.files and back.fingerprint == t.fingerprint
    assert same_tokenizer(back, t) and back.vocab_size == 1000
    t.save_hf(tmp_path / "hf")
    assert set(os.listdir(tmp_path / "hf")) == {bpe.TOKENIZER, bpe.TOKENIZER_CONFIG}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("x y", add_special_tokens=False) == t.encode("x y")
    (tmp_path / "thesis.txt").write_text("ten years", "utf-8")
    with pytest.raises(ValueError, match="^out = .* is not valid: it holds other files"):
        t.save(tmp_path)


def test_the_fingerprint_of_a_released_one_sees_every_part(copy):
    def swap(spec):
        merges = spec["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]

    prints = [Tokenizer.load(copy).fingerprint]
    for change in (swap, lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(0),
                   lambda spec: spec["added_tokens"].pop()):
        edit(copy, change)
        prints.append(Tokenizer.load(copy).fingerprint)
    edit(copy, lambda config: config.update(eos_token=PAD), bpe.TOKENIZER_CONFIG)
    prints.append(Tokenizer.load(copy).fingerprint)
    assert len(set(prints)) == 5 and all(len(p) == 16 for p in prints)
    edit(copy, lambda config: config.update(model_max_length=7), bpe.TOKENIZER_CONFIG)
    assert Tokenizer.load(copy).fingerprint == prints[-1]


def test_our_own_files_go_first(copy, small):
    small.save(copy.parent / "own")
    shutil.copytree(copy.parent / "own", copy, dirs_exist_ok=True)
    assert Tokenizer.load(copy).fingerprint == small.fingerprint
    (copy / module.META).unlink()  # a damaged one of ours is not passed over
    with pytest.raises(ValueError, match="meta.json is missing"):
        Tokenizer.load(copy)


def test_a_run_can_be_trained_with_a_released_tokenizer(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("minids.train.open_data",
                        partial(open_data, cache=tmp_path / "cache"))
    monkeypatch.setattr("minids.train.loss_curve", no_picture)
    monkeypatch.setattr("minids.train.Trainer.sample", short_sample)
    (copy / bpe.CONFIG).write_text(json.dumps({"vocab_size": 800}))
    (tmp_path / "texts").mkdir()
    for i in range(40):
        text = f"def f{i}():\n    return {i}  # \U0001f642\n" * 9
        (tmp_path / "texts" / f"{i}.py").write_text(text, "utf-8")
    settings = dict(data=f"text:{tmp_path / 'texts'}", out=str(tmp_path / "run"), batch_size=2,
                    seq_len=32, eval_tokens=64, threads=1, fim_rate=0.5, prompt="def \U0001f642")
    train(TrainArgs.for_preset("nano", steps=2, save_every=2, tokenizer=str(copy), **settings))
    run = open_model(tmp_path / "run")
    assert same_tokenizer(run.tokenizer, Tokenizer.load(copy))
    assert run.model.args.vocab_size == 800
    train(TrainArgs.for_preset("nano", steps=3, save_every=2, resume=True, **settings))
    assert open_model(tmp_path / "run").path.name == "step_000003"


def test_fill_in_the_middle_needs_its_tokens(copy, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"some text, number {i}")
    edit(copy, lambda spec: spec.update(
        added_tokens=[t for t in spec["added_tokens"] if t["content"] != SPECIAL[7]]))
    spec, t = f"text:{tmp_path / 'texts'}", Tokenizer.load(copy)
    assert t.fim_hole_id is None and t.fim_end_id is not None
    assert len(open_data(spec, t, 8, cache=tmp_path / "cache").valid)
    with pytest.raises(ValueError, match="^fim_rate = 0.1 is not valid: it must be 0, since"):
        open_data(spec, t, 8, fim_rate=0.1, cache=tmp_path / "cache")
