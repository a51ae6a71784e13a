"""The presets made for one card, and what their training takes there, by arithmetic.

The loss is that of a dense model with as many parameters as one token uses here, by the law of
Hoffmann et al. (arXiv 2203.15556) as fitted anew by Besiroglu et al. (arXiv 2404.10102): nats per
token of their text and their vocabulary of 32,000. Experts do better by an unknown margin.
"""

from dataclasses import replace
from typing import NamedTuple

from minids.base.fields import demand
from minids.config import ModelArgs
from minids.costs.bill import Bill, Rental, training_bill
from minids.costs.flops import flops_per_token
from minids.costs.memory import Memory, Sharding, training_memory
from minids.costs.parameters import count_parameters

# Dense BF16 rates with FP32 sums (T4: FP16) from the vendors' data sheets, FLOP/s; of the names
# that are part of a card's own, the first counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
              "H800": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "T4": 65e12}
GB = {"H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "H200": 141, "H800": 80, "A100": 80, "L40S": 48,
      "RTX 4090": 24, "RTX 3090": 24, "T4": 16}  # of 10^9 bytes; A100: the larger of two
TOKENS_PER_PARAMETER = 20  # that one token uses: where this law's two terms are equal
ROOM = 0.9  # of a card's memory; the rest is for logits, workspace and fragments


class Card(NamedTuple):
    """A card, the preset made for it, and whether its share of the peak was measured."""

    rental: Rental
    preset: str
    measured: bool = False


def card(name: str, memory: float, price: float, mfu: float, preset: str,
         measured: bool = False) -> Card:
    """Return a card; memory: GB; price: USD an hour, assumed; mfu: a careful guess, or measured."""
    return Card(Rental(name, memory, PEAK_FLOPS[name] / 1e12, price, mfu), preset, measured)


CARDS = (card("H100", 80, 2.5, 0.41, "gpu-80gb", measured=True),
         card("A100", 80, 1.5, 0.40, "gpu-80gb"),
         card("RTX 4090", 24, 0.4, 0.25, "gpu-24gb"), card("RTX 3090", 24, 0.25, 0.35, "gpu-24gb"))


def named_card(given: dict) -> Rental:
    """Return the card that `given` names, fields of Rental, with what it changes; default: H800.

    Price and share of the peak are those of CARDS, or Rental's for a card that is not there.
    Raises ValueError for a name without data sheet here, unless memory and peak are given.
    """
    name = given.get("gpu", Rental.gpu)
    known = next((one.rental for one in CARDS if one.rental.gpu == name), None)
    if name == Rental.gpu:
        known = Rental()
    elif known is None and name in GB:
        known = Rental(name, float(GB[name]), PEAK_FLOPS[name] / 1e12)
    demand("gpu", name, known is not None or {"gpu_memory", "gpu_peak"} <= given.keys(),
           f"one of {', '.join(GB)}, or given with gpu_memory and gpu_peak")
    return replace(known or Rental(), **given)


class Recipe(NamedTuple):
    """The settings of a training preset that decide its costs."""

    seq_len: int
    micro_batch: int  # sequences at a time
    tokens: int  # of the whole run
    recompute: bool


class CardPlan(NamedTuple):
    """A whole run on one card."""

    memory: int  # bytes
    fits: bool
    tokens_per_second: float
    bill: Bill
    loss: float  # nats per token


def expected_loss(parameters: float, tokens: float) -> float:
    """Return the loss of a dense model of this size after this many tokens, nats per token."""
    return 1.8172 + 482.01 / parameters ** 0.3478 + 2085.43 / tokens ** 0.3658


def single_gpu_memory(args: ModelArgs, recipe: Recipe) -> Memory:
    """Return the memory of a run with FP32 weights, their BF16 copies, and Muon.

    Muon keeps one moment of a matrix in the blocks; AdamW keeps two, of embedding and head.
    """
    memory = training_memory(args, Sharding(
        gpus=1, pipeline=1, dualpipe=False, expert_parallel=1, zero=0, weight_bytes=4 + 2,
        grad_bytes=4, master_bytes=0, moment_bytes=2,
        micro_batch_tokens=recipe.micro_batch * recipe.seq_len,
        recompute="block" if recipe.recompute else "none"))
    return memory._replace(optimizer=memory.optimizer + 4 * 2 * args.vocab_size * args.dim)


def plan_card(args: ModelArgs, recipe: Recipe, rental: Rental) -> CardPlan:
    """Plan a preset's whole run on one card."""
    memory, work = single_gpu_memory(args, recipe).total, flops_per_token(args, recipe.seq_len)
    active = count_parameters(args).active_without_embedding
    return CardPlan(memory, memory <= ROOM * rental.gpu_memory * 1e9,
                    rental.gpu_peak * 1e12 * rental.mfu / work,
                    training_bill(work, recipe.tokens, 1, rental),
                    expected_loss(active, recipe.tokens))
