"""The whole model: its objective, its initial state, its names, its size, its precision."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import LITTLE, gap, random_tokens, scrambled
from torch import nn

from minids import ModelArgs, Transformer
from minids.apply.recompute import recompute_blocks
from minids.kernels import cross_entropy as kernel
from minids.kernels.cross_entropy import Chunked
from minids.model import initial
from minids.model.objective import linear_cross_entropy
from minids.model.transformer import initialise

# With groups, two MoE layers, a module of MTP; small enough to differentiate in FP64.
ARGS = replace(LITTLE, n_layers=3)
NANO = ModelArgs.preset("nano")


def batch(args: ModelArgs, rows: int = 2, length: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and targets of a text, (rows, length) each."""
    ids = random_tokens(args, rows, length + 1)
    return ids[:, :-1], ids[:, 1:]


def test_the_total_is_the_sum_of_its_weighted_parts():
    model, (tokens, targets) = scrambled(ARGS), batch(ARGS)
    for mtp, balance in ((0.3, 1e-4), (0.1, 0.0), (0.0, 2.0)):
        losses = model.loss(tokens, targets, mtp, balance)
        expected = losses.main + mtp * losses.mtp + balance * losses.balance
        assert losses.total.item() == pytest.approx(expected.item(), rel=1e-14)
        assert (losses.mtp > 0) == (mtp > 0) and losses.indexer == 0
        layers = len(losses.loads)  # the balance loss of each is near 1
        assert layers == (3 if mtp else 2) and layers * 0.9 < losses.balance < layers * 2


def test_the_main_loss_is_the_cross_entropy_of_the_logits():
    model, (tokens, targets) = scrambled(ARGS), batch(ARGS)
    main = model.loss(tokens, targets).main
    logits = model(tokens).flatten(0, 1)
    assert gap(main, F.cross_entropy(logits, targets.flatten())) < 1e-12
    assert gap(main, F.cross_entropy(logits, tokens.flatten())) > 1e-3  # targets not shifted


def initial_surprise(args: ModelArgs) -> float:
    """Return how far the first losses, main and MTP, are from guessing evenly, nats."""
    torch.manual_seed(0)
    losses = Transformer(args).loss(*batch(args, 4, 64))
    even = math.log(args.vocab_size)
    # The MTP loss has one term less than it is divided by.
    return max(abs(losses.main.item() - even), abs(losses.mtp.item() * 64 / 63 - even))


def test_a_new_model_guesses_evenly():
    # Logits of standard deviation 0.02 * sqrt(64) = 0.16 cost half their variance, 0.013 nats.
    assert initial_surprise(NANO) < 0.05
    assert initial_surprise(replace(NANO, init_std=0.5)) > 1  # a model that starts out sure


def cross_entropy_gap(body, rows: int, count: int) -> float:
    """The worst of loss and two gradients of (x, weight, targets, count) against torch's own."""
    torch.manual_seed(rows)
    inputs = [torch.randn(rows, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)]
    targets = torch.randint(11, (rows,))

    def plain(x, weight, targets, count):
        return F.cross_entropy(x @ weight.T, targets, reduction="sum") / count

    def results(loss):
        given = [t.clone().requires_grad_() for t in inputs]
        out = loss(*given, targets, count)
        return [out, *torch.autograd.grad(3 * out, given)]

    return max(gap(a, b) for a, b in zip(results(body), results(plain), strict=True))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9])
def test_cross_entropy_in_chunks_equals_torchs(rows, monkeypatch):
    for chunk in (1, 4, 100):  # rows at a time; the last chunk may be short
        monkeypatch.setattr(kernel, "LOGITS", {"cpu": chunk * 11})
        for count in (rows, rows + 3):
            assert cross_entropy_gap(linear_cross_entropy, rows, count) < 1e-13


def test_wrong_chunks_are_caught():
    def mean_of_means(x, weight, targets, count):
        parts = zip(x.split(4), targets.split(4), strict=True)
        losses = [F.cross_entropy(a @ weight.T, t) for a, t in parts]
        return sum(losses) / len(losses) * len(x) / count

    def last_chunk_lost(x, weight, targets, count):
        whole = len(x) // 4 * 4
        return linear_cross_entropy(x[:whole], weight, targets[:whole], count)

    def count_forgotten(x, weight, targets, count):
        return linear_cross_entropy(x, weight, targets, len(x))

    class NoOneHot(Chunked):
        """The gradient without its one-hot term."""

        @staticmethod
        def backward(ctx, grad):
            dx, dw = ctx.saved_tensors
            return dx.abs() * grad / ctx.count, dw * grad / ctx.count, None, None

    assert cross_entropy_gap(linear_cross_entropy, 9, 12) < 1e-13
    for wrong in (mean_of_means, last_chunk_lost, count_forgotten, NoOneHot.apply):
        assert cross_entropy_gap(wrong, 9, 12) > 1e-3


