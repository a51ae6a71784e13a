"""Tokens, MTP modules, products in FP8 and the stages of R1, drawn."""

from collections import Counter
from itertools import pairwise

from minids.config import ModelArgs
from minids.plots import style
from minids.plots.drawing import ROLES, Box, Drawing

ACTIVE, MTP, GATE, PLAIN = ROLES["attention"], ROLES["mtp"], ROLES["gate"], ROLES["plain"]
ROUTED, CACHED, DENSE = ROLES["routed"], ROLES["cached"], ROLES["dense"]


def row(page: Drawing, x: float, y: float, words: list[str], colour: str,
        strong: int = -1) -> list[Box]:
    """Draw a row of small boxes, one for each word, around x; `strong` is the one to look at."""
    left = x - 20 * (len(words) - 1)
    return [page.box(left + 40 * i, y, 34, 24, word, colour, strong=i == strong)
            for i, word in enumerate(words)]


@style.house_style()
def mtp_drawing(args: ModelArgs):
    """Draw the chain of MTP modules beside the model, and what each predicts (V3 eq. 21 to 25).

    At most two modules are drawn; thick edges follow the first position.
    """
    modules = min(args.n_mtp_layers, 2)
    titles = {0: "Without an MTP module each position predicts one token, the next",
              1: "The model predicts the next token, its MTP module the one after"}
    page = Drawing(494, titles.get(args.n_mtp_layers, "Each MTP module looks one token further "
                                   "than the one before"))
    columns = {0: [400], 1: [200, 540], 2: [112, 376, 648]}[modules]
    for k, x in enumerate(columns):
        page.text(x, 52, f"MTP module {k}" if k else "the model")
        page.label(x, 68, ["predicts the next token", "predicts the token after next",
                           "predicts one further"][k])
        predicted = row(page, x, 96, [f"$t_{i + k + 1}$" for i in range(1, 5)],
                        MTP if k else ACTIVE, 0)
        head = page.box(x, 144, 150, 26, "head, shared" if k else "head", dashed=k > 0)
        norm = page.box(x, 196, 150, 24, "RMSNorm")
        page.arrow(norm.top, head.bottom)
        page.arrow(head.top, (x, predicted[0].bottom[1]))
        across = x + 52 if k else x
        embed = page.box(across, 404, 96 if k else 150, 26, "embedding", dashed=k > 0)
        read = row(page, across, 450, [f"$t_{i + k}$" for i in range(1, 5)], PLAIN, 0)
        page.arrow((across, read[0].top[1]), embed.bottom)
        if k:
            block = page.box(x, 248, 150, 34, "one block", MTP)
            join = page.box(x, 304, 200, 40, "projection", MTP, f"2 × {args.dim:,} → {args.dim:,}")
            left, right = (page.box(x + shift, 356, 96, 24, "RMSNorm") for shift in (-52, 52))
            page.arrow(left.top, (left.x, join.bottom[1]))
            page.arrow(right.top, (right.x, join.bottom[1]))
            page.arrow(embed.top, right.bottom)
            page.arrow(join.top, block.bottom)
            page.arrow((columns[k - 1], 170), (x - 118, 170), (x - 118, 356), left.left, colour=MTP)
        else:
            block = page.box(x, 301, 150, 140, f"{args.n_layers} blocks", ACTIVE)
            page.arrow(embed.top, block.bottom)
        page.arrow(block.top, norm.bottom)
    if modules == 1:
        page.label(348, 160, "hidden states")
        page.label(348, 181, f"(B, S, {args.dim:,})")
    more = f" Of {args.n_mtp_layers} modules two are drawn." if args.n_mtp_layers > 2 else ""
    one = args.n_mtp_layers == 1
    modules = "1 MTP module follows: it" if one else f"{args.n_mtp_layers} MTP modules follow: each"
    return page.done(
        f"The model reads tokens 1 to 4 through {args.n_layers} blocks and predicts tokens 2 to 5. "
        f"{modules} norms the hidden state before it and the embedding of one token further, "
        f"projects both to {args.dim:,} numbers, runs one block and the shared head, and predicts "
        f"one token further.{more}")


