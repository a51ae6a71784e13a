"""Every body equals its plain definition, forward and backward, and is the one that ran.

The test walks the registry: a body without an example here fails, and so does one whose condition
lets the call fall back to the plain definition. A body broken on purpose turns its test red.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import triton_interpreter
from gpu_cases import CASES as ELSEWHERE  # those that a GPU or a compiler chooses
from small_models import LITTLE, scrambled
from test_fp8_kernels import ROUNDING
from torch import Tensor

from minids import ModelArgs, Transformer
from minids.apply.folded import fold
from minids.kernels import attention as kernel
from minids.kernels import few_tokens, indexer
from minids.kernels.registry import REGISTRY, bodies, body, recorded, using
from minids.model.cache import LatentCache
from minids.model.layers import linear
from minids.model.mla import attention, causal
from minids.model.moe import sort_by_expert
from minids.model.sparse_attention import Selection, select

# Largest difference, relative to the largest value. FP64, FP32: sums in another order. BF16: both
# sides round to 8 bits. FP16, which stands for it under Triton's interpreter: to 11 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass
class Case:
    """A call that a body takes.

    call: makes the arguments anew; learns: whether its gradients are compared too
    triton: whether it runs in Triton: on a GPU, or here by the interpreter in a subprocess
    """

    call: Callable[[], tuple]
    learns: bool = True
    dtype: torch.dtype = torch.float64
    triton: bool = False

    def skip_where_it_cannot_run(self) -> None:
        if self.triton != INTERPRETED:
            pytest.skip("runs in the subprocess of `test_interpreted.py`, and nothing else there")


INTERPRETED = triton_interpreter.running()


def drawn(*shape: int, dtype: torch.dtype = torch.float64, learns: bool = True) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(learns)


def norm_case(dtype: torch.dtype, learns: bool) -> Case:
    return Case(lambda: (drawn(3, 5, 8, dtype=dtype, learns=learns),
                         drawn(8, dtype=dtype, learns=learns), 1e-6), learns, dtype)


def few_rows_case(rows: int, dtype: torch.dtype) -> Case:
    return Case(lambda: (drawn(1, rows, 16, dtype=dtype, learns=False),
                         drawn(24, 16, dtype=dtype, learns=False)), False, dtype)


def attention_case(queries: int, keys: int, visible: bool, value_width: int = 6) -> Case:
    """Heads of width 10, values of another; with a mask of holes where every query sees itself."""
    def call() -> tuple:
        q, k, v = (drawn(2, n, 3, w) for n, w in
                   ((queries, 10), (keys, 10), (keys, value_width)))
        seen = torch.rand(2, queries, keys) < 0.5
        seen = seen & causal(queries, keys)
        seen[:, torch.arange(queries), torch.arange(keys - queries, keys)] = True
        return q, k, v, seen if visible else None, 0.3
    return Case(call)


def latent_case(batch: int, queries: int, visible: bool) -> Case:
    def call() -> tuple:
        seen = torch.rand(batch, queries, 9) < 0.5
        seen[..., 0] = True
        return (drawn(batch, queries, 4, 10, learns=False), drawn(batch, 9, 10, learns=False), 6,
                seen if visible else None, 0.3)
    return Case(call, learns=False)


def routed_rows(tokens: int = 40, experts: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return experts by token, and their sorting; expert 3 gets nobody."""
    scores = torch.rand(tokens, experts)
    scores[:, 3] = -1
    indices = scores.topk(2).indices
    return indices, *sort_by_expert(indices, experts)


def dispatch_case() -> tuple:
    _, source, slot, _ = routed_rows()
    return drawn(40, 8), source, slot


def combine_case() -> tuple:
    _, source, slot, _ = routed_rows()
    return drawn(len(source), 8), slot, drawn(40, 2)


