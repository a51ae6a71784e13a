"""How good a model is: bits per byte of text it has not seen, and how its experts share the work.

    python -m minids.evaluate --run runs/tiny
    python -m minids.evaluate --run runs/tiny --data text:other_text
    python -m minids.evaluate --run DeepSeek-V2-Lite --data text:other_text   # a released model
    python -m minids.evaluate --run runs/tiny-warm --selections
    python -m minids.evaluate --run runs/tiny --drafts

Bits per byte is the cross-entropy of all tokens, in bits, over the number of bytes they stand for.
Unlike the loss per token it does not depend on the vocabulary, so that models with different
tokenizers can be compared (V3's table of base models has it as Pile BPB, section 4.4).

--selections asks what sparse attention (V3.2 section 2.1) costs and why: the same model attends to
all tokens, to the k that its indexer selects, to the k that attention itself weighs most, to the
last k, and to k at random.

--drafts asks how well the MTP modules guess what the model will say (V3 section 5.4.3), by depth
and by kind of text. Over held-out text a draft is compared with what the model itself makes of the
same true text, so that a module cannot profit from the repetitions that a model falls into when it
goes on from its own words; those are the last row.
"""

import ast
import contextlib
import functools
import io
import keyword
import math
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, option, require
from minids.base.tables import format_table
from minids.generate import generate
from minids.hf import open_model
from minids.model.mla import MLA, Context, seen_by
from minids.model.moe import max_violation
from minids.model.sparse_attention import Selection, attention_mass, few_rows, select
from minids.runs.checkpoints import pick_device
from minids.text.data import open_data


class Evaluation(NamedTuple):
    """What a pass over validation text shows.

    bits_per_byte: of all targets, those that are special tokens included
    loads: (n MoE layers, E) int64, tokens sent to each expert, MTP modules left out
    """

    bits_per_byte: float
    loads: Tensor

    @property
    def max_vio(self) -> list[float]:
        """MaxVio of each MoE layer over all of the text: "global" in arXiv 2408.15664."""
        return max_violation(self.loads).tolist() if self.loads.numel() else []


