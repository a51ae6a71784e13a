"""Optimizers: Muon against torch's own, stacks against single matrices, groups."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LITTLE

from minids import ModelArgs, Transformer
from minids.model.sparse_attention import freeze_all_but_indexers
from minids.runs import optimizers as optim
from minids.runs.optimizers import (
    Muon,
    bias_speed_at,
    build_optimizers,
    clip_gradients,
    is_hidden_matrix,
    orthogonalise,
)
from minids.runs.settings import TrainArgs

SHAPES = [(24, 40), (40, 24), (32, 32), (24, 40), (1, 16)]
WIDE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = WIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def moved(make_optimizer, starts: list[torch.Tensor], steps: int = 4) -> list[torch.Tensor]:
    """Where `steps` steps along given gradients take the parameters."""
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = make_optimizer(params)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=100 * step + i, dtype=p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def way_apart(ours: list[torch.Tensor], theirs: list[torch.Tensor], starts: list) -> float:
    """The largest distance between two end points, relative to the way that was gone."""
    return max(((a - b).norm() / (b - start).norm()).item()
               for a, b, start in zip(ours, theirs, starts, strict=True))


# Muon against torch's own.

SETTINGS = dict(lr=0.02, weight_decay=0.5)  # enough decay to matter in four steps
TORCHS = dict(**SETTINGS, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
OTHER_RULES = {"momentum": 0.9, "nesterov": False, "adjust_lr_fn": "original", "weight_decay": 0.0,
               "ns_steps": 4}


def test_muon_equals_torchs(monkeypatch):
    """torch casts to BF16 first; with that cast taken away both compute in FP64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    starts = [normal(*shape, seed=i + 50) for i, shape in enumerate(SHAPES)]
    ours = moved(lambda p: Muon(p, dtype=WIDE, **SETTINGS), starts)
    theirs = moved(lambda p: torch.optim.Muon(p, **TORCHS), starts)
    # Ours adds 1e-7 to the matrix's norm, about 1 here, where torch bounds the norm by 1e-7: the
    # steps differ by about as much.
    assert way_apart(ours, theirs, starts) < 1e-6
    for name, value in OTHER_RULES.items():
        wrong = moved(lambda p, n=name, v=value: torch.optim.Muon(p, **TORCHS | {n: v}), starts)
        assert way_apart(ours, wrong, starts) > 5e-3, name


def test_muon_equals_torchs_unchanged():
    """As it is, in BF16; ours in FP32 and in BF16."""
    starts = [normal(*shape, seed=i + 50, dtype=torch.float32) for i, shape in enumerate(SHAPES)]
    theirs = moved(lambda p: torch.optim.Muon(p, **TORCHS), starts)
    for dtype in (torch.float32, torch.bfloat16):
        ours = moved(lambda p, d=dtype: Muon(p, dtype=d, **SETTINGS), starts)
        # BF16 keeps 8 bits: 0.4 % in every product, partly averaged out over a matrix.
        assert way_apart(ours, theirs, starts) < 0.01


# A stack of experts.