def test_chunks_in_fp16_are_short():
    """A sum of gradients of more rows could leave FP16's range; FP32 has room."""
    rows = []

    def seen(logits, targets):
        rows.append(len(logits))
        return kernel.loss_and_gradient(logits, targets)

    for dtype in (torch.float16, torch.float32):
        x, weight = torch.zeros(5000, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype)
        Chunked.apply(x, weight, torch.zeros(5000, dtype=torch.int64), 5000, seen)
    assert rows == [4096, 904, 5000]


def test_cross_entropy_in_bf16_rounds_the_logits_only():
    torch.manual_seed(0)
    x, weight = torch.randn(40, 32), torch.randn(50, 32) / 32 ** 0.5
    targets = torch.randint(50, (40,))
    exact = linear_cross_entropy(x.double(), weight.double(), targets, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, 40)
    # Each logit is off by about 2^-9 of its size, 1; their mean by much less. The sum is FP32.
    assert loss.dtype == torch.float32 and gap(loss, exact) < 2e-3


def one_step(model: Transformer, recompute: bool) -> tuple[dict, int]:
    """Loss parts and gradients of a step, and how often its blocks ran."""
    runs = []
    hooks = [block.attn.register_forward_pre_hook(lambda *_: runs.append(1))
             for block in model.blocks()]
    model.zero_grad()
    if recompute:
        recompute_blocks(model)
    losses = model.loss(*batch(model.args))
    losses.total.backward()
    for hook in hooks:
        hook.remove()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return losses._asdict() | grads, len(runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit(dtype):
    model = scrambled(ARGS, dtype=torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        kept, runs = one_step(model, False)
        recomputed, more_runs = one_step(model, True)
    assert (runs, more_runs) == (4, 8)  # three layers and an MTP module, each run again
    assert [name for name in kept if not torch.equal(kept[name], recomputed[name])] == []
    # The comparison sees a last bit.
    damaged = recomputed | {"main": torch.nextafter(recomputed["main"].detach(), torch.tensor(9.))}
    assert [name for name in kept if not torch.equal(kept[name], damaged[name])] == ["main"]


def test_without_gradients_nothing_is_recomputed():
    model, tokens = scrambled(ARGS), batch(ARGS)[0]
    with torch.no_grad():
        expected = model(tokens)
        recompute_blocks(model)
        assert torch.equal(model(tokens), expected)


def badly_initialised(model: Transformer) -> list[str]:
    """Tensors that are not normal(0, init_std), a norm of ones or a bias of zeros."""
    std, faults = model.args.init_std, []
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            fine = bool((tensor == 1).all())
        elif name.endswith("gate.bias"):
            fine = bool((tensor == 0).all())
        else:
            # One matrix at a time, experts too; the estimates of mean and deviation are off by
            # less than 5 of their own standard deviations.
            matrices = tensor.double().reshape(-1, *tensor.shape[-2:]).flatten(1)
            n = matrices.size(1)
            fine = bool(((matrices.std(1) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()
                        and (matrices.mean(1).abs() < 5 * std / n ** 0.5).all())
        faults += [] if fine else [name]
    return faults


@pytest.mark.parametrize("large", [initial.LARGE, 0], ids=["in order", "in blocks"])
@pytest.mark.parametrize("args", [replace(NANO, q_lora_rank=24), replace(NANO, init_std=0.006)],
                         ids=["std 0.02", "std 0.006"])
def test_every_tensor_starts_as_the_paper_says(args, large, monkeypatch):
    monkeypatch.setattr(initial, "LARGE", large)
    torch.manual_seed(0)
    model = Transformer(args)
    assert badly_initialised(model) == []
    nn.init.kaiming_uniform_(model.layers[1].attn.wo.weight)
    nn.init.normal_(model.layers[1].ffn.experts.w2[3], std=args.init_std * 2)
    nn.init.zeros_(model.mtp[0].enorm.weight)
    model.layers[1].ffn.gate.bias += 0.1
    assert sorted(badly_initialised(model)) == [
        "layers.1.attn.wo.weight", "layers.1.ffn.experts.w2", "layers.1.ffn.gate.bias",
        "mtp.0.enorm.weight"]
    before = model.layers[1].attn.wo.weight.clone()
    initialise(model)
    assert not torch.equal(model.layers[1].attn.wo.weight, before)


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in Transformer(NANO).parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


ATTENTION = """attn_norm.weight attn.wq_a.weight attn.q_norm.weight attn.wq_b.weight
    attn.wkv_a.weight attn.kv_norm.weight attn.wkv_b.weight attn.wo.weight
    ffn_norm.weight""".split()
DENSE = "ffn.w1.weight ffn.w2.weight ffn.w3.weight".split()
MOE = """ffn.gate.weight ffn.gate.bias ffn.experts.w1 ffn.experts.w2 ffn.experts.w3
    ffn.shared_experts.w1.weight ffn.shared_experts.w2.weight
    ffn.shared_experts.w3.weight""".split()


def names(args: ModelArgs) -> set[str]:
    return set(Transformer(args).state_dict())


def test_tensors_have_the_official_names():
    expected = {"embed.weight", "norm.weight", "head.weight", "mtp.0.enorm.weight",
                "mtp.0.hnorm.weight", "mtp.0.eh_proj.weight", "mtp.0.norm.weight"}
    for prefix, parts in (("layers.0.", DENSE), ("layers.1.", MOE), ("mtp.0.block.", MOE)):
        expected |= {prefix + name for name in ATTENTION + parts}
    assert names(LITTLE) == expected  # one dense layer, one MoE layer, one MTP module
    query = {f"{p}attn.{n}.weight" for p in ("layers.0.", "layers.1.", "mtp.0.block.")
             for n in ("wq_a", "q_norm", "wq_b")}
    plain = {name.replace("wq_a", "wq") for name in query if "wq_a" in name}
    assert names(replace(LITTLE, q_lora_rank=0)) == expected - query | plain
    v2 = replace(LITTLE, gate_bias=False, n_shared_experts=0, n_mtp_layers=0)
    assert names(v2) == {n for n in expected if not n.startswith("mtp")
                         and "shared" not in n and "bias" not in n}


# Parameters and gate biases without MTP modules, as the weights' publication implies and as
# transformers counts them on the meta device.
TOTALS = {"v2-lite": 15_706_484_224, "v2": 235_741_434_880, "v3": 671_026_419_200,
          "moonlight": 15_960_110_208, "kimi-k2": 1_026_408_232_448}


def size(args: ModelArgs) -> int:
    """Numbers in the built model's state, on the meta device."""
    with torch.device("meta"):
        return sum(t.numel() for t in Transformer(args).state_dict().values())


@pytest.mark.parametrize("name", TOTALS)
def test_released_models_are_built_to_the_last_parameter(name):
    assert size(replace(ModelArgs.preset(name), n_mtp_layers=0)) == TOTALS[name]


def test_the_mtp_module_of_v3_and_a_part_too_few():
    v3 = ModelArgs.preset("v3")
    assert size(v3) - TOTALS["v3"] == 11_610_068_224
    assert size(replace(v3, n_mtp_layers=0, gate_bias=False)) == TOTALS["v3"] - 58 * 256


def test_a_sequence_that_is_too_long_is_a_mistake_that_names_the_limit():
    model = scrambled(replace(ARGS, max_seq_len=8))
    assert model(random_tokens(ARGS, 1, 8)).shape == (1, 8, 64)
    with pytest.raises(ValueError, match="9 tokens are too many: this model and cache hold 8"):
        model(random_tokens(ARGS, 1, 9))
    with pytest.raises(ValueError, match="9 tokens are too many"):
        model.loss(*batch(ARGS, 1, 9))


def test_bf16_stays_close_to_fp32():
    """With the same experts chosen; a token whose two best experts are close may differ."""
    args = replace(ARGS, n_routed_experts=0)
    model, tokens = scrambled(args, dtype=torch.float32), batch(args, 4, 20)[0]
    expected, losses = model(tokens), model.loss(*batch(args))
    with torch.autocast("cpu", torch.bfloat16):
        logits, rounded = model(tokens), model.loss(*batch(args))
    assert logits.dtype == torch.bfloat16 and rounded.total.dtype == torch.float32
    # About 30 roundings of 2^-9 on the way, which add up like a random walk: 1 to 2 per cent.
    assert gap(logits, expected) < 0.03 and gap(rounded.total, losses.total) < 0.01
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 0.1 * torch.randn_like(parameter)  # a coarser format
    assert gap(model(tokens), expected) > 0.03


def test_experts_in_bf16_stay_close_to_fp32_for_most_tokens():
    model, tokens = scrambled(ARGS, dtype=torch.float32), batch(ARGS, 8, 40)[0]
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.03


def test_fp32_is_fp64_rounded():
    expected, tokens = scrambled(ARGS), batch(ARGS, 4, 20)[0]
    assert gap(scrambled(ARGS, dtype=torch.float32)(tokens), expected(tokens)) < 1e-5


def test_a_dense_model_has_no_loads():
    args = replace(ARGS, n_routed_experts=0)
    losses = scrambled(args).loss(*batch(args))
    assert losses.loads.shape == (0, 0) and losses.balance == 0 and losses.main > 0


@pytest.mark.parametrize("change", [
    dict(n_dense_layers=0), dict(n_dense_layers=3), dict(n_shared_experts=0),
    dict(gate_bias=False, score_func="softmax"), dict(q_lora_rank=0, n_mtp_layers=2)], ids=str)
def test_every_parameter_learns_in_every_shape(change):
    model = scrambled(replace(ARGS, **change))
    model.loss(*batch(model.args, 4, 40)).total.backward()
    # Every expert is visited by some of 160 tokens, so every matrix has a gradient.
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