def windows(tokens: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Sequences and their targets, side by side in the text: (n, S + 1).

    tokens: (M,) int64; max_tokens: take only so many, in windows spread evenly over the text
    Raises `ValueError` for text shorter than a window.
    """
    count = (len(tokens) - 1) // seq_len
    if count < 1:
        raise ValueError(f"seq_len = {seq_len} is longer than the validation text, "
                         f"{len(tokens)} tokens: it must be at most {len(tokens) - 1}")
    chosen = min(count, max(max_tokens // seq_len, 1)) if max_tokens else count
    starts = torch.arange(chosen) * count // chosen * seq_len
    return tokens[starts[:, None] + torch.arange(seq_len + 1)]


@torch.no_grad()
def evaluate(model, tokens: Tensor, n_bytes: Tensor, seq_len: int, batch_size: int,
             max_tokens: int | None = None, begin_id: int | None = None) -> Evaluation:
    """Run the model over validation text; nothing in the model changes.

    tokens: (M,) int64, packed documents
    n_bytes: (vocab_size,) int64, bytes that each token stands for
    seq_len, batch_size: tokens in a window, windows at a time
    max_tokens: the same evenly spread part every time; None: all windows
    begin_id: the token that begins a document, where documents do not see each other
    """
    device = model.head.weight.device
    nats, size, loads = 0.0, 0, 0
    for batch in windows(tokens, seq_len, max_tokens).split(batch_size):
        inputs = batch[:, :-1].to(device)
        samples = None if begin_id is None else (inputs == begin_id).cumsum(1)
        hidden, routings = model.hidden(inputs, samples=samples)
        logits, targets = model.head(hidden).float(), batch[:, 1:].to(device)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        size += int(n_bytes[batch[:, 1:]].sum())
        if routings:
            loads = loads + torch.stack([r.load() for r in routings]).cpu()
    loads = loads if torch.is_tensor(loads) else torch.zeros(0, 0, dtype=torch.int64)
    return Evaluation(nats / math.log(2) / size, loads)


# How much a layer's queries want each token, (B, S, T), from the attention, its input (B, S, D),
# its query latent and the context of the pass.
Scores = Callable[[MLA, Tensor, Tensor, Context], Tensor]
# From the same, the tokens that they get; None for all.
Rule = Callable[[MLA, Tensor, Tensor, Context], Selection | None]


@contextlib.contextmanager
def selecting(model: torch.nn.Module, rule: Rule) -> Iterator[None]:
    """Within it every layer attends to what `rule` selects, whatever its indexer says, if any."""
    layers = [module for module in model.modules() if isinstance(module, MLA)]
    for attn in layers:
        attn.selection = functools.partial(rule, attn)
    try:
        yield
    finally:
        for attn in layers:
            del attn.selection


def everything(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> None:
    """The rule of dense attention."""


def best(k: int, scores: Scores) -> Rule:
    """The rule that gives each query the k tokens of the highest scores."""
    def rule(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Selection | None:
        wanted = scores(attn, x, c_q, context)  # (B, S, T)
        keys = wanted.size(2)
        return select(wanted, seen_by(context, x, keys), k) if keys > k else None
    return rule


def indexer_scores(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Tensor:
    """As the layer's indexer wants them."""
    keys = attn.indexer.keys(x, context.rotation)
    return attn.indexer.scores(x, c_q, keys, context.rotation)


def attention_scores(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Tensor:
    """The probabilities of dense attention, the mean over its heads."""
    q = torch.cat(attn.queries(c_q, context.rotation), dim=-1)  # (B, S, H, qk_head_dim)
    k, _ = attn.expand(attn.latent(x, context.rotation))
    seen = seen_by(context, x, k.size(1))
    return torch.cat([attention_mass(q[:, rows], k, seen[:, rows], attn.scale)
                      for rows in few_rows(q.size(1), k, q.size(2))], dim=1)


def position_scores(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Tensor:
    """The later the better: a sliding window."""
    batch, length = x.shape[:2]
    return torch.arange(length, dtype=torch.float32, device=x.device).expand(batch, length, -1)


def random_scores(seed: int = 0) -> Scores:
    """At random, each query and layer anew."""
    generator = torch.Generator().manual_seed(seed)

    def scores(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> Tensor:
        return torch.rand(len(x), x.size(1), x.size(1), generator=generator).to(x.device)
    return scores


def all_scores(model: torch.nn.Module) -> dict[str, Scores]:
    """By name; "indexer" where the model has one."""
    own = {"indexer": indexer_scores} if model.args.has_indexer else {}
    return own | {"attention": attention_scores, "window": position_scores,
                  "random": random_scores()}


@torch.no_grad()
def attention_recall(model, tokens: Tensor, k: int) -> dict[str, list[float]]:
    """How much of dense attention each way of selecting k tokens holds.

    tokens: (B, S) int64; the model runs with dense attention
    Returns, by the names of `all_scores`, for each layer the share of the probability (the mean
    over heads) that the selected tokens have, over the queries that see more than k. No k tokens
    have more than those of "attention". Raises `ValueError` where no query sees more than k.
    """
    if tokens.size(1) <= k:
        raise ValueError(f"index_topk = {k} is not valid: it must be less than the "
                         f"{tokens.size(1)} tokens of a window, else nothing is left out")
    ways, held = all_scores(model), {}

    def measure(attn: MLA, x: Tensor, c_q: Tensor, context: Context) -> None:
        mass = attention_scores(attn, x, c_q, context)[:, k:]  # of queries that see more than k
        for name, scores in ways.items():
            chosen = best(k, scores)(attn, x, c_q, context)
            share = mass.gather(-1, chosen.indices[:, k:]).sum(-1).mean()
            held.setdefault(name, []).append(share.item())

    with selecting(model, measure):
        model.hidden(tokens)
    return held


class Row(NamedTuple):
    """One way of selecting k tokens: bits per byte, and `attention_recall` of each layer."""

    selection: str
    bits_per_byte: float
    recall: list[float]


def compare_selections(model, tokens: Tensor, n_bytes: Tensor, seq_len: int, batch_size: int,
                       k: int, max_tokens: int | None = None) -> list[Row]:
    """The same model and text under dense attention and under every way of selecting k tokens.

    The arguments are those of `evaluate`; recall is measured on one batch of the text.
    """
    batch = windows(tokens, seq_len, batch_size * seq_len)[:, :-1]
    recall = attention_recall(model, batch.to(model.head.weight.device), k)
    rules = {"dense": everything} | {n: best(k, s) for n, s in all_scores(model).items()}
    rows = []
    for name, rule in rules.items():
        with selecting(model, rule):
            result = evaluate(model, tokens, n_bytes, seq_len, batch_size, max_tokens)
        rows += [Row(name, result.bits_per_byte, recall.get(name, [1.0] * model.args.n_layers))]
    return rows


def selection_table(rows: list[Row], k: int) -> str:
    """`compare_selections` for reading; the first row is what the others are compared with."""
    title = f"attention to {k} tokens", "bits/byte", "above dense", "recall of attention by layer"
    cells = [(row.selection, f"{row.bits_per_byte:.4f}",
              f"{row.bits_per_byte / rows[0].bits_per_byte - 1:+.2%}",
              " ".join(f"{share:.3f}" for share in row.recall)) for row in rows]
    return format_table([title, *cells])


class Agreement(NamedTuple):
    """How drafts of one kind of text fare: tokens, and the shares of them that pass.

    greedy: the module's likeliest token is the model's
    sampled: the chance to pass at temperature 1
    """

    tokens: int
    greedy: float
    sampled: float


KIND = {tokenize.COMMENT: "comments", tokenize.STRING: "strings", tokenize.NUMBER: "numbers",
        tokenize.OP: "signs"}


def kinds_of_python(text: str) -> list[str]:
    """Of each character, the kind of word that it belongs to, by Python's own tokenizer."""
    kinds = ["white space" if c.isspace() else "other" for c in text]
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for word in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = KIND.get(word.type)
            if word.type == tokenize.NAME:
                kind = "keywords" if keyword.iskeyword(word.string) else "names"
            if kind:
                first, last = (starts[line - 1] + column for line, column in (word.start, word.end))
                kinds[first:last] = [kind] * (last - first)
    return kinds


def kinds_of_tokens(tokens: Tensor, tokenizer) -> list[str]:
    """The kind of each token of packed documents: that of its first character that is no space."""
    special = set(tokenizer.special.values())
    kinds, ends = [], (tokens == tokenizer.eos_id).nonzero().flatten().tolist()
    for start, end in zip([0, *(e + 1 for e in ends)], [*(e + 1 for e in ends), len(tokens)],
                          strict=True):
        ids = tokens[start:end].tolist()
        raw = [tokenizer.decode_bytes([i]) if i not in special else b"" for i in ids]
        text = b"".join(raw).decode("utf-8", "replace")
        of_bytes = [kind for kind, c in zip(kinds_of_python(text), text, strict=True)
                    for _ in c.encode()]
        at = 0
        for piece in raw:
            own = of_bytes[at:at + len(piece)]
            kinds.append(next((k for k in own if k != "white space"),
                              "white space" if own else "ends of documents"))
            at += len(piece)
    return kinds


@torch.no_grad()
def draft_agreement(model, tokens: Tensor, kinds: list[str], seq_len: int, batch_size: int,
                    max_tokens: int | None = None) -> list[dict[str, Agreement]]:
    """How well each MTP module guesses the model's own next word on given text.

    tokens: (M,) int64, packed documents; kinds: of each of them; the others as for `evaluate`
    Returns for each depth k the agreement by kind of the token that is guessed, and of "all".
    """
    names = sorted(set(kinds))
    codes = windows(torch.tensor([names.index(kind) for kind in kinds]), seq_len, max_tokens)
    device, depths = model.head.weight.device, len(model.mtp)
    sums = torch.zeros(depths, len(names), 3, dtype=torch.float64)
    for batch, kind in zip(windows(tokens, seq_len, max_tokens).split(batch_size),
                           codes.split(batch_size), strict=True):
        batch = batch[:, :-1].to(device)
        states = model.hidden(batch)[0]
        own = model.head(states).float().softmax(-1)  # (B, S, V)
        for k, module in enumerate(model.mtp, start=1):
            context = model.context(batch[:, k:])
            states, _ = module(states[:, :-1], model.embed(batch[:, k:]), context)
            guess = model.head(states).float().softmax(-1)  # (B, S - k, V), of token i + k + 1
            p, guessed = own[:, k:], kind[:, k + 1:].flatten()
            passes = torch.stack([torch.ones_like(p[..., 0]), guess.argmax(-1) == p.argmax(-1),
                                  torch.minimum(p, guess).sum(-1)], dim=-1)
            sums[k - 1].index_add_(0, guessed, passes.flatten(0, 1).double().cpu())
    tables = []
    for depth in sums:
        rows = dict(zip(names, depth, strict=True)) | {"all": depth.sum(0)}
        tables.append({name: Agreement(int(n), float(g / n), float(s / n))
                       for name, (n, g, s) in rows.items() if n})
    return tables


def draft_table(run, text: Tensor, seq_len: int, batch_size: int, max_tokens: int | None) -> str:
    """`draft_agreement` for reading, and beside it the drafts of the model's own greedy text."""
    tables = draft_agreement(run.model, text, kinds_of_tokens(text, run.tokenizer), seq_len,
                             batch_size, max_tokens)
    depths = range(1, len(tables) + 1)
    rows = [("the model's choice is guessed", "tokens", *(f"draft {k}" for k in depths),
             *(f"draft {k}, sampled" for k in depths))]
    for name, first in sorted(tables[0].items(), key=lambda item: (item[0] == "all", -item[1][0])):
        each = [table[name] for table in tables]
        rows.append((name, first.tokens, *(f"{a.greedy:.1%}" for a in each),
                     *(f"{a.sampled:.1%}" for a in each)))
    prompts = windows(text, seq_len // 2, 16 * (seq_len // 2))[:, :-1].tolist()
    new = seq_len // 2 - 2 * len(tables)
    shares = [generate(run.model, prompts, new, t, speculative=len(tables)).acceptance
              for t in (0.0, 1.0)]
    return format_table([*rows, ("on its own text", len(prompts) * new,
                                 *(f"{share:.1%}" for own in shares for share in own))])


def parse_share(text: str) -> tuple[int, int]:
    """How much of a text is Python: (top-level blocks that parse, top-level blocks).

    A block starts at a line without indentation, unless that line only goes on with the one before
    (`else:`, a closing bracket, a decorated function). Comments between blocks count for nothing,
    nor does the last block, which the end of the text may have cut.
    """
    blocks: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        goes_on = blocks and (blocks[-1].rstrip().rsplit("\n", 1)[-1].startswith("@")
                              or line.startswith(("else:", "elif ", "except", "finally:", ")",
                                                  "]", "}")))
        if blocks and (goes_on or not line[:1].strip()):
            blocks[-1] += "\n" + line
        elif line.strip():
            blocks.append(line)
    return sum(map(parses, blocks[:-1])), len(blocks[:-1])


def parses(block: str) -> bool:
    """Whether Python's own parser accepts a text."""
    try:
        ast.parse(block)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class EvaluateArgs:
    """Which run to evaluate, and on what."""

    run: str = option("runs/tiny", "run folder, one of its checkpoints, or a Hugging Face folder")
    data: str = option("", "text, as for minids.train; none is the run's own, or else pystdlib")
    seq_len: int = option(0, "tokens in a window; 0: as in training, or else 1024 at most")
    batch_size: int = option(16, "windows at a time")
    max_tokens: int = option(0, "validation tokens, spread over the text; 0: all")
    selections: bool = option(False, "compare dense attention and ways of selecting k tokens")
    index_topk: int = option(0, "tokens of --selections; 0: the model's, or an eighth of a window")
    drafts: bool = option(False, "how often the MTP modules guess what the model says")
    fp8: bool = option(False, "products of linear layers and experts in FP8")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice, one a core")

    def __post_init__(self):
        check_types(self)
        require(self, "batch_size", self.batch_size >= 1, "at least 1")
        for name in ("seq_len", "threads", "max_tokens", "index_topk"):
            require(self, name, getattr(self, name) >= 0, "0 or more")


def main() -> None:
    """The command line."""
    [given] = parse("minids.evaluate", __doc__, EvaluateArgs)
    args = EvaluateArgs(**given)
    if args.threads:
        torch.set_num_threads(args.threads)
    run = open_model(args.run, pick_device(args.device))
    # A Hugging Face folder does not say what its model was trained on.
    train = run.config.get("train") or {"data": "pystdlib",
                                        "seq_len": min(run.model.args.max_seq_len, 1024)}
    if args.fp8:
        run.model.use_fp8()
    seq_len = args.seq_len or train["seq_len"]
    data = open_data(args.data or train["data"], run.tokenizer, seq_len)
    text = data.valid, run.tokenizer.n_bytes, seq_len, args.batch_size
    print(f"{run.checkpoint} on {data.name}, {len(data.valid):,} validation tokens")
    if args.selections:
        k = args.index_topk or (run.model.args.index_topk if run.model.args.has_indexer
                                else max(seq_len // 8, 1))
        print(selection_table(compare_selections(run.model, *text, k, args.max_tokens or None), k))
        return
    if args.drafts:
        if not run.model.mtp:
            raise ValueError(f"drafts = True is not valid: {args.run} has no MTP module")
        print(draft_table(run, data.valid, seq_len, args.batch_size, args.max_tokens or None))
        return
    begin_id = run.tokenizer.bos_id if train.get("separate") else None
    result = evaluate(run.model, *text, args.max_tokens or None, begin_id)
    print(f"bits per byte    {result.bits_per_byte:.4f}")
    if result.max_vio:
        print("MaxVio by layer  " + " ".join(f"{v:.2f}" for v in result.max_vio))


if __name__ == "__main__":
    run_program("minids.evaluate", main)
