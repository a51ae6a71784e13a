"""Training in FP8: which products the recipe takes, and what it does to loss and moments."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_models import LITTLE, random_tokens, scrambled

from minids.apply.fp8 import ExpertsInFP8, RoundedProduct, kernels, use_fp8, use_fp8_within
from minids.fp8 import fp8_linear
from minids.model.layers import Linear
from minids.model.moe import Experts, Gate
from minids.runs.optimizers import AdamWInBF16, build_optimizers
from minids.runs.settings import TrainArgs

FP8_ARGS = replace(LITTLE, dim=128, kv_lora_rank=128, q_lora_rank=128, inter_dim=128,
                   moe_inter_dim=128, n_heads=4, qk_nope_head_dim=32, v_head_dim=32)


def test_the_recipe_names_what_is_in_fp8_and_what_is_not():
    model = scrambled(replace(LITTLE, index_n_heads=2, index_head_dim=8))
    use_fp8(model)
    inside = {name for name, m in model.named_modules()
              if isinstance(m, Linear | Experts) and "product" in vars(m)}
    assert {name for name, m in model.named_modules() if isinstance(m, Linear | Experts)} - inside \
        == {"head", "mtp.0.eh_proj", *(f"{block}.attn.indexer.weights_proj"
                                       for block in ("layers.0", "layers.1", "mtp.0.block"))}
    assert not any(isinstance(m, Gate) for name, m in model.named_modules() if name in inside)


def test_plain_experts_get_the_form_of_fp8_and_others_keep_their_own():
    class Elsewhere(Experts):
        """Experts of a rank."""

    model = scrambled(replace(LITTLE, n_layers=3))
    plain, other = (model.layers[n].ffn.experts for n in (1, 2))
    other.__class__ = Elsewhere
    use_fp8(model)
    assert (type(plain), type(other)) == (ExpertsInFP8, Elsewhere)


def test_the_loss_on_equal_weights_moves_little_and_every_weight_learns():
    plain = scrambled(FP8_ARGS, dtype=torch.float32)
    rounded = copy.deepcopy(plain)
    use_fp8(rounded)
    tokens = random_tokens(LITTLE, 4, 32)
    losses = []
    for model in (plain, rounded):
        total = model.loss(tokens, tokens.roll(-1, 1)).total
        total.backward()
        losses += [total.item()]
    assert losses[0] != losses[1] and abs(losses[1] / losses[0] - 1) < 0.05  # a random model
    for (name, a), b in zip(plain.named_parameters(), rounded.parameters(), strict=True):
        cosine = torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)
        assert cosine > 0.8, name


def test_experts_in_fp8_are_one_expert_at_a_time():
    torch.manual_seed(0)
    model = scrambled(FP8_ARGS, dtype=torch.float32)
    experts = model.layers[1].ffn.experts
    x, counts = torch.randn(20, 128), torch.tensor([3, 0, 5, 1, 4, 0, 2, 4])
    use_fp8(model)
    mine = experts(x, counts)
    start = 0
    for e, count in enumerate(counts.tolist()):
        rows = x[start:start + count]
        hidden = torch.nn.functional.silu(fp8_linear(rows, experts.w1[e]))
        out = fp8_linear(hidden * fp8_linear(rows, experts.w3[e]), experts.w2[e])
        assert torch.equal(mine[start:start + count], out)
        start += count


def test_a_steps_copies_serve_passes_with_gradients_only(monkeypatch):
    """On a GPU; here a stand-in for the kernels' product says which copy it was given."""
    experts, given = scrambled(FP8_ARGS, dtype=torch.float32).layers[1].ffn.experts, []

    def product(x, weights, groups, rounded, *_):
        given.append((rounded, torch.is_grad_enabled()))
        return x.new_zeros(len(x), sum(w.size(-2) for w in weights))

    monkeypatch.setattr(kernels, "multiplied", product)
    use_fp8_within(torch.nn.ModuleList([experts]))
    linear = RoundedProduct("w")
    x, counts = torch.ones(2, 3, 128), torch.tensor([6, 0, 0, 0, 0, 0, 0, 0])
    for copies in (None, ("w13", "w2")):
        experts.rounded = copies
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert linear(x, experts.w1[0]).shape == (2, 3, 128)
                assert experts(x.flatten(0, 1), counts).shape == (6, 128)
    assert given == [(name, True) for name in ("w", "w", "w13", "w2")]


def test_moments_rest_in_bf16_and_a_resumed_step_is_the_same():
    torch.manual_seed(0)
    runs = []
    for resumed in (False, True):
        model = scrambled(LITTLE, dtype=torch.float32)
        settings = replace(TrainArgs(), fp8=True)
        [optimizer] = build_optimizers(model, settings, torch.float32)
        for step in range(3):
            if resumed and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                [optimizer] = build_optimizers(model, settings, torch.float32)
                optimizer.load_state_dict(state)
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        runs += [[p.detach().clone() for p in model.parameters()]]
        assert isinstance(optimizer, AdamWInBF16)
        moments = [m for s in optimizer.state.values() for m in (s["exp_avg"], s["exp_avg_sq"])]
        assert {m.dtype for m in moments} == {torch.bfloat16}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("slots, into, out_of", [
    ((None, None), "", ""), (("source", "slot"), "x", "y")])
@pytest.mark.parametrize("rounded", [None, ("w1 and w3", "w2 alone")])
def test_experts_fetch_tokens_and_add_up_results_where_slots_are_told(
        slots, into, out_of, rounded, monkeypatch):
    monkeypatch.setattr(kernels, "multiplied", lambda *given: given)
    made = SimpleNamespace(w1=1, w2=2, w3=3, rounded=rounded)
    up, down = ExpertsInFP8.products(made, "groups", slots)
    first, second = rounded or (None, None)
    assert up("rows") == ("rows", [1, 3], "groups", first, into, slots)
    assert down("rows") == ("rows", [2], "groups", second, out_of, slots)
