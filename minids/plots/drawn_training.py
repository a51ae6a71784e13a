"""A training step, and who holds what on many GPUs, drawn from the model's settings."""

from minids.config import ModelArgs
from minids.plots import style
from minids.plots.drawing import ROLES, Drawing

ACTIVE, GATE, PLAIN, CACHED = (ROLES[role] for role in ("attention", "gate", "plain", "cached"))


@style.house_style()
def training_drawing(args: ModelArgs):
    """Draw one training step as a loop: batch, model, losses, gradients, optimizer, gate bias."""
    bias = args.has_moe and args.gate_bias
    losses = [("next token", "main loss", ACTIVE)]
    if args.n_mtp_layers:
        losses.append(("tokens after", "MTP loss", ROLES["mtp"]))
    if args.has_moe:
        losses.append(("even load", "balance loss", GATE))
    counted = {1: "one loss moves", 2: "two losses move", 3: "three losses move"}[len(losses)]
    page = Drawing(372, f"In a step {counted} the weights" +
                   ("; loads move the gate's bias" if bias else ""))
    y = 170
    corpus = page.box(62, y, 84, 44, "corpus", PLAIN, "text")
    tokens = page.box(178, y, 84, 44, "tokenizer", PLAIN, f"{args.vocab_size:,}")
    batch = page.box(294, y, 84, 44, "batch", PLAIN, "(B, S) ids")
    model = page.box(446, y, 136, 132, "the model", ROLES["routed"], f"{args.n_layers} blocks")
    for a, b in [(corpus, tokens), (tokens, batch), (batch, model)]:
        page.arrow(a.right, b.left)
    total = page.plus(756, y)
    first = y - 25 * (len(losses) - 1)
    for n, (name, detail, colour) in enumerate(losses):
        box = page.box(632, first + 50 * n, 120, 40, detail, colour, name)
        page.arrow((model.right[0], box.y), box.left)
        points = [box.right, total.left] if box.y == y else [
            box.right, (756, box.y), total.top if box.y < y else total.bottom]
        page.arrow(*points)
    learn = page.box(632, 312, 120, 44, "gradients", PLAIN, "clipped")
    steps = page.box(476, 312, 100, 44, "optimizer", PLAIN, "Muon, AdamW")
    page.arrow(total.right, (784, y), (784, 312), learn.right)
    page.arrow(learn.left, steps.right)
    page.arrow(steps.top, (476, model.bottom[1]), label="new weights")
    if bias:
        gate = page.box(270, 312, 130, 44, "gate bias", GATE, "one fixed step")
        page.arrow((396, model.bottom[1]), (396, 304), (gate.right[0], 304))
        page.arrow((gate.right[0], 322), (416, 322), (416, model.bottom[1]), colour=GATE)
        page.label(390, 262, "loads", ha="right")
    now = page.box(446, 68, 190, 28, "samples, bits per byte", CACHED)
    page.arrow(model.top, now.bottom, label="now and then")
    names = ", ".join(detail for _, detail, _ in losses)
    return page.done(
        f"A training step as a loop: corpus, tokenizer, batch, a model of {args.n_layers} blocks, "
        f"its losses ({names}), their sum, clipped gradients, the optimizer and new weights"
        + ("; the experts' loads move the gate's bias by a fixed step." if bias else "."))


@style.house_style()
def ranks_drawing(args: ModelArgs, stages: list[range] | int = 0, expert_parallel: int = 0,
                  replicas: int = 2):
    """Draw who holds what on many GPUs: stages of layers, ranks with their experts, replicas.

    stages: the layers of each pipeline stage, counted from 0, or how many equal stages; 0: at most
        16, as V3 has. expert_parallel: ranks that share a layer's experts out; 0: at most 64
    replicas: ranks that hold the same experts and see different tokens
    """
    if not isinstance(stages, list):
        count, n = stages or min(16, args.n_layers), args.n_layers
        stages = [range(n * s // count, n * (s + 1) // count) for s in range(count)]
    ranks = expert_parallel or min(64, max(1, args.n_routed_experts))
    if not args.has_moe or args.n_routed_experts % ranks:
        raise ValueError(f"expert_parallel = {ranks} must divide n_routed_experts = "
                         f"{args.n_routed_experts}")
    if not all(stages):
        raise ValueError(f"stages = {len(stages)}: at most n_layers = {args.n_layers}")
    own, few = args.n_routed_experts // ranks, min(replicas, 3)
    times = {1: "", 2: ", twice"}.get(replicas, f", {replicas} times")
    count = f"{len(stages)} stages of layers" if len(stages) > 1 else "one stage"
    page = Drawing(446, f"{len(stages) * ranks * replicas:,} GPUs: {count}, experts over {ranks} "
                        f"ranks{times}")
    shown = [0, 1, len(stages) - 1] if len(stages) > 2 else [*range(len(stages))]
    rows = [0, 1, ranks - 1] if ranks > 3 else [*range(ranks)]
    centres, before = {1: [400], 2: [275, 525], 3: [150, 400, 650]}[len(shown)], None
    for column, stage in enumerate(shown):
        x, first, last = centres[column], stages[stage][0] + 1, stages[stage][-1] + 1
        outer = page.frame(x, 214, 196, 306)
        page.text(x, 82, f"stage {stage + 1}")
        page.label(x, 100, f"layers {first}–{last}" if first < last else f"layer {first}")
        moe = any(map(args.is_moe_layer, stages[stage]))
        for n, rank in enumerate(rows):
            y, colour = (150, 218, 312)[n], ROLES["routed" if moe else "dense"]
            held = f"expert {rank + 1}"
            if own > 1:
                held = f"experts {rank * own + 1}–{(rank + 1) * own}"
            for shift in range(few - 1, 0, -1):
                page.box(x + 5 * shift, y - 5 * shift, 150, 48, "", colour)
            page.box(x, y, 150, 48, f"rank {rank + 1}", colour, held if moe else "no experts")
        if ranks > 3:
            page.text(x, 265, "⋮", 13)
        if before:
            page.arrow((before.right[0], 184), (outer.left[0], 184))
            page.arrow((outer.left[0], 240), (before.right[0], 240), dashed=True)
            if stage != shown[column - 1] + 1:
                page.text((before.right[0] + outer.left[0]) / 2, 212, "…", 13)
        before = outer
    remarks = [f"all-to-all within a stage: each token's copy goes to the ranks of its "
               f"{args.n_activated_experts} experts and back",
               "attention, norms and dense layers are sharded over all ranks of a stage"]
    if len(stages) > 1:
        remarks.insert(0, "between stages: activations on, gradients back (dashed)")
    if replicas > 1:
        remarks[-1] += f"; cards: {replicas} replicas of the experts"
    for n, remark in enumerate(remarks):
        page.label(52, 386 + 19 * n, remark, ha="left")
    return page.done(
        f"{args.n_layers} layers in {len(stages)} pipeline stages, each on {ranks * replicas} "
        f"GPUs: {ranks} ranks with {own} experts of each MoE layer, {replicas} times. Stages pass "
        "on activations and return gradients; within a stage tokens travel to their experts.")
