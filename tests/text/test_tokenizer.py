"""The tokenizer loses nothing, forges nothing, and is the same each time it is built."""

import codecs
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiktoken
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import minids.tokenizer as program
from minids.base.command_line import run_program
from minids.runs.checkpoints import load_run
from minids.runs.settings import TrainArgs
from minids.text import bpe
from minids.text import tokenizer as module
from minids.text.bpe import PATTERN, SPECIAL
from minids.text.corpora import open_corpus
from minids.text.loaders import open_data
from minids.text.tokenizer import ReleasedTokenizer, Tokenizer
from minids.train import train

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(os.__file__).parent
TEXTS = [(LIBRARY / f"{name}.py").read_text("utf-8") for name in "argparse ast shutil".split()]
BOS, EOS = SPECIAL[:2]
quick = settings(max_examples=200, deadline=None)  # the first example pays for the set-up


@pytest.fixture(scope="module")
def small():
    """512 ids, trained on three files of Python's library."""
    return Tokenizer.train(TEXTS, 512, corpus="three files")


COMMITTED = Tokenizer.load()


def variant(tokenizer: Tokenizer, **changes) -> Tokenizer:
    """The same tokenizer with another pattern or other ranks."""
    parts = dict(ranks=tokenizer.ranks, special=tokenizer.special, pattern=tokenizer.pattern,
                 made=tokenizer.made)
    return Tokenizer(**parts | changes)



def text_is_kept(tokenizer: Tokenizer, raw: bytes) -> bool:
    """The bytes come back from ordinary tokens, whose lengths add up to them."""
    ids = tokenizer.encode(raw)
    return (tokenizer.decode_bytes(ids) == raw
            and set(ids).isdisjoint(tokenizer.special.values())
            and tokenizer.n_bytes[ids].sum().item() == len(raw))


@quick
@given(st.binary(max_size=200))
def test_any_bytes_come_back(raw):
    assert text_is_kept(COMMITTED, raw)


@quick
@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_comes_back(text):
    ids = COMMITTED.encode(text)
    assert COMMITTED.decode(ids) == text
    assert COMMITTED.encode(text.encode()) == ids
    assert text_is_kept(COMMITTED, text.encode())


@quick
@given(st.text(st.sampled_from(" \t\r\n\f\u00a0\u2028aé1_.(中🙂\u0301\x00"), max_size=60))
def test_any_mixture_of_space_and_words_comes_back(text):
    assert text_is_kept(COMMITTED, text.encode())


def test_wrong_variant_decoding_bytes_with_replacement_is_caught(small):
    class Lossy(Tokenizer):
        def _encode_invalid(self, raw):
            return self.encode(raw.decode("utf-8", "replace"))

    lossy = Lossy(small.ranks, small.special, small.pattern, small.made)
    assert text_is_kept(lossy, b"plain") and text_is_kept(small, b"\xff\xfe caf\xc3")
    assert not text_is_kept(lossy, b"\xff\xfe caf\xc3")


def test_a_lone_surrogate_is_kept_as_bytes(small):
    text = "a\ud800b"
    assert small.decode_bytes(small.encode(text)) == text.encode("utf-8", "surrogatepass")
    assert small.decode(small.encode(text)) == "a\ufffd\ufffd\ufffdb"


EVERY = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]


def drops_characters(tokenizer: Tokenizer) -> bool:
    """Whether any of Unicode's code points does not come back, side by side or apart."""
    blocks = [EVERY[start:start + 65536] for start in range(0, len(EVERY), 65536)]
    texts = (joined for block in blocks for joined in ("".join(block), "a\n ".join(block)))
    return any(tokenizer.decode(tokenizer.encode(text)) != text for text in texts)


def test_the_pattern_covers_all_of_unicode(small):
    assert not drops_characters(small)


@pytest.mark.parametrize("dropped", [
    r"\p{N}{1,3}", r"\s", r" ?[\p{P}\p{S}]+[\r\n]*", r"[^\s\p{L}\p{M}\p{N}\p{P}\p{S}]+"])
def test_wrong_variant_pattern_that_lacks_an_alternative_is_caught(small, dropped):
    rest = [part for part in PATTERN.split("|") if part != dropped]
    assert len(rest) == len(PATTERN.split("|")) - 1
    assert drops_characters(variant(small, pattern="|".join(rest)))