def grouped_case(dtype: torch.dtype) -> Case:
    """Rows past the last expert's hold nothing of meaning: there are none here."""
    def call() -> tuple:
        counts = torch.tensor([3, 0, 7, 2])
        return drawn(12, 16, dtype=dtype), drawn(4, 8, 16, dtype=dtype), counts
    return Case(call, dtype=dtype)


def index_case(batch: int, queries: int, keys: int) -> tuple:
    return drawn(batch, queries, 3, 8), drawn(batch, queries, 3), drawn(batch, keys, 8)


def index_loss_case() -> tuple:
    own = index_case(2, 7, 7)
    q, k = drawn(2, 7, 4, 10, learns=False), drawn(2, 7, 4, 10, learns=False)
    return *own, q, k, causal(7, 7), 0.3


def selection(batch: int, queries: int, keys: int, k: int) -> tuple[Tensor, Tensor]:
    """Choose k keys for each query; early ones see fewer, and of a later sequence not all."""
    visible = causal(queries, keys).repeat(batch, 1, 1)
    visible[1:, :, ::3] = False
    visible[:, torch.arange(queries), torch.arange(keys - queries, keys)] = True
    return select(torch.randn(batch, queries, keys), visible, k)


def own_numbers(dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int = 3,
                width: int = 24, learns: bool = True) -> tuple[Tensor, ...]:
    """Return an indexer's queries, weights and keys, parts of a batch with gaps in memory."""
    found = []
    for count, shape, kind in ((queries, (heads, width), dtype), (queries, (heads,), F32),
                               (keys, (width,), dtype)):
        whole = drawn(batch, count + 2, *shape, dtype=kind, learns=False)
        found.append(whole[:, 2:].requires_grad_(learns))
    return tuple(found)


def scores_case(dtype: torch.dtype, *shape: int) -> Case:
    return Case(lambda: own_numbers(dtype, *shape, learns=False), False, dtype, triton=True)


def selected_case(queries: int, keys: int, k: int, learns: bool = True, batch: int = 2,
                  heads: int = 3, dtype: torch.dtype = F32) -> Case:
    def call() -> tuple:
        return (drawn(batch, queries, heads, 48, dtype=dtype, learns=learns),
                drawn(batch, keys, 48, dtype=dtype, learns=learns), 32,
                *selection(batch, queries, keys, k), 0.2)
    return Case(call, learns, dtype, triton=True)


def naive_sparse_case(queries: int, keys: int, k: int) -> Case:
    def call() -> tuple:
        args = replace(LITTLE, kv_lora_rank=32, qk_rope_head_dim=16)
        attn = scrambled(args, dtype=F32).layers[0].attn.requires_grad_(False)
        q_nope, q_pe = (drawn(2, queries, args.n_heads, width, dtype=F32)
                        for width in (args.qk_nope_head_dim, 16))
        return (attn, q_nope, q_pe, drawn(2, keys, 48, dtype=F32),
                Selection(*selection(2, queries, keys, k)))
    return Case(call, True, F32, triton=True)


def all_loss_case(tokens: int, dtype: torch.dtype = F32, width: int = 24) -> Case:
    def call() -> tuple:
        q, k = (drawn(2, tokens, 3, width, dtype=dtype, learns=False) for _ in range(2))
        return *own_numbers(dtype, 2, tokens, tokens), q, k, None, 0.3
    return Case(call, True, dtype, triton=True)


def selected_loss_case(queries: int, keys: int, k: int, dtype: torch.dtype = F32) -> Case:
    def call() -> tuple:
        return (*own_numbers(dtype, 2, queries, keys),
                drawn(2, queries, 3, 48, dtype=dtype, learns=False),
                drawn(2, keys, 48, dtype=dtype, learns=False), *selection(2, queries, keys, k), 0.2)
    return Case(call, True, dtype, triton=True)


