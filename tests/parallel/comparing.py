"""One process beside many ranks: the same weights and tokens, and what differs."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from launching import device_of_rank
from small_models import LITTLE, random_tokens, scrambled
from torch import Tensor
from torch import distributed as dist

from minids import ModelArgs, Transformer
from minids.infer.validation import evaluate
from minids.model.objective import Losses, Packed
from minids.parallel.gradients import scale
from minids.parallel.layout import Layout
from minids.parallel.model import SECOND_EMBEDDING, ParallelModel
from minids.parallel.parts import Parts, own_parts, write_parts
from minids.parallel.pipeline import Weights
from minids.parallel.ranks import Ranks
from minids.parallel.sharding import load_parts
from minids.parallel.shards import local, own_part
from minids.parallel.validation import evaluate as evaluate_over_ranks
from minids.runs.optimizers import build_optimizers
from minids.runs.settings import TrainArgs
from minids.runs.sharded import load_states, named_states

# Every kind of layer, on widths that two and four ranks do not divide evenly.
ARGS = replace(LITTLE, n_layers=4, n_dense_layers=1, n_mtp_layers=1)
ROWS, LENGTH = 8, 12
DEVICE = device_of_rank()
BEGIN = 7  # the token that begins a document, where documents do not see each other
# Both losses that reach the gates from elsewhere are as large as the main one.
WEIGHTS = Weights(mtp_weight=0.7, balance_weight=1.0)
# FP64: sums in another order differ by some 1e-15 of the largest; a wrong one by 1e-3 and more.
CLOSE = 1e-12


@cache
def ranks_of(**fields) -> Ranks:
    """The ranks of this process group in a layout."""
    return Ranks.of(Layout(**fields).fitted(dist.get_world_size()), DEVICE)


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    """The tokens and targets of all ranks in a step."""
    text = random_tokens(ARGS, ROWS, LENGTH + 1, seed=step + 1).to(DEVICE)
    return text[:, :-1], text[:, 1:]


def share(ranks: Ranks, whole: tuple[Tensor, Tensor], parts: int = 1) -> list:
    """The micro-batches of a data rank."""
    rows = [t.tensor_split(ranks.layout.data_ranks)[ranks.data_rank] for t in whole]
    return list(zip(*(t.tensor_split(parts) for t in rows), strict=True))


def spread(ranks: Ranks, model: Transformer, **options) -> ParallelModel:
    """The model's own weights, on the ranks."""
    dtype = model.embed.weight.dtype
    parallel = ParallelModel(model.args, ranks, dtype, **options)
    load_parts(parallel.parts, model.state_dict())
    return parallel


@cache
def one_process(args: ModelArgs = ARGS, weights: Weights = WEIGHTS, separate: bool = False,
                dtype: torch.dtype = torch.float64) -> tuple[Transformer, Losses]:
    """A model with its gradients of one batch, and its losses."""
    model, (tokens, targets) = scrambled(args, dtype=dtype).to(DEVICE), batch()
    samples = (tokens == BEGIN).cumsum(1)
    packed = Packed(samples, torch.ones_like(samples, dtype=torch.bool)) if separate else None
    losses = model.loss(tokens, targets, *weights, packed=packed)
    losses.total.backward()
    return model, losses


def difference(tensor: Tensor, whole: Tensor) -> float:
    """How far this rank's part is from the whole one's, relative to the whole one's largest."""
    mine = local(tensor).double()
    wanted = whole[own_part(tensor)].to(mine)
    assert mine.shape == wanted.shape, (mine.shape, wanted.shape)
    largest = whole.abs().max().item() or 1.0
    return (mine - wanted).abs().max().item() / largest if mine.numel() else 0.0


def by_name(model: Transformer) -> dict[str, torch.nn.Parameter]:
    """The parameters under every name that a rank may have for them."""
    return dict(model.named_parameters()) | {SECOND_EMBEDDING: model.embed.weight}


def worst_gradient(parallel: ParallelModel, model: Transformer) -> tuple[float, str]:
    """The largest difference among the gradients, and the parameter that has it."""
    wanted = by_name(model)
    found = []
    for name, p in parallel.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        found.append((difference(p.grad, wanted[name].grad), name))
    return max(found)


def worst_weight(parallel: ParallelModel, model: Transformer) -> tuple[float, str]:
    """The same among parameters and gate biases."""
    wanted = model.state_dict()
    return max((difference(tensor, wanted[name]), name)
               for part in parallel.parts for name, tensor in part.state_dict().items())


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def clip(parallel: ParallelModel, longest: float) -> float:
    """Scale a gradient down that is longer; returns its norm before."""
    parameters = [p for _, p in parallel.named_parameters()]
    norm = parallel.norm(parameters).item()
    scale(parameters, longest, norm)
    return norm