def stack_apart(shape: tuple) -> float:
    """Return how far a stack's step is from the steps of its matrices one by one."""
    start = normal(4, *shape)
    grad = normal(4, *shape, seed=1) * torch.tensor([1e-3, 1.0, 30.0, 0.1]).view(-1, 1, 1)

    def step(start: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        p = torch.nn.Parameter(start.clone())
        p.grad = grad.clone()
        Muon([p], dtype=WIDE, **SETTINGS).step()
        return p.detach()

    together = step(start, grad)
    apart = torch.stack([step(s, g) for s, g in zip(start, grad, strict=True)])
    return way_apart([together], [apart], [start])


def normalised_by_stack(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The wrong variant: one norm for all experts, so that quiet ones hardly move."""
    return right(x / x.norm(), steps, norm=lambda m: 1.0)


def right(x: torch.Tensor, steps: int = 5, norm=None) -> torch.Tensor:
    """The iteration written out for single matrices, with the norm to be chosen."""
    norm = norm or torch.linalg.matrix_norm
    out = []
    for matrix in x:
        m = matrix / norm(matrix)
        for _ in range(steps):
            gram = m @ m.T
            m = 3.4445 * m + (-4.7750 * gram + 2.0315 * gram @ gram) @ m
        out.append(m)
    return torch.stack(out)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_stack_equals_each_expert_apart(shape, monkeypatch):
    # FP64 rounds at 1e-16, and the batched product adds in another order.
    assert stack_apart(shape) < 1e-10
    monkeypatch.setattr(optim, "orthogonalise", normalised_by_stack)
    assert stack_apart(shape) > 0.1


def test_expert_without_tokens_only_decays():
    """Its gradient is zero: no direction, and no 0 / 0 either."""
    p = torch.nn.Parameter(normal(3, 8, 12))
    start, p.grad = p.detach().clone(), normal(3, 8, 12, seed=1)
    p.grad[1] = 0
    Muon([p], dtype=WIDE, **SETTINGS).step()
    decay = 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
    torch.testing.assert_close(p.detach()[1], start[1] * decay, rtol=0, atol=0)
    assert (p.detach()[0] - start[0]).norm() > 0.1
    assert right(torch.zeros(1, 8, 12)).isnan().all()  # without the 1e-7 under the fraction


# Orthogonalisation.

def matrix_of(values: list[float], rows: int, cols: int, seed: int = 0) -> tuple:
    """(U, matrix, V) with the given singular values: U^T matrix V is their diagonal."""
    u = torch.linalg.qr(normal(rows, len(values), seed=seed)).Q
    v = torch.linalg.qr(normal(cols, len(values), seed=seed + 1)).Q
    return u, u @ torch.diag(torch.tensor(values, dtype=WIDE)) @ v.T, v


def is_orthogonalised(function, values: list[float], rows: int, cols: int) -> bool:
    """Return whether all singular values end between 0.6 and 1.3, on their singular vectors."""
    u, x, v = matrix_of(values, rows, cols)
    y = function(x[None])[0]
    if y.shape != x.shape or not y.isfinite().all():
        return False
    inside = u.T @ y @ v
    diagonal = inside.diagonal()
    rest = (inside - torch.diag(diagonal)).abs().max()
    return bool(diagonal.min() > 0.6 and diagonal.max() < 1.3 and rest < 1e-6)


# 1e-2 of the largest is the smallest value that five steps still bring up: a factor 3.4445 each.
spectra = st.lists(st.floats(1e-2, 1.0), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(values=spectra, scale=st.sampled_from([1e-3, 1.0, 1e3]), tall=st.booleans())
def test_orthogonalise_brings_singular_values_to_one(values, scale, tall):
    rows, cols = (20, 12) if tall else (12, 20)
    assert is_orthogonalised(orthogonalise, [scale * v for v in values], rows, cols)


def left_transposed(x: torch.Tensor) -> torch.Tensor:
    """A tall matrix comes back lying."""
    return orthogonalise(x.mT if x.size(-2) > x.size(-1) else x)


def not_normalised(x: torch.Tensor) -> torch.Tensor:
    return right(x, norm=lambda m: 1.0)


def by_qr(x: torch.Tensor) -> torch.Tensor:
    """Orthogonal too, but not the nearest: the singular vectors are others."""
    return torch.linalg.qr(x).Q


def too_few_steps(x: torch.Tensor) -> torch.Tensor:
    return orthogonalise(x, steps=2)


@pytest.mark.parametrize("wrong", [left_transposed, not_normalised, by_qr, too_few_steps])
def test_orthogonalise_check_notices(wrong):
    values = [10.0, 5.0, 2.0, 0.5, 0.2]
    assert is_orthogonalised(right, values, 20, 12)
    assert not is_orthogonalised(wrong, values, 20, 12)


def step_size(make_optimizer, shape: tuple) -> float:
    """Root mean square of one step at learning rate 1."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32))
    p.grad = normal(*shape, dtype=torch.float32)
    make_optimizer([p]).step()
    return p.detach().square().mean().sqrt().item()


def test_step_has_the_size_of_adamws():
    """Root mean square 0.2 lr for any shape (arXiv 2502.16982, section 2.2)."""
    def ours(params):
        return Muon(params, lr=1.0, weight_decay=0.0)

    def as_first_published(params):
        return torch.optim.Muon(params, lr=1.0, weight_decay=0.0, adjust_lr_fn="original")

    # Exact for singular values of one; a random matrix's end between about 0.7 and 1.2.
    shapes = [(64, 64), (16, 256), (256, 16)]
    assert all(0.14 < step_size(ours, shape) < 0.24 for shape in [*shapes, (3, 16, 48)])
    assert not all(0.14 < step_size(as_first_published, shape) < 0.24 for shape in shapes)


# Parameter groups.

def model_and_names(args: ModelArgs) -> tuple[Transformer, dict[int, str]]:
    model = Transformer(args)
    return model, {id(p): name for name, p in model.named_parameters()}


def misplaced(optimizers: list, names: dict[int, str], args: TrainArgs) -> list[str]:
    """Every parameter that is not exactly once where it belongs."""
    places = [(names[id(p)], type(o).__name__, group["weight_decay"])
              for o in optimizers for group in o.param_groups for p in group["params"]]
    wrong = [name for name in names.values() if [n for n, _, _ in places].count(name) != 1]
    for name, kind, decay in places:
        is_norm = name.endswith("norm.weight")
        outside = is_norm or name in ("embed.weight", "head.weight")
        expected = "Muon" if args.optimizer == "muon" and not outside else "AdamW"
        if kind != expected or decay != (0 if is_norm else args.weight_decay):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("choice", ["adamw", "muon"])
@pytest.mark.parametrize("model_args", [LITTLE, replace(LITTLE, n_routed_experts=0),
                                        replace(LITTLE, q_lora_rank=0, n_mtp_layers=0)],
                         ids=["all parts", "dense", "no query latent, no MTP"])
def test_every_parameter_is_in_its_group_once(model_args, choice):
    args = TrainArgs(optimizer=choice, weight_decay=0.3)
    model, names = model_and_names(model_args)
    assert misplaced(build_optimizers(model, args, torch.float32), names, args) == []


def test_muon_takes_experts_gate_and_projections():
    args = TrainArgs(optimizer="muon")
    model, names = model_and_names(LITTLE)
    _, muon = build_optimizers(model, args, torch.float32)
    taken = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert {"layers.1.ffn.experts.w1", "layers.1.ffn.experts.w2", "layers.1.ffn.gate.weight",
            "layers.0.attn.wq_a.weight", "layers.0.ffn.w1.weight", "mtp.0.eh_proj.weight",
            "mtp.0.block.ffn.experts.w3"} <= taken
    assert not {"embed.weight", "head.weight", "norm.weight"} & taken


SPARSE = replace(LITTLE, index_n_heads=4, index_head_dim=16)


def indexer_faults(optimizers: list, names: dict[int, str], args: TrainArgs) -> list[str]:
    """Trained parameters with another learning rate than theirs, or indexers outside AdamW."""
    wrong = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name in (names[id(p)] for p in group["params"]):
                muon = type(optimizer) is Muon
                rate = args.indexer_lr if ".indexer." in name else args.muon_lr if muon else args.lr
                if group["peak_lr"] != rate or (muon and ".indexer." in name):
                    wrong.append(name)
    return wrong


@pytest.mark.parametrize("choice", ["adamw", "muon"])
def test_indexers_have_groups_of_their_own(choice, monkeypatch):
    args = TrainArgs(optimizer=choice, lr=1.0, muon_lr=2.0, indexer_lr=3.0, weight_decay=0.3)
    model, names = model_and_names(SPARSE)
    optimizers = build_optimizers(model, args, torch.float32)
    assert indexer_faults(optimizers, names, args) == []
    every = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(every) == sorted(names)
    decays = {names[id(p)].split("indexer.")[1]: group["weight_decay"]
              for group in optimizers[0].param_groups[2:] for p in group["params"]}
    assert decays == {"wq_b.weight": 0.3, "wk.weight": 0.3, "weights_proj.weight": 0.3,
                      "k_norm.weight": 0, "k_norm.bias": 0}
    monkeypatch.setattr(optim, "in_indexer", lambda name: False)
    assert indexer_faults(build_optimizers(model, args, torch.float32), names, args)


def test_restored_optimizers_keep_the_peak_rates_that_they_have_now():
    model, _ = model_and_names(SPARSE)
    rates = dict(lr=1.0, muon_lr=2.0, indexer_lr=3.0)
    before, now = (build_optimizers(model, TrainArgs(optimizer="muon", **{
        name: factor * rate for name, rate in rates.items()}), torch.float32) for factor in (1, 10))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in before:
        optimizer.step()
    saved = [optimizer.state_dict() for optimizer in before]
    optim.restore(now, saved)
    peaks = [[group["peak_lr"] for group in o.param_groups] for o in now]
    assert peaks == [[10, 10, 30, 30], [20]]
    for optimizer, states in zip(now, saved, strict=True):
        assert str(optimizer.state_dict()["state"]) == str(states["state"]) != "{}"


def test_frozen_parameters_are_in_no_group():
    model, names = model_and_names(SPARSE)
    freeze_all_but_indexers(model)
    [adamw] = build_optimizers(model, TrainArgs(optimizer="muon"), torch.float32)
    taken = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken == {name for name in names.values() if ".indexer." in name}


def norms_after_clipping(indexer_grad: float, clip=clip_gradients) -> list[float]:
    """The norms of both parts' gradients, that of the model 30 before."""
    torch.manual_seed(0)
    model = Transformer(SPARSE)
    parts = [[p for n, p in model.named_parameters() if (".indexer." in n) == own]
             for own in (False, True)]
    for part, norm in zip(parts, (30.0, indexer_grad), strict=True):
        flat = torch.randn(sum(p.numel() for p in part))
        flat *= norm / flat.norm()
        for p, grad in zip(part, flat.split([p.numel() for p in part]), strict=True):
            p.grad = grad.view_as(p)
    before = clip(model, 1.0)
    if clip is clip_gradients:
        assert list(before) == ["grad_norm", "indexer_grad_norm"]
        assert list(before.values()) == pytest.approx([30.0, indexer_grad], rel=1e-5)
    return [torch.cat([p.grad.flatten() for p in part]).norm().item() for part in parts]


def test_indexers_are_clipped_apart():
    """FP32 norms of some thousand numbers."""
    assert norms_after_clipping(40.0) == pytest.approx([1.0, 1.0], rel=1e-4)
    assert norms_after_clipping(0.5) == pytest.approx([1.0, 0.5], rel=1e-4)

    def together(model, longest):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), longest)

    assert norms_after_clipping(40.0, together)[0] == pytest.approx(0.6, rel=1e-4)
    dense = Transformer(LITTLE)
    assert list(clip_gradients(dense, 1.0)) == ["grad_norm"]