def little_layer(seed_shape: dict) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(replace(LITTLE, **seed_shape)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def folded_case(count: int, uneven: bool, batch: int = 3, layer: int = 1, **shape) -> Case:
    """A step of a block, `count` tokens after sequences of equal or unequal length."""
    def call() -> tuple:
        model = little_layer(dict(kv_lora_rank=8, **shape))
        cache = LatentCache(model.args, batch, 16, dtype=torch.float64)
        model.hidden(torch.randint(model.args.vocab_size, (batch, 7)), cache)
        if uneven:
            cache.truncate(torch.arange(batch) % 3 + 5)
        fold(model, cache)
        context = model.context(torch.zeros(batch, count, dtype=torch.int64), cache, absorbed=True)
        x = drawn(batch, count, model.args.dim, learns=False)
        return model.layers[layer], x, context
    return Case(call, learns=False)


INDEXER = dict(index_n_heads=16, index_head_dim=16, index_topk=6)  # no score is zero


def joined_case(count: int, batch: int = 3, layer: int = 1, dtype: torch.dtype = torch.float32,
                **shape) -> Case:
    """A step of a block on a GPU, after sequences of unequal length; FP32, which Triton sums in."""
    def call() -> tuple:
        wide = dict(max_seq_len=128, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                    v_head_dim=16)
        model = scrambled(replace(LITTLE, **wide | shape), dtype=dtype).requires_grad_(False)
        cache = LatentCache(model.args, batch, 90, dtype=dtype)
        model.hidden(torch.randint(model.args.vocab_size, (batch, 40)), cache)
        cache.truncate(torch.arange(batch) % 3 * 14 + 5, 60)  # the longest has 33
        fold(model, cache)
        context = model.context(torch.zeros(batch, count, dtype=torch.int64), cache, absorbed=True)
        return model.layers[layer], drawn(batch, count, 24, dtype=dtype, learns=False), context
    return Case(call, False, dtype, triton=True)


def moe_case(tokens: int, skewed: bool = False) -> Case:
    def call() -> tuple:
        moe = next(block.ffn for block in little_layer({}).layers if block.is_moe)
        scores = torch.rand(tokens, moe.args.n_routed_experts, dtype=torch.float64)
        scores[:, 0] += 2.0 * skewed  # everybody visits expert 0: batched products would waste rows
        weights, indices = scores.topk(moe.args.n_activated_experts)
        return moe, drawn(tokens, moe.args.dim, learns=False), weights, indices
    return Case(call, learns=False)


def fp8_case(dtype: torch.dtype, tokens: int = 130, width: int = 140) -> Case:
    """Ragged in all directions, more than one tile in each; both sides round to the same E4M3."""
    return Case(lambda: (drawn(tokens, width, dtype=dtype), drawn(136, width, dtype=dtype)),
                dtype=dtype, triton=True)


def fp8_experts_case(dtype: torch.dtype, counts: tuple = (130, 0, 7),
                     stacks: int = 1, height: int = 24) -> Case:
    """Rows of several experts in what would be one tile, and an expert without any."""
    def call() -> tuple:
        rows = sum(counts)
        weights = [drawn(len(counts), height, 140, dtype=dtype) for _ in range(stacks)]
        return drawn(rows, 140, dtype=dtype), *weights, torch.tensor(counts)
    return Case(call, dtype=dtype, triton=True)


CASES: dict[tuple[str, str], list[Case]] = {
    ("layers.linear", "linear"): [few_rows_case(1, BF16), few_rows_case(7, BF16)],
    ("layers.rms_norm", "fused"): [norm_case(F64, False), norm_case(F32, False)],
    ("layers.rms_norm", "written_out"): [norm_case(F64, True), norm_case(F32, True)],
    ("mla.attention", "products"): [attention_case(7, 7, False), attention_case(3, 7, False),
                                    attention_case(7, 7, True), attention_case(4, 7, True)],
    ("mla.attention", "fused"): [attention_case(520, 520, False), attention_case(5, 520, False),
                                 attention_case(5, 520, True), attention_case(5, 520, True, 10)],
    ("mla.attention", "in_parts"): [
        replace(attention_case(20, 530, False, width), learns=False) for width in (6, 10)],
    ("mla.latent_attention", "shared_key"): [
        latent_case(2, 1, False), latent_case(2, 3, False), latent_case(2, 3, True),
        latent_case(17, 1, True), latent_case(17, 2, True)],
    ("transformer.Block.forward", "folded_block"): [
        folded_case(1, False), folded_case(1, True), folded_case(1, True, layer=0),
        folded_case(3, False), folded_case(2, True),
        folded_case(1, True, batch=18), folded_case(2, False, q_lora_rank=12)],
    ("transformer.Block.forward", "joined_block"): [
        joined_case(1), joined_case(1, layer=0), joined_case(1, batch=1), joined_case(20),
        joined_case(2, q_lora_rank=0), joined_case(1, batch=18, n_shared_experts=2),
        joined_case(3, score_func="softmax", gate_bias=False, n_shared_experts=0),
        joined_case(3, n_routed_experts=6, n_expert_groups=1, n_limited_groups=1),
        joined_case(3, n_routed_experts=12, n_expert_groups=3, n_limited_groups=2),
        joined_case(1, **INDEXER), joined_case(2, q_lora_rank=0, **INDEXER)],
    ("moe.MoE.routed", "routed"): [moe_case(1), moe_case(4), moe_case(30),
                                   moe_case(30, skewed=True)],
    ("moe.dispatch", "dispatch_by_slot"): [Case(dispatch_case)],
    ("moe.combine", "combine_in_one_pass"): [Case(combine_case)],
    ("moe.grouped_linear", "grouped_fused"): [grouped_case(F32), grouped_case(BF16)],
    ("fp8.fp8_linear", "linear_in_kernels"): [fp8_case(F32), fp8_case(BF16), fp8_case(F32, 1, 1)],
    ("fp8.fp8_grouped_linear", "grouped_in_kernels"): [
        fp8_experts_case(F32), fp8_experts_case(BF16), fp8_experts_case(F32, (1, 1, 0, 0, 0))],
    ("fp8.fp8_grouped_pair", "pair_in_kernels"): [
        fp8_experts_case(F32, stacks=2, height=128),
        fp8_experts_case(BF16, (0, 3, 129), 2, 256)],
    ("objective.linear_cross_entropy", "chunked"): [
        Case(lambda: (drawn(2, 300, 8), drawn(11, 8), torch.randint(11, (2, 300)), 321))],
    ("mla.selected_attention", "attend_selected"): [
        selected_case(5, 19, 7), selected_case(1, 1, 1, learns=False),
        selected_case(9, 9, 9, batch=1), selected_case(1, 80, 70, learns=False),
        selected_case(3, 50, 40, heads=17), selected_case(5, 19, 7, dtype=F16)],
    ("mla.MLA.naive_sparse", "absorbed_for_naive"): [naive_sparse_case(7, 12, 5)],
    ("sparse_attention.index_scores", "scores_in_one_kernel"): [
        scores_case(F32, 2, 9, 40), scores_case(F32, 1, 1, 7, 16, 16),
        scores_case(F32, 2, 20, 70, 4, 16), scores_case(F16, 2, 9, 40)],
    ("sparse_attention.indexer_loss", "loss_over_all"): [
        all_loss_case(7), all_loss_case(2), all_loss_case(18, width=16), all_loss_case(7, F16)],
    ("sparse_attention.selected_indexer_loss", "loss_over_selection"): [
        selected_loss_case(5, 19, 7), selected_loss_case(9, 9, 9), selected_loss_case(1, 30, 20),
        selected_loss_case(5, 19, 7, F16)],
    ("sparse_attention.index_scores", "scores_in_pieces"): [Case(lambda: index_case(2, 9, 11))],
    ("sparse_attention.indexer_loss", "loss_in_pieces"): [Case(index_loss_case)],
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Let few numbers be many, so that chunks end in the middle of these examples."""
    monkeypatch.setattr(indexer, "SCORES", 100)
    monkeypatch.setattr(indexer, "PIECE", 100)
    monkeypatch.setattr("minids.kernels.cross_entropy.LOGITS", {"cpu": 1000})


def outcome(function: Callable, case: Case) -> tuple[list[Tensor], Counter]:
    """Return a call's output and the gradients of what learns, and what ran."""
    torch.manual_seed(0)
    arguments = case.call()
    with torch.inference_mode(not case.learns), recorded() as record:
        out = function(*arguments)
    out = out[0] if isinstance(out, tuple) else out
    if not case.learns:
        return [out], record
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)
    return [out.detach(), *grads], record


def check(function: Callable, name: str, chosen: str, case: Case) -> None:
    """Assert that the body runs, and gives what the plain definition gives."""
    by_body, record = outcome(function, case)
    assert record[name, chosen] == 1 and record[name, "plain"] == 0, dict(record)
    with using("off"):
        plain, _ = outcome(function, case)
    for ours, theirs in zip(by_body, plain, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        gap = (ours - theirs).abs().max() / theirs.abs().max()
        assert gap < TOLERANCE[case.dtype], gap


def test_every_body_has_examples():
    registered = {(name, b.__name__) for name, function in REGISTRY.items()
                  for b in function.bodies}
    # A choice, in no order, has tests of its own (`test_triton_sparse.py`).
    choice = {("sparse_attention.Indexer.select", "select_in_pieces")}
    assert registered == CASES.keys() | ELSEWHERE.keys() | ROUNDING.keys() | choice


def slow_if(it_is: bool) -> tuple:
    """Return the marks of a test; by the interpreter every run of a kernel takes seconds."""
    return (pytest.mark.slow,) if it_is else ()


@pytest.mark.parametrize(("key", "case"), [
    pytest.param(key, case, id=f"{key[0]}-{key[1]}-{number}",
                 marks=slow_if(case.triton and number > 0))
    for key, cases in CASES.items() for number, case in enumerate(cases)])
def test_a_body_equals_its_plain_definition(key, case):
    case.skip_where_it_cannot_run()
    check(REGISTRY[key[0]], *key, case)


class Steeper(torch.autograd.Function):
    """The identity, with a gradient that is a hundredth too long."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 1.01 * grad


def broken(function: Callable, chosen: str, how: Callable[[Tensor], Tensor]) -> Callable:
    """Return the function with one body changed on purpose."""
    right = next(b for b in function.bodies if b.__name__ == chosen)

    @body(right.when)
    def wrong(*arguments):
        out = right(*arguments)
        return (how(out[0]), *out[1:]) if isinstance(out, tuple) else how(out)

    wrong.__name__ = chosen
    others = [wrong if b is right else b for b in function.bodies]
    before = dict(REGISTRY)
    changed = bodies(*others)(function.plain)
    REGISTRY.update(before)
    return changed


def wrongs(case: Case) -> Iterator[Callable[[Tensor], Tensor]]:
    yield lambda out: out * (1 + 10 * TOLERANCE[case.dtype])
    yield lambda out: -out if out.dim() == 0 else out.flip(0 if len(out) > 1 else -1)
    if case.learns and case.dtype != torch.bfloat16:
        yield Steeper.apply


@pytest.mark.parametrize("key", [
    pytest.param(key, id="-".join(key), marks=slow_if(cases[0].triton))
    for key, cases in CASES.items()])
def test_a_broken_body_is_noticed(key):
    function, case = REGISTRY[key[0]], CASES[key][0]
    case.skip_where_it_cannot_run()
    for how in wrongs(case):
        with pytest.raises(AssertionError):
            check(broken(function, key[1], how), *key, case)


@pytest.mark.parametrize("key", [
    pytest.param(key, id="-".join(key), marks=slow_if(cases[0].triton))
    for key, cases in CASES.items()])
def test_a_fallback_in_silence_is_noticed(key):
    function = REGISTRY[key[0]]
    CASES[key][0].skip_where_it_cannot_run()
    before = dict(REGISTRY)
    without = bodies(*(b for b in function.bodies if b.__name__ != key[1]))(function.plain)
    REGISTRY.update(before)
    with pytest.raises(AssertionError):
        check(without, *key, CASES[key][0])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs a GPU's bodies on a CPU")
def test_a_cpu_takes_no_body_of_a_gpu_where_triton_is_installed(monkeypatch):
    for name, module in sys.modules.items():
        if name.startswith("minids.kernels.") and hasattr(module, "TRITON"):
            monkeypatch.setattr(module, "TRITON", True)
    for key, (case, *_) in CASES.items():
        _, record = outcome(REGISTRY[key[0]], case)
        assert bool(record[key]) != case.triton, key


@pytest.mark.parametrize("rows, width, wanted", [
    (1, 8, [False]), (1, 1024, [False]), (1, 1025, [True]), (2, 8, []), (32, 8, []),
    (33, 8, [True])], ids=str)
def test_which_product_multiplies_few_rows(monkeypatch, rows, width, wanted):
    """One row: torch's own, for a large matrix oneDNN's; several rows: the weights come first."""
    product, seen = torch.nn.functional.linear, []

    def recording(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(torch.backends.mkldnn.enabled)
        return product(x, weight)

    monkeypatch.setattr(few_tokens.F, "linear", recording)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    with torch.inference_mode():
        linear(torch.zeros(1, rows, width, dtype=BF16), torch.zeros(512, width, dtype=BF16))
    assert seen == wanted and torch.backends.mkldnn.enabled


@pytest.mark.parametrize("dtype, inside", [(BF16, False), (F32, True)])
def test_onednn_is_left_as_it_was(monkeypatch, dtype, inside):
    for before in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
        with few_tokens.own_products(torch.zeros(1, dtype=dtype)):
            assert torch.backends.mkldnn.enabled == (before and inside)
        assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("batch, dtype, fused", [
    (15, F32, True), (16, F32, False), (15, BF16, True), (16, BF16, True)])
def test_many_sequences_take_two_products_except_in_bf16(monkeypatch, batch, dtype, fused):
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(kernel.F, "scaled_dot_product_attention",
                        lambda *inputs, **how: calls.append(1) or attend(*inputs, **how))
    kernel.one_key_for_all_heads(torch.zeros(batch, 1, 2, 4, dtype=dtype),
                                 torch.zeros(batch, 3, 4, dtype=dtype), None, 1.0)
    assert bool(calls) == fused


def test_with_bodies_off_no_body_runs():
    args = replace(ModelArgs.preset("nano"), vocab_size=64, max_seq_len=32)
    model, tokens = Transformer(args), torch.randint(64, (2, 9))
    with using("off"), recorded() as record:
        model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
        with torch.no_grad():
            cache = LatentCache(args, 2, 12)
            model(tokens, cache)
            fold(model, cache)
            model(tokens[:, :1], cache, absorbed=True)
    assert {chosen for _, chosen in record} == {"plain"}


def test_a_body_takes_what_its_plain_definition_takes():
    """By name too: a caller may name its arguments."""
    for name, function in REGISTRY.items():
        wanted = list(inspect.signature(function.plain).parameters)
        wanted = wanted[1:] if wanted[0] == "self" else wanted
        for one in function.bodies:
            for part in (one, one.when):
                assert list(inspect.signature(part).parameters)[-len(wanted):] == wanted, name
    q = torch.randn(1, 3, 2, 4)
    assert attention(q, k=q, v=q, visible=None, scale=0.5).shape == q.shape
