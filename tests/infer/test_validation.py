"""Bits per byte against a slow plain computation and a known answer; which blocks parse; kinds of
Python, and the agreement of drafts against one position after the other."""

import ast
import math
from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, scrambled

from minids.infer.validation import (
    Agreement,
    draft_agreement,
    evaluate,
    kinds_of_python,
    kinds_of_tokens,
    parse_share,
    windows,
)
from minids.tokenizer import Tokenizer

SEQ_LEN = 10
# FP32 rounds at 6e-8 and the sum has some hundred terms; in truth they differ by less.
CLOSE = 1e-5


def text(length: int = 97, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and how many bytes each entry of the vocabulary has: none for the first four."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(LITTLE.vocab_size, (length,), generator=generator)
    n_bytes = torch.randint(1, 6, (LITTLE.vocab_size,), generator=generator)
    n_bytes[:4] = 0
    return tokens, n_bytes


@torch.no_grad()
def slowly(model, tokens, n_bytes, starts, first: int = 0, per_token: bool = False) -> float:
    """Bits per byte, one window, one target at a time; `first` and `per_token` make it wrong."""
    nats, size = 0.0, 0
    for start in starts:
        window = tokens[start:start + SEQ_LEN + 1]
        probs = model(window[None, :-1])[0].softmax(-1)  # (S, V)
        for i in range(first, SEQ_LEN):
            nats -= math.log(probs[i, window[i + 1]])
            size += 1 if per_token else int(n_bytes[window[i + 1]])
    return nats / math.log(2) / size


def test_bits_per_byte_equal_a_slow_plain_computation():
    model, (tokens, n_bytes) = scrambled(LITTLE, dtype=torch.float32), text()
    found = evaluate(model, tokens, n_bytes, SEQ_LEN, batch_size=4).bits_per_byte
    starts = range(0, 90, SEQ_LEN)  # nine windows; six tokens are left over
    assert found == pytest.approx(slowly(model, tokens, n_bytes, starts), rel=CLOSE)
    for wrong in (dict(first=1), dict(per_token=True)):
        assert found != pytest.approx(slowly(model, tokens, n_bytes, starts, **wrong), rel=1e-3)
    # wrong: the mean of the windows' own bits per byte
    alone = [slowly(model, tokens, n_bytes, [start]) for start in starts]
    assert found != pytest.approx(sum(alone) / len(alone), rel=1e-3)


@torch.no_grad()
def test_documents_that_do_not_see_each_other_are_evaluated_alone():
    model, (tokens, n_bytes) = scrambled(LITTLE), text()
    begin = 7
    tokens[[0, 13, 17, 44, 45, 82]] = begin

    def alone(begin: int) -> float:
        """Bits per byte, each document's part of a window run by itself."""
        nats, size = 0.0, 0
        for start in range(0, 90, SEQ_LEN):
            window = tokens[start:start + SEQ_LEN + 1]
            cuts = [0, *((window[:-1] == begin).nonzero().flatten().tolist()), SEQ_LEN]
            for first, end in zip(cuts, cuts[1:], strict=False):
                if end > first:
                    logp = model(window[None, first:end])[0].log_softmax(-1)
                    targets = window[first + 1:end + 1]
                    nats -= logp.gather(1, targets[:, None]).sum().item()
                    size += int(n_bytes[targets].sum())
        return nats / math.log(2) / size

    found = evaluate(model, tokens, n_bytes, SEQ_LEN, 4, begin_id=begin).bits_per_byte
    assert found == pytest.approx(alone(begin), rel=CLOSE)
    assert found != pytest.approx(alone(begin=8), rel=1e-3)  # wrong: another token begins one
    assert found != pytest.approx(evaluate(model, tokens, n_bytes, SEQ_LEN, 4).bits_per_byte,
                                  rel=1e-3)


def test_the_batch_size_changes_nothing():
    model, (tokens, n_bytes) = scrambled(LITTLE), text()
    found = {size: evaluate(model, tokens, n_bytes, SEQ_LEN, size) for size in (1, 4, 100)}
    assert found[4].bits_per_byte == pytest.approx(found[1].bits_per_byte, rel=CLOSE)
    assert found[100].bits_per_byte == pytest.approx(found[1].bits_per_byte, rel=CLOSE)
    assert torch.equal(found[1].loads, found[100].loads)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token():
    model, (tokens, n_bytes) = scrambled(LITTLE), text()
    torch.nn.init.zeros_(model.head.weight)
    n_bytes[tokens[90]] = 30 + n_bytes[tokens[0]]  # a target, and no input
    found = evaluate(model, tokens, n_bytes, SEQ_LEN, 3).bits_per_byte
    size = n_bytes[tokens[1:91]].sum().item()
    assert found == pytest.approx(math.log2(LITTLE.vocab_size) * 90 / size, rel=CLOSE)
    inputs = n_bytes[tokens[:90]].sum().item()  # wrong: the bytes of the inputs
    assert found != pytest.approx(math.log2(LITTLE.vocab_size) * 90 / inputs, rel=0.01)


def test_a_part_is_the_same_every_time_and_spread_over_the_text():
    tokens = torch.arange(1001)
    part = windows(tokens, SEQ_LEN, max_tokens=45)
    assert part[:, 0].tolist() == [0, 250, 500, 750] and part.shape == (4, 11)
    assert torch.equal(windows(tokens, SEQ_LEN, max_tokens=45), part)
    assert len(windows(tokens, SEQ_LEN)) == len(windows(tokens, SEQ_LEN, 10**9)) == 100
    assert len(windows(tokens, SEQ_LEN, max_tokens=1)) == 1
    whole = windows(tokens, SEQ_LEN)
    assert whole[:, 1:].flatten().tolist() == list(range(1, 1001))  # each target once


def test_evaluation_leaves_the_model_as_it_was():
    model, (tokens, n_bytes) = scrambled(LITTLE), text()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        evaluate(model, tokens, n_bytes, SEQ_LEN, 4)
        assert model.training == mode
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_loads_count_every_token_of_the_layers():
    tokens, n_bytes = text()
    found = evaluate(scrambled(LITTLE), tokens, n_bytes, SEQ_LEN, 4)
    assert found.loads.shape == (1, 8)  # one of two layers has experts; MTP has no part in this
    assert found.loads.sum() == 90 * LITTLE.n_activated_experts
    load = found.loads[0].double()
    assert found.max_vio == [pytest.approx((load.max() / load.mean() - 1).item(), rel=1e-6)]
    dense = evaluate(scrambled(replace(LITTLE, n_routed_experts=0)), tokens, n_bytes, SEQ_LEN, 4)
    assert dense.max_vio == []


def test_text_shorter_than_a_window_is_named():
    tokens, n_bytes = text(SEQ_LEN)
    with pytest.raises(ValueError, match="seq_len = 10 .* at most 9"):
        evaluate(scrambled(LITTLE), tokens, n_bytes, SEQ_LEN, 4)


BLOCKS = {
    "good and cut": ("x = 1\ndef f():\n    return 2\ndef g(", (2, 2)),
    "bad": ("def f(:\n    pass\nx = 1\ny", (1, 2)),
    "indented mistake": ("def f():\n    return )\n\n\nx = 1\ny", (1, 2)),
    "decorator": ("@cache\ndef f():\n    return 1\nx", (1, 1)),
    "else": ("if x:\n    y = 1\nelse:\n    y = 2\nz", (1, 1)),
    "try": ("try:\n    f()\nexcept ValueError:\n    pass\nfinally:\n    g()\nz", (1, 1)),
    "bracket": ("x = [\n    1,\n]\nz", (1, 1)),
    "only one": ("x = 1", (0, 0)),
    "nothing": ("", (0, 0)),
    "blank lines": ("\n\n   \n", (0, 0)),
    "null byte": ("x = '\0'\ny = 1\nz", (1, 2)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_top_level_blocks_that_parse(name):
    source, expected = BLOCKS[name]
    assert parse_share(source) == expected


def test_all_of_a_real_module_parses():
    source = open(ast.__file__, encoding="utf-8").read()
    parsed, total = parse_share(source)
    assert parsed > 0.9 * total > 40  # a docstring's or a call's unindented lines are cut apart


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