@style.house_style()
def fp8_drawing(args: ModelArgs):
    """Draw a product in FP8: tiles, blocks, their scales, and the sum in FP32 (V3 section 3.3)."""
    page = Drawing(486, "Every 128 products the FP8 sum is scaled and joins a sum in FP32")
    inner, out = -(-args.dim // 128), -(-args.moe_inter_dim // 128)
    across, down, tokens, token = min(inner, 4), min(out, 3), 5, 2
    column, tints = min(1, down - 1), [0.85, 0.6, 0.42, 0.28]

    def matrix(x: float, high: int, cells: list[list[float]], colour: str) -> Box:
        colours = [[page.shade(colour, share) for share in line] for line in cells]
        top = 186 - high * len(cells) / 2
        return page.grid(x - 22 * len(cells[0]), top, colours, (44, high), 2)

    x_grid = matrix(144, 20, [[tints[j] if i == token else 0.12 for j in range(across)]
                              for i in range(tokens)], ACTIVE)
    w_grid = matrix(410, 44, [[tints[i] if j == column else 0.12 for j in range(down)]
                              for i in range(across)], ROUTED)
    y_grid = matrix(670, 20, [[0.85 if (i, j) == (token, column) else 0.12 for j in range(down)]
                              for i in range(tokens)], CACHED)
    for grid, name, shape in [
            (x_grid, "activations x", f"tokens × {args.dim:,}"),
            (w_grid, "weights W", f"{args.dim:,} × {args.moe_inter_dim:,}"),
            (y_grid, "result y", f"tokens × {args.moe_inter_dim:,}")]:
        page.text(grid.x, 62, name)
        page.label(grid.x, 80, shape)
    for x, sign in [(278, "×"), (548, "=")]:
        page.text(x, 186, sign, 14)
    for x, above, below in [
            (144, "a scale per tile, 1 × 128:", f"{inner} per token"),
            (410, "a scale per block, 128 × 128:", f"{inner} × {out} = {inner * out:,}"),
            (670, "summed in FP32,", "stored in BF16")]:
        page.label(x, 296, above)
        page.label(x, 312, below)

    before, y = page.box(64, 380, 72, 40, "0", CACHED, "FP32"), 380
    for j in range(across):
        x = 64 + 140 * (j + 1)
        total = page.plus(x, y)
        product = page.box(x, 446, 124, 40, f"tile {j + 1} · block {j + 1}", ACTIVE,
                           "128 products, FP8")
        page.arrow(before.right, total.left)
        page.arrow(product.top, total.bottom, label="× two scales")
        before = total
    left = inner - across
    end = page.box(752, y, 64, 40, "y", CACHED, "FP32")
    page.arrow(before.right, end.left, label=f"{left} more" if left else "")
    return page.done(
        f"A product of activations, tokens by {args.dim:,}, and weights, {args.dim:,} by "
        f"{args.moe_inter_dim:,}, in FP8. A token's row has {inner} tiles of 1 by 128 with a scale "
        f"each, the weights {inner * out:,} blocks of 128 by 128. A tile times a block is summed "
        "in the FP8 units, multiplied by both scales, and added to a sum in FP32.")


@style.house_style()
def tokens_drawing(args: ModelArgs, text: str = "the other theme", merges: int = 4):
    """Draw a text as bytes, and how merges of the most frequent pair make longer tokens.

    text: short and ASCII, learned from and encoded; merges: pairs to join
    """
    pieces = [bytes([byte]) for byte in text.encode()]
    rows, learned = [("bytes", pieces)], []
    for _ in range(merges):
        pairs = Counter(pair for pair in pairwise(pieces) if b" " not in pair)
        if not pairs:
            break
        best = max(pairs, key=pairs.get)  # of equal ones the first
        learned.append(b"".join(best))
        pieces = joined(pieces, best)
        rows.append((f"merge {len(learned)}", pieces))
    page = Drawing(134 + 50 * len(rows), f"{len(learned)} merges turn {len(rows[0][1])} bytes into "
                   f"{len(pieces)} tokens")
    unit = min(40, 600 / len(text))
    for n, (name, parts) in enumerate(rows):
        page.text(110, 70 + 50 * n, name, ha="right")
        x = 130.0
        for part in parts:
            wide = unit * len(part)
            shown = part.decode().replace(" ", "␣")
            new = bool(n) and part == learned[n - 1]
            page.box(x + wide / 2, 70 + 50 * n, wide - 5, 28, shown,
                     MTP if part in learned else PLAIN, strong=new)
            x += wide
        page.label(x + 8, 70 + 50 * n, f"{len(parts)}", ha="left")
    bottom = 70 + 50 * len(rows)
    page.text(110, bottom, "ids", ha="right")
    x = 130.0
    for part in pieces:
        wide = unit * len(part)
        page.label(x + wide / 2, bottom, f"{256 + learned.index(part)}" if part in learned
                   else f"{part[0]}")
        x += wide
    page.label(130, bottom + 34, f"ids 0 to 255 are the bytes; the model's vocabulary has "
               f"{args.vocab_size:,} rows", ha="left")
    return page.done(
        f"The text '{text}' as {len(rows[0][1])} bytes, one box each; row by row the most frequent "
        f"pair of neighbours becomes one token, until {len(pieces)} tokens are left.")


def joined(pieces: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Return the pieces with every occurrence of a pair joined, from the left."""
    made: list[bytes] = []
    for piece in pieces:
        if made and (made[-1], piece) == pair:
            made[-1] += piece
        else:
            made.append(piece)
    return made


R1 = {  # stage -> the title of a drawing that highlights it
    "": "DeepSeek-R1 is made in four stages; its samples teach small models",
    "zero": "R1-Zero: reward alone makes a base model think",
    "cold start": "The cold start shows the base model what a thought looks like",
    "rl": "Reinforcement learning rewards right answers, and thoughts grow",
    "rejection": "Right answers of the trained model teach the base model again",
    "final": "The last reinforcement learning covers requests of every kind",
    "distillation": "Small models learn from the samples, without any reward"}


@style.house_style()
def r1_drawing(where: str = ""):
    """Draw the stages of DeepSeek-R1 (arXiv 2501.12948, section 2).

    where: the stage to highlight, a key of R1; "" colours all of them
    """
    if where not in R1:
        raise ValueError(f"where = {where!r} is no stage: valid are "
                         f"{', '.join(filter(None, R1))}")
    page = Drawing(426, R1[where])

    def stage(parts: str, x: float, y: float, name: str, role: str, detail: str) -> Box:
        strong = bool(where) and where in parts.split(", ")
        role = role if strong or not where else "plain"
        return page.box(x, y, 158, 46, name, ROLES[role], detail, strong)

    base = page.box(70, 225, 104, 46, "base model", PLAIN, "pre-trained")
    zero = stage("zero", 462, 80, "RL alone", "gate", "GRPO, no examples")
    cold = stage("cold start", 258, 170, "cold start", "attention", "SFT on thoughts")
    reason = stage("rl", 462, 170, "reasoning RL", "gate", "GRPO, rules give reward")
    samples = stage("rejection, distillation", 462, 260, "800,000 samples", "routed",
                    "right ones kept")
    again = stage("rejection", 258, 350, "SFT", "attention", "on those samples")
    final = stage("final", 462, 350, "final RL", "gate", "requests of all kinds")
    ends = [stage("zero", 690, 80, "R1-Zero", "cached", "thinks, mixes languages"),
            stage("distillation", 690, 260, "small models", "cached", "distilled: SFT alone"),
            stage("final", 690, 350, "R1", "cached", "the released model")]
    for first in (zero, cold, again):
        page.arrow(base.right, (150, 225), (150, first.y), first.left)
    for a, b in [(cold, reason), (zero, ends[0]), (samples, ends[1]), (again, final),
                 (final, ends[2])]:
        page.arrow(a.right, b.left)
    page.arrow(reason.bottom, samples.top)
    page.arrow(samples.left, (258, 260), again.top)
    page.legend(24, 404, {"supervised fine-tuning": ACTIVE, "reinforcement learning": GATE,
                          "data": ROUTED, "models": CACHED})
    return page.done(
        "The stages of DeepSeek-R1. From the base model: RL alone gives R1-Zero; a cold start, "
        "then reasoning RL, whose right replies become 800,000 samples; on these the base model "
        "is fine-tuned again and a final RL gives R1. The samples also teach small models."
        + (f" Highlighted: {R1[where]}." if where else ""))
