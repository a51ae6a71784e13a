"""Attention, drawn from the model's settings: MHA and its kin, and MLA, with what each caches."""

from minids.config import ModelArgs
from minids.plots import style
from minids.plots.drawing import ROLES, Box, Drawing

PLAIN, ACTIVE, CACHED = ROLES["plain"], ROLES["attention"], ROLES["cached"]


def weight(page: Drawing, x: float, y: float, symbol: str, name: str = "") -> Box:
    """Draw a weight matrix: the paper's symbol, and under it the parameter's name."""
    return page.box(x, y, 74, 40, f"$W^{{{symbol}}}$", PLAIN, name)


def key(page: Drawing, y: float) -> None:
    """Explain the colours."""
    page.legend(24, y, {"weights": PLAIN, "computed for this token": ACTIVE,
                        "cached, read by all later tokens": CACHED})


def look_back(page: Drawing, x: float, y: float, height: float, heads: int) -> Box:
    """Draw what all heads do with their queries, keys and values."""
    attend = page.box(x, y, 106, height, colour=ACTIVE)
    page.text(x, y - 44, f"{heads} heads")
    for line, words in enumerate(["scores q · k", "softmax over", "earlier tokens", "sum of v"]):
        page.label(x, y - 16 + 20 * line, words)
    return attend


@style.house_style()
def attention_drawing(args: ModelArgs, n_kv_heads: int = 0):
    """Draw multi-head attention with its cache: keys and values of every key/value head.

    n_kv_heads: key/value heads, fewer than heads if they are shared; 0: as many as heads
    """
    heads, kv = args.n_heads, n_kv_heads or args.n_heads
    q_width, v_width = args.qk_nope_head_dim, args.v_head_dim
    cached, middle = kv * (q_width + v_width), 155
    name = "MHA" if kv == heads else "GQA" if kv > 1 else "MQA"
    shared = f" with {kv:,} key/value head{'s' if kv > 1 else ''}" if kv != heads else ""
    page = Drawing(306, f"{name}{shared} caches {cached:,} numbers per token per layer")
    h = page.box(48, middle, 60, 44, "h", ACTIVE, f"{args.dim:,}")
    attend = look_back(page, 560, middle, 206, heads)
    for symbol, y, what, count, width, colour in [
            ("Q", 75, "q", heads, q_width, ACTIVE), ("K", middle, "k", kv, q_width, CACHED),
            ("V", 235, "v", kv, v_width, CACHED)]:
        matrix = weight(page, 182, y, symbol)
        page.arrow(h.right, (112, middle), (112, y), matrix.left)
        result = page.box(360, y, 130, 44, what, colour, f"{count:,} × {width}",
                          strong=colour == CACHED)
        page.arrow(matrix.right, result.left, label=f"{count * width:,}")
        page.arrow(result.right, (attend.left[0], y))
    out = weight(page, 702, middle, "O")
    page.arrow(attend.right, out.left)
    page.label(702, middle - 32, f"{heads * v_width:,} → {args.dim:,}")
    page.arrow(out.right, (784, middle))
    key(page, 284)
    return page.done(
        f"{name} from left to right: the hidden state h of {args.dim:,} numbers becomes "
        f"queries of {heads} heads, and keys and values of {kv} heads; keys and values, {cached:,} "
        f"numbers, are cached; heads attend, and W^O brings the result back to {args.dim:,}.")


@style.house_style()
def mla_drawing(args: ModelArgs):
    """Draw MLA's flow from the hidden state to the output, with widths (V3 equations 1 to 11)."""
    heads, nope, rope, v = (args.n_heads, args.qk_nope_head_dim, args.qk_rope_head_dim,
                            args.v_head_dim)
    cached, mha = args.kv_lora_rank + rope, heads * (nope + v)
    page = Drawing(390, f"MLA caches {cached:,} numbers per token per layer, MHA {mha:,}")
    q_row, k_row, v_row, rope_row = 75, 155, 225, 305
    middle = (k_row + v_row) / 2
    h = page.box(44, middle, 56, 44, "h", ACTIVE, f"{args.dim:,}")
    attend = look_back(page, 622, middle, 276, heads)

    def branch(to: tuple) -> None:
        page.arrow(h.right, (82, middle), (82, to[1]), to)

    def result(name: str, y: float, widths: str, up: Box) -> None:
        made = page.box(480, y, 124, 44, name, ACTIVE, widths)
        page.arrow(up.right, made.left)
        page.arrow(made.right, (attend.left[0], y))

    if args.q_lora_rank:
        down = weight(page, 138, q_row, "DQ", "wq_a")
        latent = page.box(246, q_row, 76, 44, "$c^Q$", ACTIVE, f"{args.q_lora_rank:,}")
        up = weight(page, 358, q_row, "UQ, QR", "wq_b")
        page.arrow(down.right, latent.left)
        page.arrow(latent.right, up.left)
        branch(down.left)
    else:
        up = weight(page, 358, q_row, "Q", "wq")
        branch(up.left)
    result("q", q_row, f"{heads} × ({nope} + {rope})", up)

    down = weight(page, 138, middle, "DKV", "wkv_a")
    branch(down.left)
    latent = page.box(246, middle, 76, 50, "$c^{KV}$", CACHED, f"{args.kv_lora_rank:,}",
                      strong=True)
    page.arrow(down.right, latent.left)
    for symbol, name, y, width in [("UK", "k", k_row, nope), ("UV", "v", v_row, v)]:
        up = weight(page, 358, y, symbol, "wkv_b")
        page.arrow(latent.right, (302, middle), (302, y), up.left)
        result(name, y, f"{heads} × {width}", up)

    down = weight(page, 138, rope_row, "KR", "wkv_a")
    branch(down.left)
    rotated = page.box(246, rope_row, 76, 50, "$k^R$", CACHED, f"{rope}", strong=True)
    page.arrow(down.right, rotated.left)
    page.arrow(rotated.right, (attend.left[0], rope_row),
               label="rotated by its position, one key for all heads")
    out = weight(page, 732, middle, "O", "wo")
    page.arrow(attend.right, out.left)
    page.label(732, middle - 32, f"{heads * v:,} → {args.dim:,}")
    page.arrow(out.right, (794, middle))
    key(page, 368)
    queries = f"a latent of {args.q_lora_rank:,}" if args.q_lora_rank else "one matrix"
    return page.done(
        f"MLA from left to right: the hidden state h of {args.dim:,} numbers gives queries through "
        f"{queries}; a latent of {args.kv_lora_rank} numbers, cached, which two matrices expand to "
        f"keys and values of {heads} heads; and one rotated key of {rope} numbers, cached, for all "
        f"heads. The heads attend, and W^O brings the result back to {args.dim:,}.")


