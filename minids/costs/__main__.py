"""Count the parameters, FLOPs, cache and memory of a model, and the bill of its training.

    python -m minids.costs --preset v3
    python -m minids.costs --preset v3.2 --seq-len 131072
    python -m minids.costs --preset v3 --tokens 1e12 --gpus 512 --gpu-memory 141 --gpu-price 3.5
    python -m minids.costs --preset v3.2 --prompt-tokens 100000 --output-tokens 2000
    python -m minids.costs --what cards                 the presets for one card: hours, USD, loss
    python -m minids.costs --preset v3 --n-routed-experts 384 --n-expert-groups 1 \\
        --n-limited-groups 1

Training is sharded like V3's where that fits the GPUs, else in the first way that does; a flag
fixes any part of it, such as --pipeline. `training_memory` lists what the memory leaves out, and
`minids.costs.flops` what the FLOPs leave out.
"""

from dataclasses import dataclass, replace
from itertools import product

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.costs import bill, flops
from minids.costs.bill import Bill, Plan, Prices, Rental
from minids.costs.cards import CARDS, Recipe, plan_card
from minids.costs.decoding import cache_bytes_per_token, drafting, fp8_cache_bytes_per_layer
from minids.costs.memory import Sharding
from minids.costs.parameters import count_parameters, stored_elements

CARD_NOTES = (
    "Share of the BF16 peak: assumed, * measured. Prices are assumed. --mfu, --gpu-price and",
    "others set them for all cards.",
    "Memory without logits and workspace, for which a tenth of the card is left.",
    "Loss, nats per token: of a dense model with as many parameters as a token uses here, on other",
    "text (arXiv 2404.10102); experts do better by an unknown margin.")


@dataclass(frozen=True)
class CostArgs(Settings):
    """Model, hardware and prices."""

    what: str = option("model", "tables of one model, or of the presets made for one card",
                       ("model", "cards"))
    preset: str = option("v3", "model: " + ", ".join(ModelArgs.presets()))
    seq_len: int = option(0, "context, tokens; 0: the trained one, before YaRN stretches it", low=0)
    n_groups: int = option(8, "key/value heads of the GQA that the cache is compared with", low=1)
    acceptance: float = option(0.85, "share of the MTP module's drafts that are accepted; V3: 0.85 "
                                     "to 0.9", low=0, high=1)
    tokens: float = option(bill.V3_TOKENS, "tokens to train on; V3 had 14.8e12", above=0)
    prompt_tokens: int = option(0, "an API workload to price: tokens of all prompts", low=0)
    cached_tokens: int = option(0, "of these, tokens that the service has in its cache", low=0)
    output_tokens: int = option(0, "the same workload: tokens of all replies", low=0)


def section(title: str, columns: tuple, rows: list) -> list:
    """Return a blank row, a heading with column titles, and the indented rows, four cells each."""
    rows = ["  " + row if isinstance(row, str) else ("  " + row[0], *row[1:]) for row in rows]
    return [row if isinstance(row, str) else (*row, "", "", "", "")[:4]
            for row in ("", (title, *columns), *rows)]


def scaled(amount: float, unit: str, step: int = 1000) -> str:
    """Return an amount with a prefixed unit: 70272 bytes -> '70.27 KB', by 1024 '68.62 KiB'."""
    prefixes = ["", "K", "M", "G", "T", "P"]
    while amount >= step and len(prefixes) > 1:
        amount, prefixes = amount / step, prefixes[1:]
    return f"{amount:.2f} {prefixes[0]}{'i' if prefixes[0] and step == 1024 else ''}{unit}"


def parameter_rows(args: ModelArgs) -> list:
    """Return the rows of the parameters by part, and of a checkpoint in the released format."""
    count, head = count_parameters(args), args.vocab_size * args.dim
    parts = [(part.replace("_", " "), n, count.active_parts[part],
              f"{count.active_parts[part] / count.active:.1%}")
             for part, n in count.parts.items() if n]
    mtp = [("",), ("MTP modules", count.mtp),
           ("MTP as stored, with copies of both", count.mtp_stored),
           ("main model and MTP as stored", count.total + count.mtp_stored)]
    elements, scales = stored_elements(args)
    what = {"F8_E4M3": (1, "most matrices"), "BF16": (2, "embedding, head, gates, norms"),
            "F32": (4, f"{scales:,} scales, gate biases")}
    stored = [(f"{name}: {what[name][1]}", n, n * what[name][0]) for name, n in elements.items()]
    stored.append(("all", sum(elements.values()), sum(size for *_, size in stored)))
    title = "Checkpoint in FP8" + ", MTP included" * (args.n_mtp_layers > 0)
    return [
        *section("Parameters", ("total", "active", "of the active"), [
            *parts, ("",), ("all", count.total, count.active, "100.0%"),
            ("all without embedding", "", count.active_without_embedding),
            ("all without embedding and head", "", count.active_without_embedding - head),
            *(mtp if args.n_mtp_layers else [])]),
        *section(title, ("numbers", "size"), [
            (name, n, scaled(size, "B")) for name, n, size in stored])]


