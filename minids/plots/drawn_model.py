"""The whole model, drawn from its settings, with any part of it highlighted."""

from minids.config import ModelArgs
from minids.plots import style
from minids.plots.drawing import ROLES, Box, Drawing

PARTS = {  # part -> the title of a drawing that highlights it
    "": "{n_layers} blocks carry each token on{experts}",
    "tokens": "Tokens at both ends: one of {vocab} goes in, {vocab} scores come out",
    "attention": "Attention, in each of {n_layers} blocks, is the only part that looks back",
    "mla": "MLA, in each of {n_layers} blocks, caches {cached} numbers per token",
    "cache": "The cache keeps {cached} numbers per token in each of {n_layers} blocks",
    "rope": "Position enters at one place: {rope} numbers of each query and key",
    "indexer": "In each of {n_layers} blocks an indexer picks {topk} tokens for attention to read",
    "dense": "The first blocks, {dense} of {n_layers}, have a dense feed-forward layer",
    "moe": "{moe} of {n_layers} blocks have experts, {active} of {routed} for each token",
    "gate": "A gate in each of {moe} blocks picks {active} of {routed} experts for each token",
    "mtp": "The MTP module reads the last hidden state and looks one token further",
    "norm": "A norm precedes each layer that computes",
    "head": "The head gives each of {vocab} tokens a score",
    "matrices": "FP8 is for the weight matrices inside the blocks: the coloured boxes"}
SHOWN = {  # part -> what is highlighted with it; "core" is attention itself, which has no weights
    "mla": {"attention", "core", "cache", "rope"}, "attention": {"core", "cache", "rope"},
    "moe": {"gate"}, "mtp": {"shared_head"}, "matrices": {"attention", "dense", "moe", "mtp"}}


def facts(args: ModelArgs) -> dict[str, str]:
    """Return the numbers that the drawing's texts name, with thousands separated."""
    moe = sum(map(args.is_moe_layer, range(args.n_layers)))
    numbers = dict(
        n_layers=args.n_layers, moe=moe, dense=args.n_layers - moe, vocab=args.vocab_size,
        cached=args.kv_lora_rank + args.qk_rope_head_dim, rope=args.qk_rope_head_dim,
        routed=args.n_routed_experts, active=args.n_activated_experts, topk=args.index_topk)
    known = {name: f"{count:,}" for name, count in numbers.items()}
    experts = "; in {moe} of them it meets {active} of {routed} experts".format(**known)
    return known | {"experts": experts if moe else ""}


class Parts(Drawing):
    """A drawing whose parts are coloured when they are looked at, and grey when they are not."""

    def __init__(self, height: float, title: str, dark: bool, where: str):
        super().__init__(height, title, dark)
        self.where, self.looked_at, self.drawn = where, {where} | SHOWN.get(where, set()), {""}

    def colour(self, names: str, role: str) -> str:
        """Return the colour of a thing that belongs to some parts: grey if none is looked at."""
        lit = not self.where or bool(self.looked_at & set(names.split()))
        return ROLES[role if lit else "plain"]

    def part(self, names: str, x: float, y: float, width: float, height: float, name: str = "",
             role: str = "plain", detail: str = "", dashed: bool = False) -> Box:
        """Draw a box that belongs to some parts; it is strong if one of them is looked at.

        names: separated by spaces; the first is the part that this box is
        """
        self.drawn.add(names.split()[0])
        strong = bool(self.where) and bool(self.looked_at & set(names.split()))
        return self.box(x, y, width, height, name, self.colour(names, role), detail, strong, dashed)


