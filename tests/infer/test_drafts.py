"""Kinds of Python, and the agreement of drafts against one position after the other."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, scrambled
from test_validation import SEQ_LEN, text

from minids.infer.drafts import Agreement, draft_agreement, kinds_of_python, kinds_of_tokens
from minids.tokenizer import Tokenizer

PYTHON = """# a note
def f(x: int) -> str:
    return "ab" + str(12)
"""


def test_kinds_are_those_of_pythons_own_tokenizer():
    kinds = kinds_of_python(PYTHON)
    assert len(kinds) == len(PYTHON)

    def kind(word: str) -> set[str]:
        start = PYTHON.index(word)
        return set(kinds[start:start + len(word)])

    for word, expected in {"# a note": "comments", "def": "keywords", "f": "keywords",
                           "str": "names", '"ab"': "strings", "12": "numbers", "->": "punctuation",
                           "    ": "white space"}.items():
        assert kind(word) == {expected}
    assert kinds_of_python("x = $ 1\n")[4] == "other"  # not Python: what comes before still counts


def test_tokens_have_the_kind_of_their_first_character():
    tokenizer = Tokenizer.load()
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                 for text in (PYTHON, "naïve = '漢字'  # 🙂\n")]
    tokens = torch.tensor(sum(documents, []))
    kinds = kinds_of_tokens(tokens, tokenizer)
    assert len(kinds) == len(tokens) and kinds[0] == kinds[-1] == "ends of documents"
    words = [(tokenizer.decode([token]).strip(), kind)
             for token, kind in zip(tokens.tolist(), kinds, strict=True)]
    assert ("def", "keywords") in words and ("str", "names") in words and ("#", "comments") in words
    assert ("not", "comments") in words  # of "note"; wrong: a token by itself, here a keyword


def literal_agreement(model, batch, depth: int, wanted: list[str], kind: str) -> Agreement:
    """`draft_agreement` of one window, one position after the other."""
    greedy, sampled = [], []
    states = [model.hidden(batch[None])[0]]
    for k, module in enumerate(model.mtp, start=1):
        tokens = batch[None, k:]
        states += [module(states[-1][:, :-1], model.embed(tokens), model.context(tokens))[0]]
    for i in range(len(batch) - depth):
        p = model.head(states[0][0, i + depth]).softmax(-1)
        q = model.head(states[depth][0, i]).softmax(-1)
        if kind in ("all", wanted[i + depth + 1]):
            greedy.append(float(p.argmax() == q.argmax()))
            sampled.append(float(torch.minimum(p, q).sum()))
    return Agreement(len(greedy), sum(greedy) / len(greedy), sum(sampled) / len(sampled))


@torch.no_grad()
def test_agreement_is_that_of_the_model_and_its_modules_at_the_same_place():
    model = scrambled(replace(LITTLE, n_mtp_layers=2))
    with torch.no_grad():  # modules that know something
        model.head.weight.copy_(model.embed.weight.roll(1, dims=0))
        for module in model.mtp:
            module.eh_proj.weight[:, :LITTLE.dim] = torch.eye(LITTLE.dim)
    tokens, _ = text(SEQ_LEN * 6 + 1)
    kinds = ["ab"[t % 2] for t in tokens.tolist()]
    tables = draft_agreement(model, tokens, kinds, SEQ_LEN, 4)
    for depth, table in enumerate(tables, start=1):
        assert set(table) == {"a", "b", "all"} and 0 < table["all"].greedy < 1
        assert table["a"].tokens + table["b"].tokens == table["all"].tokens == 6 * (SEQ_LEN - depth)
        for kind, found in table.items():
            each = []
            for start in range(0, len(tokens) - 1, SEQ_LEN):
                window = tokens[start:start + SEQ_LEN]
                wanted = kinds[start:start + SEQ_LEN + 1]
                if kind == "all" or kind in wanted[depth + 1:]:
                    each.append(literal_agreement(model, window, depth, wanted, kind))
            count = sum(a.tokens for a in each)
            assert found.tokens == count
            for name in ("greedy", "sampled"):
                mean = sum(a.tokens * getattr(a, name) for a in each) / count
                assert getattr(found, name) == pytest.approx(mean, abs=1e-6)