def flops_rows(args: ModelArgs, seq_len: int) -> list:
    """Return the rows of FLOPs per token: of the model, and of attention as the context grows."""
    forms = ("dense, naive", "dense, absorbed", "DSA")[:2 + args.has_indexer]
    longest = max(args.max_seq_len, seq_len)
    contexts = sorted({seq_len, *(2 ** n for n in range(11, 18, 2) if 2 ** n <= longest)})
    growth = [(f"{context:,} keys, all layers", *flops.attention_flops(args, context).values())
              for context in contexts]
    each = ("one key in one layer" + "; DSA: the indexer" * args.has_indexer,
            *(count for count in flops.pair_flops(args).values() if count))
    return [
        *section(f"FLOPs per token, {seq_len:,} tokens", ("causal", "non-causal"), [
            (name, round(f(args, seq_len)), round(f(args, seq_len, causal=False)))
            for name, f in [("training", flops.flops_per_token),
                            ("forward", flops.forward_flops_per_token)]]),
        *section("FLOPs of attention, one query", forms, [each, *growth])]


def cache_rows(args: ModelArgs, seq_len: int, n_groups: int) -> list:
    """Return the rows of the cache: per token, and of a long request."""
    length = max(seq_len, min(args.max_seq_len, 131072))
    cache, layers = cache_bytes_per_token(args, n_groups=n_groups), args.n_layers
    names = {"mla": "MLA", "mha": "MHA, as many heads", "mqa": "MQA", "indexer": "DSA's indexer",
             "gqa": f"GQA, {min(n_groups, args.n_heads)} groups"}
    sizes = {f"{names[form]}, BF16": size for form, size in cache.items()}
    if args.n_mtp_layers:
        more = layers + args.n_mtp_layers
        sizes[f"MLA, BF16, {more} layers with MTP"] = cache["mla"] // layers * more
    sizes |= {f"{names[form]}, FP8, {size} a layer": size * layers
              for form, size in fp8_cache_bytes_per_layer(args).items()}
    return section("Cache", ("bytes per token", "times MLA", f"{length:,} tokens"), [
        (name, size, f"{size / cache['mla']:.2f}", scaled(size * length, "B", 1024))
        for name, size in sizes.items()])


def drafting_rows(args: ModelArgs, acceptance: float) -> list:
    """Return the rows of what MTP drafts gain where reading weights takes all the time."""
    rows = []
    for drafts, batch in product((1, 2), (1, 8, 64, 256)):
        d = drafting(args, acceptance, drafts, batch)
        rows.append((f"{drafts} draft{'s' * (drafts > 1)}, batch {batch}", f"{d.tokens:.2f}",
                     f"{d.check / d.plain:.2f} + {d.draft / d.plain:.2f}", f"{d.speedup:.2f}"))
    return section(f"Drafts, {acceptance:.0%} accepted",
                   ("tokens a pass", "weights read", "times as fast"), rows)


def memory_rows(run: Plan, rental: Rental) -> list:
    """Return the rows of a training run's memory, and whether it fits."""
    s, memory = run.sharding, run.memory
    sizes = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer")}
    sizes[f"activations, {s.micro_batch_tokens:,} tokens at a time"] = memory.activations
    return section("Training memory of one GPU, without workspace", ("size",), [
        f"{s.gpus:,} {rental.gpu}: pipeline {s.pipeline}{' (DualPipe)' * s.dualpipe}, "
        f"expert-parallel {s.expert_parallel}, ZeRO {s.zero}, recompute {s.recompute}",
        f"fullest is rank {memory.rank}: {memory.holds}; {memory.parameters:,} parameters",
        *((name, scaled(size, "B")) for name, size in sizes.items()),
        ("all", scaled(memory.total, "B"),
         "fits into" if run.fits else "does not fit into", f"{rental.gpu_memory:g} GB")])


def money_row(label: str, due: Bill) -> tuple:
    """Return a row of GPU-hours, dollars and days."""
    return label, round(due.gpu_hours), round(due.dollars), f"{due.days:,.1f}"