@pytest.mark.parametrize("run", [" ", "\n", "\t ", "a", "!", "\n ", "1", "\u3000", "=\n"])
def test_a_very_long_run_comes_back(run):
    assert text_is_kept(COMMITTED, (run * 1_000_000 + "x").encode())


def test_wrong_variant_unbounded_space_overflows(small):
    unbounded = variant(small, pattern=PATTERN.replace("{0,256}", "*").replace("{1,256}", "+"))
    with pytest.raises(BaseException, match="StackOverflow"):  # Rust's panic is no Exception
        unbounded.encode(" " * 1_000_000 + "x")



def stays_text(encode) -> bool:
    """Text that spells special tokens gives ordinary ids only."""
    text = "".join(SPECIAL) + f"x {BOS}y"
    return all(token >= len(SPECIAL) for token in encode(text))


def test_text_that_looks_special_stays_text(small):
    assert stays_text(small.encode) and stays_text(COMMITTED.encode)
    assert small.decode(small.encode(EOS)) == EOS


def test_wrong_variant_that_allows_special_tokens_is_caught(small):
    unsafe = tiktoken.Encoding(name="unsafe", pat_str=PATTERN, mergeable_ranks=small.ranks,
                               special_tokens=small.special)
    assert not stays_text(lambda text: unsafe.encode(text, allowed_special="all"))


def test_the_special_ids_are_fixed():
    """A change here makes every earlier checkpoint unreadable."""
    assert list(COMMITTED.special.items())[:14] == [
        ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", 0),
        ("<\uff5cend\u2581of\u2581sentence\uff5c>", 1),
        ("<\uff5cUser\uff5c>", 2), ("<\uff5cAssistant\uff5c>", 3), ("<think>", 4),
        ("</think>", 5), ("<\uff5cfim\u2581begin\uff5c>", 6), ("<\uff5cfim\u2581hole\uff5c>", 7),
        ("<\uff5cfim\u2581end\uff5c>", 8), ("<\uff5ctool\u2581calls\u2581begin\uff5c>", 9),
        ("<\uff5ctool\u2581call\u2581begin\uff5c>", 10), ("<\uff5ctool\u2581sep\uff5c>", 11),
        ("<\uff5ctool\u2581call\u2581end\uff5c>", 12),
        ("<\uff5ctool\u2581calls\u2581end\uff5c>", 13)]
    assert list(COMMITTED.special.values()) == list(range(24)) and len(SPECIAL) == 24
    t = COMMITTED
    assert [t.bos_id, t.eos_id, t.user_id, t.assistant_id, t.think_id, t.end_think_id,
            t.fim_begin_id, t.fim_hole_id, t.fim_end_id] == list(range(9))
    assert [COMMITTED.ranks[bytes([b])] for b in range(256)] == list(range(24, 280))



def test_decode_renders_special_ids_and_skips_unused_ones():
    t = Tokenizer.train([], 280)
    assert (t.n_tokens, t.vocab_size) == (280, 320)
    assert t.decode([t.bos_id, 24 + ord("a"), 300, t.eos_id]) == f"{BOS}a{EOS}"
    assert t.decode([24 + 0xFF]) == "\ufffd" and t.decode_bytes([24 + 0xFF]) == b"\xff"
    assert t.decode(torch.tensor([24 + ord("b")])) == "b" and t.decode([]) == ""


@pytest.mark.parametrize("bad", [-1, 320, 10**9])
def test_decode_names_an_id_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match=f"^id {bad} is not in the vocabulary: .* 0 to 319$"):
        Tokenizer.train([], 280).decode([30, bad])


def test_n_bytes_counts_no_special_and_no_unused_id(small):
    bare = Tokenizer.train([], 280)
    assert bare.n_bytes.dtype == torch.int64 and bare.n_bytes.shape == (bare.vocab_size,)
    assert bare.n_bytes.tolist() == [0] * 24 + [1] * 256 + [0] * 40
    assert (small.n_bytes[280:small.n_tokens] >= 2).all()


def test_batches_equal_single_calls_in_order(small):
    texts = TEXTS + ["", b"\xff"]
    assert small.encode_batch(texts, threads=3) == [small.encode(text) for text in texts]



TRAIN = """
import sys
from pathlib import Path
from minids.tokenizer import Tokenizer
Tokenizer.train([Path(path).read_text("utf-8") for path in sys.argv[2:]], 2048).save(sys.argv[1])
"""


def test_order_threads_and_hash_seed_change_no_merge(tmp_path):
    """Ties abound among the rare pairs of a small text, so an unstable order would show."""
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



