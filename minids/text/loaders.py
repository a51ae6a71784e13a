"""Cut tokens into batches, and resume at exactly the next batch.

    data = open_data("pystdlib", tokenizer, seq_len=256)
    tokens, targets = data.loader.next_batch(8)      # (8, 256) each, targets one token ahead

A loader's position is a few numbers in a checkpoint: the order of an epoch is computed from
(seed, epoch), never stored.

Simplified: a file of plain text is held in memory; one rank reads a stream for all.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from minids.base.fields import demand
from minids.text.corpora import open_corpus
from minids.text.packing import encode_documents
from minids.text.token_cache import CACHE, cached_tokens

SHUFFLE_BLOCK = 2048      # documents of a stream that are shuffled together
STREAM_DOCUMENTS = 32     # documents of a stream that are tokenised at once
MAX_VALID_TOKENS = 2**24  # validation reads no more than this


def check_state(state: dict, here: dict) -> None:
    """Raise `ValueError` unless a saved position has this loader's kind, text and settings."""
    for name, value in here.items():
        if state.get(name) != value:
            raise ValueError(f"{name} = {value!r} does not fit the saved position, which has "
                             f"{state.get(name)!r}: resume with that, or start a new run")


def alone(read: Callable, encode: Callable) -> np.ndarray:
    """Return the tokens of the documents that `read` returns, with the number of the first."""
    texts, first = read()
    return encode(texts, first=first)