def bill_rows(run: Plan, rental: Rental, tokens: float, work: float) -> list:
    """Return the rows of a training run's bill; `work` is its FLOPs per token."""
    each = run.bill._replace(gpu_hours=run.bill.gpu_hours * 1e12 / tokens)
    return section("Training bill", ("GPU-hours", "USD", "days"), [
        f"{scaled(work, 'FLOPs')} a token; {rental.mfu:.1%} of {rental.gpu_peak:g} TFLOPS; "
        f"{rental.gpu_price:g} USD an hour for each of {run.bill.gpus:,} {rental.gpu}",
        money_row(f"{tokens:,.0f} tokens", run.bill), money_row("each 1T of tokens", each)])


def paper_rows(args: ModelArgs) -> list:
    """Return the rows of V3's own bill (V3 table 1), and the MFU that it implies."""
    h800, hours = Rental(), bill.V3_GPU_HOURS
    rows = [money_row(name, Bill(count, Sharding.gpus, h800.gpu_price))[:3]
            for name, count in (hours | {"all": sum(hours.values())}).items()]
    each = Bill(hours["pre-training"] * 1e12 / bill.V3_TOKENS, Sharding.gpus, h800.gpu_price)
    rows += [money_row("pre-training, each 1T of tokens", each), "pre-training ran at"]
    for name, work in [("as counted here", flops.flops_per_token(args, 4096)),
                       ("at the paper's 250 GFLOPs", 250e9)]:
        got = work * bill.V3_TOKENS / (hours["pre-training"] * 3600) / 1e12
        rows.append(f"  {got:.1f} TFLOPS, {got / h800.gpu_peak:.1%} of the peak, {name}")
    return section("V3's bill as published", ("GPU-hours", "USD", "days"), rows)


def price_rows(workload: tuple[int, int, int], prices: Prices) -> list:
    """Return the rows of an API workload, at the given prices or else at measured serving costs."""
    own = {"at the given prices": prices} if prices != Prices() else {
        f"{name}, cost at position 128K": price for name, price in bill.SERVING_128K.items()}
    return section("API workload", ("USD",), [
        "{:,} prompt tokens, {:,} of them cached, {:,} output tokens".format(*workload),
        *((name, f"{bill.api_price(*workload, price):,.4f}") for name, price in own.items())])


def card_table(rented: dict) -> str:
    """Return the table of the presets made for one card, with the changed rates in `rented`."""
    from minids.runs.settings import TrainArgs  # brings torch, which the other tables do without
    rows = [("", "memory", "of peak", "tokens/s", "tokens", "hours", "USD", "loss")]
    for rental, preset, measured in CARDS:
        train = TrainArgs.for_preset(preset)
        recipe = Recipe(train.seq_len, train.batch_size // train.grad_accum,
                        train.steps * train.batch_size * train.seq_len, train.recompute != "none")
        rental = replace(rental, **rented)
        run = plan_card(ModelArgs.preset(preset), recipe, rental)
        share = f"{rental.mfu:.0%}" + "*" * (measured and "mfu" not in rented)
        rows.append((f"{preset} on {rental.gpu}, {rental.gpu_memory:g} GB",
                     f"{run.memory / 1e9:.1f} GB" + ", too much" * (not run.fits), share,
                     round(run.tokens_per_second), scaled(recipe.tokens, ""),
                     round(run.bill.gpu_hours), round(run.bill.dollars), f"{run.loss:.2f}"))
    return format_table([*rows, "", *CARD_NOTES])


def main(argv: list[str] | None = None) -> None:
    """Print the table of one configuration."""
    given, rented, spread, price, changes = parse(
        "minids.costs", __doc__, CostArgs, Rental, Sharding, Prices, ModelArgs, argv=argv)
    settings, rental, prices = CostArgs(**given), Rental(**rented), Prices(**price)
    if settings.what == "cards":
        return print(card_table(rented))
    args = replace(ModelArgs.preset(settings.preset), **changes)
    seq_len = settings.seq_len or min(args.max_seq_len, args.original_seq_len)
    sharding = bill.choose_sharding(args, spread.pop("gpus", Sharding.gpus), rental, spread)
    run = bill.plan(args, settings.tokens, rental, sharding, seq_len)
    changed = "".join(f", {name} = {value}" for name, value in changes.items())
    rows = [settings.preset + changed, *parameter_rows(args), *flops_rows(args, seq_len),
            *cache_rows(args, seq_len, settings.n_groups)]
    if args.n_mtp_layers:
        rows += drafting_rows(args, settings.acceptance)
    rows += memory_rows(run, rental)
    rows += bill_rows(run, rental, settings.tokens, flops.flops_per_token(args, seq_len))
    if args == ModelArgs.preset("v3"):
        rows += paper_rows(args)
    workload = settings.prompt_tokens, settings.cached_tokens, settings.output_tokens
    if any(workload):
        rows += price_rows(workload, prices)
    print(format_table(rows))


if __name__ == "__main__":
    run_program("minids.costs", main)