def compare_step(ranks: Ranks, parts: int = 1, args: ModelArgs = ARGS, weights: Weights = WEIGHTS,
                 separate: bool = False, dtype: torch.dtype = torch.float64, close: float = CLOSE,
                 **options) -> None:
    """Take the gradients of a batch on all ranks, and hold everything against one process."""
    model, wanted = one_process(args, weights, separate, dtype)
    parallel = spread(ranks, model, **options)
    losses = parallel.step(share(ranks, batch(), parts), weights, separate, BEGIN)
    for name, mine, one in zip(losses._fields, losses, wanted, strict=True):
        gap = (mine - one).abs().max().item()
        assert gap <= close * (1 + one.abs().max().item()), f"{name} is {gap:.1e} off {one}"
    error, name = worst_gradient(parallel, model)
    assert error < close, f"the gradient of {name} is {error:.1e} off"
    grads = [p.grad.clone() for p in model.parameters()]
    wanted_norm = torch.nn.utils.get_total_norm(grads).item()
    norm = clip(parallel, 0.5)
    assert abs(norm / wanted_norm - 1) < close, (norm, wanted_norm)
    for name, p in parallel.named_parameters():
        whole = by_name(model)[name].grad * (0.5 / (wanted_norm + 1e-6))
        assert difference(p.grad, whole) < close, f"{name} is clipped otherwise"
    biases = [bias.clone() for bias in model.gate_biases()]
    model.update_gate_bias(wanted.loads, 0.1)
    parallel.update_gate_bias(losses.loads, 0.1)
    error, name = worst_weight(parallel, model)
    for bias, before in zip(model.gate_biases(), biases, strict=True):
        bias.copy_(before)
    assert error < close, f"{name} is {error:.1e} off after the biases moved"


def train_in_parallel(ranks: Ranks, optimizer: str, steps: int = 3, model_args: ModelArgs = ARGS,
                      **options) -> None:
    """Take optimizer steps on all ranks and in one process; the weights stay equal."""
    args = TrainArgs(optimizer=optimizer, lr=0.02, muon_lr=0.02)
    model = scrambled(model_args).to(DEVICE)
    parallel = spread(ranks, model, **options)
    pairs = [(parallel, build_optimizers(parallel, args, torch.float64)),
             (model, build_optimizers(model, args, torch.float64))]
    for step in range(steps):
        whole = batch(step)
        losses = parallel.step(share(ranks, whole), WEIGHTS)
        clip(parallel, 1.0)
        one = model.loss(*whole, *WEIGHTS)
        one.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for trained, optimizers in pairs:
            for each in optimizers:
                each.step()
                each.zero_grad()
            trained.update_gate_bias(losses.loads, 0.05)
        assert torch.equal(losses.loads, one.loads)
    error, name = worst_weight(parallel, model)
    # One step divides by the root of a squared gradient, or by a matrix's norm: it magnifies what
    # differs in gradients that are nearly zero.
    assert error < 1e-9, f"{name} is {error:.1e} off after {steps} steps of {optimizer}"


def compare_validation(ranks: Ranks, **options) -> None:
    """Validate on windows that ranks cannot share evenly, then train on: nothing is left over."""
    model, _ = one_process()
    parallel = spread(ranks, model, **options)
    text, n_bytes = random_tokens(ARGS, 1, 5 * LENGTH + 3)[0], torch.arange(ARGS.vocab_size) % 4 + 1
    for begin_id in (None, BEGIN):
        arguments = text, n_bytes, LENGTH, 2, None, begin_id
        mine, wanted = evaluate_over_ranks(parallel, *arguments), evaluate(model, *arguments)
        # Both sum up in FP32.
        assert abs(mine.bits_per_byte / wanted.bits_per_byte - 1) < 1e-5, (mine, wanted)
        assert torch.equal(mine.loads.cpu(), wanted.loads.cpu())
    parallel.step(share(ranks, batch()), WEIGHTS)
    error, name = worst_gradient(parallel, model)
    assert error < CLOSE, f"the gradient of {name} is {error:.1e} off after a validation"


def hand_over(writers: Ranks, readers: list[Ranks], folder: Path) -> None:
    """Write weights and AdamW's moments in one layout, and read them in others, and whole."""
    args = TrainArgs(optimizer="muon")

    def trained(ranks: Ranks, steps: int) -> tuple[ParallelModel, list]:
        parallel = spread(ranks, one_process()[0])
        optimizers = build_optimizers(parallel, args, torch.float64)
        for step in range(steps):
            parallel.step(share(ranks, batch(step)), WEIGHTS)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return parallel, optimizers

    first, optimizers = trained(writers, 1)
    place = writers.dense.get_local_rank
    states = {name: tensor for name, tensor in named_states(first, optimizers)
              if not name.startswith(SECOND_EMBEDDING)}
    for kind, tensors in (("model", first.state_dict()), ("optimizer", states)):
        write_parts(folder / f"{kind}-{dist.get_rank()}",
                    own_parts(tensors, place("replicate"), place("fsdp")))
    dist.barrier()
    weights, saved = (Parts([folder / f"{kind}-{rank}" for rank in range(dist.get_world_size())])
                      for kind in ("model", "optimizer"))
    whole = weights.whole()
    assert whole.keys() == one_process()[0].state_dict().keys()
    for part in first.parts:
        for name, tensor in part.state_dict().items():
            assert difference(tensor, whole[name]) == 0.0, name
    for ranks in readers:
        other, other_optimizers = trained(ranks, 0)
        load_states(other, other_optimizers, saved.found, saved.read,
                    lambda name: name.replace(SECOND_EMBEDDING, "embed.weight"))
        found = dict(named_states(other, other_optimizers))
        assert found
        for name, tensor in found.items():
            kept = saved.read(name.replace(SECOND_EMBEDDING, "embed.weight"))
            assert difference(tensor, kept) == 0.0, name