def test_gate_biases_rest_in_the_warmup():
    rested, moves = (bias_speed_at(5, TrainArgs(from_run="x", dsa=dsa))
                     for dsa in ("warmup", "sparse"))
    assert rested == 0.0 and moves == TrainArgs.bias_speed


def test_group_check_notices(monkeypatch):
    args = TrainArgs(optimizer="muon")
    model, names = model_and_names(LITTLE)
    monkeypatch.setattr(optim, "is_hidden_matrix", lambda name, p: p.ndim >= 2)
    assert misplaced(build_optimizers(model, args, torch.float32), names, args) == [
        "embed.weight", "head.weight"]
    monkeypatch.setattr(optim, "is_hidden_matrix",
                        lambda name, p: is_hidden_matrix(name, p) and "experts." not in name)
    assert "layers.1.ffn.experts.w1" in misplaced(
        build_optimizers(model, args, torch.float32), names, args)
    monkeypatch.undo()
    adamw, muon = build_optimizers(model, args, torch.float32)
    assert len(misplaced([muon], names, args)) == len(adamw.param_groups[0]["params"]
                                                      + adamw.param_groups[1]["params"])
    adamw.param_groups[0]["params"].append(muon.param_groups[0]["params"][0])
    assert set(misplaced([adamw, muon], names, args)) == {
        names[id(muon.param_groups[0]["params"][0])]}


@pytest.mark.parametrize("norm, factor", [
    (0.9, 1.0), (0.999, 1.0), (1.0005, 1 / 1.0005), (4.0, 0.25)])
def test_gradients_only_just_too_long_are_scaled_too(norm, factor):
    layer = torch.nn.Linear(2, 2, dtype=WIDE)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optim.scale_gradients(layer, {"grad_norm": norm}, 1.0)
    for p in layer.parameters():  # torch adds 1e-6 to the norm
        assert p.grad.flatten()[0].item() == pytest.approx(factor, abs=2e-6)
