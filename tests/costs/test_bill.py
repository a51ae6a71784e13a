"""Bills, prices and plans against published integers."""

from types import SimpleNamespace

import pytest
from cost_shapes import TINY, V3

from minids.costs import bill
from minids.costs.bill import (
    R1_GPU_HOURS,
    SERVING_128K,
    V3_GPU_HOURS,
    V3_TOKENS,
    Bill,
    Prices,
    Rental,
    api_price,
    choose_sharding,
    layouts,
    plan,
    training_bill,
)
from minids.costs.flops import flops_per_token
from minids.costs.memory import Sharding, training_memory


def test_bill_of_v3():
    made = training_bill(flops_per_token(V3, 4096), 14.8e12, 2048, Rental())
    assert round(made.gpu_hours) == 2_668_230
    assert made.gpu_hours == pytest.approx(2_664_000, rel=0.002)  # the paper's, MFU in two digits
    assert made.dollars == 2 * made.gpu_hours and made.days == made.gpu_hours / 2048 / 24
    wrong = training_bill(flops_per_token(V3, 4096, causal=False), 14.8e12, 2048, Rental())
    assert wrong.gpu_hours != pytest.approx(2_664_000, rel=0.1)
    assert sum(V3_GPU_HOURS.values()) == 2_788_000
    assert Bill(2_788_000, 2048, 2.0).dollars == 5_576_000
    per_trillion = Bill(2_664_000 / 14.8, 2048, 2.0)
    assert round(per_trillion.gpu_hours) == 180_000 and f"{per_trillion.days:.1f}" == "3.7"


def test_a_bill_reaches_the_mfu_it_is_given():
    work, rental = flops_per_token(V3, 4096), Rental(mfu=0.25)
    hours = training_bill(work, 1e12, 64, rental).gpu_hours
    # A product undone by a division: a few roundings in FP64.
    teraflops = work * 1e12 / (hours * 3600) / 1e12
    assert teraflops / rental.gpu_peak == pytest.approx(0.25, rel=1e-12)


def test_price_of_a_workload():
    prices = Prices(prompt_price=2.0, cached_price=0.5, output_price=8.0)
    # 1M tokens read anew, 3M from the cache, 0.5M written.
    assert api_price(4_000_000, 3_000_000, 500_000, prices) == 2 + 1.5 + 4
    assert api_price(4_000_000, 0, 500_000, prices) == 8 + 4
    both_paid = 4 * 2.0 + 3 * 0.5 + 0.5 * 8.0  # wrong variant: cached tokens paid twice
    assert api_price(4_000_000, 3_000_000, 500_000, prices) != both_paid
    dense, sparse = SERVING_128K.values()
    assert api_price(1_000_000, 1_000_000, 1_000_000, dense) == pytest.approx(0.66 + 2.15)
    assert api_price(1_000_000, 0, 1_000_000, sparse) == pytest.approx(0.19 + 0.25)


@pytest.mark.parametrize("tokens, complaint", [
    ((10, 11, 0), "cached_tokens = 11 is not valid: it must be between 0 and prompt_tokens = 10"),
    ((10, -1, 0), "cached_tokens = -1 is not valid"),
    ((10, 0, -1), "output_tokens = -1 is not valid: it must be 0 or more")])
def test_impossible_workloads_are_refused(tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        api_price(*tokens, Prices())


def test_plan_puts_memory_and_bill_together():
    run = plan(V3, 14.8e12, Rental(), Sharding())
    assert run.fits and run.memory == training_memory(V3, Sharding())
    assert round(run.bill.gpu_hours) == 2_668_230 and f"{run.bill.days:.1f}" == "54.3"
    tight = Rental(gpu_memory=run.memory.total / 1e9 - 1e-6)
    assert not plan(V3, 14.8e12, tight, Sharding()).fits
    longer = plan(V3, 14.8e12, Rental(), Sharding(), seq_len=32_768)
    assert longer.bill.gpu_hours > run.bill.gpu_hours


def test_layout_is_v3s_own_where_it_fits_and_else_the_first_that_does():
    rental = Rental()
    assert choose_sharding(V3, 2048, rental) == Sharding()
    assert choose_sharding(TINY, 1, rental) == Sharding(gpus=1, pipeline=1, expert_parallel=1,
                                                        dualpipe=False)
    large = Rental(gpu_memory=141.0)
    chosen = choose_sharding(V3, 512, large)
    assert plan(V3, 1e12, large, chosen).fits
    fewer = [s for s in layouts(V3, 512, {}) if s.pipeline < chosen.pipeline and s.zero == 1]
    assert fewer and not any(plan(V3, 1e12, large, s).fits for s in fewer)
    assert choose_sharding(V3, 512, large, dict(pipeline=8)).pipeline == 8


def test_a_memory_that_is_filled_to_the_last_byte_is_enough(monkeypatch):
    monkeypatch.setattr(bill, "training_memory", lambda *given: SimpleNamespace(total=80 * 10**9))
    assert plan(V3, 1e12, Rental(gpu_memory=80.0), Sharding()).fits
    assert choose_sharding(V3, 2048, Rental(gpu_memory=80.0)) == Sharding()
    monkeypatch.setattr(bill, "training_memory", lambda args, sharding: SimpleNamespace(
        total=80 * 10**9 + (sharding == Sharding())))
    assert choose_sharding(V3, 2048, Rental(gpu_memory=80.0)) != Sharding()


def test_layout_that_needs_least_where_none_fits():
    rental = Rental()
    chosen = choose_sharding(V3, 8, rental)
    needs = {training_memory(V3, s).total for s in layouts(V3, 8, {})}
    assert training_memory(V3, chosen).total == min(needs) > 80e9
    assert len(needs) > 1
    with pytest.raises(ValueError, match="pipeline = 3 is not valid: it must be a divisor of 8"):
        choose_sharding(V3, 8, rental, dict(pipeline=3))


def test_hours_and_prices_are_the_published_ones():
    assert [*V3_GPU_HOURS.values()] == [2_664_000, 119_000, 5_000] and V3_TOKENS == 14.8e12
    assert [*R1_GPU_HOURS.values()] == [101_000, 41_000, 5_000]
    assert [*SERVING_128K.values()] == [Prices(0.66, 0.66, 2.15), Prices(0.19, 0.19, 0.25)]
