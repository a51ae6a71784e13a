"""Helpers of the tests of tokenizers: texts, the committed tokenizer, and checks."""

import json
import os
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st

from minids.text import bpe
from minids.text.bpe import SPECIAL
from minids.text.corpora import open_corpus
from minids.text.tokenizer import Tokenizer

LIBRARY = Path(os.__file__).parent
TEXTS = [(LIBRARY / f"{name}.py").read_text("utf-8") for name in "argparse ast shutil".split()]
BOS, EOS = SPECIAL[:2]
quick = settings(max_examples=200, deadline=None)  # the first example pays for the set-up
COMMITTED = Tokenizer.load()
EVERY = [*map(chr, [*range(0xD800), *range(0xE000, 0x110000)])]
VALID = list(open_corpus("pystdlib").valid)
TRICKY = ["", " ", "  a", "a  ", "\r\n\t \n", " " * 700 + "x", "a\x00\x7f", "1234567", "don't",
          "na\u00efve e\u0301 \ufb01", "\u4e2d\u6587\u3068\u304b\u306a abc", "x\U0001f642y",
          "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0627\u0644\u0639", "a\u00a0b\u3000c\u2028d",
          "\u00c0\u00f5\u00ff", "print(\"x\")\n\n\n    return", "<|EOT|> <s> </s>"]
SPELLED = "".join(SPECIAL) + f"x {BOS}y<think></think><\uff5cUser\uff5c><|EOT|>"
mixed = st.text(max_size=150, alphabet=st.one_of(
    st.characters(codec="utf-8"), st.sampled_from(" \t\r\na1_.('\u4e2d\U0001f642\u0301\x00")))


def text_is_kept(tokenizer: Tokenizer, raw: bytes) -> bool:
    """Return whether ordinary tokens decode to the same bytes, with lengths that add up to them."""
    ids = tokenizer.encode(raw)
    return (tokenizer.decode_bytes(ids) == raw
            and set(ids).isdisjoint(tokenizer.special.values())
            and tokenizer.n_bytes[ids].sum().item() == len(raw))


def differing(one, other, texts) -> list[str]:
    """Return the texts that two encoders encode differently."""
    return [text for text in texts if one(text) != other(text)]


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers agree in everything that other modules read."""
    names = ("n_tokens vocab_size special ranks bos_id eos_id user_id assistant_id think_id "
             "end_think_id fim_begin_id fim_hole_id fim_end_id").split()
    every = range(one.vocab_size)
    return (all(getattr(one, name) == getattr(other, name) for name in names)
            and torch.equal(one.n_bytes, other.n_bytes)
            and one.decode_bytes(every) == other.decode_bytes(every))


def edit(folder: Path, change, file: str = bpe.TOKENIZER) -> None:
    """Change the JSON of a file in place."""
    value = json.loads((folder / file).read_text("utf-8"))
    change(value)
    (folder / file).write_text(json.dumps(value), "utf-8")


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def garbage(path):
    path.write_bytes(b"\xff\x00 not a tokenizer\n")


def empty(path):
    path.write_bytes(b"")
