"""The presets for one card: they fit, their tokens are the cheapest for the loss, tables agree."""

import re
from pathlib import Path

import pytest
import torch
from cost_shapes import NANO

from minids import ModelArgs, Transformer
from minids.costs import count_parameters
from minids.costs.__main__ import main
from minids.costs.cards import (
    CARDS,
    GB,
    PEAK_FLOPS,
    TOKENS_PER_PARAMETER,
    Recipe,
    expected_loss,
    plan_card,
    single_gpu_memory,
)
from minids.runs.optimizers import build_optimizers
from minids.runs.settings import TrainArgs

PRESETS = {card.preset: card.rental for card in CARDS}
PAGE = Path(__file__).parents[2] / "minids" / "README.md"


def recipe_of(preset: str) -> Recipe:
    train = TrainArgs.for_preset(preset)
    return Recipe(train.seq_len, train.batch_size // train.grad_accum,
                  train.steps * train.batch_size * train.seq_len, train.recompute != "none")


def test_data_sheets():
    """GB and dense BF16 TFLOPS (T4: FP16)."""
    assert {name: (GB[name], PEAK_FLOPS[name] / 1e12) for name in GB} == {
        "H100": (80, 989), "H100 PCIe": (80, 756), "H100 NVL": (94, 835), "H200": (141, 989),
        "H800": (80, 989), "A100": (80, 312), "L40S": (48, 362), "RTX 4090": (24, 165),
        "RTX 3090": (24, 71), "T4": (16, 65)}
    assert PEAK_FLOPS.keys() == GB.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_its_card_and_uses_it(preset):
    args, recipe, rental = ModelArgs.preset(preset), recipe_of(preset), PRESETS[preset]
    run = plan_card(args, recipe, rental)
    assert run.fits and run.memory > 0.6 * rental.gpu_memory * 1e9
    larger = recipe._replace(micro_batch=4 * recipe.micro_batch)
    assert not plan_card(args, larger, rental).fits
    assert run.tokens_per_second * run.bill.gpu_hours * 3600 == pytest.approx(recipe.tokens)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_products_fill_the_tensor_cores(preset):
    """Widths in multiples of 128; a thousand rows for each expert and more."""
    args, recipe = ModelArgs.preset(preset), recipe_of(preset)
    widths = [args.vocab_size, args.dim, args.inter_dim, args.moe_inter_dim, args.kv_lora_rank,
              args.n_heads * args.qk_head_dim, args.n_heads * args.v_head_dim]
    assert [width for width in widths if width % 128] == []
    rows = recipe.micro_batch * recipe.seq_len * args.n_activated_experts / args.n_routed_experts
    assert rows >= 1000
    assert ModelArgs.preset("small").moe_inter_dim < 0.7 * args.moe_inter_dim  # narrow ones


@pytest.mark.parametrize("preset", PRESETS)
def test_no_other_size_reaches_a_lower_loss_with_the_same_work(preset):
    active, tokens = (count_parameters(ModelArgs.preset(preset)).active_without_embedding,
                      recipe_of(preset).tokens)
    assert tokens / active == pytest.approx(TOKENS_PER_PARAMETER, rel=0.02)
    own = expected_loss(active, tokens)
    for factor in (0.5, 2.0):
        assert own < expected_loss(active * factor, tokens / factor)
    wrong = expected_loss(active, tokens / 4)  # a quarter of the tokens is not the cheapest
    assert wrong > expected_loss(active / 2, tokens / 2)


def test_expected_loss_is_the_published_law():
    """Chinchilla, 70B parameters and 1.4T tokens: E + A / N^alpha + B / D^beta."""
    assert expected_loss(70e9, 1.4e12) == pytest.approx(1.8172 + 0.0820 + 0.0751, abs=2e-3)


def test_memory_is_what_torch_holds():
    """Weights, gradients and optimizer, element by element, of a small model after one step."""
    model = Transformer(NANO)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers = build_optimizers(model, TrainArgs.for_preset("nano"), torch.float32)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(t.numel() * t.element_size() for o in optimizers for state in o.state.values()
               for t in state.values() if t.dim())
    counted = single_gpu_memory(NANO, Recipe(128, 4, 1, False))
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert (counted.weights, counted.gradients) == (weights * 6 // 4, weights)
    # Norms have a second moment, too: less than a hundredth.
    assert counted.optimizer <= held < 1.01 * counted.optimizer
    assert held > 1.1 * weights  # embedding and head count twice


def printed(capsys, *argv: str) -> str:
    main(["--what", "cards", *argv])
    return capsys.readouterr().out


def test_the_pages_table_is_the_programs(capsys):
    shown = re.search(r"^ +memory  of peak.*?(?=^```)", PAGE.read_text("utf-8"), re.M | re.S)
    assert shown and shown[0] == printed(capsys)


def test_other_rates_are_other_bills(capsys):
    def dollars(*argv: str) -> list[int]:
        lines = [line.split() for line in printed(capsys, *argv).splitlines()[1:1 + len(CARDS)]]
        return [int(words[-2].replace(",", "")) for words in lines]

    once, twice = dollars("--gpu-price", "100"), dollars("--gpu-price", "200")
    assert all(abs(b - 2 * a) <= 2 for a, b in zip(once, twice, strict=True))
    assert "too much" in printed(capsys, "--gpu-memory", "16")
