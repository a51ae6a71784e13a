"""Mixture of experts (DeepSeekMoE; V3 section 2.1.2, equations 12 to 20).

A gate scores every routed expert for each token; the token visits the best few, and the shared
experts besides. In V3 the gate's scores are sigmoids, and a bias for each expert, moved by a fixed
step after every optimizer step, evens out the load. The bias takes part in the choice and never in
the weights. No token is dropped.

Experts are stacked tensors and tokens are sorted by expert, so that a layer is three grouped
products between a dispatch and a combine.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelArgs
from minids.kernels import experts as kernels
from minids.kernels import few_tokens
from minids.kernels import routing as routing_kernels
from minids.kernels.precision import without_autocast
from minids.kernels.registry import bodies
from minids.model.layers import MLP


class Routing(NamedTuple):
    """Where a layer sent its tokens."""

    scores: Tensor  # (B, S, E) FP32, the gate's scores without the bias, with gradient
    indices: Tensor  # (B, S, K) int64, the experts chosen

    def load(self) -> Tensor:
        """Count the tokens sent to each expert: (E,) int64."""
        pairs = self.indices.flatten()
        load = torch.zeros(self.scores.size(-1), dtype=torch.int64, device=pairs.device)
        return load.scatter_add_(0, pairs, torch.ones_like(pairs))


class Gate(nn.Module):
    """Choose K experts for each token and weigh them (V3 equations 13 to 16).

    bias: (E,) FP32 buffer, used for the choice only, without gradient
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))
        if args.gate_bias:
            self.register_buffer("bias", torch.zeros(args.n_routed_experts, dtype=torch.float32))
        else:
            self.bias = None

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x: (B, S, D) -> weights of the chosen experts (B, S, K) FP32, and the routing

        routes: (B, S, K) int64, experts to take (V3.2 section 3.1, keep routing); None: choose
        """
        args = self.args
        scores = self.scores(x)  # (B, S, E)
        indices = self.choose(scores.detach()) if routes is None else routes
        weights = scores.gather(-1, indices)  # (B, S, K), from the scores without the bias
        if args.score_func == "sigmoid":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * args.route_scale, Routing(scores, indices)

    @bodies(routing_kernels.choose_in_one_kernel)
    def choose(self, scores: Tensor) -> Tensor:
        """Choose the K experts of each token: (B, S, E) -> (B, S, K) int64"""
        choice = scores if self.bias is None else scores + self.bias
        return self.limit_groups(choice).topk(self.args.n_activated_experts, sorted=False).indices

    def scores(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, E), in FP32 or wider: rounding a score would choose other experts."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            logits = F.linear(x.to(wide), self.weight.to(wide))
        return logits.sigmoid() if self.args.score_func == "sigmoid" else logits.softmax(dim=-1)

    def limit_groups(self, choice: Tensor) -> Tensor:
        """Keep the best n_limited_groups groups of experts and send the others to -inf, (B, S, E).

        A group's score is the sum of its best two with a bias (V3), and its best without (V2).
        """
        args = self.args
        if args.n_expert_groups == 1:
            return choice
        grouped = choice.unflatten(-1, (args.n_expert_groups, -1))  # (B, S, G, E / G)
        counted = 1 if self.bias is None else 2
        group_scores = grouped.topk(counted, dim=-1).values.sum(-1)  # (B, S, G)
        best = group_scores.topk(args.n_limited_groups, dim=-1, sorted=False).indices
        others = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(others.unsqueeze(-1), float("-inf")).flatten(-2)


class Experts(nn.Module):
    """The routed experts, each a SwiGLU layer, as three stacked tensors."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Multiply each row by its expert's matrix; `minids.apply.fp8` puts another here."""
        return grouped_linear(x, weight, counts)

    def __init__(self, args: ModelArgs):
        super().__init__()
        experts, inner, dim = args.n_routed_experts, args.moe_inter_dim, args.dim
        self.w1 = nn.Parameter(torch.empty(experts, inner, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, inner))
        self.w3 = nn.Parameter(torch.empty(experts, inner, dim))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (M, D), rows sorted by expert; counts: (E,) rows of each -> (M, D)"""
        hidden = F.silu(self.product(x, self.w1, counts)) * self.product(x, self.w3, counts)
        return self.product(hidden, self.w2, counts)


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

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x: (B, S, D) -> (B, S, D), and where the tokens went; routes: as in `Gate`"""
        weights, routing = self.gate(x) if routes is None else self.gate(x, routes)
        y = self.routed(x.flatten(0, 1), weights.flatten(0, 1), routing.indices.flatten(0, 1))
        y = y.view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x), routing

    @bodies(few_tokens.routed, kernels.weighted_inside)
    def routed(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Send each token (N, D) to its experts (N, K), and add up what comes back: (N, D)"""
        source, slot, counts = sort_by_expert(indices, self.args.n_routed_experts)
        out = self.experts(dispatch(x, source, slot), counts)  # (M, D)
        return combine(out, slot, weights.to(out.dtype))


ALIGN = 32  # rows; measured on a CPU in BF16, 1 is eight times slower, 16 to 128 are alike


@bodies()
def sort_by_expert(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give each pair of token and expert a slot, so that an expert's rows lie side by side.

    indices: (N, K), the experts of each token
    Returns, int64,
        source: (M,), the token whose row stands in each slot
        slot: (N, K), the slot of each pair
        counts: (E,), slots of each expert

    With three tokens and the experts [[0, 2], [2, 0], [2, 1]], and no alignment:
        source [0, 1, 2, 0, 1, 2]   slot [[0, 3], [4, 1], [5, 2]]   counts [2, 1, 3]

    Experts with many rows get slots in multiples of ALIGN: a product's kernel is made for its
    shape, and few shapes mean few kernels. M is then larger than N K by a number known beforehand;
    what stands in a slot without a pair is some token's row, and nobody reads its result.
    """
    pairs = indices.flatten()  # (N*K,)
    align = ALIGN if len(pairs) >= ALIGN * n_experts else 1
    load = torch.zeros(n_experts, dtype=torch.int64, device=pairs.device)
    load.scatter_add_(0, pairs, torch.ones_like(pairs))
    counts = (load + align - 1) // align * align
    order = pairs.to(torch.int16).argsort(stable=True)  # (N*K,), by expert; 16 bits sort faster
    shift = (counts - load).cumsum(0) - (counts - load)  # (E,), empty slots before each expert
    slots = torch.arange(len(pairs), device=pairs.device) + shift[pairs[order]]
    slot = torch.empty_like(pairs).scatter_(0, order, slots)
    source = pairs.new_zeros(len(pairs) + n_experts * (align - 1))
    source.scatter_(0, slots, order // indices.size(1))
    return source, slot.view_as(indices), counts


@bodies(kernels.dispatch_by_slot)
def dispatch(x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
    """Copy tokens to their slots: x (N, D), source and slot as above -> (M, D)"""
    return x.index_select(0, source)


@bodies(kernels.combine_in_one_pass)
def combine(rows: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
    """Add up the rows in each token's slots: (M, D), slot and weights (N, K) -> (N, D)"""
    return (rows[slot] * weights.unsqueeze(-1)).sum(1)


@bodies(kernels.grouped_fused)
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply each row by the transposed matrix of its own expert.

    x: (M, in), rows sorted by expert; weight: (E, out, in); counts: (E,) rows of each expert
    Returns (M, out); rows past the last expert's hold nothing of meaning.
    """
    return each_expert(x, weight, counts, F.linear)


def each_expert(x: Tensor, weight: Tensor, counts: Tensor, product) -> Tensor:
    """Run `grouped_linear` as one product per expert; product: (rows, matrix) -> rows"""
    sizes = counts.tolist()
    parts = x.split([*sizes, len(x) - sum(sizes)])
    out = [product(rows, w) for rows, w in zip(parts, weight.unbind(), strict=False)]
    return torch.cat([*out, out[0].new_zeros(len(parts[-1]), weight.size(1))])


def update_bias(bias: Tensor, load: Tensor, speed: float) -> None:
    """Move each expert's bias one step against its load (arXiv 2408.15664, algorithm 1).

    bias: (E,), changed in place; load: (E,) tokens sent to each expert since the last update
    speed: size of the step, 0.001 in V3
    """
    load = load.to(bias.dtype)
    bias += speed * torch.sign(load.mean() - load)


@bodies(routing_kernels.balance_in_one_pass)
def sequence_balance_loss(routing: Routing, args: ModelArgs) -> Tensor:
    """Return the mean over sequences of the sum of f_i P_i (V3 equations 17 to 20, alpha = 1).

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
    """Return V2's loss over the whole batch, for comparison (V2 section 2.2.3, equations 23 to 25).

    Beside V3's it counts the experts that were really visited, and lets one sequence make up for
    another. Sigmoid scores are normalised first; V2's softmax scores are as they are.
    """
    scores = routing.scores  # (B, S, E)
    f = routing.load().to(scores) * (args.n_routed_experts / routing.indices.numel())  # (E,)
    p = (scores / scores.sum(-1, keepdim=True)).mean(dim=(0, 1))  # (E,)
    return (f * p).sum()


BALANCE_LOSSES = {"sequence": sequence_balance_loss, "expert": expert_balance_loss}


def max_violation(load: Tensor) -> Tensor:
    """Return MaxVio, (.., E) -> (..): the busiest expert's excess over the mean (2408.15664)."""
    load = load.float()
    return load.amax(-1) / load.mean(-1) - 1
