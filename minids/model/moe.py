"""Mixture of experts (DeepSeekMoE; V3 section 2.1.2, equations 12 to 20).

A gate scores every routed expert for each token; the token visits the best few, and the shared
experts besides. In V3 the gate's scores are sigmoids, and a bias for each expert, moved by a fixed
step after every optimizer step, evens out the load. The bias takes part in the choice and never in
the weights. No token is dropped.

Experts are stacked tensors (E, .., ..) and tokens are sorted by expert, so that a layer is three
grouped products. `grouped_linear` chooses the body that was measured fastest; all bodies agree.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.model.layers import MLP, compute_dtype


class Routing(NamedTuple):
    """Where a layer sent its tokens.

    scores: (B, S, E) FP32, the gate's scores without the bias, with gradient
    indices: (B, S, K) int64, the experts chosen
    """

    scores: Tensor
    indices: Tensor

    def load(self) -> Tensor:
        """Tokens sent to each expert: (E,) int64."""
        pairs = self.indices.flatten()
        load = torch.zeros(self.scores.size(-1), dtype=torch.int64, device=pairs.device)
        return load.scatter_add_(0, pairs, torch.ones_like(pairs))


class Gate(nn.Module):
    """Choose K experts for each token and weigh them (V3 equations 13 to 16).

    weight: (E, D); bias: (E,) FP32 buffer, used for the choice only, without gradient
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))
        if args.gate_bias:
            self.register_buffer("bias", torch.zeros(args.n_routed_experts, dtype=torch.float32))
        else:
            self.bias = None

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x: (B, S, D) -> weights of the chosen experts (B, S, K) FP32, and the routing

        kept: (B, S, K) int64, experts that were chosen before and are to be taken again (V3.2
            section 3.1, keep routing); None: choose
        """
        args = self.args
        scores = self.scores(x)  # (B, S, E)
        indices = self.choose(scores.detach()) if kept is None else kept
        weights = scores.gather(-1, indices)  # (B, S, K), from the scores without the bias
        if args.score_func == "sigmoid":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * args.route_scale, Routing(scores, indices)

    def choose(self, scores: Tensor) -> Tensor:
        """The K experts of each token: (B, S, E) -> (B, S, K) int64"""
        choice = scores if self.bias is None else scores + self.bias
        return self.limit_groups(choice).topk(self.args.n_activated_experts, sorted=False).indices

    def scores(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, E), in FP32 or wider: a rounded score would choose other experts."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))
        return logits.sigmoid() if self.args.score_func == "sigmoid" else logits.softmax(dim=-1)

    def limit_groups(self, choice: Tensor) -> Tensor:
        """Keep the best n_limited_groups groups of experts and send the others to -inf.

        choice: (B, S, E). A group's score is the sum of its best two with a bias (V3), and its
        best one without (V2).
        """
        args = self.args
        if args.n_expert_groups == 1:
            return choice
        grouped = choice.unflatten(-1, (args.n_expert_groups, -1))  # (B, S, G, E / G)
        best = 1 if self.bias is None else 2
        group_scores = grouped.topk(best, dim=-1).values.sum(-1)  # (B, S, G)
        kept = group_scores.topk(args.n_limited_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
        return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)


class Experts(nn.Module):
    """The routed experts, each a SwiGLU layer, as three stacked tensors.

    w1, w3: (E, moe_inter_dim, D); w2: (E, D, moe_inter_dim)
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        shape = args.n_routed_experts, args.moe_inter_dim, args.dim
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.w3 = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (M, D), rows sorted by expert; counts: (E,) rows of each -> (M, D)"""
        hidden = F.silu(self.product(x, self.w1, counts)) * self.product(x, self.w3, counts)
        return self.product(hidden, self.w2, counts)

    def product(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Each row times its own expert's matrix; `Transformer.use_fp8` puts another here."""
        return grouped_linear(x, weight, counts)