@style.house_style()
def model_drawing(args: ModelArgs, where: str = "", dark: bool = False, path: style.File = None):
    """Draw the model: the stack of blocks, one block, its attention and its experts.

    where: the part to highlight, a key of PARTS; "" colours all of them
    dark: for a dark page instead of a white one
    """
    if where not in PARTS:
        valid = ", ".join(filter(None, PARTS))
        raise ValueError(f"where = {where!r} is no part: valid are {valid}")
    known = facts(args)
    title = PARTS[where].format(**known)
    page = Parts(556, title, dark, where)
    block = stack(page, args, known)
    inside = one_block(page, block)
    attention(page, args, inside)
    experts(page, args, inside)
    if not page.drawn & page.looked_at:
        raise ValueError(f"where = {where!r}: a model of these settings has no such part")
    there = f" Highlighted: {title}." if where else ""
    modules = f"{args.n_mtp_layers} MTP module{'s' * (args.n_mtp_layers != 1)}"
    return page.done(
        f"The model from bottom to top: embedding of {known['vocab']} tokens, {known['dense']} "
        f"dense and {known['moe']} MoE blocks, RMSNorm, head; {modules} beside "
        "the head. A block is RMSNorm, MLA, sum, RMSNorm, feed-forward, sum. MLA caches "
        f"{known['cached']} numbers per token; a MoE layer has {known['routed']} routed experts, "
        f"{known['active']} active, and {args.n_shared_experts} shared.{there}", path)


def stack(page: Parts, args: ModelArgs, known: dict) -> Box:
    """Draw the column of the whole model and the MTP modules, return the block to look into."""
    x, wide = 105, 168
    page.label(x, 542, "tokens (B, S)")
    below = page.part("tokens", x, 498, wide, 38, "embedding",
                      detail=f"{known['vocab']} × {args.dim:,}")
    page.arrow((x, 532), below.bottom)
    for y, kind, role in [(418, "dense", "dense"), (338, "moe", "routed")]:
        if known[kind] == "0":
            continue
        behind = (8, 4) if known[kind] != "1" else ()
        for shift in behind:
            page.part(kind, x + shift, y - shift, wide, 38, role=role)
        name = {"dense": "dense block", "moe": "MoE block"}[kind]
        block = page.part(kind, x, y, wide, 38, f"{name}  × {known[kind]}", role)
        page.arrow(below.top, block.bottom, label=f"(B, S, {args.dim:,})")
        below = Box(x, y - len(behind) * 2, wide, 38 + len(behind) * 4)
    norm = page.part("norm", x, 258, wide, 26, "RMSNorm")
    page.arrow(below.top, norm.bottom)
    head = page.part("head tokens", x, 178, wide, 38, "head",
                     detail=f"{args.dim:,} × {known['vocab']}")
    page.arrow(norm.top, head.bottom)
    page.arrow(head.top, (x, 108))
    page.label(x, 96, "scores of the next token")
    page.label(x, 80, f"(B, S, {known['vocab']})")
    if args.n_mtp_layers:
        mtp = page.part("mtp", 302, 218, 150, 38, f"MTP module  × {args.n_mtp_layers}", "mtp",
                        "its own block")
        shared = page.part("shared_head", 302, 150, 150, 26, "head (shared)", dashed=True)
        page.arrow((x, 225), (mtp.left[0], 225), colour=page.colour("mtp", "mtp"))
        page.arrow(mtp.top, shared.bottom)
        page.arrow(shared.top, (302, 108))
        page.label(302, 96, "the token after next")
    return block


def one_block(page: Parts, block: Box) -> dict[str, Box]:
    """Draw the inside of a block, bottom to top, and return its two layers."""
    x = 312
    outer = page.frame(x, 410, 176, 276)
    page.arrow((197, block.y), (outer.left[0], block.y), dashed=True, head=False)
    page.label(x + 80, 286, "one block", ha="right")
    first = page.part("norm", x, 508, 110, 22, "RMSNorm")
    mla = page.part("attention cache rope indexer", x, 460, 110, 28, "MLA", "attention")
    sum1 = page.plus(x, 422)
    second = page.part("norm", x, 390, 110, 22, "RMSNorm")
    ffn = page.part("moe gate", x, 344, 110, 28, "experts", "routed")
    sum2 = page.plus(x, 306)
    page.arrow((x, 546), first.bottom)
    for a, b in [(first, mla), (mla, sum1), (sum1, second), (second, ffn), (ffn, sum2)]:
        page.arrow(a.top, b.bottom)
    page.arrow(sum2.top, (x, 266))
    for start, end in [(535, sum1), (408, sum2)]:
        page.arrow((x, start), (x - 74, start), (x - 74, end.y), end.left)
    return dict(mla=mla, ffn=ffn)