def split_rows(flat: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and their targets, one to the right: (B, S + 1) -> (B, S), (B, S)."""
    rows = torch.from_numpy(flat)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class PackedLoader:
    """Batches of sequences cut from the packed tokens, each sequence once per epoch, endlessly.

    An epoch starts its cuts at a random token, goes once round the tokens and takes the sequences
    in a random order; both depend on (seed, epoch) only. At most seq_len - 1 tokens are left over.

    With world = 4 and batch_size = 8 the four ranks hold the 32 rows that a single one would get
    from next_batch(32), in rank order.

    tokens: (N,), the training text
    identity: further settings that a saved position must share, by name
    The other arguments are those of `open_data`.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int = 0, rank: int = 0,
                 world: int = 1, identity: dict | None = None):
        if len(tokens) < seq_len + 1:
            raise ValueError(f"seq_len = {seq_len} is longer than the text, {len(tokens)} tokens: "
                             f"it must be at most {len(tokens) - 1}, or the text longer")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.rank, self.world = rank, world
        self.identity = dict(kind="packed", seq_len=seq_len, seed=seed, **(identity or {}))
        self.sequences_per_epoch = len(tokens) // seq_len
        self.position = 0  # sequences that all ranks together have taken, over all epochs
        self._epoch = -1

    def sequence(self, position: int) -> np.ndarray:
        """Return sequence number `position` since the start of training: (S + 1,)."""
        epoch, i = divmod(position, self.sequences_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._offset = epoch, int(rng.integers(len(self.tokens)))
            self._order = rng.permutation(self.sequences_per_epoch)
        start = self._offset + int(self._order[i]) * self.seq_len
        positions = np.arange(start, start + self.seq_len + 1)
        return self.tokens.take(positions, mode="wrap").astype(np.int64)

    def next_batch(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next tokens and targets of this rank, (batch_size, S) int64 each."""
        start = self.position + self.rank * batch_size
        rows = [self.sequence(start + i) for i in range(batch_size)]
        self.position += self.world * batch_size
        return split_rows(np.stack(rows))

    def state_dict(self) -> dict:
        """Return the position, as numbers and strings for JSON."""
        return {**self.identity, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken, with any number of ranks."""
        check_state(state, self.identity)
        self.position = state["position"]


class StreamLoader:
    """Batches from documents that arrive one after the other: tokenise, pack, keep the rest.

    Documents are shuffled in blocks of SHUFFLE_BLOCK. The `datasets` library's rolling buffer
    loses its content at a restart; a block can be read again. The position is therefore exact: the
    stream's state at the start of the block, the number of documents taken from it, and the tokens
    left over. After the last document the next epoch begins.

    Many ranks read a stream once, and each tokenises its share; all have all tokens, and take their
    own rows. So the position is one number for all, and any number of ranks goes on from it.

    documents: has `read_from(state)` and `state_dict()`, as HubDocuments; one rank reads them
    deal: calls `read` in one rank and `encode` in each for its share, and returns all tokens
    The other arguments are those of PackedLoader and `open_data`.
    """

    def __init__(self, documents, tokenizer, seq_len: int, seed: int = 0, fim_rate: float = 0.0,
                 rank: int = 0, world: int = 1, workers: int = 1, identity: dict | None = None,
                 deal: Callable[[Callable, Callable], np.ndarray] = alone):
        self.documents, self.seq_len, self.seed, self.deal = documents, seq_len, seed, deal
        self.encode = partial(encode_documents, tokenizer=tokenizer, fim_rate=fim_rate, seed=seed,
                              workers=workers)
        self.rank, self.world = rank, world
        self.identity = dict(kind="stream", seq_len=seq_len, seed=seed, **(identity or {}))
        self.rows = documents.read_from(None)
        self.block, self.block_state, self.seen, self.taken = [], None, 0, 0
        self.leftover = np.empty(0, np.int64)

    def _read_block(self, stream_state: dict | None, seen: int) -> None:
        """Read and shuffle the block that starts at `stream_state`, after `seen` documents."""
        block = list(islice(self.rows, SHUFFLE_BLOCK))
        order = np.random.default_rng([self.seed, seen]).permutation(len(block))
        self.block, self.taken = [block[i] for i in order], 0
        self.block_state, self.seen = stream_state, seen

    def _read_some(self) -> tuple[list[str], int]:
        """Return the next few documents and the number of the first; after the last block comes the
        first one again."""
        if self.block is None:  # a position was loaded
            self.rows, taken = self.documents.read_from(self.block_state), self.taken
            self._read_block(self.block_state, self.seen)
            self.taken = taken
        if self.taken == len(self.block):
            seen = self.seen + len(self.block)
            self._read_block(self.documents.state_dict() if self.block else None, seen)
            if not self.block:
                self.rows = self.documents.read_from(None)
                self._read_block(None, seen)
            if not self.block:
                raise ValueError("data has no document left to train on: a small data set is "
                                 "better downloaded and read with text:PATH")
        first = self.seen + self.taken
        texts = self.block[self.taken:self.taken + STREAM_DOCUMENTS * self.world]
        self.taken += len(texts)
        return texts, first

    def next_batch(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next tokens and targets of this rank, (batch_size, S) int64 each."""
        count = batch_size * self.world * self.seq_len
        parts = [self.leftover]
        while sum(map(len, parts)) < count + 1:
            parts.append(self.deal(self._read_some, self.encode))
        row = np.concatenate(parts)
        starts = np.arange(self.rank * batch_size, (self.rank + 1) * batch_size) * self.seq_len
        self.leftover = row[count:]  # begins with the last target, which is the next input
        return split_rows(row[starts[:, None] + np.arange(self.seq_len + 1)])

    def state_dict(self) -> dict:
        """Return the position, as plain data for JSON; that of the rank that reads counts."""
        return {**self.identity, "stream": self.block_state, "seen": self.seen,
                "taken": self.taken, "leftover": self.leftover.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken, with any number of ranks."""
        check_state(state, self.identity)
        self.block, self.block_state = None, state["stream"]  # read by the rank that reads
        self.seen, self.taken = state["seen"], state["taken"]
        self.leftover = np.asarray(state["leftover"], np.int64)


@dataclass(frozen=True)
class Data:
    """The text of a training run; name, fingerprint and note are those of its corpus.

    loader: yields the training batches; a StreamLoader for a data set of the hub
    valid: (N,) int64, validation tokens, the same in every run, never cut for fill-in-the-middle
    n_train_tokens: tokens per epoch, None for a stream
    """

    name: str
    loader: PackedLoader | StreamLoader
    valid: torch.Tensor
    fingerprint: str
    n_train_tokens: int | None
    note: str = ""

    def describe(self) -> str:
        """Return one line for the terminal, with hashes shortened to twelve digits."""
        train = f"{self.n_train_tokens:,}" if self.n_train_tokens else "a stream of"
        content = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", self.fingerprint)
        text = (f"{self.name}: {train} training tokens, {len(self.valid):,} validation tokens, "
                f"content {content}")
        return f"{text}; {self.note}" if self.note else text


def open_data(spec: str, tokenizer, seq_len: int, seed: int = 0, fim_rate: float = 0.0,
              cache: Path = CACHE, workers: int = 0, rank: int = 0, world: int = 1,
              deal: Callable = alone) -> Data:
    """Return the training batches and the validation text of a corpus.

    spec: see `open_corpus`; tokenizer: encodes, names its special ids and has a `fingerprint`
    seq_len: length of a sequence, tokens
    seed: decides the order, and the cuts of fill-in-the-middle
    fim_rate: share of the training documents cut for fill-in-the-middle, 0 to 1; V3 uses 0.1
    cache: folder for the tokens; workers: threads that tokenise, 0 means one per core
    rank, world: index and number of the data-parallel processes
    deal: how they share the work of a stream, as of `StreamLoader`

    Raises `ValueError` naming the setting, its value and what is valid.
    """
    fim_ids = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    demand("fim_rate", fim_rate, 0 <= fim_rate <= 1, "between 0 and 1")
    demand("fim_rate", fim_rate, not fim_rate or None not in fim_ids,
           "0, since the tokenizer has no tokens for fill-in-the-middle")
    demand("seq_len", seq_len, seq_len >= 1, "at least 1")
    workers = workers or os.cpu_count() or 1
    corpus = open_corpus(spec)
    tokens = cached_tokens(corpus, tokenizer, Path(cache), fim_rate, seed, workers)
    identity = dict(data=corpus.fingerprint, tokenizer=tokenizer.fingerprint, fim_rate=fim_rate)
    shared = dict(seed=seed, rank=rank, world=world, identity=identity)
    size = len(tokens["train"]) if "train" in tokens else None
    if size is None:
        loader = StreamLoader(corpus.train, tokenizer, seq_len, fim_rate=fim_rate, workers=workers,
                              deal=deal, **shared)
    else:
        loader = PackedLoader(tokens["train"], seq_len, **shared)
    valid = torch.from_numpy(tokens["valid"][:MAX_VALID_TOKENS].astype(np.int64))
    return Data(corpus.name, loader, valid, corpus.fingerprint, size, corpus.note)
