"""Plan a run on rented GPUs: whether it fits, how long it takes and what it costs; API prices."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from minids.base.fields import Settings, demand, option
from minids.config import ModelArgs
from minids.costs.flops import flops_per_token
from minids.costs.memory import Memory, Sharding, pipeline_pieces, training_memory

# DeepSeek-V3 (arXiv 2412.19437) table 1.
V3_GPU_HOURS = {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}
# What R1 added, on 512 H800, as reported beside the Nature version (645:633).
R1_GPU_HOURS = {"R1-Zero": 101_000, "R1": 41_000, "data for fine-tuning": 5_000}
V3_TOKENS = 14.8e12  # of pre-training


@dataclass(frozen=True)
class Rental(Settings):
    """GPUs rented by the hour."""

    gpu: str = option("H800", "name of the GPU")
    gpu_memory: float = option(80.0, "memory per GPU, GB of 10^9 bytes", above=0)
    gpu_peak: float = option(989.5, "BF16 peak per GPU, TFLOPS", above=0)
    gpu_price: float = option(2.0, "price per GPU, USD an hour", low=0)
    mfu: float = option(0.39, "share of the peak that training reaches", above=0, high=1)


class Bill(NamedTuple):
    """Time and money."""

    gpu_hours: float
    gpus: int  # that share the work
    price: float  # USD per GPU-hour

    @property
    def days(self) -> float:
        """Return the days from start to end."""
        return self.gpu_hours / self.gpus / 24

    @property
    def dollars(self) -> float:
        """Return the price of the work, USD."""
        return self.gpu_hours * self.price


def training_bill(work: float, tokens: float, gpus: int, rental: Rental) -> Bill:
    """Return the bill for `tokens` tokens; work: training FLOPs per token; gpus: that share it."""
    hours = tokens * work / (rental.gpu_peak * 1e12 * rental.mfu * 3600)
    return Bill(hours, gpus, rental.gpu_price)


@dataclass(frozen=True)
class Prices(Settings):
    """API prices, USD per million tokens."""

    prompt_price: float = option(0.0, "prompt, USD per million tokens", low=0)
    cached_price: float = option(0.0, "cached prompt tokens, USD per million tokens", low=0)
    output_price: float = option(0.0, "output, USD per million tokens", low=0)


# What serving costs at position 128K on H800 at 2 USD an hour, read off figure 3 of the V3.2-Exp
# report. It does not state the cost of a cached prompt: taken as any other.
SERVING_128K = {"dense (V3.1-Terminus)": Prices(0.66, 0.66, 2.15),
                "DSA (V3.2-Exp)": Prices(0.19, 0.19, 0.25)}


def api_price(prompt_tokens: int, cached_tokens: int, output_tokens: int, prices: Prices) -> float:
    """Return the price of a workload, USD; output includes reasoning.

    cached_tokens: how many of the prompt tokens the service has in its cache
    Raises ValueError if a count is negative or more tokens are cached than there are.
    """
    demand("cached_tokens", cached_tokens, 0 <= cached_tokens <= prompt_tokens,
           f"between 0 and prompt_tokens = {prompt_tokens}")
    demand("output_tokens", output_tokens, output_tokens >= 0, "0 or more")
    return ((prompt_tokens - cached_tokens) * prices.prompt_price
            + cached_tokens * prices.cached_price + output_tokens * prices.output_price) / 1e6


class Plan(NamedTuple):
    """A training run on rented GPUs."""

    sharding: Sharding
    memory: Memory
    fits: bool  # into a GPU; memory is without workspace, so leave some room
    bill: Bill


def plan(args: ModelArgs, tokens: float, rental: Rental, sharding: Sharding,
         seq_len: int = 4096) -> Plan:
    """Plan a training run of `tokens` tokens in sequences of seq_len; attention is causal."""
    memory = training_memory(args, sharding)
    bill = training_bill(flops_per_token(args, seq_len), tokens, sharding.gpus, rental)
    return Plan(sharding, memory, memory.total <= rental.gpu_memory * 1e9, bill)


def layouts(args: ModelArgs, gpus: int, given: dict) -> Iterator[Sharding]:
    """Yield the valid ways to shard a model: V3's own, then from few splits to many."""
    most_ranks, most_shares = len(pipeline_pieces(args)), max(args.n_routed_experts, 1)
    plain = [dict(pipeline=ranks, expert_parallel=shares, zero=zero, dualpipe=False)
             for zero in (1, 3) for ranks in range(1, most_ranks + 1)
             for shares in range(1, most_shares + 1) if gpus % (ranks * shares) == 0]
    for choice in [{}, *plain]:
        with suppress(ValueError):
            sharding = Sharding(**choice | {"gpus": gpus} | given)
            sharding.check(args)
            yield sharding


def choose_sharding(args: ModelArgs, gpus: int, rental: Rental,
                    given: dict | None = None) -> Sharding:
    """Return the first of `layouts` that fits the rented GPUs, else the one that needs least.

    Raises ValueError if no valid layout has the `given` fields of Sharding.
    """
    given, needs = given or {}, {}
    for sharding in layouts(args, gpus, given):
        needs[sharding] = training_memory(args, sharding).total
        if needs[sharding] <= rental.gpu_memory * 1e9:
            return sharding
    if not needs:
        one = dict(gpus=gpus, pipeline=1, expert_parallel=1, dualpipe=False)
        Sharding(**one | given).check(args)  # says what is wrong with them
    return min(needs, key=needs.get)