def attention(page: Parts, args: ModelArgs, inside: dict[str, Box]) -> None:
    """Draw what is inside MLA."""
    outer = page.frame(620, 440, 336, 216, "MLA: attention over latents",
                       page.colour("attention cache rope indexer", "attention"))
    page.arrow(inside["mla"].right, (outer.left[0], 460), dashed=True, head=False)
    query = page.part("attention", 510, 500, 92, 40, "query", "attention",
                      f"latent {args.q_lora_rank:,}" if args.q_lora_rank else f"from {args.dim:,}")
    latent = page.part("cache attention", 620, 500, 108, 40, "latent", "cached",
                       f"{args.kv_lora_rank} cached")
    key = page.part("rope cache attention", 730, 500, 92, 40, "rotated key", "cached",
                    f"{args.qk_rope_head_dim} cached")
    heads = page.part("core", 620, 424, 312, 40, f"{args.n_heads} heads", "attention",
                      f"softmax(q · k) v; q, k of {args.qk_nope_head_dim} + "
                      f"{args.qk_rope_head_dim}, v of {args.v_head_dim}")
    for part in (query, latent, key):
        page.arrow(part.top, (part.x, heads.bottom[1]))
        page.arrow((part.x, 540), part.bottom)
    out = page.part("attention", 620, 372, 108, 22, "output", "attention")
    if args.has_indexer:
        chooser = page.part("indexer", 730, 372, 92, 22, f"best {args.index_topk:,}", "gate")
        page.arrow(chooser.bottom, (730, heads.top[1]))
    page.arrow(heads.top, out.bottom)


def experts(page: Parts, args: ModelArgs, inside: dict[str, Box]) -> None:
    """Draw what is inside the feed-forward layer of a MoE block."""
    outer = page.frame(620, 178, 336, 260, "MoE: shared and routed experts",
                       page.colour("moe gate", "routed"))
    page.arrow(inside["ffn"].right, (426, 344), (426, outer.y), outer.left, dashed=True, head=False)
    if not args.has_moe:
        page.label(620, 190, "no layer has experts")
        return
    rows, columns = grid_of(args)
    width, height = min(232 / columns, 24), min(72 / rows, 20)
    lit, dim = (page.shade(page.colour("moe gate", "routed"), share) for share in (1, 0.3))
    chosen = spread(args.n_routed_experts, args.n_activated_experts)
    colours = [[lit if row * columns + column in chosen else dim for column in range(columns)]
               for row in range(rows)]
    x, y = 592, 170
    grid = page.grid(x - width * columns / 2, y - height * rows / 2, colours, (width, height))
    page.label(x, y + 50, f"{args.n_routed_experts} routed, {args.n_activated_experts} active")
    gate = page.part("gate", x, 264, 150, 36, "gate", "gate",
                     f"{args.score_func}{' + bias' if args.gate_bias else ''}, best "
                     f"{args.n_activated_experts}")
    total = page.plus(x, 108)
    page.arrow((x, 305), gate.bottom)
    page.arrow(gate.top, (x, y + 60))
    page.arrow((x, grid.top[1]), total.bottom)
    page.arrow(total.top, (x, 82))
    if args.n_shared_experts:
        shared = page.part("moe", 746, y, 66, 40, "shared", "shared", f"× {args.n_shared_experts}")
        page.arrow((x, 296), (746, 296), shared.bottom)
        page.arrow(shared.top, (746, 108), total.right)


def grid_of(args: ModelArgs) -> tuple[int, int]:
    """Return rows and columns of a picture of the experts: a row per group, or at most 32 wide."""
    experts, rows = args.n_routed_experts, args.n_expert_groups
    if rows == 1:
        rows = next(n for n in range(-(-experts // 32), experts + 1) if experts % n == 0)
    return rows, experts // rows


def spread(count: int, chosen: int) -> set[int]:
    """Return which of `count` cells to fill: one in each of `chosen` equal parts, not in line."""
    part = count // chosen
    return {i * part + (5 * i + 2) % part for i in range(chosen)}
