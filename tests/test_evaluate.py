"""Bits per byte against a slow plain computation and a known answer; selections from outside the
model, and how much of attention they hold; which blocks parse."""

import ast
import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch
from small_models import LITTLE, scrambled

from minids import ModelArgs, Transformer
from minids.base.command_line import run_program
from minids.evaluate import (
    Agreement,
    all_scores,
    attention_recall,
    best,
    compare_selections,
    draft_agreement,
    evaluate,
    everything,
    kinds_of_python,
    kinds_of_tokens,
    main,
    parse_share,
    position_scores,
    random_scores,
    selecting,
    windows,
)
from minids.model.mla import Context, causal
from minids.model.rope import rotations
from minids.runs.checkpoints import save_checkpoint
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


SPARSE = replace(LITTLE, index_n_heads=6, index_head_dim=16, index_topk=4)


def rows_of(model, k: int = 4) -> dict:
    tokens, n_bytes = text()
    rows = compare_selections(model, tokens, n_bytes, SEQ_LEN, 4, k)
    return {row.selection: row for row in rows}


def test_the_indexers_row_is_the_model_itself_and_the_dense_row_its_dense_twin():
    model, (tokens, n_bytes) = scrambled(SPARSE), text()
    rows = rows_of(model)
    assert list(rows) == ["dense", "indexer", "attention", "window", "random"]
    itself = evaluate(model, tokens, n_bytes, SEQ_LEN, 4).bits_per_byte
    assert rows["indexer"].bits_per_byte == itself
    twin = Transformer(replace(SPARSE, index_n_heads=0)).double()
    twin.load_state_dict(model.state_dict(), strict=False)
    assert rows["dense"].bits_per_byte == evaluate(twin, tokens, n_bytes, SEQ_LEN, 4).bits_per_byte
    assert len({row.bits_per_byte for row in rows.values()}) == 5
    assert set(rows_of(twin)) == rows.keys() - {"indexer"}  # controls need no indexer
    assert rows_of(twin)["window"].bits_per_byte == rows["window"].bits_per_byte


def test_a_selection_of_all_tokens_changes_nothing():
    model = scrambled(SPARSE)
    tokens = text()[0][None, :8]
    with torch.no_grad(), selecting(model, everything):
        dense = model(tokens)
    for name, scores in all_scores(model).items():
        with torch.no_grad(), selecting(model, best(8, scores)):
            assert torch.equal(model(tokens), dense), name


def test_the_model_is_its_own_again_afterwards():
    model, tokens = scrambled(SPARSE), text()[0][None, :8]
    before = model(tokens)
    for error in (False, True):
        try:
            with selecting(model, best(2, position_scores)):
                assert not torch.equal(model(tokens), before)
                assert not error or 1 / 0
        except ZeroDivisionError:
            pass
        assert torch.equal(model(tokens), before)


def test_a_window_is_a_band():
    """What lies before the last k tokens moves nothing in a model of one layer, the k-th does."""
    args = replace(LITTLE, n_layers=1, n_mtp_layers=0)
    model, tokens = scrambled(args), text()[0][None, :12]

    def moves(changed: int, k: int) -> bool:
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % LITTLE.vocab_size
        with torch.no_grad(), selecting(model, best(k, position_scores)):
            return not torch.equal(model(tokens)[0, -1], model(other)[0, -1])

    assert [moves(at, 3) for at in (7, 8, 9, 10)] == [False, False, True, True]
    assert moves(8, 4) and not moves(7, 4)  # wrong: a window of another width


def chosen_at_random(scores, times: int) -> torch.Tensor:
    x = torch.zeros(1, 12, 4)
    context = Context(rotations(torch.arange(12)[None], LITTLE))
    return sum(best(3, scores)(None, x, x, context).mask(12)[0].float() for _ in range(times))


def test_random_is_even_and_new_each_time():
    counts = chosen_at_random(random_scores(0), 2000)
    for t in range(12):  # of t + 1 tokens each has the same share; five standard deviations
        share = min(3 / (t + 1), 1)
        margin = 5 * (share * (1 - share) / 2000) ** 0.5
        assert (counts[t, :t + 1] / 2000 - share).abs().max() <= margin
        assert counts[t, t + 1:].sum() == 0
    again = chosen_at_random(random_scores(0), 2000)
    assert torch.equal(counts, again) and not torch.equal(counts, chosen_at_random(
        random_scores(1), 2000))
    wrong = chosen_at_random(position_scores, 2000)
    assert (wrong[11] / 2000 - 3 / 12).abs().max() > 0.5


