"""A decoding step that can become a CUDA graph gives what a step without one gives.

On a CPU the step runs as it would be captured: on tensors that stay where they are, looking at a
fixed number of slots. On a GPU it is captured.
"""

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
from small_models import LITTLE, random_tokens, scrambled

from minids.apply import folded, graphs
from minids.apply.graphs import Steps
from minids.apply.precision import ProductOfCopy, StepCopies
from minids.base import command_line
from minids.generate import generate
from minids.infer import decoding
from minids.infer.sampling import Sampler
from minids.kernels.registry import recorded, using
from minids.model.cache import LatentCache
from minids.model.moe import MoE
from minids.rl.rollout import log_probs, roll_out

PROMPTS = [[5, 9, 2, 33, 7], [8], [1, 2, 3], [4, 60, 50, 40, 30]]
SPARSE = replace(LITTLE, index_n_heads=12, index_head_dim=16, index_topk=5)  # no ties at 0
WIDE = replace(LITTLE, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
MODELS = {"query latent": LITTLE, "no query latent": replace(LITTLE, q_lora_rank=0),
          "indexer": SPARSE, "three modules": replace(LITTLE, n_mtp_layers=3)}
HOW = {"greedy": dict(), "sampled": dict(temperature=1.0, seed=3),
       "cut": dict(temperature=1.5, top_k=9, top_p=0.8), "ends": dict(eos_id=[7, 9, 12]),
       "draft": dict(speculative=1), "drafts": dict(speculative=3, temperature=1.0, seed=2)}
WIDE_SPARSE = replace(WIDE, index_n_heads=16, index_head_dim=16, index_topk=5)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures on a GPU only")


@pytest.fixture
def static(monkeypatch):
    """Let steps run as they are captured, on this device, with new sizes every few tokens."""
    def switch(on: bool = True) -> None:
        for module in (graphs, decoding):
            monkeypatch.setattr(module, "graphed", lambda device: on)
        monkeypatch.setattr(graphs, "SMALLEST", 8)
    return switch


@pytest.mark.parametrize("name, how", [
    pytest.param(name, how, marks=pytest.mark.slow if (i + k) % 2 else ())
    for i, name in enumerate(MODELS) for k, how in enumerate(HOW)])  # a chessboard of them is fast
def test_static_steps_write_the_same_text(static, name, how):
    model = scrambled(MODELS[name])
    plain = generate(model, PROMPTS, 24, **HOW[how])
    static()
    same = generate(model, PROMPTS, 24, **HOW[how])
    assert (same.tokens, same.passed) == (plain.tokens, plain.passed)
    assert max(map(len, plain.tokens)) > 8


@pytest.mark.parametrize("cut", [{}, dict(top_p=0.7)], ids=["all tokens", "cut"])
def test_static_rollouts_are_the_same(static, cut):
    def roll() -> tuple:
        sampler = Sampler(1.0, generator=torch.Generator().manual_seed(4), **cut)
        return roll_out(model, PROMPTS, 20, sampler, [3, 11])

    model = scrambled(LITTLE)
    plain = roll()
    static()
    same = roll()
    for name, values in plain._asdict().items():
        other = getattr(same, name)
        if isinstance(values, torch.Tensor) and name != "logp":
            assert torch.equal(values, other), name
    assert torch.allclose(same.logp, plain.logp, rtol=1e-9, atol=1e-12)  # sums in another order
    for layer, routes in plain.routes.items():
        seen = plain.written.cumsum(1) > 0  # what a finished reply's tokens visit is nobody's
        last = plain.written.int().flip(1).cummax(1).values.flip(1).bool()
        read = last.unsqueeze(-1).expand_as(routes)
        assert torch.equal(routes.sort(-1).values[read], same.routes[layer].sort(-1).values[read])
        assert seen.any()
    again = log_probs(model, same, keep_mask=True)[0]
    assert torch.allclose(again, same.logp[same.written], atol=1e-9)


def test_a_step_that_looks_at_too_few_slots_is_caught(static, monkeypatch):
    model = scrambled(LITTLE)
    plain = generate(model, PROMPTS, 24).tokens
    static()
    right = LatentCache.truncate
    monkeypatch.setattr(LatentCache, "truncate", lambda self, lengths, longest=None: right(
        self, lengths, longest and max(longest - 5, 1)))
    try:
        assert generate(model, PROMPTS, 24).tokens != plain
    except (RuntimeError, IndexError):
        pass  # or a slot beyond what it looks at


def test_lengths_that_stand_still_are_caught(static, monkeypatch):
    model = scrambled(LITTLE)
    plain = generate(model, PROMPTS, 24).tokens
    static()
    right = decoding.Session.next_token

    def forgets(self, tokens, longest):
        found = right(self, tokens, longest)
        self.end -= 1
        return found

    monkeypatch.setattr(decoding.Session, "next_token", forgets)
    assert generate(model, PROMPTS, 24).tokens != plain


def test_weights_are_cast_once_to_what_autocast_makes_of_them(static, monkeypatch):
    model = scrambled(LITTLE, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = generate(model, PROMPTS, 24).tokens
        derived = folded.for_products(model)
        static()
        assert generate(model, PROMPTS, 24).tokens == plain
    kinds = {name: weight.dtype for name, weight in derived.named_parameters()}
    wide = "norm.weight", "embed.weight", "gate.weight"
    assert all((kind == torch.float32) == name.endswith(wide) for name, kind in kinds.items())
    assert derived.layers[1].ffn.gate.weight is model.layers[1].ffn.gate.weight
    assert derived.layers[1].ffn.gate.bias is model.layers[1].ffn.gate.bias
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert folded.for_products(model) is model  # outside of autocast
    with torch.autocast("cpu", torch.bfloat16):
        folded.cast_products(model)
        assert folded.for_products(model) is model
    assert {n: w.dtype for n, w in model.named_parameters()} == kinds


def test_what_serves_training_is_left_behind():
    """A model that learns on a GPU has copies of its weights, which a session does not want."""
    model = scrambled(LITTLE, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = folded.for_products(model)
        StepCopies(model).refresh()
        derived = folded.for_products(model)
    assert not any(map(folded.is_replaced, derived.modules()))
    assert not any(isinstance(vars(part).get("product"), ProductOfCopy) or
                   vars(part).get("copies") for part in derived.modules())
    pairs = zip(derived.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(map(folded.is_replaced, model.modules()))
    model.layers[0].attn.wo.product = lambda x, weight: x @ weight.t()
    assert list(map(folded.is_replaced, model.modules())).count(True) == 1


def test_a_prompt_read_in_pieces_is_the_prompt_read_whole(monkeypatch):
    for args in MODELS.values():
        model, tokens = scrambled(args), random_tokens(args, 3, 40)
        lengths = torch.tensor([40, 7, 22])
        found = []
        for size in (64, 9):
            monkeypatch.setattr(decoding, "piece", lambda tokens, size=size: size)
            with torch.inference_mode():
                session = decoding.Session(model, 3, 48)
                read = session.prefill(tokens, lengths)
            found.append((read, session.cache))
        (whole, first), (pieces, second) = found
        seen = torch.arange(40) < lengths[:, None]
        assert torch.allclose(whole.states[seen], pieces.states[seen], atol=1e-9)
        assert torch.equal(first.lengths, second.lengths)
        for a, b in zip(whole.routings, pieces.routings, strict=True):
            assert torch.equal(a.indices.sort(-1).values, b.indices.sort(-1).values)


def test_sizes_double_and_each_starts_without_a_graph(static):
    static()
    seen = []
    run = Steps(seen.append, 50, torch.device("cpu"))
    for longest in (3, 8, 9, 16, 17, 40, 50):
        run(longest)
    assert seen == [8, 8, 16, 16, 32, 50, 50]
    seen.clear()
    run = Steps(seen.append, 24, torch.device("cpu"))  # 16 is almost all that there is
    for longest in (3, 8, 9, 24):
        run(longest)
    assert seen == [8, 8, 24, 24]
    static(False)
    seen.clear()
    Steps(seen.append, 50, torch.device("cpu"))(3)
    assert seen == [3]


def test_the_first_size_is_256_slots(monkeypatch):
    monkeypatch.setattr(graphs, "graphed", lambda device: True)
    seen = []
    run = Steps(seen.append, 5000, torch.device("cpu"))
    run.captures = False
    for longest in (1, 256, 257, 512, 513, 2049):
        run(longest)
    assert seen == [256, 256, 512, 512, 1024, 5000]  # 4096 is almost all that there is


def test_graphs_are_for_a_gpu_with_bodies():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert graphs.graphed(gpu) and not graphs.graphed(cpu)
    with using("off"):
        assert not graphs.graphed(gpu)


def test_graphs_of_all_sizes_share_memory_and_draws_and_are_replayed(static, monkeypatch):
    """With a stand-in for CUDA's graphs: each size runs plainly, is captured, and is replayed."""
    static()
    made, pools = [], []

    class Graph:
        def __init__(self):
            self.replays, self.generator = 0, None
            made.append(self)

        def register_generator_state(self, generator):
            self.generator = generator

        def replay(self):
            self.replays += 1

    @contextlib.contextmanager
    def capturing(graph, pool, capture_error_mode):
        assert not gc.isenabled() and capture_error_mode == "thread_local"
        pools.append(pool)
        yield

    for name, stand_in in (("CUDAGraph", Graph), ("graph", capturing), ("synchronize", int),
                           ("graph_pool_handle", lambda: len(pools) + 1)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    seen, generator = [], torch.Generator()
    run = Steps(seen.append, 50, torch.device("cpu"), generator)
    run.captures = True
    with recorded() as record:
        for longest in (3, 3, 3, 3, 9, 9, 9):
            run(longest)
    assert seen == [8, 8, 16, 16] and pools == [1, 1] and gc.isenabled()
    assert [graph.replays for graph in made] == [3, 2]
    assert record == {("graphs.step", "replayed"): 5}
    assert all(graph.generator is generator for graph in made)
    run.captures, run.graphs = False, {8: None}
    with recorded() as record:
        run(3)
        static(False)
        Steps(seen.append, 50, torch.device("cpu"))(3)
    assert record == {("graphs.step", "launched"): 2} and seen[4:] == [8, 3]


def test_a_capture_that_fails_says_so_once_and_goes_on(static, capsys, monkeypatch):
    static()
    monkeypatch.setattr(command_line, "SAID", set())

    class NoGraph:
        def __init__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    for _ in range(2):
        seen = []
        run = Steps(seen.append, 50, torch.device("cpu"))
        run.captures = True
        for _ in range(4):
            run(3)
        assert seen == [8, 8, 8, 8]
    assert capsys.readouterr().err == (
        "decoding goes on without CUDA graphs, several times slower: "
        "operation not permitted when stream is capturing\n")


@on_gpu
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("args, dtype", [
    *((args, torch.bfloat16) for args in MODELS.values()),
    *((args, dtype) for args in (WIDE, WIDE_SPARSE) for dtype in (torch.bfloat16, torch.float32))],
    ids=[*MODELS, "Triton", "Triton, FP32", "sparse in Triton", "sparse in Triton, FP32"])
def test_a_captured_step_writes_the_same_text(capsys, monkeypatch, args, dtype, how):
    monkeypatch.setattr(graphs, "SMALLEST", 8)
    model = scrambled(args, dtype=dtype).cuda()
    captured = generate(model, PROMPTS, 24, **HOW[how]).tokens
    assert "without CUDA graphs" not in capsys.readouterr().err
    monkeypatch.setattr(Steps, "capture", lambda self, bound: None)
    assert generate(model, PROMPTS, 24, **HOW[how]).tokens == captured


@on_gpu
def test_sparse_steps_in_kernels_write_what_the_plain_definitions_write():
    model = scrambled(WIDE_SPARSE, dtype=torch.float32).cuda()
    with recorded() as record:
        tokens = generate(model, PROMPTS, 24).tokens
    assert record["transformer.Block.forward", "joined_block"]
    assert record["few_tokens_gpu.choose_tokens", "in_kernels"]
    with using("off"):
        assert generate(model, PROMPTS, 24).tokens == tokens


@on_gpu
def test_a_question_to_the_gpu_in_a_step_falls_back(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "SAID", set())
    model = scrambled(SPARSE, dtype=torch.bfloat16).cuda()
    plain = generate(model, PROMPTS, 24).tokens
    right = MoE.forward
    monkeypatch.setattr(MoE, "forward",
                        lambda self, x, *r: (x.sum().item(), right(self, x, *r))[1])
    assert generate(model, PROMPTS, 24).tokens == plain
    assert "without CUDA graphs" in capsys.readouterr().err


def test_steps_become_graphs_on_a_gpu_with_bodies_on():
    def here() -> list[tuple[bool, bool]]:
        made = [Steps(print, 8, torch.device(kind)) for kind in ("cpu", "cuda")]
        return [(steps.graphed, steps.captures) for steps in made]

    assert here() == [(False, False), (True, True)]
    with using("off"):
        assert here() == [(False, False), (False, True)]
