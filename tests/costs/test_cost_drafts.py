"""Yield and cost of MTP drafts, by hand."""

from dataclasses import replace

import pytest

from minids import ModelArgs
from minids.costs.drafts import drafting
from minids.costs.parameters import count_parameters


def test_a_round_of_drafts_by_hand():
    args = ModelArgs.preset("v3")
    each = count_parameters(args)
    alone = drafting(args, 0.85)
    assert alone.tokens == 1.85
    # One token reads what it activates, without the embedding; checking two of them, in each of 58
    # layers, 15.75 experts of 44,040,192 weights in place of 8.
    assert alone.plain == pytest.approx(each.active_without_embedding)
    assert alone.check - alone.plain == pytest.approx(58 * 7.75 * 44_040_192)
    # A module: a MoE layer with 15.75 experts, the join and two norms, and the head.
    layer = 187_107_328 + 14_336 + 1_835_264 + 16.75 * 44_040_192
    assert alone.draft == pytest.approx(layer + 102_760_448 + 3 * 7_168 + 926_679_040)
    assert alone.speedup == pytest.approx(1.85 * alone.plain / (alone.check + alone.draft))
    crowd = drafting(args, 0.85, batch=256)  # nearly all experts are read anyway
    assert 1.15 < alone.speedup < 1.2 < 1.8 < crowd.speedup < 1.85  # the paper: 1.8
    two = drafting(args, 0.5, drafts=2)
    assert two.tokens == 1.75 and two.draft > alone.draft and two.check > alone.check


def test_depth_and_calls_decide_whether_drafts_pay():
    shallow, deep = (replace(ModelArgs.preset("tiny"), n_layers=n) for n in (2, 32))
    assert drafting(shallow, 0.8).speedup < drafting(deep, 0.8).speedup
    free, slow = (drafting(deep, 0.8, row=row) for row in (0, 1e6))
    assert slow.speedup < free.speedup
    assert drafting(deep, 0.8, call=1e9).speedup == pytest.approx(1.8 * 32 / 33, rel=0.01)