def test_retraining_to_the_same_path_is_seen(small, tmp_path):
    """tiktoken's own loader caches a local file by its path; this one must not."""
    loaded = []
    for tokenizer in (small, Tokenizer.train(TEXTS, 600)):
        tokenizer.save(tmp_path / "t")
        back = Tokenizer.load(tmp_path / "t")
        loaded.append(back)
        assert back.fingerprint == tokenizer.fingerprint and back.ranks == tokenizer.ranks
        assert (back.special, back.pattern, back.made) == (
            tokenizer.special, tokenizer.pattern, tokenizer.made)
        assert back.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded[0].fingerprint != loaded[1].fingerprint
    assert sorted(os.listdir(tmp_path / "t")) == [module.META, module.RANKS]


def test_wrong_variant_that_caches_by_path_is_caught(small, tmp_path, monkeypatch):
    cache = {}
    read = module.read_ranks
    monkeypatch.setattr(module, "read_ranks", lambda path: cache.setdefault(path, read(path)))
    with pytest.raises(ValueError, match="do not belong together"):
        test_retraining_to_the_same_path_is_seen(small, tmp_path)


def test_the_fingerprint_sees_every_part(small):
    pieces = list(small.ranks)
    pieces[-1], pieces[-2] = pieces[-2], pieces[-1]  # the last two merges in the other order
    swapped = variant(small, ranks={piece: 24 + i for i, piece in enumerate(pieces)})
    changed = variant(small, ranks={piece if token < 511 else b"q!q": token
                                    for piece, token in small.ranks.items()})
    special = dict(zip(reversed(SPECIAL), small.special.values(), strict=True))
    prints = [t.fingerprint for t in (
        small, swapped, changed, variant(small, special=special),
        variant(small, pattern=PATTERN + "|x"))]
    assert len(set(prints)) == 5 and all(len(p) == 16 for p in prints)
    assert variant(small, made={}).fingerprint == small.fingerprint


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def garbage(path):
    path.write_bytes(b"\xff\x00 not a tokenizer\n")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("file", [module.RANKS, module.META])
@pytest.mark.parametrize("harm", [cut, flip, garbage, empty, Path.unlink])
def test_a_harmed_folder_is_refused_in_one_line(small, tmp_path, file, harm):
    small.save(tmp_path)
    harm(tmp_path / file)
    with pytest.raises(ValueError, match="^no whole tokenizer in ") as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and "python -m minids.tokenizer" in message


def test_no_flipped_bit_of_the_ranks_passes(small, tmp_path):
    small.save(tmp_path)
    whole = (tmp_path / module.RANKS).read_bytes()
    spare = whole.index(b"=") - 1  # AA== and AC== decode to the same byte
    places = [*range(0, len(whole) - 1, 11), spare, whole.index(b"\n")]
    for place, bit in itertools.product(places, (1, 2)):
        (tmp_path / module.RANKS).write_bytes(
            whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1:])
        with pytest.raises(ValueError, match="^no whole tokenizer in "):
            Tokenizer.load(tmp_path)


def test_a_key_or_folder_that_is_missing_is_named(small, tmp_path):
    with pytest.raises(ValueError, match="meta.json is missing"):
        Tokenizer.load(tmp_path / "nowhere")
    small.save(tmp_path)
    meta = json.loads((tmp_path / module.META).read_text("utf-8"))
    del meta["pattern"]
    (tmp_path / module.META).write_text(json.dumps(meta), "utf-8")
    with pytest.raises(ValueError, match="meta.json has no 'pattern'"):
        Tokenizer.load(tmp_path)


