"""Weights derived for decoding: W_UK multiplied into W_Q and W_UV into W_O, as V2 says they can be.

(DeepSeek-V2, arXiv 2405.04434, section 2.1.2 and appendix C.) And, on a GPU, weights in the type of
their products, cast once and not at each use. The copies belong to one decoding session and end
with it; a change of the model's weights in between is not seen.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minids.apply.precision import ProductOfCopy
from minids.kernels import few_tokens_gpu
from minids.kernels.few_tokens_gpu import Joined
from minids.kernels.precision import compute_dtype
from minids.model.cache import LatentCache
from minids.model.layers import MLP, Linear, RMSNorm
from minids.model.mla import MLA
from minids.model.moe import Experts, Gate, MoE, Routing
from minids.model.sparse_attention import Indexer
from minids.model.transformer import Block, Transformer

# Of blocks that can be folded:
PARTS = {Block, MLA, Indexer, nn.LayerNorm, MLP, MoE, Gate, Experts, Linear, RMSNorm}


def other_weights(model: Transformer) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield weights of products in another type than autocast's: module, name, in that type.

    What autocast leaves alone (embedding, norms, gates) has no part in it.
    """
    dtype = compute_dtype(model.head.weight)
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            for name, weight in module.named_parameters(recurse=False):
                if weight.dtype != dtype:
                    yield module, name, weight.detach().to(dtype)


def cast_products(model: Transformer) -> None:
    """Cast a model's weights, one after the other, to the type of their products, for good."""
    for module, name, weight in other_weights(model):
        setattr(module, name, nn.Parameter(weight, requires_grad=False))


def for_products(model: Transformer) -> Transformer:
    """Return a model with weights in the type of their products, or itself where they have it.

    All else is shared. A product is then what it was, without a cast before it.
    """
    cast = {id(getattr(module, name)): nn.Parameter(weight, requires_grad=False)
            for module, name, weight in other_weights(model)}
    if not cast:
        return model
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for module in model.modules():  # what serves the steps of training is left behind
        if isinstance(product := vars(module).get("product"), ProductOfCopy):
            shared[id(product)] = product.product
        if "copies" in vars(module):
            shared[id(module.copies)] = ()
    return copy.deepcopy(model, shared | cast)


def is_replaced(part: nn.Module) -> bool:
    """Return whether something stands in for a part's own product or selection."""
    product = vars(part).get("product")
    product = product.product if isinstance(product, ProductOfCopy) else product
    return "selection" in vars(part) or product not in (None, getattr(type(part), "product", None))


def fold(model: Transformer, cache: LatentCache) -> None:
    """Give a cache the derived weights of the layers that it serves, where they pay.

    On a CPU they are folded, for models so small that the multiplied matrices are not much larger
    than those they replace: in a wide model, reading weights is what takes the time. On a GPU the
    matrices that read a block's input are joined. A block must have nothing but the parts of V3,
    and nothing replaced from outside.
    """
    args, weight = model.args, model.head.weight
    pays = (weight.device.type == "cpu" and compute_dtype(weight) == weight.dtype
            and not args.has_indexer and args.kv_lora_rank % 2 == 0
            and args.n_heads * args.kv_lora_rank <= 2 * args.dim)
    served = range(cache.first_layer, cache.first_layer + len(cache.latents))
    blocks = [block for block in model.blocks() if block.layer in served]
    known = all(type(part) in PARTS and not is_replaced(part)
                for block in blocks for part in block.modules())
    with torch.no_grad():
        if pays and known:
            cache.folded = {block.layer: folded(block.attn) for block in blocks}
        if known and few_tokens_gpu.takes(args, weight, cache.latents.dtype):
            cache.joined = {block.layer: joined(block.attn) for block in blocks}


def joined(attn: MLA) -> Joined:
    """Join the matrices that read one layer's input."""
    first = attn.wq_a if attn.args.q_lora_rank else attn.wq
    width = few_tokens_gpu.index_width(attn.args, first.weight)
    parts = [first.weight, attn.wkv_a.weight] + ([attn.indexer.wk.weight] if width else [])
    return Joined(torch.cat(parts), width, Routing)


def folded(attn: MLA) -> tuple[Tensor, Tensor]:
    """Multiply one layer's expansions into the matrices beside them.

    w_q: from the input to the queries that latents are compared with; without a query latent the
        matrix of the token's own latent follows, as one more head
    w_o: from the weighted latents to the output
    """
    args, heads = attn.args, attn.args.n_heads
    w_uk, w_uv = attn.wkv_b.weight.unflatten(0, (heads, -1)).split(
        [args.qk_nope_head_dim, args.v_head_dim], dim=1)  # (H, .., kv_lora_rank)
    w_q = (attn.wq_b if args.q_lora_rank else attn.wq).weight.unflatten(0, (heads, -1))
    nope, pe = w_q.split([args.qk_nope_head_dim, args.qk_rope_head_dim], dim=1)
    w_q = torch.cat([w_uk.transpose(1, 2) @ nope, pe], dim=1).flatten(0, 1)  # (H * width, ..)
    if not args.q_lora_rank:
        w_q = torch.cat([w_q, attn.wkv_a.weight])
    w_o = attn.wo.weight.unflatten(1, (heads, -1))  # (D, H, v_head_dim)
    w_o = torch.einsum("ihd,hdc->ihc", w_o, w_uv).flatten(1)  # (D, H * kv_lora_rank)
    return w_q.contiguous(), w_o.contiguous()
