"""Loaders: nothing lost, nothing repeated, one token ahead, and every position resumes."""

import json

import numpy as np
import pytest
import torch
from byte_tokens import (
    RAMP,
    TOKENIZER,
    decode,
    equal,
    fails,
    reassemble,
    split_documents,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.text import loaders
from minids.text.corpora import open_corpus
from minids.text.loaders import PackedLoader, StreamLoader, open_data
from minids.text.packing import encode_documents


def counting(n: int) -> np.ndarray:
    """Return the tokens 0 .. n-1: each token is its own position."""
    return np.arange(n, dtype="<u2")


def check_epoch(batches, n: int, seq_len: int):
    """Assert that an epoch has every token at most once, and all but n % seq_len of them."""
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


@pytest.mark.parametrize("n, seq_len", [(97, 8), (20, 19), (2**16, 3)])
def test_targets_are_one_token_ahead_also_round_the_end(n, seq_len):
    loader = PackedLoader(counting(n), seq_len)
    for _ in range(30):
        tokens, targets = loader.next_batch(3)
        assert tokens.shape == targets.shape == (3, seq_len)
        assert tokens.dtype == targets.dtype == torch.int64
        check_targets(tokens, targets, n)


def test_wrong_targets_are_noticed():
    tokens, _ = PackedLoader(counting(97), 8).next_batch(3)
    assert fails(check_targets, tokens, (tokens + 2) % 97, 97)
    assert fails(check_targets, tokens, tokens, 97)


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
    monkeypatch.setattr(loaders, "SHUFFLE_BLOCK", 40)
    monkeypatch.setattr(loaders, "STREAM_DOCUMENTS", 6)


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
    """Return whether a part of the state holds something after `done` batches."""
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


def test_a_stream_reads_no_more_than_a_batch_needs():
    """The tokens of a batch, and the target of the last one."""
    for sizes, read in (([13, 9], 1), ([12, 9], 2), ([6, 7, 9], 2)):
        parts = map(np.arange, sizes)
        StreamLoader(ListStream([]), TOKENIZER, 4, deal=lambda *_, parts=parts: next(parts)
                     ).next_batch(3)
        assert len([*parts]) == len(sizes) - read


def test_empty_stream_is_refused():
    with pytest.raises(ValueError, match="no document left to train on"):
        StreamLoader(ListStream([]), TOKENIZER, 4).next_batch(1)


def test_open_data_on_a_folder(folder, tmp_path, capsys, monkeypatch):
    def opened(**settings_):
        return open_data(f"text:{folder}", TOKENIZER, 16, cache=tmp_path / "cache", **settings_)

    data = opened(fim_rate=0.5)
    corpus = open_corpus(f"text:{folder}")
    assert data.n_train_tokens == len(data.loader.tokens)
    assert data.valid.dtype == torch.int64 and data.valid.ndim == 1
    assert [decode(d) for d in split_documents(data.valid)] == list(corpus.valid)  # never FIM
    counted = f"{data.n_train_tokens:,} training tokens, {len(data.valid):,} validation tokens"
    told = f"text:{folder}: {counted}, content {corpus.fingerprint[:12]}"
    assert data.describe().split("; ") == [told, *([corpus.note] if corpus.note else [])]
    assert equal(take(data.loader, RAMP), take(opened(fim_rate=0.5).loader, RAMP))
    state = data.loader.state_dict()
    with pytest.raises(ValueError, match="fim_rate = 0.0 does not fit"):
        opened().loader.load_state_dict(state)
    monkeypatch.setattr(loaders, "MAX_VALID_TOKENS", 5)
    assert torch.equal(opened().valid, data.valid[:5])
    assert capsys.readouterr().err == ""  # no progress bar off a terminal