def test_other_peoples_folders_are_left_alone(small, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years", "utf-8")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="^out = .* is not valid: it "):
            small.save(target)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_the_committed_one_fits_the_models():
    assert COMMITTED.n_tokens == COMMITTED.made["vocab_size"] <= COMMITTED.vocab_size
    assert COMMITTED.vocab_size % 64 == 0
    assert COMMITTED.pattern == PATTERN and tuple(COMMITTED.special) == SPECIAL
    assert COMMITTED.made["corpus"] == "pystdlib"



@dataclasses.dataclass
class FakeCorpus:
    train: list
    valid: list


def test_the_command_builds_and_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("minids.tokenizer.open_corpus",
                        lambda name: FakeCorpus(TEXTS[1:], TEXTS[:1]))
    args = program.TokenizerArgs(vocab_size=400, out=str(tmp_path / "t"))
    built = program.build(args)
    assert Tokenizer.load(tmp_path / "t").fingerprint == built.fingerprint
    expected = len(TEXTS[0].encode()) / len(built.encode(TEXTS[0]))
    assert f"validation text: {expected:.3f} bytes per token" in capsys.readouterr().out


def test_a_stream_is_read_no_further_than_asked():
    endless = iter(lambda: "abcd", "")
    assert list(program.first_bytes(endless, 10)) == ["abcd"] * 3
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


# To the Hugging Face library and back.


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The committed tokenizer as transformers reads it."""
    folder = tmp_path_factory.mktemp("exported")
    COMMITTED.save_hf(folder)
    return folder


HELD_OUT = list(open_corpus("pystdlib").valid)
TRICKY = ["", " ", "  a", "a  ", "\r\n\t \n", " " * 700 + "x", "a\x00\x7f", "1234567", "don't",
          "na\u00efve e\u0301 \ufb01", "\u4e2d\u6587\u3068\u304b\u306a abc", "x\U0001f642y",
          "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0627\u0644\u0639", "a\u00a0b\u3000c\u2028d",
          "\u00c0\u00f5\u00ff", "print(\"x\")\n\n\n    return", "<|EOT|> <s> </s>"]
SPELLED = "".join(SPECIAL) + f"x {BOS}y<think></think><\uff5cUser\uff5c><|EOT|>"


def differing(one, other, texts) -> list[str]:
    """The texts to which two ways of encoding give different ids."""
    return [text for text in texts if one(text) != other(text)]


def test_transformers_gives_the_same_ids(exported):
    theirs = AutoTokenizer.from_pretrained(exported)
    texts = [*HELD_OUT, *TRICKY, SPELLED]
    assert sum(map(len, HELD_OUT)) > 300_000
    assert differing(COMMITTED.encode, theirs.encode, texts) == []
    assert theirs(SPELLED).input_ids == COMMITTED.encode(SPELLED)  # nor is BOS put in front


def test_transformers_knows_the_special_tokens(exported):
    theirs = AutoTokenizer.from_pretrained(exported)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (COMMITTED.bos_id, COMMITTED.eos_id)
    assert theirs.convert_tokens_to_ids(list(SPECIAL)) == list(range(24))
    assert theirs.encode("".join(SPECIAL), split_special_tokens=False) == list(range(24))
    ids = [COMMITTED.bos_id, *COMMITTED.encode("x \U0001f642\n"), COMMITTED.eos_id]
    assert theirs.decode(ids) == COMMITTED.decode(ids) == f"{BOS}x \U0001f642\n{EOS}"
    assert theirs.decode(ids, skip_special_tokens=True) == "x \U0001f642\n"
    assert len(theirs) == COMMITTED.n_tokens


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Equal in all that other modules read."""
    names = ("n_tokens vocab_size special ranks bos_id eos_id user_id assistant_id think_id "
             "end_think_id fim_begin_id fim_hole_id fim_end_id").split()
    every = range(one.vocab_size)
    return (all(getattr(one, name) == getattr(other, name) for name in names)
            and torch.equal(one.n_bytes, other.n_bytes)
            and one.decode_bytes(every) == other.decode_bytes(every))


def test_the_exported_one_comes_back_equal(exported, small, tmp_path):
    bare = Tokenizer.train([], 280)  # no merge, and unused rows
    for name, mine in (("committed", COMMITTED), ("small", small), ("bare", bare)):
        mine.save_hf(tmp_path / name)
        back = Tokenizer.load(tmp_path / name)
        assert type(back) is ReleasedTokenizer and same_tokenizer(mine, back)
        texts = [*TEXTS, *TRICKY, SPELLED, b"\xff\xfe caf\xc3", "a\ud800b"]
        assert differing(mine.encode, back.encode, texts) == []
        assert back.encode_batch(texts, threads=2) == mine.encode_batch(texts, threads=2)
    assert not same_tokenizer(small, Tokenizer.load(tmp_path / "bare"))


def test_the_export_agrees_on_all_of_unicode(exported):
    back = Tokenizer.load(exported)
    texts = ["".join(EVERY), "a\n ".join(EVERY[::50])]
    assert differing(COMMITTED.encode, back.encode, texts) == []


mixed = st.text(max_size=150, alphabet=st.one_of(
    st.characters(codec="utf-8"), st.sampled_from(" \t\r\na1_.('\u4e2d\U0001f642\u0301\x00")))


@pytest.fixture(scope="module")
def both(exported) -> tuple[Tokenizer, object]:
    """The exported folder, read by minids and by transformers."""
    return Tokenizer.load(exported), AutoTokenizer.from_pretrained(exported)


@quick
@given(text=mixed)
def test_any_text_has_the_same_ids_in_all_three(both, text):
    ids = COMMITTED.encode(text)
    assert both[0].encode(text) == ids and both[1].encode(text) == ids


@quick
@given(raw=st.binary(max_size=100))
def test_any_bytes_have_the_same_ids_after_the_export(both, raw):
    assert both[0].encode(raw) == COMMITTED.encode(raw)


def test_every_merge_is_of_two_earlier_tokens():
    pairs = bpe.merge_pairs(COMMITTED.ranks)
    assert [left + right for left, right in pairs] == list(COMMITTED.ranks)[256:]
    for left, right in pairs:
        own = COMMITTED.ranks[left + right]
        assert COMMITTED.ranks[left] < own and COMMITTED.ranks[right] < own
    assert len(pairs) + len(SPECIAL) + 256 == COMMITTED.n_tokens


def test_the_merges_are_those_that_were_learnt():
    """The trainer's own list, before it is thrown away; of "the" it may be t + he or th + e."""
    engine = bpe.byte_level_bpe(tokenizers.models.BPE(), PATTERN)
    engine.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=1256, show_progress=False, initial_alphabet=list(bpe.printable_bytes())))
    model = json.loads(engine.to_str())["model"]
    ranks = bpe.byte_ranks(model["vocab"])
    byte_of = bpe.printable_bytes()
    learnt = [tuple(bytes(byte_of[c] for c in part) for part in pair) for pair in model["merges"]]
    assert bpe.merge_pairs(ranks) == learnt and len(learnt) == 1000
    first_byte = [(piece[:1], piece[1:]) for piece in sorted(ranks, key=ranks.get)[256:]]
    assert first_byte != learnt  # wrong variant


