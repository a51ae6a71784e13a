"""Packing: every document once, between BOS and EOS, whole again after fill-in-the-middle."""

import numpy as np
import pytest
from byte_tokens import TOKENIZER, decode, fails, reassemble, split_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.text.packing import encode_documents, pieces

TEXTS = ["first document\n", "zwei, é and 語\n", "x", "def f():\n    return 1\n" * 3]


def check_packing(ids):
    assert [decode(d) for d in split_documents(ids)] == TEXTS


def test_documents_stand_between_bos_and_eos():
    ids = encode_documents(TEXTS, TOKENIZER)
    check_packing(ids)
    # Wrong: without EOS, without BOS, a token lost.
    for wrong in (ids[ids != TOKENIZER.eos_id], ids[ids != TOKENIZER.bos_id], np.delete(ids, 3)):
        assert fails(check_packing, wrong)


@settings(deadline=None)
@given(st.text(alphabet="ab\n é"), st.integers(1, 9))
def test_pieces_are_the_text(text, longest):
    parts = list(pieces(text, longest))
    assert "".join(parts) == text and all(0 < len(p) <= longest for p in parts)
    assert all(p.endswith("\n") for p in parts[:-1] if "\n" in p)  # cut after a line


def test_what_fits_is_not_cut():
    assert list(pieces("a\nbc", 4)) == ["a\nbc"] and list(pieces("a\nbc", 3)) == ["a\n", "bc"]


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


def test_an_empty_document_can_be_cut():
    """A data set of the hub may hold empty rows; the cut of one has three empty parts."""
    t = TOKENIZER
    whole, cut = (encode_documents(["", "a", ""], t, fim_rate=rate).tolist() for rate in (0.0, 1.0))
    assert whole == [t.bos_id, t.eos_id, t.bos_id, *t.encode("a"), t.eos_id, t.bos_id, t.eos_id]
    empty = [t.bos_id, t.fim_begin_id, t.fim_hole_id, t.fim_end_id, t.eos_id]
    assert cut[:5] == cut[-5:] == empty
    check_fim(np.array(cut), ["", "a", ""])
