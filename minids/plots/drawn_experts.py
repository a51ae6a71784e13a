"""A token's way through a MoE layer, drawn from the model's settings with a real gate's choice."""

from dataclasses import replace

from minids.config import ModelArgs
from minids.plots import style
from minids.plots.drawing import ROLES, Box, Drawing
from minids.plots.drawn_model import grid_of

ROUTED, GATE, PLAIN = ROLES["routed"], ROLES["gate"], ROLES["plain"]


def route(args: ModelArgs) -> tuple[list, list, dict[int, float]]:
    """Send one random token through a random gate of the model's own kind, always the same one.

    Returns each expert's score, its score in the choice (-inf in a group that is not kept), and
    the weight of each chosen expert.
    """
    import torch

    from minids.model.moe import Gate
    random = torch.Generator().manual_seed(2)
    gate = Gate(replace(args, dim=8))
    gate.weight.data = torch.randn(gate.weight.shape, generator=random) / 2
    gate.weight.data[:, 0] = -3  # most experts score low, as in a trained gate
    if gate.bias is not None:
        gate.bias += 0.1 * torch.randn(gate.bias.shape, generator=random)
    with torch.no_grad():
        token = torch.randn(1, 1, 8, generator=random)
        token[..., 0] = 1
        weights, routing = gate(token)
        choice = routing.scores if gate.bias is None else routing.scores + gate.bias
        choice = gate.limit_groups(choice)
    chosen = zip(routing.indices.flatten().tolist(), weights.flatten().tolist(), strict=True)
    return routing.scores.flatten().tolist(), choice.flatten().tolist(), dict(sorted(chosen))


@style.house_style()
def moe_drawing(args: ModelArgs):
    """Draw one token through a MoE layer: scores, choice, its experts, and the sum (V3 eq. 12)."""
    if not args.has_moe:
        raise ValueError("n_routed_experts = 0: the model has no MoE layer to draw")
    scores, choice, weights = route(args)
    experts, active = args.n_routed_experts, args.n_activated_experts
    page = Drawing(452, f"The token visits {active} of {experts} experts; their outputs are "
                        "weighted by score and added")
    token = page.box(50, 236, 60, 44, "token", detail=f"{args.dim:,}")
    gates(page, args, token, scores, choice, weights)

    total, count = page.plus(706, 368), len(weights)
    pitch = 516 / count
    bus_in, bus_out = 252, 368
    for i, (expert, weight) in enumerate(weights.items()):
        x = 130 + pitch * (i + 0.5)
        box = page.box(x, 310, min(pitch - 8, 96), 44, f"{expert}", ROUTED, f"× {weight:.2f}")
        page.arrow((x, bus_in), box.top)
        page.arrow(box.bottom, (x, bus_out), head=False)
    page.arrow((80, bus_in), (x, bus_in), head=False)
    page.arrow((130 + pitch / 2, bus_out), total.left)
    page.label(130, 238, f"dispatch: a copy to each of {count} experts", ha="left")
    page.label(130, 384, f"combine: the weighted sum; an expert is {args.dim:,} → "
                         f"{args.moe_inter_dim:,} → {args.dim:,}", ha="left")
    n = args.n_shared_experts
    every = f"{n} shared expert{'s' * (n != 1)}, for every token, without a weight"
    if n:
        shared = page.box(388, 420, 516, 26, every, ROLES["shared"])
        page.arrow(token.bottom, (50, 420), shared.left)
        page.arrow(shared.right, (706, 420), total.bottom)
    out = page.box(764, 368, 56, 44, "out", detail=f"{args.dim:,}")
    page.arrow(total.right, out.left)
    chosen = ", ".join(f"{expert} ({weight:.2f})" for expert, weight in weights.items())
    return page.done(
        f"A token of {args.dim:,} numbers on its way through a MoE layer: a gate scores "
        f"{experts} experts and keeps {active}, here {chosen}; the token is copied to them and to "
        f"{every}; the outputs are weighted and added.")


def gates(page: Drawing, args: ModelArgs, token: Box, scores: list, choice: list,
          weights: dict) -> None:
    """Draw the gate's steps as pictures of all experts: their scores, what is left, the choice."""
    experts, groups, kept = args.n_routed_experts, args.n_expert_groups, args.n_limited_groups
    rows, columns = grid_of(args)
    low, high = min(scores), max(scores)

    def heat(values: list) -> list[str]:
        shares = [max(0.1, min(1, 0.1 + 0.9 * (value - low) / (high - low))) for value in values]
        return [page.shade(GATE, share) if value > float("-inf") else page.shade(PLAIN, 0.15)
                for value, share in zip(values, shares, strict=True)]

    limited = f"best {kept} of {groups} groups" if groups > 1 else ""
    bias = "+ bias, for the choice only" if args.gate_bias else ""
    steps = [(f"{experts} scores", f"{args.score_func} of x · centroid", heat(scores))]
    if limited or bias:
        steps.append((limited or "plus bias", bias if limited else "for the choice only",
                      heat(choice)))
    steps.append((f"best {args.n_activated_experts} experts",
                  f"weights by score, sum {sum(weights.values()):.2g}",
                  [ROUTED if i in weights else page.shade(PLAIN, 0.25) for i in range(experts)]))
    room = 690 / len(steps)
    before = None
    for n, (name, remark, colours) in enumerate(steps):
        x = 102 + room * (n + 0.5)
        outer = page.frame(x, 124, 206, 148)
        page.text(x, 66, name)
        page.label(x, 184, remark)
        width, height = min(188 / columns, 22), min(80 / rows, 22)
        page.grid(x - width * columns / 2, 124 - height * rows / 2,
                  [colours[row * columns:(row + 1) * columns] for row in range(rows)],
                  (width, height), 1 if width > 4 else 0.6)
        if before:
            page.arrow(before.right, outer.left)
        else:
            page.arrow(token.top, (50, 124), outer.left)
        before = outer
    page.arrow((706, before.bottom[1]), (706, 360), label="weights")