def test_a_token_that_no_merge_gives_is_refused(tmp_path):
    ranks = {bytes([b]): 24 + b for b in range(256)} | {b"abc": 280}
    special = {text: i for i, text in enumerate(SPECIAL)}
    with pytest.raises(ValueError, match="token b'abc' is not the merge of two earlier ones"):
        Tokenizer(ranks, special, PATTERN, {}).save_hf(tmp_path)
    assert os.listdir(tmp_path) == []


def edit(folder: Path, change, file: str = bpe.TOKENIZER) -> None:
    """Change the JSON of a file in place."""
    value = json.loads((folder / file).read_text("utf-8"))
    change(value)
    (folder / file).write_text(json.dumps(value), "utf-8")


def merges_backwards(spec):
    spec["model"]["merges"].reverse()


def no_merges(spec):
    spec["model"]["merges"].clear()


def gpt2_pattern(spec):
    spec["pre_tokenizer"]["pretokenizers"] = [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]


def pattern_then_gpt2(spec):
    spec["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = True


def no_pattern(spec):
    del spec["pre_tokenizer"]["pretokenizers"][0]


@pytest.mark.parametrize("harm", [
    merges_backwards, no_merges, gpt2_pattern, pattern_then_gpt2, no_pattern])
def test_wrong_variant_of_the_export_is_caught(tmp_path, harm):
    COMMITTED.save_hf(tmp_path)
    assert differing(COMMITTED.encode, Tokenizer.load(tmp_path).encode, TEXTS) == []
    edit(tmp_path, harm)
    assert differing(COMMITTED.encode, Tokenizer.load(tmp_path).encode, TEXTS) != []


# A released model's folder: a miniature in the format of DeepSeek-V3's.

SPLITS = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "|".join((
    r"[!-/:-@\[-`{-~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")))
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
MARKED = [*SPECIAL[14:], "<|EOT|>"]  # special in the file; those of UNMARKED are only "added"
UNMARKED = [*SPECIAL[2:14]]
LEARNT_FROM = TEXTS[2][:8000] + ("\u4e2d\u6587\u5206\u8bcd\u3068\u304b\u306a "
                                 "na\u00efve caf\u00e9 \U0001f642\U0001f680 ") * 40
UNUSED_BYTES = [0xC0, 0xC1, *range(0xF5, 0x100)]  # in no UTF-8 text


