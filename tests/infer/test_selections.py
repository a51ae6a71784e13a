"""Selections from outside the model, and how much of attention they hold."""

from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, scrambled
from test_validation import SEQ_LEN, text

from minids import Transformer
from minids.infer.validation import (
    all_scores,
    attention_recall,
    best,
    compare_selections,
    evaluate,
    everything,
    position_scores,
    random_scores,
    selecting,
)
from minids.model.mla import Context, causal
from minids.model.rope import rotations

SPARSE = replace(LITTLE, index_n_heads=6, index_head_dim=16, index_topk=4)


def rows_of(model, k: int = 4) -> dict:
    tokens, n_bytes = text()
    return {name: bits for name, (bits, _) in compare_selections(
        model, tokens, n_bytes, SEQ_LEN, 4, k).items()}


def test_the_indexers_row_is_the_model_itself_and_the_dense_row_its_dense_twin():
    model, (tokens, n_bytes) = scrambled(SPARSE), text()
    rows = rows_of(model)
    assert list(rows) == ["dense", "indexer", "attention", "window", "random"]
    itself = evaluate(model, tokens, n_bytes, SEQ_LEN, 4).bits_per_byte
    assert rows["indexer"] == itself
    twin = Transformer(replace(SPARSE, index_n_heads=0)).double()
    twin.load_state_dict(model.state_dict(), strict=False)
    assert rows["dense"] == evaluate(twin, tokens, n_bytes, SEQ_LEN, 4).bits_per_byte
    assert len(set(rows.values())) == 5
    assert set(rows_of(twin)) == rows.keys() - {"indexer"}  # controls need no indexer
    assert rows_of(twin)["window"] == rows["window"]


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
