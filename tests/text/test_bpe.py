"""Byte-pair merges, and the same tokenizer in the Hugging Face library and back."""

import json
import os

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_checks import (
    BOS,
    COMMITTED,
    EOS,
    EVERY,
    SPELLED,
    TEXTS,
    TRICKY,
    VALID,
    differing,
    edit,
    mixed,
    quick,
    same_tokenizer,
)
from transformers import AutoTokenizer

from minids.text import bpe
from minids.text.bpe import PATTERN, SPECIAL
from minids.text.tokenizer import ReleasedTokenizer, Tokenizer


def test_transformers_gives_the_same_ids(exported):
    theirs = AutoTokenizer.from_pretrained(exported)
    texts = [*VALID, *TRICKY, SPELLED]
    assert sum(map(len, VALID)) > 300_000
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


@pytest.mark.parametrize("each", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_the_export_agrees_on_all_of_unicode(exported, each):
    back = Tokenizer.load(exported)
    texts = ["".join(EVERY[::each]), "a\n ".join(EVERY[::50])]
    assert differing(COMMITTED.encode, back.encode, texts) == []


@pytest.fixture(scope="module")
def both(exported) -> tuple[Tokenizer, object]:
    """Return the exported tokenizer as minids and as transformers read it."""
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
    """Compare with the trainer's own list: "the" may be t + he or th + e."""
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
    edit(tmp_path, harm)
    assert differing(COMMITTED.encode, Tokenizer.load(tmp_path).encode, TEXTS) != []