def miniature(alphabet) -> tokenizers.Tokenizer:
    """700 tokens, BOS, EOS and padding the first of them, and the added tokens after them."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.normalizer = tokenizers.normalizers.Sequence([])
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [*(tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
           for split in SPLITS), byte_level])
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    engine.train_from_iterator([LEARNT_FROM], tokenizers.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=alphabet,
        special_tokens=[BOS, EOS, PAD]))
    engine.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in MARKED])
    engine.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in UNMARKED])
    return engine


def added(content: str) -> dict:
    """A token as tokenizer_config.json has it."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True,
            "rstrip": False, "single_word": False}


V3_CONFIG = {"add_bos_token": True, "add_eos_token": False, "bos_token": added(BOS),
             "eos_token": added(EOS), "pad_token": added(EOS), "legacy": True, "unk_token": None,
             "clean_up_tokenization_spaces": False, "model_max_length": 131072,
             "tokenizer_class": "LlamaTokenizerFast"}


def write_released(folder: Path, alphabet=None) -> Path:
    """tokenizer.json and tokenizer_config.json of the miniature."""
    folder.mkdir(parents=True, exist_ok=True)
    miniature(alphabet or list(bpe.printable_bytes())).save(str(folder / bpe.TOKENIZER))
    (folder / bpe.TOKENIZER_CONFIG).write_text(json.dumps(V3_CONFIG), "utf-8")
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The folder of a released model, without the model."""
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def copy(released, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(released, tmp_path / "copy"))


@pytest.fixture(scope="module")
def read(released) -> tuple[ReleasedTokenizer, object]:
    """The same folder, read by minids and by transformers."""
    return Tokenizer.load(released), AutoTokenizer.from_pretrained(released)


def theirs_as_text(theirs, text: str) -> list[int]:
    """The library's own parts one after the other, past its search for added tokens."""
    engine = theirs.backend_tokenizer
    pieces = [piece for piece, _ in engine.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for piece in pieces for token in engine.model.tokenize(piece)]


def test_a_released_folder_is_read_as_transformers_reads_it(read):
    mine, theirs = read
    texts = [*TEXTS, *HELD_OUT[:5], LEARNT_FROM, *TRICKY[:-1]]
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
    """The library's own switch leaves alone those marked special, and no others."""
    mine = Tokenizer.load(released)
    assert text_is_kept(mine, SPELLED.encode())
    mine._engine = bpe.read_engine(mine.files[bpe.TOKENIZER])
    mine._engine.encode_special_tokens = switch
    assert mine.special[BOS] not in mine.encode(BOS) or not switch
    assert not text_is_kept(mine, SPELLED.encode())


def streamed(decode_bytes, ids) -> str:
    """What a reader sees who is given one token after the other."""
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
    assert mine.decode([mine.n_tokens]) == ""
    with pytest.raises(ValueError, match="^id 768 is not in the vocabulary: .* 0 to 767$"):
        mine.decode([768])


def test_the_rows_are_those_of_the_model_beside(copy):
    for rows, expected in ((1000, 1000), (723, 723), (722, 768), (None, 768), ("9", 768)):
        (copy / bpe.CONFIG).write_text(json.dumps({"vocab_size": rows}))
        t = Tokenizer.load(copy)
        assert t.n_tokens == 723 and t.vocab_size == len(t.n_bytes) == expected
        assert t.decode([expected - 1]) == (SPECIAL[13] if expected == 723 else "")


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
    """Truncation, padding, BOS by template and random merges are for others."""
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
    """BOS and EOS."""
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
HARMS = {
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
    (copy / bpe.CONFIG).write_text(json.dumps({"vocab_size": 800}))
    (tmp_path / "texts").mkdir()
    for i in range(40):
        text = f"def f{i}():\n    return {i}  # \U0001f642\n" * 9
        (tmp_path / "texts" / f"{i}.py").write_text(text, "utf-8")
    settings = dict(data=f"text:{tmp_path / 'texts'}", out=str(tmp_path / "run"), batch_size=2,
                    seq_len=32, eval_tokens=64, threads=1, fim_rate=0.5, prompt="def \U0001f642")
    train(TrainArgs.for_preset("nano", steps=2, save_every=2, tokenizer=str(copy), **settings))
    run = load_run(tmp_path / "run")
    assert same_tokenizer(run.tokenizer, Tokenizer.load(copy))
    assert run.model.args.vocab_size == 800
    train(TrainArgs.for_preset("nano", steps=3, save_every=2, resume=True, **settings))
    assert load_run(tmp_path / "run").checkpoint.name == "step_000003"


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
