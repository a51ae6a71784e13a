"""The tokenizer loses nothing, forges nothing, and is the same each time it is built."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_checks import (
    BOS,
    COMMITTED,
    EOS,
    EVERY,
    TEXTS,
    cut,
    empty,
    garbage,
    quick,
    text_is_kept,
)

from minids.text import tokenizer as module
from minids.text.bpe import PATTERN, SPECIAL
from minids.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def variant(tokenizer: Tokenizer, **changes) -> Tokenizer:
    """Return the tokenizer with some of its parts replaced."""
    parts = dict(ranks=tokenizer.ranks, special=tokenizer.special, pattern=tokenizer.pattern,
                 made=tokenizer.made)
    return Tokenizer(**parts | changes)


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
        def encode(self, raw):
            return super().encode(raw.decode("utf-8", "replace"))

    lossy = Lossy(small.ranks, small.special, small.pattern, small.made)
    assert text_is_kept(lossy, b"plain") and text_is_kept(small, b"\xff\xfe caf\xc3")
    assert not text_is_kept(lossy, b"\xff\xfe caf\xc3")


def test_a_lone_surrogate_is_kept_as_bytes(small):
    text = "a\ud800b"
    assert small.decode_bytes(small.encode(text)) == text.encode("utf-8", "surrogatepass")
    assert small.decode(small.encode(text)) == "a\ufffd\ufffd\ufffdb"


def drops_characters(tokenizer: Tokenizer) -> bool:
    """Return whether any code point of Unicode is lost, next to others or apart from them."""
    blocks = [EVERY[start:start + 65536] for start in range(0, len(EVERY), 65536)]
    texts = (joined for block in blocks for joined in ("".join(block), "a\n ".join(block)))
    return any(tokenizer.decode(tokenizer.encode(text)) != text for text in texts)


@pytest.mark.slow
def test_the_pattern_covers_all_of_unicode(small):
    assert not drops_characters(small)


@pytest.mark.parametrize("dropped", [
    r"\p{N}{1,3}", r"\s", r" ?[\p{P}\p{S}]+[\r\n]*", r"[^\s\p{L}\p{M}\p{N}\p{P}\p{S}]+"])
def test_wrong_variant_pattern_that_lacks_an_alternative_is_caught(small, dropped):
    rest = [part for part in PATTERN.split("|") if part != dropped]
    assert len(rest) == len(PATTERN.split("|")) - 1
    assert drops_characters(variant(small, pattern="|".join(rest)))


@pytest.mark.parametrize("run", [" ", "\n", "a", "!", "1", *(
    pytest.param(run, marks=pytest.mark.slow) for run in ("\t ", "\n ", "\u3000", "=\n"))])
def test_a_very_long_run_comes_back(run):
    assert text_is_kept(COMMITTED, (run * 1_000_000 + "x").encode())


def test_wrong_variant_unbounded_space_overflows(small):
    unbounded = variant(small, pattern=PATTERN.replace("{0,256}", "*").replace("{1,256}", "+"))
    with pytest.raises(BaseException, match="StackOverflow"):  # Rust's panic is no Exception
        unbounded.encode(" " * 1_000_000 + "x")


def stays_text(encode) -> bool:
    """Return whether text that spells special tokens encodes to ordinary ids only."""
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


def test_decode_skips_rows_that_only_a_model_has():
    t = Tokenizer.train([], 280)
    for more in (320, 10**9):
        assert t.decode([24 + ord("a"), more, 24 + ord("b")]) == "ab"
    assert t.decode(torch.tensor([320])) == ""


@pytest.mark.parametrize("bad", [-1, -320])
def test_decode_names_a_negative_id(bad):
    with pytest.raises(ValueError, match=f"^id {bad} is not valid: it must be 0 or more$"):
        Tokenizer.train([], 280).decode([30, bad])


def test_n_bytes_counts_no_special_and_no_unused_id(small):
    bare = Tokenizer.train([], 280)
    assert bare.n_bytes.dtype == torch.int64 and bare.n_bytes.shape == (bare.vocab_size,)
    assert bare.n_bytes.tolist() == [0] * 24 + [1] * 256 + [0] * 40
    assert (small.n_bytes[280:small.n_tokens] >= 2).all()


def test_batches_equal_single_calls_in_order(small):
    texts = TEXTS + ["", b"\xff"]
    assert small.encode_batch(texts, threads=3) == [small.encode(text) for text in texts]


def test_retraining_to_the_same_path_is_seen(small, tmp_path):
    """tiktoken's own loader caches local files by path; ours must not."""
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


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


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


def forged(t: Tokenizer, folder, pattern: str = PATTERN, special=None, **ranks) -> None:
    """Write a folder whose fingerprint fits what it holds; ranks: ids of single bytes."""
    ranks = t.ranks | {name.encode(): i for name, i in ranks.items()}
    ranks, special = {p: i for p, i in ranks.items() if i is not None}, special or t.special
    meta = dict(fingerprint=module.fingerprint(ranks, special, pattern), made={}, pattern=pattern,
                special=special)
    module.write_files(folder, {module.META: meta, module.RANKS: "".join(
        module.rank_line(piece, i) + "\n" for piece, i in ranks.items())})


@pytest.mark.parametrize("changes, told", [
    (dict(a=10**9), "id = 1000000000 is not valid: it must be a whole number "),
    (dict(a=-1), "id = -1 is not valid"), (dict(a=99), "two of its tokens"),
    (dict(a=2**64), "id = 18446744073709551616 is not valid"),
    (dict(a=None), "one of the 256 bytes has no id"), (dict(pattern="("), "Parsing error"),
    (dict(pattern="[a-z]+"), "the pattern in meta.json leaves out some text"),
    (dict(pattern=5), "cannot be converted|not an instance of 'str'"),
    (dict(special=dict(x=True)), "id = True is not valid"),
    (dict(special=dict(x="7")), "id = '7' is not valid"),
    (dict(special=dict(x=10**12)), "id = 1000000000000 is not valid")])
def test_a_folder_that_fits_its_fingerprint_is_checked_before_memory_is_taken(
        small, tmp_path, changes, told):
    """tiktoken would allocate for the highest id, and ends the process for the others."""
    forged(small, tmp_path)
    assert Tokenizer.load(tmp_path).n_tokens == small.n_tokens
    forged(small, tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^no whole tokenizer in .*({told})"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("size", [2**20 + 1, 99_999_999_999, 10**30])
def test_a_size_that_no_vocabulary_has_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size = {size} is not valid: .* 1048576"):
        Tokenizer.train(["a b c"], size)


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


def test_made_says_what_was_read(small, tmp_path):
    raw = [text.encode() for text in TEXTS]
    whole = hashlib.sha256(b"".join(hashlib.sha256(r).digest() for r in raw)).hexdigest()
    assert (small.made["documents"], small.made["bytes"]) == (3, sum(map(len, raw)))
    assert small.made["sha256"] == whole and small.made["corpus"] == "three files"
    small.save(tmp_path)
    meta = json.loads((tmp_path / module.META).read_text("utf-8"))
    assert meta["n_tokens"] == small.n_tokens == meta["made"]["vocab_size"] == 512


def test_open_takes_a_folder_bytes_or_nothing(small, tmp_path):
    small.save(tmp_path)
    assert Tokenizer.open(str(tmp_path)).fingerprint == small.fingerprint
    assert Tokenizer.open("").fingerprint == COMMITTED.fingerprint
    assert Tokenizer.open("bytes").n_tokens == 24 + 256
