"""Schedules: the learning rate, the batch, the weights that switch late."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LITTLE

from minids import Transformer
from minids.runs.optimizers import (
    batch_size_at,
    bias_speed_at,
    build_optimizers,
    learning_rate_factor,
    mtp_weight_at,
    set_learning_rate,
)
from minids.runs.settings import TrainArgs

ARGS = TrainArgs(steps=100, warmup_steps=10, constant_until=0.5, decay_until=0.9, final_lr=0.1)
FACTORS = {
    1: 0.1, 5: 0.5, 10: 1.0, 11: 1.0, 50: 1.0,
    60: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2,  # a quarter of the way down: cos 45 degrees
    70: 0.55, 90: 0.1, 100: 0.1}


def off_schedule(schedule) -> list[int]:
    """The steps at which a schedule is not what a hand computed; 1e-12 for the cosine."""
    return [step for step, factor in FACTORS.items()
            if not math.isclose(schedule(step, ARGS), factor, rel_tol=1e-12)]


def test_learning_rate_rises_stays_and_falls():
    assert off_schedule(learning_rate_factor) == []
    assert learning_rate_factor(1, replace(ARGS, warmup_steps=0)) == 1.0
    factors = [learning_rate_factor(step, ARGS) for step in range(10, 101)]
    assert all(a >= b for a, b in pairwise(factors))


def test_other_ways_down():
    """V2 multiplies by 0.316 = sqrt(0.1) twice; Moonlight's cool-down is a straight line."""
    steps, line = (replace(ARGS, decay=how) for how in ("steps", "linear"))
    factors = [learning_rate_factor(step, steps) for step in (5, 50, 51, 89, 90, 100)]
    assert factors == pytest.approx([0.5, 1.0, 0.1 ** 0.5, 0.1 ** 0.5, 0.1, 0.1], rel=1e-12)
    factors = [learning_rate_factor(step, line) for step in (5, 50, 60, 70, 90, 100)]
    assert factors == pytest.approx([0.5, 1.0, 0.775, 0.55, 0.1, 0.1], rel=1e-12)


WRONG_SCHEDULES = {
    "starts at zero": lambda s, a: learning_rate_factor(s - 1, a) if s > 1 else 0.0,
    "straight": lambda s, a: min(s / 10, 1.0, max(1 - 0.9 * (s - 50) / 40, 0.1)),
    "without floor": lambda s, a: learning_rate_factor(s, replace(a, final_lr=0.0)),
    "without warm-up": lambda s, a: learning_rate_factor(s, replace(a, warmup_steps=0)),
    "without end": lambda s, a: learning_rate_factor(s, replace(a, decay_until=1.0)),
}


@pytest.mark.parametrize("name", WRONG_SCHEDULES)
def test_schedule_check_notices(name):
    assert off_schedule(WRONG_SCHEDULES[name])


def test_learning_rate_is_set_from_the_peak():
    """Twice in a row and after a resume: always a share of the peak, never of the last rate."""
    args = TrainArgs(optimizer="muon", lr=0.4, muon_lr=0.2)

    def make():
        return build_optimizers(Transformer(LITTLE), args, torch.float32)

    def rates(optimizers):
        return [group["lr"] for o in optimizers for group in o.param_groups]

    optimizers, resumed = make(), make()
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)
    assert rates(optimizers) == [0.1, 0.1, 0.05]
    for new, old in zip(resumed, optimizers, strict=True):
        new.load_state_dict(old.state_dict())
    set_learning_rate(resumed, 1.0)
    assert rates(resumed) == [0.4, 0.4, 0.2]


def test_batch_grows_in_a_straight_line():
    args = TrainArgs(batch_size=10, batch_start=2, batch_ramp_steps=8)
    assert [batch_size_at(step, args) for step in range(1, 10)] == [2, 3, 4, 5, 6, 7, 8, 10, 10]
    assert batch_size_at(1, TrainArgs(batch_size=10)) == 10
    assert batch_size_at(1, replace(args, batch_ramp_steps=0)) == 10


def splits_evenly(batch_at, args: TrainArgs) -> bool:
    """Every batch is cut into grad_accum equal, non-empty parts, and never shrinks."""
    batches = [batch_at(step, args) for step in range(1, args.batch_ramp_steps + 2)]
    return (all(b % args.grad_accum == 0 and b > 0 for b in batches)
            and all(a <= b for a, b in pairwise(batches)) and batches[-1] == args.batch_size)


def without_rounding(step: int, args: TrainArgs) -> int:
    return batch_size_at(step, replace(args, grad_accum=1))


@settings(max_examples=100, deadline=None)
@given(accum=st.integers(1, 6), parts=st.integers(1, 8), start=st.integers(1, 48),
       ramp=st.integers(0, 20))
def test_batch_splits_into_micro_batches(accum, parts, start, ramp):
    size = accum * parts
    args = TrainArgs(batch_size=size, grad_accum=accum, batch_start=min(start, size),
                     batch_ramp_steps=ramp)
    assert splits_evenly(batch_size_at, args)


def test_batch_check_notices():
    args = TrainArgs(batch_size=12, grad_accum=4, batch_start=3, batch_ramp_steps=6)
    assert splits_evenly(batch_size_at, args) and not splits_evenly(without_rounding, args)


def test_mtp_weight_and_bias_speed_switch_late():
    args = TrainArgs(steps=1000, mtp_weight=0.3, mtp_weight_late=0.1, mtp_switch=0.68,
                     bias_speed=0.01, bias_until=0.966)
    assert [mtp_weight_at(s, args) for s in (1, 680, 681, 1000)] == [0.3, 0.3, 0.1, 0.1]
    assert [bias_speed_at(s, args) for s in (1, 966, 967, 1000)] == [0.01, 0.01, 0.0, 0.0]
    always = replace(args, bias_until=1.0, mtp_switch=1.0)
    assert (mtp_weight_at(1000, always), bias_speed_at(1000, always)) == (0.3, 0.01)
