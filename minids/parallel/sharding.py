"""Build a model whose parameters are spread over ranks, and whose initial weights are one rank's.

Each block is sharded by FSDP2 (`fully_shard`): a rank holds a share of every matrix in FP32,
gathers a block's matrices before the block runs, and adds up its gradients afterwards, in FP32. The
matrices travel in the precision of their products, to which one process rounds the same numbers.
Gates and norms, which are small, compute in FP32: every rank holds them whole, and their gradients
are added up at the end of a step. So are embedding and head gathered as they are, in FP32.

Experts spread over ranks are a unit of their own, on the sparse mesh; where no two ranks hold the
same ones, their parameters are left as they are, with nothing to gather and nothing to add up.

Where memory allows (`keeps_gathered`), a step gathers once: a block's matrices then stay until the
backward pass of the step's last micro-batch, and gradients travel only then.

Every unit adds gradients up and divides by nothing. Averages would be wrong for experts: they hold
the gradients of the tokens of all ranks in their group already, while their unit has fewer ranks
than the block's, and each would divide by its own number.
"""

import os

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from minids.apply.compile import Compiled, is_compiled
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.kernels.experts import weighed
from minids.model.initial import initial_weights
from minids.model.sparse_attention import in_indexer
from minids.model.transformer import Transformer
from minids.parallel.experts import share_experts
from minids.parallel.layout import Layout
from minids.parallel.ranks import Ranks
from minids.parallel.shards import local, own_part, place


def empty_model(args: ModelArgs, dtype: torch.dtype = torch.float32) -> Transformer:
    """Return a model that has shapes and no values."""
    with torch.device("meta"):
        return Transformer(args).to(dtype)


KEPT = 1 / 8  # of a GPU's memory, for gathered matrices and their gradients


def keeps_gathered(args: ModelArgs, layout: Layout, memory: float) -> bool:
    """Return whether a GPU has room for all that a step gathers, until the step ends.

    memory: of a GPU, bytes
    A number takes 2 bytes in BF16, and its gradient 4 until all micro-batches have added to it.
    The schedules of a pipeline keep both in any case.
    """
    count = count_parameters(args)
    layers = sum(map(args.is_moe_layer, range(args.n_layers + args.n_mtp_layers)))
    experts = layers * args.n_routed_experts * 3 * args.moe_inter_dim * args.dim
    own = experts / layout.expert_parallel * (layout.expert_fsdp * layout.replicate > 1)
    gathered = count.total + count.mtp - experts + own
    return layout.pipeline == 1 and 6 * gathered <= KEPT * memory


def expect(model: nn.Module, last: bool) -> None:
    """Say whether the next backward pass is a step's last, in which gradients travel and gathered
    matrices are given up; without a word, every pass is. torch's schedules do so themselves."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_is_last_backward(last)
            unit.set_requires_gradient_sync(last, recurse=False)
            unit.set_reshard_after_backward(last, recurse=False)


def held_whole(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that no rank shares: gates, and the vectors of norms."""
    return [p for name, p in model.named_parameters()
            if p.ndim == 1 or name.endswith("gate.weight")]


def shard(model: Transformer, ranks: Ranks, products: torch.dtype | None = None,
          keep: bool = False) -> None:
    """Shard a model, or a stage of one, that lies on "meta"; then give it memory on the device.

    products: the precision in which matrices of blocks travel; None: their own
    keep: whether gathered matrices stay until a step ends, see `expect`
    """
    layout, alone = ranks.layout, set(held_whole(model))
    share_experts(model, ranks.sparse["expert"])
    policy = MixedPrecisionPolicy(products, products and torch.float32, cast_forward_inputs=False)
    options = dict(reshard_after_forward=layout.pipeline == 1 and not keep, mp_policy=policy)
    split = 1 if layout.splits_matrices(model.args) else 0  # rows of matrices, or experts
    options |= dict(shard_placement_fn=lambda p: Shard(split) if p.ndim == 3 else None)
    for block in model.blocks():
        if block.is_moe and layout.expert_parallel > 1:
            experts = block.ffn.experts
            if is_compiled(model):  # the number of rows between two exchanges varies
                if "product" in vars(experts):  # another precision's kernels are not traced
                    experts.weighed = Compiled(weighed, print, varied=3)
                else:
                    experts.compute = Compiled(experts.compute, print, varied=4)
            if layout.expert_fsdp * layout.replicate > 1:
                fully_shard(experts, mesh=ranks.shards(experts=True), **options)
            else:
                alone |= set(experts.parameters())
    for unit in [*model.layers, *model.mtp]:
        fully_shard(unit, mesh=ranks.shards(), ignored_params=alone, **options)
    fully_shard(model, mesh=ranks.shards(), ignored_params=alone)
    if layout.pipeline == 1:  # a stage has one way in, its `forward`
        for name in ("loss", "hidden"):  # both use the embedding and the head
            register_fsdp_forward_method(model, name)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=ranks.device)
    for bias in model.gate_biases():
        bias.zero_()


@torch.no_grad()
def initialise_parts(parts: list[nn.Module], args: ModelArgs) -> None:
    """Draw the weights that `Transformer(args)` would draw on a CPU, and keep this rank's share.

    parts: the models that this rank holds shards of, with the whole model's names
    The same numbers in any layout, and torch's generator is afterwards where it would be then.
    """
    shapes = {name: p.shape for name, p in empty_model(args).named_parameters()}
    nn.Embedding(args.vocab_size, args.dim)  # draws once when it is made
    held = [dict(part.named_parameters()) for part in parts]
    threads = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    for name, read in initial_weights(shapes, args.init_std, threads):
        for own in held:
            if name in own:
                local(own[name]).copy_(read(own_part(own[name])))


def load_parts(parts: list[nn.Module], weights: dict[str, Tensor]) -> None:
    """Copy this rank's share of a whole model's weights and gate biases.

    Indexers that have none, of a dense model, stay as they are; raises KeyError for another name
    that is missing.
    """
    for part in parts:
        for name, tensor in part.state_dict().items():
            if name in weights or not in_indexer(name):
                place(tensor, weights[name])
