"""Blocks compiled from outside: traced whole, in training only, with one line where that fails.

The compiler's back end, which takes a minute, is left out here; a slow test of `train` has it.
"""

import functools
from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, random_tokens, scrambled
from torch._dynamo.exc import TorchDynamoException

from minids.apply.compile import Compiled, compile_blocks
from minids.apply.recompute import policy, recompute_blocks
from minids.kernels.registry import recorded
from minids.model.moe import Experts

TOKENS = random_tokens(LITTLE, 2, 12)


def step(model) -> tuple[float, list]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(TOKENS, TOKENS.roll(-1, 1))
    losses.total.backward()
    return losses.total.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("how", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_blocks_are_traced_whole_and_only_in_training(how, monkeypatch):
    torch.compiler.reset()
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True))
    modules = LITTLE.n_mtp_layers if how == "selective" else 0
    model = scrambled(replace(LITTLE, n_mtp_layers=modules), dtype=torch.float32)
    plain, names = step(model), list(model.state_dict())
    recompute_blocks(model, how)
    compile_blocks(model)
    with recorded() as traced:
        loss, grads = step(model)
    # The formula of the norm in one piece, not in two: other roundings to BF16.
    assert loss == pytest.approx(plain[0], rel=1e-3)
    for a, b in zip(plain[1], grads, strict=True):
        assert (a - b).norm() <= 0.03 * a.norm()
    # Dense, experts, and here MTP; a checkpoint's inside is a graph.
    kinds = 2 if how == "none" else 2 * 3
    assert len(graphs) <= kinds and traced["rope.apply_rotary_emb", "real_pairs"] > 0
    assert traced["layers.rms_norm", "traced"] > 0
    assert list(model.state_dict()) == names
    before = len(graphs)
    with torch.no_grad():
        model(TOKENS[:, :7])
    with recorded():  # whether choices are recorded is part of the code, what they were is not
        step(model)
    assert len(graphs) == before


@pytest.mark.parametrize("varied, times", [(1, 1), (0, 3)])
def test_one_code_serves_any_number_of_rows(varied, times, monkeypatch):
    torch.compiler.reset()
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, _: graphs.append(graph) or graph))
    run = Compiled(lambda x, w: x @ w, print, varied=varied)
    for rows in (5, 7, 2):
        x = torch.randn(rows, 3)
        assert torch.equal(run(x, torch.eye(3)), x)
    assert len(graphs) == times


@pytest.mark.slow
def test_batches_of_another_size_and_products_it_does_not_know_are_left_out(monkeypatch):
    """A ramp's smaller batches run as they are; FP32 experts run between two graphs."""
    torch.compiler.reset()
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, _: graphs.append(graph) or graph))
    model = scrambled(replace(LITTLE, n_mtp_layers=0), dtype=torch.float32)
    plain = model.loss(TOKENS, TOKENS.roll(-1, 1)).total
    compile_blocks(model, torch.float32, sequences=2)
    assert model.loss(TOKENS[:1], TOKENS[:1].roll(-1, 1)).total.isfinite() and not graphs
    loss = model.loss(TOKENS, TOKENS.roll(-1, 1)).total
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6) and graphs  # FP32
    made = []
    for shift in (3, 5, 7, 9):  # experts get other numbers of tokens, and nothing is compiled anew
        model.loss((TOKENS + shift) % LITTLE.vocab_size, TOKENS).total.backward()
        made.append(len(graphs))
    assert made[0] == made[-1], made


def test_what_is_stored_and_what_the_compiler_leaves_out():
    operations = torch.ops.aten.bmm.default, torch.ops.aten.mm.default
    assert [policy(None, operation).name for operation in operations] == [
        "MUST_SAVE", "PREFER_RECOMPUTE"]
    for dtype, outside in ((torch.bfloat16, False), (torch.float32, True)):
        model = scrambled(LITTLE)
        compile_blocks(model, dtype)
        assert {"product" in vars(m) for m in model.modules() if isinstance(m, Experts)} == {
            outside}
        assert not any("forward" in vars(layer.attn) for layer in model.layers)
    model = scrambled(replace(LITTLE, index_n_heads=4, index_head_dim=16, index_topk=4))
    compile_blocks(model)  # kernels that fetch what an indexer selects stay as they are
    assert all(layer.attn.forward._torchdynamo_disable for layer in model.layers)


def test_where_the_compiler_fails_one_line_says_so_and_training_goes_on(monkeypatch):
    def fail(function, **how):
        def call(*inputs):
            try:
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")
            except RuntimeError as error:
                raise TorchDynamoException("backend failed") from error
        return call

    model = scrambled(LITTLE, dtype=torch.float32)
    plain, said = step(model), []
    monkeypatch.setattr(torch, "compile", fail)
    compile_blocks(model, tell=said.append)
    loss, grads = step(model)
    assert said == ["compile: Failed to find C compiler.; the run goes on without"]
    assert loss == plain[0] and all(map(torch.equal, grads, plain[1]))


def test_an_error_of_the_model_is_not_the_compilers(monkeypatch):
    def no_memory(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = scrambled(LITTLE, dtype=torch.float32)
    monkeypatch.setattr(torch, "compile", lambda function, **how: no_memory)
    compile_blocks(model)
    with pytest.raises(torch.OutOfMemoryError):
        step(model)