class MoE(nn.Module):
    """Shared experts for every token, plus the routed experts that the gate chose (V3 eq. 12)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.gate = Gate(args)
        self.experts = Experts(args)
        self.shared_experts = None
        if args.n_shared_experts:
            self.shared_experts = MLP(args.dim, args.n_shared_experts * args.moe_inter_dim)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x: (B, S, D) -> (B, S, D), and where the tokens went; kept: as in `Gate`"""
        weights, routing = self.gate(x) if kept is None else self.gate(x, kept)
        y = self.routed(x.flatten(0, 1), weights.flatten(0, 1), routing.indices.flatten(0, 1))
        y = y.view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing

    def routed(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Send each token to its experts and add up what comes back.

        x: (N, D); weights, indices: (N, K) -> (N, D)
        """
        source, slot, counts = sort_by_expert(indices, self.args.n_routed_experts)
        out = self.experts(Dispatch.apply(x, source, slot), counts)  # (M, D)
        return Combine.apply(out, slot, weights.to(out.dtype))


def sort_by_expert(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A place for each pair of token and expert, so that an expert's rows lie side by side.

    indices: (N, K) int64, the experts of each token
    Returns
        source: (M,) int64, the token whose row stands in each place
        slot: (N, K) int64, the place of each pair
        counts: (E,) int64, places of each expert

    With three tokens and the experts [[0, 2], [2, 0], [2, 1]], places counted one by one:
        source [0, 1, 2, 0, 1, 2]   slot [[0, 3], [4, 1], [5, 2]]   counts [2, 1, 3]

    Experts with many rows get places in multiples of ALIGN: a product's kernel is made for its
    shape, and few shapes mean few kernels. M is then larger than N K by a number known beforehand;
    what stands in a place without a pair is some token's row, and nobody reads its result.
    """
    pairs = indices.flatten()  # (N*K,)
    align = ALIGN if len(pairs) >= ALIGN * n_experts else 1
    load = torch.zeros(n_experts, dtype=torch.int64, device=pairs.device)
    load.scatter_add_(0, pairs, torch.ones_like(pairs))
    counts = (load + align - 1) // align * align
    order = pairs.argsort(stable=True)  # (N*K,), pairs by expert
    shift = (counts - load).cumsum(0) - (counts - load)  # (E,), empty places before each expert
    places = torch.arange(len(pairs), device=pairs.device) + shift[pairs[order]]
    slot = torch.empty_like(pairs).scatter_(0, order, places)
    source = pairs.new_zeros(len(pairs) + n_experts * (align - 1))
    source.scatter_(0, places, order // indices.size(1))
    return source, slot.view_as(indices), counts


ALIGN = 32  # rows; measured on a CPU in BF16, 1 is eight times slower, 16 to 128 are alike


class Dispatch(torch.autograd.Function):
    """Copy tokens to their places: (N, D) -> (M, D). The gradient adds up each token's places,
    which is faster than adding into the tokens, and on a GPU adds in the same order every time."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_places(grad, ctx.saved_tensors[0]), None, None


class Combine(torch.autograd.Function):
    """Each token's weighted sum over its places: rows (M, D), slot and weights (N, K) -> (N, D)."""

    @staticmethod
    def forward(ctx, rows: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slot, weights)
        return sum_places(rows, slot, weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, slot, weights = ctx.saved_tensors
        places, each = slot.flatten(), grad.unsqueeze(1)  # (N*K,), (N, 1, D)
        d_rows = torch.zeros_like(rows)
        d_rows.index_copy_(0, places, (each * weights.unsqueeze(-1)).flatten(0, 1))
        out = rows.index_select(0, places).view(*slot.shape, rows.size(1))  # (N, K, D)
        return d_rows, None, (out * each).sum(-1)


def sum_places(rows: Tensor, slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """For each token the sum of the rows in its places, weighted if weights are given.

    rows: (M, D); slot, weights: (N, K) -> (N, D)
    """
    if rows.device.type == "cpu":  # one pass, measured five times as fast as the plain form
        return F.embedding_bag(slot, rows, mode="sum", per_sample_weights=weights)
    return sum_places_plain(rows, slot, weights)


def sum_places_plain(rows: Tensor, slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_places` as gather, product, sum."""
    out = rows[slot]  # (N, K, D)
    out = (out if weights is None else out * weights.unsqueeze(-1)).sum(1)
    return out.to(rows.dtype)  # on a GPU autocast makes sums FP32


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each row times the transposed matrix of its own expert.

    x: (M, in), rows sorted by expert; weight: (E, out, in); counts: (E,) rows of each expert
    Returns (M, out); rows past the last expert's hold nothing of meaning.
    """
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    return (grouped_fused if fits_fused(x, weight) else grouped_loop)(x, weight, counts)


def fits_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused kernel takes this precision on this device, and rows of this width."""
    known = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and x.device.type == "cpu")
    return known and all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])


def grouped_fused(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` as one fused kernel: BF16 anywhere, FP32 on a CPU."""
    offsets = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def grouped_loop(x: Tensor, weight: Tensor, counts: Tensor, product=F.linear) -> Tensor:
    """`grouped_linear` as one product for each expert, in any precision."""
    sizes = counts.tolist()
    parts = x.split([*sizes, len(x) - sum(sizes)])
    out = [product(rows, w) for rows, w in zip(parts, weight.unbind(), strict=False)]
    return torch.cat([*out, x.new_zeros(len(parts[-1]), weight.size(1))])


def update_bias(bias: Tensor, load: Tensor, speed: float) -> None:
    """Move each expert's bias one step against its load (arXiv 2408.15664, algorithm 1).

    bias: (E,), changed in place; load: (E,) tokens sent to each expert since the last update, over
    the whole batch; speed: size of the step, 0.001 in V3
    """
    load = load.to(bias.dtype)
    bias += speed * torch.sign(load.mean() - load)


def sequence_balance_loss(routing: Routing, args: ModelArgs) -> Tensor:
    """Sum over experts of f_i P_i, for each sequence, averaged (V3 equations 17 to 20, alpha = 1).

    f_i is the share of a sequence's tokens that expert i would get by the scores alone, P_i its
    mean normalised score; 1 when all experts are equal. The gradient flows through P only.
    """
    scores = routing.scores  # (B, S, E)
    chosen = scores.detach().topk(args.n_activated_experts, sorted=False).indices  # (B, S, K)
    counts = torch.zeros_like(scores).scatter_(-1, chosen, 1.0).mean(dim=1)  # (B, E)
    f = counts * args.n_routed_experts / args.n_activated_experts
    p = (scores / scores.sum(-1, keepdim=True)).mean(dim=1)  # (B, E)
    return (f * p).sum(-1).mean()


def expert_balance_loss(routing: Routing, args: ModelArgs) -> Tensor:
    """V2's expert-level loss, for comparison: sum over experts of f_i P_i, over the whole batch.

    V2 (arXiv 2405.04434) section 2.2.3, equations 23 to 25, alpha_1 = 1. Beside V3's it counts the
    experts that were really visited, and lets one sequence make up for another. Sigmoid scores are
    normalised first; V2's softmax scores are as they are.
    """
    scores = routing.scores  # (B, S, E)
    f = routing.load().to(scores) * (args.n_routed_experts / routing.indices.numel())  # (E,)
    p = (scores / scores.sum(-1, keepdim=True)).mean(dim=(0, 1))  # (E,)
    return (f * p).sum()


BALANCE_LOSSES = {"sequence": sequence_balance_loss, "expert": expert_balance_loss}


def max_violation(load: Tensor) -> Tensor:
    """MaxVio: how far the busiest expert lies above the mean, 0 when balanced (arXiv 2408.15664).

    load: (.., E) -> (..)
    """
    load = load.float()
    return load.amax(-1) / load.mean(-1) - 1