@style.house_style()
def dsa_drawing(args: ModelArgs):
    """Draw V3.2's indexer, its selection, attention over it, and what learns from what."""
    from random import Random
    if not args.has_indexer:
        raise ValueError("index_n_heads = 0: the model has no indexer to draw")
    gate, cells, keep = ROLES["gate"], 24, 5
    page = Drawing(430, f"The indexer picks {args.index_topk:,} tokens for each query; attention "
                        "reads only those")
    random = Random(5)
    scores = [random.random() ** 2 for _ in range(cells)]
    best = sorted(range(cells), key=lambda i: -scores[i])[:keep]

    h = page.box(48, 205, 60, 44, "h", ACTIVE, f"{args.dim:,}")
    query = page.box(184, 96, 110, 44, "index queries", gate,
                     f"{args.index_n_heads} × {args.index_head_dim}")
    keys = page.box(184, 160, 110, 44, "index key", CACHED, f"{args.index_head_dim} cached",
                    strong=True)
    score = page.box(342, 96, 112, 44, "index score", gate, "Σ w · ReLU(q · k)")
    strip = [[page.shade(gate, 0.12 + 0.88 * value) for value in scores]]
    row = page.grid(440, 84, strip, (10, 24))
    page.label(560, 70, "a score for each earlier token")
    choice = page.box(560, 158, 150, 40, f"best {args.index_topk:,}", gate, "a choice, no gradient")
    latents = [[page.shade(CACHED, 0.9 if i in best else 0.14) for i in range(cells)]]
    cache = page.grid(440, 218, latents, (10, 24))
    page.label(432, 230, f"cached latents, {args.kv_lora_rank} + {args.qk_rope_head_dim} each",
               ha="right")
    queries = page.box(184, 310, 110, 44, "queries", ACTIVE,
                       f"{args.n_heads} × {args.qk_head_dim}")
    attend = page.box(560, 310, 150, 44, "attention", ACTIVE, "over the chosen latents")
    out = page.box(730, 310, 80, 44, "output", ACTIVE, f"{args.dim:,}")
    page.arrow(h.right, (100, 205), (100, 96), query.left)
    page.arrow((100, 160), keys.left)
    page.arrow(h.right, (100, 205), (100, 310), queries.left)
    page.arrow(query.right, score.left)
    page.arrow(keys.right, (342, 160), score.bottom)
    page.arrow(score.right, (row.left[0], 96))
    page.arrow((560, row.bottom[1]), choice.top)
    page.arrow(choice.bottom, (560, cache.top[1]))
    page.arrow((560, cache.bottom[1]), attend.top)
    page.arrow(queries.right, attend.left)
    page.arrow(attend.right, out.left)
    own = page.box(730, 158, 110, 44, "indexer's loss", gate, "KL to attention")
    page.arrow((attend.right[0] - 10, attend.top[1]), (625, 262), (730, 262), own.bottom)
    page.arrow(own.top, (730, 96), (row.right[0], 96), colour=gate, dashed=True)
    main = page.box(730, 384, 110, 30, "model's loss", ACTIVE)
    page.arrow(out.bottom, main.top)
    page.arrow(main.left, (560, 384), attend.bottom, colour=ACTIVE, dashed=True)
    page.label(129, 384, "dashed: gradients; neither loss reaches the other part", ha="left")
    return page.done(
        f"V3.2's sparse attention: {args.index_n_heads} small index heads score every earlier "
        f"token by its cached key of {args.index_head_dim} numbers; the best {args.index_topk:,} "
        f"are chosen; the {args.n_heads} attention heads read only their latents. The indexer "
        "learns from the KL divergence to attention's weights, the rest from the model's loss.")