def literal_recall(model, tokens, k: int) -> list[float]:
    """What the likeliest k tokens hold of the heads' mean probability, query by query."""
    shares, seen = [], causal(tokens.size(1), tokens.size(1))[0]

    def hook(attn, inputs, _):
        x, context = inputs
        q = torch.cat(attn.queries(attn.query_latent(x), context.rotation), -1)
        keys = attn.expand(attn.latent(x, context.rotation))[0]
        logits = torch.einsum("bshd,bthd->bhst", q, keys) * attn.scale
        p = logits.masked_fill(~seen, float("-inf")).softmax(-1).mean(1)
        held = [sorted(row[:t + 1].tolist())[-k:] for b in p for t, row in enumerate(b) if t >= k]
        shares.append(sum(map(sum, held)) / len(held))

    hooks = [block.attn.register_forward_hook(hook) for block in model.layers]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return shares


def test_recall_is_the_share_of_attention_that_a_selection_holds():
    model = scrambled(replace(SPARSE, index_topk=12))  # dense up to 12 tokens
    tokens = text()[0][:36].view(3, 12)
    found = attention_recall(model, tokens, 4)
    assert found["attention"] == pytest.approx(literal_recall(model, tokens, 4), rel=1e-12)
    for name in ("indexer", "window", "random"):
        assert all(0 < share < most for share, most in zip(found[name], found["attention"],
                                                           strict=True))
    # wrong: measured while the layers below attend to a selection
    with selecting(model, best(4, position_scores)):
        wrong = literal_recall(model, tokens, 4)
    assert wrong[0] == pytest.approx(found["attention"][0], rel=1e-12)
    assert wrong[1] != pytest.approx(found["attention"][1], rel=1e-3)


def test_recall_where_nothing_is_left_out_is_refused():
    with pytest.raises(ValueError, match="index_topk = 10 is not valid: .* the 10 tokens"):
        rows_of(scrambled(SPARSE), k=10)


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
                           "str": "names", '"ab"': "strings", "12": "numbers", "->": "signs",
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


def test_the_program(tmp_path, capsys, monkeypatch):
    tokenizer = Tokenizer.load()
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size)
    model = Transformer(args)
    torch.nn.init.zeros_(model.head.weight)
    save_checkpoint(tmp_path / "run", 3, model.state_dict(), {"step": 3})
    tokenizer.save(tmp_path / "run/tokenizer")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text(f"This is text number {i}, and it is not long.\n" * 4)
    config = {"model": asdict(args), "tokenizer": tokenizer.fingerprint,
              "train": {"data": f"text:{texts}", "seq_len": 32, "seed": 0, "fim_rate": 0.0}}
    (tmp_path / "run/config.json").write_text(json.dumps(config))

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minids.evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_program("minids.evaluate", main)
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    status, out, _ = call("--run", tmp_path / "run", "--device", "cpu")
    assert status == 0 and "bits per byte" in out and "step_000003" in out
    found = float(out.split("bits per byte")[1].split()[0])
    assert 1 < found < math.log2(args.vocab_size)  # a token has 12 bits and more than a byte
    status, out, _ = call("--run", tmp_path / "run", "--device", "cpu", "--selections",
                          "--index-topk", 8, "--max-tokens", 1024)
    names = [line.split()[0] for line in out.splitlines()[-4:]]
    assert status == 0 and names == ["dense", "attention", "window", "random"]
    assert "attention to 8 tokens" in out
    status, out, _ = call("--run", tmp_path / "run", "--device", "cpu", "--drafts")
    assert status == 0 and out.splitlines()[-2].startswith("all")
    assert out.splitlines()[-1].startswith("on its own text")
    for words, named in ((["--run", "nowhere"], "nowhere"), (["--batch-size", 0], "batch_size = 0"),
                         (["--run", tmp_path / "run", "--seq-len", 10**6], "seq_len")):
        status, _, err = call("--device", "cpu", *words)
        assert status == 2 and named in err and err.count("\n") == 1, err
